//! Where SVIDs come from.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::sign::SigningKey;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::sync::broadcast;

use crate::bundles::{Bundle, BundleError};
use crate::chain::{self, Role};
use crate::spiffe_id::WorkloadIdentity;
use crate::svid::{Svid, SvidError};
use crate::verifier::PeerRefusal;

/// Something that issues SVIDs for the workloads of this node.
pub trait SvidSource: Send + Sync + 'static {
    /// A short name for messages and for the key in
    /// [`TrustBundles`](crate::TrustBundles).
    fn name(&self) -> &str;

    /// Asks for an SVID of `identity` that should live for `ttl`; the source
    /// may give a shorter one. Must be safe to drop at any await.
    fn fetch<'a>(&'a self, identity: &'a WorkloadIdentity, ttl: Duration) -> FetchFuture<'a>;

    /// For a source that learns of new SVIDs by itself: what to fetch again, as
    /// soon as it is there to be fetched. By default nothing ever is.
    fn updates(&self) -> Option<broadcast::Receiver<SourceUpdate>> {
        None
    }

    /// Whether the source puts its roots into the
    /// [`TrustBundles`](crate::TrustBundles) itself, before it gives an SVID
    /// that needs them. By default whoever fetches does, with
    /// [`Issued::roots`].
    fn keeps_bundles(&self) -> bool {
        false
    }

    /// Nobody on this node needs the identity any more. By default nothing is
    /// to be cleaned up.
    fn forget(&self, _identity: &WorkloadIdentity) {}
}

/// What [`SvidSource::updates`] tells of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceUpdate {
    /// A fetch for this identity would give something else now.
    Svid(WorkloadIdentity),
    /// A fetch for any identity might.
    All,
}

/// What [`SvidSource::fetch`] returns.
pub type FetchFuture<'a> = Pin<Box<dyn Future<Output = Result<Issued, FetchError>> + Send + 'a>>;

/// One answer of a source, checked.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The SVID.
    pub svid: Arc<Svid>,
    /// All roots of the identity's trust domain; they replace those the source
    /// gave before. Never empty.
    pub roots: Vec<CertificateDer<'static>>,
}

impl Issued {
    /// Puts together what a source gave, so that what we present is nothing
    /// that our own peers would refuse: right identity, right key, and a chain
    /// that holds against `roots` on both sides of a handshake.
    ///
    /// `certificates` is leaf first. Some CAs append the root to the chain; it
    /// is taken out, as peers have it already.
    pub(crate) fn checked(
        identity: &WorkloadIdentity,
        mut certificates: Vec<CertificateDer<'static>>,
        roots: Vec<CertificateDer<'static>>,
        key: Arc<dyn SigningKey>,
        now: SystemTime,
    ) -> Result<Self, FetchProblem> {
        let bundle = Bundle::of(identity.trust_domain(), &roots)?;
        certificates.retain(|der| !bundle.contains(der));
        let svid = Svid::new(identity.spiffe_id(), certificates, key, now)?;
        let (leaf, intermediates) = svid.chain().split_first().ok_or(SvidError::EmptyChain)?;
        let since_epoch = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        // We are a client to some peers and a server to others.
        for role in [Role::Client, Role::Server] {
            let now = UnixTime::since_unix_epoch(since_epoch);
            chain::verify(leaf, intermediates, &bundle, None, role, now)
                .map_err(FetchProblem::BadChain)?;
        }
        Ok(Self {
            svid: Arc::new(svid),
            roots,
        })
    }
}

/// A fetch that failed: for whom, where, and why.
#[derive(Clone, Debug, thiserror::Error)]
#[error("no SVID for {identity} from {source_name}: {problem}")]
pub struct FetchError {
    /// Who was asked for.
    pub identity: WorkloadIdentity,
    /// Who was asked.
    pub source_name: String,
    /// What went wrong.
    #[source]
    pub problem: FetchProblem,
}

impl FetchProblem {
    /// Names whom and where it happened to.
    pub(crate) fn of(self, identity: &WorkloadIdentity, source: &str) -> FetchError {
        FetchError {
            identity: identity.clone(),
            source_name: source.to_owned(),
            problem: self,
        }
    }
}

/// What went wrong with a fetch, by whose fault it is.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchProblem {
    /// The operator's: a file that should be there cannot be used.
    #[error("{what} {path}: {problem}")]
    File {
        /// `token file` or `root file`.
        what: &'static str,
        /// Where it should be.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The network's, or the source is down.
    #[error("cannot reach it: {0}")]
    Unreachable(String),
    /// It did not answer in time.
    #[error("no answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// The source said no.
    #[error("it refused ({code}): {message}")]
    Refused {
        /// The gRPC status code's name.
        code: String,
        /// What it said.
        message: String,
    },
    /// The source's: an answer that cannot be used.
    #[error("unusable answer: {0}")]
    BadAnswer(String),
    /// The source's: not the SVID that was asked for.
    #[error("unusable answer: {0}")]
    BadSvid(#[from] SvidError),
    /// The source's: a chain that our own peers would refuse.
    #[error("unusable answer: the chain does not hold against the roots sent with it ({})", .0.as_str())]
    BadChain(PeerRefusal),
    /// The source's: a certificate that a revocation list takes back.
    #[error("unusable answer: certificate {serial} of issuer {issuer} is revoked")]
    Revoked {
        /// Lower-case hex.
        serial: String,
        /// A printable distinguished name.
        issuer: String,
    },
    /// The source's: roots that cannot be used.
    #[error("unusable answer: {0}")]
    BadBundle(#[from] BundleError),
    /// Ours: key generation or CSR encoding failed.
    #[error("making the request failed: {0}")]
    Internal(String),
}

impl FetchProblem {
    /// A short fixed name: a metric label.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::File { .. } => "file",
            Self::Unreachable(_) => "unreachable",
            Self::TimedOut(_) => "timed-out",
            Self::Refused { .. } => "refused",
            Self::BadAnswer(_) => "bad-answer",
            Self::BadSvid(_) => "bad-svid",
            Self::BadChain(_) => "bad-chain",
            Self::Revoked { .. } => "revoked",
            Self::BadBundle(_) => "bad-bundle",
            Self::Internal(_) => "internal",
        }
    }
}
