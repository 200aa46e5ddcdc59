//! The certificate authority: one self-signed root whose key never leaves the
//! state directory, and the certificates it signs.
//!
//! It decides nothing about *who* may have a certificate; that is
//! [`crate::ca_service`]'s. There is no revocation: certificates are short-lived.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::crypto::aws_lc_rs;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use zeroize::Zeroizing;

use crate::config::ServerName;

pub(crate) const KEY_FILE: &str = "ca-key.pem";
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

/// What is wrong with a certificate request: the caller's fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum CsrError {
    #[error("the CSR is not PEM of one CERTIFICATE REQUEST")]
    NotPem,
    #[error("the CSR is not PKCS#10")]
    Malformed,
    #[error("the CSR is not signed by its own key")]
    Signature,
    #[error("the CSR has a key that is too weak or of an unsupported kind")]
    Key,
    #[error("the CSR has {0} subject alternative names where exactly one URI was expected")]
    Names(usize),
    #[error("the CSR has a subject alternative name that is not a URI")]
    NotUri,
}

/// A request whose signature and shape are good.
pub(crate) struct Csr {
    /// The only subject alternative name.
    pub(crate) uri: String,
    key: SubjectPublicKeyInfo,
}

pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    root_pem: String,
    root_der: CertificateDer<'static>,
    not_after: OffsetDateTime,
    /// Held as long as the CA is in use.
    _lock: File,
}

/// A signed SVID, PEM.
pub(crate) struct Signed {
    pub(crate) leaf_pem: String,
    pub(crate) serial: [u8; SERIAL_BYTES],
    pub(crate) not_after: OffsetDateTime,
}

impl Ca {
    /// Opens the CA in `state_dir`, or makes one.
    pub(crate) fn open(state_dir: &Path, trust_domain: &str) -> Result<Self, CaError> {
        std::fs::create_dir_all(state_dir).map_err(|e| io("create", state_dir, e))?;
        let lock = lock(&state_dir.join(LOCK_FILE))?;
        let key_path = state_dir.join(KEY_FILE);
        let root_path = state_dir.join(ROOT_FILE);
        let root_exists = root_path
            .try_exists()
            .map_err(|e| io("look for", &root_path, e))?;
        let key = match read_key(&key_path)? {
            Some(key) => key,
            None if root_exists => return Err(CaError::KeyMissing { path: root_path }),
            None => {
                let key = KeyPair::generate()?;
                write_new(
                    &key_path,
                    Zeroizing::new(key.serialize_pem()).as_bytes(),
                    0o600,
                )?;
                tracing::info!(path = %key_path.display(), "made a new CA key");
                key
            }
        };
        if !root_exists {
            // The name and the key stay, so a certificate made again verifies old SVIDs too.
            let root = root_params(trust_domain)?.self_signed(&key)?;
            write_new(&root_path, root.pem().as_bytes(), 0o644)?;
            tracing::info!(path = %root_path.display(), %trust_domain, "made a new root certificate");
        }
        Self::with_root(lock, key, &root_path, trust_domain)
    }

    fn with_root(
        lock: File,
        key: KeyPair,
        path: &Path,
        trust_domain: &str,
    ) -> Result<Self, CaError> {
        let unusable = |reason: String| CaError::Unusable {
            path: path.to_owned(),
            reason,
        };
        let root_pem = std::fs::read_to_string(path).map_err(|e| io("read", path, e))?;
        let root_der = CertificateDer::from_pem_slice(root_pem.as_bytes())
            .map_err(|e| unusable(e.to_string()))?;
        let (_, root) = x509_parser::certificate::X509Certificate::from_der(&root_der)
            .map_err(|e| unusable(e.to_string()))?;
        if root.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(&key).as_slice() {
            return Err(unusable(format!(
                "it is not the certificate of the key in {KEY_FILE}"
            )));
        }
        let names = root
            .subject_alternative_name()
            .map_err(|e| unusable(e.to_string()))?;
        let found = names
            .and_then(|names| names.value.general_names.iter().find_map(uri))
            .unwrap_or_default();
        let expected = spiffe_trust_domain(trust_domain);
        if found != expected {
            let found = found.strip_prefix("spiffe://").unwrap_or(found).to_owned();
            return Err(CaError::OtherTrustDomain {
                path: path.to_owned(),
                found,
                expected: trust_domain.to_owned(),
            });
        }
        let not_after = root.validity().not_after.to_datetime();
        if not_after <= OffsetDateTime::now_utc() {
            return Err(unusable(format!(
                "it expired at {not_after}: remove it to have it made again"
            )));
        }
        let issuer = Issuer::from_ca_cert_der(&root_der, key)?;
        Ok(Self {
            issuer,
            root_pem,
            root_der,
            not_after,
            _lock: lock,
        })
    }

    /// PEM of the root.
    pub(crate) fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// Signs an SVID for the key in the request. Only the key is taken from the
    /// request, and the URI, which the caller has compared with what may be asked for.
    pub(crate) fn sign_svid(&self, csr: &Csr, validity: Duration) -> Result<Signed, CaError> {
        let serial = serial();
        let mut params = leaf_params(&serial, self.not_after(validity));
        params.subject_alt_names = vec![SanType::URI(csr.uri.as_str().try_into()?)];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params.signed_by(&csr.key, &self.issuer)?;
        Ok(Signed {
            leaf_pem: certificate.pem(),
            serial,
            not_after: params.not_after,
        })
    }

    /// A key and certificate for the control plane's own TLS listener.
    pub(crate) fn server_certificate(
        &self,
        names: &[ServerName],
        validity: Duration,
    ) -> Result<Arc<CertifiedKey>, CaError> {
        let mut params = leaf_params(&serial(), self.not_after(validity));
        for name in names {
            params.subject_alt_names.push(match name {
                ServerName::Dns(name) => SanType::DnsName(name.as_str().try_into()?),
                ServerName::Ip(address) => SanType::IpAddress(*address),
            });
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let chain = vec![certificate.der().clone(), self.root_der.clone()];
        Ok(Arc::new(CertifiedKey::from_der(
            chain,
            key,
            &aws_lc_rs::default_provider(),
        )?))
    }

    /// A leaf never outlives the root.
    fn not_after(&self, validity: Duration) -> OffsetDateTime {
        (OffsetDateTime::now_utc() + validity).min(self.not_after)
    }
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ca")
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Csr {
    /// Parses a PEM PKCS#10 request (RFC 2986) and checks that its signer has the key.
    pub(crate) fn parse(pem: &str) -> Result<Self, CsrError> {
        let (_, pem) =
            x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|_| CsrError::NotPem)?;
        if !matches!(
            pem.label.as_str(),
            "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST"
        ) {
            return Err(CsrError::NotPem);
        }
        let (rest, csr) =
            X509CertificationRequest::from_der(&pem.contents).map_err(|_| CsrError::Malformed)?;
        if !rest.is_empty() {
            return Err(CsrError::Malformed);
        }
        csr.verify_signature().map_err(|_| CsrError::Signature)?;

        let spki = &csr.certification_request_info.subject_pki;
        let strong = match spki.parsed().map_err(|_| CsrError::Key)? {
            PublicKey::EC(point) => point.key_size() >= 256,
            PublicKey::RSA(rsa) => rsa.key_size() >= 2048,
            _ => false,
        };
        let key = SubjectPublicKeyInfo::from_der(spki.raw).map_err(|_| CsrError::Key)?;
        if !strong {
            return Err(CsrError::Key);
        }

        let mut names = Vec::new();
        for extension in csr.requested_extensions().into_iter().flatten() {
            match extension {
                ParsedExtension::SubjectAlternativeName(san) => names.extend(&san.general_names),
                // A SAN that did not parse must not read as "no SAN".
                ParsedExtension::ParseError { .. } => return Err(CsrError::Malformed),
                _ => {}
            }
        }
        match names.as_slice() {
            [name] => Ok(Self {
                uri: uri(name).ok_or(CsrError::NotUri)?.to_owned(),
                key,
            }),
            names => Err(CsrError::Names(names.len())),
        }
    }
}

fn uri<'a>(name: &GeneralName<'a>) -> Option<&'a str> {
    match name {
        GeneralName::URI(uri) => Some(uri),
        _ => None,
    }
}

fn root_params(trust_domain: &str) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, trust_domain);
    name.push(DnType::CommonName, "Ringfence root");
    params.distinguished_name = name;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    // SPIFFE X.509-SVID, section 2: a signing certificate may name its trust domain.
    params.subject_alt_names = vec![SanType::URI(
        spiffe_trust_domain(trust_domain).as_str().try_into()?,
    )];
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + ROOT_VALIDITY;
    params.serial_number = Some(SerialNumber::from(serial().to_vec()));
    Ok(params)
}

/// What SVIDs and the server certificate share. The subject is empty: the names
/// are in the SAN extension, which is critical then (RFC 5280, section 4.2.1.6).
fn leaf_params(serial: &[u8; SERIAL_BYTES], not_after: OffsetDateTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(SerialNumber::from(serial.to_vec()));
    params.not_before = OffsetDateTime::now_utc() - CLOCK_SKEW;
    params.not_after = not_after;
    params
}

/// Positive and always the same length: the first byte is 0x40..=0x7f, which leaves 126 random bits.
fn serial() -> [u8; SERIAL_BYTES] {
    let mut serial: [u8; SERIAL_BYTES] = rand::random();
    serial[0] = (serial[0] & 0x3f) | 0x40;
    serial
}

fn spiffe_trust_domain(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}")
}

fn read_key(path: &Path) -> Result<Option<KeyPair>, CaError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io("open", path, e)),
    };
    // Of the open file, so that it cannot be exchanged in between.
    let mode = file
        .metadata()
        .map_err(|e| io("look at", path, e))?
        .permissions()
        .mode()
        & 0o7777;
    if mode & 0o077 != 0 {
        return Err(CaError::KeyExposed {
            path: path.to_owned(),
            mode,
        });
    }
    let pem = std::io::read_to_string(file)
        .map(Zeroizing::new)
        .map_err(|e| io("read", path, e))?;
    let unusable = |e: rcgen::Error| CaError::Unusable {
        path: path.to_owned(),
        reason: e.to_string(),
    };
    KeyPair::from_pem(&pem).map(Some).map_err(unusable)
}

/// All of the content or no file, also after a crash.
fn write_new(path: &Path, content: &[u8], mode: u32) -> Result<(), CaError> {
    let fresh = path.with_extension("new");
    match std::fs::remove_file(&fresh) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io("remove", &fresh, e)),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&fresh)
        .map_err(|e| io("create", &fresh, e))?;
    file.write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(|e| io("write", &fresh, e))?;
    std::fs::rename(&fresh, path).map_err(|e| io("create", path, e))
}

fn lock(path: &Path) -> Result<File, CaError> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|e| io("open", path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(CaError::Locked {
            path: path.to_owned(),
        }),
        Err(std::fs::TryLockError::Error(e)) => Err(io("lock", path, e)),
    }
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> CaError {
    CaError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

const SERIAL_BYTES: usize = 16;
const ROOT_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// Nodes' clocks may be this much behind.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests;
