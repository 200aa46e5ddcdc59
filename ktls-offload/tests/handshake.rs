//! Peers that cannot be let in: each ends with a typed reason, on both ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::*;
use ktls_offload::{ALPN, ConnectError, HandshakeError, Tunnel, TunnelConfig, TunnelError};
use ringfence_identity::testing::{LeafParams, TestCa, workload};
use ringfence_identity::{ExpectedPeer, PeerRefusal, PeerVerifier, tls};
use rustls::version::TLS13;
use rustls::{AlertDescription, ClientConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const CONFIG: TunnelConfig = TunnelConfig::new(SOFTWARE);

fn refused<T: std::fmt::Debug>(result: Result<T, ConnectError>) -> HandshakeError {
    match result {
        Err(ConnectError::Handshake(e)) => e,
        other => panic!("{other:?}"),
    }
}

/// Both ends' errors when these two meet.
async fn both_refuse(client: &Pki, server: &Pki) -> (HandshakeError, HandshakeError) {
    let (a, b) = tcp_pair().await;
    let (c, s) = tokio::join!(client.connect(a, &CONFIG), server.accept(b, &CONFIG));
    (refused(c), refused(s))
}

/// What a server makes of raw bytes, and what it sends back.
async fn server_meets(bytes: &[u8]) -> (HandshakeError, Vec<u8>) {
    let (mut a, b) = tcp_pair().await;
    let pki = Pki::new();
    let client = async {
        a.write_all(bytes).await.unwrap();
        a.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = a.read_to_end(&mut answer).await;
        answer
    };
    let (answer, result) = tokio::join!(client, pki.accept(b, &CONFIG));
    (refused(result), answer)
}

#[tokio::test]
async fn two_good_peers_learn_each_others_identity() {
    let (client, server) = tunnels(SOFTWARE).await;
    let id = |name| workload("td", "shop", name).spiffe_id().clone();
    assert_eq!(client.peer().id(), &id("server"));
    assert_eq!(server.peer().id(), &id("client"));
    assert_eq!(client.cipher_suite(), server.cipher_suite());
    assert_eq!(
        client.kx_group(),
        Some(rustls::NamedGroup::X25519MLKEM768),
        "post-quantum first"
    );
}

#[tokio::test]
async fn garbage_is_not_tls() {
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: example\r\n\r\n"[..],
        b"SSH-2.0-x\r\n",
        b"\x16\x02\x00\x00\x05hello",
        b"\x17\x03\x03\x00\x05hello",
        b"\x16\x03\x01\x00\x00",
    ] {
        let (error, answer) = server_meets(bytes).await;
        assert!(matches!(error, HandshakeError::NotTls), "{error:?}");
        assert_eq!(answer, b"");
    }
}

#[tokio::test]
async fn a_client_hello_that_does_not_parse_is_answered_with_an_alert() {
    let (error, answer) = server_meets(b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\xff").await;
    assert!(matches!(error, HandshakeError::Misbehaved(_)), "{error:?}");
    assert_eq!(answer, [21, 3, 3, 0, 2, 2, 50], "decode_error");
}

/// A ClientHello as TLS 1.2 has it: no supported_versions.
fn tls12_client_hello() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.push(0);
    // TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
    body.extend([0, 2, 0xc0, 0x2b]);
    body.extend([1, 0]);
    // supported_groups: secp256r1; signature_algorithms: ecdsa_secp256r1_sha256
    let extensions = [
        0, 10, 0, 4, 0, 2, 0, 23, 0, 13, 0, 4, 0, 2, 4, 3, 0, 11, 0, 2, 1, 0,
    ];
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    handshake_record(1, &body)
}

fn handshake_record(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut record = vec![22, 3, 1];
    record.extend((body.len() as u16 + 4).to_be_bytes());
    record.push(kind);
    record.extend(&(body.len() as u32).to_be_bytes()[1..]);
    record.extend(body);
    record
}

#[tokio::test]
async fn a_tls_1_2_client_is_told_the_version() {
    let (error, answer) = server_meets(&tls12_client_hello()).await;
    assert!(matches!(error, HandshakeError::VersionTooOld), "{error:?}");
    assert_eq!(answer, [21, 3, 3, 0, 2, 2, 70], "protocol_version");
}

#[tokio::test]
async fn a_tls_1_2_server_is_refused() {
    let (a, mut b) = tcp_pair().await;
    let pki = Pki::new();
    let mut hello = vec![3, 3];
    hello.extend([9; 32]);
    hello.push(0);
    hello.extend([0xc0, 0x2b, 0, 0, 0]);
    let server = async {
        b.write_all(&handshake_record(2, &hello)).await.unwrap();
        let mut answer = Vec::new();
        b.read_to_end(&mut answer).await.unwrap();
        answer
    };
    let (answer, result) = tokio::join!(server, pki.connect(a, &CONFIG));
    let error = refused(result);
    assert!(matches!(error, HandshakeError::VersionTooOld), "{error:?}");
    assert!(
        answer.ends_with(&[21, 3, 3, 0, 2, 2, 70]),
        "protocol_version"
    );
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let (a, b) = tcp_pair().await;
    let pki = Pki::new();
    let verifier = PeerVerifier::new(Arc::clone(&pki.bundles), ExpectedPeer::AnyTrusted);
    let mut config = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(verifier.clone())
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_secret_extraction = true;
    let (client, server) = tokio::join!(
        Tunnel::connect(a, Arc::new(config), &verifier, &CONFIG),
        pki.accept(b, &CONFIG)
    );
    assert!(matches!(refused(server), HandshakeError::NoCertificate));
    assert!(matches!(
        refused(client),
        HandshakeError::PeerAlert(AlertDescription::CertificateRequired)
    ));
}

#[tokio::test]
async fn a_client_of_an_unknown_trust_domain_is_refused() {
    let mut stranger = Pki::new();
    let other = TestCa::new("elsewhere");
    stranger.client = other.svid(&workload("elsewhere", "shop", "client"));
    let (client, server) = both_refuse(&stranger, &Pki::new()).await;
    assert!(
        matches!(
            server,
            HandshakeError::PeerRefused(PeerRefusal::UnknownTrustDomain(_))
        ),
        "{server:?}"
    );
    assert!(
        matches!(
            client,
            HandshakeError::PeerAlert(AlertDescription::UnknownCA)
        ),
        "{client:?}"
    );
}

#[tokio::test]
async fn an_expired_client_is_refused() {
    let mut old = Pki::new();
    let mut params = LeafParams::good(&workload("td", "shop", "client"));
    params.not_before = SystemTime::now() - Duration::from_secs(7200);
    params.not_after = SystemTime::now() - Duration::from_secs(3600);
    old.client = TestCa::shared().svid_with(&params);
    let (client, server) = both_refuse(&old, &Pki::new()).await;
    assert!(
        matches!(server, HandshakeError::PeerRefused(PeerRefusal::Expired)),
        "{server:?}"
    );
    assert!(
        matches!(
            client,
            HandshakeError::PeerAlert(AlertDescription::CertificateExpired)
        ),
        "{client:?}"
    );
}

#[tokio::test]
async fn a_server_of_another_service_account_is_refused() {
    let mut impostor = Pki::new();
    impostor.server = TestCa::shared().svid(&workload("td", "shop", "somebody-else"));
    let (client, server) = both_refuse(&Pki::new(), &impostor).await;
    assert!(
        matches!(
            client,
            HandshakeError::PeerRefused(PeerRefusal::WrongIdentity(_))
        ),
        "{client:?}"
    );
    assert!(
        matches!(
            server,
            HandshakeError::PeerAlert(AlertDescription::AccessDenied)
        ),
        "{server:?}"
    );
}

#[tokio::test]
async fn another_alpn_or_none_is_refused() {
    for alpn in [&[b"h2".as_slice()][..], &[]] {
        let (a, b) = tcp_pair().await;
        let pki = Pki::new();
        let verifier = PeerVerifier::new(Arc::clone(&pki.bundles), ExpectedPeer::AnyTrusted);
        let config = tls::client_config(&pki.client, Arc::clone(&verifier), alpn).unwrap();
        let (client, server) = tokio::join!(
            Tunnel::connect(a, Arc::new(config), &verifier, &CONFIG),
            pki.accept(b, &CONFIG)
        );
        assert!(matches!(refused(server), HandshakeError::AlpnMismatch));
        assert!(matches!(refused(client), HandshakeError::AlpnMismatch));
    }
}

#[tokio::test]
async fn a_foreign_protocol_agreed_on_is_no_tunnel() {
    let (a, b) = tcp_pair().await;
    let pki = Pki::new();
    let alpn: &[&[u8]] = &[ALPN, b"h2"];
    let (verifier_c, verifier_s) = (
        PeerVerifier::new(Arc::clone(&pki.bundles), ExpectedPeer::AnyTrusted),
        PeerVerifier::new(Arc::clone(&pki.bundles), ExpectedPeer::AnyTrusted),
    );
    let client = tls::client_config(&pki.client, Arc::clone(&verifier_c), alpn).unwrap();
    let server = tls::server_config(&pki.server, Arc::clone(&verifier_s), &[b"h2"]).unwrap();
    let (client, server) = tokio::join!(
        Tunnel::connect(a, Arc::new(client), &verifier_c, &CONFIG),
        Tunnel::accept(b, Arc::new(server), &verifier_s, &CONFIG)
    );
    assert!(matches!(refused(client), HandshakeError::AlpnMismatch));
    assert!(matches!(refused(server), HandshakeError::AlpnMismatch));
}

#[tokio::test]
async fn a_peer_that_dies_during_the_handshake_is_closed() {
    for end in 0..2 {
        for bytes in [&[][..], &[22, 3], &tls12_client_hello()[..20]] {
            let (mut a, b) = tcp_pair().await;
            let pki = Pki::new();
            a.write_all(bytes).await.unwrap();
            if end == 1 {
                a.set_zero_linger().unwrap();
            }
            drop(a);
            let error = refused(pki.accept(b, &CONFIG).await);
            assert!(matches!(error, HandshakeError::Closed), "{error:?}");
        }
    }
    // A server that dies after the ClientHello.
    let (a, mut b) = tcp_pair().await;
    let pki = Pki::new();
    let server = async move {
        b.read_exact(&mut [0; 5]).await.unwrap();
    };
    let ((), result) = tokio::join!(server, pki.connect(a, &CONFIG));
    let error = refused(result);
    assert!(matches!(error, HandshakeError::Closed), "{error:?}");
}

#[tokio::test]
async fn a_silent_peer_runs_into_the_time_limit() {
    let config = TunnelConfig {
        handshake_timeout: Duration::from_millis(100),
        ..CONFIG
    };
    let pki = Pki::new();
    let (_silent, b) = tcp_pair().await;
    let error = refused(pki.accept(b, &config).await);
    assert!(matches!(error, HandshakeError::Timeout), "{error:?}");
    let (_silent, b) = tcp_pair().await;
    let error = refused(pki.connect(b, &config).await);
    assert!(matches!(error, HandshakeError::Timeout), "{error:?}");
}

#[tokio::test]
async fn too_many_handshake_bytes_are_refused() {
    let (error, _) = server_meets(&[22, 3, 1, 0x41, 0x01, 1]).await;
    assert!(matches!(error, HandshakeError::TooLarge), "{error:?}");
    // A handshake message announced with 2^24 - 1 bytes, in as many records as it takes.
    let mut many = Vec::new();
    for _ in 0..9 {
        many.extend([22, 3, 1, 0x40, 0]);
        many.extend([0xff; 1 << 14]);
    }
    many[5] = 1;
    let (error, _) = server_meets(&many).await;
    assert!(
        matches!(
            error,
            HandshakeError::TooLarge | HandshakeError::Misbehaved(_)
        ),
        "{error:?}"
    );
}

/// Passes bytes on, with one bit of byte `at` flipped.
async fn flip(
    from: &mut (impl AsyncReadExt + Unpin),
    to: &mut (impl AsyncWriteExt + Unpin),
    at: Option<usize>,
) {
    let mut passed = 0;
    let mut buf = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut buf).await {
        if let Some(at) = at
            .and_then(|at| at.checked_sub(passed))
            .filter(|at| *at < n)
        {
            buf[at] ^= 0x10;
        }
        passed += n;
        if to.write_all(&buf[..n]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

/// No flipped bit anywhere in the handshake, in either direction, leads to a tunnel or to
/// more than an error.
#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_with_a_flipped_bit_fails_without_harm() {
    let config = TunnelConfig {
        // A flipped length can leave both sides waiting for each other.
        handshake_timeout: Duration::from_millis(500),
        ..CONFIG
    };
    for towards_server in [true, false] {
        // Both flights are longer than 1 KiB (hybrid key shares, certificates).
        for at in (0..1000).step_by(19).chain(0..12) {
            let (a, a_far) = tcp_pair().await;
            let (b, b_far) = tcp_pair().await;
            let proxy = tokio::spawn(async move {
                let (mut ar, mut aw) = a_far.into_split();
                let (mut br, mut bw) = b_far.into_split();
                tokio::join!(
                    flip(&mut ar, &mut bw, towards_server.then_some(at)),
                    flip(&mut br, &mut aw, (!towards_server).then_some(at)),
                );
            });
            let pki = Pki::new();
            let client = tokio::spawn({
                let pki = Pki::new();
                async move { pki.connect(a, &config).await }
            });
            let server = tokio::spawn(async move { pki.accept(b, &config).await });
            let (client, server) = (client.await.unwrap(), server.await.unwrap());
            // The legacy version of the record header is not authenticated (RFC 8446 §5.1).
            if !matches!(at, 1 | 2) {
                assert!(client.is_err(), "byte {at} {towards_server}");
                assert!(server.is_err(), "byte {at} {towards_server}");
            }
            proxy.abort();
        }
    }
}

#[tokio::test]
async fn a_server_that_requires_kernel_records_says_why_it_has_none() {
    let (a, b) = tcp_pair().await;
    let pki = Pki::new();
    let required = TunnelConfig {
        require_kernel: true,
        ..CONFIG
    };
    let (client, server) = tokio::join!(pki.connect(a, &CONFIG), pki.accept(b, &required));
    assert!(matches!(
        server.unwrap_err(),
        ConnectError::Tunnel(TunnelError::KernelRequired(_))
    ));
    // The client sees a connection that ended before READY.
    assert!(matches!(refused(client), HandshakeError::Closed));
}

#[tokio::test]
async fn bytes_behind_the_handshake_stay_in_the_kernel() {
    // The client's first record follows its Finished in the same segment: the server must
    // find it whole, whichever layer reads it.
    let (client, mut server) = tunnels(SOFTWARE).await;
    let mut client: Tunnel = client;
    let open = an_open();
    client.open(open).await.unwrap();
    assert_eq!(server.next_open().await.unwrap(), Some(open));
    let _: &TcpStream = client.tcp();
}
