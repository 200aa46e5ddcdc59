//! Certificate requests: what is read of them.

use rcgen::SubjectPublicKeyInfo;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;

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
    pub(super) key: SubjectPublicKeyInfo,
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

pub(super) fn uri<'a>(name: &GeneralName<'a>) -> Option<&'a str> {
    match name {
        GeneralName::URI(uri) => Some(uri),
        _ => None,
    }
}
