//! Mesh peers that lie and break rules: the certificate is good, what comes after it is not.
//! The other agent must refuse with a typed reason, and the application must see nothing.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use ktls_offload::protocol::{CONTENT_TYPE, Message, Open, RefuseReason, StreamId, encode};
use ringfence_lab::mesh::{Mesh, TEST_PORT};
use ringfence_lab::probe::GREETING;
use ringfence_lab::topology::Family;
use ringfence_security_tests::authority::Leaf;
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::peer::{ALERT, CLOSE_NOTIFY, DATA, HANDSHAKE, Peer, Received};
use ringfence_security_tests::server::Server;
use ringfence_security_tests::stage::{
    OUTBOUND_PORT, PATIENCE, SERVER_NODE, Stage, TUNNEL_PORT, only_peer,
};

use crate::handshakes::{knock, repelled};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        a_good_open_reaches_the_application_with_the_named_source,
        each_open_on_a_reused_tunnel_is_judged_anew,
        an_open_under_a_denied_identity_is_refused,
        an_open_for_an_address_of_another_pod_is_refused,
        an_open_for_loopback_is_refused,
        an_open_for_the_agents_ports_is_refused,
        an_open_for_port_zero_is_refused,
        an_open_from_the_address_of_another_workload_is_refused,
        an_open_from_the_address_of_nobody_is_refused,
        an_open_of_mixed_families_is_refused,
        an_open_for_a_closed_port_is_refused_with_that_reason,
        data_before_an_open_ends_the_tunnel,
        a_message_that_is_no_open_ends_the_tunnel,
        an_unknown_message_ends_the_tunnel,
        a_reserved_message_ends_the_tunnel,
        an_unknown_content_type_ends_the_tunnel,
        a_skipped_message_number_ends_the_tunnel,
        an_oversized_control_record_ends_the_tunnel,
        a_message_shorter_than_its_header_ends_the_tunnel,
        a_record_cut_short_ends_the_tunnel,
        a_changed_record_ends_the_tunnel,
        a_plaintext_record_ends_the_tunnel,
        a_key_update_ends_the_tunnel,
        a_key_update_in_the_middle_of_a_stream_resets_it,
        a_stream_cut_without_an_end_is_reset_for_the_application,
    ]
}

/// Message types: one that no version has, and one that a later version will.
const MESSAGE_UNKNOWN: u8 = 0x7f;
const MESSAGE_MOVE: u8 = 7;

/// A tunnel to the agent of `web` under the identity of a service account, ready for an OPEN.
fn tunnel(stage: &Stage, family: Family, service_account: &str) -> Result<Peer> {
    let credentials = stage.authority()?.issue(&Leaf::of(service_account))?;
    let mut peer = Peer::connect(knock(stage, family)?, Some(&credentials), &[b"ringfence/1"])?;
    ensure!(peer.hear()? == Message::Ready, "no READY");
    Ok(peer)
}

/// What `client` may ask for: the test port of `web`, from its own address.
fn good_open(stage: &Stage, family: Family) -> Result<Open> {
    Ok(Open::new(
        stage.port("web", family, TEST_PORT)?,
        SocketAddr::new(stage.address("client", family)?, 40_000),
    )?)
}

fn refused(reason: &str) -> String {
    format!("refused{{reason=\"{reason}\"}}")
}

/// An OPEN that is answered with that refusal, and a close.
fn open_refused(
    stage: &mut Stage,
    family: Family,
    identity: &str,
    reason: RefuseReason,
    spoil: impl FnOnce(&Stage, &mut Open) -> Result<()>,
) -> Result<Verdict> {
    repelled(stage, &refused(reason.as_str()), |stage| {
        let mut open = good_open(stage, family)?;
        spoil(stage, &mut open)?;
        let mut peer = tunnel(stage, family, identity)?;
        peer.say(Message::Open(open))?;
        // Data right behind the OPEN, as an honest client sends it.
        peer.put(DATA, b"hello\n")?;
        let answer = peer.hear()?;
        ensure!(
            answer
                == Message::Refused {
                    stream: open.stream,
                    reason
                },
            "the answer is {answer:?}"
        );
        let rest = peer.until_closed()?;
        ensure!(
            rest.iter().all(|(kind, _)| *kind == ALERT),
            "behind the refusal came {rest:?}"
        );
        Ok(())
    })
}

/// An idle tunnel that is closed for what `attack` sends on it.
fn tunnel_ended(
    stage: &mut Stage,
    reason: &str,
    attack: impl FnOnce(&Stage, &mut Peer) -> Result<()>,
) -> Result<Verdict> {
    repelled(stage, &refused(reason), |stage| {
        let mut peer = tunnel(stage, Family::V4, "client")?;
        attack(stage, &mut peer)?;
        let answer = peer.until_closed()?;
        ensure!(
            answer.iter().all(|(kind, _)| *kind == ALERT),
            "it was answered with {answer:?}"
        );
        Ok(())
    })
}

fn a_good_open_reaches_the_application_with_the_named_source(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        let mut application = stage.application()?;
        let mut peer = tunnel(stage, family, "client")?;
        whole_stream(&mut peer, good_open(stage, family)?)?;
        only_peer(&mut application, stage.address("client", family)?)?;
        peer.leave()?;
    }
    Ok(Verdict::Passed)
}

/// One stream from OPEN to END in both directions.
fn whole_stream(peer: &mut Peer, open: Open) -> Result<()> {
    peer.say(Message::Open(open))?;
    peer.put(DATA, b"hello\n")?;
    let answer = peer.hear()?;
    ensure!(
        answer
            == Message::Opened {
                stream: open.stream
            },
        "the answer is {answer:?}"
    );
    let mut data = Vec::new();
    while data.len() < GREETING.len() {
        match peer.receive()? {
            Received::Record(DATA, content) => data.extend(content),
            other => anyhow::bail!("{other:?} after {data:?}"),
        }
    }
    ensure!(data == GREETING, "the application answered {data:?}");
    ensure!(
        peer.hear()?
            == Message::End {
                stream: open.stream
            },
        "no END"
    );
    peer.say(Message::End {
        stream: open.stream,
    })
}

fn each_open_on_a_reused_tunnel_is_judged_anew(stage: &mut Stage) -> Result<Verdict> {
    let mut application = stage.application()?;
    let mut peer = tunnel(stage, Family::V4, "client")?;
    for _ in 0..3 {
        whole_stream(&mut peer, good_open(stage, Family::V4)?)?;
    }
    let mut open = good_open(stage, Family::V4)?;
    open.source.set_ip(stage.address("intruder", Family::V4)?);
    peer.say(Message::Open(open))?;
    let answer = peer.hear()?;
    let reason = RefuseReason::SourceForged;
    ensure!(
        answer
            == Message::Refused {
                stream: open.stream,
                reason
            },
        "the answer is {answer:?}"
    );
    peer.until_closed()?;
    ensure!(
        application.accepted().len() == 3,
        "the application accepted {:?}",
        application.accepted()
    );
    Ok(Verdict::Passed)
}

fn an_open_under_a_denied_identity_is_refused(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        open_refused(
            stage,
            family,
            "intruder",
            RefuseReason::PolicyDenied,
            |stage, open| {
                // Its own address: the policy alone decides.
                open.source.set_ip(stage.address("intruder", family)?);
                Ok(())
            },
        )?;
    }
    Ok(Verdict::Passed)
}

fn an_open_for_an_address_of_another_pod_is_refused(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        for other in ["legacy", "intruder"] {
            open_refused(
                stage,
                family,
                "client",
                RefuseReason::NotLocal,
                |stage, open| {
                    open.destination.set_ip(stage.address(other, family)?);
                    Ok(())
                },
            )?;
        }
    }
    Ok(Verdict::Passed)
}

fn an_open_for_loopback_is_refused(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        open_refused(
            stage,
            family,
            "client",
            RefuseReason::NotLocal,
            |_, open| {
                open.destination.set_ip(family.loopback());
                Ok(())
            },
        )?;
    }
    Ok(Verdict::Passed)
}

fn an_open_for_the_agents_ports_is_refused(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        for port in [TUNNEL_PORT, OUTBOUND_PORT] {
            open_refused(
                stage,
                family,
                "client",
                RefuseReason::AgentPort,
                |_, open| {
                    open.destination.set_port(port);
                    Ok(())
                },
            )?;
        }
    }
    Ok(Verdict::Passed)
}

fn an_open_for_port_zero_is_refused(stage: &mut Stage) -> Result<Verdict> {
    tunnel_ended(stage, "bad-address", |stage, peer| {
        let mut open = good_open(stage, Family::V4)?;
        open.destination.set_port(0);
        peer.say(Message::Open(open))
    })
}

fn an_open_from_the_address_of_another_workload_is_refused(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        for other in ["intruder", "web"] {
            open_refused(
                stage,
                family,
                "client",
                RefuseReason::SourceForged,
                |stage, open| {
                    open.source.set_ip(stage.address(other, family)?);
                    Ok(())
                },
            )?;
        }
    }
    Ok(Verdict::Passed)
}

fn an_open_from_the_address_of_nobody_is_refused(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        open_refused(
            stage,
            family,
            "client",
            RefuseReason::SourceForged,
            |_, open| {
                open.source.set_ip(match family {
                    Family::V4 => Ipv4Addr::new(10, 77, 99, 99).into(),
                    Family::V6 => IpAddr::V6(Ipv6Addr::new(0xfd77, 99, 0, 0, 0, 0, 0, 99)),
                });
                Ok(())
            },
        )?;
    }
    Ok(Verdict::Passed)
}

fn an_open_of_mixed_families_is_refused(stage: &mut Stage) -> Result<Verdict> {
    tunnel_ended(stage, "bad-address", |stage, peer| {
        let mut open = good_open(stage, Family::V4)?;
        open.source.set_ip(stage.address("client", Family::V6)?);
        peer.say(Message::Open(open))
    })
}

fn an_open_for_a_closed_port_is_refused_with_that_reason(stage: &mut Stage) -> Result<Verdict> {
    // The policy has to admit it first.
    const CLOSED: u16 = 9001;
    let admit = |mesh: &mut Mesh| {
        for rule in mesh
            .policies
            .iter_mut()
            .flat_map(|policy| &mut policy.rules)
        {
            rule.ports.push(CLOSED);
        }
    };
    let closed = |stage: &Stage| -> Result<()> {
        let mut open = good_open(stage, Family::V4)?;
        open.destination.set_port(CLOSED);
        let mut peer = tunnel(stage, Family::V4, "client")?;
        peer.say(Message::Open(open))?;
        let answer = peer.hear()?;
        let reason = RefuseReason::ConnectionRefused;
        ensure!(
            answer
                == Message::Refused {
                    stream: open.stream,
                    reason
                },
            "the answer is {answer:?}"
        );
        peer.until_closed()?;
        Ok(())
    };
    stage.change_mesh(admit, "a closed port that the policy admits", closed)?;
    Ok(Verdict::Passed)
}

fn data_before_an_open_ends_the_tunnel(stage: &mut Stage) -> Result<Verdict> {
    tunnel_ended(stage, "data-outside-stream", |_, peer| {
        peer.put(DATA, b"hello\n")
    })
}

fn a_message_that_is_no_open_ends_the_tunnel(stage: &mut Stage) -> Result<Verdict> {
    let stream = StreamId::from_bytes([7; 16]);
    let messages = [
        Message::Ready,
        Message::Opened { stream },
        Message::End { stream },
        Message::Refused {
            stream,
            reason: RefuseReason::Internal,
        },
    ];
    for message in messages {
        tunnel_ended(stage, "unexpected-message", |_, peer| peer.say(message))?;
    }
    Ok(Verdict::Passed)
}

/// The header of a message without a body, first of its direction.
fn empty_message(kind: u8) -> Vec<u8> {
    let mut message = vec![0; 12];
    if let Some(first) = message.first_mut() {
        *first = kind;
    }
    message
}

fn an_unknown_message_ends_the_tunnel(stage: &mut Stage) -> Result<Verdict> {
    tunnel_ended(stage, "unknown-message", |_, peer| {
        peer.put(CONTENT_TYPE, &empty_message(MESSAGE_UNKNOWN))
    })
}

fn a_reserved_message_ends_the_tunnel(stage: &mut Stage) -> Result<Verdict> {
    tunnel_ended(stage, "reserved-message", |_, peer| {
        peer.put(CONTENT_TYPE, &empty_message(MESSAGE_MOVE))
    })
}

fn an_unknown_content_type_ends_the_tunnel(stage: &mut Stage) -> Result<Verdict> {
    tunnel_ended(stage, "unknown-content-type", |_, peer| {
        peer.put(CONTENT_TYPE + 1, b"?")
    })
}

fn a_skipped_message_number_ends_the_tunnel(stage: &mut Stage) -> Result<Verdict> {
    tunnel_ended(stage, "counter-gap", |stage, peer| {
        let open = Message::Open(good_open(stage, Family::V4)?);
        peer.put(CONTENT_TYPE, encode(&open, 1).as_bytes())
    })
}

fn an_oversized_control_record_ends_the_tunnel(stage: &mut Stage) -> Result<Verdict> {
    for length in [4097, 16_384] {
        tunnel_ended(stage, "oversized-record", |_, peer| {
            peer.put(CONTENT_TYPE, &vec![0; length])
        })?;
    }
    Ok(Verdict::Passed)
}

fn a_message_shorter_than_its_header_ends_the_tunnel(stage: &mut Stage) -> Result<Verdict> {
    tunnel_ended(stage, "truncated-message", |_, peer| {
        peer.put(CONTENT_TYPE, &[2; 11])
    })
}

fn a_record_cut_short_ends_the_tunnel(stage: &mut Stage) -> Result<Verdict> {
    tunnel_ended(stage, "truncated", |stage, peer| {
        let open = Message::Open(good_open(stage, Family::V4)?);
        peer.put_spoiled(CONTENT_TYPE, encode(&open, 0).as_bytes(), |record| {
            record.truncate(20)
        })?;
        peer.finish_sending();
        Ok(())
    })
}

fn a_changed_record_ends_the_tunnel(stage: &mut Stage) -> Result<Verdict> {
    tunnel_ended(stage, "bad-record", |stage, peer| {
        let open = Message::Open(good_open(stage, Family::V4)?);
        peer.put_spoiled(CONTENT_TYPE, encode(&open, 0).as_bytes(), |record| {
            if let Some(last) = record.last_mut() {
                *last ^= 1;
            }
        })
    })
}

fn a_plaintext_record_ends_the_tunnel(stage: &mut Stage) -> Result<Verdict> {
    tunnel_ended(stage, "bad-record", |stage, peer| {
        let open = Message::Open(good_open(stage, Family::V4)?);
        let message = encode(&open, 0).as_bytes().to_vec();
        // The message as it is, long enough to pass for a sealed one.
        peer.put_spoiled(CONTENT_TYPE, &message, |record| {
            let body = record.len() - 5;
            record.truncate(5);
            record.extend(message.iter().chain(std::iter::repeat(&0)).take(body));
        })
    })
}

/// KeyUpdate, update_requested (RFC 8446, section 4.6.3).
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 1];

fn a_key_update_ends_the_tunnel(stage: &mut Stage) -> Result<Verdict> {
    tunnel_ended(stage, "key-update", |_, peer| {
        peer.put(HANDSHAKE, &KEY_UPDATE)
    })
}

/// An open stream to a server of ours, which `attack` then spoils; the server must see a reset.
fn stream_reset(
    stage: &mut Stage,
    outcome: &str,
    attack: impl FnOnce(&mut Peer) -> Result<()>,
) -> Result<Verdict> {
    let counter = format!("stream_ends{{reason=\"{outcome}\"}}");
    let before = stage.counter(SERVER_NODE, &counter)?;
    let server = Server::start(
        &stage.lab()?.pod("web")?.netns(),
        TEST_PORT,
        PATIENCE,
        |mut stream| {
            let mut bytes = Vec::new();
            let end = stream.read_to_end(&mut bytes).map_err(|error| error.kind());
            Ok((bytes, end))
        },
    )?;
    let mut peer = tunnel(stage, Family::V4, "client")?;
    let open = good_open(stage, Family::V4)?;
    peer.say(Message::Open(open))?;
    peer.put(DATA, b"first")?;
    let answer = peer.hear()?;
    ensure!(
        answer
            == Message::Opened {
                stream: open.stream
            },
        "the answer is {answer:?}"
    );
    attack(&mut peer)?;
    let (bytes, end) = server.next(PATIENCE)?;
    ensure!(
        b"first".starts_with(&bytes),
        "the application read {bytes:?}"
    );
    ensure!(
        end == Err(ErrorKind::ConnectionReset),
        "the application saw {end:?} instead of a reset"
    );
    peer.finish_sending();
    stage.wait_counter(SERVER_NODE, &counter, before + 1)?;
    Ok(Verdict::Passed)
}

fn a_key_update_in_the_middle_of_a_stream_resets_it(stage: &mut Stage) -> Result<Verdict> {
    stream_reset(stage, "key-update", |peer| {
        peer.put(HANDSHAKE, &KEY_UPDATE)?;
        // What comes behind it is the application's no more.
        peer.put(DATA, b"second")
    })
}

fn a_stream_cut_without_an_end_is_reset_for_the_application(stage: &mut Stage) -> Result<Verdict> {
    // FIN without END or close_notify: anybody on the wire can make one.
    stream_reset(stage, "truncated", |peer| {
        peer.finish_sending();
        Ok(())
    })?;
    stream_reset(stage, "closed-mid-stream", |peer| {
        peer.put(ALERT, &CLOSE_NOTIFY)
    })
}
