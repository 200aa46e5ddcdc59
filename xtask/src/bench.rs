//! `cargo xtask bench`: one subcommand for each part that has figures.

mod identity;
mod mesh;
mod policy;

use std::process::ExitCode;

use anyhow::Result;

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
#[group(skip)]
pub struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    mesh: mesh::Arguments,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// No mesh beside mesh, as ratios (what `bench` alone measures)
    Mesh(mesh::Arguments),
    /// Handshakes by key type and key exchange, the verifier alone, memory of SVIDs
    Identity(identity::Arguments),
    /// Verdicts in the kernel, cost of policies, time from a push to enforcement
    Policy(policy::Arguments),
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.what {
        None => mesh::run(&arguments.mesh),
        Some(What::Mesh(arguments)) => mesh::run(arguments),
        Some(What::Identity(arguments)) => identity::run(arguments),
        Some(What::Policy(arguments)) => policy::run(arguments),
    }
}
