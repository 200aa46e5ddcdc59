//! Building the workspace's own programs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::setup;
use crate::ui;

/// Root of the source tree.
pub fn workspace() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// cargo, set up for the workspace.
pub fn cargo() -> Result<Command> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    // Where the eBPF build looks first; only needed when the cache is not where it would
    // look by itself, and a change of the variable builds again.
    if std::env::var_os("RINGFENCE_CACHE").is_some() {
        command.env(
            "RINGFENCE_BPF_LINKER",
            setup::cache_dir()?.join("tools/bin/bpf-linker"),
        );
    }
    // Set for us by `cargo run`, and about this package.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    Ok(command)
}

/// Builds the program `ringfence` as users get it and returns its path.
pub fn ringfence() -> Result<PathBuf> {
    setup::ensure_ebpf_toolchain()?;
    ui::line("building ringfence (the first time takes some minutes)");
    let mut command = cargo()?;
    command.args([
        "build",
        "--locked",
        "--release",
        "--package",
        "ringfence",
        "--bin",
        "ringfence",
    ]);
    let built = executables(command)?;
    built
        .into_iter()
        .find(|artifact| artifact.name == "ringfence")
        .map(|artifact| artifact.path)
        .context("cargo built no program `ringfence`")
}

/// A program that cargo has built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executable {
    /// Name of the target.
    pub name: String,
    /// The package's folder, relative to the workspace.
    pub package: String,
    pub path: PathBuf,
}

/// Runs a cargo build, with its messages for people on the terminal, and returns the
/// programs that it made.
pub fn executables(mut command: Command) -> Result<Vec<Executable>> {
    let output = command
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .context("starting cargo")?
        .wait_with_output()?;
    ensure!(
        output.status.success(),
        "`{}` ended with {}",
        ui::command_line(&command),
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(executable)
        .collect())
}

#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

fn executable(line: &str) -> Option<Executable> {
    let message: Message = serde_json::from_str(line).ok()?;
    let manifest = message.manifest_path?;
    let folder = manifest.parent()?;
    let package = folder.strip_prefix(workspace()).unwrap_or(folder);
    Some(Executable {
        name: message.target?.name,
        package: package.to_string_lossy().into_owned(),
        path: message.executable?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_artifact_with_an_executable_is_read() {
        let line = r#"{"reason":"compiler-artifact","manifest_path":"/x/daemon/Cargo.toml",
            "target":{"name":"ringfence"},"executable":"/x/target/debug/ringfence"}"#;
        let artifact = executable(&line.replace('\n', ""));
        assert_eq!(artifact.map(|a| a.name), Some("ringfence".to_owned()));
    }

    #[test]
    fn a_library_is_no_executable() {
        let line = r#"{"manifest_path":"/x/Cargo.toml","target":{"name":"x"},"executable":null}"#;
        assert_eq!(executable(line), None);
    }
}
