//! The software record layer against rustls's own record layer, both ways, each suite.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::TcpStream as StdStream;
use std::sync::Arc;
use std::time::Duration;

use ringfence_identity::Svid;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::pki_types::ServerName;
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{
    ClientConfig, ClientConnection, ServerConfig, ServerConnection, SupportedCipherSuite,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::{Pki, pattern, tcp_pair, within};
use crate::handshake;
use crate::protocol::ALPN;
use crate::record::aead::RecordKey;
use crate::record::{CLOSE_NOTIFY, Inbound, Incoming, TYPE_ALERT, software};
use crate::stream::Counters;

const TIMEOUT: Duration = Duration::from_secs(10);

const SUITES: [SupportedCipherSuite; 3] = [
    TLS13_AES_128_GCM_SHA256,
    TLS13_AES_256_GCM_SHA384,
    TLS13_CHACHA20_POLY1305_SHA256,
];

fn provider(suite: SupportedCipherSuite) -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![suite],
        ..ringfence_identity::tls::provider().as_ref().clone()
    })
}

/// Echoes what it reads, byte for byte, until close_notify; then closes with one.
fn echo<C, D>(mut conn: C, mut tcp: StdStream) -> usize
where
    C: std::ops::DerefMut<Target = rustls::ConnectionCommon<D>>,
    D: rustls::SideData,
{
    tcp.set_nonblocking(false).unwrap();
    let mut total = 0;
    let mut buf = vec![0; 50_000];
    loop {
        let mut tls = rustls::Stream::new(&mut conn, &mut tcp);
        let n = tls.read(&mut buf).unwrap();
        if n == 0 {
            conn.send_close_notify();
            conn.complete_io(&mut tcp).unwrap();
            return total;
        }
        tls.write_all(&buf[..n]).unwrap();
        total += n;
    }
}

async fn exchange(handshaken: handshake::Handshaken, bytes: Vec<u8>) {
    let sock = handshaken.tcp;
    let mut tx = software::Tx::new(RecordKey::new(handshaken.secrets.tx).unwrap());
    let mut rx = software::Rx::new(RecordKey::new(handshaken.secrets.rx).unwrap());
    let (app, agent) = tcp_pair().await;
    let (mut app_read, mut app_write) = app.into_split();
    let counters = Counters::default();
    let expect = bytes.clone();
    let mut inbound = Inbound::default();
    let up = async {
        tx.copy_from(&agent, &sock, &counters).await.unwrap();
        tx.send(&sock, TYPE_ALERT, &CLOSE_NOTIFY).await.unwrap();
    };
    let down = async {
        let incoming = rx.copy_to(&sock, &agent, &mut inbound, &counters).await;
        assert!(matches!(incoming.unwrap(), Incoming::CloseNotify));
        crate::sys::shutdown_write(crate::sys::fd(&agent)).unwrap();
    };
    let write = async {
        for part in bytes.chunks(70_001) {
            app_write.write_all(part).await.unwrap();
        }
        app_write.shutdown().await.unwrap();
    };
    let read = async {
        let mut got = Vec::new();
        app_read.read_to_end(&mut got).await.unwrap();
        assert!(got == expect, "{} of {} bytes", got.len(), expect.len());
    };
    tokio::join!(up, down, write, read);
}

fn own_certificate(svid: &Svid) -> Arc<SingleCertAndKey> {
    Arc::new(SingleCertAndKey::from(Arc::clone(svid.certified_key())))
}

#[tokio::test(flavor = "multi_thread")]
async fn software_records_and_a_rustls_server_understand_each_other() {
    for suite in SUITES {
        let pki = Pki::new();
        let (a, b) = tcp_pair().await;
        let (_, verifier) = pki.server_tls();
        let mut config = ServerConfig::builder_with_provider(provider(suite))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(own_certificate(&pki.server));
        config.alpn_protocols = vec![ALPN.to_vec()];
        // We ask for no tickets; a peer that sends some is tolerated.
        config.send_tls13_tickets = 3;
        let peer = tokio::task::spawn_blocking(move || {
            let conn = ServerConnection::new(Arc::new(config)).unwrap();
            echo(conn, b.into_std().unwrap())
        });
        let (config, verifier) = pki.client_tls();
        let done = handshake::client(a, config, &verifier, TIMEOUT)
            .await
            .unwrap();
        assert_eq!(done.suite.suite(), suite.suite());
        within(exchange(done, pattern(1, 1_500_000))).await;
        assert_eq!(peer.await.unwrap(), 1_500_000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn software_records_and_a_rustls_client_understand_each_other() {
    for suite in SUITES {
        let pki = Pki::new();
        let (a, b) = tcp_pair().await;
        let (_, verifier) = pki.client_tls();
        let mut config = ClientConfig::builder_with_provider(provider(suite))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(own_certificate(&pki.client));
        config.alpn_protocols = vec![ALPN.to_vec()];
        let peer = tokio::task::spawn_blocking(move || {
            let name = ServerName::IpAddress(std::net::IpAddr::from([127, 0, 0, 1]).into());
            let conn = ClientConnection::new(Arc::new(config), name).unwrap();
            echo(conn, a.into_std().unwrap())
        });
        let (config, verifier) = pki.server_tls();
        let done = handshake::server(b, config, &verifier, TIMEOUT)
            .await
            .unwrap();
        assert_eq!(done.suite.suite(), suite.suite());
        within(exchange(done, pattern(2, 1_500_000))).await;
        assert_eq!(peer.await.unwrap(), 1_500_000);
    }
}
