//! What the CA answered: a chain that must hold before anybody sees it.

use std::sync::Arc;
use std::time::SystemTime;

use rustls::sign::SigningKey;
use rustls_pki_types::CertificateDer;

use crate::encoding::{MAX_CERTIFICATES, pem_certificates};
use crate::source::{FetchProblem, Issued};
use crate::spiffe_id::WorkloadIdentity;

/// Bytes of a whole answer.
pub(super) const MAX_ANSWER_BYTES: usize = 1024 * 1024;

/// Turns `cert_chain` into an SVID and its roots.
///
/// The elements are PEM, leaf first and root last. The last element may hold
/// several roots, any other several intermediates. Some CAs append the root to
/// the chain as well; it is taken out, as peers have it already.
pub(crate) fn check(
    cert_chain: &[String],
    identity: &WorkloadIdentity,
    key: Arc<dyn SigningKey>,
    now: SystemTime,
) -> Result<Issued, FetchProblem> {
    let Some((roots, chain)) = cert_chain.split_last() else {
        return Err(bad("it holds no certificate".to_owned()));
    };
    if chain.is_empty() {
        return Err(bad(
            "it has one element; expected the leaf first and the root last".to_owned(),
        ));
    }
    let roots = read(roots, cert_chain.len())?;
    let mut certificates = Vec::new();
    for (index, element) in chain.iter().enumerate() {
        certificates.extend(read(element, index.saturating_add(1))?);
        if certificates.len() > MAX_CERTIFICATES {
            return Err(bad(format!(
                "it holds more than {MAX_CERTIFICATES} certificates"
            )));
        }
    }
    Issued::checked(identity, certificates, roots, key, now)
}

/// The certificates of one element, counted from 1.
fn read(pem: &str, position: usize) -> Result<Vec<CertificateDer<'static>>, FetchProblem> {
    pem_certificates(pem.as_bytes()).map_err(|problem| bad(format!("element {position} {problem}")))
}

fn bad(problem: String) -> FetchProblem {
    FetchProblem::BadAnswer(problem)
}
