//! What a leaf certificate says, read once and strictly.
//!
//! The profile is the X.509-SVID standard's (sections 2 to 4): exactly one URI
//! SAN, which is a SPIFFE ID; not a CA; a key usage of `digitalSignature` and
//! neither `keyCertSign` nor `cRLSign`. The same reading is applied to what a
//! peer shows and to what a CA gives us, so we never present what we would
//! refuse.

use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_PKCS1_RSAENCRYPTION,
    OID_SIG_ED25519,
};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::public_key::PublicKey;

use crate::spiffe_id::SpiffeId;
use crate::verifier::PeerRefusal;

/// Bytes of DER beyond which a certificate is not even parsed.
pub const MAX_CERTIFICATE_BYTES: usize = 64 * 1024;

/// The facts of a leaf that obeys the profile. Nothing here is trusted yet: no
/// signature and no date has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub(crate) id: SpiffeId,
    /// Seconds since the Unix epoch, first moment of validity.
    pub(crate) not_before: i64,
    /// Seconds since the Unix epoch, last moment of validity.
    pub(crate) not_after: i64,
    /// Lower-case hex without leading zero bytes.
    pub(crate) serial: String,
    /// The issuer's distinguished name, printable.
    pub(crate) issuer: String,
}

impl Leaf {
    /// Reads a leaf certificate.
    pub(crate) fn read(der: &CertificateDer<'_>) -> Result<Self, PeerRefusal> {
        if der.len() > MAX_CERTIFICATE_BYTES {
            return Err(PeerRefusal::TooLarge);
        }
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|_| PeerRefusal::Malformed)?;
        if !rest.is_empty() {
            return Err(PeerRefusal::Malformed);
        }
        if certificate.raw_serial().len() > MAX_SERIAL_BYTES {
            return Err(PeerRefusal::Malformed);
        }
        check_usage(&certificate)?;
        check_key(&certificate)?;
        Ok(Self {
            id: only_spiffe_id(&certificate)?,
            not_before: certificate.validity().not_before.timestamp(),
            not_after: certificate.validity().not_after.timestamp(),
            serial: hex(certificate.raw_serial()),
            issuer: printable(&certificate.issuer().to_string()),
        })
    }
}

/// The one URI SAN. Taking the first of several would let an issuer's mistake
/// choose who somebody is.
fn only_spiffe_id(certificate: &X509Certificate<'_>) -> Result<SpiffeId, PeerRefusal> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| PeerRefusal::Malformed)?
        .ok_or(PeerRefusal::NoUriSan)?;
    let mut only = None;
    for name in &names.value.general_names {
        match name {
            GeneralName::URI(uri) if only.is_none() => only = Some(*uri),
            GeneralName::URI(_) => return Err(PeerRefusal::SeveralUriSans),
            GeneralName::Invalid(..) => return Err(PeerRefusal::Malformed),
            _ => {}
        }
    }
    let uri = only.ok_or(PeerRefusal::NoUriSan)?;
    SpiffeId::parse(uri).map_err(PeerRefusal::InvalidSpiffeId)
}

fn check_usage(certificate: &X509Certificate<'_>) -> Result<(), PeerRefusal> {
    let constraints = certificate
        .basic_constraints()
        .map_err(|_| PeerRefusal::Malformed)?;
    if constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err(PeerRefusal::LeafIsCa);
    }
    let usage = certificate
        .key_usage()
        .map_err(|_| PeerRefusal::Malformed)?
        .ok_or(PeerRefusal::KeyUsage)?;
    if usage.value.key_cert_sign() || usage.value.crl_sign() {
        return Err(PeerRefusal::LeafIsCa);
    }
    if !usage.value.digital_signature() {
        return Err(PeerRefusal::KeyUsage);
    }
    Ok(())
}

/// A key that could sign no handshake we accept is refused before the handshake
/// is: ECDSA P-256 and P-384, Ed25519, RSA of 2048 to 8192 bits.
fn check_key(certificate: &X509Certificate<'_>) -> Result<(), PeerRefusal> {
    let key = certificate.public_key();
    let algorithm = &key.algorithm;
    let good = if algorithm.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY {
        let curve = algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok());
        curve.is_some_and(|curve| curve == OID_EC_P256 || curve == OID_NIST_EC_P384)
    } else if algorithm.algorithm == OID_PKCS1_RSAENCRYPTION {
        match key.parsed() {
            Ok(PublicKey::RSA(rsa)) => (2048..=8192).contains(&rsa.key_size()),
            _ => return Err(PeerRefusal::Malformed),
        }
    } else {
        algorithm.algorithm == OID_SIG_ED25519
    };
    if good {
        Ok(())
    } else {
        Err(PeerRefusal::WeakKey)
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let significant = bytes.iter().position(|&byte| byte != 0);
    let Some(bytes) = significant.and_then(|start| bytes.get(start..)) else {
        return "00".to_owned();
    };
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A name goes into logs and status pages: no control characters, no novels.
pub(crate) fn printable(name: &str) -> String {
    name.chars()
        .take(MAX_NAME_CHARS)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

const MAX_NAME_CHARS: usize = 256;
/// RFC 5280 section 4.1.2.2.
const MAX_SERIAL_BYTES: usize = 20;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn serials_are_hex_without_sign_padding() {
        assert_eq!(hex(&[0, 0x0a, 0xff]), "0aff");
        assert_eq!(hex(&[0, 0]), "00");
        assert_eq!(hex(&[]), "00");
    }

    #[test]
    fn names_cannot_break_a_log_line() {
        assert_eq!(printable("CN=a\nb\u{1b}[0m"), "CN=a\u{fffd}b\u{fffd}[0m");
        assert_eq!(printable(&"x".repeat(1000)).len(), MAX_NAME_CHARS);
    }

    #[test]
    fn trailing_bytes_are_malformed() {
        let ca = crate::testing::TestCa::new("td");
        let svid = ca.svid(&crate::testing::workload("td", "a", "b"));
        let mut der = svid.chain()[0].to_vec();
        assert!(Leaf::read(&CertificateDer::from(der.clone())).is_ok());
        der.push(0);
        assert_eq!(
            Leaf::read(&CertificateDer::from(der)),
            Err(PeerRefusal::Malformed)
        );
    }

    #[test]
    fn a_huge_certificate_is_not_parsed() {
        let der = CertificateDer::from(vec![0x30; MAX_CERTIFICATE_BYTES + 1]);
        assert_eq!(Leaf::read(&der), Err(PeerRefusal::TooLarge));
    }

    proptest! {
        #[test]
        fn a_corrupted_certificate_never_panics(at in 0usize..4096, bit in 0u8..8) {
            let ca = crate::testing::TestCa::shared();
            let mut der = ca.svid(&crate::testing::workload("td", "a", "b")).chain()[0].to_vec();
            let at = at % der.len();
            der[at] ^= 1 << bit;
            let _ = Leaf::read(&CertificateDer::from(der));
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = Leaf::read(&CertificateDer::from(bytes));
        }
    }
}
