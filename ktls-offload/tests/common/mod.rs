//! Two agents and two applications on loopback.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test support, compiled into several test programs"
)]

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ktls_offload::{
    ALPN, ConnectError, Open, RecordLayer, RelayEnd, SoftwareReason, StreamHandle, Tunnel,
    TunnelConfig, probe, relay,
};
use ringfence_identity::testing::{TestCa, workload};
use ringfence_identity::{ExpectedPeer, PeerVerifier, Svid, TrustBundles, tls};
use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, ServerConfig, SupportedCipherSuite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

pub const SOFTWARE: RecordLayer = RecordLayer::Software(SoftwareReason::Configured);

/// Runs `test` on the software record layer.
pub fn on_software<F: Future<Output = ()>>(test: impl FnOnce(RecordLayer) -> F) {
    run(test(SOFTWARE));
}

/// Runs `test` on the kernel's record layer, or says why it cannot.
pub fn on_kernel<F: Future<Output = ()>>(name: &str, test: impl FnOnce(RecordLayer) -> F) {
    match probe() {
        layer @ RecordLayer::Kernel(_) => run(test(layer)),
        RecordLayer::Software(reason) => {
            // Past the test harness's capture: a skip must not look like a pass.
            use std::io::Write;
            let line = format!("SKIPPED {name} on kernel records: {reason}\n");
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }
}

/// Defines a test once for each record layer.
#[macro_export]
macro_rules! on_both_layers {
    ($($name:ident),* $(,)?) => {
        mod software_records {
            $(#[test] fn $name() { $crate::common::on_software(super::$name) })*
        }
        mod kernel_records {
            $(#[test] fn $name() { $crate::common::on_kernel(stringify!($name), super::$name) })*
        }
    };
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(async { within(test).await });
}

/// Nothing in these tests takes this long unless it hangs.
pub async fn within<T>(work: impl Future<Output = T>) -> T {
    let limit = if cfg!(debug_assertions) { 240 } else { 120 };
    tokio::time::timeout(Duration::from_secs(limit), work)
        .await
        .expect("hangs")
}

/// Certificates of both agents, and whom each trusts.
pub struct Pki {
    pub bundles: Arc<TrustBundles>,
    pub client: Svid,
    pub server: Svid,
}

impl Pki {
    pub fn new() -> Self {
        let ca = TestCa::shared();
        Self {
            bundles: ca.bundle(),
            client: ca.svid(&workload("td", "shop", "client")),
            server: ca.svid(&workload("td", "shop", "server")),
        }
    }

    pub fn client_tls(&self) -> (Arc<ClientConfig>, Arc<PeerVerifier>) {
        let expected = ExpectedPeer::only(workload("td", "shop", "server").spiffe_id().clone());
        let verifier = PeerVerifier::new(Arc::clone(&self.bundles), expected);
        let config = tls::client_config(&self.client, Arc::clone(&verifier), &[ALPN]).unwrap();
        (Arc::new(config), verifier)
    }

    pub fn server_tls(&self) -> (Arc<ServerConfig>, Arc<PeerVerifier>) {
        let verifier = PeerVerifier::new(Arc::clone(&self.bundles), ExpectedPeer::AnyTrusted);
        let config = tls::server_config(&self.server, Arc::clone(&verifier), &[ALPN]).unwrap();
        (Arc::new(config), verifier)
    }

    /// As [`Pki::server_tls`], with one cipher suite only.
    pub fn server_tls_of(
        &self,
        suite: SupportedCipherSuite,
    ) -> (Arc<ServerConfig>, Arc<PeerVerifier>) {
        let verifier = PeerVerifier::new(Arc::clone(&self.bundles), ExpectedPeer::AnyTrusted);
        let provider = CryptoProvider {
            cipher_suites: vec![suite],
            ..tls::provider().as_ref().clone()
        };
        let key = Arc::clone(self.server.certified_key());
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(Arc::clone(&verifier) as _)
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_secret_extraction = true;
        config.send_tls13_tickets = 0;
        (Arc::new(config), verifier)
    }

    pub async fn connect(
        &self,
        tcp: TcpStream,
        config: &TunnelConfig,
    ) -> Result<Tunnel, ConnectError> {
        let (tls, verifier) = self.client_tls();
        Tunnel::connect(tcp, tls, &verifier, config).await
    }

    pub async fn accept(
        &self,
        tcp: TcpStream,
        config: &TunnelConfig,
    ) -> Result<Tunnel, ConnectError> {
        let (tls, verifier) = self.server_tls();
        Tunnel::accept(tcp, tls, &verifier, config).await
    }
}

/// Two connected sockets.
pub async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (a, b) = tokio::join!(
        TcpStream::connect(listener.local_addr().unwrap()),
        listener.accept()
    );
    (a.unwrap(), b.unwrap().0)
}

/// Both ends of a tunnel.
pub async fn tunnels(layer: RecordLayer) -> (Tunnel, Tunnel) {
    tunnels_over(tcp_pair().await, layer).await
}

pub async fn tunnels_over((a, b): (TcpStream, TcpStream), layer: RecordLayer) -> (Tunnel, Tunnel) {
    let pki = Pki::new();
    let config = TunnelConfig::new(layer);
    let (client, server) = tokio::join!(pki.connect(a, &config), pki.accept(b, &config));
    let (client, server) = (client.unwrap(), server.unwrap());
    assert_eq!(client.record_layer(), layer);
    assert_eq!(server.record_layer(), layer);
    (client, server)
}

/// Ends of different record layers.
pub async fn tunnels_of(client: RecordLayer, server: RecordLayer) -> (Tunnel, Tunnel) {
    let pki = Pki::new();
    let (a, b) = tcp_pair().await;
    let (client, server) = (TunnelConfig::new(client), TunnelConfig::new(server));
    let (client, server) = tokio::join!(pki.connect(a, &client), pki.accept(b, &server));
    (client.unwrap(), server.unwrap())
}

pub fn destination() -> SocketAddr {
    "10.1.2.3:80".parse().unwrap()
}

pub fn source() -> SocketAddr {
    "10.9.8.7:40000".parse().unwrap()
}

pub fn an_open() -> Open {
    Open::new(destination(), source()).unwrap()
}

/// One stream through both agents: the applications' ends, and the running relays.
pub struct Stream {
    pub client: TcpStream,
    pub server: TcpStream,
    pub client_relay: JoinHandle<RelayEnd>,
    pub server_relay: JoinHandle<RelayEnd>,
    pub client_handle: Arc<StreamHandle>,
    pub server_handle: Arc<StreamHandle>,
}

pub async fn stream(client: Tunnel, server: Tunnel) -> Stream {
    stream_with(client, server, tcp_pair().await, tcp_pair().await).await
}

pub async fn stream_with(
    mut client: Tunnel,
    mut server: Tunnel,
    (client_app, client_agent): (TcpStream, TcpStream),
    (server_app, server_agent): (TcpStream, TcpStream),
) -> Stream {
    let open = an_open();
    client.open(open).await.unwrap();
    let client_handle = Arc::new(StreamHandle::new());
    let server_handle = Arc::new(StreamHandle::new());
    let client_relay = tokio::spawn(relay(client_agent, client, Arc::clone(&client_handle)));
    assert_eq!(server.next_open().await.unwrap(), Some(open));
    server.opened().await.unwrap();
    let server_relay = tokio::spawn(relay(server_agent, server, Arc::clone(&server_handle)));
    Stream {
        client: client_app,
        server: server_app,
        client_relay,
        server_relay,
        client_handle,
        server_handle,
    }
}

/// A reproducible stream of bytes that repeats nowhere near a record or page boundary.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}
