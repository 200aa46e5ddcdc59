//! `ringfence`: the agent, the embedded control plane and the tools around them.

mod admin;
mod agent;
mod authz;
mod cli;
mod config;
mod status;
mod sys;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
