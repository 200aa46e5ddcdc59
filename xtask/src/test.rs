//! `cargo xtask test`: everything that CI runs.
//!
//! The test programs are built once. All of them run on this host, with the record layer
//! that its kernel offers; those that depend on the kernel run again in a guest per kernel.

mod libtest;
pub mod tally;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::build::{Executable, cargo, executables, workspace};
use crate::setup::{self, GUEST, KERNELS, LAB, cache_dir, ensure_programs};
use crate::{lint, ui, vm};
use libtest::Suite;
use tally::{Entry, Outcome, Tally};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Only what this host can run, without the guests
    #[arg(long)]
    here: bool,
    /// Only the guest with this kernel (repeatable), without this host
    #[arg(long, conflicts_with = "here")]
    kernel: Vec<String>,
    /// Without formatting, clippy and cargo-deny
    #[arg(long)]
    no_lint: bool,
    /// Only suites whose name contains this text
    #[arg(long)]
    only: Option<String>,
}

/// What the guest runs: see [`run_as_guest`].
#[derive(Debug, clap::Args)]
pub struct GuestArguments {
    /// JSON list of suites
    #[arg(long)]
    suites: PathBuf,
}

/// Packages whose tests exercise the kernel; their programs run in every guest.
const KERNEL_PACKAGES: &[&str] = &["daemon/datapath", "ktls-offload", "security-tests"];
/// Suites that work on things which exist once on a machine.
const SERIAL_PACKAGES: &[&str] = &["daemon/datapath", "security-tests"];

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let started = Instant::now();
    let mut tally = Tally::default();
    ensure_programs(LAB)?;
    if !arguments.no_lint && arguments.kernel.is_empty() && arguments.only.is_none() {
        lint::checks(&mut tally)?;
    }
    let (binary, mut suites) = build_suites()?;
    if let Some(text) = &arguments.only {
        suites.retain(|suite| suite.name.contains(text.as_str()));
        ensure!(!suites.is_empty(), "no suite's name contains {text}");
    }
    if arguments.kernel.is_empty() {
        for suite in &suites {
            run_suite(&mut tally, suite)?;
        }
    }
    if !arguments.here {
        let kernels: Vec<&str> = match arguments.kernel.as_slice() {
            [] => KERNELS.to_vec(),
            chosen => chosen.iter().map(String::as_str).collect(),
        };
        for entries in in_guests(&kernels, &suites, &binary)? {
            tally.extend(entries);
        }
    }
    ui::line(format!("took {} s", started.elapsed().as_secs()));
    Ok(tally.finish())
}

/// The part that runs inside a guest; the results go to the host as JSON.
pub fn run_as_guest(arguments: &GuestArguments) -> Result<ExitCode> {
    let suites: Vec<Suite> = serde_json::from_slice(&std::fs::read(&arguments.suites)?)?;
    let mut tally = Tally::default();
    for suite in &suites {
        run_suite(&mut tally, suite)?;
    }
    let entries = tally.entries();
    std::fs::write(vm::REPORT, serde_json::to_string(entries)?)?;
    Ok(ExitCode::SUCCESS)
}

fn run_suite(tally: &mut Tally, suite: &Suite) -> Result<()> {
    let started = Instant::now();
    let before = tally.counts();
    let progress = ui::Progress::start(&suite.name);
    let entries = suite.run();
    progress.stop();
    tally.extend(entries?);
    let after = tally.counts();
    ui::line(format!(
        "{}: {} passed, {} failed, {} skipped ({:.1} s)",
        suite.name,
        after.0 - before.0,
        after.1 - before.1,
        after.2 - before.2,
        started.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// Compiles `ringfence` and every test program. In one go: apart, cargo would choose other
/// features for shared dependencies and compile most of them twice.
fn build_suites() -> Result<(PathBuf, Vec<Suite>)> {
    setup::ensure_ebpf_toolchain()?;
    ui::line("building ringfence and the tests");
    let mut command = cargo()?;
    command.args([
        "build",
        "--workspace",
        "--lib",
        "--bins",
        "--tests",
        "--locked",
    ]);
    let (tests, programs): (Vec<Executable>, Vec<Executable>) =
        executables(command)?.into_iter().partition(|built| {
            built
                .path
                .parent()
                .is_some_and(|folder| folder.ends_with("deps"))
        });
    let binary = programs
        .into_iter()
        .find(|program| program.name == "ringfence")
        .context("cargo built no program `ringfence`")?
        .path;
    let mut suites: Vec<Suite> = tests.iter().map(|test| suite(test, &binary)).collect();
    ensure!(!suites.is_empty(), "cargo built no test programs");
    suites.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((binary, suites))
}

fn suite(executable: &Executable, binary: &Path) -> Suite {
    let package = &executable.package;
    let folder = libtest::folder(&workspace(), package);
    let integration = ["", "/main"].iter().any(|suffix| {
        folder
            .join(format!("tests/{}{suffix}.rs", executable.name))
            .is_file()
    });
    Suite {
        name: libtest::suite_name(package, &executable.name, !integration),
        program: executable.path.clone(),
        folder,
        serial: SERIAL_PACKAGES.contains(&package.as_str()),
        environment: vec![(BINARY.to_owned(), binary.to_string_lossy().into_owned())],
    }
}

/// Tells the end-to-end tests that the processor is emulated, and shared with other guests.
const EMULATED: &str = "RINGFENCE_EMULATED";

/// Tells the end-to-end tests where `ringfence` is.
const BINARY: &str = "RINGFENCE_BIN";

fn depends_on_kernel(suite: &Suite) -> bool {
    let package = suite.name.split(' ').next().unwrap_or_default();
    KERNEL_PACKAGES.contains(&package)
}

/// All guests at once: their tests wait more than they compute.
fn in_guests(kernels: &[&str], suites: &[Suite], binary: &Path) -> Result<Vec<Vec<Entry>>> {
    ensure_programs(GUEST)?;
    for kernel in kernels {
        setup::ensure_kernel(kernel)?;
    }
    std::thread::scope(|scope| {
        let guests: Vec<_> = kernels
            .iter()
            .map(|kernel| scope.spawn(move || in_guest(kernel, suites, binary)))
            .collect();
        guests
            .into_iter()
            .map(|guest| {
                guest
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    })
}

fn in_guest(kernel: &str, suites: &[Suite], binary: &Path) -> Result<Vec<Entry>> {
    let release = setup::ensure_kernel(kernel)?.release;
    let chosen: Vec<&Suite> = suites
        .iter()
        .filter(|suite| depends_on_kernel(suite))
        .collect();
    let program = "/usr/local/bin/ringfence";
    let mut files = vec![(binary.to_owned(), program.to_owned())];
    let mut guest_suites = Vec::new();
    for (number, suite) in chosen.iter().enumerate() {
        let place = format!("/tests/{number}");
        files.push((suite.program.clone(), place.clone()));
        guest_suites.push(Suite {
            name: format!("kernel {kernel}: {}", suite.name),
            program: place.into(),
            folder: "/tmp".into(),
            environment: vec![
                (BINARY.to_owned(), program.to_owned()),
                (EMULATED.to_owned(), "1".to_owned()),
            ],
            serial: true,
        });
    }
    let list = cache_dir()?.join(format!("vm/suites-{kernel}.json"));
    std::fs::write(&list, serde_json::to_vec(&guest_suites)?)?;
    files.push((list, "/tests/suites.json".to_owned()));
    let command = [
        vm::OWN_PROGRAM,
        "guest-tests",
        "--suites",
        "/tests/suites.json",
    ];
    let mut guest = vm::Guest::new(kernel, command.map(str::to_owned).to_vec());
    guest.with_xtask = true;
    guest.files = files;
    guest.timeout = Duration::from_secs(4200);
    ui::line(format!(
        "guest with kernel {release}: {} suites",
        guest_suites.len()
    ));
    let started = Instant::now();
    let ended = guest.run(|line| ui::line(format!("  {line}")));
    let seconds = started.elapsed().as_secs();
    let entries = ended.and_then(|ended| {
        serde_json::from_str::<Vec<Entry>>(&ended.report)
            .with_context(|| format!("the guest's test runner ended with {}", ended.code))
    });
    Ok(match entries {
        Ok(entries) => {
            let (passed, failed, skipped) = Tally::of(&entries).counts();
            ui::line(format!(
                "guest with kernel {release}: {passed} passed, {failed} failed, {skipped} skipped ({seconds} s)"
            ));
            entries
        }
        Err(error) => vec![Entry {
            suite: format!("kernel {kernel}"),
            name: "the guest".into(),
            outcome: Outcome::Failed(format!("{error:#}")),
        }],
    })
}
