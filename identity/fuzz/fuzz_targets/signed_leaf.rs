//! Leaves that a trusted CA signed, whatever is in their extensions: only the
//! name that stands in the one URI SAN is ever accepted.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use ringfence_identity::testing::{LeafParams, TestCa, workload};
use ringfence_identity::{ExpectedPeer, PeerVerifier};
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::UnixTime;

const SUBJECT_ALT_NAME: [u64; 4] = [2, 5, 29, 17];
const OTHERS: [[u64; 4]; 7] = [
    [2, 5, 29, 15],
    [2, 5, 29, 19],
    [2, 5, 29, 37],
    [2, 5, 29, 30],
    [2, 5, 29, 31],
    [2, 5, 29, 35],
    [2, 5, 29, 36],
];

fuzz_target!(|data: &[u8]| {
    static CA: OnceLock<TestCa> = OnceLock::new();
    let ca = CA.get_or_init(|| TestCa::new("td"));
    let Some((choice, content)) = data.split_first() else {
        return;
    };
    let mut params = LeafParams::good(&workload("td", "a", "b"));
    let critical = choice & 0x80 != 0;
    match usize::from(choice & 0x7f).checked_sub(1) {
        None => {
            params.uri_sans.clear();
            let extension = (SUBJECT_ALT_NAME.to_vec(), content.to_vec(), critical);
            params.extensions.push(extension);
        }
        Some(other) => {
            if let Some(oid) = OTHERS.get(other % OTHERS.len()) {
                // Not twice: the fuzzed one instead of the good one.
                params.key_usages.clear();
                params.basic_constraints_ca = None;
                params.extended_key_usages.clear();
                let extension = (oid.to_vec(), content.to_vec(), critical);
                params.extensions.push(extension);
            }
        }
    }
    let svid = ca.svid_with(&params);
    let verifier = PeerVerifier::new(ca.bundle(), ExpectedPeer::AnyTrusted);
    let Some(leaf) = svid.chain().first() else {
        return;
    };
    if verifier.verify_client_cert(leaf, &[], UnixTime::now()).is_ok() {
        let text = String::from_utf8_lossy(leaf);
        assert!(text.contains("spiffe://td/"), "accepted without a name");
    }
});
