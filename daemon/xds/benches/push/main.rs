//! How long a changed policy takes from the control plane's push to enforcement, with many
//! policies and workloads loaded: a real agent, real delta ADS over TLS, and plaintext
//! connections from outside the pod that are admitted or refused. Prints one JSON object;
//! `cargo xtask bench policy` shows it.
//!
//! `RINGFENCE_BIN` names the agent's program. Needs root: it makes network namespaces.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod site;

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use prost::Message;
use prost_types::Any;
use ringfence_xds::{
    ADDRESS_TYPE, AUTHORIZATION_TYPE, MAX_MESSAGE_BYTES,
    proto::{
        discovery::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource,
            aggregated_discovery_service_server::{
                AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
            },
        },
        security::{
            self, Action, Authorization, Clause, Match, Rule, Scope, StringMatch,
            string_match::MatchType,
        },
        workload::{Address, TunnelProtocol, Workload, address},
    },
};
use site::{PODS, PORT, Site};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Identity, Server, ServerTlsConfig},
};

const NAMESPACES: usize = 100;

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (policies, workloads, changes) = if quick {
        (1_000, 1_000, 20)
    } else {
        (10_000, 10_000, 200)
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let site = Site::new(listener.local_addr().unwrap());
    let control_plane = ControlPlane::new(policies, workloads);
    let push = control_plane.push.clone();
    listener.set_nonblocking(true).unwrap();
    let identity = Identity::from_pem(&site.certificate, &site.key);
    runtime.spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let service = AggregatedDiscoveryServiceServer::new(control_plane)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Server::builder()
            .tls_config(ServerTlsConfig::new().identity(identity))
            .unwrap()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener))
            .await
            .unwrap();
    });

    let agent = site.start_agent();
    // Enrolled, and held until everything has arrived.
    until(&site, false, Duration::from_secs(60));
    let begin = Instant::now();
    until(&site, true, Duration::from_secs(120));
    let first_sync = begin.elapsed().as_secs_f64();
    let mut milliseconds: Vec<f64> = (0..changes)
        .map(|change| {
            // Never in step with what the agent does every two seconds.
            std::thread::sleep(Duration::from_millis(37 + change * 53 % 101));
            let allow = change % 2 == 1;
            let response = authorizations(vec![flip(allow)]);
            let begin = Instant::now();
            push.send(response);
            until(&site, allow, Duration::from_secs(20));
            begin.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    drop(agent);
    milliseconds.sort_by(f64::total_cmp);
    let at = |share: f64| milliseconds[((changes - 1) as f64 * share).round() as usize];
    println!(
        "{{\"policies\":{policies},\"workloads\":{workloads},\"pods\":{PODS},\"changes\":{changes},\
         \"first_sync_seconds\":{first_sync},\"p50_ms\":{},\"p99_ms\":{},\"max_ms\":{}}}",
        at(0.5),
        at(0.99),
        at(1.0)
    );
}

/// Connects until it is as it should be.
fn until(site: &Site, admitted: bool, patience: Duration) {
    let begin = Instant::now();
    loop {
        let outcome = site.connect();
        let is = match outcome {
            Ok(_) => true,
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => false,
            Err(error) => panic!("cannot connect: {error}"),
        };
        if is == admitted {
            return;
        }
        assert!(begin.elapsed() < patience, "not enforced: {}", site.log());
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// The stream to the agent.
#[derive(Clone, Default)]
struct Push(Arc<Mutex<Option<Responses>>>);

type Responses = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

impl Push {
    fn send(&self, response: DeltaDiscoveryResponse) {
        let responses = self
            .0
            .lock()
            .unwrap()
            .clone()
            .expect("the agent is connected");
        responses.blocking_send(Ok(response)).unwrap();
    }
}

struct ControlPlane {
    push: Push,
    first: Arc<BTreeMap<String, DeltaDiscoveryResponse>>,
}

impl ControlPlane {
    fn new(policies: usize, workloads: usize) -> Self {
        let mut all: Vec<Authorization> = (0..policies - 1).map(policy).collect();
        all.push(flip(true));
        let addresses: Vec<Resource> = (0..workloads).map(workload).collect();
        let first = [
            (AUTHORIZATION_TYPE.to_owned(), authorizations(all)),
            (ADDRESS_TYPE.to_owned(), response(ADDRESS_TYPE, addresses)),
        ];
        ControlPlane {
            push: Push::default(),
            first: Arc::new(first.into()),
        }
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for ControlPlane {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (responses, outgoing) = mpsc::channel(16);
        *self.push.0.lock().unwrap() = Some(responses.clone());
        let first = self.first.clone();
        tokio::spawn(async move {
            let mut requests = request.into_inner();
            while let Ok(Some(request)) = requests.message().await {
                // Everything else acknowledges.
                if request.response_nonce.is_empty()
                    && let Some(response) = first.get(&request.type_url)
                {
                    let _ = responses.send(Ok(response.clone())).await;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

fn authorizations(policies: Vec<Authorization>) -> DeltaDiscoveryResponse {
    let resource = |policy: Authorization| {
        let name = format!("{}/{}", policy.namespace, policy.name);
        resource(AUTHORIZATION_TYPE, name, &policy)
    };
    response(
        AUTHORIZATION_TYPE,
        policies.into_iter().map(resource).collect(),
    )
}

fn response(type_url: &str, resources: Vec<Resource>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: type_url.into(),
        nonce: "n".into(),
        resources,
        ..Default::default()
    }
}

fn resource(type_url: &str, name: String, value: &impl Message) -> Resource {
    Resource {
        version: "1".into(),
        resource: Some(Any {
            type_url: type_url.into(),
            value: value.encode_to_vec(),
        }),
        name,
        aliases: Vec::new(),
    }
}

/// The policy that changes: alone admits plaintext, to the one port or to another.
fn flip(allow: bool) -> Authorization {
    let port = if allow { PORT } else { PORT + 1 };
    allowing(
        "ns0".into(),
        "flip".into(),
        Match {
            destination_ports: vec![port.into()],
            ..Default::default()
        },
    )
}

/// One client, one port, sometimes an address block.
fn policy(k: usize) -> Authorization {
    let namespace = format!("ns{}", k % NAMESPACES);
    let principal = format!("cluster.local/ns/{namespace}/sa/client-{k}");
    let block = security::Address {
        address: vec![10, (k / 256) as u8, k as u8, 0],
        length: 24,
    };
    let one = Match {
        principals: vec![StringMatch {
            match_type: Some(MatchType::Exact(principal)),
        }],
        destination_ports: vec![8000 + k as u32 % 16],
        source_ips: k.is_multiple_of(4).then_some(block).into_iter().collect(),
        ..Default::default()
    };
    allowing(namespace, format!("p{k}"), one)
}

fn allowing(namespace: String, name: String, one: Match) -> Authorization {
    Authorization {
        name,
        namespace,
        scope: Scope::Namespace as i32,
        action: Action::Allow as i32,
        rules: vec![Rule {
            clauses: vec![Clause { matches: vec![one] }],
        }],
        dry_run: false,
    }
}

/// The first ones are the agent's own pods.
fn workload(k: usize) -> Resource {
    let (own, namespace) = (k < PODS, format!("ns{}", k % NAMESPACES));
    let address = if own {
        site::pod_address(k).octets().to_vec()
    } else {
        vec![100, 64 + (k / 65_536) as u8, (k / 256) as u8, k as u8]
    };
    let name = format!("pod-{k}");
    let uid = format!("cluster//Pod/{namespace}/{name}");
    let workload = Workload {
        uid: uid.clone(),
        name,
        addresses: vec![address],
        tunnel_protocol: TunnelProtocol::Hbone as i32,
        service_account: format!("client-{k}"),
        namespace,
        ..Default::default()
    };
    let value = Address {
        r#type: Some(address::Type::Workload(workload)),
    };
    resource(ADDRESS_TYPE, uid, &value)
}
