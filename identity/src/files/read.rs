//! Reading PEM files whole, with a bound, and wiping what was a key.

use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use rustls::sign::SigningKey;
use rustls_pki_types::pem::{PemObject as _, SectionKind};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::{Zeroize as _, Zeroizing};

use crate::encoding::{pem_certificates, signing_key};
use crate::source::FetchProblem;

/// One or more certificates.
pub(super) async fn certificates(
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, FetchProblem> {
    let problem = |problem: String| problem_with("certificate file", path, problem);
    let content = whole(path, "certificate file").await?;
    pem_certificates(&content).map_err(problem)
}

/// Exactly one private key.
pub(super) async fn key(path: &Path) -> Result<Arc<dyn SigningKey>, FetchProblem> {
    let problem = |problem: &str| problem_with("key file", path, problem.to_owned());
    let content = whole(path, "key file").await?;
    if contains(&content, b"ENCRYPTED") {
        return Err(problem("is encrypted: nobody can enter a passphrase here"));
    }
    let mut keys = Vec::new();
    for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(&content) {
        let (kind, der) = section.map_err(|_| problem("is not PEM"))?;
        let der = Zeroizing::new(der);
        if matches!(
            kind,
            SectionKind::PrivateKey | SectionKind::EcPrivateKey | SectionKind::RsaPrivateKey
        ) {
            keys.push((kind, der));
        }
    }
    let mut keys = keys.into_iter();
    let (kind, mut der) = keys
        .next()
        .ok_or_else(|| problem("holds no PEM private key"))?;
    if keys.next().is_some() {
        return Err(problem("holds more than one private key"));
    }
    let encoded = match kind {
        SectionKind::EcPrivateKey => PrivateKeyDer::Sec1(der.as_slice().into()),
        SectionKind::RsaPrivateKey => PrivateKeyDer::Pkcs1(der.as_slice().into()),
        _ => PrivateKeyDer::Pkcs8(der.as_slice().into()),
    };
    let key = signing_key(&encoded)
        .map_err(|_| problem("is not an ECDSA P-256/P-384, Ed25519 or RSA key"));
    drop(encoded);
    der.zeroize();
    key
}

async fn whole(path: &Path, what: &'static str) -> Result<Zeroizing<Vec<u8>>, FetchProblem> {
    let problem = |problem: String| problem_with(what, path, problem);
    let owned = path.to_owned();
    // tokio's own file reads through a buffer that nobody wipes.
    let content = tokio::task::spawn_blocking(move || {
        // Room from the start: a vector that grows leaves copies behind.
        let mut content = Zeroizing::new(Vec::with_capacity(MAX_FILE_BYTES));
        let limit = u64::try_from(MAX_FILE_BYTES).unwrap_or(u64::MAX);
        std::fs::File::open(owned)?
            .take(limit)
            .read_to_end(&mut content)?;
        Ok(content)
    })
    .await
    .map_err(|error| FetchProblem::Internal(error.to_string()))?
    .map_err(|error: std::io::Error| problem(error.to_string()))?;
    if content.len() >= MAX_FILE_BYTES {
        return Err(problem(format!("has {MAX_FILE_BYTES} bytes or more")));
    }
    Ok(content)
}

fn problem_with(what: &'static str, path: &Path, problem: String) -> FetchProblem {
    FetchProblem::File {
        what,
        path: path.display().to_string(),
        problem,
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

const MAX_FILE_BYTES: usize = 256 * 1024;
