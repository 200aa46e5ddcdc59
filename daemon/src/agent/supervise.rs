//! The one task that changes the kernel's tables and the set of pods, when the control plane
//! or the configuration has said something new.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, RwLockWriteGuard};
use std::time::Duration;

use ringfence_datapath::DatapathError;

use super::mesh::Changes;
use super::roster::Roster;
use super::sync::Tables;
use super::watch::FileChanges;
use super::{Agent, guard, plaintext, pods};
use crate::config::AgentConfig;

/// Goes on until `shutdown` completes.
pub async fn supervise(
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
                // Again with the next tick, whatever it was that it was refreshed for.
                let name = (pod.config.namespace.clone(), pod.config.name.clone());
                pending.workloads.insert(name);
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

#[cfg(test)]
mod tests;
