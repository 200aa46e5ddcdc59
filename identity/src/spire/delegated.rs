//! The SPIRE agent's Delegated Identity API.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use tokio::sync::broadcast;
use tonic::transport::Channel;
use zeroize::Zeroizing;

use super::feed::{Feed, Publisher};
use super::keeper::TrustKeeper;
use super::{Bundles, Held, MAX_MESSAGE_BYTES, SpireConfigError, refused};
use crate::encoding::der_certificates;
use crate::leaf::printable;
use crate::source::{FetchFuture, FetchProblem, Issued, SourceUpdate, SvidSource};
use crate::spiffe_id::WorkloadIdentity;
use crate::spire_proto::delegated_identity_client::DelegatedIdentityClient;
use crate::spire_proto::{
    Selector, SubscribeToX509BundlesRequest, SubscribeToX509BundlesResponse,
    SubscribeToX509SvidsRequest, SubscribeToX509SvidsResponse,
};
use crate::template::{IdentityTemplate, TemplateError};
use crate::trust::TrustStore;

/// Where the SPIRE agent is and how it knows a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DelegatedIdentityConfig {
    /// The agent's *admin* socket. Our own SPIFFE ID must be among the agent's
    /// `authorized_delegates`.
    pub socket: PathBuf,
    /// `TYPE:VALUE` each, with placeholders. SPIRE answers with the entries whose
    /// selectors are all among these: one that asks for more (a pod label) is
    /// not found.
    pub selectors: Vec<IdentityTemplate>,
    /// How long a fetch waits for the agent.
    pub timeout: Duration,
}

impl DelegatedIdentityConfig {
    /// By namespace and service account: `k8s:ns:{namespace}` and
    /// `k8s:sa:{service_account}`; 10 seconds.
    pub fn new(socket: impl Into<PathBuf>) -> Result<Self, TemplateError> {
        Ok(Self {
            socket: socket.into(),
            selectors: vec![
                IdentityTemplate::parse("k8s:ns:{namespace}")?,
                IdentityTemplate::parse("k8s:sa:{service_account}")?,
            ],
            timeout: Duration::from_secs(10),
        })
    }
}

/// SVIDs of the node's workloads from a SPIRE agent that trusts us to act for
/// them. One stream for each identity that was asked for, one for the bundles.
///
/// The API carries no revocation lists: give those to
/// [`RevocationLists`](crate::RevocationLists) from a file.
pub struct DelegatedIdentity {
    name: String,
    config: DelegatedIdentityConfig,
    client: DelegatedIdentityClient<Channel>,
    svids: Mutex<HashMap<WorkloadIdentity, Arc<Feed<Held>>>>,
    bundles: Feed<Bundles>,
    updates: broadcast::Sender<SourceUpdate>,
}

impl DelegatedIdentity {
    /// Starts to keep the bundles of `trust` (a [`TrustStore`], or an
    /// `Arc<TrustBundles>`) up to date, on the current tokio runtime; like
    /// `tokio::spawn` this panics outside of one. An agent that is not there yet
    /// is no error.
    pub fn start(
        config: DelegatedIdentityConfig,
        trust: impl Into<TrustStore>,
    ) -> Result<Self, SpireConfigError> {
        if config.selectors.is_empty() {
            return Err(SpireConfigError::NoSelector);
        }
        let colonless = |template: &&IdentityTemplate| !matches!(template.as_str().split_once(':'), Some((kind, value)) if !kind.is_empty() && !value.is_empty());
        if let Some(template) = config.selectors.iter().find(colonless) {
            return Err(SpireConfigError::Selector(template.as_str().to_owned()));
        }
        let channel = super::channel(&config.socket, config.timeout)?;
        let client =
            DelegatedIdentityClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let name = format!("SPIRE agent {}", config.socket.display());
        let updates = broadcast::Sender::new(1024);
        let keeper = Arc::new(TrustKeeper::new(&name, trust.into()));
        let feed = {
            let (client, updates) = (client.clone(), updates.clone());
            Feed::start(move |publisher| {
                follow_bundles(
                    client.clone(),
                    Arc::clone(&keeper),
                    updates.clone(),
                    publisher,
                )
            })
        };
        Ok(Self {
            name,
            config,
            client,
            svids: Mutex::default(),
            bundles: feed,
            updates,
        })
    }

    async fn try_fetch(&self, identity: &WorkloadIdentity) -> Result<Issued, FetchProblem> {
        let feed = self.feed(identity);
        let held = feed.value(self.config.timeout).await?;
        let bundles = self.bundles.value(self.config.timeout).await?;
        let domain = identity.trust_domain();
        let roots = bundles.get(domain).cloned().ok_or_else(|| {
            FetchProblem::BadAnswer(format!("there is no bundle of trust domain {domain}"))
        })?;
        held.checked(identity, roots)
    }

    fn feed(&self, identity: &WorkloadIdentity) -> Arc<Feed<Held>> {
        let mut feeds = self.feeds();
        let feed = feeds.entry(identity.clone()).or_insert_with(|| {
            let request = SubscribeToX509SvidsRequest {
                selectors: self.selectors(identity),
                pid: 0,
            };
            let (client, updates) = (self.client.clone(), self.updates.clone());
            let identity = identity.clone();
            Arc::new(Feed::start(move |publisher| {
                follow_svid(
                    client.clone(),
                    request.clone(),
                    identity.clone(),
                    updates.clone(),
                    publisher,
                )
            }))
        });
        Arc::clone(feed)
    }

    fn selectors(&self, identity: &WorkloadIdentity) -> Vec<Selector> {
        let filled = self.config.selectors.iter().map(|t| t.fill_in(identity));
        filled
            .filter_map(|selector| {
                let (kind, value) = selector.split_once(':')?;
                Some(Selector {
                    r#type: kind.to_owned(),
                    value: value.to_owned(),
                })
            })
            .collect()
    }

    fn feeds(&self) -> MutexGuard<'_, HashMap<WorkloadIdentity, Arc<Feed<Held>>>> {
        self.svids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SvidSource for DelegatedIdentity {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch<'a>(&'a self, identity: &'a WorkloadIdentity, _ttl: Duration) -> FetchFuture<'a> {
        Box::pin(async move {
            let fetched = self.try_fetch(identity).await;
            fetched.map_err(|problem| problem.of(identity, &self.name))
        })
    }

    fn updates(&self) -> Option<broadcast::Receiver<SourceUpdate>> {
        Some(self.updates.subscribe())
    }

    fn keeps_bundles(&self) -> bool {
        true
    }

    fn forget(&self, identity: &WorkloadIdentity) {
        self.feeds().remove(identity);
    }
}

impl std::fmt::Debug for DelegatedIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DelegatedIdentity")
            .field("config", &self.config)
            .field("identities", &self.feeds().len())
            .finish_non_exhaustive()
    }
}

async fn follow_svid(
    mut client: DelegatedIdentityClient<Channel>,
    request: SubscribeToX509SvidsRequest,
    identity: WorkloadIdentity,
    updates: broadcast::Sender<SourceUpdate>,
    publisher: Publisher<Held>,
) -> FetchProblem {
    let mut stream = match client.subscribe_to_x509svi_ds(request).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return refused(&status),
    };
    loop {
        match stream.message().await {
            Ok(Some(message)) => {
                match pick(message, &identity) {
                    Ok(held) => publisher.publish(held),
                    Err(problem) => publisher.failed(problem),
                }
                // Nobody needs to listen.
                let _ = updates.send(SourceUpdate::Svid(identity.clone()));
            }
            Ok(None) => return FetchProblem::Unreachable("the agent ended the stream".to_owned()),
            Err(status) => return refused(&status),
        }
    }
}

/// The SVID of `identity` among those that match its selectors.
fn pick(
    message: SubscribeToX509SvidsResponse,
    identity: &WorkloadIdentity,
) -> Result<Held, FetchProblem> {
    let count = message.x509_svids.len();
    let mut picked = None;
    for mut candidate in message.x509_svids {
        // The copy of the message we can reach; all of them, not the one picked.
        let key = Zeroizing::new(std::mem::take(&mut candidate.x509_svid_key));
        let svid = candidate.x509_svid.unwrap_or_default();
        let id = svid.id.unwrap_or_default();
        let named = format!("spiffe://{}{}", id.trust_domain, id.path);
        if picked.is_none() && named == identity.to_string() {
            picked = Some((svid.cert_chain, key));
        }
    }
    let Some((chain, key)) = picked else {
        return Err(FetchProblem::BadAnswer(format!(
            "none of the {count} SVIDs that match the selectors is this identity's (is there a registration entry?)"
        )));
    };
    Held::new(chain.into_iter().map(CertificateDer::from).collect(), &key)
}

async fn follow_bundles(
    mut client: DelegatedIdentityClient<Channel>,
    keeper: Arc<TrustKeeper>,
    updates: broadcast::Sender<SourceUpdate>,
    publisher: Publisher<Bundles>,
) -> FetchProblem {
    let request = SubscribeToX509BundlesRequest {};
    let mut stream = match client.subscribe_to_x509_bundles(request).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return refused(&status),
    };
    loop {
        match stream.message().await {
            Ok(Some(message)) => {
                match read_bundles(message) {
                    Ok(bundles) => {
                        keeper.bundles(&bundles);
                        publisher.publish(bundles);
                    }
                    Err(problem) => {
                        tracing::warn!(
                            source = keeper.source(),
                            "trust bundles refused: {problem}"
                        );
                        publisher.failed(FetchProblem::BadAnswer(problem));
                    }
                }
                let _ = updates.send(SourceUpdate::All);
            }
            Ok(None) => return FetchProblem::Unreachable("the agent ended the stream".to_owned()),
            Err(status) => return refused(&status),
        }
    }
}

fn read_bundles(message: SubscribeToX509BundlesResponse) -> Result<Bundles, String> {
    if message.ca_certificates.is_empty() {
        return Err("there is no trust bundle at all: keeping those in use".to_owned());
    }
    message
        .ca_certificates
        .into_iter()
        .map(|(name, der)| {
            let domain = super::trust_domain(&name)?;
            let roots = der_certificates(&der)
                .map_err(|problem| format!("bundle of {}: {problem}", printable(&name)))?;
            Ok((domain, roots))
        })
        .collect()
}
