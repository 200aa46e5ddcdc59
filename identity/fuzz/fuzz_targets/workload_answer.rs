//! What a SPIFFE Workload API answers: SVIDs, bundles and revocation lists, in one protobuf
//! message. Whatever it says, it is either the SVID that was asked for or an error, and a list
//! in it closes a trust domain rather than being passed over.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use ringfence_identity::testing::read_workload_answer;
use ringfence_identity::{TrustBundles, TrustStore};

fuzz_target!(|message: &[u8]| {
    let trust = TrustStore::from(Arc::new(TrustBundles::new()));
    match read_workload_answer(message, &trust) {
        Ok(issued) => {
            assert_eq!(issued.svid.id().to_string(), "spiffe://td/ns/a/sa/b");
            let domain = issued.svid.id().trust_domain();
            assert_eq!(trust.bundles().roots(&domain), issued.roots);
        }
        Err(problem) => {
            let text = problem.to_string();
            assert!(!text.is_empty() && !text.contains(char::is_control), "{text:?}");
        }
    }
    for list in trust.revocation().snapshot() {
        assert!(trust.revocation().required(&list.trust_domain));
    }
});
