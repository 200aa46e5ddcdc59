//! A CA that is down: what is valid serves on, what has expired does not, and everything
//! heals when the CA is back.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ktls_offload::protocol::Message;
use ringfence_lab::mesh::TEST_PORT;
use ringfence_lab::process::wait_until;
use ringfence_lab::topology::Family;
use ringfence_security_tests::authority::{Leaf, spiffe_id};
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::peer::Peer;
use ringfence_security_tests::server::{Server, echo};
use ringfence_security_tests::stage::{
    CLIENT_NODE, CONTROL_PLANE, GRACE, PATIENCE, SERVER_NODE, Stage, is_answered, is_reset,
};

use crate::handshakes::knock;
use crate::rotation::exchange;

pub fn cases() -> Vec<Case<Stage>> {
    cases![certificates_serve_to_their_end_and_no_longer_while_the_ca_is_down]
}

const NODES: [&str; 2] = [CLIENT_NODE, SERVER_NODE];

fn certificates_serve_to_their_end_and_no_longer_while_the_ca_is_down(
    stage: &mut Stage,
) -> Result<Verdict> {
    stage.with_agents(
        &NODES,
        |text| {
            text.replace(
                "control_plane:\n",
                "control_plane:\n  svid_ttl_seconds: 30\n",
            )
        },
        |stage| {
            stage.lab()?.wait_ready(PATIENCE)?;
            let web = stage.lab()?.pod("web")?.netns();
            let server = Server::start(&web, TEST_PORT, Duration::from_secs(1800), echo)?;
            // A stream lives as long as its applications want, whatever its certificates do.
            let mut live = stage.connect("client", Stage::service(Family::V4))?;
            exchange(&mut live)?;

            stage.lab_mut()?.stop(CONTROL_PLANE, GRACE)?;
            let expired = still_valid(stage).and_then(|()| after_the_end(stage, &server));
            // Started whatever the outcome: the cases to come need it.
            stage.lab_mut()?.start_control_plane(PATIENCE)?;
            expired?;

            stage.lab()?.wait_ready(PATIENCE)?;
            is_answered(&stage.attempt("client", Stage::service(Family::V4))?)
                .context("with the CA back")?;
            exchange(&mut live).context("the stream from before")
        },
    )?;
    Ok(Verdict::Passed)
}

/// Until the refresh has failed, and while the certificates are valid all the same.
fn still_valid(stage: &Stage) -> Result<()> {
    let id = spiffe_id("client");
    let failing = wait_until("a refresh to fail", PATIENCE, || {
        let svid = stage.status(CLIENT_NODE)?.svid(&id)?.clone();
        ensure!(svid.error.is_some(), "{svid:?}");
        Ok(svid)
    })?;
    let error = failing.error.unwrap_or_default();
    ensure!(error.contains(&id), "the error names no identity: {error}");
    let (seconds, listed) = (seconds_left(stage)?, certs(stage)?);
    let outcome = stage.attempt("client", Stage::service(Family::V4))?;
    let valid = |node: &str| -> Result<bool> {
        Ok(stage.status(node)?.svids.iter().all(|svid| svid.valid))
    };
    // Judged by what held from beginning to end of the attempt.
    if valid(CLIENT_NODE)? && valid(SERVER_NODE)? {
        is_answered(&outcome).context("with valid certificates")?;
        ensure!(failing.state == "refresh-failing", "{}", failing.state);
        ensure!(
            seconds > 0 && listed.contains("refresh-failing"),
            "{seconds} s left; {listed}"
        );
    }
    wait_until("the metric to count down", PATIENCE, || {
        let now = seconds_left(stage)?;
        ensure!(now < seconds, "{now} s, before {seconds} s");
        Ok(())
    })
}

fn after_the_end(stage: &Stage, server: &Server<u64>) -> Result<()> {
    for node in NODES {
        wait_until(
            &format!("the certificates of {node} to expire"),
            PATIENCE,
            || {
                let status = stage.status(node)?;
                ensure!(
                    status.svids.iter().all(|svid| svid.state == "expired"),
                    "{:?}",
                    status.svids
                );
                ensure!(!status.ready, "it says it is ready");
                Ok(())
            },
        )?;
    }
    ensure!(seconds_left(stage)? <= 0, "{} s left", seconds_left(stage)?);
    ensure!(certs(stage)?.contains("EXPIRED"), "{}", certs(stage)?);

    const NO_SVID: &str = "refused{reason=\"no-svid\"}";
    let before = stage.counter(CLIENT_NODE, NO_SVID)?;
    is_reset(&stage.attempt("client", Stage::service(Family::V4))?).context("after expiry")?;
    stage.wait_counter(CLIENT_NODE, NO_SVID, before + 1)?;

    // Nor is anybody let in under it: a peer whose own certificate is good meets no server.
    const NO_SERVER: &str = "handshake_failures{reason=\"no-svid\"}";
    let before = stage.counter(SERVER_NODE, NO_SERVER)?;
    let good = stage.authority()?.issue(&Leaf::of("client"))?;
    let met = Peer::connect(knock(stage, Family::V4)?, Some(&good), &[b"ringfence/1"])
        .and_then(|mut peer| peer.hear());
    ensure!(
        !matches!(met, Ok(Message::Ready)),
        "a server without a certificate"
    );
    stage.wait_counter(SERVER_NODE, NO_SERVER, before + 1)?;
    // The one that was answered before the end has ended; no other came.
    let _ = server.next(Duration::ZERO);
    ensure!(server.is_untouched(), "the application was reached");
    Ok(())
}

/// `ringfence_svid_seconds_left` of `client`.
fn seconds_left(stage: &Stage) -> Result<i64> {
    let text = ringfence(stage, &["status", "--metrics"])?;
    let label = format!("{{identity=\"{}\"}} ", spiffe_id("client"));
    let value = text.lines().find_map(|line| {
        line.strip_prefix("ringfence_svid_seconds_left")?
            .strip_prefix(&label)
    });
    Ok(value
        .with_context(|| format!("no metric in:\n{text}"))?
        .parse()?)
}

fn certs(stage: &Stage) -> Result<String> {
    ringfence(stage, &["certs"])
}

fn ringfence(stage: &Stage, arguments: &[&str]) -> Result<String> {
    let output = Command::new(stage.binary())
        .args(arguments)
        .arg("--socket")
        .arg(stage.lab()?.agent_socket(CLIENT_NODE))
        .output()?;
    ensure!(
        output.status.success(),
        "`ringfence {}`: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}
