//! Building a path from a leaf to one of a bundle's roots, with webpki.

use std::cell::RefCell;

use rustls::SignatureScheme;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls_pki_types::{CertificateDer, SignatureVerificationAlgorithm, UnixTime};
use webpki::aws_lc_rs as alg;
use webpki::{EndEntityCert, KeyUsage, VerifiedPath};
use x509_parser::asn1_rs::Any;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::bundles::Bundle;
use crate::leaf::{MAX_CERTIFICATE_BYTES, printable};
use crate::revocation::{DomainLists, point_uris};
use crate::verifier::{CLOCK_SKEW, MAX_CHAIN_LENGTH, PeerRefusal};

/// The role the leaf's holder plays in the handshake: which EKU it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Client,
    Server,
}

/// One certificate of a proven path and who signed it: all that revocation
/// wants to know, long after the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    /// DER contents.
    pub(crate) serial: Vec<u8>,
    /// DER contents of the issuer's name.
    pub(crate) issuer: Vec<u8>,
    /// The issuer's name, printable.
    pub(crate) issuer_name: String,
    /// Contents of the issuer's `SubjectPublicKeyInfo`.
    pub(crate) issuer_public_key: Vec<u8>,
    /// The issuer's key usage, if it has one, allows signing lists. A root
    /// counts as a name and a key, without usage (RFC 5280 section 6.1.1 (d)).
    pub(crate) issuer_signs_crls: bool,
    /// An intermediate; else the leaf.
    pub(crate) is_ca: bool,
    /// URIs of the certificate's distribution points.
    pub(crate) crl_points: Vec<String>,
}

/// Checks that `leaf` chains to `bundle` through `intermediates` at `now`, that
/// no certificate on the way is revoked by `lists`, and answers the path, leaf
/// first.
///
/// Expiry is judged at `now` exactly. `not_before` may lie up to [`CLOCK_SKEW`]
/// in the future, anywhere in the path: webpki takes one time for both, so on
/// "not yet valid" the path is judged again at that very `not_before`. As that
/// is later than `now`, no certificate passes that has expired at `now`.
pub(crate) fn verify(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    bundle: &Bundle,
    lists: Option<&DomainLists>,
    role: Role,
    now: UnixTime,
) -> Result<Vec<Link>, PeerRefusal> {
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

    let proven = RefCell::new(Vec::new());
    let revoked = RefCell::new(None);
    // An error makes webpki try the next path.
    let judge = |path: &VerifiedPath<'_>| {
        let links = links(path)?;
        match lists.map_or(Ok(()), |lists| lists.judge(&links, now)) {
            Ok(()) => {
                proven.replace(links);
                Ok(())
            }
            Err(refusal) => {
                revoked.replace(Some(refusal));
                Err(webpki::Error::CertRevoked)
            }
        }
    };

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
            Some(&judge),
        );
        match path {
            Ok(_) => return Ok(proven.take()),
            Err(webpki::Error::CertNotValidYet { not_before, .. })
                if not_before.as_secs() <= latest && not_before.as_secs() > at.as_secs() =>
            {
                at = not_before;
            }
            // A path stood, but for revocation: that says more than why others
            // did not.
            Err(error) => return Err(revoked.take().unwrap_or_else(|| refusal(error))),
        }
    }
    Err(PeerRefusal::NotYetValid)
}

/// The path's certificates, leaf first, none of which was signed by a
/// certificate that may not sign.
///
/// RFC 5280 section 4.2.1.3: a key usage without `keyCertSign` forbids signing
/// certificates, whatever the basic constraints say. webpki looks at the latter
/// only.
fn links(path: &VerifiedPath<'_>) -> Result<Vec<Link>, webpki::Error> {
    let leaf = path.end_entity();
    let mut links = vec![link(leaf, false)?];
    for issuer in path.intermediate_certificates() {
        let der = issuer.der();
        let certificate = parse(&der)?;
        let usage = certificate.key_usage().map_err(|_| webpki::Error::BadDer)?;
        if usage.as_ref().is_some_and(|u| !u.value.key_cert_sign()) {
            return Err(webpki::Error::UnknownIssuer);
        }
        let (_, public_key) =
            Any::from_der(certificate.public_key().raw).map_err(|_| webpki::Error::BadDer)?;
        if let Some(signed) = links.last_mut() {
            signed.issuer_public_key = public_key.data.to_vec();
            signed.issuer_signs_crls = usage.is_none_or(|u| u.value.crl_sign());
        }
        links.push(link(issuer, true)?);
    }
    if let Some(signed) = links.last_mut() {
        signed.issuer_public_key = path.anchor().subject_public_key_info.to_vec();
    }
    Ok(links)
}

fn link(certificate: &webpki::Cert<'_>, is_ca: bool) -> Result<Link, webpki::Error> {
    let der = certificate.der();
    let parsed = parse(&der)?;
    let mut crl_points = Vec::new();
    for extension in parsed.extensions() {
        if let ParsedExtension::CRLDistributionPoints(points) = extension.parsed_extension() {
            crl_points = point_uris(points);
        }
    }
    Ok(Link {
        serial: certificate.serial().to_vec(),
        issuer: certificate.issuer().to_vec(),
        issuer_name: printable(&parsed.issuer().to_string()),
        issuer_public_key: Vec::new(),
        issuer_signs_crls: true,
        is_ca,
        crl_points,
    })
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, webpki::Error> {
    X509Certificate::from_der(der)
        .map(|(_, certificate)| certificate)
        .map_err(|_| webpki::Error::BadDer)
}

fn refusal(error: webpki::Error) -> PeerRefusal {
    use webpki::Error as E;
    match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) | E::UnsupportedCertVersion => {
            PeerRefusal::Malformed
        }
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
