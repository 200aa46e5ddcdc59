//! Who vouches for a certificate, and certificates that are none.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose as Eku, GeneralSubtree, IsCa,
    Issuer, KeyPair, KeyUsagePurpose as Ku, NameConstraints,
};

use super::*;
use crate::testing::CaParams;

pub(super) fn add(corpus: &mut Corpus) {
    good_paths(corpus);
    bad_intermediates(corpus);
    bad_paths(corpus);
    constraints(corpus);
    sizes(corpus);
    not_certificates(corpus);
}

fn below(params: CaParams) -> TestCa {
    TestCa::new("td").with_intermediate(&params)
}

fn good_paths(corpus: &mut Corpus) {
    let ca = below(CaParams::default());
    let good = ca.svid(&id()).chain().to_vec();
    corpus.chain(ACCEPTED, "one intermediate", ca.bundle(), good.clone());
    let mut chain = good.clone();
    chain.push(ca.root().clone());
    corpus.chain(ACCEPTED, "root appended", ca.bundle(), chain);
    let mut chain = good.clone();
    chain.insert(1, TestCa::new("else").root().clone());
    corpus.chain(ACCEPTED, "a stranger in the chain", ca.bundle(), chain);
    let mut chain = good.clone();
    chain.push(good[1].clone());
    corpus.chain(ACCEPTED, "an intermediate twice", ca.bundle(), chain);

    let two = below(CaParams::default()).with_intermediate(&CaParams::default());
    let mut chain = two.svid(&id()).chain().to_vec();
    corpus.chain(ACCEPTED, "two intermediates", two.bundle(), chain.clone());
    chain.swap(1, 2);
    corpus.chain(
        ACCEPTED,
        "intermediates in the wrong order",
        two.bundle(),
        chain,
    );

    for (name, algorithm) in [
        ("P-384 root", &rcgen::PKCS_ECDSA_P384_SHA384),
        ("Ed25519 root", &rcgen::PKCS_ED25519),
        ("RSA root", &rcgen::PKCS_RSA_SHA256),
    ] {
        let params = CaParams {
            algorithm,
            ..CaParams::default()
        };
        let ca = TestCa::with_root("td", &params);
        corpus.chain(ACCEPTED, name, ca.bundle(), ca.svid(&id()).chain().to_vec());
    }
    let (old, new) = (TestCa::new("td"), TestCa::new("td"));
    let both = old.bundle();
    let roots = [old.root().clone(), new.root().clone()];
    both.replace("test", old.trust_domain(), &roots).unwrap();
    for (name, ca) in [("old of two roots", &old), ("new of two roots", &new)] {
        let chain = ca.svid(&id()).chain().to_vec();
        corpus.chain(ACCEPTED, name, Arc::clone(&both), chain);
    }
}

fn bad_intermediates(corpus: &mut Corpus) {
    let now = SystemTime::now();
    for (verdict, name, params) in [
        (
            "untrusted",
            "intermediate that is no CA",
            CaParams {
                is_ca: false,
                ..CaParams::default()
            },
        ),
        (
            "untrusted",
            "intermediate without keyCertSign",
            CaParams {
                key_usages: vec![Ku::DigitalSignature],
                ..CaParams::default()
            },
        ),
        (
            "expired",
            "expired intermediate",
            CaParams {
                not_after: now - Duration::from_secs(5),
                ..CaParams::default()
            },
        ),
        (
            "not-yet-valid",
            "intermediate of tomorrow",
            CaParams {
                not_before: now + Duration::from_secs(86400),
                ..CaParams::default()
            },
        ),
        (
            "extended-key-usage",
            "intermediate for code signing",
            CaParams {
                extended_key_usages: vec![Eku::CodeSigning],
                ..CaParams::default()
            },
        ),
        (
            ACCEPTED,
            "intermediate without a key usage",
            CaParams {
                key_usages: Vec::new(),
                ..CaParams::default()
            },
        ),
    ] {
        let ca = below(params);
        let chain = ca.svid(&id()).chain().to_vec();
        corpus.chain(verdict, name, ca.bundle(), chain);
    }
}

fn bad_paths(corpus: &mut Corpus) {
    let untrusted = "untrusted";
    let ca = below(CaParams::default());
    let good = ca.svid(&id()).chain().to_vec();
    corpus.chain(
        untrusted,
        "missing intermediate",
        ca.bundle(),
        vec![good[0].clone()],
    );
    let reversed = good.iter().rev().cloned().collect();
    corpus.chain("leaf-is-ca", "chain in reverse", ca.bundle(), reversed);
    let root_first = vec![ca.root().clone(), good[0].clone(), good[1].clone()];
    corpus.chain("leaf-is-ca", "root first", ca.bundle(), root_first);
    let root_only = vec![ca.root().clone()];
    corpus.chain("leaf-is-ca", "the root alone", ca.bundle(), root_only);
    let impostor = TestCa::new("td").svid(&id()).chain().to_vec();
    corpus.chain(
        untrusted,
        "impostor of the root",
        corpus.ca.bundle(),
        impostor.clone(),
    );
    let mut chain = impostor;
    chain.push(TestCa::new("td").root().clone());
    corpus.chain(untrusted, "a root of its own", corpus.ca.bundle(), chain);

    let expired = TestCa::with_root(
        "td",
        &CaParams {
            not_after: SystemTime::now() - Duration::from_secs(5),
            ..CaParams::default()
        },
    );
    let chain = expired.svid(&id()).chain().to_vec();
    corpus.chain(untrusted, "expired root", expired.bundle(), chain);

    // Another trust domain's CA, though we know it.
    let partner = TestCa::new("partner");
    let bundles = corpus.ca.bundle();
    let roots = [partner.root().clone()];
    bundles
        .replace("other", partner.trust_domain(), &roots)
        .unwrap();
    let forged = partner.svid(&id()).chain().to_vec();
    corpus.chain(untrusted, "signed by another trust domain", bundles, forged);

    // A good leaf that signs for another one.
    let key = KeyPair::generate().unwrap();
    let mut signer = LeafParams::good(&workload("td", "shop", "evil"));
    signer.uri_sans = vec!["spiffe://td/ns/shop/sa/evil".to_owned()];
    let signer_chain = corpus.ca.chain_for(&signer, &key);
    let by_leaf = sign_as(&CertificateParams::default(), key);
    let chain = vec![by_leaf, signer_chain[0].clone()];
    corpus.chain(untrusted, "signed by a leaf", corpus.ca.bundle(), chain);

    let key = KeyPair::generate().unwrap();
    let mut params = leaf_params();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let own = params.self_signed(&key).unwrap().der().clone();
    corpus.chain(untrusted, "self-signed", corpus.ca.bundle(), vec![own]);

    let mut corrupted = corpus.ca.svid(&id()).chain()[0].to_vec();
    *corrupted.last_mut().unwrap() ^= 1;
    let chain = vec![CertificateDer::from(corrupted)];
    corpus.chain(untrusted, "corrupted signature", corpus.ca.bundle(), chain);
}

/// A leaf for `id` as rcgen makes it from scratch.
fn leaf_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    let uri = rcgen::string::Ia5String::try_from(id().to_string()).unwrap();
    params.subject_alt_names = vec![rcgen::SanType::URI(uri)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![Ku::DigitalSignature];
    params
}

fn sign_as(issuer: &CertificateParams, key: KeyPair) -> CertificateDer<'static> {
    let mut issuer = issuer.clone();
    issuer.distinguished_name = rcgen::DistinguishedName::new();
    issuer.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = Issuer::new(issuer, key);
    let leaf = KeyPair::generate().unwrap();
    leaf_params()
        .signed_by(&leaf, &issuer)
        .unwrap()
        .der()
        .clone()
}

fn constraints(corpus: &mut Corpus) {
    let only_one = CaParams {
        path_length: Some(0),
        ..CaParams::default()
    };
    let ca = below(only_one.clone());
    let chain = ca.svid(&id()).chain().to_vec();
    corpus.chain(ACCEPTED, "path length 0, nothing below", ca.bundle(), chain);
    let ca = below(only_one).with_intermediate(&CaParams::default());
    let chain = ca.svid(&id()).chain().to_vec();
    corpus.chain("untrusted", "path length exceeded", ca.bundle(), chain);

    let permitted = |subtree| CaParams {
        name_constraints: Some(NameConstraints {
            permitted_subtrees: vec![subtree],
            excluded_subtrees: Vec::new(),
        }),
        ..CaParams::default()
    };
    let mesh_only = || permitted(GeneralSubtree::DnsName("mesh.example".to_owned()));
    for (verdict, name, dns) in [
        (ACCEPTED, "name constraint, no DNS name", None),
        (
            ACCEPTED,
            "name constraint, DNS name within",
            Some("a.mesh.example"),
        ),
        (
            "untrusted",
            "name constraint, DNS name outside",
            Some("a.example"),
        ),
    ] {
        let ca = below(mesh_only());
        let mut params = LeafParams::good(&id());
        params.dns_sans = dns.into_iter().map(str::to_owned).collect();
        let chain = ca.svid_with(&params).chain().to_vec();
        corpus.chain(verdict, name, ca.bundle(), chain);
    }
}

fn sizes(corpus: &mut Corpus) {
    let good = corpus.ca.svid(&id()).chain()[0].clone();
    for (verdict, name, extra) in [
        (ACCEPTED, "ten certificates", MAX_CHAIN_LENGTH - 1),
        ("too-large", "eleven certificates", MAX_CHAIN_LENGTH),
        ("too-large", "a thousand certificates", 1000),
    ] {
        let mut chain = vec![good.clone()];
        chain.extend(std::iter::repeat_n(corpus.ca.root().clone(), extra));
        corpus.chain(verdict, name, corpus.ca.bundle(), chain);
    }
    corpus.leaf("too-large", "a leaf of 70 KiB", |leaf| {
        let oid = vec![1, 3, 6, 1, 4, 1, 55555, 3];
        leaf.extensions.push((oid, tlv(4, &[0; 70 * 1024]), false));
    });
    let mut big = corpus.ca.root().to_vec();
    big.resize(70 * 1024, 0);
    let chain = vec![good.clone(), CertificateDer::from(big)];
    corpus.chain(
        "too-large",
        "an intermediate of 70 KiB",
        corpus.ca.bundle(),
        chain,
    );
    // Six intermediates are the most webpki follows.
    let mut deep = TestCa::new("td");
    for _ in 0..8 {
        deep = deep.with_intermediate(&CaParams::default());
    }
    let chain = deep.svid(&id()).chain().to_vec();
    corpus.chain(
        "untrusted",
        "a path of eight intermediates",
        deep.bundle(),
        chain,
    );
}

fn not_certificates(corpus: &mut Corpus) {
    let good = corpus.ca.svid(&id()).chain()[0].to_vec();
    let mut trailing = good.clone();
    trailing.push(0);
    let list = corpus.ca.crl(0, &crate::testing::CrlParams::default());
    let key = KeyPair::generate().unwrap();
    let request = leaf_params()
        .serialize_request(&key)
        .unwrap()
        .der()
        .to_vec();
    for (name, bytes) in [
        ("nothing", Vec::new()),
        ("one byte", vec![0x30]),
        ("an empty sequence", vec![0x30, 0]),
        ("cut short", good[..good.len() - 1].to_vec()),
        ("bytes behind it", trailing),
        (
            "indefinite length",
            [&[0x30, 0x80], &good[4..], &[0, 0]].concat(),
        ),
        (
            "PEM instead of DER",
            crate::testing::pem("CERTIFICATE", &good).into_bytes(),
        ),
        ("a revocation list", list),
        ("a certificate request", request),
        ("a private key", key.serialize_der()),
        ("nested a thousand times", [0x30, 0x80].repeat(1000)),
    ] {
        let chain = vec![CertificateDer::from(bytes)];
        corpus.chain("malformed", name, corpus.ca.bundle(), chain);
    }
    let garbage = CertificateDer::from(vec![1, 2, 3]);
    let chain = vec![CertificateDer::from(good.clone()), garbage];
    corpus.chain(
        ACCEPTED,
        "garbage where no issuer is needed",
        corpus.ca.bundle(),
        chain,
    );
}
