//! The connection: TLS, headers, keepalive, reconnect.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};
use rand::Rng;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::MAX_MESSAGE_BYTES;
use crate::error::{ConnectError, chain};
use crate::proto::discovery::Node;
use crate::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::session::{Handler, Session};

/// Where the control plane is and who asks.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// `https://host:port`.
    pub address: String,
    /// PEM roots of the server's certificate; read again for each connection.
    pub root_ca: PathBuf,
    /// Bearer token; read again for each connection.
    pub token_file: PathBuf,
    pub node: NodeInfo,
}

/// How this agent presents itself, as Istiod expects of a node proxy.
#[derive(Debug, Clone)]
pub struct NodeInfo {
    /// The agent's own pod (or host) name.
    pub name: String,
    /// Namespace of the agent's pod; Istiod compares it with the token's.
    pub namespace: String,
    /// The agent's own address.
    pub address: std::net::IpAddr,
    pub node_name: String,
    /// Also sent as the `clusterid` header.
    pub cluster_id: String,
}

/// What the client is doing, for `status` and readiness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectionState {
    Connecting,
    Connected {
        since: SystemTime,
    },
    /// Waiting to try again.
    Failed {
        error: Arc<str>,
        retry_in: Duration,
    },
}

/// The delta ADS client. It never gives up: a control plane that is down at
/// start, or for days, is tried again until the client is told to stop.
pub struct AdsClient<H> {
    config: ClientConfig,
    handler: H,
    session: Session,
    state: watch::Sender<ConnectionState>,
}

impl<H: Handler> AdsClient<H> {
    pub fn new(config: ClientConfig, handler: H) -> (Self, watch::Receiver<ConnectionState>) {
        let (state, watcher) = watch::channel(ConnectionState::Connecting);
        (
            Self {
                config,
                handler,
                session: Session::default(),
                state,
            },
            watcher,
        )
    }

    /// Runs until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let _ = shutdown.run_until_cancelled(self.run_for_ever()).await;
    }

    async fn run_for_ever(&mut self) {
        let mut backoff = Backoff::default();
        loop {
            self.state.send_replace(ConnectionState::Connecting);
            let error = self.run_stream(&mut backoff).await;
            let retry_in = backoff.next();
            tracing::warn!(address = %self.config.address, %error, ?retry_in, "no stream to the control plane");
            let error = error.to_string().into();
            self.state
                .send_replace(ConnectionState::Failed { error, retry_in });
            tokio::time::sleep(retry_in).await;
        }
    }

    /// One connection, until it ends.
    async fn run_stream(&mut self, backoff: &mut Backoff) -> ConnectError {
        match self.try_run_stream(backoff).await {
            Ok(()) => ConnectError::Closed,
            Err(error) => error,
        }
    }

    async fn try_run_stream(&mut self, backoff: &mut Backoff) -> Result<(), ConnectError> {
        let address = self.config.address.clone();
        let channel = self.connect().await?;
        let (requests, outgoing) = mpsc::channel(QUEUED_REQUESTS);
        let mut request = tonic::Request::new(ReceiverStream::new(outgoing));
        self.authorize(&mut request).await?;
        for subscription in self.session.start_stream(self.config.node.to_proto()) {
            // The queue has room for both before anything reads it.
            requests
                .send(subscription)
                .await
                .map_err(|_| ConnectError::Closed)?;
        }

        let mut client = AggregatedDiscoveryServiceClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        // gRPC servers may hold back the headers until the first message, so this
        // wait covers a full first response being made.
        let mut responses =
            tokio::time::timeout(FIRST_RESPONSE, client.delta_aggregated_resources(request))
                .await
                .map_err(|_| ConnectError::Timeout {
                    address: address.clone(),
                    seconds: FIRST_RESPONSE.as_secs(),
                })?
                .map_err(refused)?
                .into_inner();
        self.state.send_replace(ConnectionState::Connected {
            since: SystemTime::now(),
        });
        tracing::info!(%address, "connected to the control plane");

        while let Some(response) = responses.message().await.map_err(refused)? {
            backoff.reset();
            tracing::debug!(
                type_url = %response.type_url,
                nonce = %response.nonce,
                resources = response.resources.len(),
                removed = response.removed_resources.len(),
                "update from the control plane"
            );
            let Some(answer) = self.session.respond(response, &mut self.handler) else {
                continue;
            };
            if let Some(detail) = &answer.error_detail {
                tracing::warn!(type_url = %answer.type_url, rejected = %detail.message, "part of an update rejected");
            }
            requests
                .send(answer)
                .await
                .map_err(|_| ConnectError::Closed)?;
        }
        Ok(())
    }

    async fn connect(&self) -> Result<Channel, ConnectError> {
        let address = &self.config.address;
        let bad = |reason: String| ConnectError::Address {
            address: address.clone(),
            reason,
        };
        let roots = read("root certificate file", &self.config.root_ca).await?;
        let endpoint = Endpoint::from_shared(address.clone()).map_err(|e| bad(chain(&e)))?;
        if endpoint.uri().scheme_str() != Some("https") {
            // A token must never leave in the clear.
            return Err(bad("the scheme is not https".to_owned()));
        }
        let endpoint = endpoint
            .tls_config(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots)))
            .map_err(|e| bad(chain(&e)))?
            .connect_timeout(CONNECT)
            .tcp_keepalive(Some(KEEPALIVE))
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE_ANSWER)
            .keep_alive_while_idle(true);
        endpoint
            .connect()
            .await
            .map_err(|e| ConnectError::Unreachable {
                address: address.clone(),
                reason: chain(&e),
            })
    }

    async fn authorize<T>(&self, request: &mut tonic::Request<T>) -> Result<(), ConnectError> {
        let what = "token file";
        let path = &self.config.token_file;
        let unusable = || ConnectError::Unusable {
            what,
            path: path.clone(),
        };
        let token = read(what, path).await?;
        let token = std::str::from_utf8(&token).map_err(|_| unusable())?.trim();
        if token.is_empty() {
            return Err(unusable());
        }
        let mut bearer: MetadataValue<Ascii> =
            format!("Bearer {token}").parse().map_err(|_| unusable())?;
        bearer.set_sensitive(true);
        let cluster_id = &self.config.node.cluster_id;
        let cluster = cluster_id
            .parse()
            .map_err(|_| ConnectError::ClusterId(cluster_id.clone()))?;
        request.metadata_mut().insert("authorization", bearer);
        request.metadata_mut().insert("clusterid", cluster);
        Ok(())
    }
}

impl<H> std::fmt::Debug for AdsClient<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdsClient")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl NodeInfo {
    /// `ztunnel~<ip>~<pod>.<namespace>~<namespace>.svc.cluster.local` and the metadata Istiod reads.
    fn to_proto(&self) -> Node {
        let Self {
            name,
            namespace,
            address,
            node_name,
            cluster_id,
        } = self;
        let text = |s: &str| Value {
            kind: Some(Kind::StringValue(s.to_owned())),
        };
        let addresses = ListValue {
            values: vec![text(&address.to_string())],
        };
        let fields = [
            ("NAME", text(name)),
            ("NAMESPACE", text(namespace)),
            (
                "INSTANCE_IPS",
                Value {
                    kind: Some(Kind::ListValue(addresses)),
                },
            ),
            ("NODE_NAME", text(node_name)),
            ("CLUSTER_ID", text(cluster_id)),
        ];
        let fields: BTreeMap<_, _> = fields
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect();
        Node {
            id: format!("ztunnel~{address}~{name}.{namespace}~{namespace}.svc.cluster.local"),
            metadata: Some(Struct { fields }),
        }
    }
}

/// 10 ms doubling to 15 s; each wait is between half and the whole of its step,
/// so that agents that lost the same server do not return in the same instant.
#[derive(Debug)]
struct Backoff {
    step: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { step: FIRST_RETRY }
    }
}

impl Backoff {
    fn next(&mut self) -> Duration {
        let step = self.step;
        self.step = step.saturating_mul(2).min(LAST_RETRY);
        rand::rng().random_range(step / 2..=step)
    }

    fn reset(&mut self) {
        self.step = FIRST_RETRY;
    }
}

async fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, ConnectError> {
    tokio::fs::read(path)
        .await
        .map_err(|source| ConnectError::File {
            what,
            path: path.to_owned(),
            source,
        })
}

fn refused(status: tonic::Status) -> ConnectError {
    let message = match std::error::Error::source(&status) {
        Some(source) => format!("{}: {}", status.message(), chain(source)),
        None => status.message().to_owned(),
    };
    ConnectError::Refused {
        code: status.code(),
        message,
    }
}

const FIRST_RETRY: Duration = Duration::from_millis(10);
const LAST_RETRY: Duration = Duration::from_secs(15);
const CONNECT: Duration = Duration::from_secs(10);
const FIRST_RESPONSE: Duration = Duration::from_secs(60);
/// Not below 15 s: Istiod closes connections that ping more often.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(10);
const QUEUED_REQUESTS: usize = 16;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn backoff_doubles_to_its_limit_and_starts_again_after_success() {
        let mut backoff = Backoff::default();
        assert!(backoff.next() <= FIRST_RETRY);
        for _ in 0..20 {
            assert!(backoff.next() <= LAST_RETRY);
        }
        assert!(backoff.next() >= LAST_RETRY / 2);
        backoff.reset();
        assert!(backoff.next() <= FIRST_RETRY);
    }

    #[test]
    fn node_is_presented_as_istiod_expects() {
        let node = info().to_proto();
        assert_eq!(
            node.id,
            "ztunnel~10.0.0.1~agent-x.system~system.svc.cluster.local"
        );
        let fields = node.metadata.unwrap().fields;
        let keys: Vec<_> = fields.keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            [
                "CLUSTER_ID",
                "INSTANCE_IPS",
                "NAME",
                "NAMESPACE",
                "NODE_NAME"
            ]
        );
        assert_eq!(
            fields["NAMESPACE"].kind,
            Some(Kind::StringValue("system".into()))
        );
    }

    #[tokio::test]
    async fn token_is_not_sent_without_tls() {
        let config = ClientConfig {
            address: "http://127.0.0.1:1".into(),
            root_ca: "/dev/null".into(),
            token_file: "/dev/null".into(),
            node: info(),
        };
        struct Nothing;
        impl Handler for Nothing {
            fn apply(&mut self, _: crate::Update) -> Vec<crate::Rejection> {
                vec![]
            }
        }
        let (client, _) = AdsClient::new(config, Nothing);
        let error = client.connect().await.unwrap_err();
        assert!(matches!(error, ConnectError::Address { .. }), "{error}");
    }

    fn info() -> NodeInfo {
        NodeInfo {
            name: "agent-x".into(),
            namespace: "system".into(),
            address: [10, 0, 0, 1].into(),
            node_name: "node-x".into(),
            cluster_id: "Kubernetes".into(),
        }
    }
}
