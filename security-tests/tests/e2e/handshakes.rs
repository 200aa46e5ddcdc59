//! Strangers at the tunnel port of `web`: every handshake that must fail, and the one that
//! must not. The attacker is in a pod outside the mesh, where nothing holds it back.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use ktls_offload::protocol::Message;
use ringfence_lab::probe::GREETING;
use ringfence_lab::topology::Family;
use ringfence_security_tests::authority::{Authority, Leaf, spiffe_id};
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::hello::{record, tls12_client_hello};
use ringfence_security_tests::peer::{ALERT, HANDSHAKE, Peer, read_until_closed};
use ringfence_security_tests::stage::{SERVER_NODE, Stage, TUNNEL_PORT, is_answered, only_peer};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        a_good_certificate_is_welcomed_with_ready,
        garbage_is_closed_as_not_tls,
        a_plaintext_request_is_closed_as_not_tls,
        an_endless_first_record_is_refused_by_its_header,
        a_tls12_client_is_refused,
        a_client_without_a_certificate_is_refused,
        a_certificate_of_another_ca_is_refused_although_its_names_are_right,
        a_certificate_of_another_trust_domain_is_refused,
        a_trust_domain_that_our_own_ca_does_not_speak_for_is_refused,
        an_expired_certificate_is_refused,
        a_certificate_not_yet_valid_is_refused,
        a_certificate_with_two_uri_sans_is_refused,
        a_certificate_without_a_uri_san_is_refused,
        a_certificate_with_a_malformed_spiffe_id_is_refused,
        a_ca_certificate_is_refused_as_a_leaf,
        a_certificate_for_servers_alone_is_refused,
        a_certificate_without_its_key_is_refused,
        an_alpn_of_a_stranger_is_refused,
        a_client_without_alpn_is_refused,
        a_peer_that_dies_after_its_hello_leaves_nothing_behind,
        a_peer_that_falls_silent_is_closed_at_the_limit,
        a_crowd_of_silent_peers_keeps_no_good_client_waiting,
    ]
}

const RINGFENCE: &[&[u8]] = &[b"ringfence/1"];

/// TLS alerts (RFC 8446, section 6).
mod alert {
    pub const BAD_CERTIFICATE: u8 = 42;
    pub const UNSUPPORTED_CERTIFICATE: u8 = 43;
    pub const CERTIFICATE_EXPIRED: u8 = 45;
    pub const UNKNOWN_CA: u8 = 48;
    pub const DECRYPT_ERROR: u8 = 51;
    pub const PROTOCOL_VERSION: u8 = 70;
    pub const CERTIFICATE_REQUIRED: u8 = 116;
    pub const NO_APPLICATION_PROTOCOL: u8 = 120;
}

fn failures(reason: &str) -> String {
    format!("handshake_failures{{reason=\"{reason}\"}}")
}

/// Runs an attack that must end with `counter` of the server's agent one higher, with nothing
/// in the application, and with an agent that serves `client` as before.
pub fn repelled(
    stage: &mut Stage,
    counter: &str,
    attack: impl FnOnce(&Stage) -> Result<()>,
) -> Result<Verdict> {
    let mut application = stage.application()?;
    let before = stage.counter(SERVER_NODE, counter)?;
    attack(stage)?;
    stage.wait_counter(SERVER_NODE, counter, before + 1)?;
    is_answered(&stage.attempt("client", Stage::service(Family::V4))?)
        .context("a good client afterwards")?;
    only_peer(&mut application, stage.address("client", Family::V4)?)?;
    Ok(Verdict::Passed)
}

/// A connection from outside the mesh to the tunnel port of `web`.
pub fn knock(stage: &Stage, family: Family) -> Result<TcpStream> {
    stage.connect("outside", stage.port("web", family, TUNNEL_PORT)?)
}

/// Shows a certificate, and is told the alert: on this side the handshake is complete before
/// the server has judged it.
fn shown(stage: &Stage, authority: &Authority, leaf: &Leaf, expected: u8) -> Result<()> {
    let credentials = authority.issue(leaf)?;
    let mut peer = Peer::connect(knock(stage, Family::V4)?, Some(&credentials), RINGFENCE)?;
    alerted(&mut peer, expected)
}

fn alerted(peer: &mut Peer, expected: u8) -> Result<()> {
    let records = peer.until_closed()?;
    ensure!(
        records == [(ALERT, vec![2, expected])],
        "records {records:?} instead of alert {expected}"
    );
    Ok(())
}

/// A bad certificate from the lab's own CA.
fn misissued(
    stage: &mut Stage,
    reason: &str,
    alert: u8,
    spoil: impl FnOnce(&mut Leaf),
) -> Result<Verdict> {
    repelled(stage, &failures(reason), |stage| {
        let mut leaf = Leaf::of("client");
        spoil(&mut leaf);
        shown(stage, &stage.authority()?, &leaf, alert)
    })
}

fn a_good_certificate_is_welcomed_with_ready(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        repelled(stage, "handshakes", |stage| {
            let credentials = stage.authority()?.issue(&Leaf::of("client"))?;
            let mut peer = Peer::connect(knock(stage, family)?, Some(&credentials), RINGFENCE)?;
            ensure!(peer.hear()? == Message::Ready, "no READY");
            peer.leave()
        })?;
    }
    Ok(Verdict::Passed)
}

/// Sends bytes and waits to be closed.
fn closed_on(stage: &Stage, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut stream = knock(stage, Family::V4)?;
    stream.write_all(bytes)?;
    read_until_closed(&mut stream)
}

fn garbage_is_closed_as_not_tls(stage: &mut Stage) -> Result<Verdict> {
    repelled(stage, &failures("not-tls"), |stage| {
        let answer = closed_on(stage, &[0xa5; 512])?;
        ensure!(answer.is_empty(), "garbage was answered with {answer:02x?}");
        Ok(())
    })
}

fn a_plaintext_request_is_closed_as_not_tls(stage: &mut Stage) -> Result<Verdict> {
    repelled(stage, &failures("not-tls"), |stage| {
        let answer = closed_on(stage, b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")?;
        ensure!(
            answer.is_empty(),
            "a plaintext request was answered with {answer:02x?}"
        );
        Ok(())
    })
}

fn an_endless_first_record_is_refused_by_its_header(stage: &mut Stage) -> Result<Verdict> {
    repelled(stage, &failures("too-large"), |stage| {
        closed_on(stage, &[HANDSHAKE, 3, 1, 0xff, 0xff, 1])?;
        Ok(())
    })
}

fn a_tls12_client_is_refused(stage: &mut Stage) -> Result<Verdict> {
    repelled(stage, &failures("version-too-old"), |stage| {
        let answer = closed_on(stage, &tls12_client_hello(b"ringfence/1"))?;
        let fatal = [ALERT, 3, 3, 0, 2, 2, alert::PROTOCOL_VERSION];
        ensure!(answer == fatal, "it was answered with {answer:02x?}");
        Ok(())
    })
}

fn a_client_without_a_certificate_is_refused(stage: &mut Stage) -> Result<Verdict> {
    repelled(stage, &failures("no-certificate"), |stage| {
        let mut peer = Peer::connect(knock(stage, Family::V4)?, None, RINGFENCE)?;
        alerted(&mut peer, alert::CERTIFICATE_REQUIRED)
    })
}

fn a_certificate_of_another_ca_is_refused_although_its_names_are_right(
    stage: &mut Stage,
) -> Result<Verdict> {
    repelled(stage, &failures("untrusted"), |stage| {
        shown(
            stage,
            &Authority::stranger()?,
            &Leaf::of("client"),
            alert::UNKNOWN_CA,
        )
    })
}

fn a_certificate_of_another_trust_domain_is_refused(stage: &mut Stage) -> Result<Verdict> {
    repelled(stage, &failures("unknown-trust-domain"), |stage| {
        let uris = vec!["spiffe://elsewhere.example/ns/demo/sa/client".into()];
        shown(
            stage,
            &Authority::stranger()?,
            &Leaf {
                uris,
                ..Leaf::of("client")
            },
            alert::UNKNOWN_CA,
        )
    })
}

fn a_trust_domain_that_our_own_ca_does_not_speak_for_is_refused(
    stage: &mut Stage,
) -> Result<Verdict> {
    misissued(stage, "unknown-trust-domain", alert::UNKNOWN_CA, |leaf| {
        leaf.uris = vec!["spiffe://elsewhere.example/ns/demo/sa/client".into()];
    })
}

fn an_expired_certificate_is_refused(stage: &mut Stage) -> Result<Verdict> {
    misissued(stage, "expired", alert::CERTIFICATE_EXPIRED, |leaf| {
        leaf.not_before = SystemTime::now() - Duration::from_secs(7200);
        leaf.not_after = SystemTime::now() - Duration::from_secs(3600);
    })
}

fn a_certificate_not_yet_valid_is_refused(stage: &mut Stage) -> Result<Verdict> {
    misissued(stage, "not-yet-valid", alert::CERTIFICATE_EXPIRED, |leaf| {
        leaf.not_before = SystemTime::now() + Duration::from_secs(3600);
        leaf.not_after = SystemTime::now() + Duration::from_secs(7200);
    })
}

fn a_certificate_with_two_uri_sans_is_refused(stage: &mut Stage) -> Result<Verdict> {
    misissued(stage, "several-uri-sans", alert::BAD_CERTIFICATE, |leaf| {
        leaf.uris.push(spiffe_id("intruder"));
    })
}

fn a_certificate_without_a_uri_san_is_refused(stage: &mut Stage) -> Result<Verdict> {
    misissued(stage, "no-uri-san", alert::BAD_CERTIFICATE, |leaf| {
        leaf.uris.clear();
        leaf.dns_names.push("client.demo.svc.cluster.local".into());
    })
}

fn a_certificate_with_a_malformed_spiffe_id_is_refused(stage: &mut Stage) -> Result<Verdict> {
    misissued(stage, "invalid-spiffe-id", alert::BAD_CERTIFICATE, |leaf| {
        leaf.uris = vec!["spiffe://cluster.local/ns/demo/../demo/sa/client".into()];
    })
}

fn a_ca_certificate_is_refused_as_a_leaf(stage: &mut Stage) -> Result<Verdict> {
    misissued(
        stage,
        "leaf-is-ca",
        alert::UNSUPPORTED_CERTIFICATE,
        |leaf| leaf.is_ca = true,
    )
}

fn a_certificate_for_servers_alone_is_refused(stage: &mut Stage) -> Result<Verdict> {
    misissued(
        stage,
        "extended-key-usage",
        alert::UNSUPPORTED_CERTIFICATE,
        |leaf| {
            leaf.usages.truncate(1);
        },
    )
}

fn a_certificate_without_its_key_is_refused(stage: &mut Stage) -> Result<Verdict> {
    repelled(stage, &failures("bad-handshake-signature"), |stage| {
        // Certificates are public: here is one that was seen, with a key of one's own.
        let mut stolen = stage.authority()?.issue(&Leaf::of("client"))?;
        stolen.key = Authority::stranger()?.issue(&Leaf::of("client"))?.key;
        let mut peer = Peer::connect(knock(stage, Family::V4)?, Some(&stolen), RINGFENCE)?;
        alerted(&mut peer, alert::DECRYPT_ERROR)
    })
}

fn an_alpn_of_a_stranger_is_refused(stage: &mut Stage) -> Result<Verdict> {
    let strangers: [&[&[u8]]; 3] = [&[b"h2"], &[b"http/1.1", b"h2"], &[b"ringfence/2"]];
    for alpn in strangers {
        repelled(stage, &failures("alpn-mismatch"), |stage| {
            let credentials = stage.authority()?.issue(&Leaf::of("client"))?;
            match Peer::connect(knock(stage, Family::V4)?, Some(&credentials), alpn) {
                Ok(_) => anyhow::bail!("the handshake succeeded"),
                Err(error) => {
                    let expected = rustls::AlertDescription::from(alert::NO_APPLICATION_PROTOCOL);
                    let got = error.downcast_ref::<rustls::Error>();
                    ensure!(
                        got == Some(&rustls::Error::AlertReceived(expected)),
                        "{error:?}"
                    );
                    Ok(())
                }
            }
        })?;
    }
    Ok(Verdict::Passed)
}

fn a_client_without_alpn_is_refused(stage: &mut Stage) -> Result<Verdict> {
    repelled(stage, &failures("alpn-mismatch"), |stage| {
        let credentials = stage.authority()?.issue(&Leaf::of("client"))?;
        let mut peer = Peer::connect(knock(stage, Family::V4)?, Some(&credentials), &[])?;
        let records = peer.until_closed()?;
        ensure!(
            records.iter().all(|(kind, _)| *kind == ALERT),
            "it was told {records:?}"
        );
        Ok(())
    })
}

/// The ClientHello of a proper client, as it would send it.
fn good_hello() -> Result<Vec<u8>> {
    Peer::first_flight(RINGFENCE)
}

fn a_peer_that_dies_after_its_hello_leaves_nothing_behind(stage: &mut Stage) -> Result<Verdict> {
    repelled(stage, &failures("closed"), |stage| {
        let mut stream = knock(stage, Family::V4)?;
        stream.write_all(&good_hello()?)?;
        stream.shutdown(Shutdown::Write)?;
        read_until_closed(&mut stream)?;
        Ok(())
    })?;
    // In the middle of a record, too.
    repelled(stage, &failures("closed"), |stage| {
        let mut stream = knock(stage, Family::V4)?;
        let hello = good_hello()?;
        stream.write_all(hello.get(..hello.len() / 2).unwrap_or_default())?;
        stream.shutdown(Shutdown::Write)?;
        read_until_closed(&mut stream)?;
        Ok(())
    })
}

fn a_crowd_of_silent_peers_keeps_no_good_client_waiting(stage: &mut Stage) -> Result<Verdict> {
    let mut crowd = Vec::new();
    for _ in 0..200 {
        crowd.push(knock(stage, Family::V4)?);
    }
    let application = stage.application()?;
    // New connections all of them, and one tunnel for each: none is free before the end.
    let clients: Vec<TcpStream> = (0..20)
        .map(|_| stage.connect("client", Stage::service(Family::V4)))
        .collect::<Result<_>>()?;
    for mut client in clients {
        client.write_all(b"hello\n")?;
        let mut answer = Vec::new();
        client.read_to_end(&mut answer)?;
        ensure!(
            answer == GREETING,
            "a good client was answered with {answer:?}"
        );
    }
    drop((crowd, application));
    Ok(Verdict::Passed)
}

fn a_peer_that_falls_silent_is_closed_at_the_limit(stage: &mut Stage) -> Result<Verdict> {
    let timeout = failures("timeout");
    let before = stage.counter(SERVER_NODE, &timeout)?;
    let beginnings = [
        Vec::new(),
        record(HANDSHAKE, &[1, 0]).into_iter().take(3).collect(),
        good_hello()?,
    ];
    let mut silent = Vec::new();
    for beginning in &beginnings {
        let mut stream = knock(stage, Family::V4)?;
        stream.write_all(beginning)?;
        silent.push(stream);
    }
    for mut stream in silent {
        read_until_closed(&mut stream).context("a silent peer is not closed")?;
    }
    stage.wait_counter(SERVER_NODE, &timeout, before + 3)?;
    let _application = stage.application()?;
    is_answered(&stage.attempt("client", Stage::service(Family::V4))?)?;
    Ok(Verdict::Passed)
}
