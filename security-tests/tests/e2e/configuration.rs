//! Files with mistakes: refused with file, line and field, and nothing is applied by halves.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use ringfence_lab::mesh::TEST_PORT;
use ringfence_lab::process::wait_until;
use ringfence_lab::topology::Family;
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::stage::{
    CLIENT_NODE, CONTROL_PLANE, PATIENCE, Stage, is_answered, is_refused,
};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        an_agent_file_with_an_unknown_field_is_refused_with_its_line,
        a_mesh_file_with_an_unknown_field_is_refused_with_its_line,
        a_mesh_file_with_an_unusable_value_is_refused_with_its_line,
        a_bad_mesh_file_on_reload_changes_nothing,
    ]
}

/// Runs the program on a file to its end, with `--check` or for good.
fn ringfence(stage: &Stage, command: &str, file: &Path, check: bool) -> Result<Output> {
    let mut program = Command::new(stage.binary());
    program
        .arg(command)
        .arg("--config")
        .arg(file)
        .stdin(Stdio::null());
    if check {
        program.arg("--check");
    }
    program
        .output()
        .with_context(|| format!("starting {}", stage.binary().display()))
}

/// The text with `line` put behind the first line that contains `after`, and its number there.
fn insert(text: &str, after: &str, line: &str) -> Result<(String, usize)> {
    let mut lines: Vec<&str> = text.lines().collect();
    let at = lines
        .iter()
        .position(|known| known.contains(after))
        .with_context(|| format!("no line has {after}"))?;
    lines.insert(at + 1, line);
    Ok((lines.join("\n") + "\n", at + 2))
}

/// Both with `--check` and without it.
fn refused(stage: &Stage, command: &str, file: &Path, line: usize, names: &str) -> Result<()> {
    for check in [true, false] {
        let output = ringfence(stage, command, file, check)?;
        let message = String::from_utf8_lossy(&output.stderr);
        ensure!(
            !output.status.success(),
            "check {check}: exit {}: {message}",
            output.status
        );
        let place = format!("{}:{line}", file.display());
        ensure!(
            message.contains(&place),
            "check {check}: no {place} in: {message}"
        );
        ensure!(
            message.contains(names),
            "check {check}: no `{names}` in: {message}"
        );
    }
    Ok(())
}

fn an_agent_file_with_an_unknown_field_is_refused_with_its_line(
    stage: &mut Stage,
) -> Result<Verdict> {
    let good = stage.lab()?.agent_config(CLIENT_NODE);
    ensure!(
        ringfence(stage, "agent", &good, true)?.status.success(),
        "the good file is refused"
    );
    let text = std::fs::read_to_string(&good)?;
    let bad = stage.lab()?.dir().join("bad-agent.yaml");
    for (after, added, names) in [
        ("record_layer:", "colour: green", "colour"),
        ("control_plane:", "  tokn: /tmp/token", "tokn"),
    ] {
        let (text, line) = insert(&text, after, added)?;
        std::fs::write(&bad, text)?;
        refused(stage, "agent", &bad, line, names)?;
    }
    Ok(Verdict::Passed)
}

fn a_mesh_file_with_an_unknown_field_is_refused_with_its_line(
    stage: &mut Stage,
) -> Result<Verdict> {
    let good = stage.lab()?.mesh_file();
    ensure!(
        ringfence(stage, "control-plane", &good, true)?
            .status
            .success(),
        "the good file is refused"
    );
    let text = std::fs::read_to_string(&good)?;
    let bad = stage.lab()?.dir().join("bad-mesh.yaml");
    for (after, added, names) in [
        ("svid_ttl:", "svid_tll: 1h", "svid_tll"),
        (
            "service_account:",
            "    servce_account: x",
            "servce_account",
        ),
        // A condition that is misspelt must not become no condition.
        ("action: ALLOW", "    rulez: []", "rulez"),
    ] {
        let (text, line) = insert(&text, after, added)?;
        std::fs::write(&bad, text)?;
        refused(stage, "control-plane", &bad, line, names)?;
    }
    Ok(Verdict::Passed)
}

fn a_mesh_file_with_an_unusable_value_is_refused_with_its_line(
    stage: &mut Stage,
) -> Result<Verdict> {
    let text = std::fs::read_to_string(stage.lab()?.mesh_file())?;
    let bad = stage.lab()?.dir().join("bad-mesh.yaml");
    let replace = |needle: &str, replacement: &str| -> Result<(String, usize)> {
        let line = text
            .lines()
            .position(|line| line.contains(needle))
            .with_context(|| format!("no {needle}"))?;
        Ok((text.replacen(needle, replacement, 1), line + 1))
    };
    for (needle, replacement, names) in [
        ("action: ALLOW", "action: AUDIT_ALL", "AUDIT_ALL"),
        ("mode: STRICT", "mode: STRICTER", "STRICTER"),
        ("\"10.77.1.10\"", "\"10.77.1.1000\"", "10.77.1.1000"),
    ] {
        let (text, line) = replace(needle, replacement)?;
        std::fs::write(&bad, text)?;
        refused(stage, "control-plane", &bad, line, names)?;
    }
    Ok(Verdict::Passed)
}

fn a_bad_mesh_file_on_reload_changes_nothing(stage: &mut Stage) -> Result<Verdict> {
    let file = stage.lab()?.mesh_file();
    let good = std::fs::read_to_string(&file)?;
    // Everybody would be admitted in plaintext, if the part before the mistake were taken.
    let open = good
        .replace("mode: STRICT", "mode: PERMISSIVE")
        .replace("action: ALLOW", "action: DENY");
    let bad = format!("{open}colour: green\n");
    let line = bad.lines().count();
    let fresh = file.with_extension("yaml.new");
    std::fs::write(&fresh, &bad)?;
    std::fs::rename(&fresh, &file)?;
    let log = stage.lab()?.log(CONTROL_PLANE);
    let told = wait_until("the control plane to refuse the file", PATIENCE, || {
        let text = std::fs::read_to_string(&log)?;
        let place = format!("{}:{line}", file.display());
        ensure!(
            text.lines()
                .any(|log| log.contains(&place) && log.contains("colour")),
            "no {place} in its log"
        );
        Ok(())
    });
    let held = told.and_then(|()| {
        let _application = stage.application()?;
        is_answered(&stage.attempt("client", Stage::service(Family::V4))?).context("client")?;
        is_refused(&stage.attempt("intruder", Stage::service(Family::V4))?).context("intruder")?;
        let target = stage.port("web", Family::V4, TEST_PORT)?;
        is_refused(&stage.attempt("outside", target)?).context("outside")
    });
    std::fs::write(&fresh, &good)?;
    std::fs::rename(&fresh, &file)?;
    held?;
    // A good change is taken afterwards.
    stage.lab_mut()?.update_mesh(|_| {})?;
    Ok(Verdict::Passed)
}
