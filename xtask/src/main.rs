//! The one command surface of the project: `cargo xtask --help`.

mod bench;
mod build;
mod demo;
mod fuzz;
mod lab;
mod lint;
mod setup;
mod test;
mod ui;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    about = "Builds, shows and tests Ringfence",
    version
)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install everything that any of the commands needs
    Setup,
    /// Show the mesh at work: real programs, and what is observed of them from outside
    Demo(demo::Arguments),
    #[command(hide = true)]
    GuestDemo(demo::GuestArguments),
    /// Lint, unit tests, lab tests here and in a guest per kernel
    Test(test::Arguments),
    #[command(hide = true)]
    GuestTests(test::GuestArguments),
    /// Formatting, clippy, licences and banned crates
    Lint,
    /// Measure: the mesh (without and with it, side by side), or one of its parts
    Bench(bench::Arguments),
    /// Feed the parsers of certificates, lists and answers what nobody would send
    Fuzz(fuzz::Arguments),
    /// A network of namespaces with the mesh on it, for hands-on work
    Lab {
        #[command(subcommand)]
        action: lab::Action,
    },
    /// Boot a guest kernel, run a command in it and pass its exit code on
    Vm {
        /// Kernel series: 6.1, 6.12 or 7.2
        kernel: String,
        /// Give up after that many seconds
        #[arg(long, default_value_t = 300)]
        timeout: u64,
        /// Copy a file of this host to the same place in the guest (repeatable)
        #[arg(long = "add", value_name = "FILE")]
        files: Vec<PathBuf>,
        /// The command; a path of this host is copied into the guest with its libraries
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(code) => code,
        Err(error) => {
            ui::line(format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Setup => setup::everything().map(|()| ExitCode::SUCCESS),
        Task::Demo(arguments) => demo::run(&arguments),
        Task::GuestDemo(arguments) => demo::run_as_guest(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::GuestTests(arguments) => test::run_as_guest(&arguments),
        Task::Lint => lint::run(),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::Lab { action } => lab::run(action),
        Task::Vm {
            kernel,
            timeout,
            files,
            command,
        } => vm(&kernel, timeout, files, command),
    }
}

fn vm(
    kernel: &str,
    timeout: u64,
    files: Vec<PathBuf>,
    mut command: Vec<String>,
) -> Result<ExitCode> {
    let mut guest_files = Vec::new();
    for file in files {
        let file = file
            .canonicalize()
            .with_context(|| format!("--add {}", file.display()))?;
        guest_files.push((file.clone(), file.to_string_lossy().into_owned()));
    }
    if let Some(program) = command.first_mut()
        && program.contains('/')
        && let Ok(path) = PathBuf::from(program.as_str()).canonicalize()
    {
        *program = path.to_string_lossy().into_owned();
        guest_files.push((path, program.clone()));
    }
    let mut guest = vm::Guest::new(kernel, command);
    guest.files = guest_files;
    guest.timeout = Duration::from_secs(timeout);
    let ended = guest.run(|line| println!("{line}"))?;
    Ok(exit_code(ended.code))
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn bench_alone_takes_the_options_of_the_mesh() {
        for line in [
            "xtask bench --rounds 1",
            "xtask bench mesh --rounds 1",
            "xtask bench identity --quick",
        ] {
            assert!(Arguments::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
        let mixed = "xtask bench --rounds 1 identity".split(' ');
        assert!(Arguments::try_parse_from(mixed).is_err());
    }
}
