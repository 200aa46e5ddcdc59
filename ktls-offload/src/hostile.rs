//! A peer that has a certificate and no manners: every message it can send that breaks the
//! rules, on both record layers. Each case names the error the victim must end with.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::common::{SOFTWARE, an_open, destination, pattern, source, tcp_pair, tunnels_of};
use crate::protocol::{CONTENT_TYPE, Message, ResetReason, StreamId, encode};
use crate::record::{TYPE_ALERT, TYPE_DATA, TYPE_HANDSHAKE};
use crate::{Open, Outcome, RecordLayer, RelayEnd, StreamHandle, Tunnel, TunnelError as E, relay};

on_both_layers!(
    an_idle_server_refuses_what_is_not_an_open,
    a_tolerated_ticket_and_an_empty_record_change_nothing,
    a_repeated_open_is_one_open,
    a_client_in_a_stream_refuses_what_breaks_the_rules,
    a_server_in_a_stream_refuses_what_breaks_the_rules,
    records_that_are_not_sealed_by_the_peer_are_refused,
    padded_records_are_read,
);

/// A tunnel whose client is the attacker. It has software records, which can make any record
/// there is; the victim's are the layer under test.
async fn hostile_client(victim: RecordLayer) -> (Tunnel, Tunnel) {
    tunnels_of(SOFTWARE, victim).await
}

async fn hostile_server(victim: RecordLayer) -> (Tunnel, Tunnel) {
    tunnels_of(victim, SOFTWARE).await
}

/// Sends one record of any type from a tunnel's end.
async fn put(t: &mut Tunnel, record_type: u8, payload: &[u8]) {
    t.tx.records
        .send(&t.sock, record_type, payload)
        .await
        .unwrap();
}

/// Sends a message under a counter of one's choice.
async fn say(t: &mut Tunnel, message: Message, counter: u64) {
    put(t, CONTENT_TYPE, encode(&message, counter).as_bytes()).await;
}

fn is(error: &E, label: &str) {
    assert_eq!(error.as_str(), label, "{error}");
}

async fn an_idle_server_refuses_what_is_not_an_open(layer: RecordLayer) {
    let end = Message::End {
        stream: StreamId::from_bytes([1; 16]),
    };
    let half_ticket = vec![4, 0, 0, 9, 1];
    let cases: Vec<(u8, Vec<u8>, &str)> = vec![
        (0x5b, b"x".to_vec(), "unknown-content-type"),
        (20, b"\x01".to_vec(), "unknown-content-type"),
        (TYPE_DATA, b"data".to_vec(), "data-outside-stream"),
        (TYPE_HANDSHAKE, vec![24, 0, 0, 1, 0], "key-update"),
        (TYPE_HANDSHAKE, half_ticket, "unexpected-handshake"),
        (TYPE_HANDSHAKE, vec![1, 0, 0, 0], "unexpected-handshake"),
        (TYPE_ALERT, vec![2, 40], "alert"),
        (TYPE_ALERT, vec![2], "bad-alert"),
        (TYPE_ALERT, vec![1, 0, 0], "bad-alert"),
        (CONTENT_TYPE, vec![0; 4097], "oversized-record"),
        (CONTENT_TYPE, vec![0; 16384], "oversized-record"),
        (CONTENT_TYPE, vec![1; 5], "truncated-message"),
        (
            CONTENT_TYPE,
            encode(&end, 0).as_bytes().to_vec(),
            "unexpected-message",
        ),
        (
            CONTENT_TYPE,
            encode(&Message::Ready, 0).as_bytes().to_vec(),
            "unexpected-message",
        ),
        (
            CONTENT_TYPE,
            encode(&Message::Open(an_open()), 1).as_bytes().to_vec(),
            "counter-gap",
        ),
    ];
    for (record_type, payload, label) in cases {
        let (mut client, mut server) = hostile_client(layer).await;
        put(&mut client, record_type, &payload).await;
        let error = server.next_open().await.unwrap_err();
        assert_eq!(
            error.as_str(),
            label,
            "{record_type:#x} {payload:x?}: {error}"
        );
    }
    let (mut client, mut server) = hostile_client(layer).await;
    for _ in 0..9 {
        put(&mut client, TYPE_HANDSHAKE, &[4, 0, 0, 1, 0]).await;
    }
    is(&server.next_open().await.unwrap_err(), "flood");
}

async fn a_tolerated_ticket_and_an_empty_record_change_nothing(layer: RecordLayer) {
    let (mut client, mut server) = hostile_client(layer).await;
    put(&mut client, TYPE_HANDSHAKE, &[4, 0, 0, 1, 0]).await;
    put(&mut client, TYPE_DATA, &[]).await;
    let open = an_open();
    client.open(open).await.unwrap();
    assert_eq!(server.next_open().await.unwrap(), Some(open));
}

async fn a_repeated_open_is_one_open(layer: RecordLayer) {
    let (mut client, mut server) = hostile_client(layer).await;
    let (open, next) = (an_open(), an_open());
    for _ in 0..3 {
        say(&mut client, Message::Open(open), 0).await;
    }
    assert_eq!(server.next_open().await.unwrap(), Some(open));
    server.active = None;
    say(&mut client, Message::Open(next), 1).await;
    assert_eq!(server.next_open().await.unwrap(), Some(next));
}

const ID: StreamId = StreamId::from_bytes([1; 16]);

/// What the hostile end does once the stream is open.
enum Act {
    Say(Message, u64),
    Put(u8, Vec<u8>),
    Times(u32, u8, Vec<u8>),
}

async fn act(t: &mut Tunnel, acts: &[Act]) {
    for step in acts {
        match step {
            Act::Say(message, counter) => say(t, *message, *counter).await,
            Act::Put(record_type, payload) => put(t, *record_type, payload).await,
            Act::Times(n, record_type, payload) => {
                for _ in 0..*n {
                    // The victim may have hung up before the last one.
                    let records = &mut t.tx.records;
                    if records.send(&t.sock, *record_type, payload).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

/// Leaves the victim time to find out for itself, then goes: its goodbye waits for that.
async fn hang_up(mut t: Tunnel) {
    let moment = std::time::Duration::from_millis(200);
    let _ = tokio::time::timeout(moment, t.rx.records.discard(&t.sock)).await;
}

fn opened(stream: StreamId) -> Message {
    Message::Opened { stream }
}

fn ended(stream: StreamId) -> Message {
    Message::End { stream }
}

fn reset(stream: StreamId) -> Message {
    Message::Reset {
        stream,
        reason: ResetReason::AppReset,
    }
}

/// The error a relay must have ended with; the application must have seen a reset, and a
/// clean end of its reading direction only if the peer did send `END`.
async fn outcome(end: RelayEnd, mut app: TcpStream, acts: &[Act]) -> E {
    use tokio::io::AsyncReadExt;
    assert!(end.tunnel.is_none());
    let ended = |act: &Act| matches!(act, Act::Say(Message::End { stream }, _) if *stream == ID);
    // An END that was accepted is never the first answer of a server.
    if acts.iter().skip(usize::from(acts.len() == 1)).any(ended) {
        assert_eq!(app.read(&mut [0; 1]).await.ok(), Some(0));
        // Then the reset: it breaks the direction that was still open.
        while app.write_all(&[1; 100]).await.is_ok() {
            tokio::task::yield_now().await;
        }
    } else {
        let error = app
            .read_to_end(&mut Vec::new())
            .await
            .expect_err("clean end");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    match end.outcome {
        Outcome::Tunnel(error) => error,
        other => panic!("{other:?}"),
    }
}

async fn a_client_in_a_stream_refuses_what_breaks_the_rules(layer: RecordLayer) {
    let id = ID;
    let other = StreamId::from_bytes([2; 16]);
    let close_notify = || Act::Put(TYPE_ALERT, vec![1, 0]);
    // READY was message 0 of this direction.
    let cases: Vec<(Vec<Act>, &str)> = vec![
        (vec![Act::Say(opened(other), 1)], "wrong-stream"),
        (vec![Act::Say(ended(id), 1)], "unexpected-message"),
        (vec![Act::Put(TYPE_DATA, vec![1])], "data-outside-stream"),
        (vec![close_notify()], "closed-mid-stream"),
        (vec![Act::Say(opened(id), 2)], "counter-gap"),
        (
            vec![Act::Say(opened(id), 1), Act::Say(opened(id), 2)],
            "unexpected-message",
        ),
        (
            vec![Act::Say(opened(id), 1), Act::Say(ended(other), 2)],
            "wrong-stream",
        ),
        (
            vec![Act::Say(opened(id), 1), Act::Say(reset(other), 2)],
            "wrong-stream",
        ),
        (
            vec![
                Act::Say(opened(id), 1),
                Act::Say(ended(id), 2),
                Act::Say(ended(id), 3),
            ],
            "unexpected-message",
        ),
        (
            vec![
                Act::Say(opened(id), 1),
                Act::Say(ended(id), 2),
                Act::Put(TYPE_DATA, vec![1]),
            ],
            "data-outside-stream",
        ),
        (
            vec![Act::Say(opened(id), 1), close_notify()],
            "closed-mid-stream",
        ),
        (
            vec![
                Act::Say(opened(id), 1),
                Act::Put(TYPE_DATA, vec![1]),
                Act::Put(TYPE_HANDSHAKE, vec![24, 0, 0, 1, 1]),
            ],
            "key-update",
        ),
        (
            vec![
                Act::Say(opened(id), 1),
                Act::Put(TYPE_DATA, vec![1; 100]),
                Act::Put(0x17 + 1, vec![1]),
            ],
            "unknown-content-type",
        ),
    ];
    for (i, (acts, label)) in cases.into_iter().enumerate() {
        let (mut client, mut server) = hostile_server(layer).await;
        let (app, agent) = tcp_pair().await;
        let open = Open {
            stream: id,
            destination: destination(),
            source: source(),
            flags: 0,
        };
        client.open(open).await.unwrap();
        let relay = tokio::spawn(relay(agent, client, Arc::new(StreamHandle::new())));
        act(&mut server, &acts).await;
        hang_up(server).await;
        let error = outcome(relay.await.unwrap(), app, &acts).await;
        assert_eq!(error.as_str(), label, "case {i}: {error}");
    }
}

async fn a_server_in_a_stream_refuses_what_breaks_the_rules(layer: RecordLayer) {
    let id = ID;
    let open = Open {
        stream: id,
        destination: destination(),
        source: source(),
        flags: 0,
    };
    let cases: Vec<(Vec<Act>, &str)> = vec![
        (vec![Act::Say(Message::Open(open), 1)], "unexpected-message"),
        (vec![Act::Say(Message::Ready, 1)], "unexpected-message"),
        (vec![Act::Put(TYPE_ALERT, vec![1, 0])], "closed-mid-stream"),
        (vec![Act::Put(TYPE_ALERT, vec![2, 80])], "alert"),
        (
            vec![Act::Put(
                CONTENT_TYPE,
                [&[7, 0, 0, 0][..], &[0; 8]].concat(),
            )],
            "reserved-message",
        ),
        (
            vec![
                Act::Say(ended(id), 1),
                // Before our END the client may not start another stream.
                Act::Say(Message::Open(an_open()), 2),
            ],
            "unexpected-message",
        ),
    ];
    for (i, (acts, label)) in cases.into_iter().enumerate() {
        let (mut client, mut server) = hostile_client(layer).await;
        let (app, agent) = tcp_pair().await;
        client.open(open).await.unwrap();
        server.next_open().await.unwrap().unwrap();
        server.opened().await.unwrap();
        let relay = tokio::spawn(relay(agent, server, Arc::new(StreamHandle::new())));
        act(&mut client, &acts).await;
        hang_up(client).await;
        let error = outcome(relay.await.unwrap(), app, &acts).await;
        assert_eq!(error.as_str(), label, "case {i}: {error}");
    }

    // Empty records: a few are tolerated, a flood is not.
    for (empties, flood) in [(20, false), (500, true)] {
        let (mut client, mut server) = hostile_client(layer).await;
        let (mut app, agent) = tcp_pair().await;
        client.open(open).await.unwrap();
        server.next_open().await.unwrap().unwrap();
        server.opened().await.unwrap();
        let relay = tokio::spawn(relay(agent, server, Arc::new(StreamHandle::new())));
        act(&mut client, &[Act::Times(empties, TYPE_DATA, vec![])]).await;
        if flood {
            hang_up(client).await;
            let error = outcome(relay.await.unwrap(), app, &[]).await;
            match layer {
                RecordLayer::Software(_) => is(&error, "flood"),
                // The kernel skips any number of them within one system call and shows us
                // some or none. What counts is that they are never taken for a clean end.
                RecordLayer::Kernel(_) => {
                    assert!(["flood", "truncated"].contains(&error.as_str()), "{error}")
                }
            }
        } else {
            put(&mut client, TYPE_DATA, b"still here").await;
            let mut got = [0; 10];
            tokio::io::AsyncReadExt::read_exact(&mut app, &mut got)
                .await
                .unwrap();
            assert_eq!(&got, b"still here");
            relay.abort();
        }
    }
}

async fn records_that_are_not_sealed_by_the_peer_are_refused(layer: RecordLayer) {
    let cases: [(&[u8], &str); 5] = [
        (
            &[
                23, 3, 3, 0, 20, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19,
                20,
            ],
            "bad-record",
        ),
        (&[23, 3, 3, 0, 3, 1, 2, 3], "bad-record"),
        (
            &[
                21, 2, 3, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            ],
            "bad-record",
        ),
        (&[23, 3, 3, 0x60, 0, 1, 2], "oversized-record"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "bad-record"),
    ];
    for in_stream in [false, true] {
        for (bytes, label) in cases {
            let (mut client, mut server) = hostile_client(layer).await;
            client.open(an_open()).await.unwrap();
            server.next_open().await.unwrap().unwrap();
            server.opened().await.unwrap();
            if in_stream {
                let (_app, agent) = tcp_pair().await;
                let relay = tokio::spawn(relay(agent, server, Arc::default()));
                client.sock.write_all(bytes).await.unwrap();
                let end = within_a_moment(relay).await.unwrap();
                match end.outcome {
                    Outcome::Tunnel(error) => is(&error, label),
                    other => panic!("{bytes:x?}: {other:?}"),
                }
            } else {
                server.active = None;
                client.sock.write_all(bytes).await.unwrap();
                is(
                    &within_a_moment(server.next_open()).await.unwrap_err(),
                    label,
                );
            }
        }
    }
}

async fn within_a_moment<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(std::time::Duration::from_secs(20), work)
        .await
        .expect("the victim waits instead of refusing")
}

async fn padded_records_are_read(layer: RecordLayer) {
    let (mut client, mut server) = hostile_client(layer).await;
    let mut padded = encode(&Message::Open(an_open()), 0).as_bytes().to_vec();
    padded.push(CONTENT_TYPE);
    padded.resize(padded.len() + 300, 0);
    // Type 0 as the last byte makes what is before it the type and padding.
    put(&mut client, 0, &padded).await;
    assert!(server.next_open().await.unwrap().is_some());
    server.opened().await.unwrap();
    let (mut app, agent) = tcp_pair().await;
    let relay = tokio::spawn(relay(agent, server, Arc::default()));
    let data = pattern(1, 5000);
    for chunk in data.chunks(1000) {
        let mut padded = chunk.to_vec();
        padded.push(TYPE_DATA);
        padded.resize(padded.len() + 77, 0);
        put(&mut client, 0, &padded).await;
        // And an empty record behind each.
        put(&mut client, TYPE_DATA, &[]).await;
    }
    let mut got = vec![0; 5000];
    tokio::io::AsyncReadExt::read_exact(&mut app, &mut got)
        .await
        .unwrap();
    assert!(got == data);
    // Nothing in this test is about how it ends.
    relay.abort();
}
