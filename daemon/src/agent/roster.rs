//! Which pods are enrolled: follows the configuration, and tries again what failed.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::Agent;
use super::netns::Netns;
use super::pods::{self, Pod};
use crate::config::PodConfig;

/// The pods as configured and as they are.
#[derive(Debug, Default)]
pub struct Roster {
    enrolled: HashMap<PathBuf, Enrolled>,
    failed: Vec<(PodConfig, String)>,
}

/// Dropping the tasks closes the pod's listeners.
#[derive(Debug)]
struct Enrolled {
    pod: Arc<Pod>,
    _accepting: JoinSet<()>,
}

impl Roster {
    /// Enrols what is new in `configured` and withdraws what is no longer in it.
    pub async fn wanted(&mut self, agent: &Arc<Agent>, configured: Vec<PodConfig>) {
        let gone: Vec<PathBuf> = self
            .enrolled
            .iter()
            .filter(|(_, enrolled)| !configured.contains(&enrolled.pod.config))
            .map(|(path, _)| path.clone())
            .collect();
        for path in gone {
            let Some(enrolled) = self.enrolled.remove(&path) else {
                continue;
            };
            withdraw(agent, &enrolled.pod, "no longer configured");
        }
        let new = configured
            .into_iter()
            .filter(|c| !self.enrolled.contains_key(&c.netns))
            .collect();
        self.enrol(agent, new).await;
    }

    /// Lets go of namespaces that were deleted, and tries again what failed.
    pub async fn tend(&mut self, agent: &Arc<Agent>) {
        let dead: Vec<PathBuf> = self
            .enrolled
            .iter()
            .filter(|(path, enrolled)| !enrolled.pod.netns.is_at(path))
            .map(|(path, _)| path.clone())
            .collect();
        for path in dead {
            if let Some(enrolled) = self.enrolled.remove(&path) {
                withdraw(agent, &enrolled.pod, "its network namespace was deleted");
                self.failed
                    .push((enrolled.pod.config.clone(), String::new()));
            }
        }
        if !self.failed.is_empty() {
            let again = self
                .failed
                .iter()
                .map(|(config, _)| config.clone())
                .collect();
            self.enrol(agent, again).await;
        }
    }

    /// Withdraws what an earlier agent left enrolled and nobody wants any more: it would be
    /// intercepted with nobody to serve it.
    pub fn forget_others(&self, agent: &Agent) {
        let served = self
            .enrolled
            .values()
            .map(|enrolled| enrolled.pod.netns.cookie());
        let to_come = self
            .failed
            .iter()
            .filter_map(|(config, _)| Netns::open(&config.netns).ok());
        let wanted: HashSet<u64> = served.chain(to_come.map(|netns| netns.cookie())).collect();
        let forgotten = agent.datapath.pods().and_then(|pinned| {
            for cookie in pinned.into_iter().filter(|cookie| !wanted.contains(cookie)) {
                tracing::info!(cookie, "a pod that is no longer configured is withdrawn");
                agent.datapath.withdraw(cookie)?;
            }
            agent.datapath.collect_dead_pods()
        });
        if let Err(error) = forgotten {
            tracing::error!(%error, "what an earlier agent left cannot be withdrawn");
        }
    }

    async fn enrol(&mut self, agent: &Arc<Agent>, new: Vec<PodConfig>) {
        let known = std::mem::take(&mut self.failed);
        for config in new {
            let mut accepting = JoinSet::new();
            match pods::enrol(agent, &config, &mut accepting).await {
                Ok(pod) => {
                    self.enrolled.insert(
                        config.netns,
                        Enrolled {
                            pod,
                            _accepting: accepting,
                        },
                    );
                }
                Err(error) => {
                    let reason = error.to_string();
                    // Said once, not at every attempt.
                    if !known.contains(&(config.clone(), reason.clone())) {
                        tracing::error!(pod = config.name, error = reason, "cannot be enrolled");
                    }
                    self.failed.push((config, reason));
                }
            }
        }
        agent.pods.set_failed(self.failed.clone());
        agent.changed.notify_one();
    }
}

fn withdraw(agent: &Agent, pod: &Pod, why: &str) {
    tracing::info!(pod = pod.config.name, why, "withdrawn");
    if let Err(error) = pods::withdraw(agent, pod) {
        tracing::error!(%error, pod = pod.config.name, "cannot be withdrawn");
    }
}
