//! A table of good and bad chains, made anew for each run, each with the verdict
//! it must get in both roles and why.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod names;
mod openssl;
mod paths;
mod usage;

use std::sync::Arc;

use rustls_pki_types::{CertificateDer, UnixTime};

use super::*;
use crate::bundles::TrustBundles;
use crate::testing::{LeafParams, TestCa, tlv, workload};

/// What the verifier must say: `accepted`, or the refusal's short name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Verdict {
    of_a_client: &'static str,
    of_a_server: &'static str,
}

struct Case {
    name: String,
    verdict: Verdict,
    trusted: Arc<TrustBundles>,
    chain: Vec<CertificateDer<'static>>,
}

const ACCEPTED: &str = "accepted";

/// Collects cases; most are about leaves of one CA.
struct Corpus {
    ca: TestCa,
    cases: Vec<Case>,
}

impl Corpus {
    fn new() -> Self {
        let mut corpus = Self {
            ca: TestCa::new("td"),
            cases: Vec::new(),
        };
        names::add(&mut corpus);
        usage::add(&mut corpus);
        paths::add(&mut corpus);
        corpus
    }

    /// A chain that gets the same verdict in both roles.
    fn chain(
        &mut self,
        verdict: &'static str,
        name: &str,
        trusted: Arc<TrustBundles>,
        chain: Vec<CertificateDer<'static>>,
    ) {
        self.cases.push(Case {
            name: name.to_owned(),
            verdict: Verdict {
                of_a_client: verdict,
                of_a_server: verdict,
            },
            trusted,
            chain,
        });
    }

    /// A leaf of the CA.
    fn leaf(&mut self, verdict: &'static str, name: &str, change: impl FnOnce(&mut LeafParams)) {
        let mut params = LeafParams::good(&id());
        change(&mut params);
        let chain = self.ca.svid_with(&params).chain().to_vec();
        self.chain(verdict, name, self.ca.bundle(), chain);
    }

    /// A leaf of the CA in whose signed part `from` was replaced.
    fn edited(&mut self, verdict: &'static str, name: &str, from: &[u8], to: &[u8]) {
        let good = self.ca.svid(&id());
        let edited = self.ca.sign_again(&good.chain()[0], |signed| {
            assert_eq!(from.len(), to.len(), "{name}");
            let at = signed.windows(from.len()).position(|part| part == from);
            let at = at.unwrap_or_else(|| panic!("{name}: not there"));
            signed[at..at + to.len()].copy_from_slice(to);
        });
        self.chain(verdict, name, self.ca.bundle(), vec![edited]);
    }
}

fn id() -> crate::WorkloadIdentity {
    workload("td", "shop", "cart")
}

fn judge(case: &Case) -> [String; 2] {
    let verifier = || PeerVerifier::new(Arc::clone(&case.trusted), ExpectedPeer::AnyTrusted);
    let (leaf, intermediates) = case.chain.split_first().unwrap();
    let now = UnixTime::now();
    let of = |verifier: &PeerVerifier, accepted: bool| match verifier.refusal() {
        None if accepted => ACCEPTED.to_owned(),
        Some(refusal) if !accepted => refusal.as_str().to_owned(),
        other => panic!("{}: {accepted} and {other:?}", case.name),
    };
    let client = verifier();
    let as_client = client.verify_client_cert(leaf, intermediates, now);
    let server = verifier();
    let name = crate::tls::unused_server_name();
    let as_server = server.verify_server_cert(leaf, intermediates, &name, &[], now);
    [
        of(&client, as_client.is_ok()),
        of(&server, as_server.is_ok()),
    ]
}

/// All that differ, so that one run shows them all.
fn check(cases: &[Case]) {
    let mut wrong = Vec::new();
    for case in cases {
        let got = judge(case);
        let expected = [case.verdict.of_a_client, case.verdict.of_a_server];
        if got != expected {
            wrong.push(format!("{}: {got:?} instead of {expected:?}", case.name));
        }
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn every_chain_of_the_corpus_gets_its_verdict() {
    let corpus = Corpus::new();
    let good = |case: &&Case| case.verdict.of_a_client == ACCEPTED;
    let accepted = corpus.cases.iter().filter(good).count();
    assert!(accepted >= 20, "{accepted} good chains");
    let refused = corpus.cases.len() - accepted;
    assert!(refused >= 60, "{refused} bad chains");
    eprintln!("{accepted} good and {refused} bad chains");
    check(&corpus.cases);
}

#[test]
fn chains_made_by_openssl_get_their_verdict() {
    let Some(cases) = openssl::cases() else {
        eprintln!("SKIPPED: there is no openssl command");
        return;
    };
    assert!(cases.len() >= 15);
    eprintln!("{} chains made by openssl", cases.len());
    check(&cases);
}

/// One file for each chain, in the form of the fuzz target `leaf`.
#[test]
#[ignore = "writes files: seeds for fuzzing, into identity/fuzz/corpus"]
fn write_fuzz_seeds() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let write = |target: &str, name: &str, content: &[u8]| {
        let folder = root.join(target);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(name.replace([' ', '/'], "-")), content).unwrap();
    };
    let corpus = Corpus::new();
    for case in corpus.cases.iter().filter(|case| case.chain.len() < 5) {
        let mut seed = Vec::new();
        for der in &case.chain {
            let length = u16::try_from(der.len()).unwrap_or(u16::MAX);
            seed.extend_from_slice(&length.to_be_bytes());
            seed.extend_from_slice(der);
        }
        write("leaf", &case.name, &seed);
        let root = crate::testing::pem_chain([corpus.ca.root()]);
        let answer = crate::testing::pem_chain(&case.chain) + "\0" + &root;
        write("ca_answer", &case.name, answer.as_bytes());
        for uri in ["spiffe://td/ns/a/sa/b", "td", "k8s:ns:{namespace}"] {
            write("spiffe_id", uri, uri.as_bytes());
        }
    }
    let uri = tlv(0x86, b"spiffe://td/ns/a/sa/b");
    write(
        "signed_leaf",
        "san",
        &[&[0], tlv(0x30, &uri).as_slice()].concat(),
    );
    for choice in 1..8u8 {
        let seed = [choice, 0x30, 3, 1, 1, 0xff];
        write("signed_leaf", &format!("extension {choice}"), &seed);
    }
    write("workload_answer", "good", &workload_answer(&corpus.ca));
    for (name, point) in [
        ("plain", None),
        ("partial", Some("http://crl/1".to_owned())),
    ] {
        let params = crate::testing::CrlParams {
            point,
            ..crate::testing::CrlParams::revoking(&corpus.cases[0].chain)
        };
        write("crl", name, &corpus.ca.crl(0, &params));
        write(
            "crl",
            &format!("{name} PEM"),
            corpus.ca.crl_pem(&params).as_bytes(),
        );
    }
}

/// A Workload API's answer for `spiffe://td/ns/a/sa/b`, with a federated bundle and a
/// revocation list.
fn workload_answer(ca: &TestCa) -> Vec<u8> {
    use prost::Message as _;
    let identity = workload("td", "a", "b");
    let params = LeafParams::good(&identity);
    let pair = params.key();
    let chain = ca.chain_for(&params, &pair);
    let partner = TestCa::new("partner").root().to_vec();
    let answer = crate::workload_proto::X509SvidResponse {
        svids: vec![crate::workload_proto::X509Svid {
            spiffe_id: identity.to_string(),
            x509_svid: chain.iter().flat_map(|der| der.to_vec()).collect(),
            x509_svid_key: pair.serialize_der(),
            bundle: ca.root().to_vec(),
            hint: String::new(),
        }],
        crl: vec![ca.crl(0, &crate::testing::CrlParams::default())],
        federated_bundles: [("spiffe://partner".to_owned(), partner)].into(),
    };
    answer.encode_to_vec()
}

#[test]
fn the_seed_of_the_workload_answer_is_a_good_answer() {
    let ca = TestCa::new("td");
    let trust = crate::TrustStore::from(std::sync::Arc::new(crate::TrustBundles::new()));
    let answer = workload_answer(&ca);
    crate::testing::read_workload_answer(&answer, &trust).unwrap();
    assert_eq!(trust.bundles().trust_domains().len(), 2);
    assert_eq!(trust.revocation().snapshot().len(), 1);
    let cut = &answer[..answer.len() - 1];
    crate::testing::read_workload_answer(cut, &trust).unwrap_err();
}
