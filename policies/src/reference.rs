//! The reference evaluator: the definition of what is right, written for reading.
//! It must share no shortcut with the compiler, which is tested against it.

use std::net::IpAddr;

use ringfence_bpf_common::{Reason, Verdict};

use crate::{Action, Clause, Match, Mode, Peer, Policy, PolicyName, Rule, WorkloadPolicies};

/// A connection to be judged.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'a> {
    /// The verified identity; `None` for plaintext.
    pub peer: Option<&'a Peer>,
    /// The client's own address.
    pub source: IpAddr,
    /// The workload's address.
    pub destination: IpAddr,
    /// The application's port, never the tunnel's.
    pub port: u16,
}

/// What was decided, and by what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub reason: Reason,
    /// The policy that decided, if one did.
    pub policy: Option<PolicyName>,
    /// Its first rule that matches, counted from 0.
    pub rule: Option<usize>,
}

impl Decision {
    /// Whether the connection is admitted.
    pub fn allows(&self) -> bool {
        Verdict {
            reason: self.reason,
            term: Verdict::NO_TERM,
        }
        .allows()
    }

    fn of(reason: Reason) -> Self {
        Decision {
            reason,
            policy: None,
            rule: None,
        }
    }
}

/// Judges a connection. Dry-run policies have no part in it.
pub fn evaluate(policies: &WorkloadPolicies, connection: &Connection<'_>) -> Decision {
    judge(policies, connection, |policy| !policy.dry_run)
}

/// What [`evaluate`] would decide if the dry-run policies were enforced too; `None`
/// when the workload has none. For reports only.
pub fn evaluate_with_dry_run(
    policies: &WorkloadPolicies,
    connection: &Connection<'_>,
) -> Option<Decision> {
    policies
        .policies
        .iter()
        .any(|policy| policy.dry_run)
        .then(|| judge(policies, connection, |_| true))
}

fn judge(
    policies: &WorkloadPolicies,
    connection: &Connection<'_>,
    counts: impl Fn(&Policy) -> bool,
) -> Decision {
    if let Some(rejected) = policies.rejected.first() {
        return Decision {
            policy: Some(rejected.name.clone()),
            ..Decision::of(Reason::Unrepresentable)
        };
    }
    if let Some(missing) = policies.missing.first() {
        return Decision {
            policy: missing.parse().ok(),
            ..Decision::of(Reason::PolicyNotReceived)
        };
    }
    if policies.mode == Mode::Strict && connection.peer.is_none() {
        return Decision::of(Reason::PlaintextRefused);
    }

    let enforced = || policies.policies.iter().filter(|policy| counts(policy));
    let first_match = |action: Action| {
        enforced()
            .filter(|policy| policy.action == action)
            .find_map(|policy| {
                let rule = policy
                    .rules
                    .iter()
                    .position(|rule| rule_matches(rule, connection))?;
                Some((policy.name.clone(), rule))
            })
    };
    let decided = |reason, (policy, rule)| Decision {
        reason,
        policy: Some(policy),
        rule: Some(rule),
    };

    if let Some(deny) = first_match(Action::Deny) {
        return decided(Reason::Denied, deny);
    }
    if !enforced().any(|policy| policy.action == Action::Allow) {
        return Decision::of(Reason::NoAllowPolicy);
    }
    match first_match(Action::Allow) {
        Some(allow) => decided(Reason::Allowed, allow),
        None => Decision::of(Reason::NotAllowed),
    }
}

pub(crate) fn rule_matches(rule: &Rule, connection: &Connection<'_>) -> bool {
    rule.clauses
        .iter()
        .all(|clause| clause_matches(clause, connection))
}

pub(crate) fn clause_matches(clause: &Clause, connection: &Connection<'_>) -> bool {
    clause.matches.is_empty() || clause.matches.iter().any(|m| match_holds(m, connection))
}

pub(crate) fn match_holds(m: &Match, connection: &Connection<'_>) -> bool {
    if m.is_empty() {
        return false;
    }
    let namespace = connection.peer.and_then(Peer::namespace);
    field(&m.namespaces, &m.not_namespaces, |v| {
        namespace.is_some_and(|n| v.matches(n))
    }) && field(&m.principals, &m.not_principals, |v| {
        connection
            .peer
            .is_some_and(|peer| peer.principals().any(|p| v.matches(p)))
    }) && field(&m.service_accounts, &m.not_service_accounts, |v| {
        connection.peer.is_some_and(|peer| v.matches(peer))
    }) && field(&m.source_ips, &m.not_source_ips, |v| {
        v.contains(connection.source)
    }) && field(&m.destination_ips, &m.not_destination_ips, |v| {
        v.contains(connection.destination)
    }) && field(&m.destination_ports, &m.not_destination_ports, |v| {
        *v == connection.port
    })
}

/// A field and its `not_` twin.
pub(crate) fn field<T>(values: &[T], not_values: &[T], holds: impl Fn(&T) -> bool) -> bool {
    (values.is_empty() || values.iter().any(&holds)) && !not_values.iter().any(&holds)
}
