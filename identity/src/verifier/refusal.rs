//! Why a peer was refused.

use rustls::{CertificateError, Error};

use crate::spiffe_id::{InvalidSpiffeId, SpiffeId, TrustDomain};

/// Why a peer's identity was not accepted: the peer (or whoever issued its
/// certificate) is at fault, save for [`VerifierReused`](Self::VerifierReused).
///
/// `Display` is for our log. The peer learns no more than a TLS alert.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PeerRefusal {
    /// It has no certificate.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// Its certificate names nobody.
    #[error("the peer's certificate has no URI SAN")]
    NoUriSan,
    /// Its certificate names more than one.
    #[error("the peer's certificate has more than one URI SAN")]
    SeveralUriSans,
    /// The URI SAN is not a canonical SPIFFE ID of a workload.
    #[error("the peer's URI SAN is refused: {0}")]
    InvalidSpiffeId(InvalidSpiffeId),
    /// We have no bundle for its trust domain.
    #[error("no trust bundle for the peer's trust domain {0}")]
    UnknownTrustDomain(TrustDomain),
    /// No path to a root of its own trust domain.
    #[error("the peer's chain does not lead to a root of its trust domain: {0}")]
    Untrusted(String),
    /// A certificate of the chain has expired.
    #[error("the peer's certificate chain has expired")]
    Expired,
    /// A certificate of the chain is not valid yet, beyond the allowed skew.
    #[error("the peer's certificate chain is not valid yet")]
    NotYetValid,
    /// A trusted peer, but not the one the connection was meant for.
    #[error("the peer is {0}, which is not an identity of the destination")]
    WrongIdentity(SpiffeId),
    /// A CA certificate, or one with a CA's key usage, shown as a leaf.
    #[error("the peer's leaf certificate is a CA certificate")]
    LeafIsCa,
    /// The key usage extension is absent or lacks `digitalSignature`.
    #[error("the peer's certificate has no key usage digitalSignature")]
    KeyUsage,
    /// The extended key usage does not cover the role the peer plays.
    #[error("the peer's certificate is not for this side of TLS (extended key usage)")]
    ExtendedKeyUsage,
    /// A signature algorithm or key size that is not accepted.
    #[error("the peer's chain is signed with an algorithm that is not accepted")]
    WeakSignature,
    /// The leaf's key is of a kind or size that is not accepted.
    #[error("the peer's key is not ECDSA P-256/P-384, Ed25519 or RSA of 2048 to 8192 bits")]
    WeakKey,
    /// A revocation list of its trust domain names a certificate of the chain.
    #[error("certificate {serial} of issuer {issuer}, in the peer's chain, is revoked")]
    Revoked {
        /// Lower-case hex.
        serial: String,
        /// A printable distinguished name.
        issuer: String,
    },
    /// Revocation lists are configured for its trust domain, but none that is
    /// valid covers the chain.
    #[error("whether the peer's chain is revoked is not known: {0}")]
    RevocationUnknown(String),
    /// The peer does not have the leaf's private key.
    #[error("the peer's handshake signature is not of its certificate's key")]
    BadHandshakeSignature,
    /// Not DER, not X.509, or an extension that does not parse.
    #[error("the peer's certificate is malformed")]
    Malformed,
    /// A certificate or chain larger than any honest one.
    #[error("the peer's certificate chain is too large")]
    TooLarge,
    /// Our own mistake: one verifier was given to two connections.
    #[error("one verifier was used for two handshakes (a bug in the caller)")]
    VerifierReused,
}

impl PeerRefusal {
    /// A short fixed name: a metric label.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no-certificate",
            Self::NoUriSan => "no-uri-san",
            Self::SeveralUriSans => "several-uri-sans",
            Self::InvalidSpiffeId(_) => "invalid-spiffe-id",
            Self::UnknownTrustDomain(_) => "unknown-trust-domain",
            Self::Untrusted(_) => "untrusted",
            Self::Expired => "expired",
            Self::NotYetValid => "not-yet-valid",
            Self::WrongIdentity(_) => "wrong-identity",
            Self::LeafIsCa => "leaf-is-ca",
            Self::KeyUsage => "key-usage",
            Self::ExtendedKeyUsage => "extended-key-usage",
            Self::WeakSignature => "weak-signature",
            Self::WeakKey => "weak-key",
            Self::Revoked { .. } => "revoked",
            Self::RevocationUnknown(_) => "revocation-unknown",
            Self::BadHandshakeSignature => "bad-handshake-signature",
            Self::Malformed => "malformed",
            Self::TooLarge => "too-large",
            Self::VerifierReused => "verifier-reused",
        }
    }

    /// The rustls error whose alert tells the peer the kind of mistake (RFC
    /// 8446 section 6.2), and nothing of what we trust.
    pub(super) fn to_rustls(&self) -> Error {
        let error = match self {
            Self::NoCertificate => return Error::NoCertificatesPresented,
            Self::VerifierReused => return Error::General(self.to_string()),
            // bad_certificate
            Self::NoUriSan | Self::SeveralUriSans | Self::InvalidSpiffeId(_) => {
                CertificateError::NotValidForName
            }
            Self::Malformed | Self::TooLarge => CertificateError::BadEncoding,
            // unknown_ca
            Self::UnknownTrustDomain(_) | Self::Untrusted(_) => CertificateError::UnknownIssuer,
            // certificate_expired
            Self::Expired => CertificateError::Expired,
            Self::NotYetValid => CertificateError::NotValidYet,
            // access_denied
            Self::WrongIdentity(_) => CertificateError::ApplicationVerificationFailure,
            // unsupported_certificate
            Self::LeafIsCa
            | Self::KeyUsage
            | Self::ExtendedKeyUsage
            | Self::WeakSignature
            | Self::WeakKey => CertificateError::InvalidPurpose,
            // certificate_revoked
            Self::Revoked { .. } => CertificateError::Revoked,
            // unknown_ca
            Self::RevocationUnknown(_) => CertificateError::UnknownRevocationStatus,
            // decrypt_error
            Self::BadHandshakeSignature => CertificateError::BadSignature,
        };
        Error::InvalidCertificate(error)
    }
}
