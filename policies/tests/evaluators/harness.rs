//! Judges a connection both ways.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use ringfence_bpf_common::{Addr, IDENTITY_NONE, Query, authorize};
use ringfence_policies::{
    Action, Clause, CompiledSet, Connection, Decision, Match, Peer, Policy, PolicyName, Reason,
    Rule, Scope, StringMatch, Tables, WorkloadPolicies, compile, evaluate,
};

pub use ringfence_policies::testing::{POD4, POD6, addresses};

const SET: NonZeroU32 = NonZeroU32::new(7).unwrap();
const IDENTITY: NonZeroU32 = NonZeroU32::new(42).unwrap();

pub fn peer(id: &str) -> Peer {
    id.parse().unwrap()
}

pub fn addr(ip: IpAddr) -> Addr {
    match ip {
        IpAddr::V4(v4) => Addr::v4(v4.octets()),
        IpAddr::V6(v6) => Addr(v6.octets()),
    }
}

/// A compiled set in the kernel's tables, with neighbours that allow everything: a
/// look-up that leaves its set would show.
pub struct Kernel<'a> {
    compiled: &'a CompiledSet,
    tables: Tables,
}

impl<'a> Kernel<'a> {
    pub fn of(compiled: &'a CompiledSet) -> Self {
        let mut tables = Tables::new();
        let open = compile(&WorkloadPolicies::default(), addresses());
        assert!(tables.insert(NonZeroU32::MIN, &open));
        assert!(tables.insert(NonZeroU32::MAX, &open));
        assert!(tables.insert(SET, compiled));
        Kernel { compiled, tables }
    }

    /// The kernel's answer, with the policy and rule that its term stands for.
    pub fn decision(&mut self, connection: &Connection<'_>) -> Decision {
        let identity = match connection.peer {
            Some(peer) => {
                let bound = self
                    .tables
                    .insert_identity(SET, self.compiled, IDENTITY, peer);
                assert!(bound);
                IDENTITY.get()
            }
            None => IDENTITY_NONE,
        };
        let verdict = authorize(
            &self.tables,
            &Query {
                set: SET.get(),
                identity,
                source: addr(connection.source),
                port: connection.port,
                destination_v4: connection.destination.is_ipv4(),
            },
        );
        let decision = self.compiled.decision(verdict);
        assert_eq!(decision.allows(), verdict.allows());
        decision
    }
}

pub fn kernel_decision(compiled: &CompiledSet, connection: &Connection<'_>) -> Decision {
    Kernel::of(compiled).decision(connection)
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

/// To the workload's address of the same family.
pub fn from<'a>(peer: Option<&'a Peer>, source: &str, port: u16) -> Connection<'a> {
    let source: IpAddr = source.parse().unwrap();
    let destination = if source.to_canonical().is_ipv4() {
        POD4
    } else {
        POD6
    };
    Connection {
        peer,
        source,
        destination: destination.parse().unwrap(),
        port,
    }
}

pub fn strings(patterns: &[&str]) -> Vec<StringMatch> {
    patterns.iter().map(|p| p.parse().unwrap()).collect()
}

/// A rule of one match.
pub fn only(m: Match) -> Rule {
    rule(vec![vec![m]])
}

pub fn ports(ports: &[u16]) -> Match {
    Match {
        destination_ports: ports.to_vec(),
        ..Match::default()
    }
}
