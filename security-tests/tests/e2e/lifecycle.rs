//! Parts that are missing, killed or started late: enforcement goes on, and nothing goes out
//! in plaintext meanwhile.

use std::io::ErrorKind;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ringfence_lab::capture::frames_with;
use ringfence_lab::mesh::TEST_PORT;
use ringfence_lab::netns::Netns;
use ringfence_lab::probe::{self, Outcome};
use ringfence_lab::process::{end, wait_until};
use ringfence_lab::topology::Family;
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::stage::{
    CLIENT_NODE, CONTROL_PLANE, GRACE, PATIENCE, SERVER_NODE, Stage, is_answered, is_refused,
};

use crate::wire::{listen, plaintext_frames};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        the_mesh_goes_on_without_its_control_plane,
        a_killed_server_agent_leaves_enforcement_in_force,
        a_killed_client_agent_leaves_nothing_to_leak_through,
        agents_without_a_control_plane_hold_their_pods_until_it_comes,
        a_lab_that_is_taken_down_leaves_nothing,
    ]
}

/// `kill -9`, and the end of the process.
fn kill_agent(stage: &Stage, node: &str) -> Result<()> {
    let pid = stage.lab()?.process(node)?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    end(&[pid], GRACE)
}

fn restart_agent(stage: &mut Stage, node: &str) -> Result<()> {
    stage.lab_mut()?.start_agent(node)?;
    stage.lab()?.wait_ready(PATIENCE)
}

/// The application is reached by `client` on both families, and by nobody else.
fn works(stage: &Stage) -> Result<()> {
    let _application = stage.application()?;
    for family in Family::BOTH {
        is_answered(&stage.attempt("client", Stage::service(family))?).context("client")?;
        is_refused(&stage.attempt("intruder", Stage::service(family))?).context("intruder")?;
        is_refused(&stage.attempt("outside", stage.port("web", family, TEST_PORT)?)?)
            .context("outside")?;
    }
    Ok(())
}

/// `client` still reaches a server outside the mesh.
fn direct_works(stage: &Stage) -> Result<()> {
    let netns = stage.lab()?.pod("client")?.netns();
    for family in Family::BOTH {
        let legacy = stage.port("legacy", family, 8080)?;
        is_answered(&probe::connect(
            &netns,
            legacy,
            b"GET / HTTP/1.0\r\n\r\n",
            PATIENCE,
        )?)
        .context("legacy")?;
    }
    Ok(())
}

fn the_mesh_goes_on_without_its_control_plane(stage: &mut Stage) -> Result<Verdict> {
    stage.lab_mut()?.stop(CONTROL_PLANE, GRACE)?;
    let checked = works(stage).context("without a control plane");
    stage.lab_mut()?.start_control_plane(PATIENCE)?;
    stage.lab()?.wait_ready(PATIENCE)?;
    checked?;
    // The agents find it again: a change arrives.
    wait_until("the agents to be connected again", PATIENCE, || {
        for node in [CLIENT_NODE, SERVER_NODE] {
            let state = stage.status(node)?.control_plane;
            ensure!(state.state == "connected", "{node}: {state:?}");
        }
        Ok(())
    })?;
    stage.lab_mut()?.update_mesh(|_| {})?;
    works(stage)?;
    Ok(Verdict::Passed)
}

fn a_killed_server_agent_leaves_enforcement_in_force(stage: &mut Stage) -> Result<Verdict> {
    works(stage)?;
    kill_agent(stage, SERVER_NODE)?;
    let checked = (|| {
        let mut application = stage.application()?;
        for family in Family::BOTH {
            // Plaintext is judged by the kernel.
            is_refused(&stage.attempt("outside", stage.port("web", family, TEST_PORT)?)?)
                .context("outside")?;
            let outcome = stage.attempt("client", Stage::service(family))?;
            ensure!(
                outcome.is_refusal(),
                "client, whose peer has no agent: {outcome:?}"
            );
        }
        ensure!(
            application.accepted().is_empty(),
            "the application accepted {:?}",
            application.accepted()
        );
        direct_works(stage)
    })();
    restart_agent(stage, SERVER_NODE)?;
    checked?;
    stage.settle()?;
    works(stage)?;
    Ok(Verdict::Passed)
}

fn a_killed_client_agent_leaves_nothing_to_leak_through(stage: &mut Stage) -> Result<Verdict> {
    works(stage)?;
    kill_agent(stage, CLIENT_NODE)?;
    let checked = (|| {
        let capture = listen(stage)?;
        let mut application = stage.application()?;
        for family in Family::BOTH {
            let outcome = stage.attempt("client", Stage::service(family))?;
            ensure!(outcome.is_refusal(), "client without an agent: {outcome:?}");
        }
        ensure!(
            application.accepted().is_empty(),
            "the application accepted {:?}",
            application.accepted()
        );
        direct_works(stage)?;
        let frames = capture.stop()?;
        ensure!(
            frames_with(&frames, b"GET / HTTP/1.0") > 0,
            "the capture misses even the direct request"
        );
        ensure!(
            frames_with(&frames, b"hello\n") == 0,
            "a mesh connection went out in plaintext"
        );
        for family in Family::BOTH {
            let application = stage.port("web", family, TEST_PORT)?;
            ensure!(
                plaintext_frames(&frames, application) == 0,
                "plaintext to {application} on the wire"
            );
        }
        Ok(())
    })();
    restart_agent(stage, CLIENT_NODE)?;
    checked?;
    stage.settle()?;
    works(stage)?;
    Ok(Verdict::Passed)
}

fn agents_without_a_control_plane_hold_their_pods_until_it_comes(
    stage: &mut Stage,
) -> Result<Verdict> {
    for name in [CLIENT_NODE, SERVER_NODE, CONTROL_PLANE] {
        stage.lab_mut()?.stop(name, GRACE)?;
    }
    // A fresh start: what an earlier agent pinned would go on deciding.
    for node in [CLIENT_NODE, SERVER_NODE] {
        let pins = stage.id().pin_dir().join(node);
        let mut command = std::process::Command::new(stage.binary());
        command.arg("uninstall").arg("--pin-dir").arg(&pins);
        let output = stage
            .lab()?
            .node(node)?
            .netns()
            .run(|| command.output())??;
        ensure!(
            output.status.success(),
            "`ringfence uninstall` ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    // The twin: without Ringfence the same attempts succeed, in plaintext.
    {
        let _application = stage.application()?;
        let web = stage.port("web", Family::V4, TEST_PORT)?;
        is_answered(&stage.attempt("client", web)?).context("without Ringfence")?;
        is_answered(&stage.attempt("outside", web)?).context("without Ringfence")?;
    }
    for node in [CLIENT_NODE, SERVER_NODE] {
        stage.lab_mut()?.start_agent(node)?;
    }
    let checked = held(stage);
    stage.lab_mut()?.start_control_plane(PATIENCE)?;
    stage.lab()?.wait_ready(PATIENCE)?;
    checked?;
    stage.settle()?;
    works(stage)?;
    Ok(Verdict::Passed)
}

/// Every pod is enrolled, not ready, and reaches and admits nobody.
fn held(stage: &Stage) -> Result<()> {
    for (node, pods) in [(CLIENT_NODE, 2), (SERVER_NODE, 1)] {
        wait_until(&format!("{node} to hold its pods"), PATIENCE, || {
            let status = stage.status(node)?;
            ensure!(status.pods.len() == pods, "{node} has {:?}", status.pods);
            ensure!(!status.ready, "{node} says it is ready");
            for pod in &status.pods {
                ensure!(!pod.ready && pod.reason.is_some(), "{pod:?}");
            }
            let state = &status.control_plane;
            ensure!(
                state.state == "failed" && state.error.is_some(),
                "{state:?}"
            );
            Ok(())
        })?;
    }
    let capture = listen(stage)?;
    let mut application = stage.application()?;
    for family in Family::BOTH {
        let web = stage.port("web", family, TEST_PORT)?;
        for target in [
            web,
            Stage::service(family),
            stage.port("legacy", family, 8080)?,
        ] {
            let outcome = stage.attempt("client", target)?;
            ensure!(
                outcome == Outcome::NotConnected(ErrorKind::PermissionDenied),
                "client to {target}: {outcome:?}"
            );
        }
        is_refused(&stage.attempt("outside", web)?).context("outside")?;
    }
    ensure!(
        application.accepted().is_empty(),
        "the application accepted {:?}",
        application.accepted()
    );
    let frames = capture.stop()?;
    ensure!(
        frames_with(&frames, b"hello\n") == 0,
        "a held pod's bytes are on the wire"
    );
    Ok(())
}

fn a_lab_that_is_taken_down_leaves_nothing(stage: &mut Stage) -> Result<Verdict> {
    let lab = stage.take_lab()?;
    let prefix = lab.id().prefix.clone();
    let names = Netns::names_with_prefix(&prefix);
    ensure!(
        names.len() == lab.topology().nodes.len() + lab.topology().pods.len(),
        "namespaces {names:?}"
    );
    let processes: Vec<i32> = names
        .iter()
        .flat_map(|name| Netns::named(name).processes())
        .collect();
    // Control plane, two agents, nginx twice, iperf3 twice, redis.
    ensure!(processes.len() >= 8, "processes {processes:?}");
    let (dir, pins) = (lab.dir(), lab.id().pin_dir());
    ensure!(
        dir.is_dir() && pins.is_dir(),
        "{} and {} should be there",
        dir.display(),
        pins.display()
    );
    lab.down()?;
    let left = Netns::names_with_prefix(&prefix);
    ensure!(left.is_empty(), "network namespaces {left:?} are left");
    ensure!(
        !dir.exists() && !pins.exists(),
        "{} or {} is left",
        dir.display(),
        pins.display()
    );
    for pid in processes {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Whoever ends without being our child is reaped by its own parent, sooner or later.
        let zombie = state
            .rsplit_once(')')
            .is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'));
        ensure!(state.is_empty() || zombie, "process {pid} is left: {state}");
    }
    Ok(Verdict::Passed)
}
