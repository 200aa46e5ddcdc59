//! The SPIFFE Workload API, for a host that runs one workload.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::sign::SigningKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use spiffe::{WorkloadApiClient, WorkloadApiError};
use tokio::sync::broadcast;
use tokio_stream::StreamExt as _;

use super::feed::{Feed, Publisher};
use super::{BundleKeeper, Bundles, reason, socket_uri};
use crate::bundles::TrustBundles;
use crate::leaf::printable;
use crate::source::{FetchError, FetchFuture, FetchProblem, Issued, SourceUpdate, SvidSource};
use crate::spiffe_id::{TrustDomain, WorkloadIdentity};
use crate::svid::SvidError;

/// Where the Workload API is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadApiConfig {
    /// The agent's public socket.
    pub socket: PathBuf,
    /// How long a fetch waits for the agent.
    pub timeout: Duration,
}

/// The SVIDs that a SPIRE agent gives to *this process*. They are the one
/// workload's of this host only if the agent attests us as that workload; for a
/// node of many use [`DelegatedIdentity`](super::DelegatedIdentity).
///
/// Revocation lists in the agent's answers are not used.
pub struct WorkloadApi {
    name: String,
    config: WorkloadApiConfig,
    feed: Feed<Held>,
    updates: broadcast::Sender<SourceUpdate>,
}

/// One message of the agent.
struct Held {
    svids: Vec<HeldSvid>,
    bundles: Bundles,
}

struct HeldSvid {
    id: String,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<dyn SigningKey>,
}

impl WorkloadApi {
    /// Starts to follow the agent and keeps `bundles` up to date, on the current
    /// tokio runtime; like `tokio::spawn` this panics outside of one. An agent
    /// that is not there yet is no error.
    pub fn start(config: WorkloadApiConfig, bundles: Arc<TrustBundles>) -> Self {
        let name = format!("Workload API {}", config.socket.display());
        let updates = broadcast::Sender::new(16);
        let keeper = Arc::new(BundleKeeper::new(&name, bundles));
        let (socket, timeout) = (socket_uri(&config.socket), config.timeout);
        let told = updates.clone();
        let feed = Feed::start(move |publisher| {
            follow(
                socket.clone(),
                timeout,
                Arc::clone(&keeper),
                told.clone(),
                publisher,
            )
        });
        Self {
            name,
            config,
            feed,
            updates,
        }
    }

    async fn try_fetch(&self, identity: &WorkloadIdentity) -> Result<Issued, FetchProblem> {
        let held = self.feed.value(self.config.timeout).await?;
        let wanted = identity.to_string();
        let Some(svid) = held.svids.iter().find(|svid| svid.id == wanted) else {
            let ids: Vec<&str> = held.svids.iter().map(|svid| svid.id.as_str()).collect();
            return Err(FetchProblem::BadAnswer(format!(
                "the agent takes us for {}",
                printable(&ids.join(", "))
            )));
        };
        let domain = identity.trust_domain();
        let roots = held.bundles.get(domain).cloned().unwrap_or_default();
        let key = Arc::clone(&svid.key);
        Issued::checked(identity, svid.chain.clone(), roots, key, SystemTime::now())
    }
}

impl SvidSource for WorkloadApi {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch<'a>(&'a self, identity: &'a WorkloadIdentity, _ttl: Duration) -> FetchFuture<'a> {
        Box::pin(async move {
            self.try_fetch(identity)
                .await
                .map_err(|problem| FetchError {
                    identity: identity.clone(),
                    source_name: self.name.clone(),
                    problem,
                })
        })
    }

    fn updates(&self) -> Option<broadcast::Receiver<SourceUpdate>> {
        Some(self.updates.subscribe())
    }

    fn keeps_bundles(&self) -> bool {
        true
    }
}

impl std::fmt::Debug for WorkloadApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkloadApi")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

async fn follow(
    socket: String,
    timeout: Duration,
    keeper: Arc<BundleKeeper>,
    updates: broadcast::Sender<SourceUpdate>,
    publisher: Publisher<Held>,
) -> FetchProblem {
    let connecting = WorkloadApiClient::connect_to(&socket);
    let client = match tokio::time::timeout(timeout, connecting).await {
        Ok(Ok(client)) => client,
        Ok(Err(error)) => return problem(&error),
        Err(_) => return FetchProblem::TimedOut(timeout),
    };
    let mut stream = match client.stream_x509_contexts().await {
        Ok(stream) => stream,
        Err(error) => return problem(&error),
    };
    loop {
        let taken = match stream.next().await {
            Some(Ok(context)) => take(&context),
            Some(Err(error)) => Err(problem(&error)),
            None => return FetchProblem::Unreachable("the agent ended the stream".to_owned()),
        };
        match taken {
            Ok(held) => {
                keeper.replace_all(&held.bundles);
                publisher.publish(held);
            }
            Err(problem) => publisher.failed(problem),
        }
        // Nobody needs to listen.
        let _ = updates.send(SourceUpdate::All);
    }
}

fn take(context: &spiffe::X509Context) -> Result<Held, FetchProblem> {
    let mut svids = Vec::new();
    for svid in context.svids() {
        let der = PrivateKeyDer::Pkcs8(svid.private_key().as_bytes().into());
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&der)
            .map_err(|_| SvidError::UnusableKey)?;
        let chain = svid.cert_chain().iter();
        svids.push(HeldSvid {
            id: svid.spiffe_id().to_string(),
            chain: chain
                .map(|certificate| CertificateDer::from(certificate.as_bytes().to_vec()))
                .collect(),
            key,
        });
    }
    let mut bundles = Bundles::new();
    for (domain, bundle) in context.bundle_set().iter() {
        let domain = TrustDomain::parse(domain.as_str())
            .map_err(|error| FetchProblem::BadAnswer(error.to_string()))?;
        let roots = bundle.authorities().iter();
        let roots = roots.map(|root| CertificateDer::from(root.as_bytes().to_vec()));
        bundles.insert(domain, roots.collect());
    }
    Ok(Held { svids, bundles })
}

fn problem(error: &WorkloadApiError) -> FetchProblem {
    match error {
        WorkloadApiError::NoIdentityIssued | WorkloadApiError::PermissionDenied(_) => {
            FetchProblem::Refused {
                code: "PermissionDenied".to_owned(),
                message: printable(&error.to_string()),
            }
        }
        WorkloadApiError::Transport(error) => FetchProblem::Unreachable(reason(error)),
        other => FetchProblem::BadAnswer(printable(&other.to_string())),
    }
}
