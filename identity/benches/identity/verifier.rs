//! `PeerVerifier` alone: reading the leaf, building the path, revocation.

use ringfence_identity::testing::{CaParams, TestCa, workload};
use ringfence_identity::{ExpectedPeer, PeerVerifier, Svid, TrustStore};
use rustls::server::danger::ClientCertVerifier as _;
use rustls_pki_types::UnixTime;
use serde_json::{Value, json};

use super::{Cost, Effort, medians, trust};

struct Case {
    chain: &'static str,
    revocation: bool,
    trust: TrustStore,
    peer: Svid,
    rounds: Vec<Cost>,
}

pub(super) fn measure(effort: &Effort) -> Vec<Value> {
    eprintln!("the verifier alone");
    let rsa = CaParams {
        algorithm: &rcgen::PKCS_RSA_SHA256,
        ..CaParams::default()
    };
    let domain = "cluster.local";
    let below = TestCa::new(domain).with_intermediate(&CaParams::default());
    let mut cases = Vec::new();
    for (chain, ca) in [
        ("P-256 root", TestCa::new(domain)),
        ("P-256 root and intermediate", below),
        ("RSA-2048 root", TestCa::with_root(domain, &rsa)),
    ] {
        for revocation in [false, true] {
            cases.push(Case {
                chain,
                revocation,
                trust: trust(&ca, revocation),
                peer: ca.svid(&workload(domain, "bench", "peer")),
                rounds: Vec::new(),
            });
        }
    }
    for round in 0..=effort.rounds {
        for case in &mut cases {
            let cost = Cost::of(effort.verifications, || case.verify());
            if round > 0 {
                case.rounds.push(cost);
            }
        }
    }
    cases.iter().map(Case::result).collect()
}

impl Case {
    fn verify(&self) {
        let verifier = PeerVerifier::new(self.trust.clone(), ExpectedPeer::AnyTrusted);
        let (leaf, intermediates) = self.peer.chain().split_first().unwrap();
        let verdict = verifier.verify_client_cert(leaf, intermediates, UnixTime::now());
        verdict.expect("a good peer");
    }

    fn result(&self) -> Value {
        json!({
            "chain": self.chain,
            "revocation_lists": self.revocation,
            "cpu_us": medians(&self.rounds).cpu.as_secs_f64() * 1e6,
        })
    }
}
