//! `cargo xtask bench mesh`: the same load without and with the mesh, side by side in one run.
//!
//! Every round brings up a lab without a mesh, measures, takes it down, and does the same
//! with the mesh; medians over the rounds are reported. The network is a veth on one
//! machine, both nodes and the load generator share its cores: the ratios say something, the
//! absolute figures little.

mod measure;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ringfence_lab::{Lab, LabConfig, LabId, RecordLayer};
use serde::Serialize;

use crate::build::ringfence;
use crate::lab::Layer;
use crate::setup::{BENCH, LAB, ensure_programs};
use crate::ui;
use measure::Figures;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Rounds, each once without and once with the mesh
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Who protects the records
    #[arg(long, value_enum, default_value_t = Layer::Auto)]
    record_layer: Layer,
    /// The result as JSON on standard output
    #[arg(long)]
    json: bool,
    /// Use this `ringfence` instead of building one
    #[arg(long, value_name = "FILE")]
    binary: Option<std::path::PathBuf>,
}

#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    cores: usize,
    record_layer: String,
    record_layer_reason: String,
    rounds: usize,
    seconds: u32,
    without_mesh: Figures,
    with_mesh: Figures,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    ensure!(
        arguments.rounds > 0 && arguments.seconds > 0,
        "at least one round of one second"
    );
    ensure_programs(&[LAB, BENCH].concat())?;
    let binary = match &arguments.binary {
        Some(binary) => binary.canonicalize().context("--binary")?,
        None => ringfence()?,
    };
    let (mut without, mut with) = (Vec::new(), Vec::new());
    let mut record_layer = None;
    for round in 1..=arguments.rounds {
        for mesh in [false, true] {
            let which = if mesh {
                "with the mesh"
            } else {
                "without a mesh"
            };
            let progress =
                ui::Progress::start(&format!("round {round} of {}, {which}", arguments.rounds));
            let figures = one_round(mesh.then_some(&binary), arguments);
            progress.stop();
            let (figures, layer) = figures?;
            ui::line(format!("round {round}, {which}: {}", figures.line()));
            record_layer = layer.or(record_layer);
            if mesh {
                with.push(figures)
            } else {
                without.push(figures)
            }
        }
    }
    let (record_layer, record_layer_reason) = record_layer.context("no round with the mesh")?;
    let report = Report {
        kernel: nix::sys::utsname::uname()?
            .release()
            .to_string_lossy()
            .into_owned(),
        cores: std::thread::available_parallelism()?.get(),
        record_layer,
        record_layer_reason,
        rounds: arguments.rounds,
        seconds: arguments.seconds,
        without_mesh: Figures::medians(&without),
        with_mesh: Figures::medians(&with),
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        report.print();
    }
    Ok(ExitCode::SUCCESS)
}

/// Figures, and mode and reason of the record layer when there is a mesh.
fn one_round(
    binary: Option<&std::path::PathBuf>,
    arguments: &Arguments,
) -> Result<(Figures, Option<(String, String)>)> {
    let id = LabId::for_run_of("bench");
    let mut config = LabConfig::new(id.clone(), binary.cloned());
    config.record_layer = RecordLayer::from(arguments.record_layer);
    config.patience = Duration::from_secs(60);
    // A line per connection would be measured, too.
    config.log = "warn".into();
    let result =
        Lab::up(&config).and_then(|lab| measured(&lab, binary.map(|b| b.as_path()), arguments));
    ringfence_lab::down(&id)?;
    result
}

fn measured(
    lab: &Lab,
    binary: Option<&Path>,
    arguments: &Arguments,
) -> Result<(Figures, Option<(String, String)>)> {
    let figures = Figures::measure(lab, arguments.seconds)?;
    if binary.is_none() {
        return Ok((figures, None));
    }
    let node = lab
        .topology()
        .nodes
        .first()
        .context("a lab without nodes")?;
    let layer = lab.status(&node.name)?.record_layer;
    Ok((figures, Some((layer.mode, layer.reason))))
}

impl Report {
    fn print(&self) {
        println!(
            "\nkernel {}, {} cores, medians of {} rounds of {} s; records protected by: {} ({})\n",
            self.kernel,
            self.cores,
            self.rounds,
            self.seconds,
            self.record_layer,
            self.record_layer_reason
        );
        println!("{:<44} {:>14} {:>14} {:>8}", "", "no mesh", "mesh", "ratio");
        let rows = self
            .without_mesh
            .rows()
            .into_iter()
            .zip(self.with_mesh.rows());
        for ((name, plain, show), (_, mesh, _)) in rows {
            let text = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), show);
            let ratio = match (plain, mesh) {
                (Some(plain), Some(mesh)) if plain > 0.0 => format!("{:.2}", mesh / plain),
                _ => "–".to_owned(),
            };
            println!(
                "{name:<44} {:>14} {:>14} {ratio:>8}",
                text(plain),
                text(mesh)
            );
        }
    }
}
