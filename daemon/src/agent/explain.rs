//! `ringfence authz explain`: one connection judged by the reference evaluator and by the
//! kernel, with the reasons.

mod parties;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ringfence_bpf_common::{Addr, IDENTITY_NONE, Query, Reason};
use ringfence_datapath::DatapathError;
use ringfence_policies::{
    Connection, Decision, Peer, Policy, WorkloadPolicies, evaluate, evaluate_with_dry_run, trace,
};

use super::Agent;
use super::applied::{action, mode};
use super::pods::{Pod, is_agent_port};
use super::policy::{InstalledSet, by_family};
use crate::authz::report::{self, ExplainRequest, Explanation, TracedPolicy, TracedRule};
use parties::{destination, parse_from, split_port};

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Unanswered {
    /// The question is wrong, or cannot be answered on this node.
    #[error("{0}")]
    Question(String),
    /// The kernel.
    #[error("the kernel cannot be asked: {0}")]
    Kernel(#[from] DatapathError),
}

fn question<T>(what: impl Into<String>) -> Result<T, Unanswered> {
    Err(Unanswered::Question(what.into()))
}

/// Judges the connection. Asks the kernel, and may take some milliseconds.
pub fn explain(agent: &Agent, request: &ExplainRequest) -> Result<Explanation, Unanswered> {
    let (name, port) = split_port(&request.to)?;
    let pod = destination(agent, name)?;
    let own = pod
        .workload()
        .map(|w| by_family(&w.addresses))
        .unwrap_or_default();
    let own = [own.v4.map(IpAddr::V4), own.v6.map(IpAddr::V6)];
    let named = name.parse::<IpAddr>().ok().map(|ip| ip.to_canonical());
    let from = parse_from(agent, request, named)?;
    let address = match named {
        Some(address) => Some(address),
        None => own
            .into_iter()
            .flatten()
            .find(|a| a.is_ipv4() == from.source.is_ipv4()),
    };
    let Some(address) = address else {
        let why = pod.held().unwrap_or_else(|| {
            format!(
                "it has no address of the family of the source {}",
                from.source
            )
        });
        return question(format!("no connection to {name} can be judged: {why}"));
    };
    if address.is_ipv4() != from.source.is_ipv4() {
        return question(format!(
            "the source {} and the destination {address} are of different families",
            from.source
        ));
    }
    let peer = from.peer.as_ref().map(|(_, peer)| &**peer);
    let connection = Connection {
        peer,
        source: from.source,
        destination: address,
        port,
    };
    let query = Query {
        set: 0,
        identity: from
            .peer
            .as_ref()
            .map_or(IDENTITY_NONE, |(number, _)| *number),
        source: Addr::from(from.source),
        port,
        destination_v4: address.is_ipv4(),
    };
    let Asked {
        installed,
        kernel_set,
        kernel,
    } = ask_kernel(agent, &pod, query, peer)?;
    let none = WorkloadPolicies::default();
    let policies = installed.as_ref().map_or(&none, |set| set.policies());
    let reference = match &installed {
        Some(_) => evaluate(policies, &connection),
        None => Decision {
            reason: Reason::NoPolicySet,
            policy: None,
            rule: None,
        },
    };

    let mut notes = from.notes;
    notes.extend(about_destination(&pod, port, from.source, &own));
    if is_pending(agent, &pod, policies) {
        notes.push("newer policies were received and are just being put in force".into());
    }
    Ok(Explanation {
        identity: peer.map(ToString::to_string),
        source: from.source,
        workload: format!("{}/{}", pod.config.namespace, pod.config.name),
        destination: SocketAddr::new(address, port),
        set: kernel_set,
        mode: mode(policies.mode).into(),
        difference: difference(installed.as_deref(), kernel_set, &reference, &kernel),
        with_dry_run: evaluate_with_dry_run(policies, &connection).map(|d| (&d).into()),
        policies: traced(policies, &connection, &reference),
        reference: (&reference).into(),
        kernel: (&kernel).into(),
        notes,
    })
}

/// What the kernel said, and over which set.
struct Asked {
    installed: Option<Arc<InstalledSet>>,
    /// The pod's set as its entry in the kernel says.
    kernel_set: u32,
    kernel: Decision,
}

/// The set cannot be exchanged while the kernel is asked.
fn ask_kernel(
    agent: &Agent,
    pod: &Pod,
    query: Query,
    peer: Option<&Peer>,
) -> Result<Asked, Unanswered> {
    pod.policy.ask(|installed| {
        let entry = agent.datapath.pod(pod.netns.cookie())?;
        let kernel_set = entry.map_or(0, |entry| entry.policy_set);
        if let (Some(set), Some(peer)) = (installed, peer) {
            set.prepare(query.identity, peer, &agent.datapath)?;
        }
        let query = Query {
            set: kernel_set,
            ..query
        };
        let verdicts = agent.datapath.judge(&[query])?;
        let Some(verdict) = verdicts.first() else {
            return question("the kernel gave no answer");
        };
        let kernel = match installed {
            Some(set) => set.compiled().decision(*verdict),
            None => Decision {
                reason: verdict.reason,
                policy: None,
                rule: None,
            },
        };
        Ok(Asked {
            installed: installed.cloned(),
            kernel_set,
            kernel,
        })
    })
}

fn difference(
    installed: Option<&InstalledSet>,
    kernel_set: u32,
    reference: &Decision,
    kernel: &Decision,
) -> Option<report::Difference> {
    let set = installed.map_or(0, InstalledSet::number);
    if set != kernel_set {
        let what = format!(
            "the kernel has policy set {kernel_set} for this pod, and the agent set {set}: \
             this is a bug, please report it with the output of --json"
        );
        return Some(report::Difference {
            expected: false,
            what,
        });
    }
    if reference == kernel {
        return None;
    }
    // Past a limit: the reference has none, and the kernel denies.
    let limit = installed.and_then(|set| set.problems().first());
    if let (Reason::Unrepresentable, Some(problem)) = (kernel.reason, limit) {
        return Some(report::Difference {
            expected: true,
            what: format!("the kernel denies everything to this workload: {problem}"),
        });
    }
    Some(report::Difference {
        expected: false,
        what: "reference and kernel differ: this is a bug, please report it with the output of \
               --json and of `ringfence policies --json`"
            .into(),
    })
}

fn traced(
    policies: &WorkloadPolicies,
    connection: &Connection<'_>,
    reference: &Decision,
) -> Vec<TracedPolicy> {
    let one = |policy: &Arc<Policy>| TracedPolicy {
        name: policy.name.to_string(),
        action: action(policy.action).into(),
        dry_run: policy.dry_run,
        decides: reference.rule.is_some() && reference.policy.as_ref() == Some(&policy.name),
        rules: trace(policy, connection)
            .into_iter()
            .map(|rule| TracedRule {
                matches: rule.matches,
                why_not: rule.misses.iter().map(ToString::to_string).collect(),
            })
            .collect(),
    };
    policies.policies.iter().map(one).collect()
}

fn is_pending(agent: &Agent, pod: &Pod, in_force: &WorkloadPolicies) -> bool {
    pod.workload().is_some_and(|workload| {
        let mesh = agent.mesh();
        let received = mesh
            .policies()
            .applicable(&workload.namespace, &workload.policies);
        !received.same(in_force)
    })
}

/// What is not a matter of policy and decides all the same.
fn about_destination(
    pod: &Pod,
    port: u16,
    source: IpAddr,
    own: &[Option<IpAddr>; 2],
) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(held) = pod.held() {
        notes.push(format!(
            "the pod is held ({held}): nothing is admitted to it"
        ));
    }
    if pod.hold.until().is_some() {
        notes.push("new connections wait for a policy that has not arrived".into());
    }
    if is_agent_port(port) {
        notes.push(format!(
            "port {port} is the agent's own: no policy admits anybody to it"
        ));
    }
    if own.contains(&Some(source)) || source.is_loopback() {
        notes.push("a pod's connections to itself are not judged: they are admitted".into());
    }
    notes
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_a_limit_excuses_a_difference() {
        let decision = |reason| Decision {
            reason,
            policy: None,
            rule: None,
        };
        let (allow, deny) = (
            decision(Reason::NoAllowPolicy),
            decision(Reason::NotAllowed),
        );
        assert!(difference(None, 0, &allow, &allow).is_none());
        assert!(!difference(None, 0, &allow, &deny).unwrap().expected);
        assert!(!difference(None, 3, &allow, &allow).unwrap().expected);
        let unrepresentable = decision(Reason::Unrepresentable);
        assert!(
            !difference(None, 0, &allow, &unrepresentable)
                .unwrap()
                .expected
        );
    }
}
