//! The SPIFFE Workload API, for a host that runs one workload.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use tokio::sync::broadcast;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use zeroize::Zeroizing;

use super::feed::{Feed, Publisher};
use super::keeper::{Lists, TrustKeeper};
use super::{Bundles, Held, MAX_MESSAGE_BYTES, SpireConfigError, refused};
use crate::encoding::der_certificates;
use crate::leaf::printable;
use crate::revocation::issued_by;
use crate::source::{FetchFuture, FetchProblem, Issued, SourceUpdate, SvidSource};
use crate::spiffe_id::{SpiffeId, TrustDomain, WorkloadIdentity};
use crate::trust::TrustStore;
use crate::workload_proto::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use crate::workload_proto::{X509SvidRequest, X509SvidResponse};

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
/// Revocation lists in an answer belong to no trust domain by name. Each goes to
/// those whose bundle, or whose certificates in the same answer, hold its issuer;
/// where none does, to the trust domains of our own SVIDs. From then on that
/// trust domain is checked like one with a configured list
/// ([`RevocationLists`](crate::RevocationLists)): fail-closed, also when a later
/// answer has no lists.
pub struct WorkloadApi {
    name: String,
    config: WorkloadApiConfig,
    feed: Feed<Answer>,
    updates: broadcast::Sender<SourceUpdate>,
}

impl WorkloadApi {
    /// Starts to follow the agent and keeps `trust` (a [`TrustStore`], or an
    /// `Arc<TrustBundles>`) up to date, on the current tokio runtime; like
    /// `tokio::spawn` this panics outside of one. An agent that is not there yet
    /// is no error.
    pub fn start(
        config: WorkloadApiConfig,
        trust: impl Into<TrustStore>,
    ) -> Result<Self, SpireConfigError> {
        let name = format!("Workload API {}", config.socket.display());
        let updates = broadcast::Sender::new(16);
        let keeper = Arc::new(TrustKeeper::new(&name, trust.into()));
        let channel = super::channel(&config.socket, config.timeout)?;
        let client =
            SpiffeWorkloadApiClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let told = updates.clone();
        let feed = Feed::start(move |publisher| {
            follow(client.clone(), Arc::clone(&keeper), told.clone(), publisher)
        });
        Ok(Self {
            name,
            config,
            feed,
            updates,
        })
    }

    async fn try_fetch(&self, identity: &WorkloadIdentity) -> Result<Issued, FetchProblem> {
        self.feed.value(self.config.timeout).await?.issued(identity)
    }
}

impl SvidSource for WorkloadApi {
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
}

impl std::fmt::Debug for WorkloadApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkloadApi")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

async fn follow(
    mut client: SpiffeWorkloadApiClient<Channel>,
    keeper: Arc<TrustKeeper>,
    updates: broadcast::Sender<SourceUpdate>,
    publisher: Publisher<Answer>,
) -> FetchProblem {
    // SPIFFE Workload API, section 3: asked on purpose, not by a tricked browser.
    let mut request = tonic::Request::new(X509SvidRequest {});
    let yes = MetadataValue::from_static("true");
    request.metadata_mut().insert("workload.spiffe.io", yes);
    let mut stream = match client.fetch_x509svid(request).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return refused(&status),
    };
    loop {
        match stream.message().await {
            Ok(Some(message)) => {
                match Answer::read(message) {
                    Ok(answer) => {
                        keeper.bundles(&answer.bundles);
                        keeper.lists(&answer.lists);
                        publisher.publish(answer);
                    }
                    Err(problem) => {
                        let source = keeper.source();
                        tracing::warn!(source, "answer refused: {problem}");
                        publisher.failed(FetchProblem::BadAnswer(problem));
                    }
                }
                // Nobody needs to listen.
                let _ = updates.send(SourceUpdate::All);
            }
            Ok(None) => return FetchProblem::Unreachable("the agent ended the stream".to_owned()),
            Err(status) => return refused(&status),
        }
    }
}

/// One message of the agent.
struct Answer {
    /// By SPIFFE ID, as named in the message.
    svids: Vec<(String, Result<Held, FetchProblem>)>,
    bundles: Bundles,
    lists: Lists,
}

impl Answer {
    /// An SVID that cannot be used does not spoil the others; a bundle does.
    fn read(message: X509SvidResponse) -> Result<Self, String> {
        let mut svids = Vec::new();
        let mut bundles = Bundles::new();
        let mut own = Vec::new();
        for mut svid in message.svids {
            // The copy of the message we can reach.
            let key = Zeroizing::new(std::mem::take(&mut svid.x509_svid_key));
            let named = printable(&svid.spiffe_id);
            let id = SpiffeId::parse(&svid.spiffe_id)
                .map_err(|error| format!("{named:?} is no SPIFFE ID: {error}"))?;
            let roots = der_certificates(&svid.bundle)
                .map_err(|problem| format!("bundle of {named}: {problem}"))?;
            bundles.insert(id.trust_domain(), roots);
            own.push(id.trust_domain());
            let held = der_certificates(&svid.x509_svid)
                .map_err(|problem| FetchProblem::BadAnswer(format!("its chain: {problem}")))
                .and_then(|chain| Held::new(chain, &key));
            svids.push((svid.spiffe_id, held));
        }
        if svids.is_empty() {
            return Err("there is no SVID in it".to_owned());
        }
        for (name, der) in message.federated_bundles {
            let roots = der_certificates(&der)
                .map_err(|problem| format!("bundle of {}: {problem}", printable(&name)))?;
            // What comes with an SVID is what its own trust domain says.
            let domain = super::trust_domain(&name)?;
            bundles.entry(domain).or_insert(roots);
        }
        let lists = by_trust_domain(message.crl, &svids, &own, &bundles);
        Ok(Self {
            svids,
            bundles,
            lists,
        })
    }

    fn issued(&self, identity: &WorkloadIdentity) -> Result<Issued, FetchProblem> {
        let wanted = identity.to_string();
        let Some((_, held)) = self.svids.iter().find(|(id, _)| *id == wanted) else {
            let ids: Vec<&str> = self.svids.iter().map(|(id, _)| id.as_str()).collect();
            return Err(FetchProblem::BadAnswer(format!(
                "the agent takes us for {}",
                printable(&ids.join(", "))
            )));
        };
        let roots = self.bundles.get(identity.trust_domain());
        let held = held.as_ref().map_err(FetchProblem::clone)?;
        held.checked(identity, roots.cloned().unwrap_or_default())
    }
}

/// Finds out whose each revocation list is.
fn by_trust_domain(
    ders: Vec<Vec<u8>>,
    svids: &[(String, Result<Held, FetchProblem>)],
    own: &[TrustDomain],
    bundles: &Bundles,
) -> Lists {
    let mut lists = Lists::new();
    for der in ders {
        let der = CertificateRevocationListDer::from(der);
        let issued = |certificates: &[CertificateDer<'_>]| {
            certificates.iter().any(|issuer| issued_by(&der, issuer))
        };
        let rooted = bundles
            .iter()
            .filter(|(_, roots)| issued(roots))
            .map(|(domain, _)| domain);
        let chained = svids
            .iter()
            .zip(own)
            .filter(|((_, held), _)| held.as_ref().is_ok_and(|held| issued(&held.chain)))
            .map(|(_, domain)| domain);
        let mut domains: Vec<&TrustDomain> = rooted.chain(chained).collect();
        if domains.is_empty() {
            domains.extend(own);
        }
        domains.sort();
        domains.dedup();
        for domain in domains {
            lists.entry(domain.clone()).or_default().push(der.clone());
        }
    }
    lists
}

/// Reads a whole answer as [`WorkloadApi`] does.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn read_answer(
    message: X509SvidResponse,
    identity: &WorkloadIdentity,
    trust: &TrustStore,
) -> Result<Issued, FetchProblem> {
    let answer = Answer::read(message).map_err(FetchProblem::BadAnswer)?;
    let keeper = TrustKeeper::new("test", trust.clone());
    keeper.bundles(&answer.bundles);
    keeper.lists(&answer.lists);
    answer.issued(identity)
}
