//! Which pods are enrolled: follows the configuration, and tries again what failed.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::Agent;
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
            tracing::info!(pod = enrolled.pod.config.name, "withdrawn");
            if let Err(error) = pods::withdraw(agent, &enrolled.pod) {
                tracing::error!(%error, pod = enrolled.pod.config.name, "cannot be withdrawn");
            }
        }
        let new = configured
            .into_iter()
            .filter(|c| !self.enrolled.contains_key(&c.netns))
            .collect();
        self.enrol(agent, new).await;
    }

    /// Tries again what failed: the namespace may exist by now.
    pub async fn retry(&mut self, agent: &Arc<Agent>) {
        if !self.failed.is_empty() {
            let again = self
                .failed
                .iter()
                .map(|(config, _)| config.clone())
                .collect();
            self.enrol(agent, again).await;
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
