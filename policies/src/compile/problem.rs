//! Limits of a set, and why one denies everything.

use std::fmt;
use std::sync::Arc;

use crate::{PolicyName, RejectedPolicy};

/// Source prefixes that one set can hold.
pub const MAX_SOURCES: usize = 1 << 15;

/// Values (names, prefixes, ports) that the conditions of one set can have in one
/// dimension, and alternatives in all its terms. Rules whose clauses multiply out repeat
/// theirs in each combination.
pub const MAX_VALUES: usize = 1 << 21;

/// Comparisons that the lists of a set may take while it is compiled: less than a second.
pub const MAX_COMPARISONS: usize = 1 << 26;

/// Why a set denies everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// The policies need more terms than a set holds; `policy` is the one that passed
    /// the limit.
    TooManyTerms { policy: PolicyName, limit: usize },
    /// The policies name more source prefixes than a set holds.
    TooManySources { limit: usize },
    /// The conditions of the policies have more values than a set holds.
    TooManyValues { limit: usize },
    /// The conditions of the policies have too many lists to compare with each other.
    TooManyComparisons { limit: usize },
    /// A policy that applies has a value that cannot be used.
    Rejected(Arc<RejectedPolicy>),
    /// The workload names a policy that has not arrived.
    NotReceived(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::TooManyTerms { policy, limit } => write!(
                f,
                "policy {policy} takes the workload past {limit} terms (combinations of one \
                 match per clause); split its rules or use fewer policies on this workload"
            ),
            Problem::TooManySources { limit } => write!(
                f,
                "the policies of the workload name more than {limit} source prefixes; merge \
                 neighbouring prefixes or move the list in front of the mesh"
            ),
            Problem::TooManyValues { limit } => write!(
                f,
                "the policies of the workload combine more than {limit} names, prefixes or \
                 ports; keep long lists out of rules with several sources per `from`"
            ),
            Problem::TooManyComparisons { limit } => write!(
                f,
                "the lists of the workload's policies take more than {limit} comparisons; put \
                 values into few long lists rather than into many sources or operations of a rule"
            ),
            Problem::Rejected(rejected) => rejected.error.fmt(f),
            Problem::NotReceived(name) => {
                write!(
                    f,
                    "policy {name} is named by the workload and has not been received"
                )
            }
        }
    }
}
