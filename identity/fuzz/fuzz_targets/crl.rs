//! Revocation lists, PEM or DER: whatever is given, a peer is never cleared by a
//! list that its issuer did not sign.
#![no_main]

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use libfuzzer_sys::fuzz_target;
use ringfence_identity::testing::{TestCa, handshake, workload};
use ringfence_identity::{
    ExpectedPeer, PeerVerifier, RevocationLists, TrustBundles, TrustDomainAliases, TrustStore,
    VerifiedPeer,
};

fn peer() -> (Arc<TrustBundles>, VerifiedPeer) {
    let ca = TestCa::new("td");
    let svid = ca.svid(&workload("td", "a", "b"));
    let verifier = || PeerVerifier::new(ca.bundle(), ExpectedPeer::AnyTrusted);
    let (outcome, _) = handshake::run(&svid, verifier(), &svid, verifier());
    (ca.bundle(), outcome.accepted().expect("a good peer"))
}

fuzz_target!(|data: &[u8]| {
    static PEER: OnceLock<(Arc<TrustBundles>, VerifiedPeer)> = OnceLock::new();
    let (bundles, peer) = PEER.get_or_init(peer);
    let lists = Arc::new(RevocationLists::new());
    let domain = peer.id().trust_domain();
    let accepted = lists.replace("fuzz", &domain, data);
    assert!(lists.required(&domain));
    assert_eq!(accepted.is_ok(), !lists.snapshot().is_empty());
    let aliases = TrustDomainAliases::default();
    let trust = TrustStore::new(Arc::clone(bundles), lists, aliases);
    let now = SystemTime::now();
    assert!(trust.revoked(peer, now).is_err());
    assert!(trust.verify_again(peer, now).is_err());
});
