//! The commands that operators have, and what they say of a lab.

use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use ringfence_lab::mesh::TEST_PORT;
use ringfence_lab::topology::Family;
use serde_json::Value;

use crate::stage::{SERVER_NODE, Stage};

/// A command to the agent of a node, run to its end.
pub fn ringfence(stage: &Stage, node: &str, arguments: &[&str]) -> Result<Output> {
    Command::new(stage.binary())
        .args(arguments)
        .arg("--socket")
        .arg(stage.lab()?.agent_socket(node))
        .output()
        .context("starting ringfence")
}

/// The JSON of a command that must succeed.
pub fn json(stage: &Stage, node: &str, arguments: &[&str]) -> Result<Value> {
    let output = ringfence(stage, node, &[arguments, &["--json"]].concat())?;
    ensure!(
        output.status.success(),
        "`ringfence {}`: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    serde_json::from_slice(&output.stdout).context("reading the JSON")
}

/// What a command that must fail says.
pub fn complaint(stage: &Stage, node: &str, arguments: &[&str]) -> Result<String> {
    let output = ringfence(stage, node, arguments)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !output.status.success() && !said.contains("panicked"),
        "`ringfence {}` ended with {}: {said}",
        arguments.join(" "),
        output.status
    );
    Ok(said)
}

/// Asks about a connection to the test port of `web`.
pub fn explain(stage: &Stage, from: &str, family: Family) -> Result<Value> {
    let to = stage.port("web", family, TEST_PORT)?.to_string();
    json(
        stage,
        SERVER_NODE,
        &["authz", "explain", "--from", from, "--to", &to],
    )
}

/// Both evaluators say this.
pub fn both_say(explanation: &Value, verdict: &str, reason: &str) -> Result<()> {
    for evaluator in ["reference", "kernel"] {
        let said = &explanation[evaluator];
        ensure!(
            said["verdict"] == verdict && said["reason"] == reason,
            "{evaluator} says {said}, not {verdict} ({reason})"
        );
    }
    ensure!(
        explanation.get("difference").is_none(),
        "they differ: {explanation}"
    );
    Ok(())
}

/// Writes a manifest, and gives its path.
pub fn manifest(stage: &Stage, name: &str, text: &str) -> Result<String> {
    let path = stage.lab()?.dir().join(name);
    std::fs::write(&path, text)?;
    Ok(path.display().to_string())
}

/// The verdicts on a node so far, as its agent has written them down.
pub fn audited(stage: &Stage, node: &str) -> Result<Vec<Value>> {
    let log = stage.lab()?.audit_log(node);
    let text = std::fs::read_to_string(&log).context("reading the audit log")?;
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("the line {line}")))
        .collect()
}
