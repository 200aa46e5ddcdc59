//! Generated policies and connections, for tests that hold one evaluator against another:
//! the compiled tables in memory (`tests/evaluators`) and the kernel itself. Universes are
//! small and nested, so that values collide, cover and just miss each other.

// A strategy that cannot be built is a mistake in this module.
#![allow(clippy::unwrap_used)]

mod large;
mod small;

use std::net::IpAddr;
use std::sync::Arc;

use proptest::prelude::*;
use ringfence_bpf_common::Reason;

pub use large::{many_cidrs, many_terms};
pub use small::{pure_rule, rule, small};

use crate::{
    CompiledSet, Connection, Decision, Peer, Policy, Problem, WorkloadAddresses, WorkloadPolicies,
    evaluate,
};

/// The workload's IPv4 address in every case.
pub const POD4: &str = "10.9.0.1";
/// The workload's IPv6 address in every case.
pub const POD6: &str = "fd09::1";

/// [`POD4`] and [`POD6`].
pub fn addresses() -> WorkloadAddresses {
    WorkloadAddresses {
        v4: Some(POD4.parse().unwrap()),
        v6: Some(POD6.parse().unwrap()),
    }
}

/// Policies of one workload and connections to it.
#[derive(Clone, Debug)]
pub struct Case {
    pub policies: WorkloadPolicies,
    pub attempts: Vec<Attempt>,
}

/// One connection to a workload that has [`addresses`].
#[derive(Clone, Debug)]
pub struct Attempt {
    pub peer: Option<Peer>,
    pub source: IpAddr,
    /// [`POD4`] or [`POD6`].
    pub destination: IpAddr,
    pub port: u16,
}

impl Attempt {
    /// As the reference evaluator wants it.
    pub fn connection(&self) -> Connection<'_> {
        Connection {
            peer: self.peer.as_ref(),
            source: self.source,
            destination: self.destination,
            port: self.port,
        }
    }
}

/// What the compiled form has to say: what the reference says, unless the policies are
/// more than a set holds.
pub fn expected(
    policies: &WorkloadPolicies,
    compiled: &CompiledSet,
    attempt: &Attempt,
) -> Decision {
    let past_a_limit = compiled.problems.iter().find_map(|problem| match problem {
        Problem::TooManyTerms { policy, .. } => Some(Some(policy.clone())),
        Problem::TooManySources { .. }
        | Problem::TooManyValues { .. }
        | Problem::TooManyComparisons { .. } => Some(None),
        Problem::Rejected(_) | Problem::NotReceived(_) => None,
    });
    match past_a_limit {
        Some(policy) => Decision {
            reason: Reason::Unrepresentable,
            policy,
            rule: None,
        },
        None => evaluate(policies, &attempt.connection()),
    }
}

/// Cases of every kind; most are small, because those go through the most combinations.
/// `attempts` is the number of connections in each.
pub fn case(attempts: usize) -> impl Strategy<Value = Case> {
    prop_oneof![
        200 => small(attempts),
        1 => many_terms(attempts),
        1 => many_cidrs(attempts),
    ]
}

/// Policies get names in their order, as a store gives them.
fn named(policies: impl IntoIterator<Item = Policy>) -> Vec<Arc<Policy>> {
    let name = |(i, mut policy): (usize, Policy)| {
        policy.name.name = format!("p{i:05}");
        Arc::new(policy)
    };
    policies.into_iter().enumerate().map(name).collect()
}
