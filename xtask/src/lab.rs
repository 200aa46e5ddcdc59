//! `cargo xtask lab`: the lab for hands-on work.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Subcommand, ValueEnum};
use ringfence_lab::topology::{PodSpec, Role, WEB_VIP};
use ringfence_lab::{Lab, LabConfig, LabId, RecordLayer, down};

use crate::build::ringfence;
use crate::setup::{LAB, ensure_programs};
use crate::ui;

#[derive(Debug, Subcommand)]
pub enum Action {
    /// Bring the lab up: nodes, pods, programs, control plane, agents
    Up {
        /// Nodes, 2 to 4
        #[arg(long, default_value_t = 2)]
        nodes: usize,
        /// Pods as name[@node],… instead of client, intruder, outside, web and legacy
        #[arg(long)]
        pods: Option<String>,
        /// Who protects the records
        #[arg(long, value_enum, default_value_t = Layer::Auto)]
        record_layer: Layer,
        /// A network without a mesh, for comparison
        #[arg(long)]
        no_mesh: bool,
        /// Use this `ringfence` instead of building one
        #[arg(long, value_name = "FILE")]
        binary: Option<PathBuf>,
        /// Log filter of the agents and the control plane
        #[arg(long, default_value = "info")]
        log: String,
    },
    /// Run a command in a pod or on a node, and pass its exit code on
    Exec {
        pod: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Show who is where, and what each agent says
    Status,
    /// Remove everything the lab made, also after a crash
    Down,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Layer {
    Auto,
    Kernel,
    Software,
}

impl From<Layer> for RecordLayer {
    fn from(layer: Layer) -> Self {
        match layer {
            Layer::Auto => RecordLayer::Auto,
            Layer::Kernel => RecordLayer::Kernel,
            Layer::Software => RecordLayer::Software,
        }
    }
}

pub fn run(action: Action) -> Result<ExitCode> {
    let id = LabId::hands_on();
    match action {
        Action::Up {
            nodes,
            pods,
            record_layer,
            no_mesh,
            binary,
            log,
        } => {
            ensure_programs(LAB)?;
            let binary = match (no_mesh, binary) {
                (true, _) => None,
                (false, Some(binary)) => Some(binary.canonicalize().context("--binary")?),
                (false, None) => Some(ringfence()?),
            };
            let pods = match pods {
                Some(list) => PodSpec::parse_list(&list, nodes)?,
                None => PodSpec::defaults(nodes),
            };
            let mut config = LabConfig::new(id, binary);
            (config.nodes, config.pods) = (nodes, pods);
            (config.record_layer, config.log) = (record_layer.into(), log);
            let progress = ui::Progress::start("bringing the lab up");
            let lab = Lab::up(&config);
            progress.stop();
            print_summary(&lab?)?;
            Ok(ExitCode::SUCCESS)
        }
        Action::Exec { pod, command } => exec(&id, &pod, &command),
        Action::Status => status(&id),
        Action::Down => {
            down(&id)?;
            ui::line("the lab is down");
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn exec(id: &LabId, place: &str, command: &[String]) -> Result<ExitCode> {
    let lab = Lab::open(id)?;
    let netns = match lab.node(place) {
        Ok(node) => node.netns(),
        Err(_) => lab.pod(place)?.netns(),
    };
    let (program, arguments) = command.split_first().context("no command")?;
    let status = netns
        .command(program)?
        .args(arguments)
        .status()
        .with_context(|| format!("starting {program} in {place}"))?;
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

fn status(id: &LabId) -> Result<ExitCode> {
    let lab = Lab::open(id)?;
    print_pods(&lab)?;
    let mut code = ExitCode::SUCCESS;
    if lab.mesh().is_err() {
        println!("\nno mesh");
        return Ok(code);
    }
    println!();
    for node in &lab.topology().nodes {
        match lab.status(&node.name) {
            Ok(status) => {
                let state = if status.ready {
                    "ready".to_owned()
                } else {
                    status.why_not_ready()
                };
                println!(
                    "agent of {}: {state}; records: {} ({}); {} live streams; socket {}",
                    node.name,
                    status.record_layer.mode,
                    status.record_layer.reason,
                    status.streams.len(),
                    lab.agent_socket(&node.name).display()
                );
            }
            Err(error) => {
                println!("agent of {}: {error:#}", node.name);
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

fn print_summary(lab: &Lab) -> Result<()> {
    print_pods(lab)?;
    match lab.topology().nodes.first() {
        Some(node) if lab.mesh().is_ok() => print_mesh(lab, &node.name)?,
        _ => println!("\nNo mesh: pods reach each other directly."),
    }
    println!("\nNow try:");
    for hint in hints(lab) {
        println!("  cargo xtask lab {hint}");
    }
    Ok(())
}

fn print_mesh(lab: &Lab, node: &str) -> Result<()> {
    let (vip4, vip6) = WEB_VIP;
    let layer = lab.status(node)?.record_layer;
    println!(
        "\nThe service web is at {vip4} and {vip6}: ports 80 and 8080 (nginx), 6379 (redis), 5201 (iperf3).
Records are protected by: {} ({}).
Policies: {} (read again when it changes). Logs: {}/*.log
More: ringfence status --socket {}",
        layer.mode,
        layer.reason,
        lab.mesh_file().display(),
        lab.dir().display(),
        lab.agent_socket(node).display()
    );
    Ok(())
}

/// Commands that work with the pods that are there.
fn hints(lab: &Lab) -> Vec<String> {
    let mesh = lab.mesh().is_ok();
    let mut hints = Vec::new();
    if let Ok(web) = lab.pod("web") {
        let direct = web.addresses.0.to_string();
        let service = if mesh {
            WEB_VIP.0.to_string()
        } else {
            direct.clone()
        };
        let mut add = |pod: &str, command: String| {
            if lab.pod(pod).is_ok() {
                hints.push(format!("exec {pod} -- {command}"));
            }
        };
        add("client", format!("curl -s http://{service}:8080/"));
        add("client", format!("redis-cli -h {service} ping"));
        add("client", format!("iperf3 -c {service}"));
        if mesh {
            add(
                "intruder",
                format!("curl -sS http://{service}:8080/    # refused: policy"),
            );
            add(
                "outside",
                format!("curl -sS http://{direct}:8080/    # refused: plaintext"),
            );
        }
    }
    hints.extend(["status", "down"].map(str::to_owned));
    hints
}

fn print_pods(lab: &Lab) -> Result<()> {
    println!(
        "{:<12} {:<8} {:<13} {:<12} {:<26} namespace",
        "pod", "node", "IPv4", "IPv6", "what it is"
    );
    for pod in &lab.topology().pods {
        let what = match (pod.spec.role, pod.spec.serves) {
            (Role::Mesh, true) => "in the mesh, serves",
            (Role::Mesh, false) => "in the mesh",
            (Role::Legacy, _) => "outside the mesh, serves",
            (Role::Outside, _) => "outside the mesh, unknown",
        };
        println!(
            "{:<12} {:<8} {:<13} {:<12} {:<26} {}",
            pod.name(),
            lab.topology().node_of(pod)?.name,
            pod.addresses.0.to_string(),
            pod.addresses.1.to_string(),
            what,
            pod.netns().name()
        );
    }
    Ok(())
}
