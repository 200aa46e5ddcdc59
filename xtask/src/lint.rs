//! `cargo xtask lint`: formatting, clippy, licences and bans.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};

use crate::build::{cargo, workspace};
use crate::setup::{ensure_cargo_deny, ensure_ebpf_toolchain};
use crate::test::tally::{Outcome, Tally};
use crate::ui;

const SUITE: &str = "lint";

pub fn run() -> Result<ExitCode> {
    let mut tally = Tally::default();
    checks(&mut tally)?;
    Ok(tally.finish())
}

/// Each check is one entry of the tally.
pub fn checks(tally: &mut Tally) -> Result<()> {
    ensure_ebpf_toolchain()?;
    let cargo_deny = ensure_cargo_deny()?;
    check(
        tally,
        "cargo fmt",
        cargo()?.args(["fmt", "--all", "--check"]),
    )?;
    check(
        tally,
        "cargo fmt, eBPF programs",
        cargo()?.args([
            "fmt",
            "--all",
            "--check",
            "--manifest-path",
            "bpf/Cargo.toml",
        ]),
    )?;
    check(
        tally,
        "cargo clippy",
        cargo()?.args([
            "clippy",
            "--quiet",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ]),
    )?;
    check(
        tally,
        "cargo deny: licences, bans, sources",
        deny(&cargo_deny).args([
            "--log-level",
            "error",
            "check",
            "--hide-inclusion-graph",
            "licenses",
            "bans",
            "sources",
        ]),
    )?;
    advisories(tally, &cargo_deny)
}

fn check(tally: &mut Tally, name: &str, command: &mut Command) -> Result<()> {
    ui::line(format!("{name}: {}", ui::command_line(command)));
    let output = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .with_context(|| format!("starting {name}"))?
        .wait_with_output()?;
    let outcome = if output.status.success() {
        Outcome::Passed
    } else {
        Outcome::Failed(format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            output.status
        ))
    };
    tally.add(SUITE, name, outcome);
    Ok(())
}

/// The advisory database is fetched from the network, which a machine may not have: that is
/// a skip with its reason, unlike an advisory that applies.
fn advisories(tally: &mut Tally, cargo_deny: &Path) -> Result<()> {
    let name = "cargo deny: advisories";
    let progress = ui::Progress::start(name);
    let fetched = deny(cargo_deny)
        .args(["fetch", "db"])
        .stdin(Stdio::null())
        .output();
    progress.stop();
    let fetched = fetched.context("starting cargo-deny")?;
    if fetched.status.success() {
        return check(
            tally,
            name,
            deny(cargo_deny).args([
                "--log-level",
                "error",
                "check",
                "--disable-fetch",
                "advisories",
            ]),
        );
    }
    let text = String::from_utf8_lossy(&fetched.stderr);
    let reason = text
        .lines()
        .map(str::trim)
        .rfind(|line| !line.is_empty())
        .unwrap_or("no message");
    tally.add(
        SUITE,
        name,
        Outcome::Skipped(format!("the advisory database cannot be fetched: {reason}")),
    );
    Ok(())
}

fn deny(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(workspace()).arg("--color=never");
    command
}
