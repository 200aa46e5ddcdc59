//! Accepted and refused peers, over real handshakes in memory and by direct
//! calls where time has to stand still.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::SystemTime;

use rcgen::{ExtendedKeyUsagePurpose as Eku, KeyUsagePurpose as Ku};
use rustls::AlertDescription as Alert;

use super::*;
use crate::bundles::TrustBundles;
use crate::revocation::RevocationLists;
use crate::spiffe_id::WorkloadIdentity;
use crate::svid::Svid;
use crate::testing::{CaParams, LeafParams, TestCa, handshake, workload};

/// A peer as one of the two sides of a handshake with an honest other side.
fn shown_by_client(trusted: &Arc<TrustBundles>, peer: &Svid) -> handshake::Outcome {
    shown(trusted, peer, ExpectedPeer::AnyTrusted, true)
}

fn shown_by_server(trusted: &Arc<TrustBundles>, peer: &Svid) -> handshake::Outcome {
    shown(trusted, peer, ExpectedPeer::AnyTrusted, false)
}

fn shown(
    trusted: &Arc<TrustBundles>,
    peer: &Svid,
    expected: ExpectedPeer,
    peer_is_client: bool,
) -> handshake::Outcome {
    let us = TestCa::shared().svid(&workload("td", "us", "us"));
    let judge = PeerVerifier::new(Arc::clone(trusted), expected);
    let lenient = PeerVerifier::new(TestCa::shared().bundle(), ExpectedPeer::AnyTrusted);
    if peer_is_client {
        handshake::run(peer, lenient, &us, judge).1
    } else {
        handshake::run(&us, judge, peer, lenient).0
    }
}

fn id() -> WorkloadIdentity {
    workload("td", "shop", "cart")
}

fn leaf(change: impl FnOnce(&mut LeafParams)) -> LeafParams {
    let mut params = LeafParams::good(&id());
    change(&mut params);
    params
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn good_peers_are_accepted_on_both_sides() {
    let ca = TestCa::shared();
    let cases = [
        ("plain", leaf(|_| {})),
        (
            "P-384 key",
            leaf(|l| l.algorithm = &rcgen::PKCS_ECDSA_P384_SHA384),
        ),
        ("Ed25519 key", leaf(|l| l.algorithm = &rcgen::PKCS_ED25519)),
        ("RSA key", leaf(|l| l.algorithm = &rcgen::PKCS_RSA_SHA256)),
        (
            "DNS SAN besides",
            leaf(|l| l.dns_sans = vec!["a.example".into()]),
        ),
        ("no EKU", leaf(|l| l.extended_key_usages.clear())),
        (
            "no basic constraints",
            leaf(|l| l.basic_constraints_ca = None),
        ),
        (
            "clock 30 s behind",
            leaf(|l| l.not_before = SystemTime::now() + seconds(30)),
        ),
        (
            "short life, clock behind",
            leaf(|l| {
                l.not_before = SystemTime::now() + seconds(30);
                l.not_after = SystemTime::now() + seconds(40);
            }),
        ),
    ];
    for (name, params) in cases {
        let peer = ca.svid_with(&params);
        for outcome in [
            shown_by_client(&ca.bundle(), &peer),
            shown_by_server(&ca.bundle(), &peer),
        ] {
            let verified = outcome.accepted().unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(verified.id(), id().spiffe_id(), "{name}");
            assert_eq!(verified.identity(), Some(id()), "{name}");
            assert_eq!(verified.chain(), peer.chain(), "{name}");
            assert_eq!(verified.serial(), peer.serial(), "{name}");
            assert_eq!(verified.issuer(), "CN=root of td", "{name}");
        }
    }
}

#[test]
fn bad_leaves_are_refused_on_both_sides_with_reason_and_alert() {
    let ca = TestCa::shared();
    let uris = |uris: &[&str]| {
        let uris = uris.iter().map(|uri| (*uri).to_owned()).collect();
        leaf(|l| l.uri_sans = uris)
    };
    let me = id().to_string();
    let (bad, ca_alert, old, usage) = (
        Alert::BadCertificate,
        Alert::UnknownCA,
        Alert::CertificateExpired,
        Alert::UnsupportedCertificate,
    );
    let cases = [
        ("no-uri-san", bad, uris(&[])),
        (
            "no-uri-san",
            bad,
            leaf(|l| {
                l.uri_sans.clear();
                l.dns_sans = vec!["cart.shop".into()];
            }),
        ),
        (
            "several-uri-sans",
            bad,
            uris(&[&me, "spiffe://td/ns/shop/sa/admin"]),
        ),
        ("several-uri-sans", bad, uris(&[&me, &me])),
        ("several-uri-sans", bad, uris(&[&me, "http://elsewhere/"])),
        (
            "invalid-spiffe-id",
            bad,
            uris(&["http://td/ns/shop/sa/cart"]),
        ),
        (
            "invalid-spiffe-id",
            bad,
            uris(&["spiffe://TD/ns/shop/sa/cart"]),
        ),
        (
            "invalid-spiffe-id",
            bad,
            uris(&["SPIFFE://td/ns/shop/sa/cart"]),
        ),
        ("invalid-spiffe-id", bad, uris(&["spiffe://td"])),
        (
            "invalid-spiffe-id",
            bad,
            uris(&["spiffe://td/ns/../sa/cart"]),
        ),
        ("invalid-spiffe-id", bad, uris(&[""])),
        (
            "unknown-trust-domain",
            ca_alert,
            uris(&["spiffe://other/ns/shop/sa/cart"]),
        ),
        (
            "expired",
            old,
            leaf(|l| {
                l.not_before = SystemTime::now() - seconds(100);
                l.not_after = SystemTime::now() - seconds(2);
            }),
        ),
        (
            "not-yet-valid",
            old,
            leaf(|l| l.not_before = SystemTime::now() + seconds(120)),
        ),
        (
            "leaf-is-ca",
            usage,
            leaf(|l| l.basic_constraints_ca = Some(true)),
        ),
        (
            "leaf-is-ca",
            usage,
            leaf(|l| l.key_usages.push(Ku::KeyCertSign)),
        ),
        (
            "leaf-is-ca",
            usage,
            leaf(|l| l.key_usages.push(Ku::CrlSign)),
        ),
        ("key-usage", usage, leaf(|l| l.key_usages.clear())),
        (
            "key-usage",
            usage,
            leaf(|l| l.key_usages = vec![Ku::KeyAgreement]),
        ),
        (
            "extended-key-usage",
            usage,
            leaf(|l| l.extended_key_usages = vec![Eku::CodeSigning]),
        ),
        (
            "untrusted",
            ca_alert,
            leaf(|l| l.unknown_critical_extension = true),
        ),
    ];
    for (reason, alert, params) in cases {
        let peer = ca.svid_with(&params);
        for outcome in [
            shown_by_client(&ca.bundle(), &peer),
            shown_by_server(&ca.bundle(), &peer),
        ] {
            outcome.assert_refused(reason, alert);
        }
    }
}

#[test]
fn extended_key_usage_must_cover_the_role_played() {
    let ca = TestCa::shared();
    let client_only = ca.svid_with(&leaf(|l| l.extended_key_usages = vec![Eku::ClientAuth]));
    let server_only = ca.svid_with(&leaf(|l| l.extended_key_usages = vec![Eku::ServerAuth]));
    let alert = Alert::UnsupportedCertificate;

    shown_by_client(&ca.bundle(), &client_only)
        .accepted()
        .unwrap();
    shown_by_server(&ca.bundle(), &client_only).assert_refused("extended-key-usage", alert);
    shown_by_server(&ca.bundle(), &server_only)
        .accepted()
        .unwrap();
    shown_by_client(&ca.bundle(), &server_only).assert_refused("extended-key-usage", alert);
}

#[test]
fn chains_through_intermediates_are_followed() {
    let ed25519 = CaParams {
        algorithm: &rcgen::PKCS_ED25519,
        ..CaParams::default()
    };
    let p384 = CaParams {
        algorithm: &rcgen::PKCS_ECDSA_P384_SHA384,
        ..CaParams::default()
    };
    let rsa = CaParams {
        algorithm: &rcgen::PKCS_RSA_SHA256,
        ..CaParams::default()
    };
    let ca = TestCa::with_root("td", &rsa)
        .with_intermediate(&p384)
        .with_intermediate(&ed25519);
    let peer = ca.svid(&id());
    assert_eq!(peer.chain().len(), 3);
    shown_by_client(&ca.bundle(), &peer).accepted().unwrap();
    shown_by_server(&ca.bundle(), &peer).accepted().unwrap();
}

#[test]
fn broken_paths_are_refused() {
    let alert = Alert::UnknownCA;
    let with = |params: CaParams| TestCa::new("td").with_intermediate(&params);

    // The same name and trust domain, but another key.
    let impostor = TestCa::new("td").svid(&id());
    let ca = TestCa::new("td");
    shown_by_client(&ca.bundle(), &impostor).assert_refused("untrusted", alert);
    shown_by_server(&ca.bundle(), &impostor).assert_refused("untrusted", alert);

    let not_a_ca = with(CaParams {
        is_ca: false,
        ..CaParams::default()
    });
    shown_by_client(&not_a_ca.bundle(), &not_a_ca.svid(&id())).assert_refused("untrusted", alert);

    let may_not_sign = with(CaParams {
        key_usages: vec![Ku::DigitalSignature],
        ..CaParams::default()
    });
    shown_by_client(&may_not_sign.bundle(), &may_not_sign.svid(&id()))
        .assert_refused("untrusted", alert);

    let expired = with(CaParams {
        not_after: SystemTime::now() - seconds(5),
        ..CaParams::default()
    });
    shown_by_client(&expired.bundle(), &expired.svid(&id()))
        .assert_refused("expired", Alert::CertificateExpired);

    let future = with(CaParams {
        not_before: SystemTime::now() + seconds(300),
        ..CaParams::default()
    });
    shown_by_client(&future.bundle(), &future.svid(&id()))
        .assert_refused("not-yet-valid", Alert::CertificateExpired);

    let gap = TestCa::new("td").with_intermediate(&CaParams::default());
    let good = gap.svid(&id());
    let without = Svid::unchecked(
        id().spiffe_id().clone(),
        good.chain()[..1].to_vec(),
        Arc::clone(&good.certified_key().key),
    );
    shown_by_client(&gap.bundle(), &without).assert_refused("untrusted", alert);
    shown_by_client(&gap.bundle(), &good).accepted().unwrap();
}

#[test]
fn an_expired_root_vouches_for_nobody() {
    let ca = TestCa::with_root(
        "td",
        &CaParams {
            not_after: SystemTime::now() - seconds(5),
            ..CaParams::default()
        },
    );
    shown_by_client(&ca.bundle(), &ca.svid(&id())).assert_refused("untrusted", Alert::UnknownCA);
}

#[test]
fn a_trust_domain_cannot_vouch_for_another_one() {
    let (ours, theirs) = (TestCa::new("td"), TestCa::new("partner"));
    let bundles = ours.bundle();
    bundles
        .replace(
            "federation",
            theirs.trust_domain(),
            &[theirs.root().clone()],
        )
        .unwrap();

    let partner = theirs.svid(&workload("partner", "shop", "cart"));
    shown_by_client(&bundles, &partner).accepted().unwrap();

    // Issued by a CA we know, but not the one of the trust domain it names.
    let forged = theirs.svid(&id());
    shown_by_client(&bundles, &forged).assert_refused("untrusted", Alert::UnknownCA);
    shown_by_server(&bundles, &forged).assert_refused("untrusted", Alert::UnknownCA);
}

#[test]
fn only_an_expected_identity_is_accepted() {
    let ca = TestCa::shared();
    let peer = ca.svid(&id());
    let other = workload("td", "shop", "cart2").spiffe_id().clone();
    let me = id().spiffe_id().clone();
    let one_of =
        |ids: &[&SpiffeId]| ExpectedPeer::OneOf(ids.iter().map(|id| (*id).clone()).collect());

    for expected in [ExpectedPeer::only(me.clone()), one_of(&[&other, &me])] {
        shown(&ca.bundle(), &peer, expected, false)
            .accepted()
            .unwrap();
    }
    for expected in [ExpectedPeer::only(other.clone()), one_of(&[])] {
        shown(&ca.bundle(), &peer, expected, false)
            .assert_refused("wrong-identity", Alert::AccessDenied);
    }
}

#[test]
fn a_stolen_certificate_without_its_key_is_refused() {
    let ca = TestCa::shared();
    let (victim, thief) = (ca.svid(&id()), ca.svid(&workload("td", "evil", "thief")));
    let stolen = Svid::unchecked(
        id().spiffe_id().clone(),
        victim.chain().to_vec(),
        Arc::clone(&thief.certified_key().key),
    );
    for outcome in [
        shown_by_client(&ca.bundle(), &stolen),
        shown_by_server(&ca.bundle(), &stolen),
    ] {
        outcome.assert_refused("bad-handshake-signature", Alert::DecryptError);
    }
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let ca = TestCa::shared();
    let judge = PeerVerifier::new(ca.bundle(), ExpectedPeer::AnyTrusted);
    let outcome = handshake::run_without_client_certificate(&ca.svid(&id()), judge);
    outcome.assert_refused("no-certificate", Alert::CertificateRequired);
}

#[test]
fn nobody_is_verified_before_the_handshake_signature() {
    let ca = TestCa::shared();
    let peer = ca.svid(&id());
    let verifier = PeerVerifier::new(ca.bundle(), ExpectedPeer::AnyTrusted);
    let leaf = peer.chain().first().unwrap();
    verifier
        .verify_client_cert(leaf, &[], UnixTime::now())
        .unwrap();
    assert_eq!(verifier.verified(), None);
    assert_eq!(verifier.refusal(), None);
}

#[test]
fn a_verifier_judges_one_peer_only() {
    let ca = TestCa::shared();
    let (first, second) = (ca.svid(&id()), ca.svid(&workload("td", "other", "other")));
    let verifier = PeerVerifier::new(ca.bundle(), ExpectedPeer::AnyTrusted);
    let show = |svid: &Svid| {
        verifier.verify_client_cert(svid.chain().first().unwrap(), &[], UnixTime::now())
    };
    show(&first).unwrap();
    show(&second).unwrap_err();
    assert_eq!(verifier.verified(), None);
    assert_eq!(verifier.refusal(), Some(PeerRefusal::VerifierReused));
    show(&first).unwrap_err();
}

#[test]
fn validity_is_judged_to_the_second() {
    let ca = TestCa::shared();
    let peer = ca.svid(&id());
    let leaf = peer.chain().first().unwrap();
    let at = |unix: i64| {
        let now = UnixTime::since_unix_epoch(Duration::from_secs(unix.try_into().unwrap()));
        let verifier = PeerVerifier::new(ca.bundle(), ExpectedPeer::AnyTrusted);
        let _ = verifier.verify_server_cert(leaf, &[], &crate::tls::unused_server_name(), &[], now);
        verifier.refusal()
    };
    assert_eq!(at(peer.not_after()), None);
    assert_eq!(at(peer.not_after() + 1), Some(PeerRefusal::Expired));
    assert_eq!(at(peer.not_before()), None);
    assert_eq!(at(peer.not_before() - 60), None);
    assert_eq!(at(peer.not_before() - 61), Some(PeerRefusal::NotYetValid));
}

#[test]
fn long_chains_and_garbage_are_refused_before_any_path_is_built() {
    let ca = TestCa::shared();
    let peer = ca.svid(&id());
    let good = peer.chain().first().unwrap();
    let judge = |leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]| {
        let verifier = PeerVerifier::new(ca.bundle(), ExpectedPeer::AnyTrusted);
        verifier
            .verify_client_cert(leaf, intermediates, UnixTime::now())
            .unwrap_err();
        verifier.refusal().unwrap().as_str()
    };
    let extra = vec![ca.root().clone(); MAX_CHAIN_LENGTH];
    assert_eq!(judge(good, &extra), "too-large");
    assert_eq!(
        judge(&CertificateDer::from(vec![0x30, 0x82]), &[]),
        "malformed"
    );
    assert_eq!(judge(&CertificateDer::from(Vec::new()), &[]), "malformed");
    let garbage = [CertificateDer::from(vec![1, 2, 3])];
    let other = TestCa::new("td").svid(&id());
    let other = other.chain().first().unwrap();
    assert_eq!(judge(other, &garbage), "untrusted");
}

#[test]
fn removing_a_bundle_refuses_its_peers_at_once() {
    let ca = TestCa::new("td");
    let (bundles, peer) = (ca.bundle(), ca.svid(&id()));
    shown_by_client(&bundles, &peer).accepted().unwrap();
    assert!(bundles.remove("test", ca.trust_domain()));
    shown_by_client(&bundles, &peer).assert_refused("unknown-trust-domain", Alert::UnknownCA);
}

#[test]
fn an_alias_chains_to_its_own_bundle_and_is_expected_under_either_name() {
    let (old, new) = (TestCa::new("old"), TestCa::new("new"));
    let bundles = new.bundle();
    let aliases = |pairs: &[(&str, &str)]| {
        let td = |name: &str| crate::TrustDomain::parse(name).unwrap();
        TrustDomainAliases::new(pairs.iter().map(|(a, b)| (td(a), td(b)))).unwrap()
    };
    let revocation = Arc::new(RevocationLists::new());
    let trust = TrustStore::new(Arc::clone(&bundles), revocation, aliases(&[("old", "new")]));
    let expected = workload("new", "shop", "cart");
    let judge = |peer: &Svid| {
        let expected = ExpectedPeer::only(expected.spiffe_id().clone());
        let verifier = PeerVerifier::new(trust.clone(), expected);
        let (leaf, rest) = peer.chain().split_first().unwrap();
        let name = crate::tls::unused_server_name();
        let _ = verifier.verify_server_cert(leaf, rest, &name, &[], UnixTime::now());
        verifier.refusal().map(|refusal| refusal.as_str())
    };
    let renamed = old.svid(&workload("old", "shop", "cart"));

    // An alias alone gives nobody a bundle, and not the canonical one either.
    assert_eq!(judge(&renamed), Some("unknown-trust-domain"));
    let under_new_root = new.svid(&workload("old", "shop", "cart"));
    assert_eq!(judge(&under_new_root), Some("unknown-trust-domain"));

    bundles
        .replace("old", old.trust_domain(), &[old.root().clone()])
        .unwrap();
    assert_eq!(judge(&renamed), None);
    assert_eq!(judge(&under_new_root), Some("untrusted"));
    assert_eq!(judge(&new.svid(&expected)), None);
    let other_path = old.svid(&workload("old", "shop", "admin"));
    assert_eq!(judge(&other_path), Some("wrong-identity"));

    trust.set_aliases(aliases(&[]));
    assert_eq!(judge(&renamed), Some("wrong-identity"));
    trust.set_aliases(aliases(&[("new", "old")]));
    assert_eq!(judge(&renamed), None);
}
