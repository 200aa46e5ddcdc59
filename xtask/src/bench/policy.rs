//! `cargo xtask bench policy`: what a verdict costs in the kernel however many policies there
//! are, what policies cost to compile and keep, and how long a change takes to be enforced.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{build, setup, ui};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Fewer rounds and policies: to see that it works, not for figures
    #[arg(long)]
    quick: bool,
    /// The result as JSON on standard output
    #[arg(long)]
    json: bool,
    /// Hold the kernel against the reference evaluator over so many generated pairs of
    /// policies and connection as well
    #[arg(long, value_name = "PAIRS")]
    oracle: Option<u64>,
    /// Use this `ringfence` instead of building one
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the benchmark loads eBPF programs and makes network namespaces: run it as root"
    );
    setup::ensure_ebpf_toolchain()?;
    let quick = arguments.quick.then_some("--quick");
    ui::line("verdicts in the kernel");
    let mut command = build::cargo()?;
    command
        .args(["bench", "--locked", "--package", "ringfence-datapath"])
        .args(["--bench", "verdict", "--"])
        .args(quick);
    let verdicts: Verdicts = printed(&output(command)?)?;

    ui::line("from a push to enforcement");
    let binary = match &arguments.binary {
        Some(binary) => binary.canonicalize().context("--binary")?,
        None => build::ringfence()?,
    };
    let mut command = build::cargo()?;
    command
        .args(["bench", "--locked", "--package", "ringfence-xds"])
        .args(["--bench", "push", "--"])
        .args(quick)
        .env("RINGFENCE_BIN", binary);
    let push: Push = printed(&output(command)?)?;

    let oracle = arguments.oracle.map(oracle).transpose()?;
    let report = Report {
        kernel: nix::sys::utsname::uname()?
            .release()
            .to_string_lossy()
            .into_owned(),
        cores: std::thread::available_parallelism()?.get(),
        verdicts,
        push,
        oracle,
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.text());
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs the test that compares the evaluators, which prints what it did.
fn oracle(pairs: u64) -> Result<String> {
    ui::line(format!("{pairs} pairs of policies and connection"));
    let mut command = build::cargo()?;
    command
        .args([
            "test",
            "--locked",
            "--release",
            "--package",
            "ringfence-datapath",
        ])
        .args(["--test", "oracle", "--", "--nocapture"])
        .env("RINGFENCE_ORACLE_PAIRS", pairs.to_string());
    let output = output(command)?;
    // The name of the test may be in front of it.
    let line = output.lines().find_map(|line| line.split_once("oracle: "));
    let (_, result) = line.context("the comparison printed no result")?;
    Ok(result.to_owned())
}

/// Standard output of a command that has to succeed.
fn output(mut command: Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting cargo")?
        .wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "`{}` ended with {}:\n{}",
        ui::command_line(&command),
        output.status,
        ui::last_lines(&text, 20)
    );
    Ok(text)
}

fn printed<T: for<'a> Deserialize<'a>>(output: &str) -> Result<T> {
    serde_json::from_str(output).with_context(|| {
        format!(
            "the benchmark printed no result:\n{}",
            ui::last_lines(output, 10)
        )
    })
}

#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    cores: usize,
    verdicts: Verdicts,
    push: Push,
    #[serde(skip_serializing_if = "Option::is_none")]
    oracle: Option<String>,
}

/// What `daemon/datapath/benches/verdict` prints.
#[derive(Debug, Serialize, Deserialize)]
struct Verdicts {
    rounds: usize,
    /// Over 100 workloads with policies of their own; by identity and port.
    spread: Vec<Verdict>,
    /// The same, a quarter with an address block.
    spread_with_blocks: Vec<Verdict>,
    /// The same, these blocks of every length from /8 to /32, one inside the other.
    spread_with_lengths: Vec<Verdict>,
    one_workload: Vec<Verdict>,
    one_workload_with_blocks: Vec<Verdict>,
    one_workload_with_lengths: Vec<Verdict>,
    /// Policies of which each dimension alone lets half through, and all together none.
    one_workload_worst: Vec<Verdict>,
    costs: Vec<Costs>,
}

/// Nanoseconds a verdict, medians.
#[derive(Debug, Serialize, Deserialize)]
struct Verdict {
    policies: usize,
    workloads: usize,
    /// The first policy of the workload admits.
    first_ns: Option<f64>,
    /// The last one does.
    last_ns: Option<f64>,
    /// None does.
    none_ns: Option<f64>,
}

/// Policies of one workload, with address blocks in a quarter of them, or five in each.
#[derive(Debug, Serialize, Deserialize)]
struct Costs {
    policies: usize,
    /// Address blocks that they name.
    prefixes: usize,
    terms: usize,
    compile_seconds: f64,
    /// The mask of one more identity.
    identity_seconds: f64,
    install_seconds: f64,
    blocks: u32,
    sources: usize,
    ports: usize,
    /// As the kernel accounts for them, and the blocks in use.
    map_bytes: u64,
}

/// What `daemon/xds/benches/push` prints.
#[derive(Debug, Serialize, Deserialize)]
struct Push {
    policies: usize,
    workloads: usize,
    pods: usize,
    changes: usize,
    first_sync_seconds: f64,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

impl Report {
    fn text(&self) -> String {
        let Verdicts { rounds, costs, .. } = &self.verdicts;
        let mut lines = vec![
            String::new(),
            format!(
                "kernel {}, {} cores, medians of {rounds} rounds",
                self.kernel, self.cores
            ),
        ];
        let tables = [
            (
                "policies over 100 workloads, by identity and port",
                &self.verdicts.spread,
            ),
            (
                "the same, a quarter with an address block",
                &self.verdicts.spread_with_blocks,
            ),
            (
                "the same, a quarter with an address block of any length from /8 to /32",
                &self.verdicts.spread_with_lengths,
            ),
            (
                "all on one workload, by identity and port",
                &self.verdicts.one_workload,
            ),
            (
                "the same, a quarter with an address block",
                &self.verdicts.one_workload_with_blocks,
            ),
            (
                "the same, a quarter with an address block of any length from /8 to /32",
                &self.verdicts.one_workload_with_lengths,
            ),
            (
                "the worst on one workload: each dimension lets half through, all together none",
                &self.verdicts.one_workload_worst,
            ),
        ];
        for (title, verdicts) in tables {
            lines.push(String::new());
            lines.push(format!("{title}; ns a verdict in the kernel:"));
            lines.push(format!(
                "{:>10} {:>12} {:>12} {:>12}",
                "policies", "first", "last", "none"
            ));
            let ns = |ns: Option<f64>| ns.map_or("–".to_owned(), |ns| format!("{ns:.0}"));
            lines.extend(verdicts.iter().map(|v| {
                let [first, last, none] = [v.first_ns, v.last_ns, v.none_ns].map(ns);
                format!("{:>10} {first:>12} {last:>12} {none:>12}", v.policies)
            }));
            if let Some(growth) = growth(verdicts) {
                lines.push(format!("{growth:.2} times from the fewest to the most"));
            }
        }
        lines.extend([String::new(), "policies of one workload:".to_owned()]);
        lines.extend(costs.iter().map(|of| {
            format!(
                "{:>10} policies, {} address blocks: compiled in {:.1} ms, installed in {:.1} ms, \
                 {:.0} KiB of maps; one more identity {:.1} µs",
                of.policies,
                of.prefixes,
                of.compile_seconds * 1e3,
                of.install_seconds * 1e3,
                of.map_bytes as f64 / 1024.0,
                of.identity_seconds * 1e6
            )
        }));
        let push = &self.push;
        lines.extend([
            String::new(),
            format!(
                "one policy changed, with {} policies and {} workloads loaded, from the push to \
                 the kernel's verdict ({} changes):",
                push.policies, push.workloads, push.changes
            ),
            format!(
                "    p50 {:.1} ms, p99 {:.1} ms, slowest {:.1} ms; all of it loaded in {:.1} s",
                push.p50_ms, push.p99_ms, push.max_ms, push.first_sync_seconds
            ),
        ]);
        lines.extend(self.oracle.iter().map(|line| format!("\n{line}")));
        lines.join("\n") + "\n"
    }
}

/// How many times as long the most policies take as the fewest, in the worst column.
fn growth(verdicts: &[Verdict]) -> Option<f64> {
    let (few, many) = (verdicts.first()?, verdicts.last()?);
    let columns = [
        (few.first_ns, many.first_ns),
        (few.last_ns, many.last_ns),
        (few.none_ns, many.none_ns),
    ];
    let ratios = columns
        .into_iter()
        .filter_map(|(few, many)| Some(many? / few?));
    ratios.max_by(f64::total_cmp)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(policies: usize, first_ns: f64, none_ns: Option<f64>) -> Verdict {
        Verdict {
            policies,
            workloads: 1,
            first_ns: Some(first_ns),
            last_ns: None,
            none_ns,
        }
    }

    #[test]
    fn growth_is_that_of_the_worst_column() {
        let verdicts = [
            verdict(1, 40.0, Some(30.0)),
            verdict(10, 400.0, None),
            verdict(100, 44.0, Some(45.0)),
        ];
        assert_eq!(growth(&verdicts), Some(1.5));
        assert_eq!(growth(&[]), None);
    }

    #[test]
    fn what_the_benchmarks_print_is_read() -> Result<()> {
        let push: Push = printed(
            r#"{"policies":10000,"workloads":10000,"pods":10,"changes":200,
                "first_sync_seconds":1.5,"p50_ms":2.5,"p99_ms":9.0,"max_ms":11.0}"#,
        )?;
        assert_eq!((push.changes, push.p99_ms), (200, 9.0));
        assert!(printed::<Push>("thread main panicked").is_err());
        Ok(())
    }
}
