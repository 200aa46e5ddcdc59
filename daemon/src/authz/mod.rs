//! `ringfence policies` and `ringfence authz`: what decides about connections, and why.

pub mod page;
pub mod report;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::admin;
use report::{Applied, DryRun, DryRunRequest, ExplainRequest, Explanation, L7, Log, LogRequest};

/// Which agent is asked, and how the answer is shown.
#[derive(Debug, Args)]
pub struct Asked {
    /// The agent's admin socket.
    #[arg(long, default_value = "/run/ringfence/agent.sock")]
    socket: PathBuf,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// `ringfence policies`.
#[derive(Debug, Args)]
pub struct PoliciesCommand {
    /// One workload only.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    workload: Option<String>,
    #[command(flatten)]
    asked: Asked,
}

/// `ringfence authz`.
#[derive(Debug, Subcommand)]
pub enum AuthzCommand {
    /// Say which policy and rule decide about a connection, and why the others do not. The
    /// reference evaluator and the kernel are both asked; where they differ, that is an
    /// error, and the exit code says so.
    Explain {
        /// Who connects: a SPIFFE ID, NAMESPACE/NAME of a workload, or an IP address for
        /// plaintext.
        #[arg(long, value_name = "ID|NAMESPACE/NAME|IP")]
        from: String,
        /// The client's own address, where `--from` does not say which one.
        #[arg(long, value_name = "IP")]
        source: Option<IpAddr>,
        /// A workload of this node and the port that its application listens on.
        #[arg(long, value_name = "NAMESPACE/NAME:PORT|IP:PORT")]
        to: String,
        #[command(flatten)]
        asked: Asked,
    },
    /// Judge live connections and recent verdicts of this node as if the manifests of a
    /// file (AuthorizationPolicy, PeerAuthentication) were applied. Nothing is applied.
    DryRun {
        /// The YAML file; `-` reads standard input.
        file: PathBuf,
        /// What becomes of a DENY rule with conditions that L4 cannot check.
        #[arg(long, value_enum, default_value = "istio-exact")]
        l7: L7,
        /// Labels of a workload of this node, for the manifests' selectors: control planes
        /// do not send them. May be repeated.
        #[arg(long, value_name = "NAMESPACE/NAME:KEY=VALUE[,KEY=VALUE]", value_parser = labels)]
        labels: Vec<(String, BTreeMap<String, String>)>,
        #[command(flatten)]
        asked: Asked,
    },
    /// Show the kernel's recent verdicts.
    Log {
        /// Go on with new ones as they come.
        #[arg(long, short)]
        follow: bool,
        /// Refusals only.
        #[arg(long)]
        denied: bool,
        #[command(flatten)]
        asked: Asked,
    },
}

/// Runs `ringfence policies`.
pub async fn policies(command: PoliciesCommand) -> anyhow::Result<()> {
    let PoliciesCommand { workload, asked } = command;
    let answer = admin::get(&asked.socket, "/policies").await?;
    let mut applied: Applied = serde_json::from_slice(&answer)?;
    if let Some(wanted) = workload {
        applied.workloads.retain(|of| of.workload == wanted);
        if applied.workloads.is_empty() {
            bail!("no workload {wanted} on this node (`ringfence status` lists them)");
        }
    }
    show(&asked, &applied, page::applied)
}

/// Runs `ringfence authz`.
pub async fn authz(command: AuthzCommand) -> anyhow::Result<()> {
    match command {
        AuthzCommand::Explain {
            from,
            source,
            to,
            asked,
        } => {
            let request = ExplainRequest { from, source, to };
            let answer: Explanation = ask(&asked.socket, "/authz/explain", &request).await?;
            show(&asked, &answer, page::explanation)?;
            if answer.difference.is_some_and(|d| !d.expected) {
                bail!("the reference evaluator and the kernel differ: see above");
            }
            Ok(())
        }
        AuthzCommand::DryRun {
            file,
            l7,
            labels,
            asked,
        } => {
            let text = if file == Path::new("-") {
                io::read_to_string(io::stdin()).context("standard input cannot be read")?
            } else {
                std::fs::read_to_string(&file)
                    .with_context(|| format!("{}: cannot be read", file.display()))?
            };
            let request = DryRunRequest {
                file: file.display().to_string(),
                text,
                l7,
                labels: labels.into_iter().collect(),
            };
            let answer: DryRun = ask(&asked.socket, "/authz/dry-run", &request).await?;
            show(&asked, &answer, page::dry_run)
        }
        AuthzCommand::Log {
            follow,
            denied,
            asked,
        } => log(&asked, follow, denied).await,
    }
}

async fn log(asked: &Asked, follow: bool, denied: bool) -> anyhow::Result<()> {
    let mut request = LogRequest {
        denied,
        ..LogRequest::default()
    };
    loop {
        let answer: Log = ask(&asked.socket, "/authz/log", &request).await?;
        for record in &answer.verdicts {
            let line = if asked.json {
                serde_json::to_string(record)?
            } else {
                page::record(record)
            };
            if !print(&line)? {
                return Ok(());
            }
        }
        if !follow {
            return Ok(());
        }
        (request.after, request.wait) = (answer.last, true);
    }
}

async fn ask<T: serde::de::DeserializeOwned>(
    socket: &Path,
    page: &'static str,
    request: &impl Serialize,
) -> anyhow::Result<T> {
    let answer = admin::post(socket, page, serde_json::to_vec(request)?).await?;
    serde_json::from_slice(&answer).with_context(|| {
        format!("the agent's answer to {page} is not understood (is it another version?)")
    })
}

fn show<T: Serialize>(asked: &Asked, answer: &T, page: fn(&T) -> String) -> anyhow::Result<()> {
    let text = if asked.json {
        serde_json::to_string_pretty(answer)?
    } else {
        page(answer)
    };
    print(text.trim_end()).map(drop)
}

/// False when the reader has seen enough (`| head`), which is no error.
fn print(text: &str) -> anyhow::Result<bool> {
    match writeln!(io::stdout().lock(), "{text}") {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// `NAMESPACE/NAME:KEY=VALUE[,KEY=VALUE]`.
fn labels(text: &str) -> Result<(String, BTreeMap<String, String>), String> {
    let expected = "expected NAMESPACE/NAME:KEY=VALUE[,KEY=VALUE]";
    let (workload, list) = text.split_once(':').ok_or(expected)?;
    if !workload
        .split_once('/')
        .is_some_and(|(ns, name)| !ns.is_empty() && !name.is_empty())
    {
        return Err(format!("`{workload}` is not NAMESPACE/NAME: {expected}"));
    }
    let mut labels = BTreeMap::new();
    for label in list.split(',') {
        let (key, value) = label
            .split_once('=')
            .filter(|(key, _)| !key.is_empty())
            .ok_or_else(|| format!("`{label}` is not KEY=VALUE: {expected}"))?;
        if labels.insert(key.to_owned(), value.to_owned()).is_some() {
            return Err(format!("label `{key}` is given twice"));
        }
    }
    Ok((workload.to_owned(), labels))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn labels_are_read_and_nonsense_is_refused() {
        let (workload, labels) = labels("demo/web:app=web,example.org/x=").unwrap();
        assert_eq!(workload, "demo/web");
        assert_eq!(labels["app"], "web");
        assert_eq!(labels["example.org/x"], "");
        for bad in [
            "",
            "demo/web",
            "demo:app=web",
            "demo/web:",
            "demo/web:app",
            "a/b:k=1,k=2",
        ] {
            assert!(super::labels(bad).is_err(), "{bad}");
        }
    }
}
