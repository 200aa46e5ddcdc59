//! `cargo xtask fuzz`: the fuzz targets, one after the other, each for some time.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::build::workspace;
use crate::setup::cache_dir;
use crate::ui;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// How long each target runs
    #[arg(long, default_value_t = 600)]
    seconds: u32,
    /// These targets only
    targets: Vec<String>,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let folder = workspace().join("identity/fuzz");
    let known = targets(&folder)?;
    if let Some(other) = arguments.targets.iter().find(|name| !known.contains(name)) {
        bail!("no fuzz target {other:?}: there are {}", known.join(", "));
    }
    let chosen = match arguments.targets.as_slice() {
        [] => &known,
        some => some,
    };
    let program = cargo_fuzz()?;
    for target in chosen {
        ui::line(format!("{target}, for {} s", arguments.seconds));
        let mut command = Command::new(&program);
        command
            .args(["fuzz", "run", "--fuzz-dir"])
            .arg(&folder)
            .args([target.as_str(), "--"])
            .arg(format!("-max_total_time={}", arguments.seconds))
            .env("RUSTUP_TOOLCHAIN", "nightly")
            // Of the workspace's own toolchain.
            .env_remove("CARGO")
            .current_dir(&folder)
            .stdin(Stdio::null());
        let status = command.status().context("starting cargo-fuzz")?;
        ensure!(
            status.success(),
            "{target}: a finding, or no build ({status}); what led to it is in {}",
            folder.join("artifacts").join(target).display()
        );
        ui::line(format!("{target}: no finding"));
    }
    Ok(ExitCode::SUCCESS)
}

fn targets(folder: &Path) -> Result<Vec<String>> {
    let sources = folder.join("fuzz_targets");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&sources).with_context(|| sources.display().to_string())? {
        let path = entry?.path();
        if let Some(name) = path.file_stem() {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn cargo_fuzz() -> Result<PathBuf> {
    let own = cache_dir()?.join("tools/bin/cargo-fuzz");
    if own.is_file() {
        return Ok(own);
    }
    let found = Command::new("cargo-fuzz").arg("--version").output();
    ensure!(
        found.is_ok(),
        "cargo-fuzz is missing: rustup toolchain install nightly && cargo install cargo-fuzz"
    );
    Ok("cargo-fuzz".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_found() -> Result<()> {
        let known = targets(&workspace().join("identity/fuzz"))?;
        assert!(known.contains(&"workload_answer".to_owned()), "{known:?}");
        Ok(())
    }

    #[test]
    fn another_name_is_refused() {
        let arguments = Arguments {
            seconds: 1,
            targets: vec!["nothing".into()],
        };
        let error = run(&arguments).map(|_| ()).err().map(|e| e.to_string());
        assert!(error.is_some_and(|text| text.contains("no fuzz target \"nothing\"")));
    }
}
