//! What applications see through a tunnel, on both record layers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[macro_use]
mod common;

use std::io::ErrorKind;

use common::*;
use ktls_offload::{
    Outcome, RecordLayer, RefuseReason, ResetReason, Tunnel, TunnelConfig, TunnelError, relay,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

on_both_layers!(
    bytes_are_exact_in_both_directions_at_once,
    single_bytes_pass_one_by_one,
    a_megabyte_write_passes,
    the_server_may_speak_first,
    half_close_by_the_client_leaves_the_other_way_open,
    half_close_by_the_server_leaves_the_other_way_open,
    an_empty_stream_finishes,
    reset_by_the_client_application_reaches_the_server_application,
    reset_by_the_server_application_reaches_the_client_application,
    reset_after_half_close_is_noticed,
    data_before_a_reset_still_arrives,
    refusal_is_a_reset_for_the_client,
    refusal_reaches_a_client_that_sends_a_lot,
    a_broken_tunnel_is_a_reset_for_both_applications,
    a_cut_stream_is_reset_on_both_sides,
    a_cut_stream_with_a_stuck_application_ends_in_time,
    a_dropped_relay_resets_the_application,
    one_tunnel_serves_a_hundred_streams,
    an_idle_tunnel_closes_cleanly,
    a_slow_reader_gets_every_byte,
    pings_go_back_and_forth,
    both_record_layers_understand_each_other,
    every_cipher_suite_is_exact,
    tiny_socket_buffers_do_not_stall,
    many_streams_at_once_are_exact,
);

async fn bytes_are_exact_in_both_directions_at_once(layer: RecordLayer) {
    let (mut client, mut server) = tunnels(layer).await;
    let mut rng = StdRng::seed_from_u64(7);
    for round in 0..12u64 {
        let s = stream(client, server).await;
        let up = pattern(round, rng.random_range(0..3_000_000));
        let down = pattern(round + 1000, rng.random_range(0..3_000_000));
        let sizes = [rng.random_range(1..=64usize), 1 << rng.random_range(0..=20)];
        let (mut cr, cw) = s.client.into_split();
        let (mut sr, sw) = s.server.into_split();
        let (mut got_up, mut got_down) = (Vec::new(), Vec::new());
        let ((), (), a, b) = tokio::join!(
            write_all(cw, &up, sizes[0] * 977),
            write_all(sw, &down, sizes[1]),
            sr.read_to_end(&mut got_up),
            cr.read_to_end(&mut got_down),
        );
        assert!(a.is_ok() && b.is_ok());
        assert!(got_up == up && got_down == down, "round {round}");
        let (c, s) = (s.client_relay.await.unwrap(), s.server_relay.await.unwrap());
        assert!(matches!(c.outcome, Outcome::Finished), "{:?}", c.outcome);
        assert!(matches!(s.outcome, Outcome::Finished), "{:?}", s.outcome);
        assert_eq!(
            (c.bytes_tx, c.bytes_rx),
            (up.len() as u64, down.len() as u64)
        );
        assert_eq!(
            (s.bytes_tx, s.bytes_rx),
            (down.len() as u64, up.len() as u64)
        );
        (client, server) = (c.tunnel.unwrap(), s.tunnel.unwrap());
    }
}

async fn write_all(mut to: tokio::net::tcp::OwnedWriteHalf, bytes: &[u8], chunk: usize) {
    for part in bytes.chunks(chunk) {
        to.write_all(part).await.unwrap();
    }
    to.shutdown().await.unwrap();
}

async fn single_bytes_pass_one_by_one(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let mut s = stream(client, server).await;
    s.client.set_nodelay(true).unwrap();
    let bytes = pattern(3, 2000);
    for byte in &bytes {
        s.client.write_all(&[*byte]).await.unwrap();
    }
    s.client.shutdown().await.unwrap();
    let mut got = Vec::new();
    s.server.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, bytes);
}

async fn a_megabyte_write_passes(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let mut s = stream(client, server).await;
    let bytes = pattern(4, 1 << 20);
    let expect = bytes.clone();
    let writer = tokio::spawn(async move {
        s.client.write_all(&bytes).await.unwrap();
        s.client.shutdown().await.unwrap();
        s.client
    });
    let mut got = Vec::new();
    s.server.read_to_end(&mut got).await.unwrap();
    assert!(got == expect);
    drop(writer.await.unwrap());
}

async fn the_server_may_speak_first(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let mut s = stream(client, server).await;
    s.server.write_all(b"220 hello\r\n").await.unwrap();
    let mut got = [0; 11];
    s.client.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"220 hello\r\n");
}

async fn half_close_by_the_client_leaves_the_other_way_open(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let s = stream(client, server).await;
    half_close(s.client, s.server).await;
    assert!(matches!(
        s.client_relay.await.unwrap().outcome,
        Outcome::Finished
    ));
    assert!(matches!(
        s.server_relay.await.unwrap().outcome,
        Outcome::Finished
    ));
}

async fn half_close_by_the_server_leaves_the_other_way_open(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let s = stream(client, server).await;
    half_close(s.server, s.client).await;
    assert!(matches!(
        s.client_relay.await.unwrap().outcome,
        Outcome::Finished
    ));
    assert!(matches!(
        s.server_relay.await.unwrap().outcome,
        Outcome::Finished
    ));
}

/// `first` closes its direction; `second` reads to the end, then answers at length.
async fn half_close(mut first: TcpStream, mut second: TcpStream) {
    first.write_all(b"question").await.unwrap();
    first.shutdown().await.unwrap();
    let mut got = Vec::new();
    second.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"question");
    let answer = pattern(5, 300_000);
    let expect = answer.clone();
    let writer = tokio::spawn(async move {
        second.write_all(&answer).await.unwrap();
        second.shutdown().await.unwrap();
        second
    });
    let mut got = Vec::new();
    first.read_to_end(&mut got).await.unwrap();
    assert!(got == expect);
    drop(writer.await.unwrap());
}

async fn an_empty_stream_finishes(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let mut s = stream(client, server).await;
    s.client.shutdown().await.unwrap();
    assert_eq!(s.server.read(&mut [0; 1]).await.unwrap(), 0);
    s.server.shutdown().await.unwrap();
    assert_eq!(s.client.read(&mut [0; 1]).await.unwrap(), 0);
    assert!(s.client_relay.await.unwrap().tunnel.is_some());
    assert!(s.server_relay.await.unwrap().tunnel.is_some());
}

fn close_with_reset(app: TcpStream) {
    app.set_zero_linger().unwrap();
    drop(app);
}

async fn assert_reset(app: &mut TcpStream) {
    let mut sink = Vec::new();
    let error = app.read_to_end(&mut sink).await.expect_err("a clean end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

async fn reset_by_the_client_application_reaches_the_server_application(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let mut s = stream(client, server).await;
    close_with_reset(s.client);
    assert_reset(&mut s.server).await;
    let end = s.client_relay.await.unwrap();
    assert!(
        matches!(end.outcome, Outcome::AppReset),
        "{:?}",
        end.outcome
    );
    assert!(end.tunnel.is_none());
    let end = s.server_relay.await.unwrap();
    assert!(
        matches!(end.outcome, Outcome::PeerReset(ResetReason::AppReset)),
        "{:?}",
        end.outcome
    );
}

async fn reset_by_the_server_application_reaches_the_client_application(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let mut s = stream(client, server).await;
    close_with_reset(s.server);
    assert_reset(&mut s.client).await;
    let end = s.server_relay.await.unwrap();
    assert!(
        matches!(end.outcome, Outcome::AppReset),
        "{:?}",
        end.outcome
    );
    let end = s.client_relay.await.unwrap();
    assert!(
        matches!(end.outcome, Outcome::PeerReset(ResetReason::AppReset)),
        "{:?}",
        end.outcome
    );
}

async fn reset_after_half_close_is_noticed(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let mut s = stream(client, server).await;
    s.client.shutdown().await.unwrap();
    assert_eq!(s.server.read(&mut [0; 1]).await.unwrap(), 0);
    close_with_reset(s.client);
    assert!(matches!(
        s.client_relay.await.unwrap().outcome,
        Outcome::AppReset
    ));
    assert!(matches!(
        s.server_relay.await.unwrap().outcome,
        Outcome::PeerReset(ResetReason::AppReset)
    ));
    // Our end of its connection is gone; it learns that when it writes or waits.
    s.server.readable().await.unwrap();
    assert!(s.server.take_error().unwrap().is_some());
}

async fn data_before_a_reset_still_arrives(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let mut s = stream(client, server).await;
    // Unread bytes at the server application make its close an RST behind its answer.
    s.client.write_all(b"never read").await.unwrap();
    s.server.readable().await.unwrap();
    s.server.write_all(b"last words").await.unwrap();
    drop(s.server);
    let mut got = [0; 10];
    s.client.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"last words");
    assert_reset(&mut s.client).await;
}

async fn refusal_is_a_reset_for_the_client(layer: RecordLayer) {
    let (mut client, mut server) = tunnels(layer).await;
    let (mut app, agent) = tcp_pair().await;
    client.open(an_open()).await.unwrap();
    let relay = tokio::spawn(relay(agent, client, Default::default()));
    server.next_open().await.unwrap().unwrap();
    server.refuse(RefuseReason::PolicyDenied).await.unwrap();
    let end = relay.await.unwrap();
    assert!(
        matches!(end.outcome, Outcome::Refused(RefuseReason::PolicyDenied)),
        "{:?}",
        end.outcome
    );
    assert!(end.tunnel.is_none());
    assert_reset(&mut app).await;
}

async fn refusal_reaches_a_client_that_sends_a_lot(layer: RecordLayer) {
    let (mut client, mut server) = tunnels(layer).await;
    let (mut app, agent) = tcp_pair().await;
    client.open(an_open()).await.unwrap();
    let relay = tokio::spawn(relay(agent, client, Default::default()));
    let writer = tokio::spawn(async move {
        let bytes = pattern(6, 1 << 20);
        while app.write_all(&bytes).await.is_ok() {}
    });
    server.next_open().await.unwrap().unwrap();
    server.refuse(RefuseReason::Overloaded).await.unwrap();
    let end = relay.await.unwrap();
    assert!(
        matches!(end.outcome, Outcome::Refused(RefuseReason::Overloaded)),
        "{:?}",
        end.outcome
    );
    writer.await.unwrap();
}

async fn a_broken_tunnel_is_a_reset_for_both_applications(layer: RecordLayer) {
    // A proxy between the agents that ends the connection with FIN, in the middle.
    let (a, mut a_far) = tcp_pair().await;
    let (b, mut b_far) = tcp_pair().await;
    let proxy = tokio::spawn(async move {
        let _ = tokio::io::copy_bidirectional(&mut a_far, &mut b_far).await;
    });
    let (client, server) = tunnels_over((a, b), layer).await;
    let mut s = stream(client, server).await;
    s.client.write_all(b"some").await.unwrap();
    s.server.read_exact(&mut [0; 4]).await.unwrap();
    proxy.abort();
    assert_reset(&mut s.server).await;
    assert_reset(&mut s.client).await;
    for relay in [s.client_relay, s.server_relay] {
        let end = relay.await.unwrap();
        assert!(
            matches!(end.outcome, Outcome::Tunnel(TunnelError::Truncated)),
            "{:?}",
            end.outcome
        );
    }
}

async fn a_cut_stream_is_reset_on_both_sides(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let mut s = stream(client, server).await;
    s.client.write_all(b"some").await.unwrap();
    s.server.read_exact(&mut [0; 4]).await.unwrap();
    s.server_handle.cut(ResetReason::PolicyChanged);
    assert_reset(&mut s.server).await;
    assert_reset(&mut s.client).await;
    assert!(matches!(
        s.server_relay.await.unwrap().outcome,
        Outcome::Cut(ResetReason::PolicyChanged)
    ));
    assert!(matches!(
        s.client_relay.await.unwrap().outcome,
        Outcome::PeerReset(ResetReason::PolicyChanged)
    ));
}

async fn a_cut_stream_with_a_stuck_application_ends_in_time(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let s = stream(client, server).await;
    let (_stuck, mut writing) = (s.server, s.client);
    // Fill everything up to the application that does not read.
    let bytes = pattern(8, 1 << 20);
    let full = std::time::Duration::from_millis(300);
    while tokio::time::timeout(full, writing.write_all(&bytes))
        .await
        .is_ok()
    {}
    s.client_handle.cut(ResetReason::PolicyChanged);
    assert!(matches!(
        s.client_relay.await.unwrap().outcome,
        Outcome::Cut(ResetReason::PolicyChanged)
    ));
    s.server_handle.cut(ResetReason::PolicyChanged);
    let _ = s.server_relay.await.unwrap();
}

async fn a_dropped_relay_resets_the_application(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let mut s = stream(client, server).await;
    s.client_relay.abort();
    assert_reset(&mut s.client).await;
    assert_reset(&mut s.server).await;
}

async fn one_tunnel_serves_a_hundred_streams(layer: RecordLayer) {
    let (mut client, mut server) = tunnels(layer).await;
    for round in 0..100u64 {
        let mut s = stream(client, server).await;
        let bytes = pattern(round, 1 + (round as usize * 613) % 70_000);
        let expect = bytes.clone();
        let writer = tokio::spawn(async move {
            s.client.write_all(&bytes).await.unwrap();
            s.client.shutdown().await.unwrap();
            let mut got = Vec::new();
            s.client.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"done");
        });
        let mut got = Vec::new();
        s.server.read_to_end(&mut got).await.unwrap();
        assert!(got == expect, "round {round}");
        s.server.write_all(b"done").await.unwrap();
        s.server.shutdown().await.unwrap();
        writer.await.unwrap();
        client = s.client_relay.await.unwrap().tunnel.unwrap();
        server = s.server_relay.await.unwrap().tunnel.unwrap();
        assert!(client.is_reusable());
    }
}

async fn an_idle_tunnel_closes_cleanly(layer: RecordLayer) {
    let (client, mut server) = tunnels(layer).await;
    let (closed, next) = tokio::join!(client.close(), async {
        let next = server.next_open().await;
        drop(server);
        next
    });
    closed.unwrap();
    assert_eq!(next.unwrap(), None);

    // And its twin: a client that just goes away did not close cleanly.
    let (client, mut server) = tunnels(layer).await;
    assert!(client.is_reusable());
    drop(client);
    assert!(matches!(
        server.next_open().await,
        Err(TunnelError::Truncated)
    ));

    // A server that goes away makes the client's idle tunnel unusable.
    let (mut client, server) = tunnels(layer).await;
    drop(server);
    assert!(matches!(client.unusable().await, TunnelError::Truncated));
    assert!(!client.is_reusable());
}

async fn a_slow_reader_gets_every_byte(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let mut s = stream(client, server).await;
    let bytes = pattern(9, 4 << 20);
    let expect = bytes.clone();
    let writer = tokio::spawn(async move {
        s.client.write_all(&bytes).await.unwrap();
        s.client.shutdown().await.unwrap();
        s.client
    });
    let mut got = Vec::new();
    let mut part = [0; 7777];
    loop {
        let n = s.server.read(&mut part).await.unwrap();
        if n == 0 {
            break;
        }
        got.extend_from_slice(&part[..n]);
        if got.len() % 5 == 0 {
            // Slowness is what this test is about.
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }
    assert!(got == expect);
    drop(writer.await.unwrap());
}

/// Sends `bytes` each way at once and checks that each end gets them.
async fn both_ways(s: Stream, bytes: Vec<u8>, chunk: usize) -> (Tunnel, Tunnel) {
    let (mut cr, cw) = s.client.into_split();
    let (mut sr, sw) = s.server.into_split();
    let (mut got_up, mut got_down) = (Vec::new(), Vec::new());
    let ((), (), a, b) = tokio::join!(
        write_all(cw, &bytes, chunk),
        write_all(sw, &bytes, chunk),
        sr.read_to_end(&mut got_up),
        cr.read_to_end(&mut got_down),
    );
    assert!(a.is_ok() && b.is_ok());
    assert!(got_up == bytes && got_down == bytes);
    let (c, s) = (s.client_relay.await.unwrap(), s.server_relay.await.unwrap());
    (c.tunnel.unwrap(), s.tunnel.unwrap())
}

async fn both_record_layers_understand_each_other(layer: RecordLayer) {
    for (c, s) in [(layer, SOFTWARE), (SOFTWARE, layer)] {
        let (mut client, mut server) = tunnels_of(c, s).await;
        for round in 0..3 {
            let s = stream(client, server).await;
            (client, server) = both_ways(s, pattern(round, 700_000), 33_333).await;
        }
    }
}

async fn every_cipher_suite_is_exact(layer: RecordLayer) {
    use rustls::crypto::aws_lc_rs::cipher_suite as suites;
    for suite in [
        suites::TLS13_AES_128_GCM_SHA256,
        suites::TLS13_AES_256_GCM_SHA384,
        suites::TLS13_CHACHA20_POLY1305_SHA256,
    ] {
        let pki = Pki::new();
        let (a, b) = tcp_pair().await;
        let (tls, verifier) = pki.server_tls_of(suite);
        let config = TunnelConfig::new(layer);
        let (client, server) = tokio::join!(
            pki.connect(a, &config),
            Tunnel::accept(b, tls, &verifier, &config)
        );
        let (client, server) = (client.unwrap(), server.unwrap());
        assert_eq!(client.cipher_suite(), suite.suite());
        if let RecordLayer::Kernel(suites) = layer {
            assert_eq!(
                client.record_layer().reason().is_none(),
                suites.contains(suite.suite()),
                "{:?}",
                client.record_layer()
            );
        }
        let s = stream(client, server).await;
        both_ways(s, pattern(11, 500_000), 10_000).await;
    }
}

/// On Linux 6.1 a splice that stops half-way can leave whole records with TCP that it does
/// not send; with a send buffer below two records that is for ever. Buffers are set behind
/// the tunnel's back, as memory pressure would.
async fn tiny_socket_buffers_do_not_stall(layer: RecordLayer) {
    for bytes in [1, 2048, 4096, 8192, 16384, 65536] {
        let (mut client, mut server) = tunnels(layer).await;
        for tunnel in [&client, &server] {
            let sock = socket2::SockRef::from(tunnel.tcp());
            sock.set_send_buffer_size(bytes).unwrap();
        }
        for round in 0..2 {
            let apps = (tcp_pair().await, tcp_pair().await);
            for sock in [&apps.0.1, &apps.1.1] {
                let sock = socket2::SockRef::from(sock);
                sock.set_send_buffer_size(bytes).unwrap();
            }
            let s = stream_with(client, server, apps.0, apps.1).await;
            (client, server) = both_ways(s, pattern(round, 300_000), 65_537).await;
        }
    }
}

async fn many_streams_at_once_are_exact(layer: RecordLayer) {
    let tasks: Vec<_> = (0..40u64)
        .map(|seed| {
            tokio::spawn(async move {
                let (mut client, mut server) = tunnels(layer).await;
                for round in 0..3 {
                    let s = stream(client, server).await;
                    let bytes = pattern(seed * 7 + round, 1 + (seed as usize * 7919) % 200_000);
                    (client, server) = both_ways(s, bytes, 1 + seed as usize * 731).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

async fn pings_go_back_and_forth(layer: RecordLayer) {
    let (client, server) = tunnels(layer).await;
    let s = stream(client, server).await;
    let (mut client, mut server) = (s.client, s.server);
    client.set_nodelay(true).unwrap();
    server.set_nodelay(true).unwrap();
    let echo = tokio::spawn(async move {
        let mut buf = [0; 1024];
        while server.read_exact(&mut buf).await.is_ok() {
            server.write_all(&buf).await.unwrap();
        }
    });
    for round in 0..500 {
        let ping = pattern(round, 1024);
        client.write_all(&ping).await.unwrap();
        let mut pong = vec![0; 1024];
        client.read_exact(&mut pong).await.unwrap();
        assert!(ping == pong);
    }
    drop(client);
    echo.await.unwrap();
}
