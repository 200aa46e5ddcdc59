//! Certificates and keys as sources encode them.

use std::sync::Arc;

use rustls::sign::SigningKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::asn1_rs::{Any, FromDer};

use crate::svid::SvidError;

/// One or more PEM certificates. The error continues a sentence: "is not PEM".
pub(crate) fn pem_certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates = CertificateDer::pem_slice_iter(pem)
        .take(MAX_CERTIFICATES.saturating_add(1))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| format!("is not PEM: {error}"))?;
    if certificates.is_empty() {
        return Err("holds no PEM certificate".to_owned());
    }
    if certificates.len() > MAX_CERTIFICATES {
        return Err(format!("holds more than {MAX_CERTIFICATES} certificates"));
    }
    Ok(certificates)
}

/// DER certificates, one behind the other; none is no error.
pub(crate) fn der_certificates(mut der: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut certificates = Vec::new();
    while !der.is_empty() {
        let (rest, _) = Any::from_der(der).map_err(|_| "not DER certificates".to_owned())?;
        let one = der.len().checked_sub(rest.len()).and_then(|n| der.get(..n));
        certificates.push(CertificateDer::from(one.unwrap_or_default().to_vec()));
        if certificates.len() > MAX_CERTIFICATES {
            return Err(format!("more than {MAX_CERTIFICATES} certificates"));
        }
        der = rest;
    }
    Ok(certificates)
}

/// A private key, held by aws-lc from now on; the encoding is the caller's to
/// wipe.
pub(crate) fn signing_key(der: &PrivateKeyDer<'_>) -> Result<Arc<dyn SigningKey>, SvidError> {
    rustls::crypto::aws_lc_rs::sign::any_supported_type(der).map_err(|_| SvidError::UnusableKey)
}

/// More than any chain or bundle has.
pub(crate) const MAX_CERTIFICATES: usize = 64;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::{TestCa, pem_chain};

    #[test]
    fn both_encodings_give_the_same_certificates() {
        let chain = [
            TestCa::new("td").root().clone(),
            TestCa::new("td").root().clone(),
        ];
        let der: Vec<u8> = chain.iter().flat_map(|der| der.to_vec()).collect();
        assert_eq!(der_certificates(&der).unwrap(), chain);
        let pem = pem_chain(&chain);
        assert_eq!(pem_certificates(pem.as_bytes()).unwrap(), chain);
        assert_eq!(der_certificates(&[]).unwrap(), []);
    }

    #[test]
    fn what_is_cut_empty_or_endless_is_refused() {
        let root = TestCa::shared().root().clone();
        let cut = &root[..root.len() - 1];
        assert_eq!(der_certificates(cut).unwrap_err(), "not DER certificates");
        let many = root.repeat(MAX_CERTIFICATES + 1);
        let error = der_certificates(&many).unwrap_err();
        assert_eq!(error, "more than 64 certificates");
        let many = pem_chain([&root]).repeat(MAX_CERTIFICATES + 1);
        let error = pem_certificates(many.as_bytes()).unwrap_err();
        assert_eq!(error, "holds more than 64 certificates");
        let error = pem_certificates(b"hello").unwrap_err();
        assert_eq!(error, "holds no PEM certificate");
        let error = pem_certificates(b"-----BEGIN CERTIFICATE-----\n!\n").unwrap_err();
        assert!(error.starts_with("is not PEM"), "{error}");
    }
}
