//! Files that are written, half written and swapped, read directly and through
//! the manager.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::fs::symlink;
use std::process::Command;

use rcgen::KeyPair;
use tempfile::TempDir;

use super::*;
use crate::manager::{ManagerConfig, SvidEvent, SvidManager, SvidState};
use crate::source::FetchError;
use crate::testing::{CaParams, LeafParams, TestCa, pem_chain, workload};
use crate::verifier::MAX_CHAIN_LENGTH;

struct Setup {
    dir: TempDir,
    ca: TestCa,
    bundles: Arc<TrustBundles>,
    source: Arc<FileSource>,
}

impl Setup {
    fn new() -> Self {
        Self::with(FileLayout::Single)
    }

    fn with(layout: FileLayout) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bundles = Arc::new(TrustBundles::new());
        let config = FileSourceConfig {
            directory: dir.path().to_owned(),
            layout,
        };
        Self {
            ca: TestCa::new("td"),
            source: Arc::new(FileSource::start(config, Arc::clone(&bundles)).unwrap()),
            dir,
            bundles,
        }
    }

    async fn fetch(&self) -> Result<Issued, FetchError> {
        self.source.fetch(&cart(), Duration::from_secs(60)).await
    }

    /// Writes all three files of a good SVID.
    fn write(&self) -> Pair {
        let pair = Pair::new(&self.ca, &LeafParams::good(&cart()));
        pair.write(self.dir.path());
        std::fs::write(self.file(BUNDLE_FILE), pem_chain([self.ca.root()])).unwrap();
        pair
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

struct Pair {
    chain: String,
    key: String,
}

impl Pair {
    fn new(ca: &TestCa, params: &LeafParams) -> Self {
        let key = params.key();
        Self {
            chain: pem_chain(&ca.chain_for(params, &key)),
            key: key.serialize_pem(),
        }
    }

    fn write(&self, folder: &Path) {
        std::fs::write(folder.join(CERTIFICATE_FILE), &self.chain).unwrap();
        std::fs::write(folder.join(KEY_FILE), &self.key).unwrap();
    }
}

fn cart() -> WorkloadIdentity {
    workload("td", "shop", "cart")
}

#[tokio::test]
async fn three_files_become_an_svid_and_its_roots() {
    let setup = Setup::new();
    setup.write();
    let issued = setup.fetch().await.unwrap();
    assert_eq!(issued.svid.id(), cart().spiffe_id());
    assert_eq!(issued.svid.chain().len(), 1);
    assert_eq!(
        setup.bundles.roots(setup.ca.trust_domain()),
        [setup.ca.root().clone()]
    );
}

#[tokio::test]
async fn intermediates_an_appended_root_and_several_roots_are_understood() {
    let mut setup = Setup::new();
    setup.ca = TestCa::new("td").with_intermediate(&CaParams::default());
    let mut pair = setup.write();
    let root = pem_chain([setup.ca.root()]);
    pair.chain += &root;
    pair.write(setup.dir.path());
    let other = TestCa::new("td");
    let roots = format!("old root:\n{root}new root:\n{}", pem_chain([other.root()]));
    std::fs::write(setup.file(BUNDLE_FILE), roots).unwrap();
    let issued = setup.fetch().await.unwrap();
    assert_eq!(
        issued.svid.chain().len(),
        2,
        "the root is not sent to peers"
    );
    assert_eq!(setup.bundles.roots(setup.ca.trust_domain()).len(), 2);
}

#[tokio::test]
async fn each_identity_has_a_folder_and_roots_of_its_own() {
    let template = IdentityTemplate::parse("{namespace}/{service_account}").unwrap();
    let setup = Setup::with(FileLayout::PerIdentity(template));
    let other_ca = TestCa::new("td");
    let admin = workload("td", "shop", "admin");
    for (ca, identity) in [(&setup.ca, cart()), (&other_ca, admin.clone())] {
        let folder = setup
            .dir
            .path()
            .join("shop")
            .join(identity.service_account());
        std::fs::create_dir_all(&folder).unwrap();
        Pair::new(ca, &LeafParams::good(&identity)).write(&folder);
        std::fs::write(folder.join(BUNDLE_FILE), pem_chain([ca.root()])).unwrap();
        let ttl = Duration::from_secs(60);
        setup.source.fetch(&identity, ttl).await.unwrap();
    }
    let td = setup.ca.trust_domain();
    assert_eq!(setup.bundles.roots(td).len(), 2);
    setup.source.forget(&cart());
    assert_eq!(setup.bundles.roots(td), [other_ca.root().clone()]);

    let stranger = workload("td", "shop", "stranger");
    let error = setup.source.fetch(&stranger, Duration::ZERO).await;
    let text = error.unwrap_err().to_string();
    assert!(text.contains("shop/stranger/tls.crt"), "{text}");
}

#[tokio::test]
async fn keys_of_each_kind_are_read() {
    let setup = Setup::new();
    let mut converted = 0;
    for (algorithm, section) in [
        (&rcgen::PKCS_ECDSA_P256_SHA256, "EC PRIVATE KEY"),
        (&rcgen::PKCS_ECDSA_P384_SHA384, "EC PRIVATE KEY"),
        (&rcgen::PKCS_ED25519, ""),
        (&rcgen::PKCS_RSA_SHA256, "RSA PRIVATE KEY"),
    ] {
        setup.write();
        let mut params = LeafParams::good(&cart());
        params.algorithm = algorithm;
        Pair::new(&setup.ca, &params).write(setup.dir.path());
        setup.fetch().await.unwrap();
        if section.is_empty() {
            continue;
        }
        // The older encodings, as openssl writes them.
        let key = setup.file(KEY_FILE);
        let output = Command::new("openssl")
            .args(["pkey", "-traditional", "-in"])
            .arg(&key)
            .output();
        let Ok(output) = output else {
            eprintln!("SKIPPED: {section}: there is no openssl command");
            continue;
        };
        assert!(String::from_utf8_lossy(&output.stdout).contains(section));
        std::fs::write(&key, output.stdout).unwrap();
        setup.fetch().await.unwrap();
        converted += 1;
    }
    eprintln!("{converted} keys in traditional encodings");
}

#[tokio::test]
async fn unusable_files_are_refused_naming_file_and_reason() {
    let setup = Setup::new();
    let good = setup.write();
    let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let spoiled = |change: &dyn Fn(&mut LeafParams)| {
        let mut params = LeafParams::good(&cart());
        change(&mut params);
        Pair::new(&setup.ca, &params)
    };
    let expired = spoiled(&|p| p.not_after = SystemTime::now() - Duration::from_secs(5));
    let other = spoiled(&|p| p.uri_sans = vec!["spiffe://td/ns/shop/sa/admin".to_owned()]);
    let unrelated = TestCa::new("td");
    let (certificate, key, bundle) = (CERTIFICATE_FILE, KEY_FILE, BUNDLE_FILE);
    let encrypted =
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let cases: Vec<(&str, String, &str)> = vec![
        (certificate, String::new(), "holds no PEM certificate"),
        (
            certificate,
            "garbage".to_owned(),
            "holds no PEM certificate",
        ),
        (certificate, good.key.clone(), "holds no PEM certificate"),
        (
            certificate,
            good.chain.repeat(65),
            "more than 64 certificates",
        ),
        (certificate, "x".repeat(256 * 1024), "bytes or more"),
        (
            certificate,
            pem_chain([unrelated.root()]) + &good.chain,
            "leaf-is-ca",
        ),
        (
            certificate,
            good.chain.clone() + &pem_chain([unrelated.root()]).repeat(MAX_CHAIN_LENGTH),
            "more than",
        ),
        (key, String::new(), "holds no PEM private key"),
        (key, good.chain.clone(), "holds no PEM private key"),
        (
            key,
            p384.serialize_pem(),
            "does not match the first certificate",
        ),
        (key, good.key.repeat(2), "more than one private key"),
        (key, encrypted.to_owned(), "is encrypted"),
        (
            key,
            crate::testing::pem("PRIVATE KEY", &[1, 2, 3]),
            "is not an ECDSA",
        ),
        (bundle, String::new(), "holds no PEM certificate"),
        (bundle, good.chain.clone(), "not a CA certificate"),
        (
            bundle,
            pem_chain([unrelated.root()]),
            "does not hold against the roots",
        ),
    ];
    let reading = async |file: &str, why: &str| {
        let error = setup.fetch().await.unwrap_err();
        let text = error.to_string();
        assert_eq!(error.problem.as_str(), "file", "{text}");
        assert!(text.contains(why), "{why}: {text}");
        assert!(text.contains("spiffe://td/ns/shop/sa/cart"), "{text}");
        let dir = setup.dir.path().to_str().unwrap();
        assert!(text.contains(dir) && text.contains(file), "{file}: {text}");
        assert!(!text.contains("PRIVATE KEY-"), "{text}");
    };
    for (file, content, why) in &cases {
        let right = std::fs::read(setup.file(file)).unwrap();
        std::fs::write(setup.file(file), content).unwrap();
        reading(file, why).await;
        std::fs::write(setup.file(file), right).unwrap();
        setup.fetch().await.unwrap();
    }
    for (pair, why) in [(&expired, "expired"), (&other, "sa/admin")] {
        pair.write(setup.dir.path());
        reading(certificate, why).await;
    }
    good.write(setup.dir.path());
    for file in [certificate, key, bundle] {
        let right = std::fs::read(setup.file(file)).unwrap();
        std::fs::remove_file(setup.file(file)).unwrap();
        reading(file, "No such file").await;
        std::fs::write(setup.file(file), right).unwrap();
    }
    setup.fetch().await.unwrap();
}

#[tokio::test]
async fn a_change_is_put_to_use_and_a_half_written_one_is_not() {
    let setup = Setup::new();
    setup.write();
    let bundles = Arc::clone(&setup.bundles);
    let manager = SvidManager::start(setup.source.clone(), bundles, ManagerConfig::default());
    let mut events = manager.subscribe();
    manager.want(&cart());
    let wait = Duration::from_secs(10);
    let first = manager.ready(&cart(), wait).await.unwrap();

    // The certificate is there, its key is not yet.
    let next = Pair::new(&setup.ca, &LeafParams::good(&cart()));
    std::fs::write(setup.file(CERTIFICATE_FILE), &next.chain).unwrap();
    let failing = async {
        loop {
            let status = manager.snapshot().remove(0);
            if status.state == SvidState::RefreshFailing {
                return status.last_error.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let error = tokio::time::timeout(wait, failing).await.unwrap();
    assert!(error.contains("tls.key: does not match"), "{error}");
    assert!(Arc::ptr_eq(&manager.current(&cart()).unwrap(), &first));

    std::fs::write(setup.file(KEY_FILE), &next.key).unwrap();
    let mut serials = Vec::new();
    while serials.len() < 2 {
        let event = tokio::time::timeout(wait, events.recv()).await;
        if let Ok(Ok(SvidEvent::Renewed { svid, .. })) = event {
            serials.push(svid.serial().to_owned());
        } else {
            panic!("{event:?}");
        }
    }
    assert_ne!(serials[0], serials[1]);
    let status = manager.snapshot().remove(0);
    assert_eq!(status.state, SvidState::Ready);
}

#[tokio::test]
async fn an_atomic_swap_of_the_folder_is_noticed() {
    let setup = Setup::new();
    let fill = |name: &str| {
        let folder = setup.dir.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        let pair = Pair::new(&setup.ca, &LeafParams::good(&cart()));
        pair.write(&folder);
        std::fs::write(folder.join(BUNDLE_FILE), pem_chain([setup.ca.root()])).unwrap();
    };
    // How kubelet and CSI drivers replace several files at once.
    fill("..1");
    symlink("..1", setup.file("..data")).unwrap();
    for file in [CERTIFICATE_FILE, KEY_FILE, BUNDLE_FILE] {
        symlink(Path::new("..data").join(file), setup.file(file)).unwrap();
    }
    let first = setup.fetch().await.unwrap();
    let mut updates = setup.source.updates().unwrap();
    fill("..2");
    symlink("..2", setup.file("..data_tmp")).unwrap();
    std::fs::rename(setup.file("..data_tmp"), setup.file("..data")).unwrap();
    let told = tokio::time::timeout(Duration::from_secs(10), updates.recv()).await;
    assert_eq!(told.unwrap().unwrap(), SourceUpdate::All);
    let second = setup.fetch().await.unwrap();
    assert_ne!(first.svid.serial(), second.svid.serial());

    // Reading is no change: nothing more is told.
    tokio::time::sleep(QUIET * 3).await;
    while updates.try_recv().is_ok() {}
    setup.fetch().await.unwrap();
    let told = tokio::time::timeout(QUIET * 4, updates.recv()).await;
    assert!(told.is_err(), "{told:?}");
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_an_error_with_its_path() {
    let config = FileSourceConfig {
        directory: PathBuf::from("/nonexistent/certificates"),
        layout: FileLayout::Single,
    };
    let error = FileSource::start(config, Arc::new(TrustBundles::new())).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("/nonexistent/certificates"), "{text}");
}
