//! Enrolled pods: their namespace, their workload, their listeners.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, PoisonError, RwLock};

use ktls_offload::ResetReason;
use ringfence_bpf_common::{Addr, POD_READY, Pod as KernelPod};
use ringfence_datapath::DatapathError;
use ringfence_policies::{CompiledSet, compile};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::mesh::{Mesh, Workload};
use super::netns::{Netns, ipv6_enabled};
use super::policy::{PodPolicy, by_family};
use super::streams::Stream;
use super::{Agent, inbound, outbound};
use crate::config::PodConfig;
use crate::status;

/// Where redirected connections are accepted in each pod.
pub const OUTBOUND_PORT: u16 = 15_001;
/// Where tunnels are accepted in each pod.
pub const INBOUND_PORT: u16 = 15_008;

/// Whether a port is one of the agent's, which no stream may be opened to.
pub fn is_agent_port(port: u16) -> bool {
    port == OUTBOUND_PORT || port == INBOUND_PORT
}

/// Why a pod cannot be enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The namespace cannot be opened or prepared.
    #[error("network namespace {path}: {source}")]
    Netns { path: String, source: io::Error },
    /// The agent's ports are taken in the pod.
    #[error(
        "cannot listen on port {port} in {path}: {source} (does another mesh run in this pod?)"
    )]
    Listen {
        path: String,
        port: u16,
        source: io::Error,
    },
    /// The kernel's tables.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
}

/// A pod whose namespace is intercepted.
#[derive(Debug)]
pub struct Pod {
    pub config: PodConfig,
    pub netns: Netns,
    pub policy: PodPolicy,
    state: RwLock<State>,
}

#[derive(Debug, Default, Clone)]
struct State {
    workload: Option<Arc<Workload>>,
    /// Why the pod is held.
    held: Option<String>,
    /// Why its policies deny everything.
    problems: Vec<String>,
}

impl Pod {
    /// The pod's workload, once the control plane has named it and it is usable.
    pub fn workload(&self) -> Option<Arc<Workload>> {
        self.read().workload
    }

    /// Why the pod is held, when it is.
    pub fn held(&self) -> Option<String> {
        self.read().held
    }

    fn read(&self) -> State {
        self.state
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn write(&self, state: State) {
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// The line of the status page.
    pub fn status(&self) -> status::Pod {
        let State {
            workload,
            held,
            problems,
        } = self.read();
        status::Pod {
            namespace: self.config.namespace.clone(),
            name: self.config.name.clone(),
            uid: workload.as_ref().map(|w| w.uid.clone()).unwrap_or_default(),
            netns: self.config.netns.display().to_string(),
            netns_cookie: self.netns.cookie(),
            addresses: workload
                .as_ref()
                .map(|w| w.addresses.clone())
                .unwrap_or_default(),
            identity: workload
                .as_ref()
                .map(|w| w.identity.spiffe_id().to_string())
                .unwrap_or_default(),
            policy_set: self.policy.set(),
            ready: held.is_none(),
            reason: held.or_else(|| (!problems.is_empty()).then(|| problems.join("; "))),
        }
    }
}

/// The pods of this node.
#[derive(Debug, Default)]
pub struct Pods {
    enrolled: RwLock<HashMap<u64, Arc<Pod>>>,
    /// Pods that could not be enrolled, and why.
    failed: RwLock<Vec<(PodConfig, String)>>,
}

impl Pods {
    /// The enrolled pods.
    pub fn list(&self) -> Vec<Arc<Pod>> {
        let enrolled = self.enrolled.read().unwrap_or_else(PoisonError::into_inner);
        enrolled.values().cloned().collect()
    }

    /// Sets which pods could not be enrolled.
    pub fn set_failed(&self, failed: Vec<(PodConfig, String)>) {
        *self.failed.write().unwrap_or_else(PoisonError::into_inner) = failed;
    }

    /// The lines of the status page.
    pub fn status(&self) -> Vec<status::Pod> {
        let mut pods: Vec<_> = self.list().iter().map(|pod| pod.status()).collect();
        let failed = self.failed.read().unwrap_or_else(PoisonError::into_inner);
        pods.extend(failed.iter().map(|(config, reason)| status::Pod {
            namespace: config.namespace.clone(),
            name: config.name.clone(),
            netns: config.netns.display().to_string(),
            reason: Some(reason.clone()),
            ..status::Pod::default()
        }));
        pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        pods
    }

    fn insert(&self, pod: Arc<Pod>) {
        self.enrolled
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(pod.netns.cookie(), pod);
    }

    fn remove(&self, cookie: u64) {
        self.enrolled
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&cookie);
    }
}

/// Intercepts a pod's connections. From here on it is held until [`refresh`] finds its
/// workload; a pod that an earlier agent left ready goes on with what is pinned.
pub async fn enrol(
    agent: &Arc<Agent>,
    config: &PodConfig,
    tasks: &mut JoinSet<()>,
) -> Result<Arc<Pod>, EnrolError> {
    let path = || config.netns.display().to_string();
    let in_netns = |source| EnrolError::Netns {
        path: path(),
        source,
    };
    let netns = Netns::open(&config.netns).map_err(in_netns)?;
    let cookie = netns.cookie();
    // The kernel first: a pod that cannot be served is held, never left alone in plaintext.
    let pinned = agent.datapath.pod(cookie)?;
    agent.datapath.enrol(
        netns.as_fd(),
        cookie,
        &pinned.unwrap_or_else(|| kernel_pod(None, 0)),
    )?;
    netns.prepare().await.map_err(in_netns)?;

    let mut listeners = Vec::new();
    let mut families = vec![IpAddr::V4(Ipv4Addr::UNSPECIFIED)];
    if ipv6_enabled() {
        families.push(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
    }
    for port in [OUTBOUND_PORT, INBOUND_PORT] {
        for family in &families {
            let listener = netns
                .listen(*family, port)
                .map_err(|source| EnrolError::Listen {
                    path: path(),
                    port,
                    source,
                })?;
            listeners.push((port, listener));
        }
    }

    let pod = Arc::new(Pod {
        config: config.clone(),
        policy: PodPolicy::default(),
        state: RwLock::new(State {
            held: Some("waiting-for-control-plane".into()),
            ..State::default()
        }),
        netns,
    });
    agent.pods.insert(pod.clone());
    for (port, listener) in listeners {
        let (agent, pod) = (agent.clone(), pod.clone());
        tasks.spawn(async move {
            if port == OUTBOUND_PORT {
                accept(&listener, |stream, peer| {
                    outbound::spawn(&agent, &pod, stream, peer)
                })
                .await;
            } else {
                accept(&listener, |stream, peer| {
                    inbound::spawn(&agent, &pod, stream, peer)
                })
                .await;
            }
        });
    }
    tracing::info!(pod = %format_args!("{}/{}", config.namespace, config.name), cookie, "enrolled");
    Ok(pod)
}

/// Whether a stream that was admitted meets a policy that refuses it.
pub fn no_longer_admitted(pod: &Pod, stream: &Stream) -> Option<ResetReason> {
    let judged = stream.judged.as_ref()?;
    (!pod.policy.admits(judged)).then_some(ResetReason::PolicyChanged)
}

/// Ends live streams of a pod.
fn cut(agent: &Agent, pod: &Pod, reason: impl Fn(&Stream) -> Option<ResetReason>) {
    let cookie = pod.netns.cookie();
    let number = agent.activity.cut(|s| {
        if s.pod.netns.cookie() == cookie {
            reason(s)
        } else {
            None
        }
    });
    if number > 0 {
        tracing::info!(
            pod = pod.config.name,
            number,
            "live streams are no longer admitted: ended"
        );
    }
}

/// Ends interception of a pod.
pub fn withdraw(agent: &Agent, pod: &Pod) -> Result<(), DatapathError> {
    cut(agent, pod, |_| Some(ResetReason::WorkloadGone));
    agent.pods.remove(pod.netns.cookie());
    if let Some(workload) = pod.workload() {
        agent.svids.release(&workload.identity);
    }
    agent.datapath.withdraw(pod.netns.cookie())
}

/// Accepts for ever.
async fn accept(
    listener: &TcpListener,
    serve: impl Fn(tokio::net::TcpStream, std::net::SocketAddr),
) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => serve(stream, peer),
            Err(error) => {
                // Out of descriptors, for one: connections wait in the backlog meanwhile.
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    }
}

/// Brings a pod up to what the control plane says now.
pub fn refresh(agent: &Agent, pod: &Pod, mesh: &Mesh) -> Result<(), DatapathError> {
    let old = pod.workload();
    let found = find_workload(pod, mesh);
    let (workload, held) = match found {
        Ok(workload) => (Some(workload), None),
        Err(held) => (None, Some(held)),
    };
    let before = old.as_ref().map(|w| &w.identity);
    let after = workload.as_ref().map(|w| &w.identity);
    if before != after {
        if let Some(identity) = after {
            agent.svids.want(identity);
        }
        if let Some(identity) = before {
            agent.svids.release(identity);
        }
    }
    let cookie = pod.netns.cookie();
    let mut problems = Vec::new();
    match &workload {
        Some(workload) => {
            let compiled = compile_for(workload, mesh);
            problems = compiled.problems.iter().map(ToString::to_string).collect();
            let changed = pod.policy.replace(
                compiled,
                &agent.set_numbers,
                &agent.identities,
                &agent.datapath,
                |set| {
                    agent
                        .datapath
                        .update_pod(cookie, &kernel_pod(Some(workload), set))
                },
            )?;
            if changed {
                cut(agent, pod, |stream| no_longer_admitted(pod, stream));
            }
        }
        // Before the first sync what is pinned goes on deciding.
        None if !agent.synced() => {}
        None => {
            agent.datapath.update_pod(cookie, &kernel_pod(None, 0))?;
            cut(agent, pod, |_| Some(ResetReason::WorkloadGone));
        }
    }
    if problems != pod.read().problems {
        for problem in &problems {
            tracing::warn!(
                pod = pod.config.name,
                problem,
                "everything is denied to this pod"
            );
        }
    }
    pod.write(State {
        workload,
        held,
        problems,
    });
    Ok(())
}

fn compile_for(workload: &Workload, mesh: &Mesh) -> CompiledSet {
    let policies = mesh
        .policies
        .applicable(&workload.namespace, &workload.policies);
    compile(&policies, by_family(&workload.addresses))
}

/// The workload of a pod, or why there is none that can be used.
fn find_workload(pod: &Pod, mesh: &Mesh) -> Result<Arc<Workload>, String> {
    let PodConfig {
        namespace, name, ..
    } = &pod.config;
    let workload = mesh
        .by_name(namespace, name)
        .ok_or("workload-unknown-to-control-plane")?;
    if workload.addresses.is_empty() {
        return Err("workload-has-no-address".into());
    }
    for address in &workload.addresses {
        // A redirect to an address that is not the pod's would leave the pod in plaintext.
        match pod.netns.owns(*address) {
            Ok(true) => {}
            Ok(false) => return Err(format!("address {address} is not configured in the pod")),
            Err(error) => return Err(format!("address {address} cannot be checked: {error}")),
        }
    }
    Ok(workload.clone())
}

fn kernel_pod(workload: Option<&Workload>, policy_set: u32) -> KernelPod {
    let own = workload
        .map(|w| by_family(&w.addresses))
        .unwrap_or_default();
    KernelPod {
        policy_set,
        flags: if workload.is_some() { POD_READY } else { 0 },
        addr4: own.v4.map_or(Addr::NONE, |v4| Addr::from(IpAddr::V4(v4))),
        addr6: own.v6.map_or(Addr::NONE, |v6| Addr::from(IpAddr::V6(v6))),
        outbound_port: OUTBOUND_PORT,
        inbound_port: INBOUND_PORT,
        pad: 0,
    }
}
