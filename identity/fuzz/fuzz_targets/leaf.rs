//! Chains as a peer sends them, in both roles. Nothing here is signed by the
//! trusted root but the seeds: a peer that is accepted must be one of them.
#![no_main]

use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use ringfence_identity::testing::TestCa;
use ringfence_identity::{ExpectedPeer, PeerVerifier, TrustBundles, tls};
use rustls::client::danger::ServerCertVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::{CertificateDer, UnixTime};

/// Certificates: two bytes of length, big endian, before each.
fn chain(mut data: &[u8]) -> Vec<CertificateDer<'_>> {
    let mut chain = Vec::new();
    while let Some((length, rest)) = data.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
        let (der, rest) = rest.split_at(length);
        chain.push(CertificateDer::from(der));
        data = rest;
    }
    chain
}

fuzz_target!(|data: &[u8]| {
    static BUNDLES: OnceLock<Arc<TrustBundles>> = OnceLock::new();
    let bundles = BUNDLES.get_or_init(|| TestCa::new("td").bundle());
    let chain = chain(data);
    let Some((leaf, intermediates)) = chain.split_first() else {
        return;
    };
    let now = UnixTime::now();
    let verifier = PeerVerifier::new(Arc::clone(bundles), ExpectedPeer::AnyTrusted);
    let as_client = verifier.verify_client_cert(leaf, intermediates, now);
    assert!(as_client.is_err() && verifier.refusal().is_some() && verifier.verified().is_none());
    let verifier = PeerVerifier::new(Arc::clone(bundles), ExpectedPeer::AnyTrusted);
    let name = tls::unused_server_name();
    let as_server = verifier.verify_server_cert(leaf, intermediates, &name, &[], now);
    assert!(as_server.is_err() && verifier.refusal().is_some() && verifier.verified().is_none());
});
