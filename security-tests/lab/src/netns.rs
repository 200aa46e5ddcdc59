//! Network namespaces with a name in `/run/netns`, as `ip netns` keeps them.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sched::CloneFlags;

use crate::sys;

const FOLDER: &str = "/run/netns";

/// A named network namespace. Dropping the value leaves the namespace in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes the namespace; it is an error when the name is taken.
    pub fn create(name: &str) -> Result<Self> {
        ip(&["netns", "add", name], "")?;
        let netns = Self::named(name);
        // Duplicate address detection would hold up each new address for a second.
        for key in ["all", "default"] {
            netns.sysctl(&format!("net/ipv6/conf/{key}/disable_ipv6"), "0")?;
            netns.sysctl(&format!("net/ipv6/conf/{key}/accept_dad"), "0")?;
            netns.sysctl(&format!("net/ipv6/conf/{key}/accept_ra"), "0")?;
        }
        netns.ip(&["link set lo up".to_owned()])?;
        Ok(netns)
    }

    /// The namespace with that name, whether or not it exists.
    pub fn named(name: &str) -> Self {
        Netns {
            name: name.to_owned(),
        }
    }

    /// Names of all namespaces that begin with `prefix`.
    pub fn names_with_prefix(prefix: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(FOLDER) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort();
        names
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> PathBuf {
        Path::new(FOLDER).join(&self.name)
    }

    pub fn delete(&self) -> Result<()> {
        ip(&["netns", "delete", &self.name], "")
    }

    /// A command that will run in this namespace, and in no other new namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = Command::new(program);
        sys::enter_before_exec(&mut command, self.file()?);
        Ok(command)
    }

    /// Runs `work` on a thread in this namespace. Sockets made there stay in it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let file = self.file()?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                nix::sched::setns(&file, CloneFlags::CLONE_NEWNET)?;
                Ok::<T, nix::Error>(work())
            });
            match thread.join() {
                Ok(result) => result.with_context(|| format!("entering {}", self.path().display())),
                Err(_) => Err(anyhow!("a thread in {} panicked", self.name)),
            }
        })
    }

    /// Runs `ip` sub-commands in one batch.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        ip(
            &["-n", &self.name, "-batch", "-"],
            &(lines.join("\n") + "\n"),
        )
    }

    /// Writes a setting below `/proc/sys`; `key` has slashes.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key);
        self.run(|| std::fs::write(&path, value))?
            .with_context(|| format!("writing {value} to {} in {}", path.display(), self.name))
    }

    /// Reads a file below `/proc/net` of this namespace.
    pub fn proc_net(&self, name: &str) -> Result<String> {
        let path = Path::new("/proc/thread-self/net").join(name);
        self.run(|| std::fs::read_to_string(&path))?
            .with_context(|| format!("reading {} in {}", path.display(), self.name))
    }

    /// Processes of this namespace.
    pub fn processes(&self) -> Vec<i32> {
        let Ok(own) = std::fs::metadata(self.path()) else {
            return Vec::new();
        };
        let Ok(entries) = std::fs::read_dir("/proc") else {
            return Vec::new();
        };
        entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| {
                std::fs::metadata(format!("/proc/{pid}/ns/net"))
                    .is_ok_and(|m| m.ino() == own.ino() && m.dev() == own.dev())
            })
            .collect()
    }

    fn file(&self) -> Result<File> {
        File::open(self.path()).with_context(|| {
            format!(
                "there is no network namespace {}: is the lab up?",
                self.path().display()
            )
        })
    }
}

/// Runs iproute2 with `input` on its standard input.
fn ip(arguments: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting ip: install iproute2")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    ensure!(
        nix::unistd::geteuid().is_root(),
        "network namespaces need root"
    );
    bail!(
        "`ip {}` failed: {}{}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim(),
        if input.is_empty() {
            String::new()
        } else {
            format!("\n  input was:\n{input}")
        }
    )
}
