//! Revoked, cleared and unknown peers, over real handshakes in memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, SystemTime};

use rustls::AlertDescription as Alert;

use super::*;
use crate::aliases::TrustDomainAliases;
use crate::svid::Svid;
use crate::testing::{CaParams, CrlParams, LeafParams, TestCa, handshake, workload};
use crate::trust::{TrustChange, TrustStore};
use crate::verifier::{ExpectedPeer, PeerVerifier, VerifiedPeer};

fn store(ca: &TestCa) -> TrustStore {
    TrustStore::new(
        ca.bundle(),
        Arc::new(RevocationLists::new()),
        TrustDomainAliases::default(),
    )
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// The peer as a client and as a server, of an honest other side that has no
/// lists.
fn shown(trust: &TrustStore, ca: &TestCa, peer: &Svid) -> [handshake::Outcome; 2] {
    let us = ca.svid(&workload("td", "us", "us"));
    let judge = || PeerVerifier::new(trust.clone(), ExpectedPeer::AnyTrusted);
    let lenient = || PeerVerifier::new(ca.bundle(), ExpectedPeer::AnyTrusted);
    [
        handshake::run(peer, lenient(), &us, judge()).1,
        handshake::run(&us, judge(), peer, lenient()).0,
    ]
}

fn accepted(trust: &TrustStore, ca: &TestCa, peer: &Svid) -> VerifiedPeer {
    let [client, server] = shown(trust, ca, peer);
    client.accepted().unwrap();
    server.accepted().unwrap()
}

fn refused_as_unknown(trust: &TrustStore, ca: &TestCa, peer: &Svid) {
    for outcome in shown(trust, ca, peer) {
        outcome.assert_refused("revocation-unknown", Alert::UnknownCA);
    }
}

fn refused_as_revoked(trust: &TrustStore, ca: &TestCa, peer: &Svid) {
    for outcome in shown(trust, ca, peer) {
        outcome.assert_refused("revoked", Alert::CertificateRevoked);
    }
}

#[test]
fn a_listed_leaf_is_refused_on_both_sides_and_another_is_not() {
    let ca = TestCa::new("td");
    let (good, bad) = (
        ca.svid(&workload("td", "shop", "cart")),
        ca.svid(&workload("td", "shop", "evil")),
    );
    let trust = store(&ca);
    accepted(&trust, &ca, &bad);
    let list = ca.crl(0, &CrlParams::revoking([&bad.chain()[0]]));
    let replace = || trust.revocation().replace("file", ca.trust_domain(), &list);
    assert!(replace().unwrap());
    assert!(!replace().unwrap(), "nothing changed");
    refused_as_revoked(&trust, &ca, &bad);
    accepted(&trust, &ca, &good);

    let [status] = trust.revocation().snapshot().try_into().unwrap();
    assert_eq!(status.issuer, "CN=root of td");
    assert_eq!((status.source.as_str(), status.revoked), ("file", 1));
    assert!(status.next_update > status.this_update);
}

#[test]
fn a_listed_intermediate_is_refused_and_each_issuer_needs_a_list() {
    let ca = TestCa::new("td").with_intermediate(&CaParams::default());
    let peer = ca.svid(&workload("td", "shop", "cart"));
    let trust = store(&ca);
    let lists = trust.revocation();
    let td = ca.trust_domain();
    let (of_root, of_intermediate) = (
        ca.crl(0, &CrlParams::default()),
        ca.crl(1, &CrlParams::default()),
    );

    lists.replace("intermediate", td, &of_intermediate).unwrap();
    refused_as_unknown(&trust, &ca, &peer);
    lists.replace("root", td, &of_root).unwrap();
    accepted(&trust, &ca, &peer);
    let revoking = ca.crl(0, &CrlParams::revoking(&peer.chain()[1..]));
    lists.replace("root", td, &revoking).unwrap();
    refused_as_revoked(&trust, &ca, &peer);
    let of_root = ca.crl(0, &CrlParams::default());
    lists.replace("root", td, &of_root).unwrap();
    lists.remove("intermediate", td);
    refused_as_unknown(&trust, &ca, &peer);
    // Revoked says more than unknown, wherever in the path it is.
    let revoking = ca.crl(0, &CrlParams::revoking(&peer.chain()[1..]));
    lists.replace("root", td, &revoking).unwrap();
    refused_as_revoked(&trust, &ca, &peer);
}

#[test]
fn several_issuers_in_one_pem_file_are_understood() {
    let ca = TestCa::new("td").with_intermediate(&CaParams::default());
    let peer = ca.svid(&workload("td", "shop", "cart"));
    let root_only = TestCa::new("td");
    let pem = format!(
        "# issued today\n{}{}",
        ca.crl_pem(&CrlParams::revoking([&peer.chain()[0]])),
        root_only.crl_pem(&CrlParams::default())
    );
    let trust = store(&ca);
    let replaced = trust
        .revocation()
        .replace("file", ca.trust_domain(), pem.as_bytes());
    assert!(replaced.unwrap());
    assert_eq!(trust.revocation().snapshot().len(), 2);
    refused_as_revoked(&trust, &ca, &peer);
}

#[test]
fn a_configured_source_without_content_closes_the_trust_domain() {
    let ca = TestCa::new("td");
    let peer = ca.svid(&workload("td", "shop", "cart"));
    let trust = store(&ca);
    let (lists, td) = (trust.revocation(), ca.trust_domain());

    lists.require("file", td);
    assert!(lists.required(td));
    refused_as_unknown(&trust, &ca, &peer);
    lists
        .replace("file", td, &ca.crl(0, &CrlParams::default()))
        .unwrap();
    accepted(&trust, &ca, &peer);
    lists.require("file", td);
    accepted(&trust, &ca, &peer);
    assert!(lists.remove("file", td));
    assert!(!lists.required(td) && !lists.remove("file", td));
    accepted(&trust, &ca, &peer);

    // A first content that is refused closes it as well.
    lists.replace("file", td, b"garbage").unwrap_err();
    refused_as_unknown(&trust, &ca, &peer);
}

#[test]
fn refused_content_leaves_the_lists_in_use() {
    let ca = TestCa::new("td");
    let bad = ca.svid(&workload("td", "shop", "evil"));
    let trust = store(&ca);
    let (lists, td) = (trust.revocation(), ca.trust_domain());
    let good_list = ca.crl(0, &CrlParams::revoking([&bad.chain()[0]]));
    lists.replace("file", td, &good_list).unwrap();

    let mut trailing = good_list.clone();
    trailing.push(0);
    let truncated = good_list[..good_list.len() - 1].to_vec();
    let many = ca.crl_pem(&CrlParams::default()).repeat(MAX_LISTS + 1);
    for (content, why) in [
        (Vec::new(), "there is no list in it"),
        (b"hello".to_vec(), "there is no list in it"),
        (ca.root().to_vec(), "list 1: "),
        (trailing, "list 1: "),
        (truncated, "list 1: "),
        (b"-----BEGIN X509 CRL-----\n!\n".to_vec(), "it is not PEM"),
        (many.into_bytes(), "more than 64 lists"),
        (vec![0x30; MAX_BYTES + 1], "more than 16777216"),
    ] {
        let error = lists.replace("file", td, &content).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(why), "{text}");
        assert!(text.contains("trust domain td from file"), "{text}");
    }
    refused_as_revoked(&trust, &ca, &bad);
}

#[test]
fn a_list_must_be_current_to_clear_anybody() {
    let ca = TestCa::new("td");
    let peer = ca.svid(&workload("td", "shop", "cart"));
    let trust = store(&ca);
    let (lists, td) = (trust.revocation(), ca.trust_domain());
    let now = SystemTime::now();
    let list = |this_update, next_update, revoked: &[&Svid]| {
        let params = CrlParams {
            this_update,
            next_update,
            ..CrlParams::revoking(revoked.iter().map(|svid| &svid.chain()[0]))
        };
        lists.replace("file", td, &ca.crl(0, &params)).unwrap();
    };
    list(now - seconds(100), now - seconds(2), &[]);
    refused_as_unknown(&trust, &ca, &peer);
    list(now + seconds(120), now + seconds(500), &[]);
    refused_as_unknown(&trust, &ca, &peer);
    list(now + seconds(30), now + seconds(500), &[]);
    accepted(&trust, &ca, &peer);
    // What an overdue list revokes stays revoked.
    list(now - seconds(100), now - seconds(2), &[&peer]);
    refused_as_revoked(&trust, &ca, &peer);
}

#[test]
fn a_list_signed_by_another_key_is_no_list() {
    let (ca, impostor) = (TestCa::new("td"), TestCa::new("td"));
    let peer = ca.svid(&workload("td", "shop", "cart"));
    let trust = store(&ca);
    let (lists, td) = (trust.revocation(), ca.trust_domain());
    let forged = impostor.crl(0, &CrlParams::default());
    lists.replace("file", td, &forged).unwrap();
    refused_as_unknown(&trust, &ca, &peer);

    // Nor can it revoke anybody.
    let forged = impostor.crl(0, &CrlParams::revoking([&peer.chain()[0]]));
    lists.replace("file", td, &forged).unwrap();
    refused_as_unknown(&trust, &ca, &peer);
    lists
        .replace("second", td, &ca.crl(0, &CrlParams::default()))
        .unwrap();
    accepted(&trust, &ca, &peer);

    let mut corrupted = ca.crl(0, &CrlParams::default());
    *corrupted.last_mut().unwrap() ^= 1;
    lists.remove("file", td);
    lists.replace("second", td, &corrupted).unwrap();
    refused_as_unknown(&trust, &ca, &peer);
}

#[test]
fn a_rotated_root_of_the_same_name_has_a_list_of_its_own() {
    let (old, new) = (TestCa::new("td"), TestCa::new("td"));
    let bundles = old.bundle();
    bundles
        .replace("new", new.trust_domain(), &[new.root().clone()])
        .unwrap();
    let trust = TrustStore::new(
        bundles,
        Arc::new(RevocationLists::new()),
        TrustDomainAliases::default(),
    );
    let (of_old, of_new) = (
        old.svid(&workload("td", "a", "old")),
        new.svid(&workload("td", "a", "new")),
    );
    let lists = trust.revocation();
    let td = old.trust_domain();
    let cleared = old.crl(0, &CrlParams::default());
    lists.replace("old", td, &cleared).unwrap();
    accepted(&trust, &old, &of_old);
    refused_as_unknown(&trust, &new, &of_new);
    let cleared = new.crl(0, &CrlParams::default());
    lists.replace("new", td, &cleared).unwrap();
    for _ in 0..3 {
        accepted(&trust, &old, &of_old);
        accepted(&trust, &new, &of_new);
    }
}

#[test]
fn an_issuer_without_crl_sign_cannot_clear_anybody() {
    let intermediate = CaParams {
        key_usages: vec![
            rcgen::KeyUsagePurpose::KeyCertSign,
            rcgen::KeyUsagePurpose::CrlSign,
        ],
        ..CaParams::default()
    };
    let may = TestCa::new("td").with_intermediate(&intermediate);
    let peer = may.svid(&workload("td", "a", "b"));
    let trust = store(&may);
    let (lists, td) = (trust.revocation(), may.trust_domain());
    lists
        .replace("root", td, &may.crl(0, &CrlParams::default()))
        .unwrap();
    lists
        .replace("mid", td, &may.crl(1, &CrlParams::default()))
        .unwrap();
    let peer = accepted(&trust, &may, &peer);

    let judge = |change: &dyn Fn(&mut Link)| {
        let mut path = peer.path().to_vec();
        path.iter_mut().for_each(change);
        let now = UnixTime::now();
        lists.of(td).unwrap().judge(&path, now)
    };
    judge(&|_| {}).unwrap();
    let refusal = judge(&|link| link.issuer_signs_crls = link.is_ca).unwrap_err();
    assert!(refusal.to_string().contains("cRLSign"), "{refusal}");
}

#[test]
fn a_partial_list_knows_only_certificates_that_name_its_point() {
    let ca = TestCa::new("td");
    let named = |point: &str| {
        let mut params = LeafParams::good(&workload("td", "shop", "cart"));
        params.crl_points = vec![point.to_owned()];
        ca.svid_with(&params)
    };
    let (ours, other) = (named("http://crl/1"), named("http://crl/2"));
    let none = ca.svid(&workload("td", "shop", "cart"));
    let trust = store(&ca);
    let params = CrlParams {
        point: Some("http://crl/1".to_owned()),
        ..CrlParams::default()
    };
    let (lists, td) = (trust.revocation(), ca.trust_domain());
    lists.replace("file", td, &ca.crl(0, &params)).unwrap();
    accepted(&trust, &ca, &ours);
    refused_as_unknown(&trust, &ca, &other);
    refused_as_unknown(&trust, &ca, &none);
}

#[test]
fn another_trust_domain_is_not_affected() {
    let (ours, theirs) = (TestCa::new("td"), TestCa::new("partner"));
    let bundles = ours.bundle();
    bundles
        .replace(
            "federation",
            theirs.trust_domain(),
            &[theirs.root().clone()],
        )
        .unwrap();
    let trust = TrustStore::new(
        bundles,
        Arc::new(RevocationLists::new()),
        TrustDomainAliases::default(),
    );
    trust.revocation().require("file", theirs.trust_domain());
    let judge = |peer: &Svid| {
        let verifier = PeerVerifier::new(trust.clone(), ExpectedPeer::AnyTrusted);
        use rustls::server::danger::ClientCertVerifier as _;
        let leaf = peer.chain().first().unwrap();
        let _ = verifier.verify_client_cert(leaf, &[], UnixTime::now());
        verifier.refusal().map(|refusal| refusal.as_str())
    };
    assert_eq!(judge(&ours.svid(&workload("td", "a", "b"))), None);
    let partner = theirs.svid(&workload("partner", "a", "b"));
    assert_eq!(judge(&partner), Some("revocation-unknown"));
}

#[test]
fn live_peers_are_judged_again() {
    let ca = TestCa::new("td");
    let svid = ca.svid(&workload("td", "shop", "cart"));
    let trust = store(&ca);
    let peer = accepted(&trust, &ca, &svid);
    let now = SystemTime::now();
    let later = now + seconds(7200);
    trust.verify_again(&peer, now).unwrap();
    trust.revoked(&peer, now).unwrap();

    // Long-lived streams outlive short-lived certificates.
    assert_eq!(trust.verify_again(&peer, later), Err(PeerRefusal::Expired));
    trust.revoked(&peer, later).unwrap();

    let (lists, td) = (trust.revocation(), ca.trust_domain());
    let list = ca.crl(0, &CrlParams::revoking([&svid.chain()[0]]));
    lists.replace("file", td, &list).unwrap();
    for refusal in [
        trust.verify_again(&peer, now),
        trust.revoked(&peer, now),
        trust.revoked(&peer, later),
    ] {
        assert_eq!(refusal.unwrap_err().as_str(), "revoked");
    }
    let cleared = ca.crl(0, &CrlParams::default());
    lists.replace("file", td, &cleared).unwrap();
    trust.revoked(&peer, now).unwrap();
    let refusal = trust.revoked(&peer, later).unwrap_err();
    assert_eq!(refusal.as_str(), "revocation-unknown");
    lists.remove("file", td);

    // A root that was rotated out does not make its peers revoked.
    let other = TestCa::new("td");
    trust
        .bundles()
        .replace("test", td, &[other.root().clone()])
        .unwrap();
    let refusal = trust.verify_again(&peer, now).unwrap_err();
    assert_eq!(refusal.as_str(), "untrusted");
    trust.revoked(&peer, now).unwrap();
    trust.bundles().remove("test", td);
    let refusal = trust.verify_again(&peer, now).unwrap_err();
    assert_eq!(refusal.as_str(), "unknown-trust-domain");
}

#[tokio::test]
async fn every_change_is_told() {
    let ca = TestCa::new("td");
    let trust = store(&ca);
    let mut changes = trust.changes();
    let quiet = tokio::time::timeout(Duration::from_millis(20), changes.changed());
    assert!(quiet.await.is_err());

    let (lists, td) = (trust.revocation(), ca.trust_domain());
    lists
        .replace("file", td, &ca.crl(0, &CrlParams::default()))
        .unwrap();
    assert_eq!(changes.changed().await, TrustChange::Revocation);
    let other = TestCa::new("td");
    let roots = [other.root().clone()];
    trust.bundles().replace("more", td, &roots).unwrap();
    assert_eq!(changes.changed().await, TrustChange::Bundles);
    trust.bundles().replace("more", td, &roots).unwrap();
    let quiet = tokio::time::timeout(Duration::from_millis(20), changes.changed());
    assert!(quiet.await.is_err(), "nothing changed");
}
