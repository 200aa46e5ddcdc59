//! The roots in force: the one that signs, and during a rotation another one that is
//! only trusted.
//!
//! Which files there are says how far a rotation is:
//!
//! | `ca-key.pem` | `next-key.pem` | `old-key.pem` | `root-cert.pem` | |
//! |---|---|---|---|---|
//! | A | – | – | A | no rotation |
//! | A | B | – | A | `prepare` was interrupted: as if not begun |
//! | A | B | – | A B | prepared |
//! | A | B | A | A B | `switch` was interrupted: still prepared |
//! | B | – | A | A B | switched |
//! | B | – | A | B | `finish` was interrupted: A is no longer trusted |
//! | B | – | – | B | no rotation |

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::crypto::aws_lc_rs;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use zeroize::Zeroizing;

use super::csr::{Csr, uri};
use super::files::{io, read_key};
use super::{CaError, KEY_FILE, NEXT_KEY_FILE, OLD_KEY_FILE, ROOT_FILE};
use crate::config::ServerName;

/// How far a rotation of the root is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RotationPhase {
    /// There is one root.
    Idle,
    /// The next root is trusted; the old one signs.
    Prepared,
    /// The new root signs; the old one is still trusted.
    Switched,
}

/// A root certificate and its key.
pub(crate) struct Root {
    key: Zeroizing<KeyPair>,
    pub(crate) der: CertificateDer<'static>,
    pub(crate) not_after: OffsetDateTime,
}

pub(crate) struct Roots {
    pub(crate) phase: RotationPhase,
    pub(crate) signing: Root,
    /// The next one or the old one, as the phase says.
    pub(crate) other: Option<Root>,
    bundle_pem: String,
}

/// A signed SVID, PEM.
pub(crate) struct Signed {
    pub(crate) leaf_pem: String,
    pub(crate) serial: [u8; SERIAL_BYTES],
    pub(crate) not_after: OffsetDateTime,
}

impl Roots {
    /// Reads the directory, which must not change meanwhile. Expired roots are read too.
    pub(crate) fn load(state_dir: &Path, trust_domain: &str) -> Result<Self, CaError> {
        let root_path = state_dir.join(ROOT_FILE);
        let unusable = |reason: String| CaError::Unusable {
            path: root_path.clone(),
            reason,
        };
        let Some(key) = read_key(&state_dir.join(KEY_FILE))? else {
            return Err(CaError::KeyMissing { path: root_path });
        };
        let bundle_pem =
            std::fs::read_to_string(&root_path).map_err(|e| io("read", &root_path, e))?;
        // It is sent to every node.
        if bundle_pem.contains("PRIVATE KEY") {
            return Err(unusable(
                "it holds a private key: replace the CA".to_owned(),
            ));
        }
        let mut certificates = CertificateDer::pem_slice_iter(bundle_pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| unusable(e.to_string()))?;

        let mut take = |key: &KeyPair| -> Result<Option<CertificateDer<'static>>, CaError> {
            let mut found = None;
            let mut others = Vec::new();
            for der in certificates.drain(..) {
                let same = is_of_key(&der, key).map_err(unusable)?;
                match same {
                    true => found = Some(der),
                    false => others.push(der),
                }
            }
            certificates = others;
            Ok(found)
        };
        let signing = take(&key)?.ok_or_else(|| {
            unusable(format!(
                "it does not hold the certificate of the key in {KEY_FILE}"
            ))
        })?;
        let mut other = None;
        for (file, phase) in [
            (NEXT_KEY_FILE, RotationPhase::Prepared),
            (OLD_KEY_FILE, RotationPhase::Switched),
        ] {
            // A key without a certificate in the bundle is what an interrupted step left.
            if let Some(key) = read_key(&state_dir.join(file))?
                && let Some(der) = take(&key)?
                && other.replace((phase, key, der)).is_some()
            {
                return Err(unusable(format!(
                    "it holds the certificates of {KEY_FILE}, {NEXT_KEY_FILE} and {OLD_KEY_FILE}, which no rotation leads to"
                )));
            }
        }
        if !certificates.is_empty() {
            return Err(unusable(format!(
                "it holds {} certificates whose keys are not beside it: remove what is not this CA's, or restore the keys",
                certificates.len()
            )));
        }
        let root = |key, der| Root::new(key, der, &root_path, trust_domain);
        let signing = root(key, signing)?;
        let (phase, other) = match other {
            Some((phase, key, der)) => (phase, Some(root(key, der)?)),
            None => (RotationPhase::Idle, None),
        };
        Ok(Self {
            phase,
            signing,
            other,
            bundle_pem,
        })
    }

    /// PEM of all current roots.
    pub(crate) fn bundle_pem(&self) -> &str {
        &self.bundle_pem
    }

    pub(crate) fn is_same_as(&self, other: &Self) -> bool {
        let der = |roots: &Self| roots.other.as_ref().map(|root| root.der.clone());
        self.phase == other.phase
            && self.signing.der == other.signing.der
            && der(self) == der(other)
            && self.bundle_pem == other.bundle_pem
    }

    /// Signs an SVID for the key in the request. Only the key is taken from the
    /// request, and the URI, which the caller has compared with what may be asked for.
    pub(crate) fn sign_svid(&self, csr: &Csr, validity: Duration) -> Result<Signed, CaError> {
        let serial = serial();
        let mut params = leaf_params(&serial, self.signing.not_after(validity));
        params.subject_alt_names = vec![SanType::URI(csr.uri.as_str().try_into()?)];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params.signed_by(&csr.key, &self.signing.issuer()?)?;
        Ok(Signed {
            leaf_pem: certificate.pem(),
            serial,
            not_after: params.not_after,
        })
    }

    /// A key and certificate for the control plane's own TLS listener.
    ///
    /// After `switch` its chain ends in a certificate that the old root gave to the
    /// new one, so that an agent that has only the old root's file gets in as well.
    pub(crate) fn server_certificate(
        &self,
        names: &[ServerName],
        validity: Duration,
    ) -> Result<Arc<CertifiedKey>, CaError> {
        let mut params = leaf_params(&serial(), self.signing.not_after(validity));
        for name in names {
            params.subject_alt_names.push(match name {
                ServerName::Dns(name) => SanType::DnsName(name.as_str().try_into()?),
                ServerName::Ip(address) => SanType::IpAddress(*address),
            });
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = Zeroizing::new(KeyPair::generate()?);
        let certificate = params.signed_by(&*key, &self.signing.issuer()?)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let above = match (self.phase, &self.other) {
            (RotationPhase::Switched, Some(old)) => self.signing.crossed_by(old, validity)?,
            _ => None,
        };
        let chain = vec![
            certificate.der().clone(),
            above.unwrap_or_else(|| self.signing.der.clone()),
        ];
        Ok(Arc::new(CertifiedKey::from_der(
            chain,
            key,
            &aws_lc_rs::default_provider(),
        )?))
    }
}

impl Root {
    fn new(
        key: Zeroizing<KeyPair>,
        der: CertificateDer<'static>,
        path: &Path,
        trust_domain: &str,
    ) -> Result<Self, CaError> {
        let unusable = |reason: String| CaError::Unusable {
            path: path.to_owned(),
            reason,
        };
        let (_, root) = X509Certificate::from_der(&der).map_err(|e| unusable(e.to_string()))?;
        let names = root
            .subject_alternative_name()
            .map_err(|e| unusable(e.to_string()))?;
        let found = names
            .and_then(|names| names.value.general_names.iter().find_map(uri))
            .unwrap_or_default();
        if found != spiffe_trust_domain(trust_domain) {
            let found = found.strip_prefix("spiffe://").unwrap_or(found).to_owned();
            return Err(CaError::OtherTrustDomain {
                path: path.to_owned(),
                found,
                expected: trust_domain.to_owned(),
            });
        }
        let not_after = root.validity().not_after.to_datetime();
        Ok(Self {
            key,
            der,
            not_after,
        })
    }

    /// SHA-256 of the DER, as hexadecimal digits.
    pub(crate) fn fingerprint(&self) -> String {
        let digest = ring::digest::digest(&ring::digest::SHA256, &self.der);
        hex(digest.as_ref())
    }

    /// The certificate.
    pub(crate) fn pem(&self) -> String {
        // RFC 7468, section 2: lines of 64 characters.
        let body: String = BASE64_STANDARD
            .encode(&self.der)
            .char_indices()
            .flat_map(|(at, c)| (at % 64 == 0).then_some('\n').into_iter().chain([c]))
            .collect();
        format!("-----BEGIN CERTIFICATE-----{body}\n-----END CERTIFICATE-----\n")
    }

    fn issuer(&self) -> Result<Issuer<'static, &KeyPair>, CaError> {
        Ok(Issuer::from_ca_cert_der(&self.der, &*self.key)?)
    }

    /// A certificate for this root's name and key by another root; `None` when there
    /// can be none.
    fn crossed_by(
        &self,
        by: &Self,
        validity: Duration,
    ) -> Result<Option<CertificateDer<'static>>, CaError> {
        let (_, root) = X509Certificate::from_der(&self.der)
            .map_err(|_| rcgen::Error::CouldNotParseCertificate)?;
        let trust_domain = root
            .subject_alternative_name()
            .ok()
            .flatten()
            .and_then(|names| names.value.general_names.iter().find_map(uri))
            .and_then(|id| id.strip_prefix("spiffe://"));
        let Some(trust_domain) = trust_domain else {
            return Ok(None);
        };
        let mut params = root_params(trust_domain, &self.key)?;
        params.not_after = self.not_after(validity).min(by.not_after(validity));
        params.use_authority_key_identifier_extension = true;
        if params.not_after <= OffsetDateTime::now_utc() {
            return Ok(None);
        }
        let crossed = params.signed_by(&*self.key, &by.issuer()?)?;
        let der = crossed.der().clone();
        // A root that was not made here may have another name.
        let linked = X509Certificate::from_der(&der)
            .is_ok_and(|(_, crossed)| crossed.subject().as_raw() == root.subject().as_raw());
        Ok(linked.then_some(der))
    }

    /// A certificate never outlives its issuer.
    fn not_after(&self, validity: Duration) -> OffsetDateTime {
        (OffsetDateTime::now_utc() + validity).min(self.not_after)
    }
}

/// Makes a root certificate for a key, PEM. The name follows from the key: a
/// certificate that is made again verifies what the lost one has signed.
pub(crate) fn self_signed(trust_domain: &str, key: &KeyPair) -> Result<String, CaError> {
    Ok(root_params(trust_domain, key)?.self_signed(key)?.pem())
}

fn is_of_key(certificate: &CertificateDer<'_>, key: &KeyPair) -> Result<bool, String> {
    let (_, certificate) =
        X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
    Ok(certificate.public_key().raw == key.subject_public_key_info().as_slice())
}

fn root_params(trust_domain: &str, key: &KeyPair) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, trust_domain);
    // Two roots of one name would be told apart by trial only.
    let id = params.key_identifier(key);
    let id = hex(id.get(..NAME_BYTES).unwrap_or_default());
    name.push(DnType::CommonName, format!("Ringfence root {id}"));
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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

const SERIAL_BYTES: usize = 16;
/// Of the key identifier, in a root's name.
const NAME_BYTES: usize = 4;
pub(super) const ROOT_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// Nodes' clocks may be this much behind.
const CLOCK_SKEW: Duration = Duration::from_secs(60);
