//! A list as operators make it: by `openssl ca`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use rustls::server::danger::ClientCertVerifier as _;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, UnixTime};

use super::RevocationLists;
use crate::aliases::TrustDomainAliases;
use crate::bundles::TrustBundles;
use crate::spiffe_id::TrustDomain;
use crate::trust::TrustStore;
use crate::verifier::{ExpectedPeer, PeerVerifier};

const CONFIG: &str = "[req]\nprompt=no\ndistinguished_name=dn\n[dn]\nCN=operator\n\
    [ca]\ndefault_ca=own\n\
    [own]\ndatabase=index\ncrlnumber=number\ndefault_md=sha256\ndefault_crl_days=1\n\
    certificate=ca.pem\nprivate_key=ca.key\ncrl_extensions=ext\n\
    [ext]\nauthorityKeyIdentifier=keyid\n\
    [plain]\ndatabase=index\ndefault_md=sha256\ndefault_crl_days=1\n\
    certificate=ca.pem\nprivate_key=ca.key\n";

const NEW_KEY: &str = "-new -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 -config conf";

fn openssl(dir: &Path, line: &str) {
    let output = Command::new("openssl")
        .current_dir(dir)
        .args(line.split_whitespace())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "openssl {line}: {errors}");
}

#[test]
fn a_list_made_by_openssl_revokes_and_clears() {
    if Command::new("openssl").arg("version").output().is_err() {
        eprintln!("SKIPPED: there is no openssl command");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let file = |name: &str| std::fs::read(dir.join(name)).unwrap();
    std::fs::write(dir.join("conf"), CONFIG).unwrap();
    std::fs::write(dir.join("index"), "").unwrap();
    std::fs::write(dir.join("number"), "01\n").unwrap();
    let leaf = "subjectAltName=URI:spiffe://td/ns/a/sa/b\nkeyUsage=digitalSignature\n";
    std::fs::write(dir.join("leaf"), leaf).unwrap();
    openssl(
        dir,
        &format!(
            "req -x509 {NEW_KEY} -keyout ca.key -out ca.pem \
             -addext basicConstraints=critical,CA:TRUE -addext keyUsage=keyCertSign,cRLSign"
        ),
    );
    for name in ["good", "bad"] {
        openssl(dir, &format!("req {NEW_KEY} -keyout k -out {name}.csr"));
        openssl(
            dir,
            &format!("x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -extfile leaf -out {name}"),
        );
    }
    openssl(dir, "ca -config conf -revoke bad");
    openssl(dir, "ca -config conf -gencrl -out list");

    let td = TrustDomain::parse("td").unwrap();
    let pem = |name: &str| CertificateDer::from_pem_slice(&file(name)).unwrap();
    let bundles = Arc::new(TrustBundles::new());
    bundles.replace("file", &td, &[pem("ca.pem")]).unwrap();
    let lists = Arc::new(RevocationLists::new());
    lists.replace("file", &td, &file("list")).unwrap();
    let trust = TrustStore::new(bundles, Arc::clone(&lists), TrustDomainAliases::default());
    let judge = |name: &str| {
        let verifier = PeerVerifier::new(trust.clone(), ExpectedPeer::AnyTrusted);
        let _ = verifier.verify_client_cert(&pem(name), &[], UnixTime::now());
        verifier.refusal().map(|refusal| refusal.as_str())
    };
    assert_eq!(judge("good"), None);
    assert_eq!(judge("bad"), Some("revoked"));
    let [status] = lists.snapshot().try_into().unwrap();
    assert_eq!((status.issuer.as_str(), status.revoked), ("CN=operator", 1));

    // Without `crl_extensions` openssl writes version 1: refused, saying so.
    openssl(dir, "ca -config conf -name plain -gencrl -out old");
    let error = lists.replace("file", &td, &file("old")).unwrap_err();
    assert!(error.to_string().contains("version"), "{error}");
    assert_eq!(judge("bad"), Some("revoked"));
}
