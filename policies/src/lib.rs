//! L4 authorization with Istio's semantics: who may open a TCP connection to a workload.
//!
//! - [`Policy`] and its parts are the model; [`PolicyStore`] holds every policy received
//!   and says which apply to a workload ([`WorkloadPolicies`]).
//! - [`evaluate`] is the reference: slow, literal, and the definition of what is right.
//! - [`compile`] turns a workload's policies into the tables that the eBPF programs
//!   read; [`Tables`] is an in-memory copy of those tables, over which the *same*
//!   [`ringfence_bpf_common::authorize`] runs in userspace. `tests/evaluators` holds the
//!   two evaluators against each other on generated policies.
//!
//! # Semantics
//!
//! Policies of a workload: those of its namespace, the global ones, and those it names.
//! Any DENY match denies; without an ALLOW policy the rest is allowed; with one, a match
//! is needed. A policy is rules (any), a rule is clauses (all), a clause is matches
//! (any), a match is fields (all), a field is values (any), and each field has a `not_`
//! twin. A policy without rules never matches, a rule without clauses matches, a clause
//! without matches matches, and a match without a field does **not**.
//!
//! **Without an identity** (plaintext) no value of `namespaces`, `principals` or
//! `service_accounts` holds, not even presence (`*`); the `not_` twins therefore hold.
//! ztunnel decides so too (`src/rbac.rs`), with one difference in a corner: it compares
//! namespace patterns with the empty string, so that an *empty* prefix or suffix matches
//! plaintext there. Such values are refused here when a policy is built. An identity
//! that is not of the shape `spiffe://TD/ns/NS/sa/SA` has a principal and nothing else:
//! for the other two fields it counts as no identity.
//!
//! # Failing closed
//!
//! What cannot be understood or represented is never skipped. A policy with a bad value
//! enters the store as [`RejectedPolicy`] and closes the workloads it would apply to
//! (a dropped DENY policy, or a positive list that lost its last value, would open
//! them); so does a policy that a workload names and that has not arrived, and a set
//! that exceeds the tables. [`Problem`] says which and why.
//!
//! # Not in this crate
//!
//! Conversion from protobuf or YAML; trust-domain aliases; judging live connections
//! again. Loopback and hairpin traffic is exempted before `authorize` is asked.

mod cidr;
mod compile;
mod error;
mod model;
mod peer;
mod reference;
mod store;
mod tables;

pub use cidr::Cidr;
pub use compile::{CompiledSet, Problem, SourcePrefix, TermOrigin, WorkloadAddresses, compile};
pub use error::{PeerError, PolicyError, ValueError};
pub use model::{
    Action, Clause, Match, Policy, PolicyName, PolicySummary, Rule, Scope, ServiceAccountMatch,
    StringMatch, port,
};
pub use peer::Peer;
pub use reference::{Connection, Decision, evaluate, evaluate_with_dry_run};
pub use ringfence_bpf_common::Reason;
pub use store::{Mode, PolicyStore, RejectedPolicy, STATIC_STRICT, WorkloadPolicies};
pub use tables::Tables;
