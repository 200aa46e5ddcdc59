//! SVIDs from SPIRE, or anything else that speaks its APIs over a Unix socket.
//!
//! * [`DelegatedIdentity`]: a node agent asks for the SVIDs of others.
//! * [`WorkloadApi`]: a host that runs one workload asks for its own.
//!
//! Both keep streams open and learn of new SVIDs and bundles at once. Both put
//! the bundles, federated ones included, into the [`TrustBundles`] themselves.

mod delegated;
mod feed;
#[cfg(test)]
mod tests;
mod workload;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustls_pki_types::CertificateDer;
use x509_parser::asn1_rs::{Any, FromDer};

pub use self::delegated::{DelegatedIdentity, DelegatedIdentityConfig, SpireConfigError};
pub use self::workload::{WorkloadApi, WorkloadApiConfig};
use crate::bundles::TrustBundles;
use crate::leaf::printable;
use crate::source::FetchProblem;
use crate::spiffe_id::TrustDomain;

/// What both APIs call a bundle of bundles.
type Bundles = BTreeMap<TrustDomain, Vec<CertificateDer<'static>>>;

/// Puts what a source says about bundles into the [`TrustBundles`].
struct BundleKeeper {
    source: String,
    bundles: Arc<TrustBundles>,
    /// The trust domains this source has given so far.
    given: Mutex<BTreeSet<TrustDomain>>,
}

impl BundleKeeper {
    fn new(source: &str, bundles: Arc<TrustBundles>) -> Self {
        Self {
            source: source.to_owned(),
            bundles,
            given: Mutex::default(),
        }
    }

    /// `all` replaces everything the source gave before. A bundle that cannot be
    /// used leaves the one in use; a trust domain that is not among them is no
    /// longer federated with and is taken away.
    fn replace_all(&self, all: &Bundles) {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        for (domain, roots) in all {
            match self.bundles.replace(&self.source, domain, roots) {
                Ok(changed) => {
                    if changed {
                        tracing::info!(source = self.source, trust_domain = %domain, roots = roots.len(), "trust bundle changed");
                    }
                    given.insert(domain.clone());
                }
                Err(error) => {
                    tracing::warn!(source = self.source, trust_domain = %domain, "{error}");
                }
            }
        }
        given.retain(|domain| {
            let stays = all.contains_key(domain);
            if !stays {
                self.bundles.remove(&self.source, domain);
                tracing::info!(source = self.source, trust_domain = %domain, "trust bundle taken away");
            }
            stays
        });
    }
}

/// DER certificates, one behind the other.
fn split_certificates(mut der: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
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

/// The name of a trust domain, or the URI that names it alone.
fn trust_domain(text: &str) -> Result<TrustDomain, String> {
    TrustDomain::parse(text.strip_prefix("spiffe://").unwrap_or(text))
        .map_err(|error| format!("{:?} is no trust domain: {error}", printable(text)))
}

fn refused(status: &tonic::Status) -> FetchProblem {
    match status.code() {
        tonic::Code::Unavailable => FetchProblem::Unreachable(reason(status)),
        code => FetchProblem::Refused {
            code: format!("{code:?}"),
            message: printable(status.message()),
        },
    }
}

/// The innermost cause says the most: "connection refused" rather than
/// "transport error".
fn reason(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    printable(&innermost.to_string())
}

fn socket_uri(socket: &Path) -> String {
    format!("unix:{}", socket.display())
}

const MAX_CERTIFICATES: usize = 64;
/// Bytes of one message.
const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;
