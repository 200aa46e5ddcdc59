//! What the control plane last served, and since when: the record by which a rotation
//! knows when nobody depends on the roots before it any more.
//!
//! It is the control plane's to write, not the operator's command's: an agent learns of
//! a root with an answer from the control plane, not from a file that it has not read yet.

use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::files::{self, io};
use super::{CaError, Roots};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Served {
    /// SHA-256 fingerprints, the signing one first.
    roots: Vec<String>,
    /// The longest SVID lifetime while these roots were served, in seconds.
    svid_ttl_s: u64,
    /// When these roots came in force, in Unix milliseconds.
    since_ms: u64,
    /// When the last SVID that was issued before that has expired, in Unix milliseconds.
    settled_ms: u64,
}

impl Served {
    /// `None`: no control plane has served from this directory yet.
    pub(crate) fn read(state_dir: &Path) -> Result<Option<Self>, CaError> {
        let path = state_dir.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io("read", &path, e)),
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| CaError::Unusable {
                path,
                reason: format!("{error}: remove it; the control plane makes it again"),
            })
    }

    /// Records that from `now` on, and no earlier, only these roots are served.
    pub(crate) fn record(
        state_dir: &Path,
        roots: &Roots,
        svid_ttl: Duration,
        now: SystemTime,
    ) -> Result<(), CaError> {
        let before = Self::read(state_dir).unwrap_or_else(|error| {
            tracing::warn!(%error, "making the record of what is served again");
            None
        });
        let now_ms = unix_ms(now);
        let svid_ttl_s = svid_ttl.as_secs();
        let served = match before {
            Some(before) if before.is_of(roots) && before.svid_ttl_s >= svid_ttl_s => return Ok(()),
            Some(before) if before.is_of(roots) => Self {
                svid_ttl_s,
                ..before
            },
            Some(before) => Self {
                roots: fingerprints(roots),
                svid_ttl_s,
                since_ms: now_ms,
                settled_ms: before
                    .settled_ms
                    .max(later(now_ms, before.svid_ttl_s.max(svid_ttl_s))),
            },
            None => Self {
                roots: fingerprints(roots),
                svid_ttl_s,
                since_ms: now_ms,
                settled_ms: later(now_ms, svid_ttl_s),
            },
        };
        let path = state_dir.join(FILE);
        let text = serde_json::to_vec_pretty(&served).map_err(|e| io("write", &path, e.into()))?;
        files::replace(&path, &text, 0o644, None)
    }

    /// Are these the roots that are served?
    pub(crate) fn is_of(&self, roots: &Roots) -> bool {
        self.roots == fingerprints(roots)
    }

    /// When everybody who holds a valid SVID has got it with these roots.
    pub(crate) fn settled(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH
            .checked_add(Duration::from_millis(self.settled_ms))
            .unwrap_or(SystemTime::UNIX_EPOCH)
    }
}

fn fingerprints(roots: &Roots) -> Vec<String> {
    std::iter::once(&roots.signing)
        .chain(&roots.other)
        .map(super::Root::fingerprint)
        .collect()
}

fn later(ms: u64, seconds: u64) -> u64 {
    ms.saturating_add(seconds.saturating_mul(1000))
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

const FILE: &str = "served.json";
