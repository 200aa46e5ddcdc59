//! The certificate authority: self-signed roots whose keys never leave the
//! state directory, and the certificates they sign.
//!
//! It decides nothing about *who* may have a certificate; that is
//! [`crate::ca_service`]'s. There is no revocation: certificates are short-lived.

mod csr;
pub(crate) mod files;
pub(crate) mod roots;
pub(crate) mod served;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::KeyPair;
use time::OffsetDateTime;
use tokio::sync::watch;
use zeroize::Zeroizing;

use self::files::Access;
pub(crate) use csr::{Csr, CsrError};
pub(crate) use roots::{Root, Roots};
pub(crate) use served::Served;

/// The key that signs.
pub(crate) const KEY_FILE: &str = "ca-key.pem";
/// The key that is to sign next.
pub(crate) const NEXT_KEY_FILE: &str = "next-key.pem";
/// The key that has signed before.
pub(crate) const OLD_KEY_FILE: &str = "old-key.pem";
/// The certificates of all current roots.
pub(crate) const ROOT_FILE: &str = "root-cert.pem";
const LOCK_FILE: &str = "lock";

/// The state directory or what is in it cannot be used: the operator's to fix.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaError {
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{} is in use by another control plane", path.display())]
    Locked { path: PathBuf },
    #[error("the roots in {} are being changed by another command, which does not end: look for a stopped `ringfence`", path.display())]
    Rotating { path: PathBuf },
    #[error("{} can be read by others (mode {mode:04o}): make it 0600; if anyone else may have read it, replace the CA", path.display())]
    KeyExposed { path: PathBuf, mode: u32 },
    #[error("{} exists, but not the key {KEY_FILE} beside it: restore the key, or remove the certificate to make a new CA", path.display())]
    KeyMissing { path: PathBuf },
    #[error("{} is not usable: {reason}", path.display())]
    Unusable { path: PathBuf, reason: String },
    #[error("{} belongs to trust domain `{found}`, the mesh file says `{expected}`", path.display())]
    OtherTrustDomain {
        path: PathBuf,
        found: String,
        expected: String,
    },
    #[error("cannot sign: {0}")]
    Sign(#[from] rcgen::Error),
    #[error("cannot use the new server key: {0}")]
    ServerKey(#[from] rustls::Error),
}

/// The CA of a running control plane.
pub(crate) struct Ca {
    state_dir: PathBuf,
    trust_domain: String,
    roots: watch::Sender<Arc<Roots>>,
    /// Held as long as the CA is in use.
    _lock: File,
}

impl Ca {
    /// Opens the CA in `state_dir`, or makes one.
    pub(crate) fn open(state_dir: &Path, trust_domain: &str) -> Result<Self, CaError> {
        std::fs::create_dir_all(state_dir).map_err(|e| files::io("create", state_dir, e))?;
        let lock = files::lock_for_control_plane(&state_dir.join(LOCK_FILE))?;
        let roots = {
            let _unchanged = files::lock_roots(state_dir, Access::Change)?;
            make_what_is_missing(state_dir, trust_domain)?;
            Roots::load(state_dir, trust_domain)?
        };
        check_expiry(state_dir, &roots)?;
        Ok(Self {
            state_dir: state_dir.to_owned(),
            trust_domain: trust_domain.to_owned(),
            roots: watch::Sender::new(Arc::new(roots)),
            _lock: lock,
        })
    }

    /// What is signed with now, and by whom it is trusted.
    pub(crate) fn roots(&self) -> Arc<Roots> {
        self.roots.borrow().clone()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Roots>> {
        self.roots.subscribe()
    }

    pub(crate) fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Looks whether an operator's command has changed the roots, and takes them if so.
    pub(crate) fn reload(&self) -> Result<bool, CaError> {
        let roots = {
            let _unchanged = files::lock_roots(&self.state_dir, Access::Read)?;
            Roots::load(&self.state_dir, &self.trust_domain)?
        };
        if roots.is_same_as(&self.roots.borrow()) {
            return Ok(false);
        }
        check_expiry(&self.state_dir, &roots)?;
        self.roots.send_replace(Arc::new(roots));
        Ok(true)
    }

    /// Writes down what is served, for the commands of a rotation. To be called after
    /// every change of the roots, and before SVIDs are issued for longer than until now.
    pub(crate) fn record_served(&self, svid_ttl: Duration) -> Result<(), CaError> {
        Served::record(&self.state_dir, &self.roots(), svid_ttl, SystemTime::now())
    }
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let roots = self.roots.borrow();
        f.debug_struct("Ca")
            .field("phase", &roots.phase)
            .field("not_after", &roots.signing.not_after)
            .finish_non_exhaustive()
    }
}

fn make_what_is_missing(state_dir: &Path, trust_domain: &str) -> Result<(), CaError> {
    let (key_path, root_path) = (state_dir.join(KEY_FILE), state_dir.join(ROOT_FILE));
    let root_exists = root_path
        .try_exists()
        .map_err(|e| files::io("look for", &root_path, e))?;
    let key = match files::read_key(&key_path)? {
        Some(key) => key,
        None if root_exists => return Err(CaError::KeyMissing { path: root_path }),
        None => {
            let key = new_key(&key_path, None)?;
            tracing::info!(path = %key_path.display(), "made a new CA key");
            key
        }
    };
    if !root_exists {
        let root = roots::self_signed(trust_domain, &key)?;
        files::replace(&root_path, root.as_bytes(), 0o644, None)?;
        tracing::info!(path = %root_path.display(), %trust_domain, "made a new root certificate");
    }
    Ok(())
}

/// Makes a key that is on disk before it is used.
pub(crate) fn new_key(
    path: &Path,
    owner: Option<files::Owner>,
) -> Result<Zeroizing<KeyPair>, CaError> {
    let key = Zeroizing::new(KeyPair::generate()?);
    let pem = Zeroizing::new(key.serialize_pem());
    files::replace(path, pem.as_bytes(), 0o600, owner)?;
    Ok(key)
}

fn check_expiry(state_dir: &Path, roots: &Roots) -> Result<(), CaError> {
    let not_after = roots.signing.not_after;
    if not_after > OffsetDateTime::now_utc() {
        return Ok(());
    }
    Err(CaError::Unusable {
        path: state_dir.join(ROOT_FILE),
        reason: format!(
            "the root that signs expired at {not_after}: remove the file to have it made again"
        ),
    })
}

#[cfg(test)]
mod tests;
