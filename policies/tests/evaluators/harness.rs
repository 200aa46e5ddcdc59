//! Judges a connection both ways.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use ringfence_bpf_common::{Addr, IDENTITY_NONE, Query, authorize};
use ringfence_policies::{
    Action, Clause, CompiledSet, Connection, Decision, Match, Peer, Policy, PolicyName, Reason,
    Rule, Scope, Tables, WorkloadAddresses, WorkloadPolicies, compile, evaluate,
};

/// The workload's addresses in all tests.
pub const POD4: &str = "10.9.0.1";
pub const POD6: &str = "fd09::1";

const SET: NonZeroU32 = NonZeroU32::new(7).unwrap();
const IDENTITY: NonZeroU32 = NonZeroU32::new(42).unwrap();

pub fn addresses() -> WorkloadAddresses {
    WorkloadAddresses {
        v4: Some(POD4.parse().unwrap()),
        v6: Some(POD6.parse().unwrap()),
    }
}

pub fn peer(id: &str) -> Peer {
    id.parse().unwrap()
}

pub fn addr(ip: IpAddr) -> Addr {
    match ip {
        IpAddr::V4(v4) => Addr::v4(v4.octets()),
        IpAddr::V6(v6) => Addr(v6.octets()),
    }
}

/// The kernel's answer, with the policy and rule that its term stands for.
pub fn kernel_decision(compiled: &CompiledSet, connection: &Connection<'_>) -> Decision {
    let mut tables = Tables::new();
    // A neighbour that allows everything: a look-up that leaves its set would show.
    let open = compile(&WorkloadPolicies::default(), addresses());
    tables.insert(NonZeroU32::MIN, &open);
    tables.insert(NonZeroU32::MAX, &open);
    tables.insert(SET, compiled);
    let identity = match connection.peer {
        Some(peer) => {
            tables.insert_identity(SET, compiled, IDENTITY, peer);
            IDENTITY.get()
        }
        None => IDENTITY_NONE,
    };
    let verdict = authorize(
        &tables,
        &Query {
            set: SET.get(),
            identity,
            source: addr(connection.source),
            port: connection.port,
            destination_v4: connection.destination.is_ipv4(),
        },
    );
    let decision = compiled.decision(verdict);
    assert_eq!(decision.allows(), verdict.allows());
    decision
}

/// Both answers, which must be the same one.
pub fn judge(policies: &WorkloadPolicies, connection: &Connection<'_>) -> Decision {
    let reference = evaluate(policies, connection);
    let kernel = kernel_decision(&compile(policies, addresses()), connection);
    assert_eq!(
        reference, kernel,
        "reference (left) and compiled (right) differ"
    );
    reference
}

pub fn policy(name: &str, action: Action, rules: Vec<Rule>) -> Policy {
    Policy {
        name: PolicyName::new("shop", name),
        scope: Scope::Namespace,
        action,
        dry_run: false,
        rules,
    }
}

pub fn rule(clauses: Vec<Vec<Match>>) -> Rule {
    Rule {
        clauses: clauses
            .into_iter()
            .map(|matches| Clause { matches })
            .collect(),
    }
}

pub fn applied(policies: Vec<Policy>) -> WorkloadPolicies {
    WorkloadPolicies {
        policies: policies.into_iter().map(Arc::new).collect(),
        ..WorkloadPolicies::default()
    }
}

/// Whether one rule matches, found out by a DENY policy that has only it and confirmed
/// by an ALLOW policy that has only it.
pub fn matches(rule: Rule, connection: &Connection<'_>) -> bool {
    let denied = judge(
        &applied(vec![policy("p", Action::Deny, vec![rule.clone()])]),
        connection,
    );
    let allowed = judge(
        &applied(vec![policy("p", Action::Allow, vec![rule])]),
        connection,
    );
    assert_eq!(denied.allows(), !allowed.allows());
    assert_eq!(
        denied.reason == Reason::Denied,
        allowed.reason == Reason::Allowed
    );
    allowed.allows()
}
