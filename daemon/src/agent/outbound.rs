//! Connections of our pods: taken over at the pod's outbound listener, carried to the
//! destination's agent through a tunnel.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use ktls_offload::{Open, Tunnel};
use ringfence_identity::{ExpectedPeer, NoSvid, PeerVerifier, SpiffeId, tls};
use tokio::net::TcpStream;

use super::mesh::{Reach, Workload};
use super::pods::{INBOUND_PORT, Pod};
use super::pool::Key;
use super::sockets::{self, ConnectError};
use super::streams::{Direction, Stream};
use super::{Agent, TUNNEL_ALPN};

/// Why an application's connection was not carried. The application sees a reset.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("the connection was not redirected by the connect program")]
    NoOriginalDestination,
    #[error("the pod is held: {0}")]
    Held(String),
    #[error("no workload has the address {0}")]
    UnknownDestination(IpAddr),
    #[error("the destination cannot be reached through the mesh: {0}")]
    Unreachable(&'static str),
    #[error("no certificate for {identity}: {reason}")]
    NoSvid { identity: SpiffeId, reason: NoSvid },
    #[error("cannot connect to {to}: {error}")]
    Dial { to: SocketAddr, error: ConnectError },
    #[error("tunnel to {to}: {error}")]
    Tunnel {
        to: SocketAddr,
        error: ktls_offload::ConnectError,
    },
    #[error("TLS configuration: {0}")]
    Tls(rustls::Error),
    #[error(transparent)]
    Random(#[from] ktls_offload::RandomUnavailable),
}

impl Refusal {
    fn label(&self) -> &'static str {
        match self {
            Refusal::NoOriginalDestination => "no-original-destination",
            Refusal::Held(_) => "pod-held",
            Refusal::UnknownDestination(_) => "unknown-destination",
            Refusal::Unreachable(reason) => reason,
            Refusal::NoSvid { .. } => "no-svid",
            Refusal::Dial {
                error: ConnectError::Refused,
                ..
            } => "peer-agent-refused",
            Refusal::Dial {
                error: ConnectError::Timeout,
                ..
            } => "peer-agent-timeout",
            Refusal::Dial { .. } => "dial-failed",
            Refusal::Tunnel { .. } => "tunnel-failed",
            Refusal::Tls(_) | Refusal::Random(_) => "internal",
        }
    }
}

/// Serves one connection in a task of its own.
pub fn spawn(agent: &Arc<Agent>, pod: &Arc<Pod>, stream: TcpStream, source: SocketAddr) {
    agent.metrics.outbound_accepted.inc();
    sockets::reset_on_close(&stream);
    let (agent, pod) = (agent.clone(), pod.clone());
    tokio::spawn(async move {
        let source = canonical(source);
        match carry(&agent, &pod, &stream, source).await {
            Ok((tunnel, key, open)) => relay(&agent, pod, stream, tunnel, key, open).await,
            Err(refusal) => {
                agent.metrics.refused(refusal.label());
                tracing::info!(pod = pod.config.name, %source, reason = refusal.label(), error = %refusal, "connection refused");
                sockets::reset(stream);
            }
        }
    });
}

/// Finds out where the connection was going and gets a tunnel there.
async fn carry(
    agent: &Agent,
    pod: &Pod,
    stream: &TcpStream,
    source: SocketAddr,
) -> Result<(Tunnel, Key, Open), Refusal> {
    let original = agent
        .datapath
        .original_destination(stream.as_fd())
        .ok_or(Refusal::NoOriginalDestination)?;
    if let Some(reason) = pod.held() {
        return Err(Refusal::Held(reason));
    }
    let own = pod
        .workload()
        .ok_or_else(|| Refusal::Held("no-workload".into()))?;
    let address = IpAddr::from(original.backend.addr);
    let destination = SocketAddr::new(address, original.backend.port);
    let (workload, expected) = destination_of(agent, address)?;
    let svid = agent
        .svids
        .current(&own.identity)
        .map_err(|reason| Refusal::NoSvid {
            identity: own.identity.spiffe_id().clone(),
            reason,
        })?;

    let key = Key {
        source: own.identity.spiffe_id().clone(),
        netns: pod.netns.cookie(),
        destination: address,
        serial: svid.serial().into(),
    };
    let open = Open::new(destination, source)?;
    if let Some(tunnel) = agent.pool.take(&key, &expected, &agent.trust) {
        agent.metrics.tunnels_reused.inc();
        return Ok((tunnel, key, open));
    }

    let to = SocketAddr::new(address, INBOUND_PORT);
    let dialled = sockets::dial(&agent.datapath, &pod.netns, source.ip(), to).await;
    let tcp = dialled.map_err(|error| Refusal::Dial { to, error })?;
    let verifier = PeerVerifier::new(agent.trust.clone(), ExpectedPeer::OneOf(expected));
    let config = tls::client_config_with(&svid, verifier.clone(), TUNNEL_ALPN, agent.key_exchange)
        .map_err(Refusal::Tls)?;
    let connected = Tunnel::connect(tcp, Arc::new(config), &verifier, &agent.tunnels).await;
    let tunnel = connected.map_err(|error| {
        agent.metrics.handshake_failed(error.as_str());
        Refusal::Tunnel { to, error }
    })?;
    agent.handshake_done(Direction::Outbound, &tunnel);
    tracing::debug!(workload = workload.uid, peer = %tunnel.peer().id(), "tunnel ready");
    Ok((tunnel, key, open))
}

fn destination_of(
    agent: &Agent,
    address: IpAddr,
) -> Result<(Arc<Workload>, BTreeSet<SpiffeId>), Refusal> {
    let mesh = agent.mesh();
    let workload = mesh
        .by_address(address)
        .ok_or(Refusal::UnknownDestination(address))?;
    match workload.reach {
        Reach::Mesh => Ok((workload.clone(), mesh.expected_identities(workload))),
        // It left the mesh after the kernel chose it; the application tries again.
        Reach::Direct => Err(Refusal::Unreachable("destination-left-the-mesh")),
        Reach::Refused(reason) => Err(Refusal::Unreachable(reason)),
    }
}

async fn relay(
    agent: &Arc<Agent>,
    pod: Arc<Pod>,
    app: TcpStream,
    mut tunnel: Tunnel,
    key: Key,
    open: Open,
) {
    if let Err(error) = tunnel.open(open).await {
        agent.metrics.refused("tunnel-failed");
        tracing::info!(%error, "tunnel failed before the stream began");
        sockets::reset(app);
        return;
    }
    agent.metrics.stream_opened(Direction::Outbound.as_str());
    let stream = Stream {
        id: *open.stream.as_bytes(),
        direction: Direction::Outbound,
        source: open.source,
        destination: open.destination,
        session: tunnel.session().clone(),
        handle: Arc::default(),
        since: Instant::now(),
        pod,
        judged: None,
    };
    if let Some(tunnel) = agent.relay(app, tunnel, stream).await {
        agent.pool.put(key, tunnel);
    }
}

/// IPv4 as IPv4, whatever the listener's family.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
