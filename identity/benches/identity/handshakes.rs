//! Whole mutual handshakes, from the configurations to both verdicts.

use std::time::SystemTime;

use rcgen::{KeyPair, RsaKeySize};
use ringfence_identity::testing::{LeafParams, TestCa, handshake, workload};
use ringfence_identity::{ExpectedPeer, PeerVerifier, Svid, TrustStore, tls};
use rustls::crypto::SupportedKxGroup;
use rustls::crypto::aws_lc_rs::kx_group;
use rustls_pki_types::PrivateKeyDer;
use serde_json::{Value, json};

use super::{Cost, Effort, medians, trust};

pub(super) fn measure(effort: &Effort) -> Vec<Value> {
    let ca = TestCa::new("cluster.local");
    let mut combinations = Vec::new();
    for (key, pair) in keys() {
        for (group_name, group) in groups() {
            for revocation in [false, true] {
                combinations.push(Combination {
                    key,
                    group_name,
                    group,
                    revocation,
                    trust: trust(&ca, revocation),
                    client: svid(&ca, "client", &pair),
                    server: svid(&ca, "server", &pair),
                    rounds: Vec::new(),
                });
            }
        }
    }
    for round in 0..=effort.rounds {
        eprintln!(
            "handshakes: round {round} of {} (0 warms up)",
            effort.rounds
        );
        for combination in &mut combinations {
            let cost = Cost::of(effort.handshakes, || combination.handshake());
            if round > 0 {
                combination.rounds.push(cost);
            }
        }
    }
    combinations.iter().map(Combination::result).collect()
}

struct Combination {
    key: &'static str,
    group_name: &'static str,
    group: &'static dyn SupportedKxGroup,
    revocation: bool,
    trust: TrustStore,
    client: Svid,
    server: Svid,
    rounds: Vec<Cost>,
}

impl Combination {
    fn handshake(&self) {
        let verifier = || PeerVerifier::new(self.trust.clone(), ExpectedPeer::AnyTrusted);
        let (of_client, of_server) = (verifier(), verifier());
        let alpn: &[&[u8]] = &[b"bench"];
        let dialling = handshake::client_config(&self.client, of_client.clone(), alpn, self.group);
        let accepting = tls::server_config(&self.server, of_server.clone(), alpn).unwrap();
        let agreed = handshake::key_exchange(dialling, accepting).expect("a good handshake");
        assert_eq!(agreed, self.group.name());
        assert!(of_client.verified().is_some() && of_server.verified().is_some());
    }

    fn result(&self) -> Value {
        let cost = medians(&self.rounds);
        json!({
            "key": self.key,
            "key_exchange": self.group_name,
            "revocation_lists": self.revocation,
            "per_second": 1.0 / cost.wall.as_secs_f64(),
            "cpu_us": cost.cpu.as_secs_f64() * 1e6,
        })
    }
}

fn groups() -> [(&'static str, &'static dyn SupportedKxGroup); 3] {
    [
        ("X25519MLKEM768", kx_group::X25519MLKEM768),
        ("X25519", kx_group::X25519),
        ("secp256r1", kx_group::SECP256R1),
    ]
}

fn keys() -> [(&'static str, KeyPair); 5] {
    let of = |algorithm| KeyPair::generate_for(algorithm).unwrap();
    let rsa = |size| KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, size).unwrap();
    [
        ("ECDSA P-256", of(&rcgen::PKCS_ECDSA_P256_SHA256)),
        ("ECDSA P-384", of(&rcgen::PKCS_ECDSA_P384_SHA384)),
        ("Ed25519", of(&rcgen::PKCS_ED25519)),
        ("RSA-2048", rsa(RsaKeySize::_2048)),
        ("RSA-3072", rsa(RsaKeySize::_3072)),
    ]
}

fn svid(ca: &TestCa, name: &str, pair: &KeyPair) -> Svid {
    let identity = workload("cluster.local", "bench", name);
    let chain = ca.chain_for(&LeafParams::good(&identity), pair);
    let der = PrivateKeyDer::try_from(pair.serialize_der()).unwrap();
    Svid::from_der(identity.spiffe_id(), chain, &der, SystemTime::now()).unwrap()
}
