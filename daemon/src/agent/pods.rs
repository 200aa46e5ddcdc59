//! Enrolled pods: their namespace, their workload, their listeners.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, PoisonError, RwLock};

use ktls_offload::ResetReason;
use ringfence_bpf_common::{Addr, POD_HOLD, POD_READY, Pod as KernelPod};
use ringfence_datapath::DatapathError;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::guard::{self, Guard};
use super::hold::Hold;
use super::mesh::{Changes, Mesh, Workload};
use super::netns::{Netns, ipv6_enabled};
use super::policy::{InstalledSet, Judged, PodPolicy, by_family};
use super::{Agent, applied, egress, inbound, outbound, plaintext};
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
    /// Whether its packets are guarded.
    pub guard: Guard,
    /// New connections wait for a policy that has not arrived.
    pub hold: Hold,
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
    /// Nothing is known of it yet.
    pub fn new(config: PodConfig, netns: Netns, guard: Guard) -> Self {
        Pod {
            config,
            netns,
            policy: PodPolicy::default(),
            guard,
            hold: Hold::default(),
            state: RwLock::new(State {
                held: Some("waiting-for-control-plane".into()),
                ..State::default()
            }),
        }
    }

    /// Whether the policies in force admit a connection that is there already.
    pub fn still_admits(&self, agent: &Agent, connection: &Judged) -> bool {
        let waiting = self.hold.until().is_some();
        self.policy.admits(&agent.identities, connection, waiting)
    }

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
            guard: self.guard.state().describe(),
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

    /// The enrolled pod with this network namespace cookie.
    pub fn by_cookie(&self, cookie: u64) -> Option<Arc<Pod>> {
        let enrolled = self.enrolled.read().unwrap_or_else(PoisonError::into_inner);
        enrolled.get(&cookie).cloned()
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

    /// Adds an enrolled pod.
    pub fn insert(&self, pod: Arc<Pod>) {
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
        &pinned.unwrap_or_else(|| kernel_pod(None, 0, false)),
    )?;
    let guard = Guard::new(guard::attach(&agent.datapath, &netns));
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

    let pod = Arc::new(Pod::new(config.clone(), netns, guard));
    agent.pods.insert(pod.clone());
    // What it had before.
    plaintext::rejudge(agent, std::slice::from_ref(&pod));
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

/// Ends the live streams of these pods that are no longer admitted.
pub fn judge_again(agent: &Agent, pods: &[Arc<Pod>]) {
    let changed: HashSet<u64> = pods.iter().map(|pod| pod.netns.cookie()).collect();
    if changed.is_empty() {
        return;
    }
    let number = agent.activity.cut(|stream| {
        if !changed.contains(&stream.pod.netns.cookie()) {
            return None;
        }
        // A pod without a workload has no streams at all, outbound ones included.
        if stream.pod.workload().is_none() {
            return Some(ResetReason::WorkloadGone);
        }
        let judged = stream.judged.as_ref()?;
        let admitted = stream.pod.still_admits(agent, judged);
        (!admitted).then_some(ResetReason::PolicyChanged)
    });
    if number > 0 {
        tracing::info!(number, "live streams are no longer admitted: ended");
    }
}

/// Ends interception of a pod.
pub fn withdraw(agent: &Agent, pod: &Pod) -> Result<(), DatapathError> {
    let cookie = pod.netns.cookie();
    agent
        .activity
        .cut(|stream| (stream.pod.netns.cookie() == cookie).then_some(ResetReason::WorkloadGone));
    agent.pods.remove(cookie);
    agent.metrics.policy.forget(&applied::name_of(pod));
    if let Some(workload) = pod.workload() {
        agent.svids.release(&workload.identity);
    }
    agent.datapath.withdraw(cookie)?;
    let set = pod.policy.replace(None, |_| Ok(()))?;
    release(agent, set)
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

/// Whether what changed has to do with a pod.
pub fn is_concerned(pod: &Pod, changes: &Changes) -> bool {
    let PodConfig {
        namespace, name, ..
    } = &pod.config;
    if pod.guard.take_news()
        || changes.all
        || changes
            .workloads
            .contains(&(namespace.clone(), name.clone()))
    {
        return true;
    }
    match pod.workload() {
        Some(workload) => {
            pod.hold.until().is_some() || changes.policies.concerns(namespace, &workload.policies)
        }
        // Held, maybe for a reason that is in the pod.
        None => true,
    }
}

/// Brings a pod up to what the control plane says now. True when what decides for it
/// changed: its live streams are to be judged again.
pub fn refresh(agent: &Agent, pod: &Pod, mesh: &Mesh) -> Result<bool, DatapathError> {
    let old = pod.workload();
    let found = match pod.guard.refuses(agent.config.packet_guard) {
        Some(why) => Err(why),
        None => find_workload(pod, mesh),
    };
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
    let mut problems = Vec::new();
    let outcome = match &workload {
        Some(workload) => put_policies(agent, pod, workload, mesh, &mut problems),
        // Before the first sync what is pinned goes on deciding.
        None if !agent.synced() => Ok(false),
        None => {
            let entry = kernel_pod(None, 0, false);
            let updated = agent.datapath.update_pod(pod.netns.cookie(), &entry);
            pod.hold.set(None);
            updated.map(|()| old.is_some())
        }
    };
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
    outcome
}

/// Puts the workload's policies in force. What the kernel has no room for is denied
/// altogether: the policies before might admit what these refuse.
fn put_policies(
    agent: &Agent,
    pod: &Pod,
    workload: &Workload,
    mesh: &Mesh,
    problems: &mut Vec<String>,
) -> Result<bool, DatapathError> {
    let policies = mesh
        .policies()
        .applicable(&workload.namespace, &workload.policies);
    let patience = agent.config.policy_hold();
    let until = pod.hold.note(&policies.missing, patience, Instant::now());
    let missing = !policies.missing.is_empty();
    let addresses = by_family(&workload.addresses);
    let acquired = agent.sets.acquire(policies, addresses, &agent.datapath);
    let activate = |set| {
        let entry = kernel_pod(Some(workload), set, until.is_some());
        let entry = egress::with_mode(&agent.egress.load(), &pod.config, entry);
        agent.datapath.update_pod(pod.netns.cookie(), &entry)
    };
    let (set, failed) = match acquired {
        Ok(set) => (Some(set), None),
        Err(error) => (None, Some(error)),
    };
    match (&set, &failed) {
        (Some(set), _) => problems.extend(set.problems().iter().map(ToString::to_string)),
        (None, Some(error)) => problems.push(format!("the policies are not in force: {error}")),
        (None, None) => {}
    }
    let number = set.as_ref().map(|set| set.number());
    // What was waited for in vain closes the pod: for live connections from now on.
    let gave_up = pod.hold.until().is_some() && until.is_none() && missing;
    if until.is_some() {
        // Before the set that refuses for want of a policy, so that it refuses nobody.
        pod.hold.set(until);
    }
    let replaced = pod.policy.replace(set.clone(), activate);
    // Whatever the kernel said: who waits until a time that has passed never sleeps again.
    pod.hold.set(until);
    let replaced = match replaced {
        Ok(replaced) => replaced,
        Err(error) => {
            release(agent, set)?;
            return Err(error);
        }
    };
    let changed = gave_up || replaced.as_ref().map(|set| set.number()) != number;
    release(agent, replaced)?;
    match failed {
        Some(error) => Err(error),
        None => Ok(changed),
    }
}

fn release(agent: &Agent, set: Option<Arc<InstalledSet>>) -> Result<(), DatapathError> {
    match set {
        Some(set) => agent.sets.release(&set, &agent.datapath),
        None => Ok(()),
    }
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

fn kernel_pod(workload: Option<&Workload>, policy_set: u32, hold: bool) -> KernelPod {
    let own = workload
        .map(|w| by_family(&w.addresses))
        .unwrap_or_default();
    KernelPod {
        policy_set,
        flags: if workload.is_some() { POD_READY } else { 0 } | if hold { POD_HOLD } else { 0 },
        addr4: own.v4.map_or(Addr::NONE, |v4| Addr::from(IpAddr::V4(v4))),
        addr6: own.v6.map_or(Addr::NONE, |v6| Addr::from(IpAddr::V6(v6))),
        outbound_port: OUTBOUND_PORT,
        inbound_port: INBOUND_PORT,
        pad: 0,
    }
}
