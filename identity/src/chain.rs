//! Building a path from a leaf to one of a bundle's roots, with webpki.

use rustls::SignatureScheme;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls_pki_types::{CertificateDer, SignatureVerificationAlgorithm, UnixTime};
use webpki::aws_lc_rs as alg;
use webpki::{EndEntityCert, KeyUsage, VerifiedPath};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::bundles::Bundle;
use crate::leaf::MAX_CERTIFICATE_BYTES;
use crate::verifier::{CLOCK_SKEW, MAX_CHAIN_LENGTH, PeerRefusal};

/// The role the leaf's holder plays in the handshake: which EKU it needs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Role {
    Client,
    Server,
}

/// Checks that `leaf` chains to `bundle` through `intermediates` at `now`.
///
/// Expiry is judged at `now` exactly. `not_before` may lie up to [`CLOCK_SKEW`]
/// in the future, anywhere in the path: webpki takes one time for both, so on
/// "not yet valid" the path is judged again at that very `not_before`. As that
/// is later than `now`, no certificate passes that has expired at `now`.
pub(crate) fn verify(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    bundle: &Bundle,
    role: Role,
    now: UnixTime,
) -> Result<(), PeerRefusal> {
    if intermediates.len() >= MAX_CHAIN_LENGTH
        || intermediates
            .iter()
            .any(|der| der.len() > MAX_CERTIFICATE_BYTES)
    {
        return Err(PeerRefusal::TooLarge);
    }
    let end_entity = EndEntityCert::try_from(leaf).map_err(refusal)?;
    let anchors = bundle.anchors_at(now);
    let latest = now.as_secs().saturating_add(CLOCK_SKEW.as_secs());

    let mut at = now;
    // Each round moves past the `not_before` of one more certificate.
    for _ in 0..=MAX_CHAIN_LENGTH {
        let usage = match role {
            Role::Client => KeyUsage::client_auth(),
            Role::Server => KeyUsage::server_auth(),
        };
        let path = end_entity.verify_for_usage(
            SIGNATURES.all,
            &anchors,
            intermediates,
            at,
            usage,
            None,
            Some(&issuers_may_sign),
        );
        match path {
            Ok(_) => return Ok(()),
            Err(webpki::Error::CertNotValidYet { not_before, .. })
                if not_before.as_secs() <= latest && not_before.as_secs() > at.as_secs() =>
            {
                at = not_before;
            }
            Err(error) => return Err(refusal(error)),
        }
    }
    Err(PeerRefusal::NotYetValid)
}

/// RFC 5280 section 4.2.1.3: a key usage without `keyCertSign` forbids signing
/// certificates, whatever the basic constraints say. webpki looks at the latter
/// only. An error makes webpki try the next path.
fn issuers_may_sign(path: &VerifiedPath<'_>) -> Result<(), webpki::Error> {
    for issuer in path.intermediate_certificates() {
        let der = issuer.der();
        let (_, certificate) =
            X509Certificate::from_der(&der).map_err(|_| webpki::Error::BadDer)?;
        let usage = certificate.key_usage().map_err(|_| webpki::Error::BadDer)?;
        if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
            return Err(webpki::Error::UnknownIssuer);
        }
    }
    Ok(())
}

fn refusal(error: webpki::Error) -> PeerRefusal {
    use webpki::Error as E;
    match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) => PeerRefusal::Malformed,
        E::CertExpired { .. } | E::InvalidCertValidity => PeerRefusal::Expired,
        E::CertNotValidYet { .. } => PeerRefusal::NotYetValid,
        E::CaUsedAsEndEntity => PeerRefusal::LeafIsCa,
        E::RequiredEkuNotFoundContext(_) | E::EmptyEkuExtension => PeerRefusal::ExtendedKeyUsage,
        E::UnsupportedSignatureAlgorithmContext(_)
        | E::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => PeerRefusal::WeakSignature,
        other => PeerRefusal::Untrusted(other.to_string()),
    }
}

/// ECDSA P-256 and P-384, Ed25519 and RSA of at least 2048 bits. RSA PKCS#1
/// signs certificates only (Istiod's own root is such a one); in the handshake
/// TLS 1.3 has RSA-PSS.
pub(crate) static SIGNATURES: WebPkiSupportedAlgorithms = WebPkiSupportedAlgorithms {
    all: CERTIFICATE_SIGNATURES,
    mapping: HANDSHAKE_SIGNATURES,
};

static CERTIFICATE_SIGNATURES: &[&dyn SignatureVerificationAlgorithm] = &[
    alg::ECDSA_P256_SHA256,
    alg::ECDSA_P256_SHA384,
    alg::ECDSA_P384_SHA256,
    alg::ECDSA_P384_SHA384,
    alg::ED25519,
    alg::RSA_PSS_2048_8192_SHA256_LEGACY_KEY,
    alg::RSA_PSS_2048_8192_SHA384_LEGACY_KEY,
    alg::RSA_PSS_2048_8192_SHA512_LEGACY_KEY,
    alg::RSA_PKCS1_2048_8192_SHA256,
    alg::RSA_PKCS1_2048_8192_SHA384,
    alg::RSA_PKCS1_2048_8192_SHA512,
];

static HANDSHAKE_SIGNATURES: &[(SignatureScheme, &[&dyn SignatureVerificationAlgorithm])] = &[
    (
        SignatureScheme::ECDSA_NISTP256_SHA256,
        &[alg::ECDSA_P256_SHA256],
    ),
    (
        SignatureScheme::ECDSA_NISTP384_SHA384,
        &[alg::ECDSA_P384_SHA384],
    ),
    (SignatureScheme::ED25519, &[alg::ED25519]),
    (
        SignatureScheme::RSA_PSS_SHA256,
        &[alg::RSA_PSS_2048_8192_SHA256_LEGACY_KEY],
    ),
    (
        SignatureScheme::RSA_PSS_SHA384,
        &[alg::RSA_PSS_2048_8192_SHA384_LEGACY_KEY],
    ),
    (
        SignatureScheme::RSA_PSS_SHA512,
        &[alg::RSA_PSS_2048_8192_SHA512_LEGACY_KEY],
    ),
];
