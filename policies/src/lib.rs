//! L4 authorization with Istio's semantics: who may open a TCP connection to a workload.
//!
//! - [`Policy`] and its parts are the model; [`PolicyStore`] holds every policy received
//!   and says which apply to a workload ([`WorkloadPolicies`]).
//! - [`evaluate`] is the reference: slow, literal, and the definition of what is right.
//! - [`compile`] turns a workload's policies into the tables that the eBPF programs
//!   read; [`Tables`] is an in-memory copy of those tables, over which the *same*
//!   [`ringfence_bpf_common::authorize`] runs in userspace. `tests/evaluators` holds the
//!   two evaluators against each other on generated policies (`testing`, behind a feature).
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
//! **Trust-domain aliases** are local configuration; Istio sends none. A peer carries
//! them ([`Peer::with_aliases`]): a principal of a policy means it when the principal is
//! any of its names, in positive and in negative lists. Istiod expands the principals of
//! a policy to the same end; putting the names on the peer needs no second form of the
//! policy and covers patterns that cut a trust domain short. Namespaces and service
//! accounts ignore the trust domain anyway.
//!
//! # Failing closed
//!
//! What cannot be understood or represented is never skipped. A policy with a bad value
//! enters the store as [`RejectedPolicy`] and closes the workloads it would apply to
//! (a dropped DENY policy, or a positive list that lost its last value, would open
//! them); so does a policy that a workload names and that has not arrived, and a set
//! past one of the limits: [`MAX_TERMS`](ringfence_bpf_common::MAX_TERMS) (16 384 terms;
//! an ordinary rule is one), [`MAX_SOURCES`], [`MAX_VALUES`] and [`MAX_COMPARISONS`], all
//! of them checked before what they limit is built. [`Problem`] says which and why.
//!
//! # Not in this crate
//!
//! Conversion from protobuf or YAML; waiting for policies that have not arrived; judging
//! live connections again. Loopback and hairpin traffic is exempted before `authorize` is asked.

mod cidr;
mod compile;
mod error;
mod mask;
mod model;
mod peer;
mod reference;
mod store;
mod tables;
#[cfg(feature = "testing")]
pub mod testing;
mod trace;

pub use cidr::Cidr;
pub use compile::{
    CompiledSet, MAX_COMPARISONS, MAX_SOURCES, MAX_VALUES, MapEntries, Problem, SourcePrefix,
    TermOrigin, WorkloadAddresses, compile, compile_with_dry_run,
};
pub use error::{PeerError, PolicyError, ValueError};
pub use mask::{BlockStore, Layout, TermMask, runs_of};
pub use model::{
    Action, Clause, Match, Policy, PolicyName, PolicySummary, Rule, Scope, ServiceAccountMatch,
    StringMatch, port,
};
pub use peer::Peer;
pub use reference::{Connection, Decision, evaluate, evaluate_with_dry_run};
pub use ringfence_bpf_common::Reason;
pub use store::{
    Affected, Mode, PolicyChange, PolicyStore, RejectedPolicy, STATIC_STRICT, WorkloadPolicies,
};
pub use tables::Tables;
pub use trace::{Miss, RuleTrace, Why, trace};
