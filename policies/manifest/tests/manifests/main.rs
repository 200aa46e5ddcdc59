//! From YAML to verdicts: what is read, what is refused, what it converts to, and how the
//! reference evaluator judges by it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod arbitrary;
mod conversion;
mod examples;
mod harness;
mod modes;
mod reading;
mod refused;
