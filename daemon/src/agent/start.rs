//! How the agent is put together from its configuration, and run.

use std::path::Path;
use std::sync::{Arc, OnceLock, RwLock};

use anyhow::Context;
use arc_swap::ArcSwap;
use ktls_offload::{RecordLayer, SoftwareReason, TunnelConfig};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use ringfence_datapath::{Datapath, Options};
use ringfence_identity::{ManagerConfig, SvidEvent, SvidManager};
use ringfence_xds::{AdsClient, ClientConfig, NodeInfo};
use tokio::sync::Notify;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::audit::{self, Audit};
use super::in_force::InForce;
use super::mesh::Mesh;
use super::metrics::Metrics;
use super::plaintext::{self, Plaintext};
use super::pods::Pods;
use super::policy::{Identities, Sets};
use super::pool::Pool;
use super::roster::Roster;
use super::supervise::supervise;
use super::sync::Tables;
use super::updates::Updates;
use super::workload_api::Callers;
use super::{Agent, Synced, trust};
use crate::admin;
use crate::config::{AgentConfig, RecordLayerChoice};

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
    let listener = admin::bind(&config.admin_socket)
        .await
        .with_context(|| format!("admin socket {}", config.admin_socket.display()))?;
    let agent = Arc::new(Agent::new(config, record_layer, datapath)?);
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

impl Agent {
    /// An agent that knows nothing of the mesh yet and has no pods; it goes on from the policy
    /// sets that an earlier one left. To be called on a tokio runtime.
    pub(super) fn new(
        config: AgentConfig,
        record_layer: RecordLayer,
        datapath: Datapath,
    ) -> anyhow::Result<Agent> {
        let highest_set = datapath.policy_sets()?.into_iter().max().unwrap_or(0);
        let trust = trust::store(&config)?;
        let source = trust::source(&config, &trust)?;
        let metrics = Metrics::default();
        let audit = Audit::new(&config.audit, &metrics.policy)
            .with_context(|| format!("audit log {}", config.audit.name()))?;
        Ok(Agent {
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
        })
    }
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

fn manager_config(config: &AgentConfig) -> ManagerConfig {
    ManagerConfig {
        ttl: config.control_plane.svid_ttl(),
        ..ManagerConfig::default()
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
