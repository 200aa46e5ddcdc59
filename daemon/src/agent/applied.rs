//! `ringfence policies`: what decides about connections to each workload of this node.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Instant;

use ringfence_bpf_common::MAX_TERMS;
use ringfence_policies::{
    Action, Clause, Match, Mode, Policy, PolicyName, Rule, Scope, WorkloadPolicies,
};

use super::Agent;
use super::pods::Pod;
use super::policy::InstalledSet;
use crate::authz::report::{Applied, AppliedPolicy, AppliedTo, Usage};

/// Values of a list that a line shows.
const MOST_VALUES: usize = 8;

/// The answer of `GET /policies`.
pub fn applied(agent: &Agent) -> Applied {
    let mut pods = agent.pods.list();
    pods.sort_by_key(|pod| name_of(pod));
    let installed: Vec<(Arc<Pod>, Option<Arc<InstalledSet>>)> = pods
        .into_iter()
        .map(|pod| (pod.clone(), pod.policy.installed()))
        .collect();
    let mut users: HashMap<u32, Vec<String>> = HashMap::new();
    for (pod, set) in &installed {
        if let Some(set) = set {
            users.entry(set.number()).or_default().push(name_of(pod));
        }
    }
    let workloads = installed.iter().map(|(pod, set)| {
        let sharing = set.as_ref().and_then(|set| users.get(&set.number()));
        applied_to(
            agent,
            pod,
            set.as_deref(),
            sharing.map_or(&[], Vec::as_slice),
        )
    });
    Applied {
        workloads: workloads.collect(),
        tables: tables(agent),
        blind_spots: blind_spots(agent),
    }
}

/// `namespace/name`.
pub fn name_of(pod: &Pod) -> String {
    format!("{}/{}", pod.config.namespace, pod.config.name)
}

/// As in a manifest.
pub fn action(action: Action) -> &'static str {
    match action {
        Action::Allow => "ALLOW",
        Action::Deny => "DENY",
    }
}

/// As in reports.
pub fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Permissive => "permissive",
        Mode::Strict => "strict",
    }
}

/// Entries of the kernel's tables.
pub fn tables(agent: &Agent) -> Vec<Usage> {
    let used = agent.datapath.policy_usage();
    let room = agent.datapath.policy_room();
    [
        ("sets", used.sets, room.sets),
        ("identities", used.identities, room.identities),
        ("sources", used.sources, room.sources),
        ("ports", used.ports, room.ports),
        ("blocks", used.blocks as usize, room.blocks as usize),
    ]
    .map(|(table, used, limit)| Usage {
        table: table.into(),
        used: used as u64,
        limit: limit as u64,
    })
    .into()
}

fn applied_to(
    agent: &Agent,
    pod: &Pod,
    set: Option<&InstalledSet>,
    sharing: &[String],
) -> AppliedTo {
    let workload = name_of(pod);
    let none = WorkloadPolicies::default();
    let policies = set.map_or(&none, InstalledSet::policies);
    let received = pod.workload().map(|of| {
        let mesh = agent.mesh();
        mesh.policies().applicable(&of.namespace, &of.policies)
    });
    let mut terms: HashMap<&PolicyName, usize> = HashMap::new();
    for origin in set.map_or(&[][..], |set| &set.compiled().terms) {
        *terms.entry(&origin.policy).or_default() += 1;
    }
    let mut problems: Vec<String> = pod
        .held()
        .map(|held| format!("held: {held}"))
        .into_iter()
        .collect();
    problems.extend(
        set.into_iter()
            .flat_map(|set| set.problems())
            .map(ToString::to_string),
    );
    if let Some(until) = pod.hold.until() {
        let left = until.into_std().saturating_duration_since(Instant::now());
        problems.push(format!(
            "new connections wait for {} (for another {} s), then they are refused",
            policies.missing.join(", "),
            left.as_secs()
        ));
    } else if !policies.missing.is_empty() {
        problems
            .push("the wait for it is over: connections are refused (policy-not-received)".into());
    }
    AppliedTo {
        shared_with: sharing
            .iter()
            .filter(|name| **name != workload)
            .cloned()
            .collect(),
        workload,
        set: set.map_or(0, InstalledSet::number),
        mode: mode(policies.mode).into(),
        terms: set.map_or(0, |set| set.compiled().terms.len()),
        most_terms: MAX_TERMS,
        policies: policies
            .policies
            .iter()
            .map(|policy| describe(policy, terms.get(&policy.name).copied().unwrap_or_default()))
            .collect(),
        pending: received.is_some_and(|received| !received.same(policies)),
        problems,
    }
}

fn describe(policy: &Policy, terms: usize) -> AppliedPolicy {
    let scope = match policy.scope {
        Scope::Global => "global",
        Scope::Namespace => "namespace",
        Scope::WorkloadSelector => "selector",
    };
    AppliedPolicy {
        name: policy.name.to_string(),
        scope: scope.into(),
        action: action(policy.action).into(),
        dry_run: policy.dry_run,
        terms,
        rules: policy.rules.iter().map(rule).collect(),
        notes: notes(policy),
    }
}

/// What the control plane cannot say, or has taken away.
fn notes(policy: &Policy) -> Vec<String> {
    let mut notes = Vec::new();
    match (policy.action, policy.rules.is_empty()) {
        (Action::Allow, true) => notes.push(
            "it has no rules and admits nothing: written so, or its rules have HTTP conditions, \
             which leave ALLOW rules out"
                .into(),
        ),
        (Action::Deny, true) => notes.push("it has no rules and denies nothing".into()),
        (_, false) => {}
    }
    for (number, rule) in policy.rules.iter().enumerate() {
        let dead = |clause: &&Clause| {
            !clause.matches.is_empty() && clause.matches.iter().all(Match::is_empty)
        };
        if rule.clauses.iter().any(|clause| dead(&clause)) {
            notes.push(format!(
                "rule {number} never matches: a part of it has conditions that L4 cannot check, \
                 and is empty here"
            ));
        } else if rule
            .clauses
            .iter()
            .flat_map(|c| &c.matches)
            .any(Match::is_empty)
        {
            notes.push(format!(
                "rule {number} has an alternative that never matches: its conditions cannot be \
                 checked at L4"
            ));
        }
    }
    notes
}

fn blind_spots(agent: &Agent) -> Vec<String> {
    let aliases = if agent.trust.aliases().is_empty() {
        "trust-domain aliases are not sent: none are configured here, so that principals hold for \
         their own trust domain alone"
    } else {
        "trust-domain aliases are not sent: those of this agent's configuration are used"
    };
    [
        "policies with action AUDIT or CUSTOM, or with targetRef (for waypoints), are never sent",
        "ALLOW rules with HTTP conditions are left out by the control plane: what they would admit \
         is refused here",
        "DENY rules lose their HTTP conditions: an alternative of which nothing is left never \
         matches, so that they may deny less than is written (marked above where it shows)",
        "Istiod leaves out CIDRs and ports that do not parse: a list that became empty would match \
         everything; the embedded control plane refuses them",
        "Istiod sends dry-run policies only with its feature flag for them",
        aliases,
    ]
    .map(Into::into)
    .into()
}

/// A rule in words.
fn rule(rule: &Rule) -> String {
    if rule.clauses.is_empty() {
        return "anything".into();
    }
    let clauses: Vec<String> = rule.clauses.iter().map(clause).collect();
    clauses.join(" and ")
}

fn clause(clause: &Clause) -> String {
    match clause.matches.as_slice() {
        [] => "anything".into(),
        [one] => one_match(one),
        several => {
            let alternatives: Vec<String> =
                several.iter().take(MOST_VALUES).map(one_match).collect();
            let more = several.len().saturating_sub(MOST_VALUES);
            let more = if more > 0 {
                format!(" or {more} more")
            } else {
                String::new()
            };
            format!("({}{more})", alternatives.join(" or "))
        }
    }
}

fn one_match(m: &Match) -> String {
    if m.is_empty() {
        return "nothing".into();
    }
    let accounts = |list: &[ringfence_policies::ServiceAccountMatch]| -> Vec<String> {
        list.iter()
            .map(|account| format!("{}/{}", account.namespace, account.service_account))
            .collect()
    };
    let parts = [
        list("namespaces", &m.namespaces),
        list("not_namespaces", &m.not_namespaces),
        list("principals", &m.principals),
        list("not_principals", &m.not_principals),
        list("service_accounts", &accounts(&m.service_accounts)),
        list("not_service_accounts", &accounts(&m.not_service_accounts)),
        list("source_ips", &m.source_ips),
        list("not_source_ips", &m.not_source_ips),
        list("destination_ips", &m.destination_ips),
        list("not_destination_ips", &m.not_destination_ips),
        list("destination_ports", &m.destination_ports),
        list("not_destination_ports", &m.not_destination_ports),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    parts.join(", ")
}

fn list<T: ToString>(name: &str, values: &[T]) -> Option<String> {
    let shown: Vec<String> = values.iter().take(MOST_VALUES).map(T::to_string).collect();
    let mut text = format!("{name} [{}", shown.join(", "));
    let more = values.len().saturating_sub(MOST_VALUES);
    if more > 0 {
        // Writing to a String cannot fail.
        let _ = write!(text, ", and {more} more");
    }
    text.push(']');
    (!values.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn policy(action: Action, rules: Vec<Rule>) -> Policy {
        Policy {
            name: PolicyName::new("demo", "p"),
            scope: Scope::Namespace,
            action,
            dry_run: false,
            rules,
        }
    }

    fn of(matches: Vec<Match>) -> Rule {
        Rule {
            clauses: vec![Clause { matches }],
        }
    }

    #[test]
    fn rules_are_put_into_words() {
        let one = Match {
            principals: vec!["td/ns/a/sa/b".parse().unwrap()],
            destination_ports: (1..=10).collect(),
            ..Match::default()
        };
        assert_eq!(
            rule(&of(vec![one, Match::default()])),
            "(principals [td/ns/a/sa/b], destination_ports [1, 2, 3, 4, 5, 6, 7, 8, and 2 more] \
             or nothing)"
        );
        assert_eq!(rule(&Rule::default()), "anything");
    }

    #[test]
    fn rule_that_lost_its_conditions_is_marked_and_a_whole_one_is_not() {
        let port = Match {
            destination_ports: vec![80],
            ..Match::default()
        };
        let said = |matches| notes(&policy(Action::Deny, vec![of(matches)])).join(";");
        assert!(said(vec![Match::default()]).contains("never matches"));
        assert!(said(vec![Match::default(), port.clone()]).contains("alternative"));
        assert_eq!(said(vec![port]), "");
        assert!(
            notes(&policy(Action::Allow, Vec::new()))
                .join("")
                .contains("admits nothing")
        );
    }
}
