//! SVIDs from SPIRE, or anything else that speaks its APIs over a Unix socket.
//!
//! * [`DelegatedIdentity`]: a node agent asks for the SVIDs of others.
//! * [`WorkloadApi`]: a host that runs one workload asks for its own.
//!
//! Both keep streams open and learn of new SVIDs and bundles at once. Both put
//! the bundles, federated ones included, into the
//! [`TrustBundles`](crate::TrustBundles) themselves; the Workload API's revocation
//! lists go into the [`RevocationLists`](crate::RevocationLists) (the Delegated
//! Identity API has none).

mod delegated;
mod feed;
mod keeper;
#[cfg(test)]
mod tests;
mod workload;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::sign::SigningKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tonic::transport::{Channel, Endpoint};
use zeroize::Zeroizing;

pub use self::delegated::{DelegatedIdentity, DelegatedIdentityConfig};
#[cfg(any(test, feature = "testing"))]
pub(crate) use self::workload::read_answer;
pub use self::workload::{WorkloadApi, WorkloadApiConfig};
use crate::encoding::signing_key;
use crate::leaf::printable;
use crate::source::{FetchProblem, Issued};
use crate::spiffe_id::{TrustDomain, WorkloadIdentity};

/// A configuration that cannot work: the operator is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpireConfigError {
    /// Without selectors every entry would match, or none.
    #[error("no SPIRE selector is configured: name at least one, as in k8s:ns:{{namespace}}")]
    NoSelector,
    /// Not `TYPE:VALUE`.
    #[error("SPIRE selector {0:?} is not of the form TYPE:VALUE, as in k8s:ns:{{namespace}}")]
    Selector(String),
    /// The path cannot be a socket's.
    #[error("SPIRE socket {0}: {1}")]
    Socket(PathBuf, String),
}

/// What both APIs call a bundle of bundles.
type Bundles = BTreeMap<TrustDomain, Vec<CertificateDer<'static>>>;

/// An SVID as an agent gave it, unchecked.
struct Held {
    chain: Vec<CertificateDer<'static>>,
    key: Arc<dyn SigningKey>,
}

impl Held {
    fn new(
        chain: Vec<CertificateDer<'static>>,
        pkcs8: &Zeroizing<Vec<u8>>,
    ) -> Result<Self, FetchProblem> {
        let key = signing_key(&PrivateKeyDer::Pkcs8(pkcs8.as_slice().into()))?;
        Ok(Self { chain, key })
    }

    fn checked(
        &self,
        identity: &WorkloadIdentity,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<Issued, FetchProblem> {
        let (chain, key) = (self.chain.clone(), Arc::clone(&self.key));
        Issued::checked(identity, chain, roots, key, SystemTime::now())
    }
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

/// A channel that connects when it is used, again and again.
fn channel(socket: &Path, timeout: Duration) -> Result<Channel, SpireConfigError> {
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display()))
        .map_err(|error| SpireConfigError::Socket(socket.to_owned(), error.to_string()))?;
    Ok(endpoint.connect_timeout(timeout).connect_lazy())
}

/// Bytes of one message.
const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;
