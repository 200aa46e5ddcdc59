//! The node's agent: what it holds, and how the parts are wired.

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
mod plaintext;
mod pods;
mod policy;
mod policy_metrics;
mod pool;
mod roster;
mod sockets;
mod streams;
mod sync;
mod trust;
mod updates;
mod watch;
mod workload_api;

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use arc_swap::ArcSwap;
use ktls_offload::{KernelSuites, RecordLayer, ResetReason, SoftwareReason, Tunnel, TunnelConfig};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use ringfence_datapath::{Datapath, DatapathError, Options};
use ringfence_identity::tls::KeyExchangePolicy;
use ringfence_identity::{
    ManagerConfig, SvidEvent, SvidManager, SvidState, SvidStatus, TrustStore,
};
use ringfence_xds::{AdsClient, ClientConfig, ConnectionState, NodeInfo};
use tokio::net::TcpStream;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify, watch as state};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::authz::report::{
    Applied, DryRun, DryRunRequest, ExplainRequest, Explanation, Log, LogRequest,
};
use crate::config::{AgentConfig, Egress, RecordLayerChoice};
use crate::{admin, status};
use audit::Audit;
pub use explain::Unanswered;
use in_force::InForce;
use mesh::{Changes, Mesh};
use metrics::Metrics;
use plaintext::Plaintext;
use pods::Pods;
use policy::{Identities, Sets};
use pool::Pool;
use roster::Roster;
use streams::{Activity, Direction, Stream};
use sync::Tables;
use updates::Updates;
use watch::FileChanges;
use workload_api::Callers;

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

    /// The metrics, in OpenMetrics text.
    pub fn metrics_text(&self) -> String {
        let now = status::now().cast_signed();
        // A revoked certificate has no time left.
        let left = |svid: SvidStatus| {
            let left = match svid.state {
                SvidState::Revoked => 0,
                _ => svid.not_after? - now,
            };
            Some((svid.identity.spiffe_id().to_string(), left))
        };
        self.metrics
            .set_svids(self.svids.snapshot().into_iter().filter_map(left));
        let kernel = self.datapath.counters().unwrap_or_else(|error| {
            tracing::warn!(%error, "the kernel's counters cannot be read");
            Vec::new()
        });
        self.metrics
            .policy
            .set_kernel(&applied::tables(self), &kernel);
        self.metrics.encode()
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

    /// The status page.
    pub fn status(&self) -> status::Status {
        let pods = self.pods.status();
        let mut counters = self.metrics.counters();
        match self.datapath.counters() {
            Ok(kernel) => counters.extend(
                kernel
                    .into_iter()
                    .map(|(name, n)| (format!("kernel.{name}"), n)),
            ),
            Err(error) => tracing::warn!(%error, "the kernel's counters cannot be read"),
        }
        let connection = self.control_plane.get().map(|state| state.borrow().clone());
        let (state, error) = match connection {
            None | Some(ConnectionState::Connecting) => ("connecting", None),
            Some(ConnectionState::Connected { .. }) => ("connected", None),
            Some(ConnectionState::Failed { error, .. }) => ("failed", Some(error.to_string())),
        };
        let svids: Vec<_> = self
            .svids
            .snapshot()
            .into_iter()
            .map(describe_svid)
            .collect();
        let mesh = self.mesh();
        status::Status {
            version: env!("CARGO_PKG_VERSION").into(),
            map_layout: ringfence_bpf_common::LAYOUT_VERSION,
            node: self.config.node.name.clone(),
            ready: self.synced() && pods.iter().all(|p| p.ready) && svids.iter().all(|s| s.valid),
            control_plane: status::ControlPlane {
                address: self.config.control_plane.address.clone(),
                state: state.into(),
                error,
                synced: self.synced(),
                workloads: mesh.workloads().len(),
                services: mesh.services().len(),
            },
            record_layer: status::RecordLayer {
                mode: self.tunnels.records.as_str().into(),
                reason: match self.tunnels.records {
                    RecordLayer::Kernel(suites) => name_suites(suites),
                    RecordLayer::Software(reason) => reason.to_string(),
                },
            },
            pods,
            svids,
            revocation_lists: trust::describe_lists(self),
            streams: self.activity.streams(),
            handshakes: self.activity.handshakes(),
            policies: self.in_force.describe(),
            counters,
            warnings: self
                .plaintext
                .unable()
                .map(Into::into)
                .into_iter()
                .collect(),
        }
    }
}

/// Runs the agent until `shutdown` completes. What is pinned in the kernel stays:
/// enforcement goes on without an agent, and the next one takes over from there.
pub async fn run(
    config: AgentConfig,
    path: &Path,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    raise_descriptor_limit();
    let record_layer = choose_record_layer(config.record_layer)?;
    tracing::info!(%record_layer, "records are protected by");

    let options = Options {
        pin_dir: config.pin_dir.clone(),
        cgroup: config.cgroup.clone(),
    };
    let datapath = Datapath::load(options).context("the eBPF programs cannot be put in place")?;
    let tables = Tables::read(&config.node.network, &datapath)?;
    let highest_set = datapath.policy_sets()?.into_iter().max().unwrap_or(0);
    let listener = admin::bind(&config.admin_socket)
        .await
        .with_context(|| format!("admin socket {}", config.admin_socket.display()))?;

    let trust = trust::store(&config)?;
    let source = trust::source(&config, &trust)?;
    let metrics = Metrics::default();
    let audit = Audit::new(&config.audit, &metrics.policy)
        .with_context(|| format!("audit log {}", config.audit.name()))?;
    let agent = Arc::new(Agent {
        svids: SvidManager::start(source, trust.clone(), manager_config(&config)),
        key_exchange: trust::key_exchange(&config),
        mesh: RwLock::new(Mesh::new(&config.root_namespace)),
        egress: ArcSwap::from_pointee(config.egress.clone()),
        plaintext: Plaintext::default(),
        sets: Sets::after(highest_set, metrics.policy.compile_seconds.clone()),
        in_force: InForce::default(),
        datapath,
        tunnels: TunnelConfig {
            require_kernel: config.record_layer == RecordLayerChoice::Kernel,
            ..TunnelConfig::new(record_layer)
        },
        trust,
        list_problems: trust::ListProblems::default(),
        changed: Notify::new(),
        sync: Synced::default(),
        control_plane: OnceLock::new(),
        pods: Pods::default(),
        identities: Identities::default(),
        pool: Pool::default(),
        activity: Arc::default(),
        metrics,
        audit,
        config,
    });
    let mut background = JoinSet::new();
    background.spawn(admin::serve(listener, agent.clone()));
    background.spawn(audit::serve(agent.clone()));
    background.spawn(retire_tunnels(agent.clone()));
    background.spawn(plaintext::serve(agent.clone()));
    trust::watch(&agent, &mut background)?;
    if let Some(socket) = &agent.config.identity.workload_api_socket {
        let listener = ringfence_workload_api::bind(socket)
            .with_context(|| format!("Workload API socket {}", socket.display()))?;
        let callers = Callers {
            agent: agent.clone(),
            ca: trust::ca(&agent.config)?,
        };
        background.spawn(async move {
            if let Err(error) = ringfence_workload_api::serve(listener, Arc::new(callers)).await {
                tracing::error!(%error, "the Workload API is no longer served");
            }
        });
    }

    let mut roster = Roster::default();
    roster.wanted(&agent, agent.config.pods.clone()).await;
    roster.forget_others(&agent);

    let (ads, state) = AdsClient::new(ads_config(&agent.config), Updates(agent.clone()));
    agent.control_plane.get_or_init(|| state);
    let stop = CancellationToken::new();
    background.spawn(ads.run(stop.clone()));

    let result = supervise(&agent, &mut roster, tables, path, shutdown).await;
    stop.cancel();
    background.shutdown().await;
    result
}

/// The one task that changes the kernel's tables and the set of pods.
async fn supervise(
    agent: &Arc<Agent>,
    roster: &mut Roster,
    mut tables: Tables,
    path: &Path,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let mut file_changes = FileChanges::of(path)?;
    let mut tick = tokio::time::interval(Duration::from_secs(2));
    let mut shutdown = std::pin::pin!(shutdown);
    // What changed and is not in force yet.
    let mut pending = Changes::default();
    loop {
        let hold = agent
            .pods
            .list()
            .iter()
            .filter_map(|p| p.hold.until())
            .min();
        let give_up = async {
            match hold {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = &mut shutdown => return Ok(()),
            () = agent.changed.notified() => reconcile(agent, &mut tables, &mut pending),
            () = give_up => reconcile(agent, &mut tables, &mut pending),
            () = file_changes.next() => match AgentConfig::load(path) {
                Ok(config) => {
                    if **agent.egress.load() != config.egress {
                        agent.egress.store(Arc::new(config.egress));
                        pending.all = true;
                        agent.changed.notify_one();
                    }
                    roster.wanted(agent, config.pods).await;
                }
                Err(error) => tracing::error!(%error, "the changed configuration is not used"),
            },
            _ = tick.tick() => {
                roster.tend(agent).await;
                guard::tend(agent, &agent.pods.list());
                agent.pool.sweep().await;
                reconcile(agent, &mut tables, &mut pending);
                let agent = agent.clone();
                tokio::task::spawn_blocking(move || {
                    if let Err(error) = agent.datapath.collect_sets() {
                        tracing::error!(%error, "old policy sets cannot be removed");
                    }
                });
            }
        }
    }
}

/// Makes the kernel's tables and the pods what the mesh says, where it changed. Before both
/// kinds of resources are complete, what is pinned goes on deciding.
fn reconcile(agent: &Agent, tables: &mut Tables, pending: &mut Changes) {
    if !agent.synced() {
        return;
    }
    let mut mesh = agent.mesh_mut();
    pending.merge(mesh.take_changes());
    let pushed = agent.metrics.policy.take_pushed();
    let mesh = RwLockWriteGuard::downgrade(mesh);
    let mut complete = true;
    if let Err(error) = tables.apply(&mesh, pending, &agent.datapath) {
        tracing::error!(%error, "the kernel's tables are not up to date");
        complete = false;
    }
    let mut judge_again = Vec::new();
    for pod in agent.pods.list() {
        if !pods::is_concerned(&pod, pending) {
            continue;
        }
        match pods::refresh(agent, &pod, &mesh) {
            Ok(false) => {}
            Ok(true) => judge_again.push(pod),
            Err(error) => {
                tracing::error!(%error, pod = pod.config.name, "the pod's kernel tables are not up to date");
                judge_again.push(pod);
                complete = false;
            }
        }
    }
    pods::judge_again(agent, &judge_again);
    if pending.all || !pending.addresses.is_empty() || !pending.services.is_empty() {
        // A destination of anybody's may be in the mesh now.
        plaintext::rejudge(agent, &agent.pods.list());
    } else {
        plaintext::rejudge(agent, &judge_again);
    }
    agent.metrics.policy.enforced(pushed, complete);
    if complete {
        let changes = std::mem::take(pending);
        if changes.all {
            agent.in_force.reset(mesh.policies());
        } else {
            let names = &changes.policies.names;
            agent.in_force.update(mesh.policies(), names);
        }
    }
    // Once: from then on each pod's policy removes what it replaces.
    if tables.take_inherited()
        && let Err(error) = remove_unused_sets(agent)
    {
        tracing::error!(%error, "policy sets of an earlier agent cannot be removed");
    }
}

/// Removes the policy sets that no pod points at: those that an earlier agent left.
fn remove_unused_sets(agent: &Agent) -> Result<(), DatapathError> {
    let mut used = HashSet::new();
    for cookie in agent.datapath.pods()? {
        used.extend(agent.datapath.pod(cookie)?.map(|pod| pod.policy_set));
    }
    // A held pod points at none and comes back to the set it had.
    used.extend(agent.pods.list().iter().map(|pod| pod.policy.set()));
    for set in agent.datapath.policy_sets()? {
        if !used.contains(&set) {
            agent.datapath.remove_set(set)?;
        }
    }
    Ok(())
}

/// A new certificate retires the idle tunnels of the one before; live streams go on.
async fn retire_tunnels(agent: Arc<Agent>) {
    let mut events = agent.svids.subscribe();
    loop {
        match events.recv().await {
            Ok(SvidEvent::Renewed { identity, svid, .. }) => {
                agent.pool.retire(identity.spiffe_id(), svid.serial()).await;
            }
            // No tunnel of this identity is to be taken again.
            Ok(SvidEvent::Revoked { identity, .. }) => {
                agent.pool.retire(identity.spiffe_id(), "").await;
            }
            Ok(_) => {}
            // Tunnels of an old certificate are not taken any more; they only close later.
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

fn choose_record_layer(choice: RecordLayerChoice) -> anyhow::Result<RecordLayer> {
    if choice == RecordLayerChoice::Software {
        return Ok(RecordLayer::Software(SoftwareReason::Configured));
    }
    match ktls_offload::probe() {
        RecordLayer::Software(reason) if choice == RecordLayerChoice::Kernel => {
            anyhow::bail!("record_layer is `kernel`, and that cannot be had: {reason}")
        }
        layer => Ok(layer),
    }
}

fn name_suites(suites: KernelSuites) -> String {
    let all = [
        (suites.aes_128_gcm, "AES-128-GCM"),
        (suites.aes_256_gcm, "AES-256-GCM"),
        (suites.chacha20_poly1305, "ChaCha20-Poly1305"),
    ];
    let names: Vec<_> = all
        .into_iter()
        .filter(|(has, _)| *has)
        .map(|(_, name)| name)
        .collect();
    format!("the kernel takes {}", names.join(", "))
}

fn manager_config(config: &AgentConfig) -> ManagerConfig {
    ManagerConfig {
        ttl: config.control_plane.svid_ttl(),
        ..ManagerConfig::default()
    }
}

fn describe_svid(svid: SvidStatus) -> status::Svid {
    status::Svid {
        id: svid.identity.spiffe_id().to_string(),
        valid: matches!(svid.state, SvidState::Ready | SvidState::RefreshFailing),
        state: svid.state.as_str().into(),
        serial: svid.serial.unwrap_or_default(),
        issuer: svid.issuer.unwrap_or_default(),
        not_before: svid.not_before.unwrap_or_default(),
        not_after: svid.not_after.unwrap_or_default(),
        error: svid.last_error,
    }
}

fn ads_config(config: &AgentConfig) -> ClientConfig {
    let node = &config.node;
    ClientConfig {
        address: config.control_plane.address.clone(),
        root_ca: config.control_plane.root_ca.clone(),
        token_file: config.control_plane.token.clone(),
        node: NodeInfo {
            name: node.pod_name.clone(),
            namespace: node.pod_namespace.clone(),
            address: node.address,
            node_name: node.name.clone(),
            cluster_id: node.cluster.clone(),
        },
    }
}

/// A stream takes about six descriptors.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open descriptors stays as it was");
    }
}
