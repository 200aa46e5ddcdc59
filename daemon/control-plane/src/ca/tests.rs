#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::fs;
use std::os::unix::fs::PermissionsExt;

use base64::prelude::{BASE64_STANDARD, Engine};
use rcgen::{CertificateParams, SanType};
use tempfile::TempDir;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::*;

const ID: &str = "spiffe://cluster.local/ns/demo/sa/web";

#[test]
fn new_ca_has_a_private_key_file_and_opens_again_with_the_same_root() {
    let folder = TempDir::new().unwrap();
    let root = open(&folder).unwrap().roots().bundle_pem().to_owned();
    let mode = |name| {
        fs::metadata(folder.path().join(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    assert_eq!(mode(KEY_FILE), 0o600);
    assert_eq!(mode(ROOT_FILE), 0o644);
    assert_eq!(open(&folder).unwrap().roots().bundle_pem(), root);
}

#[test]
fn key_that_others_can_read_is_refused() {
    for mode in [0o640, 0o604, 0o660] {
        let folder = TempDir::new().unwrap();
        drop(open(&folder).unwrap());
        fs::set_permissions(
            folder.path().join(KEY_FILE),
            fs::Permissions::from_mode(mode),
        )
        .unwrap();
        let error = open(&folder).unwrap_err();
        assert!(
            matches!(error, CaError::KeyExposed { mode: found, .. } if found == mode),
            "{error}"
        );
    }
}

#[test]
fn root_without_its_key_is_refused_and_a_lost_root_is_made_again() {
    let folder = TempDir::new().unwrap();
    drop(open(&folder).unwrap());
    fs::remove_file(folder.path().join(ROOT_FILE)).unwrap();
    drop(open(&folder).unwrap());
    fs::remove_file(folder.path().join(KEY_FILE)).unwrap();
    let error = open(&folder).unwrap_err();
    assert!(matches!(error, CaError::KeyMissing { .. }), "{error}");
}

#[test]
fn root_of_another_key_or_trust_domain_is_refused() {
    let (folder, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    drop(open(&folder).unwrap());
    drop(open(&other).unwrap());
    let error = Ca::open(folder.path(), "other.example").unwrap_err();
    assert!(
        matches!(&error, CaError::OtherTrustDomain { found, .. } if found == "cluster.local"),
        "{error}"
    );
    fs::copy(other.path().join(ROOT_FILE), folder.path().join(ROOT_FILE)).unwrap();
    let error = open(&folder).unwrap_err();
    assert!(matches!(error, CaError::Unusable { .. }), "{error}");
}

#[test]
fn garbage_in_the_key_file_is_refused() {
    let folder = TempDir::new().unwrap();
    files::replace(&folder.path().join(KEY_FILE), b"garbage", 0o600, None).unwrap();
    let error = open(&folder).unwrap_err();
    assert!(matches!(error, CaError::Unusable { .. }), "{error}");
}

#[test]
fn state_directory_is_used_by_one_control_plane_at_a_time() {
    let folder = TempDir::new().unwrap();
    let first = open(&folder).unwrap();
    let error = open(&folder).unwrap_err();
    assert!(matches!(error, CaError::Locked { .. }), "{error}");
    drop(first);
    open(&folder).unwrap();
}

#[test]
fn svid_has_the_profile_of_a_leaf() {
    let folder = TempDir::new().unwrap();
    let ca = open(&folder).unwrap().roots();
    let csr = Csr::parse(&csr_pem(&KeyPair::generate().unwrap(), &[uri_name(ID)])).unwrap();
    let signed = ca.sign_svid(&csr, Duration::from_secs(3600)).unwrap();
    let pem = x509_parser::pem::parse_x509_pem(signed.leaf_pem.as_bytes())
        .unwrap()
        .1;
    let leaf = pem.parse_x509().unwrap();
    let root = X509Certificate::from_der(&ca.signing.der).unwrap().1;

    leaf.verify_signature(Some(root.public_key())).unwrap();
    assert!(!leaf.is_ca());
    assert!(leaf.basic_constraints().unwrap().is_some());
    let san = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(san.critical);
    assert_eq!(san.value.general_names, [GeneralName::URI(ID)]);
    assert_eq!(
        leaf.key_usage().unwrap().unwrap().value.flags,
        1,
        "digitalSignature alone"
    );
    let eku = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(eku.client_auth && eku.server_auth && !eku.any);
    assert_eq!(leaf.raw_serial(), signed.serial);
    assert_eq!(leaf.raw_serial().len(), 16);
    assert!(leaf.validity().not_before.to_datetime() < OffsetDateTime::now_utc());
    let life = leaf.validity().not_after.to_datetime() - OffsetDateTime::now_utc();
    assert!(
        life <= time::Duration::hours(1) && life > time::Duration::minutes(59),
        "{life}"
    );
}

#[test]
fn svid_does_not_outlive_the_root() {
    let folder = TempDir::new().unwrap();
    let ca = open(&folder).unwrap().roots();
    let csr = Csr::parse(&csr_pem(&KeyPair::generate().unwrap(), &[uri_name(ID)])).unwrap();
    let signed = ca.sign_svid(&csr, roots::ROOT_VALIDITY * 2).unwrap();
    assert_eq!(signed.not_after, ca.signing.not_after);
}

#[test]
fn csr_with_one_uri_is_taken_for_every_supported_kind_of_key() {
    for algorithm in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
    ] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        assert_eq!(Csr::parse(&csr_pem(&key, &[uri_name(ID)])).unwrap().uri, ID);
    }
}

#[test]
fn csr_without_exactly_one_uri_is_refused() {
    let key = KeyPair::generate().unwrap();
    let dns = || SanType::DnsName("web".try_into().unwrap());
    let refused = |names: &[SanType]| {
        Csr::parse(&csr_pem(&key, names))
            .map(|csr| csr.uri)
            .unwrap_err()
    };
    assert!(matches!(refused(&[]), CsrError::Names(0)));
    assert!(matches!(
        refused(&[uri_name(ID), uri_name(ID)]),
        CsrError::Names(2)
    ));
    assert!(matches!(
        refused(&[uri_name(ID), dns()]),
        CsrError::Names(2)
    ));
    assert!(matches!(refused(&[dns()]), CsrError::NotUri));
}

#[test]
fn csr_that_was_altered_is_refused() {
    let pem = csr_pem(&KeyPair::generate().unwrap(), &[uri_name(ID)]);
    let mut der = x509_parser::pem::parse_x509_pem(pem.as_bytes())
        .unwrap()
        .1
        .contents;
    let at = der.windows(4).position(|window| window == b"demo").unwrap();
    der[at] = b'D';
    let body = BASE64_STANDARD.encode(der);
    let altered =
        format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n");
    assert!(matches!(
        Csr::parse(&altered).err().unwrap(),
        CsrError::Signature
    ));
}

#[test]
fn what_is_no_csr_is_refused() {
    assert!(matches!(Csr::parse("").err().unwrap(), CsrError::NotPem));
    assert!(matches!(
        Csr::parse("hello").err().unwrap(),
        CsrError::NotPem
    ));
    let folder = TempDir::new().unwrap();
    let certificate = open(&folder).unwrap().roots().bundle_pem().to_owned();
    assert!(matches!(
        Csr::parse(&certificate).err().unwrap(),
        CsrError::NotPem
    ));
    let relabelled = certificate.replace("CERTIFICATE", "CERTIFICATE REQUEST");
    assert!(matches!(
        Csr::parse(&relabelled).err().unwrap(),
        CsrError::Malformed
    ));
}

#[test]
fn weak_key_is_refused() {
    let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    assert!(matches!(
        Csr::parse(&csr_pem(&key, &[uri_name(ID)])).err().unwrap(),
        CsrError::Key
    ));
}

fn open(folder: &TempDir) -> Result<Ca, CaError> {
    Ca::open(folder.path(), "cluster.local")
}

fn uri_name(uri: &str) -> SanType {
    SanType::URI(uri.try_into().unwrap())
}

fn csr_pem(key: &KeyPair, names: &[SanType]) -> String {
    let mut params = CertificateParams::default();
    params.subject_alt_names = names.to_vec();
    params.serialize_request(key).unwrap().pem().unwrap()
}
