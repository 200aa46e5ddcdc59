//! The two evaluators side by side: every table test runs through the reference and
//! through the compiled tables, and the oracle holds them against each other on
//! generated policies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod closed;
mod examples;
mod harness;
mod identities;
mod oracle;
mod semantics;
mod trace;
