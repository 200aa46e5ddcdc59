//! The command line.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use ringfence_control_plane::RotationStep;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::config::AgentConfig;
use crate::{admin, agent, authz, status};

/// A per-node zero-trust security plane: transparent mutual TLS with kernel records,
/// L4 authorization in eBPF.
#[derive(Debug, Parser)]
#[command(name = "ringfence", version, propagate_version = true)]
struct Cli {
    /// What to log: a level, or `target=level` pairs as in RUST_LOG.
    #[arg(long, global = true, env = "RINGFENCE_LOG", default_value = "info")]
    log: String,
    /// Log as JSON, one object a line.
    #[arg(long, global = true)]
    log_json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node's agent: enrol pods, make tunnels, fill the kernel's tables.
    Agent {
        /// The agent's YAML file.
        #[arg(long, short)]
        config: PathBuf,
        /// Check the file and exit.
        #[arg(long)]
        check: bool,
    },
    /// Run the embedded control plane: a CA and xDS, served from one YAML file.
    ControlPlane {
        /// The mesh file. It is read again when it changes.
        #[arg(long, short)]
        config: PathBuf,
        /// Check the file and exit.
        #[arg(long)]
        check: bool,
    },
    /// Exchange the embedded CA's root in steps that lose nothing: `prepare`, then `switch`,
    /// then `finish`. `status` says where a rotation stands and what comes next.
    RotateRoot {
        /// The mesh file, which names the state directory.
        #[arg(long, short)]
        config: PathBuf,
        /// The step to take. Each may be repeated.
        #[arg(value_enum)]
        step: Step,
        /// Do not wait until every certificate of the last step has been refreshed.
        /// Peers that still have the old bundle are cut off.
        #[arg(long)]
        force: bool,
    },
    /// Show what an agent is doing.
    Status {
        /// The agent's admin socket.
        #[arg(long, default_value = "/run/ringfence/agent.sock")]
        socket: PathBuf,
        /// As JSON.
        #[arg(long, conflicts_with = "metrics")]
        json: bool,
        /// The metrics, in OpenMetrics text, instead.
        #[arg(long)]
        metrics: bool,
    },
    /// Show the certificates an agent holds, and the time they have left.
    Certs {
        /// The agent's admin socket.
        #[arg(long, default_value = "/run/ringfence/agent.sock")]
        socket: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show which policies decide about connections to the workloads of this node.
    Policies(authz::PoliciesCommand),
    /// Explain decisions, try manifests without applying them, show verdicts.
    #[command(subcommand)]
    Authz(authz::AuthzCommand),
    /// Remove what an agent pinned in the kernel: interception and enforcement end. Pods
    /// that were enrolled send plaintext from then on.
    Uninstall {
        /// The agent's `pin_dir`.
        #[arg(long, default_value = "/sys/fs/bpf/ringfence")]
        pin_dir: PathBuf,
    },
}

/// A step of a root rotation.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Step {
    /// Make the next root: bundles hold both, the old one still signs.
    Prepare,
    /// Sign with the new root; bundles hold both.
    Switch,
    /// Drop the old root and destroy its key.
    Finish,
    /// Change nothing, say where the rotation stands.
    Status,
}

impl From<Step> for RotationStep {
    fn from(step: Step) -> Self {
        match step {
            Step::Prepare => RotationStep::Prepare,
            Step::Switch => RotationStep::Switch,
            Step::Finish => RotationStep::Finish,
            Step::Status => RotationStep::Status,
        }
    }
}

/// Parses the command line and runs it.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let result = start_log(&cli).and_then(|()| {
        tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .context("cannot start the runtime")?
            .block_on(dispatch(cli.command))
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringfence: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start_log(cli: &Cli) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&cli.log)
        .with_context(|| format!("--log {}: expected a level (info) or target=level", cli.log))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if cli.log_json {
        log.json().init()
    } else {
        log.init()
    }
    Ok(())
}

async fn dispatch(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Agent { config, check } => {
            let loaded = AgentConfig::load(&config)?;
            if check {
                println!("{}: good", config.display());
                return Ok(());
            }
            keep_out_of_core_dumps();
            agent::run(loaded, &config, shutdown_signal()?).await
        }
        Command::ControlPlane { config, check } => control_plane(&config, check).await,
        Command::RotateRoot {
            config,
            step,
            force,
        } => {
            let rotate = move || ringfence_control_plane::rotate(&config, step.into(), force);
            let report = tokio::task::spawn_blocking(rotate).await??;
            print(&report.to_string())
        }
        Command::Status {
            socket,
            json,
            metrics,
        } => {
            let text = if metrics {
                String::from_utf8_lossy(&admin::get(&socket, "/metrics").await?).into_owned()
            } else {
                let status = admin::fetch_status(&socket).await?;
                if json {
                    serde_json::to_string_pretty(&status)?
                } else {
                    status.page()
                }
            };
            print(&text)
        }
        Command::Certs { socket, json } => {
            let svids = admin::fetch_status(&socket).await?.svids;
            print(&if json {
                serde_json::to_string_pretty(&svids)?
            } else {
                status::certificates(&svids)
            })
        }
        Command::Policies(command) => authz::policies(command).await,
        Command::Authz(command) => authz::authz(command).await,
        Command::Uninstall { pin_dir } => {
            ringfence_datapath::remove(&pin_dir)?;
            println!("removed {}", pin_dir.display());
            Ok(())
        }
    }
}

async fn control_plane(config: &Path, check: bool) -> anyhow::Result<()> {
    if check {
        let checked = ringfence_control_plane::validate(config)?;
        for warning in &checked.warnings {
            eprintln!("warning: {warning}");
        }
        println!(
            "{}: good ({} nodes, {} workloads, {} services, {} policies)",
            config.display(),
            checked.nodes,
            checked.workloads,
            checked.services,
            checked.policies
        );
        return Ok(());
    }
    keep_out_of_core_dumps();
    let stop = CancellationToken::new();
    let signal = shutdown_signal()?;
    let stopper = stop.clone();
    tokio::spawn(async move {
        signal.await;
        stopper.cancel();
    });
    Ok(ringfence_control_plane::run(config, stop).await?)
}

/// Keys live in this process.
fn keep_out_of_core_dumps() {
    if let Err(error) = ringfence_identity::keep_out_of_dumps() {
        tracing::warn!("{error}");
    }
}

/// Completes on SIGTERM or SIGINT.
fn shutdown_signal() -> anyhow::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// A reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{}", text.trim_end()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}
