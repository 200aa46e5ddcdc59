//! The node's agent: what its parts share.

mod applied;
mod audit;
mod audit_file;
mod convert;
mod dry_run;
mod egress;
mod explain;
mod guard;
mod hold;
mod in_force;
mod inbound;
mod mesh;
mod metrics;
mod netns;
mod outbound;
mod page;
mod plaintext;
mod pods;
mod policy;
mod policy_metrics;
mod pool;
mod roster;
mod sockets;
mod start;
mod streams;
mod supervise;
mod sync;
mod trust;
mod updates;
mod watch;
mod workload_api;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use ktls_offload::{ResetReason, Tunnel, TunnelConfig};
use ringfence_datapath::Datapath;
use ringfence_identity::tls::KeyExchangePolicy;
use ringfence_identity::{SvidManager, TrustStore};
use ringfence_xds::ConnectionState;
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch as state};

use crate::authz::report::{
    Applied, DryRun, DryRunRequest, ExplainRequest, Explanation, Log, LogRequest,
};
use crate::config::{AgentConfig, Egress};
use crate::status;
use audit::Audit;
pub use explain::Unanswered;
use in_force::InForce;
use mesh::Mesh;
use metrics::Metrics;
use plaintext::Plaintext;
use pods::Pods;
use policy::{Identities, Sets};
use pool::Pool;
pub use start::run;
use streams::{Activity, Direction, Stream};

/// The application protocols of a tunnel, in order of preference.
const TUNNEL_ALPN: &[&[u8]] = &[ktls_offload::ALPN];

/// Everything that the agent's tasks share.
#[derive(Debug)]
pub struct Agent {
    config: AgentConfig,
    datapath: Datapath,
    /// How tunnels are made; `records` is the record layer and why it is that one.
    tunnels: TunnelConfig,
    trust: TrustStore,
    list_problems: trust::ListProblems,
    key_exchange: KeyExchangePolicy,
    svids: SvidManager,
    mesh: RwLock<Mesh>,
    /// The mesh changed: the kernel's tables must follow.
    changed: Notify,
    sync: Synced,
    control_plane: OnceLock<state::Receiver<ConnectionState>>,
    pods: Pods,
    identities: Identities,
    /// The outbound modes; they follow the configuration file.
    egress: ArcSwap<Egress>,
    plaintext: Plaintext,
    sets: Sets,
    in_force: InForce,
    pool: Pool,
    activity: Arc<Activity>,
    metrics: Metrics,
    audit: Audit,
}

/// Whether the first complete answer of each type has arrived.
#[derive(Debug, Default)]
struct Synced {
    addresses: AtomicBool,
    policies: AtomicBool,
}

impl Synced {
    fn addresses(&self) {
        self.addresses.store(true, Ordering::Release);
    }

    fn policies(&self) {
        self.policies.store(true, Ordering::Release);
    }
}

impl Agent {
    fn mesh(&self) -> RwLockReadGuard<'_, Mesh> {
        self.mesh.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn mesh_mut(&self) -> RwLockWriteGuard<'_, Mesh> {
        self.mesh.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether everything that the control plane had has arrived once. Policies and the
    /// workloads that name them are two subscriptions: nothing is decided on one alone.
    fn synced(&self) -> bool {
        self.sync.addresses.load(Ordering::Acquire) && self.sync.policies.load(Ordering::Acquire)
    }

    /// Which policies decide about connections to the workloads of this node.
    pub fn applied(&self) -> Applied {
        applied::applied(self)
    }

    /// Why a connection would be admitted or not. Asks the kernel.
    pub fn explain(&self, request: &ExplainRequest) -> Result<Explanation, Unanswered> {
        explain::explain(self, request)
    }

    /// What manifests would change. Changes nothing, and may take a while.
    pub fn dry_run(&self, request: &DryRunRequest) -> Result<DryRun, Unanswered> {
        dry_run::dry_run(self, request)
    }

    /// The last verdicts of the kernel.
    pub async fn verdicts(&self, request: &LogRequest) -> Log {
        self.audit.log(request).await
    }

    /// Relays a stream until it ends; the tunnel comes back when it can serve another.
    async fn relay(&self, app: TcpStream, tunnel: Tunnel, stream: Stream) -> Option<Tunnel> {
        let (id, session, direction) = (
            streams::hex(&stream.id),
            stream.session.clone(),
            stream.direction,
        );
        let (source, destination, handle) =
            (stream.source, stream.destination, stream.handle.clone());
        let (pod, judged) = (stream.pod.clone(), stream.judged);
        let _listed = self.activity.enter(stream);
        // On the list first, then this look: a policy that changed in between is seen
        // either here or by whoever changed it.
        if judged.is_some_and(|j| j.set != pod.policy.set() && !pod.still_admits(self, &j)) {
            handle.cut(ResetReason::PolicyChanged);
        }
        // The same for a revocation list.
        if self
            .trust
            .revoked(session.peer(), SystemTime::now())
            .is_err()
        {
            handle.cut(ResetReason::Revoked);
        }
        let end = ktls_offload::relay(app, tunnel, handle).await;
        let outcome = end.outcome.as_str();
        self.metrics.stream_ended(outcome);
        tracing::info!(
            stream = id, direction = direction.as_str(), %source, %destination,
            peer = %session.peer().id(), sent = end.bytes_tx, received = end.bytes_rx, outcome, "stream ended"
        );
        end.tunnel
    }

    /// Records a finished handshake.
    fn handshake_done(&self, direction: Direction, tunnel: &Tunnel) {
        self.metrics.handshakes.inc();
        let peer = tunnel.peer();
        self.activity.handshake(status::Handshake {
            direction: direction.as_str().into(),
            peer: peer.id().to_string(),
            issuer: peer.issuer().into(),
            serial: peer.serial().into(),
            not_after: peer.not_after(),
            cipher: tunnel.cipher_suite().as_str().unwrap_or("unknown").into(),
            key_exchange: tunnel
                .kx_group()
                .and_then(|g| g.as_str())
                .unwrap_or("unknown")
                .into(),
            record_layer: tunnel.record_layer().as_str().into(),
            at: status::now(),
        });
    }
}
