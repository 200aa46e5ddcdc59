//! Certificates from elsewhere: files, a SPIRE agent; and trust domains with two names.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use ktls_offload::protocol::{Message, Open, RefuseReason};
use ringfence_lab::capture::frames_with;
use ringfence_lab::mesh::{TEST_PORT, TRUST_DOMAIN};
use ringfence_lab::process::wait_until;
use ringfence_lab::topology::{Family, NAMESPACE};
use ringfence_security_tests::authority::{Authority, Credentials, Leaf, spiffe_id};
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::peer::{KeyExchange, Peer};
use ringfence_security_tests::server::{Server, echo};
use ringfence_security_tests::spire::SpireAgent;
use ringfence_security_tests::stage::{
    CLIENT_NODE, PATIENCE, SERVER_NODE, Stage, is_answered, is_reset,
};
use ringfence_security_tests::volume::Volume;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::handshakes::knock;
use crate::impostor::{announce, with_server};
use crate::wire::listen;

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        certificates_from_files_serve_and_are_replaced_without_a_restart,
        certificates_from_spire_serve_and_are_replaced_without_a_restart,
        a_peer_of_an_aliased_trust_domain_is_who_it_would_be_in_ours,
        a_peer_of_another_trust_domain_is_nobody_of_ours,
    ]
}

const FILES: [&str; 3] = ["tls.crt", "tls.key", "ca.crt"];

/// `client` reaches the application, and the other side sees it under that serial number.
fn connects_under(stage: &Stage, node: &str, pod: &str, serial: u64) -> Result<()> {
    let serial = format!("{serial:x}");
    let id = spiffe_id(pod);
    wait_until(
        &format!("{pod} to have certificate {serial}"),
        PATIENCE,
        || {
            let svid = stage.status(node)?.svid(&id)?.clone();
            ensure!(svid.serial == serial && svid.valid, "{svid:?}");
            Ok(())
        },
    )?;
    let _application = stage.application()?;
    is_answered(&stage.attempt("client", Stage::service(Family::V4))?)?;
    let other = if node == CLIENT_NODE {
        SERVER_NODE
    } else {
        CLIENT_NODE
    };
    let seen = stage.status(other)?.handshakes;
    let last = seen.iter().find(|handshake| handshake.peer == id);
    ensure!(
        last.is_some_and(|handshake| handshake.serial == serial),
        "{other} saw {last:?} instead of {serial}"
    );
    Ok(())
}

/// The agent has no certificate of the pod and says so, and the pod reaches nobody and is
/// reached by nobody, in plaintext neither.
fn has_none(stage: &Stage, node: &str, pod: &str, source: &str, reason: &str) -> Result<()> {
    let id = spiffe_id(pod);
    wait_until(
        &format!("{node} to say why {pod} has none"),
        PATIENCE,
        || {
            let status = stage.status(node)?;
            let svid = status.svid(&id)?;
            let error = svid.error.as_deref().unwrap_or_default();
            ensure!(!svid.valid && !status.ready, "{svid:?}");
            for part in [id.as_str(), source, reason] {
                ensure!(error.contains(part), "no `{part}` in: {error}");
            }
            Ok(())
        },
    )?;
    let capture = listen(stage)?;
    let mut application = stage.application()?;
    is_reset(&stage.attempt("client", Stage::service(Family::V4))?)?;
    // Something must be on the wire, or the capture proves nothing.
    let legacy = stage.port("legacy", Family::V4, 8080)?;
    stage.exec(
        "outside",
        "curl",
        &["--silent", &format!("http://{legacy}/")],
    )?;
    let frames = capture.stop()?;
    ensure!(frames_with(&frames, b"GET / HTTP") > 0, "an empty capture");
    ensure!(
        frames_with(&frames, b"hello\n") == 0,
        "plaintext on the wire"
    );
    let accepted = application.accepted();
    ensure!(accepted.is_empty(), "the application accepted {accepted:?}");
    Ok(())
}

fn certificates_from_files_serve_and_are_replaced_without_a_restart(
    stage: &mut Stage,
) -> Result<Verdict> {
    let authority = stage.authority()?;
    let root = std::fs::read_to_string(stage.lab()?.root_certificate())?;
    let directory = stage.lab()?.dir().join("svids");
    let mut volumes = HashMap::new();
    for pod in ["client", "intruder"] {
        let folder = directory.join(NAMESPACE).join(pod);
        volumes.insert(pod, Volume::new(&folder, &FILES)?);
    }
    let mut publish = |pod: &str, named: &str, serial: u64| -> Result<()> {
        let (certificate, key) = authority.issue_pem(&Leaf {
            serial: Some(serial),
            ..Leaf::of(named)
        })?;
        let volume = volumes.get_mut(pod).context("no such volume")?;
        volume.publish(&[
            ("tls.crt", &certificate),
            ("tls.key", &key),
            ("ca.crt", &root),
        ])
    };
    publish("client", "client", 0x1001)?;
    publish("intruder", "intruder", 0x2001)?;
    let source = format!(
        "identity: {{source: {{files: {{directory: {}, folder: \"{{namespace}}/{{service_account}}\"}}}}}}\n",
        directory.display()
    );
    stage.with_agents(
        &[CLIENT_NODE],
        |text| format!("{text}{source}"),
        |stage| {
            stage.lab()?.wait_ready(PATIENCE)?;
            connects_under(stage, CLIENT_NODE, "client", 0x1001)?;
            publish("client", "client", 0x1002)?;
            connects_under(stage, CLIENT_NODE, "client", 0x1002)?;

            // Somebody else's files: what was valid stays in use.
            publish("client", "intruder", 0x1003)?;
            let id = spiffe_id("client");
            wait_until("the agent to refuse the files", PATIENCE, || {
                let svid = stage.status(CLIENT_NODE)?.svid(&id)?.clone();
                ensure!(svid.error.is_some(), "{svid:?}");
                Ok(())
            })?;
            connects_under(stage, CLIENT_NODE, "client", 0x1002)?;
            // And nothing else is there after a restart.
            stage.restart_agent(CLIENT_NODE)?;
            let place = directory.display().to_string();
            has_none(stage, CLIENT_NODE, "client", &place, "tls.crt")?;
            publish("client", "client", 0x1004)?;
            stage.lab()?.wait_ready(PATIENCE)?;
            connects_under(stage, CLIENT_NODE, "client", 0x1004)
        },
    )?;
    Ok(Verdict::Passed)
}

/// The lab's own root, as a bundle.
fn lab_root(stage: &Stage) -> Result<Vec<u8>> {
    Ok(CertificateDer::from_pem_file(stage.lab()?.root_certificate())?.to_vec())
}

fn spire_source(socket: &Path, more: &str) -> String {
    format!(
        "identity: {{source: {{spire: {{socket: {}}}}}{more}}}\n",
        socket.display()
    )
}

fn certificates_from_spire_serve_and_are_replaced_without_a_restart(
    stage: &mut Stage,
) -> Result<Verdict> {
    let socket = stage.lab()?.dir().join("spire.sock");
    let bundles = HashMap::from([(TRUST_DOMAIN.to_owned(), lab_root(stage)?)]);
    let spire = SpireAgent::start(&socket, stage.authority()?, bundles, 0x3001)?;
    stage.with_agents(
        &[SERVER_NODE],
        |text| format!("{text}{}", spire_source(&socket, "")),
        |stage| {
            stage.lab()?.wait_ready(PATIENCE)?;
            connects_under(stage, SERVER_NODE, "web", 0x3001)?;
            spire.rotate(0x3002);
            // Idle tunnels of `client` serve on for a minute at most: only a new one shows it.
            stage.restart_agent(CLIENT_NODE)?;
            stage.lab()?.wait_ready(PATIENCE)?;
            connects_under(stage, SERVER_NODE, "web", 0x3002)?;
            spire.forget_workloads();
            stage.restart_agent(SERVER_NODE)?;
            let place = socket.display().to_string();
            has_none(stage, SERVER_NODE, "web", &place, "registration entry")
        },
    )?;
    Ok(Verdict::Passed)
}

const OLD_DOMAIN: &str = "old.example";

/// A good certificate of the old domain.
fn of_old_domain(authority: &Authority, service_account: &str) -> Result<Credentials> {
    let id = format!("spiffe://{OLD_DOMAIN}/ns/{NAMESPACE}/sa/{service_account}");
    authority.issue(&Leaf {
        uris: vec![id],
        ..Leaf::of(service_account)
    })
}

/// Runs `work` where both agents know the roots of another trust domain, with or without its
/// being an alias of ours. The CA is the other domain's.
fn beside_old_domain(
    stage: &mut Stage,
    more: &str,
    work: impl FnOnce(&mut Stage, &Authority) -> Result<()>,
) -> Result<()> {
    announce(stage)?;
    let (old, old_root) = Authority::with_root()?;
    let socket = stage
        .lab()?
        .dir()
        .join(format!("spire-{}.sock", more.len()));
    let bundles = HashMap::from([
        (TRUST_DOMAIN.to_owned(), lab_root(stage)?),
        (OLD_DOMAIN.to_owned(), old_root.to_vec()),
    ]);
    let _spire = SpireAgent::start(&socket, stage.authority()?, bundles, 0x4001)?;
    stage.with_agents(
        &[CLIENT_NODE, SERVER_NODE],
        |text| format!("{text}{}", spire_source(&socket, more)),
        |stage| {
            stage.lab()?.wait_ready(PATIENCE)?;
            work(stage, &old)
        },
    )
}

/// A peer of the old domain opens a stream to `web` as the `client` that it is there.
fn opens(stage: &Stage, old: &Authority) -> Result<Message> {
    let web = stage.lab()?.pod("web")?.netns();
    let _application = Server::start(&web, TEST_PORT, PATIENCE, echo)?;
    let credentials = of_old_domain(old, "client")?;
    let stream = knock(stage, Family::V4)?;
    let mut peer = Peer::connect(stream, Some(&credentials), &[b"ringfence/1"])?;
    ensure!(peer.hear()? == Message::Ready, "no READY");
    let open = Open::new(
        stage.port("web", Family::V4, TEST_PORT)?,
        SocketAddr::new(stage.address("client", Family::V4)?, 40_001),
    )?;
    peer.say(Message::Open(open))?;
    peer.hear()
}

fn a_peer_of_an_aliased_trust_domain_is_who_it_would_be_in_ours(
    stage: &mut Stage,
) -> Result<Verdict> {
    let alias = format!(", trust_domain_aliases: {{{OLD_DOMAIN}: {TRUST_DOMAIN}}}");
    beside_old_domain(stage, &alias, |stage, old| {
        let answer = opens(stage, old)?;
        ensure!(matches!(answer, Message::Opened { .. }), "{answer:?}");
        let decoy = of_old_domain(old, "decoy")?;
        let (met, outcome) = with_server(stage, decoy, KeyExchange::Any)?;
        ensure!(met.as_deref() == Ok(b"hello\n".as_slice()), "{met:?}");
        is_answered(&outcome)?;
        // Only under its own CA's hand, and only as itself.
        let ours = stage.authority()?;
        for (authority, account) in [(&ours, "decoy"), (old, "intruder")] {
            let credentials = of_old_domain(authority, account)?;
            let (met, outcome) = with_server(stage, credentials, KeyExchange::Any)?;
            ensure!(met.is_err(), "{account}: {met:?}");
            is_reset(&outcome)?;
        }
        Ok(())
    })?;
    Ok(Verdict::Passed)
}

fn a_peer_of_another_trust_domain_is_nobody_of_ours(stage: &mut Stage) -> Result<Verdict> {
    beside_old_domain(stage, "", |stage, old| {
        let answer = opens(stage, old)?;
        ensure!(
            matches!(
                answer,
                Message::Refused {
                    reason: RefuseReason::SourceForged,
                    ..
                }
            ),
            "{answer:?}"
        );
        let decoy = of_old_domain(old, "decoy")?;
        let (met, outcome) = with_server(stage, decoy, KeyExchange::Any)?;
        ensure!(met.is_err(), "{met:?}");
        is_reset(&outcome)
    })?;
    Ok(Verdict::Passed)
}
