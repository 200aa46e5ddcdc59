//! `cargo xtask demo`: the lab, real traffic, and one table of what was observed.

mod addresses;
mod identities;
mod outside;
mod refusals;
mod report;
pub mod traffic;
mod wire;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ringfence_lab::{Lab, LabConfig, LabId, kernel_view};

use crate::build::ringfence;
use crate::setup::{LAB, ensure_kernel, ensure_programs};
use crate::{ui, vm};
use report::{Report, Rows};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Run on this kernel, whatever it offers, instead of in a guest
    #[arg(long)]
    here: bool,
    /// The result as JSON on standard output
    #[arg(long)]
    json: bool,
    /// Run in a guest with this kernel (6.1, 6.12 or 7.2), even where kTLS is at hand
    #[arg(long, conflicts_with = "here")]
    kernel: Option<String>,
    /// Use this `ringfence` instead of building one
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

/// What the guest runs: see [`in_guest`].
#[derive(Debug, clap::Args)]
pub struct GuestArguments {
    #[arg(long)]
    binary: PathBuf,
    #[arg(long)]
    megabytes: u64,
}

const DEFAULT_GUEST: &str = "6.12";
const MEGABYTES_HERE: u64 = 200;
const MEGABYTES_IN_GUEST: u64 = 20;

/// What the rows work with.
struct Demo {
    lab: Lab,
    /// Size of the large transfer.
    megabytes: u64,
    /// Patience for things that should happen at once; emulation is slow.
    patience: Duration,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let kernel = uname();
    let missing = kernel_view::kernel_tls_missing();
    let guest = match (&arguments.kernel, &missing) {
        (Some(series), _) => Some(series.clone()),
        (None, Some(_)) if !arguments.here => Some(DEFAULT_GUEST.to_owned()),
        _ => None,
    };
    match (&guest, &missing) {
        (Some(series), Some(reason)) => {
            ui::line(format!(
                "This kernel ({kernel}) cannot protect TLS records: {reason}."
            ));
            ui::line(format!(
                "So the demo runs in a guest with kernel {series} under software emulation; \
                 `--here` runs it on this kernel, with the records protected in software."
            ));
        }
        (Some(series), None) => ui::line(format!("The demo runs in a guest with kernel {series}.")),
        (None, Some(reason)) => ui::line(format!(
            "Records are protected in SOFTWARE, because this kernel ({kernel}) cannot: {reason}."
        )),
        (None, None) => ui::line(format!("This kernel ({kernel}) protects the records.")),
    }
    ensure_programs(LAB)?;
    let binary = match &arguments.binary {
        Some(binary) => binary.canonicalize().context("--binary")?,
        None => ringfence()?,
    };
    let report = match guest {
        Some(series) => in_guest(&series, &binary, arguments.json)?,
        None => here(
            &binary,
            MEGABYTES_HERE,
            Duration::from_secs(60),
            arguments.json,
        )?,
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{}", report.summary());
    }
    Ok(if report.passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The part that runs inside the guest; the report goes to the host as JSON.
pub fn run_as_guest(arguments: &GuestArguments) -> Result<ExitCode> {
    let report = here(
        &arguments.binary,
        arguments.megabytes,
        Duration::from_secs(240),
        false,
    )?;
    std::fs::write(vm::REPORT, serde_json::to_string(&report)?)?;
    Ok(if report.passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn in_guest(series: &str, binary: &Path, quiet: bool) -> Result<Report> {
    ensure_programs(crate::setup::GUEST)?;
    let kernel = ensure_kernel(series)?;
    ui::line(format!("booting kernel {}", kernel.release));
    let program = "/usr/local/bin/ringfence";
    let megabytes = MEGABYTES_IN_GUEST.to_string();
    let command = [
        vm::OWN_PROGRAM,
        "guest-demo",
        "--binary",
        program,
        "--megabytes",
        &megabytes,
    ];
    let mut guest = vm::Guest::new(series, command.map(str::to_owned).to_vec());
    guest.with_xtask = true;
    guest.files = vec![(binary.to_owned(), program.to_owned())];
    guest.timeout = Duration::from_secs(900);
    let mut output = String::new();
    let ended = guest.run(|line| {
        output.push_str(line);
        output.push('\n');
        if !quiet {
            println!("{line}");
        }
    })?;
    ensure!(
        !ended.report.is_empty(),
        "the demo in the guest ended with {} and without a report; its last lines:\n{}",
        ended.code,
        ui::last_lines(&output, 40)
    );
    let report: Report =
        serde_json::from_str(&ended.report).context("reading the guest's report")?;
    ensure!(
        report.passed() == (ended.code == 0),
        "the guest's exit code {} contradicts its report",
        ended.code
    );
    Ok(report)
}

fn here(binary: &Path, megabytes: u64, patience: Duration, quiet: bool) -> Result<Report> {
    let mut config = LabConfig::new(LabId::for_run_of("demo"), Some(binary.to_owned()));
    config.blob_bytes = megabytes << 20;
    config.patience = patience;
    let progress = ui::Progress::start("bringing the lab up");
    let lab = Lab::up(&config);
    progress.stop();
    let id = config.id.clone();
    let result = lab.and_then(|lab| {
        let node = lab
            .topology()
            .nodes
            .first()
            .context("a lab without nodes")?
            .name
            .clone();
        let record_layer = lab.status(&node)?.record_layer;
        let mut rows = Rows::new(quiet);
        rows.heading(&format!(
            "kernel {}, two nodes, records protected by: {} ({})",
            uname(),
            record_layer.mode,
            record_layer.reason
        ));
        let mut demo = Demo {
            lab,
            megabytes,
            patience: patience / 2,
        };
        demo.all_rows(&mut rows, &record_layer.mode);
        Ok(Report {
            kernel: uname(),
            record_layer: record_layer.mode,
            record_layer_reason: record_layer.reason,
            rows: rows.finish(),
        })
    });
    if let Ok(report) = &result
        && !report.passed()
        && !quiet
    {
        print_logs(&id);
    }
    ringfence_lab::down(&id)?;
    result
}

impl Demo {
    fn all_rows(&mut self, rows: &mut Rows, mode: &str) {
        // The capture sees the first connections, and with them the handshakes.
        let wire = wire::Listening::start(&self.lab);
        self.small_traffic(rows);
        self.wire(rows, wire);
        self.bulk_traffic(rows);
        self.kernel_sockets(rows, mode);
        self.addresses(rows);
        self.identities(rows);
        self.policy_refusal(rows);
        self.plaintext(rows);
        self.outside_destinations(rows);
    }
}

/// The ends of the agents' logs, for a failed demo whose lab is about to go.
fn print_logs(id: &LabId) {
    let Ok(lab) = Lab::open(id) else { return };
    for node in &lab.topology().nodes {
        println!("\nthe end of the log of the agent on {}:", node.name);
        println!("{}", ui::tail(&lab.log(&node.name), 25));
    }
}

fn uname() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_else(|_| "unknown".into())
}
