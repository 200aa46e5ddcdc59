//! Revocation lists in files: who is cut, who is not, and what closes a trust domain.

use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use ktls_offload::protocol::Message;
use ringfence_lab::mesh::{TEST_PORT, TRUST_DOMAIN, principal};
use ringfence_lab::process::wait_until;
use ringfence_lab::topology::Family;
use ringfence_security_tests::authority::{Credentials, Leaf, spiffe_id};
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::peer::{ALERT, Peer};
use ringfence_security_tests::server::{Server, echo};
use ringfence_security_tests::stage::{
    CLIENT_NODE, CONTROL_PLANE, GRACE, PATIENCE, SERVER_NODE, Stage, is_answered, is_reset,
};
use ringfence_security_tests::volume::Volume;

use crate::handshakes::knock;
use crate::rotation::exchange;

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        a_revoked_certificate_loses_its_live_streams_and_gets_no_new_ones,
        a_list_that_is_missing_malformed_or_overdue_closes_its_trust_domain,
    ]
}

const NODES: [&str; 2] = [CLIENT_NODE, SERVER_NODE];
/// A serial number, in hex an even number of digits.
const STOLEN: u64 = 0x5701_e201;
/// TLS alert certificate_revoked (RFC 8446, section 6.2).
const CERTIFICATE_REVOKED: u8 = 44;
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

/// The agent's file with revocation lists.
fn with_lists(text: &str, file: &Path) -> String {
    format!(
        "{text}identity: {{revocation_lists: [{{trust_domain: {TRUST_DOMAIN}, file: {}}}]}}\n",
        file.display()
    )
}

/// Puts the content in place in one step.
fn publish(file: &Path, content: &str) -> Result<Instant> {
    let fresh = file.with_extension("new");
    std::fs::write(&fresh, content)?;
    let at = Instant::now();
    std::fs::rename(&fresh, file)?;
    Ok(at)
}

/// Returns when both agents say so of their lists.
fn wait_lists(stage: &Stage, state: &str, revoked: usize, error: Option<&str>) -> Result<()> {
    for node in NODES {
        wait_until(&format!("{node} to have taken the list"), PATIENCE, || {
            let status = stage.status(node)?;
            let [list] = status.revocation_lists.as_slice() else {
                anyhow::bail!("it has {:?}", status.revocation_lists)
            };
            let told = match (error, &list.error) {
                (Some(expected), Some(error)) => error.contains(expected),
                (expected, error) => expected.is_none() && error.is_none(),
            };
            ensure!(
                list.state == state && list.revoked == revoked && told,
                "{list:?}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

/// From whom to whom; none of the servers is reached in any other way.
const STREAMS: [(&str, &str); 3] = [
    ("client", "web"),
    ("intruder", "web"),
    ("intruder", "client"),
];

fn target(stage: &Stage, pod: &str) -> Result<SocketAddr> {
    stage.port(pod, Family::V4, TEST_PORT)
}

fn a_revoked_certificate_loses_its_live_streams_and_gets_no_new_ones(
    stage: &mut Stage,
) -> Result<Verdict> {
    stage.lab_mut()?.update_mesh(|mesh| {
        let rules = mesh.policies.iter_mut().flat_map(|p| p.rules.iter_mut());
        rules.for_each(|rule| rule.principals.push(principal("intruder")));
    })?;
    let file = stage.lab()?.dir().join("revoked.pem");
    publish(&file, &nobody(stage)?)?;
    stage.with_agents(
        &NODES,
        |text| with_lists(text, &file),
        |stage| {
            stage.lab()?.wait_ready(PATIENCE)?;
            // As a server for all of its streams, and as both.
            for (pod, node) in [("web", SERVER_NODE), ("client", CLIENT_NODE)] {
                publish(&file, &nobody(stage)?)?;
                wait_lists(stage, "in-force", 0, None)?;
                // An agent asks at once for another certificate in place of a revoked one.
                stage.lab_mut()?.stop(CONTROL_PLANE, GRACE)?;
                let revoked = revoke(stage, &file, pod, node);
                stage.lab_mut()?.start_control_plane(PATIENCE)?;
                revoked.with_context(|| format!("revoking {pod}"))?;
                heals(stage, pod, node)?;
            }
            Ok(())
        },
    )?;
    Ok(Verdict::Passed)
}

/// A list that revokes nobody.
fn nobody(stage: &Stage) -> Result<String> {
    let authority = stage.authority()?;
    authority.revocation_list(&[], SystemTime::now() + HOUR)
}

/// Under another certificate, with the list still in force.
fn heals(stage: &Stage, pod: &str, node: &str) -> Result<()> {
    stage.lab()?.wait_ready(PATIENCE)?;
    let _servers = servers(stage)?;
    for (from, to) in STREAMS {
        let mut stream = stage.connect(from, target(stage, to)?)?;
        exchange(&mut stream)
            .with_context(|| format!("{from} to {to} after {pod} of {node} was renewed"))?;
    }
    Ok(())
}

fn servers(stage: &Stage) -> Result<Vec<Server<u64>>> {
    let start = |pod| -> Result<_> {
        Server::start(&stage.lab()?.pod(pod)?.netns(), TEST_PORT, PATIENCE, echo)
    };
    ["web", "client"].into_iter().map(start).collect()
}

/// A tunnel of `client` to `web` under a stolen certificate.
fn stolen(stage: &Stage, certificate: &Credentials) -> Result<Peer> {
    let stream = knock(stage, Family::V4)?;
    Peer::connect(stream, Some(certificate), &[b"ringfence/1"])
}

fn revoke(stage: &Stage, file: &Path, pod: &str, node: &str) -> Result<()> {
    let servers = servers(stage)?;
    let (mut doomed, mut others) = (Vec::new(), Vec::new());
    for (from, to) in STREAMS {
        let mut stream = stage.connect(from, target(stage, to)?)?;
        exchange(&mut stream).with_context(|| format!("{from} to {to}"))?;
        if from == pod || to == pod {
            doomed.push((from, to, stream));
        } else {
            others.push((from, to, stream));
        }
    }
    // Idle tunnels of everybody, too: they must not serve a next stream.
    for (from, to) in STREAMS {
        let mut stream = stage.connect(from, target(stage, to)?)?;
        exchange(&mut stream)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        stream.read_to_end(&mut Vec::new())?;
    }

    let leaf = Leaf {
        serial: Some(STOLEN),
        ..Leaf::of("client")
    };
    let certificate = stage.authority()?.issue(&leaf)?;
    let mut thief = stolen(stage, &certificate)?;
    ensure!(thief.hear()? == Message::Ready, "no READY before");

    let serial = stage.status(node)?.svid(&spiffe_id(pod))?.serial.clone();
    let list = stage
        .authority()?
        .revocation_list(&[&serial, &format!("{STOLEN:x}")], SystemTime::now() + HOUR)?;
    let published = publish(file, &list)?;
    let mut slowest = Duration::ZERO;
    for (from, to, stream) in &mut doomed {
        let ended = stream.read(&mut [0; 1]).map_err(|error| error.kind());
        slowest = slowest.max(published.elapsed());
        ensure!(
            ended == Err(ErrorKind::ConnectionReset),
            "{from} to {to}: {ended:?} instead of a reset"
        );
    }
    println!(
        "certificate of {pod} revoked: {} live streams reset within {} ms of the list's rename",
        doomed.len(),
        slowest.as_millis()
    );
    ensure!(slowest < 10 * SECOND, "{slowest:?}");

    for (from, to) in STREAMS {
        let attempt = stage.attempt(from, target(stage, to)?)?;
        if from == pod || to == pod {
            is_reset(&attempt)
        } else {
            // The echo of what was sent.
            is_answered(&attempt)
        }
        .with_context(|| format!("a new stream from {from} to {to}"))?;
    }
    for (from, to, stream) in &mut others {
        exchange(stream).with_context(|| format!("the live stream from {from} to {to}"))?;
    }
    // A server that has no certificate left meets nobody.
    if pod != "web" {
        let records = stolen(stage, &certificate)?.until_closed()?;
        ensure!(
            records == [(ALERT, vec![2, CERTIFICATE_REVOKED])],
            "a stolen certificate is answered with {records:?}"
        );
    }
    drop(thief);
    drop((doomed, others));
    drop(servers);
    Ok(())
}

fn a_list_that_is_missing_malformed_or_overdue_closes_its_trust_domain(
    stage: &mut Stage,
) -> Result<Verdict> {
    let folder = stage.lab()?.dir().join("lists");
    let mut volume = Volume::new(&folder, &["crl.pem"])?;
    let mut publish = |content: &str| volume.publish(&[("crl.pem", content)]);
    let file = folder.join("crl.pem");
    let authority = stage.authority()?;
    stage.with_agents(
        &NODES,
        |text| with_lists(text, &file),
        |stage| {
            stage.lab()?.wait_ready(PATIENCE)?;
            let _web = Server::start(&stage.lab()?.pod("web")?.netns(), TEST_PORT, PATIENCE, echo)?;
            wait_lists(stage, "missing", 0, Some("No such file"))?;
            closed(stage).context("without a list")?;

            publish("-----BEGIN X509 CRL-----\nnonsense\n-----END X509 CRL-----\n")?;
            wait_lists(stage, "missing", 0, Some("list"))?;
            closed(stage).context("with a malformed list")?;

            let now = SystemTime::now();
            publish(&authority.revocation_list(&[], now - SECOND)?)?;
            wait_lists(stage, "expired", 0, None)?;
            closed(stage).context("with an overdue list")?;

            // The twin.
            publish(&authority.revocation_list(&[], now + HOUR)?)?;
            wait_lists(stage, "in-force", 0, None)?;
            let mut stream = open(stage)?;

            // What was valid stays in use.
            publish("")?;
            wait_lists(stage, "in-force", 0, Some("no list in it"))?;
            drop(open(stage).context("with an empty file after a good one")?);

            // A list that ends by itself takes the live streams with it.
            publish(&authority.revocation_list(&[], SystemTime::now() + 5 * SECOND)?)?;
            wait_lists(stage, "expired", 0, None)?;
            let ended = stream.read(&mut [0; 1]).map_err(|error| error.kind());
            ensure!(
                ended == Err(ErrorKind::ConnectionReset),
                "a live stream: {ended:?} instead of a reset"
            );
            closed(stage).context("with a list that has ended")
        },
    )?;
    Ok(Verdict::Passed)
}

/// Nobody reaches anybody, and the reason is counted.
fn closed(stage: &Stage) -> Result<()> {
    const UNKNOWN: &str = "handshake_failures{reason=\"revocation-unknown\"}";
    let failures = || -> Result<u64> {
        Ok(stage.counter(CLIENT_NODE, UNKNOWN)? + stage.counter(SERVER_NODE, UNKNOWN)?)
    };
    let before = failures()?;
    is_reset(&stage.attempt("client", target(stage, "web")?)?)?;
    wait_until("the refusal to be counted", PATIENCE, || {
        ensure!(failures()? > before, "it is still {before}");
        Ok(())
    })
}

/// A stream that works.
fn open(stage: &Stage) -> Result<TcpStream> {
    let mut stream = stage.connect("client", target(stage, "web")?)?;
    exchange(&mut stream)?;
    Ok(stream)
}
