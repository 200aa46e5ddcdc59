//! Tunnels of peers: accepted in the pod, each stream led to the application with the
//! client's own address, after the kernel has judged the peer.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ktls_offload::{Open, RefuseReason, Tunnel};
use ringfence_bpf_common::Reason;
use ringfence_identity::{ExpectedPeer, PeerVerifier, tls};
use tokio::net::TcpStream;

use super::pods::{Pod, is_agent_port};
use super::policy::Judged;
use super::sockets::{self, ConnectError};
use super::streams::{Direction, Stream};
use super::{Agent, TUNNEL_ALPN};
use crate::status;

/// How long a tunnel may wait for its next stream. The client gives up first (see
/// `pool`), so that it never sends a stream into a tunnel that is being closed.
const IDLE: Duration = Duration::from_secs(300);

/// Serves one tunnel in a task of its own.
pub fn spawn(agent: &Arc<Agent>, pod: &Arc<Pod>, stream: TcpStream, from: SocketAddr) {
    agent.metrics.inbound_accepted.inc();
    let (agent, pod) = (agent.clone(), pod.clone());
    tokio::spawn(async move {
        if let Some(tunnel) = accept(&agent, &pod, stream, from).await {
            serve(&agent, &pod, tunnel).await;
        }
    });
}

async fn accept(agent: &Agent, pod: &Pod, stream: TcpStream, from: SocketAddr) -> Option<Tunnel> {
    let refuse = |reason: &'static str, detail: &dyn std::fmt::Display| {
        agent.metrics.handshake_failed(reason);
        tracing::info!(pod = pod.config.name, %from, reason, %detail, "tunnel refused");
    };
    let Some(workload) = pod.workload() else {
        refuse("pod-held", &pod.held().unwrap_or_default());
        return None;
    };
    let svid = match agent.svids.current(&workload.identity) {
        Ok(svid) => svid,
        Err(error) => {
            refuse("no-svid", &error);
            return None;
        }
    };
    let verifier = PeerVerifier::new(agent.trust.clone(), ExpectedPeer::AnyTrusted);
    let config =
        match tls::server_config_with(&svid, verifier.clone(), TUNNEL_ALPN, agent.key_exchange) {
            Ok(config) => config,
            Err(error) => {
                refuse("internal", &error);
                return None;
            }
        };
    match Tunnel::accept(stream, Arc::new(config), &verifier, &agent.tunnels).await {
        Ok(tunnel) => {
            agent.handshake_done(Direction::Inbound, &tunnel);
            Some(tunnel)
        }
        Err(error) => {
            refuse(error.as_str(), &error);
            None
        }
    }
}

/// One stream after the other, until the peer closes or something breaks.
async fn serve(agent: &Arc<Agent>, pod: &Arc<Pod>, mut tunnel: Tunnel) {
    loop {
        let open = match tokio::time::timeout(IDLE, tunnel.next_open()).await {
            Ok(Ok(Some(open))) => open,
            Ok(Ok(None)) | Err(_) => return,
            Ok(Err(error)) => {
                agent.metrics.refused(error.as_str());
                tracing::info!(pod = pod.config.name, peer = %tunnel.peer().id(), %error, "tunnel broken");
                return;
            }
        };
        let (app, judged) = match last_hop(agent, pod, &tunnel, &open).await {
            Ok(admitted) => admitted,
            Err(reason) => {
                // The peer learns that policy refuses it, and no more.
                let why = match reason {
                    RefuseReason::PolicyDenied if pod.policy.lacks_policy() => {
                        Reason::PolicyNotReceived.as_str()
                    }
                    reason => reason.as_str(),
                };
                agent.metrics.refused(why);
                tracing::info!(
                    pod = pod.config.name, peer = %tunnel.peer().id(), source = %open.source,
                    destination = %open.destination, reason = why, "stream refused"
                );
                if let Err(error) = tunnel.refuse(reason).await {
                    tracing::debug!(%error, "refusal not delivered");
                }
                return;
            }
        };
        if let Err(error) = tunnel.opened().await {
            tracing::info!(%error, "tunnel broken while a stream was opened");
            sockets::reset(app);
            return;
        }
        agent.metrics.stream_opened(Direction::Inbound.as_str());
        let stream = Stream {
            id: *open.stream.as_bytes(),
            direction: Direction::Inbound,
            source: open.source,
            destination: open.destination,
            session: tunnel.session().clone(),
            handle: Arc::default(),
            since: Instant::now(),
            pod: pod.clone(),
            judged: Some(judged),
        };
        match agent.relay(app, tunnel, stream).await {
            Some(reusable) => tunnel = reusable,
            None => return,
        }
    }
}

/// Checks what the peer asks for and connects to the application.
async fn last_hop(
    agent: &Agent,
    pod: &Pod,
    tunnel: &Tunnel,
    open: &Open,
) -> Result<(TcpStream, Judged), RefuseReason> {
    // A policy that the workload names may still be on its way.
    pod.hold.over().await;
    // A tunnel outlives the handshake; the certificate it was made with must not.
    if tunnel.peer().not_after() < status::now().cast_signed() {
        return Err(RefuseReason::CertificateExpired);
    }
    if agent
        .trust
        .revoked(tunnel.peer(), SystemTime::now())
        .is_err()
    {
        return Err(RefuseReason::CertificateRevoked);
    }
    let workload = pod.workload().ok_or(RefuseReason::Overloaded)?;
    let destination = super::outbound::canonical(open.destination);
    if !workload.addresses.contains(&destination.ip()) {
        return Err(RefuseReason::NotLocal);
    }
    if is_agent_port(destination.port()) || destination.port() == 0 {
        return Err(RefuseReason::AgentPort);
    }
    let client = open.source.ip().to_canonical();
    if client.is_ipv4() != destination.is_ipv4() || !is_address_of(agent, client, tunnel) {
        return Err(RefuseReason::SourceForged);
    }

    let peer = tunnel.peer().id();
    let identity = agent
        .identities
        .number(peer, &agent.trust.aliases())
        .map_err(|error| {
            tracing::warn!(%error, "a verified identity has no number: refused");
            RefuseReason::PolicyDenied
        })?;
    let connect =
        || sockets::start_last_hop(&agent.datapath, &pod.netns, identity, client, destination);
    let (set, started) = pod
        .policy
        .with_identity(&agent.identities, &agent.datapath, identity, connect)
        .map_err(|error| {
            tracing::error!(%error, "identity cannot be prepared: refused");
            RefuseReason::Internal
        })?;
    let refused = |error: ConnectError| match error {
        ConnectError::Denied => RefuseReason::PolicyDenied,
        ConnectError::Refused => RefuseReason::ConnectionRefused,
        ConnectError::Timeout => RefuseReason::ConnectTimeout,
        ConnectError::Io(error) => {
            tracing::info!(pod = pod.config.name, %error, "last hop failed");
            RefuseReason::Unreachable
        }
        ConnectError::Datapath(error) => {
            tracing::error!(%error, "last hop cannot be registered: refused");
            RefuseReason::Internal
        }
    };
    let app = sockets::finish(started.map_err(refused)?)
        .await
        .map_err(refused)?;
    let judged = Judged {
        set,
        identity,
        source: client,
        destination,
    };
    Ok((app, judged))
}

/// Whether the peer may speak for `client`: CIDR policy would be forgeable otherwise.
fn is_address_of(agent: &Agent, client: IpAddr, tunnel: &Tunnel) -> bool {
    let aliases = agent.trust.aliases();
    agent
        .mesh()
        .by_address(client)
        .is_some_and(|w| aliases.same(w.identity.spiffe_id(), tunnel.peer().id()))
}
