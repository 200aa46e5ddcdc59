//! What a certificate may be used for, when, and its odd fields.

use std::time::{Duration, SystemTime};

use rcgen::{ExtendedKeyUsagePurpose as Eku, KeyUsagePurpose as Ku};

use super::{ACCEPTED, Corpus, Verdict};
use crate::testing::LeafParams;

pub(super) fn add(corpus: &mut Corpus) {
    keys(corpus);
    usages(corpus);
    dates(corpus);
    fields(corpus);
}

fn keys(corpus: &mut Corpus) {
    for (name, algorithm) in [
        ("P-384 key", &rcgen::PKCS_ECDSA_P384_SHA384),
        ("Ed25519 key", &rcgen::PKCS_ED25519),
        ("RSA-2048 key", &rcgen::PKCS_RSA_SHA256),
    ] {
        corpus.leaf(ACCEPTED, name, |leaf| leaf.algorithm = algorithm);
    }
    corpus.leaf("weak-key", "P-521 key", |leaf| {
        leaf.algorithm = &rcgen::PKCS_ECDSA_P521_SHA512;
    });
}

fn usages(corpus: &mut Corpus) {
    corpus.leaf(ACCEPTED, "no EKU", |leaf| leaf.extended_key_usages.clear());
    corpus.leaf(ACCEPTED, "no basic constraints", |leaf| {
        leaf.basic_constraints_ca = None
    });
    corpus.leaf(ACCEPTED, "key usage digitalSignature only", |leaf| {
        leaf.key_usages = vec![Ku::DigitalSignature];
    });
    corpus.leaf("leaf-is-ca", "CA constraint", |leaf| {
        leaf.basic_constraints_ca = Some(true)
    });
    corpus.leaf("leaf-is-ca", "keyCertSign", |leaf| {
        leaf.key_usages.push(Ku::KeyCertSign)
    });
    corpus.leaf("leaf-is-ca", "cRLSign", |leaf| {
        leaf.key_usages.push(Ku::CrlSign)
    });
    corpus.leaf("key-usage", "no key usage", |leaf| leaf.key_usages.clear());
    corpus.leaf("key-usage", "keyAgreement only", |leaf| {
        leaf.key_usages = vec![Ku::KeyAgreement];
    });
    corpus.leaf("extended-key-usage", "codeSigning", |leaf| {
        leaf.extended_key_usages = vec![Eku::CodeSigning];
    });
    corpus.leaf("extended-key-usage", "anyExtendedKeyUsage", |leaf| {
        leaf.extended_key_usages = vec![Eku::Any];
    });
    corpus.leaf("untrusted", "unknown critical extension", |leaf| {
        leaf.unknown_critical_extension = true;
    });
    let extension = |oid: &[u64], content: &[u8]| (oid.to_vec(), content.to_vec(), false);
    corpus.leaf(ACCEPTED, "unknown extension", |leaf| {
        leaf.extensions
            .push(extension(&[1, 3, 6, 1, 4, 1, 55555, 2], &[5, 0]));
    });
    corpus.leaf("malformed", "two key usages", |leaf| {
        leaf.extensions
            .push(extension(&[2, 5, 29, 15], &[3, 2, 7, 0x80]));
    });
    corpus.leaf("key-usage", "key usage without a bit", |leaf| {
        leaf.key_usages.clear();
        leaf.extensions.push(extension(&[2, 5, 29, 15], &[3, 1, 0]));
    });
    corpus.leaf("malformed", "key usage that is no bit string", |leaf| {
        leaf.key_usages.clear();
        leaf.extensions
            .push(extension(&[2, 5, 29, 15], &[4, 1, 0x80]));
    });
    corpus.leaf("malformed", "basic constraints of garbage", |leaf| {
        leaf.basic_constraints_ca = None;
        leaf.extensions
            .push(extension(&[2, 5, 29, 19], &[0x30, 5, 1]));
    });
    corpus.leaf("extended-key-usage", "EKU without a purpose", |leaf| {
        leaf.extended_key_usages.clear();
        leaf.extensions.push(extension(&[2, 5, 29, 37], &[0x30, 0]));
    });
    for (name, usage, of_a_client, of_a_server) in [
        (
            "clientAuth only",
            Eku::ClientAuth,
            ACCEPTED,
            "extended-key-usage",
        ),
        (
            "serverAuth only",
            Eku::ServerAuth,
            "extended-key-usage",
            ACCEPTED,
        ),
    ] {
        corpus.leaf("", name, |leaf| leaf.extended_key_usages = vec![usage]);
        corpus.cases.last_mut().unwrap().verdict = Verdict {
            of_a_client,
            of_a_server,
        };
    }
}

fn dates(corpus: &mut Corpus) {
    let now = SystemTime::now();
    let seconds = Duration::from_secs;
    for (verdict, name, from, to) in [
        (
            ACCEPTED,
            "begins in 30 s",
            now + seconds(30),
            now + seconds(600),
        ),
        (
            "not-yet-valid",
            "begins in 2 min",
            now + seconds(120),
            now + seconds(600),
        ),
        (
            "expired",
            "expired 2 s ago",
            now - seconds(600),
            now - seconds(2),
        ),
        (
            "expired",
            "ends before it begins",
            now - seconds(10),
            now - seconds(600),
        ),
        (
            ACCEPTED,
            "dates beyond 2050",
            now - seconds(10),
            now + seconds(100 * 365 * 86400),
        ),
    ] {
        corpus.leaf(verdict, name, |leaf: &mut LeafParams| {
            leaf.not_before = from;
            leaf.not_after = to;
        });
    }
}

fn fields(corpus: &mut Corpus) {
    let serial = |bytes: &[u8]| Some(bytes.to_vec());
    corpus.leaf(ACCEPTED, "serial 0", |leaf| leaf.serial = serial(&[0]));
    corpus.leaf(ACCEPTED, "serial of 20 bytes", |leaf| {
        leaf.serial = serial(&[0x7f; 20])
    });
    corpus.leaf("malformed", "serial of 21 bytes", |leaf| {
        leaf.serial = serial(&[0x7f; 21])
    });
    corpus.leaf("malformed", "serial of 4 KiB", |leaf| {
        leaf.serial = serial(&[0x7f; 4096])
    });

    let version_3 = [0xa0, 3, 2, 1, 2];
    corpus.edited(
        "malformed",
        "version 1 with extensions",
        &version_3,
        &[0xa0, 3, 2, 1, 0],
    );
    corpus.edited("malformed", "version 2", &version_3, &[0xa0, 3, 2, 1, 1]);
    corpus.edited("malformed", "version 4", &version_3, &[0xa0, 3, 2, 1, 3]);
    // ecdsa-with-SHA256 and -SHA384.
    let (sha256, sha384) = (
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2],
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3],
    );
    corpus.edited(
        "untrusted",
        "another algorithm inside than outside",
        &sha256,
        &sha384,
    );
    let not_bool = [1, 1, 0xff];
    corpus.edited(
        "malformed",
        "TRUE that is not 0xff",
        &not_bool,
        &[1, 1, 0x7f],
    );
}
