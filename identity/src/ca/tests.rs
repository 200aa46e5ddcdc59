//! The client against a CA server in this process, over real TLS, that checks
//! what Istiod's checks and misbehaves on demand.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod kept;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use prost_types::value::Kind;
use rcgen::{CertificateParams, CertificateSigningRequestParams, Issuer, KeyPair, SanType};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

use super::*;
use crate::ca_proto::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use crate::ca_proto::{IstioCertificateRequest, IstioCertificateResponse};
use crate::testing::{CaParams, LeafParams, TestCa, workload};
use crate::verifier::MAX_CHAIN_LENGTH;

const TOKEN: &str = "node-token-1";

#[derive(Clone, Copy, Debug)]
enum Answer {
    Good,
    RootAppendedToChain,
    SeveralRoots,
    OtherIdentity,
    OtherKey,
    Garbage,
    EmptyChain,
    LeafOnly,
    EmptyRoots,
    RootFirst,
    IssuerBeforeLeaf,
    LongChain,
    UnrelatedRoot,
    RootIsALeaf,
    Expired,
    NotYetValid,
    ALeafThatIsACa,
    Huge,
    TooManyCertificates,
    Never,
}

struct TestServer {
    ca: TestCa,
    token: Mutex<String>,
    answer: Mutex<Answer>,
}

fn pem(der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
}

#[tonic::async_trait]
impl IstioCertificateService for Arc<TestServer> {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let header = |name| request.metadata().get(name).and_then(|v| v.to_str().ok());
        let expected = format!("Bearer {}", self.token.lock().unwrap());
        if header("authorization") != Some(expected.as_str()) {
            return Err(Status::unauthenticated("request authenticate failure"));
        }
        if header("clusterid") != Some("Kubernetes") {
            return Err(Status::unauthenticated("unknown cluster"));
        }
        let request = request.into_inner();
        let identity = whom(&request);
        let csr = CertificateSigningRequestParams::from_pem(&request.csr)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        check_csr(&csr, &request.csr, &identity);
        if !identity.ends_with("/sa/cart") {
            return Err(Status::unauthenticated(
                "no pod of this account on the node",
            ));
        }
        if matches!(*self.answer.lock().unwrap(), Answer::Never) {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: self.answer(&csr, request.validity_duration),
        }))
    }
}

fn whom(request: &IstioCertificateRequest) -> String {
    let fields = &request.metadata.as_ref().unwrap().fields;
    assert_eq!(fields.len(), 1);
    match &fields["ImpersonatedIdentity"].kind {
        Some(Kind::StringValue(identity)) => identity.clone(),
        other => panic!("{other:?}"),
    }
}

/// The SPIFFE URI SAN and nothing else.
fn check_csr(csr: &CertificateSigningRequestParams, text: &str, identity: &str) {
    let [SanType::URI(uri)] = csr.params.subject_alt_names.as_slice() else {
        panic!("{:?}", csr.params.subject_alt_names);
    };
    assert_eq!(uri.as_str(), identity);
    assert_eq!(csr.params.distinguished_name.iter().count(), 0);
    assert!(csr.params.key_usages.is_empty());
    assert!(csr.params.extended_key_usages.is_empty());
    assert!(csr.params.custom_extensions.is_empty());
    assert!(!text.contains("PRIVATE"));
}

impl TestServer {
    fn answer(&self, csr: &CertificateSigningRequestParams, ttl: i64) -> Vec<String> {
        let ttl = Duration::from_secs(ttl.try_into().unwrap());
        let answer = *self.answer.lock().unwrap();
        let mut params = LeafParams::good(&workload("td", "shop", "cart"));
        params.not_after = SystemTime::now() + ttl;
        match answer {
            Answer::OtherIdentity => params.uri_sans = vec!["spiffe://td/ns/shop/sa/admin".into()],
            Answer::Expired => params.not_after = SystemTime::now() - Duration::from_secs(2),
            Answer::NotYetValid => params.not_before = SystemTime::now() + Duration::from_secs(120),
            Answer::ALeafThatIsACa => params.basic_constraints_ca = Some(true),
            _ => {}
        }
        let chain = match answer {
            Answer::OtherKey => self.ca.chain_for(&params, &KeyPair::generate().unwrap()),
            _ => self.ca.chain_for(&params, &csr.public_key),
        };
        let mut elements: Vec<String> = chain.iter().map(|der| pem(der)).collect();
        let root = pem(self.ca.root());
        let other = TestCa::new("td");
        match answer {
            Answer::Garbage => vec!["not PEM".to_owned(), root],
            Answer::EmptyChain => Vec::new(),
            Answer::LeafOnly => vec![elements.concat()],
            Answer::EmptyRoots => {
                elements.push(String::new());
                elements
            }
            Answer::RootFirst => {
                elements.push(root);
                elements.reverse();
                elements
            }
            Answer::IssuerBeforeLeaf => {
                elements.insert(0, pem(other.root()));
                elements.push(root);
                elements
            }
            Answer::LongChain => {
                elements.push(pem(other.root()).repeat(MAX_CHAIN_LENGTH));
                elements.push(root);
                elements
            }
            Answer::UnrelatedRoot => {
                elements.push(pem(other.root()));
                elements
            }
            Answer::RootIsALeaf => {
                elements.push(elements[0].clone());
                elements
            }
            Answer::RootAppendedToChain => {
                elements.push(root.clone());
                elements.push(root);
                elements
            }
            Answer::SeveralRoots => {
                elements.push(pem(other.root()) + &root);
                elements
            }
            Answer::TooManyCertificates => {
                elements.push(pem(other.root()).repeat(65));
                elements.push(root);
                elements
            }
            Answer::Huge => {
                elements.push("x".repeat(2 * 1024 * 1024));
                elements
            }
            _ => {
                elements.push(root);
                elements
            }
        }
    }
}

/// A running server, its files, and a client of it.
struct Setup {
    server: Arc<TestServer>,
    address: SocketAddr,
    dir: TempDir,
    client: CaClient,
    _stop: oneshot::Sender<()>,
}

/// A TLS server certificate for loopback and the root that signed it, in PEM.
fn server_identity() -> (Identity, String) {
    let root_key = KeyPair::generate().unwrap();
    let mut root = CertificateParams::default();
    root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root_pem = root.self_signed(&root_key).unwrap().pem();
    let issuer = Issuer::new(root, root_key);
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["127.0.0.1".to_owned(), "istiod.test".to_owned()]);
    let leaf = leaf.unwrap().signed_by(&key, &issuer).unwrap();
    (
        Identity::from_pem(leaf.pem(), key.serialize_pem()),
        root_pem,
    )
}

impl Setup {
    async fn new() -> Self {
        Self::with_ca(TestCa::new("td")).await
    }

    async fn with_ca(ca: TestCa) -> Self {
        let server = Arc::new(TestServer {
            ca,
            token: Mutex::new(TOKEN.to_owned()),
            answer: Mutex::new(Answer::Good),
        });
        let (identity, root_pem) = server_identity();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let service = IstioCertificateServiceServer::new(Arc::clone(&server));
        tokio::spawn(
            Server::builder()
                .tls_config(ServerTlsConfig::new().identity(identity))
                .unwrap()
                .add_service(service)
                .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async {
                    let _ = stopped.await;
                }),
        );
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("root.pem"), root_pem).unwrap();
        std::fs::write(dir.path().join("token"), format!("{TOKEN}\n")).unwrap();
        let client = CaClient::new(config(address, dir.path())).unwrap();
        Self {
            server,
            address,
            dir,
            client,
            _stop: stop,
        }
    }

    async fn fetch(&self) -> Result<Issued, FetchError> {
        self.fetch_for("cart").await
    }

    async fn fetch_for(&self, account: &str) -> Result<Issued, FetchError> {
        let identity = workload("td", "shop", account);
        self.client
            .fetch(&identity, Duration::from_secs(3600))
            .await
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn config(address: SocketAddr, dir: &Path) -> CaClientConfig {
    CaClientConfig {
        address: format!("https://{address}"),
        server_name: None,
        root_file: dir.join("root.pem"),
        token_file: dir.join("token"),
        cluster_id: "Kubernetes".to_owned(),
        timeout: Duration::from_secs(10),
    }
}

#[tokio::test]
async fn a_good_answer_becomes_an_svid_and_its_roots() {
    let setup = Setup::new().await;
    let issued = setup.fetch().await.unwrap();
    let svid = &issued.svid;
    assert_eq!(svid.id().to_string(), "spiffe://td/ns/shop/sa/cart");
    assert_eq!(svid.chain().len(), 1);
    assert_eq!(issued.roots, [setup.server.ca.root().clone()]);
    let life = svid.not_after() - crate::svid::unix_seconds(SystemTime::now());
    assert!((3590..=3600).contains(&life), "{life} s");

    let again = setup.fetch().await.unwrap();
    assert_ne!(again.svid.serial(), svid.serial());
    let key = |svid: &crate::Svid| svid.certified_key().key.public_key().unwrap().to_vec();
    assert_ne!(
        key(&again.svid),
        key(svid),
        "each request has a key of its own"
    );
}

#[tokio::test]
async fn appended_roots_several_roots_and_intermediates_are_understood() {
    let ca = TestCa::new("td").with_intermediate(&CaParams::default());
    let setup = Setup::with_ca(ca).await;
    let answer = |answer| *setup.server.answer.lock().unwrap() = answer;

    let issued = setup.fetch().await.unwrap();
    assert_eq!(issued.svid.chain().len(), 2);

    answer(Answer::RootAppendedToChain);
    let issued = setup.fetch().await.unwrap();
    assert_eq!(
        issued.svid.chain().len(),
        2,
        "the root is not sent to peers"
    );

    answer(Answer::SeveralRoots);
    let issued = setup.fetch().await.unwrap();
    assert_eq!(issued.roots.len(), 2);
    assert_eq!(issued.svid.chain().len(), 2);
}

#[tokio::test]
async fn unusable_answers_are_refused_naming_identity_source_and_fault() {
    let setup = Setup::new().await;
    for (answer, label, fault) in [
        (
            Answer::OtherIdentity,
            "bad-svid",
            "is for spiffe://td/ns/shop/sa/admin",
        ),
        (Answer::OtherKey, "bad-svid", "not for our key"),
        (
            Answer::Garbage,
            "bad-answer",
            "element 1 holds no PEM certificate",
        ),
        (Answer::EmptyChain, "bad-answer", "no certificate"),
        (Answer::LeafOnly, "bad-answer", "one element"),
        (
            Answer::EmptyRoots,
            "bad-answer",
            "element 2 holds no PEM certificate",
        ),
        (Answer::RootFirst, "bad-bundle", "not a CA certificate"),
        (Answer::IssuerBeforeLeaf, "bad-svid", "leaf-is-ca"),
        (Answer::LongChain, "bad-svid", "more than"),
        (Answer::UnrelatedRoot, "bad-chain", "untrusted"),
        (Answer::RootIsALeaf, "bad-bundle", "not a CA certificate"),
        (Answer::Expired, "bad-svid", "expired"),
        (Answer::NotYetValid, "bad-svid", "is a clock wrong?"),
        (Answer::ALeafThatIsACa, "bad-svid", "leaf-is-ca"),
        (Answer::TooManyCertificates, "bad-answer", "more than 64"),
        (Answer::Huge, "refused", "OutOfRange"),
    ] {
        *setup.server.answer.lock().unwrap() = answer;
        let error = setup.fetch().await.unwrap_err();
        let text = error.to_string();
        assert_eq!(error.problem.as_str(), label, "{answer:?}: {text}");
        assert!(text.contains(fault), "{answer:?}: {text}");
        assert!(text.contains("spiffe://td/ns/shop/sa/cart"), "{text}");
        assert!(text.contains(&setup.address.to_string()), "{text}");
    }
    *setup.server.answer.lock().unwrap() = Answer::Good;
    setup.fetch().await.unwrap();
}

#[tokio::test]
async fn a_refusal_of_the_ca_is_reported_as_such() {
    let setup = Setup::new().await;
    let error = setup.fetch_for("stranger").await.unwrap_err();
    assert_eq!(error.problem.as_str(), "refused");
    let text = error.to_string();
    assert!(text.contains("Unauthenticated"), "{text}");
    assert!(text.contains("spiffe://td/ns/shop/sa/stranger"), "{text}");
    assert!(!text.contains(TOKEN) && !format!("{error:?}").contains(TOKEN));
}

#[tokio::test]
async fn the_token_is_read_again_for_each_request() {
    let setup = Setup::new().await;
    setup.fetch().await.unwrap();

    *setup.server.token.lock().unwrap() = "node-token-2".to_owned();
    assert_eq!(setup.fetch().await.unwrap_err().problem.as_str(), "refused");
    std::fs::write(setup.file("token"), "node-token-2").unwrap();
    setup.fetch().await.unwrap();
}

#[tokio::test]
async fn a_token_file_that_is_gone_or_no_token_is_an_error_with_its_path() {
    let setup = Setup::new().await;
    let token = setup.file("token");
    let fails = async |what: &str| {
        let error = setup.fetch().await.unwrap_err();
        let text = error.to_string();
        assert_eq!(error.problem.as_str(), "file", "{text}");
        assert!(text.contains(token.to_str().unwrap()), "{text}");
        assert!(text.contains(what), "{text}");
    };
    for (contents, what) in [
        (b" \n".to_vec(), "is empty"),
        (b"two\nlines".to_vec(), "characters"),
        (vec![0xff, 0xfe], "not text"),
        (vec![b'a'; MAX_TOKEN_BYTES + 1], "larger than"),
    ] {
        std::fs::write(&token, contents).unwrap();
        fails(what).await;
    }
    std::fs::remove_file(&token).unwrap();
    fails("No such file").await;
    std::fs::write(&token, TOKEN).unwrap();
    setup.fetch().await.unwrap();
}

#[tokio::test]
async fn a_server_of_another_root_is_not_trusted_until_the_file_changes() {
    let setup = Setup::new().await;
    let root = setup.file("root.pem");
    let right = std::fs::read(&root).unwrap();

    let (_, other) = server_identity();
    std::fs::write(&root, other).unwrap();
    let error = setup.fetch().await.unwrap_err();
    assert_eq!(error.problem.as_str(), "unreachable", "{error}");
    assert!(error.to_string().contains("certificate"), "{error}");

    std::fs::write(&root, &right).unwrap();
    setup.fetch().await.unwrap();

    for garbage in [&b""[..], b"hello"] {
        std::fs::write(&root, garbage).unwrap();
        let error = setup.fetch().await.unwrap_err();
        assert_eq!(error.problem.as_str(), "file", "{error}");
        assert!(
            error.to_string().contains("root.pem: holds no certificate"),
            "{error}"
        );
    }
    std::fs::remove_file(&root).unwrap();
    assert_eq!(setup.fetch().await.unwrap_err().problem.as_str(), "file");
    std::fs::write(&root, &right).unwrap();
    setup.fetch().await.unwrap();
}

#[tokio::test]
async fn the_servers_name_is_checked_and_can_be_set() {
    let setup = Setup::new().await;
    let named = |name: &str| {
        let mut config = config(setup.address, setup.dir.path());
        config.server_name = Some(name.to_owned());
        CaClient::new(config).unwrap()
    };
    let identity = workload("td", "shop", "cart");
    let ttl = Duration::from_secs(60);
    named("istiod.test").fetch(&identity, ttl).await.unwrap();
    let error = named("other.test").fetch(&identity, ttl).await.unwrap_err();
    assert_eq!(error.problem.as_str(), "unreachable", "{error}");
}

#[tokio::test]
async fn a_silent_or_absent_ca_fails_in_bounded_time() {
    let setup = Setup::new().await;
    *setup.server.answer.lock().unwrap() = Answer::Never;
    let mut config = config(setup.address, setup.dir.path());
    config.timeout = Duration::from_millis(300);
    let client = CaClient::new(config.clone()).unwrap();
    let identity = workload("td", "shop", "cart");
    let error = client.fetch(&identity, Duration::from_secs(60)).await;
    assert_eq!(error.unwrap_err().problem.as_str(), "timed-out");

    // A port that was free a moment ago.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    config.address = format!("https://{}", listener.local_addr().unwrap());
    config.timeout = Duration::from_secs(5);
    drop(listener);
    let client = CaClient::new(config).unwrap();
    let error = client.fetch(&identity, Duration::from_secs(60)).await;
    let error = error.unwrap_err();
    assert_eq!(error.problem.as_str(), "unreachable", "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
}

#[test]
fn configurations_that_cannot_work_are_refused() {
    let dir = Path::new("/nonexistent");
    let good = || config(SocketAddr::from(([127, 0, 0, 1], 15012)), dir);
    CaClient::new(good()).unwrap();
    for address in [
        "http://istiod:15012",
        "istiod:15012",
        "",
        "https://",
        "ftp://x",
        "https://a b",
    ] {
        let config = CaClientConfig {
            address: address.to_owned(),
            ..good()
        };
        let error = CaClient::new(config).unwrap_err();
        assert!(
            matches!(error, CaConfigError::Address(..)),
            "{address}: {error}"
        );
    }
    let config = CaClientConfig {
        cluster_id: "a\nb".to_owned(),
        ..good()
    };
    assert!(matches!(
        CaClient::new(config),
        Err(CaConfigError::ClusterId(_))
    ));
}
