//! `cargo xtask bench identity`: what a handshake costs by key type and key exchange, and
//! what an SVID under management costs in memory. Both ends run on one thread, so that the
//! CPU time of a handshake is that of client and server together.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::SignatureAlgorithm;
use ringfence_identity::testing::{LeafParams, TestCa, handshake, workload};
use ringfence_identity::{
    ExpectedPeer, FetchFuture, Issued, ManagerConfig, PeerVerifier, Svid, SvidManager, SvidSource,
    TrustBundles, WorkloadIdentity, tls,
};
use rustls::crypto::SupportedKxGroup;
use rustls::crypto::aws_lc_rs::kx_group;

/// Handshakes of one round; the best of several rounds counts.
const HANDSHAKES: u32 = 300;
const ROUNDS: usize = 5;
/// SVIDs whose memory is measured.
const MANAGED: usize = 2_000;

fn main() {
    // `cargo test` runs benches too, with an argument of its own: nothing to measure there.
    if std::env::args().any(|a| a == "--test") {
        return;
    }
    let ca = TestCa::new("cluster.local");
    let keys: [(&str, &'static SignatureAlgorithm); 2] = [
        ("ECDSA P-256", &rcgen::PKCS_ECDSA_P256_SHA256),
        ("Ed25519", &rcgen::PKCS_ED25519),
    ];
    let groups: [(&str, &'static dyn SupportedKxGroup); 3] = [
        ("X25519MLKEM768", kx_group::X25519MLKEM768),
        ("X25519", kx_group::X25519),
        ("P-256", kx_group::SECP256R1),
    ];
    println!(
        "{:<12} {:<16} {:>14} {:>16}",
        "key", "key exchange", "handshakes/s", "CPU a handshake"
    );
    for (key, algorithm) in keys {
        let svid = |name: &str| {
            let mut params = LeafParams::good(&workload("cluster.local", "bench", name));
            params.algorithm = algorithm;
            ca.svid_with(&params)
        };
        let (client, server) = (svid("client"), svid("server"));
        for (group, kx) in groups {
            let best = (0..ROUNDS)
                .map(|_| round(&ca, &client, &server, kx))
                .min()
                .unwrap_or_default();
            let each = best / HANDSHAKES;
            let rate = 1.0 / each.as_secs_f64();
            println!(
                "{key:<12} {group:<16} {rate:>14.0} {:>13} µs",
                each.as_micros()
            );
        }
    }
    managed();
}

fn round(ca: &TestCa, client: &Svid, server: &Svid, kx: &'static dyn SupportedKxGroup) -> Duration {
    let start = Instant::now();
    for _ in 0..HANDSHAKES {
        let verifier = || PeerVerifier::new(ca.bundle(), ExpectedPeer::AnyTrusted);
        let (of_client, of_server) = (verifier(), verifier());
        let mut config = tls::client_config(client, of_client.clone(), &[b"bench"]).unwrap();
        let mut provider = (*tls::provider()).clone();
        provider.kx_groups = vec![kx];
        config = with_provider(config, Arc::new(provider), client, of_client.clone());
        let accepting = tls::server_config(server, of_server.clone(), &[b"bench"]).unwrap();
        handshake::pump(config, accepting)
            .0
            .expect("a good handshake");
        assert!(of_client.verified().is_some() && of_server.verified().is_some());
    }
    start.elapsed()
}

/// The client's configuration with one key exchange group only.
fn with_provider(
    config: rustls::ClientConfig,
    provider: Arc<rustls::crypto::CryptoProvider>,
    svid: &Svid,
    verifier: Arc<PeerVerifier>,
) -> rustls::ClientConfig {
    let mut narrowed = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(
            svid.certified_key().clone(),
        )));
    narrowed.alpn_protocols = config.alpn_protocols;
    narrowed
}

/// Issues from memory.
struct Source(TestCa);

impl SvidSource for Source {
    fn name(&self) -> &str {
        "bench"
    }

    fn fetch<'a>(&'a self, identity: &'a WorkloadIdentity, _ttl: Duration) -> FetchFuture<'a> {
        let svid = Arc::new(self.0.svid(identity));
        let roots = vec![self.0.root().clone()];
        Box::pin(async move { Ok(Issued { svid, roots }) })
    }
}

fn managed() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let source = Arc::new(Source(TestCa::new("cluster.local")));
        let before = resident_bytes();
        let bundles = Arc::new(TrustBundles::new());
        let manager = SvidManager::start(source, bundles, ManagerConfig::default());
        let start = Instant::now();
        let identities: Vec<_> = (0..MANAGED)
            .map(|i| workload("cluster.local", "bench", &format!("sa-{i}")))
            .collect();
        for identity in &identities {
            manager.want(identity);
        }
        for identity in &identities {
            manager
                .ready(identity, Duration::from_secs(60))
                .await
                .expect("issued");
        }
        let grown = resident_bytes().saturating_sub(before);
        println!(
            "\n{MANAGED} SVIDs issued and managed in {:.1} s; {} bytes each, {:.0} a MiB",
            start.elapsed().as_secs_f64(),
            grown / MANAGED,
            MANAGED as f64 / (grown as f64 / f64::from(1 << 20)),
        );
    });
}

/// Resident memory of this process, in bytes.
fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    let kib: usize = line
        .split_whitespace()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap();
    kib * 1024
}
