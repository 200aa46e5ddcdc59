//! The server side of delta ADS.
//!
//! Each stream has a task of its own, which compares what it has sent with the
//! current state whenever either side gives it a reason to. It sends the
//! difference: a slow client skips intermediate states and never queues them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ringfence_xds::proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryService;
use ringfence_xds::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::auth::Caller;
use crate::snapshot::Resources;
use crate::state::MeshState;

#[derive(Debug)]
pub(crate) struct AdsService {
    state: watch::Receiver<Arc<MeshState>>,
    shutdown: CancellationToken,
}

impl AdsService {
    pub(crate) fn new(state: watch::Receiver<Arc<MeshState>>, shutdown: CancellationToken) -> Self {
        Self { state, shutdown }
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for AdsService {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let peer = request.remote_addr();
        let state = self.state.borrow().clone();
        let caller = state.authenticate(request.metadata()).map_err(|reason| {
            tracing::warn!(?peer, %reason, "refused an ADS stream");
            Status::unauthenticated("request not authenticated")
        })?;
        tracing::info!(?peer, node = %caller.node, "ADS stream opened");
        let (responses, outgoing) = mpsc::channel(1);
        let stream = AdsStream {
            node: caller.node.clone(),
            caller,
            state: self.state.clone(),
            responses,
            types: BTreeMap::new(),
            next_nonce: 0,
        };
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            let node = stream.node.clone();
            let end = shutdown
                .run_until_cancelled(stream.serve(request.into_inner()))
                .await;
            tracing::info!(?peer, %node, reason = %end.unwrap_or(End::Shutdown), "ADS stream closed");
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

/// One client's stream.
struct AdsStream {
    node: String,
    caller: Caller,
    state: watch::Receiver<Arc<MeshState>>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    types: BTreeMap<String, Subscription>,
    next_nonce: u64,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("closed by the client")]
    Client,
    #[error("connection lost: {0}")]
    Lost(String),
    #[error("the node's token was changed or removed")]
    TokenChanged,
    #[error("control plane is stopping")]
    Shutdown,
}

impl AdsStream {
    async fn serve(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) -> End {
        match self.run(&mut requests).await {
            Ok(never) => match never {},
            Err(end) => {
                if matches!(end, End::TokenChanged) {
                    let _ = self
                        .responses
                        .send(Err(Status::unauthenticated("request not authenticated")))
                        .await;
                }
                end
            }
        }
    }

    async fn run(
        &mut self,
        requests: &mut Streaming<DeltaDiscoveryRequest>,
    ) -> Result<std::convert::Infallible, End> {
        loop {
            tokio::select! {
                request = requests.message() => {
                    let request = request.map_err(|status| End::Lost(status.to_string()))?.ok_or(End::Client)?;
                    self.request(request).await?;
                }
                changed = self.state.changed() => {
                    changed.map_err(|_| End::Shutdown)?;
                    let state = self.state.borrow_and_update().clone();
                    if !state.admits(&self.caller) {
                        return Err(End::TokenChanged);
                    }
                    for type_url in self.types.keys().cloned().collect::<Vec<_>>() {
                        self.push(&state, &type_url, false).await?;
                    }
                }
            }
        }
    }

    async fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), End> {
        if let Some(node) = &request.node {
            self.check_node_name(node);
        }
        let state = self.state.borrow().clone();
        let first = !self.types.contains_key(&request.type_url);
        if first && state.snapshot().resources(&request.type_url).is_none() {
            tracing::debug!(node = %self.node, type_url = %request.type_url, "asked for a type that is not served here");
        }
        if first && self.types.len() >= MAX_TYPES {
            return Ok(());
        }
        let subscription = self.types.entry(request.type_url.clone()).or_default();
        if !request.response_nonce.is_empty() {
            match &request.error_detail {
                Some(detail) => tracing::warn!(
                    node = %self.node,
                    type_url = %request.type_url,
                    code = detail.code,
                    detail = %detail.message.escape_debug(),
                    "node rejected part of an update"
                ),
                None => {
                    tracing::debug!(node = %self.node, type_url = %request.type_url, nonce = %request.response_nonce, "acknowledged")
                }
            }
        }
        let changed = subscription.update(first, &request);
        // The first request is answered even when there is nothing to say: the
        // client waits for it to know that it has everything.
        if first || changed {
            self.push(&state, &request.type_url, true).await
        } else {
            Ok(())
        }
    }

    /// Sends what is new for this client; an empty response only when asked to.
    async fn push(
        &mut self,
        state: &MeshState,
        type_url: &str,
        even_if_empty: bool,
    ) -> Result<(), End> {
        let Some(subscription) = self.types.get_mut(type_url) else {
            return Ok(());
        };
        let nothing = Resources::new();
        let resources = state.snapshot().resources(type_url).unwrap_or(&nothing);
        let Some(difference) = subscription.difference(resources, even_if_empty) else {
            return Ok(());
        };
        self.next_nonce += 1;
        let response = DeltaDiscoveryResponse {
            type_url: type_url.to_owned(),
            nonce: self.next_nonce.to_string(),
            ..difference
        };
        tracing::debug!(
            node = %self.node,
            type_url,
            resources = response.resources.len(),
            removed = response.removed_resources.len(),
            "pushing"
        );
        self.responses
            .send(Ok(response))
            .await
            .map_err(|_| End::Client)
    }

    /// The token decides which node this is; a claim to be another is a
    /// mistake in the agent's configuration that would be hard to find otherwise.
    fn check_node_name(&self, node: &Node) {
        use prost_types::value::Kind;
        let claimed = node
            .metadata
            .as_ref()
            .and_then(|metadata| metadata.fields.get("NODE_NAME"));
        if let Some(Kind::StringValue(claimed)) = claimed.and_then(|value| value.kind.as_ref())
            && *claimed != self.node
        {
            tracing::warn!(node = %self.node, claimed = %claimed.escape_debug(), "agent names another node than its token's");
        }
    }
}

/// What a client wants of one type, and has.
#[derive(Debug, Default)]
struct Subscription {
    wildcard: bool,
    names: BTreeSet<String>,
    /// Named since the last response: they are answered even if they do not exist.
    fresh: BTreeSet<String>,
    /// Name to version, as sent or as claimed at the start.
    sent: BTreeMap<String, String>,
}

impl Subscription {
    /// Takes over subscribe and unsubscribe lists; says whether anything changed.
    fn update(&mut self, first: bool, request: &DeltaDiscoveryRequest) -> bool {
        if first {
            // No names in the first request of a type is the old form of the wildcard.
            self.wildcard = request.resource_names_subscribe.is_empty();
            self.sent = request
                .initial_resource_versions
                .clone()
                .into_iter()
                .collect();
        }
        for name in &request.resource_names_subscribe {
            if name == WILDCARD {
                self.wildcard = true;
            } else {
                self.names.insert(name.clone());
                self.fresh.insert(name.clone());
                // Subscribing again asks for the resource again.
                self.sent.remove(name);
            }
        }
        for name in &request.resource_names_unsubscribe {
            if name == WILDCARD {
                self.wildcard = false;
            } else {
                self.names.remove(name);
                self.fresh.remove(name);
            }
        }
        // The client forgets what it no longer subscribes to without being told.
        if !self.wildcard && !request.resource_names_unsubscribe.is_empty() {
            self.sent.retain(|name, _| self.names.contains(name));
        }
        !request.resource_names_subscribe.is_empty()
            || !request.resource_names_unsubscribe.is_empty()
    }

    /// The response that brings the client up to date, and what it has then.
    fn difference(
        &mut self,
        resources: &Resources,
        even_if_empty: bool,
    ) -> Option<DeltaDiscoveryResponse> {
        let wanted = |name: &str| self.wildcard || self.names.contains(name);
        let changed: Vec<_> = resources
            .values()
            .filter(|resource| {
                wanted(&resource.name) && self.sent.get(&resource.name) != Some(&resource.version)
            })
            .cloned()
            .collect();
        let unknown = self
            .fresh
            .iter()
            .filter(|name| !self.sent.contains_key(*name));
        let gone = self
            .sent
            .keys()
            .chain(unknown)
            .filter(|name| !resources.contains_key(*name));
        let removed: Vec<_> = gone.cloned().collect();
        self.fresh.clear();
        if changed.is_empty() && removed.is_empty() && !even_if_empty {
            return None;
        }
        for name in &removed {
            self.sent.remove(name);
        }
        for resource in &changed {
            self.sent
                .insert(resource.name.clone(), resource.version.clone());
        }
        Some(DeltaDiscoveryResponse {
            resources: changed,
            removed_resources: removed,
            ..DeltaDiscoveryResponse::default()
        })
    }
}

const WILDCARD: &str = "*";
/// Per stream. Two are served; each unknown one costs an entry.
const MAX_TYPES: usize = 32;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use ringfence_xds::proto::discovery::Resource;

    use super::*;

    #[test]
    fn wildcard_gets_everything_then_only_what_changed() {
        let mut subscription = Subscription::default();
        subscription.update(true, &DeltaDiscoveryRequest::default());
        assert_eq!(
            names(subscription.difference(&resources(&[("a", "1"), ("b", "1")]), true)),
            (vec!["a", "b"], vec![])
        );
        assert_eq!(
            names(subscription.difference(&resources(&[("a", "2"), ("b", "1")]), false)),
            (vec!["a"], vec![])
        );
        assert_eq!(
            names(subscription.difference(&resources(&[("b", "1")]), false)),
            (vec![], vec!["a"])
        );
        assert_eq!(
            subscription.difference(&resources(&[("b", "1")]), false),
            None
        );
    }

    #[test]
    fn versions_that_the_client_brings_are_not_sent_again_and_what_is_gone_is_removed() {
        let mut subscription = Subscription::default();
        let versions =
            [("a", "1"), ("b", "1"), ("c", "1")].map(|(n, v)| (n.to_owned(), v.to_owned()));
        let request = DeltaDiscoveryRequest {
            initial_resource_versions: versions.into(),
            ..DeltaDiscoveryRequest::default()
        };
        subscription.update(true, &request);
        let response = subscription.difference(&resources(&[("a", "1"), ("b", "2")]), true);
        assert_eq!(names(response), (vec!["b"], vec!["c"]));
    }

    #[test]
    fn name_that_does_not_exist_is_answered_as_removed_once() {
        let mut subscription = Subscription::default();
        let request = DeltaDiscoveryRequest {
            resource_names_subscribe: vec!["a".into(), "nobody".into()],
            ..DeltaDiscoveryRequest::default()
        };
        assert!(subscription.update(true, &request));
        let all = resources(&[("a", "1"), ("b", "1")]);
        assert_eq!(
            names(subscription.difference(&all, true)),
            (vec!["a"], vec!["nobody"])
        );
        assert_eq!(subscription.difference(&all, false), None);
    }

    #[test]
    fn unsubscribed_names_are_not_sent() {
        let mut subscription = Subscription::default();
        let request = DeltaDiscoveryRequest {
            resource_names_subscribe: vec!["*".into()],
            ..Default::default()
        };
        subscription.update(true, &request);
        let request = DeltaDiscoveryRequest {
            resource_names_subscribe: vec!["a".into()],
            resource_names_unsubscribe: vec!["*".into()],
            ..Default::default()
        };
        assert!(subscription.update(false, &request));
        assert_eq!(
            names(subscription.difference(&resources(&[("a", "1"), ("b", "1")]), false)),
            (vec!["a"], vec![])
        );
    }

    fn resources(versions: &[(&str, &str)]) -> Resources {
        let resource = |(name, version): &(&str, &str)| {
            let resource = Resource {
                name: (*name).into(),
                version: (*version).into(),
                ..Resource::default()
            };
            (resource.name.clone(), resource)
        };
        versions.iter().map(resource).collect()
    }

    fn names(response: Option<DeltaDiscoveryResponse>) -> (Vec<&'static str>, Vec<&'static str>) {
        let response = response.unwrap();
        let leak = |name: String| -> &'static str { name.leak() };
        (
            response
                .resources
                .into_iter()
                .map(|r| leak(r.name))
                .collect(),
            response.removed_resources.into_iter().map(leak).collect(),
        )
    }
}
