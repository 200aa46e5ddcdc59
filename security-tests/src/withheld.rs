//! A control plane that names what it has not sent: between agents and the control plane of
//! the lab, policies are kept back. Everything else is the control plane's own, and so is the
//! decision who may ask.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use ringfence_lab::netns::Netns;
use ringfence_xds::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use ringfence_xds::proto::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use ringfence_xds::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use ringfence_xds::{AUTHORIZATION_TYPE, MAX_MESSAGE_BYTES};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{
    Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Server, ServerTlsConfig,
};
use tonic::{Request, Response, Status, Streaming};

use crate::authority::{Authority, Leaf};

/// Serves ADS until it is dropped.
#[derive(Debug)]
pub struct Withholding {
    address: SocketAddr,
    withheld: watch::Sender<BTreeSet<String>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Withholding {
    /// Listens on loopback in `netns`, where the agent is, and asks the control plane at
    /// `address` from there. `root`: path of the lab's root certificate.
    pub fn start(netns: &Netns, address: SocketAddr, root: &Path) -> Result<Self> {
        let between = Between::new(address, root)?;
        let listener = netns
            .run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?
            .context("listening for agents")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let withheld = watch::Sender::default();
        let names = withheld.subscribe();
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let netns = netns.clone();
        let thread = std::thread::spawn(move || {
            let served = netns.run(|| {
                runtime.block_on(async {
                    tokio::select! {
                        served = between.serve(listener, names) => served,
                        _ = stopped => Ok(()),
                    }
                })
            });
            if let Err(error) = served.and_then(|served| served) {
                println!("the control plane that withholds policies has ended: {error:#}");
            }
        });
        Ok(Withholding {
            address,
            withheld,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// For `control_plane.address` of an agent.
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// From now on these policies (`namespace/name`) are not sent. Who has them keeps them.
    pub fn keep_back(&self, names: &[&str]) {
        self.withheld
            .send_modify(|withheld| withheld.extend(names.iter().map(ToString::to_string)));
    }

    /// Sends a policy as it is by now, to everybody who has not got it.
    pub fn let_go(&self, name: &str) {
        self.withheld.send_modify(|withheld| {
            withheld.remove(name);
        });
    }
}

impl Drop for Withholding {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What both sides of it need.
struct Between {
    control_plane: Endpoint,
    identity: Identity,
}

impl Between {
    fn new(control_plane: SocketAddr, root: &Path) -> Result<Self> {
        let pem = std::fs::read(root).with_context(|| format!("reading {}", root.display()))?;
        let roots = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem));
        let (certificate, key) = Authority::of_lab(root)?.issue_pem(&Leaf {
            uris: Vec::new(),
            addresses: vec![Ipv4Addr::LOCALHOST.into()],
            ..Leaf::of("withholding")
        })?;
        Ok(Between {
            control_plane: Endpoint::from_shared(format!("https://{control_plane}"))?
                .tls_config(roots)?,
            identity: Identity::from_pem(certificate, key),
        })
    }

    async fn serve(
        self,
        listener: TcpListener,
        withheld: watch::Receiver<BTreeSet<String>>,
    ) -> Result<()> {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let service = Service {
            control_plane: self.control_plane.connect_lazy(),
            withheld,
        };
        let service = AggregatedDiscoveryServiceServer::new(service)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Server::builder()
            .tls_config(ServerTlsConfig::new().identity(self.identity))?
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener))
            .await
            .context("serving agents")
    }
}

struct Service {
    control_plane: Channel,
    withheld: watch::Receiver<BTreeSet<String>>,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (metadata, _, requests) = request.into_parts();
        // Acknowledgements of what is sent late go along: a nonce that a server has not given
        // is no matter to it.
        let mut request = Request::new(requests.map_while(Result::ok));
        for name in ["authorization", "clusterid"] {
            if let Some(value) = metadata.get(name) {
                request.metadata_mut().insert(name, value.clone());
            }
        }
        let mut responses = AggregatedDiscoveryServiceClient::new(self.control_plane.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
            .delta_aggregated_resources(request)
            .await?
            .into_inner();
        let (agent, outgoing) = mpsc::channel(1);
        let mut withheld = self.withheld.clone();
        tokio::spawn(async move {
            let mut kept = Kept::default();
            loop {
                let response = tokio::select! {
                    response = responses.message() => match response {
                        Ok(Some(response)) => Ok(kept.without(&withheld.borrow(), response)),
                        Ok(None) => return,
                        Err(status) => Err(status),
                    },
                    changed = withheld.changed() => match changed {
                        Ok(()) => match kept.let_go(&withheld.borrow_and_update()) {
                            Some(response) => Ok(response),
                            None => continue,
                        },
                        Err(_) => return,
                    },
                };
                if agent.send(response).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

/// What one stream has not been sent.
#[derive(Default)]
struct Kept {
    policies: BTreeMap<String, Resource>,
    /// How often some were sent after all.
    times: u64,
}

impl Kept {
    /// The response without what is withheld: also if nothing is left of it, for an agent
    /// waits for the first of each type.
    fn without(
        &mut self,
        withheld: &BTreeSet<String>,
        mut response: DeltaDiscoveryResponse,
    ) -> DeltaDiscoveryResponse {
        if response.type_url == AUTHORIZATION_TYPE {
            for name in &response.removed_resources {
                self.policies.remove(name);
            }
            let (kept, sent): (Vec<Resource>, Vec<Resource>) = response
                .resources
                .into_iter()
                .partition(|policy| withheld.contains(&policy.name));
            let kept = kept.into_iter().map(|policy| (policy.name.clone(), policy));
            self.policies.extend(kept);
            response.resources = sent;
        }
        response
    }

    /// What is no longer withheld.
    fn let_go(&mut self, withheld: &BTreeSet<String>) -> Option<DeltaDiscoveryResponse> {
        let (kept, sent): (_, BTreeMap<String, Resource>) = std::mem::take(&mut self.policies)
            .into_iter()
            .partition(|(name, _)| withheld.contains(name));
        self.policies = kept;
        if sent.is_empty() {
            return None;
        }
        self.times += 1;
        Some(DeltaDiscoveryResponse {
            type_url: AUTHORIZATION_TYPE.to_owned(),
            nonce: format!("late-{}", self.times),
            resources: sent.into_values().collect(),
            ..DeltaDiscoveryResponse::default()
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::time::Duration;

    use ringfence_control_plane::ControlPlane;
    use ringfence_lab::mesh::{Mesh, Policy};
    use ringfence_lab::topology::{PodSpec, Topology};
    use ringfence_xds::proto::workload::address::Type;
    use ringfence_xds::{
        AdsClient, ClientConfig, ConnectionState, Handler, NodeInfo, Rejection, Update,
    };
    use tempfile::TempDir;
    use tokio_util::sync::{CancellationToken, DropGuard};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn withheld_policy_comes_when_it_is_let_go_and_every_other_at_once() {
        let (site, withheld) = Site::start().await;
        withheld.send_modify(|names| {
            names.insert("demo/late".into());
        });
        let mut agent = site.agent("token-of-node-a-0123456789");
        let named = agent.named_by_web().await;
        assert!(named.contains(&"demo/late".to_owned()), "{named:?}");
        assert_eq!(agent.policies().await, ["demo/clients-may-use-web"]);
        withheld.send_modify(BTreeSet::clear);
        assert_eq!(agent.policies().await, ["demo/late"]);
    }

    #[tokio::test]
    async fn agent_that_the_control_plane_refuses_is_refused() {
        let (site, _withheld) = Site::start().await;
        let mut agent = site.agent("token-of-nobody-0123456789");
        let failed = |state: &ConnectionState| matches!(state, ConnectionState::Failed { .. });
        let state = tokio::time::timeout(LIMIT, agent.state.wait_for(failed));
        let state = state.await.expect("it is not refused").unwrap().clone();
        assert!(
            format!("{state:?}").contains("not authenticated"),
            "{state:?}"
        );
    }

    /// A control plane, and what withholds its policies.
    struct Site {
        folder: TempDir,
        address: SocketAddr,
        _stop: DropGuard,
    }

    impl Site {
        async fn start() -> (Self, watch::Sender<BTreeSet<String>>) {
            let folder = TempDir::new().unwrap();
            let topology = Topology::new("rf-", 2, PodSpec::defaults(2)).unwrap();
            let mut mesh = Mesh::of(&topology, Ipv4Addr::LOCALHOST.into(), folder.path());
            mesh.listen = "127.0.0.1:0".into();
            mesh.policies.push(Policy {
                name: "late".into(),
                ..Policy::clients_may_use_web()
            });
            for (name, file) in &mesh.nodes {
                std::fs::write(file, format!("token-of-{name}-0123456789")).unwrap();
            }
            let file = folder.path().join("mesh.yaml");
            mesh.write(&file).unwrap();
            let control_plane = ControlPlane::bind(&file).unwrap();
            let root = folder.path().join("ca/root-cert.pem");
            let between = Between::new(control_plane.addresses()[0], &root).unwrap();
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            listener.set_nonblocking(true).unwrap();
            let address = listener.local_addr().unwrap();
            let stop = CancellationToken::new();
            let withheld = watch::Sender::default();
            tokio::spawn(control_plane.serve(stop.clone()));
            tokio::spawn(
                stop.clone()
                    .run_until_cancelled_owned(between.serve(listener, withheld.subscribe())),
            );
            let site = Site {
                folder,
                address,
                _stop: stop.drop_guard(),
            };
            (site, withheld)
        }

        fn agent(&self, token: &str) -> Agent {
            let token_file = self.folder.path().join("token");
            std::fs::write(&token_file, token).unwrap();
            let config = ClientConfig {
                address: format!("https://{}", self.address),
                root_ca: self.folder.path().join("ca/root-cert.pem"),
                token_file,
                node: NodeInfo {
                    name: "agent".into(),
                    namespace: "ringfence-system".into(),
                    address: Ipv4Addr::LOCALHOST.into(),
                    node_name: "node-a".into(),
                    cluster_id: "Kubernetes".into(),
                },
            };
            let (recorder, updates) = mpsc::unbounded_channel();
            let (client, state) = AdsClient::new(config, Recorder(recorder));
            let stop = CancellationToken::new();
            tokio::spawn(client.run(stop.clone()));
            Agent {
                updates,
                state,
                _stop: stop.drop_guard(),
            }
        }
    }

    struct Recorder(mpsc::UnboundedSender<Update>);

    impl Handler for Recorder {
        fn apply(&mut self, update: Update) -> Vec<Rejection> {
            let _ = self.0.send(update);
            Vec::new()
        }
    }

    struct Agent {
        updates: mpsc::UnboundedReceiver<Update>,
        state: watch::Receiver<ConnectionState>,
        _stop: DropGuard,
    }

    impl Agent {
        async fn update(&mut self) -> Update {
            let update = tokio::time::timeout(LIMIT, self.updates.recv());
            update.await.expect("no update").unwrap()
        }

        /// Policies that the workload `web` names, in the next response that has it.
        async fn named_by_web(&mut self) -> Vec<String> {
            loop {
                let Update::Addresses(delta) = self.update().await else {
                    continue;
                };
                for named in delta.upserted {
                    if let Some(Type::Workload(workload)) = named.value.r#type
                        && workload.name == "web"
                    {
                        return workload.authorization_policies;
                    }
                }
            }
        }

        /// Names in the next response with policies.
        async fn policies(&mut self) -> Vec<String> {
            loop {
                if let Update::Authorizations(delta) = self.update().await {
                    return delta.upserted.into_iter().map(|named| named.name).collect();
                }
            }
        }
    }
}
