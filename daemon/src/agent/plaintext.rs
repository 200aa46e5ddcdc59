//! Plaintext connections that are there already: judged again when policy, the workload
//! or the mesh changes, and ended when they would not come about any more.
//!
//! The change is in force first, then [`Datapath::settle`] waits for whoever still decided
//! by what was before, then the sockets are listed: what was admitted before is among
//! them. A second look follows: a connect was perhaps just between the program that let
//! it pass and the table of sockets (the guard drops its SYN meanwhile).
//!
//! [`Datapath::settle`]: ringfence_datapath::Datapath::settle

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use ringfence_bpf_common::IDENTITY_NONE;
use ringfence_datapath::{DatapathError, Ended, SocketDiag};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Agent;
use super::pods::Pod;
use super::policy::Judged;

/// When the second look follows the first.
const SECOND_LOOK: Duration = Duration::from_millis(500);

/// The pods whose connections are to be judged again.
#[derive(Debug, Default)]
pub struct Plaintext {
    pods: Mutex<HashSet<u64>>,
    wake: Notify,
    /// Why connections cannot be ended on this kernel.
    unable: OnceLock<String>,
}

impl Plaintext {
    /// Why connections that are admitted no more go on, when they do.
    pub fn unable(&self) -> Option<&str> {
        self.unable.get().map(String::as_str)
    }

    fn take(&self) -> HashSet<u64> {
        std::mem::take(&mut *self.pods.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Has the plaintext connections of these pods judged, within a second. What decides about
/// them has changed already.
pub fn rejudge(agent: &Agent, pods: &[Arc<Pod>]) {
    if pods.is_empty() {
        return;
    }
    let waiting = &agent.plaintext;
    waiting
        .pods
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .extend(pods.iter().map(|pod| pod.netns.cookie()));
    waiting.wake.notify_one();
}

/// Judges for ever.
pub async fn serve(agent: Arc<Agent>) {
    if let Err(error) = SocketDiag::probe() {
        tracing::error!(%error, "plaintext connections cannot be ended");
        agent.plaintext.unable.get_or_init(|| error.to_string());
        return;
    }
    let mut again: HashMap<u64, Instant> = HashMap::new();
    loop {
        let next = again.values().min().copied();
        let second = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let due: HashSet<u64> = tokio::select! {
            () = agent.plaintext.wake.notified() => {
                let first = agent.plaintext.take();
                let at = Instant::now() + SECOND_LOOK;
                again.extend(first.iter().map(|cookie| (*cookie, at)));
                first
            }
            () = second => {
                let now = Instant::now();
                again.extract_if(|_, at| *at <= now).map(|(cookie, _)| cookie).collect()
            }
        };
        let pods: Vec<_> = agent
            .pods
            .list()
            .into_iter()
            .filter(|pod| due.contains(&pod.netns.cookie()))
            .collect();
        let judge = agent.clone();
        // System calls that take milliseconds, and one that waits for them.
        if let Err(error) = tokio::task::spawn_blocking(move || look(&judge, &pods)).await {
            tracing::error!(%error, "plaintext connections were not judged again");
        }
    }
}

fn look(agent: &Agent, pods: &[Arc<Pod>]) {
    if let Err(error) = agent.datapath.settle() {
        tracing::error!(%error, "a plaintext connection may outlive a change of policy");
    }
    for pod in pods {
        match judge(agent, pod) {
            Ok(ended) => {
                for (direction, number) in
                    [("inbound", ended.inbound), ("outbound", ended.outbound)]
                {
                    if number > 0 {
                        agent.metrics.plaintext_ended(direction, number);
                        tracing::info!(
                            pod = pod.config.name,
                            direction,
                            number,
                            "plaintext connections are no longer admitted: ended"
                        );
                    }
                }
            }
            Err(error) => tracing::error!(
                %error, pod = pod.config.name, "plaintext connections were not judged again"
            ),
        }
    }
}

fn judge(agent: &Agent, pod: &Pod) -> Result<Ended, DatapathError> {
    // Before everything is known once, what is pinned goes on deciding, and it did.
    if !agent.synced() {
        return Ok(Ended::default());
    }
    let opened = pod.netns.enter(SocketDiag::open);
    let mut sockets = opened.map_err(|source| DatapathError::SocketDiag {
        action: "list",
        source,
    })??;
    let set = pod.policy.set();
    agent
        .datapath
        .end_refused(&mut sockets, pod.netns.cookie(), |source, destination| {
            let plaintext = Judged {
                set,
                identity: IDENTITY_NONE,
                source: source.ip(),
                destination,
            };
            pod.still_admits(agent, &plaintext)
        })
}
