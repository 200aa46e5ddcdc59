//! `ringfence authz explain`: one connection judged by the reference evaluator and by the
//! kernel, with the reasons.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ringfence_bpf_common::{Addr, IDENTITY_NONE, Query, Reason};
use ringfence_datapath::DatapathError;
use ringfence_identity::SpiffeId;
use ringfence_policies::{
    Connection, Decision, Peer, Policy, WorkloadPolicies, evaluate, evaluate_with_dry_run, trace,
};

use super::Agent;
use super::applied::{action, mode};
use super::mesh::{Mesh, Reach, Workload};
use super::pods::{Pod, is_agent_port};
use super::policy::{InstalledSet, by_family};
use crate::authz::report::{self, ExplainRequest, Explanation, TracedPolicy, TracedRule};

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

/// Who connects.
struct From {
    /// The verified identity and its number; none is plaintext.
    peer: Option<(u32, Arc<Peer>)>,
    source: IpAddr,
    notes: Vec<String>,
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

/// `NAME:PORT`, with the brackets of an IPv6 address taken off.
fn split_port(to: &str) -> Result<(&str, u16), Unanswered> {
    let expected = "expected NAMESPACE/NAME:PORT, ADDRESS:PORT or [ADDRESS]:PORT";
    let Some((name, port)) = to.rsplit_once(':') else {
        return question(format!("--to {to}: {expected}"));
    };
    let Ok(port) = port.parse() else {
        return question(format!("--to {to}: `{port}` is not a port; {expected}"));
    };
    match name.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
        Some(Some(address)) => Ok((address, port)),
        None if !name.contains(':') && !name.is_empty() => Ok((name, port)),
        _ => question(format!("--to {to}: {expected}")),
    }
}

fn split_name(name: &str) -> Option<(&str, &str)> {
    let (namespace, name) = name.split_once('/')?;
    (!namespace.is_empty() && !name.is_empty() && !name.contains('/')).then_some((namespace, name))
}

/// The pod of this node that is meant.
fn destination(agent: &Agent, name: &str) -> Result<Arc<Pod>, Unanswered> {
    let mut pods = agent.pods.list().into_iter();
    let found = if let Ok(address) = name.parse::<IpAddr>() {
        let address = address.to_canonical();
        pods.find(|pod| {
            pod.workload()
                .is_some_and(|w| w.addresses.contains(&address))
        })
    } else if let Some((namespace, name)) = split_name(name) {
        pods.find(|pod| pod.config.namespace == namespace && pod.config.name == name)
    } else {
        return question(format!(
            "`{name}` is neither NAMESPACE/NAME nor an IP address"
        ));
    };
    match found {
        Some(pod) => Ok(pod),
        None => question(format!(
            "no enrolled pod {name} on this node: ask the agent of the node where it runs"
        )),
    }
}

/// `named`: the destination, when it was given as an address.
fn parse_from(
    agent: &Agent,
    request: &ExplainRequest,
    named: Option<IpAddr>,
) -> Result<From, Unanswered> {
    let from = request.from.as_str();
    let source = request.source.map(|ip| ip.to_canonical());
    let mesh = agent.mesh();
    if let Ok(address) = from.parse::<IpAddr>() {
        let address = address.to_canonical();
        if source.is_some_and(|source| source != address) {
            return question("--from is an address already: leave --source out");
        }
        return Ok(From {
            peer: None,
            source: address,
            notes: about_plaintext(&mesh, address),
        });
    }
    let family = source.or(named).map(|address| address.is_ipv4());
    if from.starts_with("spiffe:") {
        let id = match SpiffeId::parse(from) {
            Ok(id) => id,
            Err(error) => return question(format!("--from {from}: {error}")),
        };
        let aliases = agent.trust.aliases();
        let holders = mesh
            .workloads()
            .values()
            .filter(|w| aliases.same(w.identity.spiffe_id(), &id));
        let mut addresses: Vec<IpAddr> = holders.flat_map(|w| w.addresses.clone()).collect();
        addresses.sort_unstable();
        let mut notes = Vec::new();
        let source = match source {
            Some(source) => {
                if !addresses.contains(&source) {
                    notes.push(format!(
                        "no workload with this identity has the address {source}: a peer that \
                         claims it is refused before any policy is asked"
                    ));
                }
                source
            }
            None => {
                addresses.retain(|a| family.is_none_or(|v4| a.is_ipv4() == v4));
                match pick(&addresses) {
                    Ok(source) => source,
                    Err(why) => return question(format!("--from {from}: {why}: give --source IP")),
                }
            }
        };
        return Ok(From {
            peer: Some(numbered(agent, &id)?),
            source,
            notes,
        });
    }
    let Some((namespace, name)) = split_name(from) else {
        return question(format!(
            "--from {from}: expected a SPIFFE ID, NAMESPACE/NAME or an IP address"
        ));
    };
    let Some(workload) = mesh.by_name(namespace, name) else {
        return question(format!(
            "--from {from}: the control plane announced no such workload"
        ));
    };
    let source = match source {
        Some(source) if workload.addresses.contains(&source) => source,
        Some(source) => return question(format!("{source} is not an address of {from}")),
        None => {
            let mut addresses = workload.addresses.clone();
            addresses.retain(|a| family.is_none_or(|v4| a.is_ipv4() == v4));
            match pick(&addresses) {
                Ok(source) => source,
                Err(why) => return question(format!("--from {from}: {why}")),
            }
        }
    };
    let (peer, notes) = through_mesh(agent, workload)?;
    Ok(From {
        peer,
        source,
        notes,
    })
}

type Numbered = (u32, Arc<Peer>);

fn through_mesh(
    agent: &Agent,
    workload: &Workload,
) -> Result<(Option<Numbered>, Vec<String>), Unanswered> {
    match workload.reach {
        Reach::Mesh => Ok((
            Some(numbered(agent, workload.identity.spiffe_id())?),
            Vec::new(),
        )),
        Reach::Direct => {
            let note = "the workload is not in the mesh: it connects in plaintext";
            Ok((None, vec![note.into()]))
        }
        Reach::Refused(why) => {
            let note = format!("this node cannot tell how the workload connects ({why})");
            Ok((
                Some(numbered(agent, workload.identity.spiffe_id())?),
                vec![note],
            ))
        }
    }
}

/// One address, or of several the IPv4 one.
fn pick(addresses: &[IpAddr]) -> Result<IpAddr, String> {
    match addresses {
        [] => Err("no address of the wanted family is known for it".into()),
        [one] => Ok(*one),
        [a, b] if a.is_ipv4() != b.is_ipv4() => Ok(if a.is_ipv4() { *a } else { *b }),
        several => Err(format!("{} addresses have it", several.len())),
    }
}

fn numbered(agent: &Agent, id: &SpiffeId) -> Result<Numbered, Unanswered> {
    let number = match agent.identities.number(id, &agent.trust.aliases()) {
        Ok(number) => number,
        Err(error) => return question(format!("{id}: {error}")),
    };
    match agent.identities.peer(number) {
        Some(peer) => Ok((number, peer)),
        None => question(format!("{id} has no number")),
    }
}

fn about_plaintext(mesh: &Mesh, source: IpAddr) -> Vec<String> {
    match mesh.by_address(source) {
        Some(workload) if workload.reach == Reach::Mesh => vec![format!(
            "{source} is the address of {}/{}, which connects through a tunnel, as {}: for that \
             use --from {}/{}",
            workload.namespace,
            workload.name,
            workload.identity.spiffe_id(),
            workload.namespace,
            workload.name
        )],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn destinations_are_split_at_the_port() {
        for (text, name, port) in [
            ("demo/web:80", "demo/web", 80),
            ("10.0.0.1:65535", "10.0.0.1", 65535),
            ("[fd00::1]:80", "fd00::1", 80),
        ] {
            assert_eq!(split_port(text).unwrap(), (name, port));
        }
        for bad in [
            "",
            "demo/web",
            "demo/web:",
            "demo/web:65536",
            "demo/web:-1",
            ":80",
            "fd00::1:80",
            "[fd00::1:80",
            "[]80",
        ] {
            assert!(split_port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn one_of_several_addresses_is_never_guessed() {
        let ips =
            |text: &[&str]| -> Vec<IpAddr> { text.iter().map(|t| t.parse().unwrap()).collect() };
        assert_eq!(pick(&ips(&["10.0.0.1"])).unwrap(), ips(&["10.0.0.1"])[0]);
        assert_eq!(
            pick(&ips(&["10.0.0.1", "fd00::1"])).unwrap(),
            ips(&["10.0.0.1"])[0]
        );
        assert!(pick(&[]).is_err());
        assert!(pick(&ips(&["10.0.0.1", "10.0.0.2"])).is_err());
    }

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
