//! No `Debug` output of anything that holds a key or a token shows it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fmt::{Debug, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::KeyPair;
use rustls_pki_types::PrivateKeyDer;

use crate::testing::{LeafParams, TestCa, pem, workload};
use crate::*;

/// A P-256 key and the ways in which its secret part could be printed.
struct Secret {
    pair: KeyPair,
    spellings: Vec<String>,
}

impl Secret {
    fn new() -> Self {
        let pair = KeyPair::generate().unwrap();
        let der = pair.serialize_der();
        // PKCS#8 of a P-256 key: the 32 bytes behind OCTET STRING, length 32.
        let at = der.windows(2).position(|w| w == [4, 32]).unwrap() + 2;
        let scalar = &der[at..at + 32];
        let mut spellings = Vec::new();
        for part in scalar.chunks(8) {
            let decimal: Vec<String> = part.iter().map(u8::to_string).collect();
            let hex = part.iter().fold(String::new(), |mut text, byte| {
                write!(text, "{byte:02x}").unwrap();
                text
            });
            let spaced: Vec<String> = part.iter().map(|byte| format!("0x{byte:02x}")).collect();
            let escaped: String = part.escape_ascii().to_string();
            spellings.extend([decimal.join(","), hex, spaced.join(","), escaped]);
        }
        // Base64 of the whole, in each line of the PEM.
        let lines = pem("PRIVATE KEY", &der);
        let lines = lines.lines().filter(|line| !line.starts_with("-----"));
        // The line behind the first has the scalar and may show nothing else.
        spellings.extend(lines.take(2).map(str::to_lowercase));
        Self { pair, spellings }
    }

    fn check(&self, what: &str, value: &dyn Debug) {
        for text in [format!("{value:?}"), format!("{value:#?}")] {
            let text: String = text.to_lowercase().split_whitespace().collect();
            for spelling in &self.spellings {
                assert!(!text.contains(&spelling.to_lowercase()), "{what}: {text}");
            }
        }
    }
}

#[test]
fn the_spellings_are_found_where_they_are() {
    let secret = Secret::new();
    let der = secret.pair.serialize_der();
    let leak = |value: &dyn Debug| {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| secret.check("leak", value)))
            .is_err()
    };
    assert!(leak(&der));
    assert!(leak(&pem("PRIVATE KEY", &der)));
    assert!(leak(&format!("{der:02x?}").replace(", ", "")));
    assert!(!leak(&secret.pair.public_key_pem()));
}

#[tokio::test]
async fn no_debug_output_shows_a_key() {
    let secret = Secret::new();
    let ca = TestCa::new("td");
    let identity = workload("td", "shop", "cart");
    let params = LeafParams::good(&identity);
    let chain = ca.chain_for(&params, &secret.pair);
    let der = PrivateKeyDer::try_from(secret.pair.serialize_der()).unwrap();
    let now = SystemTime::now();
    let svid = Svid::from_der(identity.spiffe_id(), chain.clone(), &der, now).unwrap();
    secret.check("Svid", &svid);

    let verifier = || PeerVerifier::new(ca.bundle(), ExpectedPeer::AnyTrusted);
    let client = tls::client_config(&svid, verifier(), &[b"h2"]).unwrap();
    let server = tls::server_config(&svid, verifier(), &[b"h2"]).unwrap();
    secret.check("ClientConfig", &client);
    secret.check("ServerConfig", &server);
    secret.check("CertifiedKey", svid.certified_key());

    let svid = Arc::new(svid);
    secret.check(
        "Issued",
        &Issued {
            svid: Arc::clone(&svid),
            roots: vec![ca.root().clone()],
        },
    );
    secret.check(
        "SvidEvent",
        &SvidEvent::Renewed {
            identity: identity.clone(),
            svid,
            replaced: None,
        },
    );

    let key = secret.pair.serialize_der();
    let with_key = spire_proto::X509SvidWithKey {
        x509_svid: None,
        x509_svid_key: key.clone(),
    };
    secret.check("X509SvidWithKey", &with_key);
    let response = spire_proto::SubscribeToX509SvidsResponse {
        x509_svids: vec![with_key],
        federates_with: Vec::new(),
    };
    secret.check("SubscribeToX509SvidsResponse", &response);
    let own = workload_proto::X509Svid {
        spiffe_id: identity.to_string(),
        x509_svid: chain[0].to_vec(),
        x509_svid_key: key,
        bundle: ca.root().to_vec(),
        hint: String::new(),
    };
    secret.check("workload_proto::X509Svid", &own);
    let response = workload_proto::X509SvidResponse {
        svids: vec![own],
        ..Default::default()
    };
    secret.check("workload_proto::X509SvidResponse", &response);
    let error = Svid::from_der(identity.spiffe_id(), Vec::new(), &der, now);
    secret.check("SvidError", &error.unwrap_err());
}

#[tokio::test]
async fn no_debug_output_of_a_source_or_the_manager_shows_a_key() {
    let secret = Secret::new();
    let ca = TestCa::new("td");
    let identity = workload("td", "shop", "cart");
    let dir = tempfile::tempdir().unwrap();
    let chain = ca.chain_for(&LeafParams::good(&identity), &secret.pair);
    let write = |name: &str, text: String| std::fs::write(dir.path().join(name), text).unwrap();
    write(CERTIFICATE_FILE, testing::pem_chain(&chain));
    write(KEY_FILE, secret.pair.serialize_pem());
    write(BUNDLE_FILE, testing::pem_chain([ca.root()]));
    let bundles = Arc::new(TrustBundles::new());
    let config = FileSourceConfig {
        directory: dir.path().to_owned(),
        layout: FileLayout::Single,
    };
    let source = Arc::new(FileSource::start(config, Arc::clone(&bundles)).unwrap());
    let manager = SvidManager::start(
        source.clone(),
        Arc::clone(&bundles),
        ManagerConfig::default(),
    );
    manager.want(&identity);
    let wait = Duration::from_secs(10);
    manager.ready(&identity, wait).await.unwrap();
    secret.check("FileSource", &source);
    secret.check("SvidManager", &manager);
    secret.check("SvidStatus", &manager.snapshot());
    secret.check("TrustBundles", &bundles);

    // A key file where the certificate belongs: the error must not quote it.
    write(CERTIFICATE_FILE, secret.pair.serialize_pem());
    let error = source.fetch(&identity, wait).await.unwrap_err();
    secret.check("FetchError", &error);
    secret.check("its text", &error.to_string());
    write(
        KEY_FILE,
        secret.pair.serialize_pem().replace("-----END", "x"),
    );
    let error = source.fetch(&identity, wait).await.unwrap_err();
    secret.check("FetchError", &error);
    secret.check("its text", &error.to_string());

    let nowhere = PathBuf::from("/nonexistent/agent.sock");
    let spire = DelegatedIdentityConfig::new(&nowhere).unwrap();
    let spire = DelegatedIdentity::start(spire, Arc::clone(&bundles)).unwrap();
    secret.check("DelegatedIdentity", &spire);
    let workload_api = WorkloadApiConfig {
        socket: nowhere,
        timeout: wait,
    };
    secret.check(
        "WorkloadApi",
        &WorkloadApi::start(workload_api, Arc::clone(&bundles)).unwrap(),
    );
    let client = CaClient::new(CaClientConfig {
        address: "https://127.0.0.1:1".to_owned(),
        server_name: None,
        root_file: PathBuf::from("/nonexistent/root.pem"),
        token_file: dir.path().join(KEY_FILE),
        cluster_id: "Kubernetes".to_owned(),
        timeout: wait,
    });
    secret.check("CaClient", &client.unwrap());
}
