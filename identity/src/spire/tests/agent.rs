//! An agent with both APIs, on a runtime of its own: stopping it closes its
//! connections as a crash would.

use std::collections::HashMap;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use rcgen::KeyPair;
use rustls_pki_types::CertificateDer;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::spiffe_id::WorkloadIdentity;
use crate::spire_proto as spire;
use crate::testing::{LeafParams, TestCa};
use crate::verifier::MAX_CHAIN_LENGTH;
use crate::workload_proto as workload_api;

/// What the agent does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Mode {
    Good,
    NoSvid,
    OtherIdentity,
    OtherKey,
    GarbageKey,
    GarbageChain,
    EmptyChain,
    IssuerBeforeLeaf,
    LongChain,
    Expired,
    UnrelatedRoot,
    Denied,
    Silent,
    NoBundle,
    EmptyBundle,
    GarbageBundle,
    OtherBundleOnly,
    /// The bundle of `td` has the root of the partner as well.
    TwoRoots,
    WithFederation,
}

pub(super) struct State {
    pub(super) ca: TestCa,
    pub(super) partner: TestCa,
    pub(super) mode: Mutex<Mode>,
    pub(super) algorithm: Mutex<&'static rcgen::SignatureAlgorithm>,
    /// Whom the Workload API takes its caller for.
    pub(super) caller: WorkloadIdentity,
    pub(super) selectors: Mutex<Vec<Vec<String>>>,
    /// What the Workload API has for `crl`.
    pub(super) lists: Mutex<Vec<Vec<u8>>>,
    pub(super) open: AtomicUsize,
    changed: watch::Sender<()>,
}

pub(super) struct Agent {
    dir: TempDir,
    pub(super) state: Arc<State>,
    runtime: Option<Runtime>,
}

impl Agent {
    pub(super) fn start() -> Self {
        let mut agent = Self {
            dir: tempfile::tempdir().unwrap(),
            state: Arc::new(State {
                ca: TestCa::new("td"),
                partner: TestCa::new("partner"),
                mode: Mutex::new(Mode::Good),
                algorithm: Mutex::new(&rcgen::PKCS_ECDSA_P256_SHA256),
                caller: super::cart(),
                selectors: Mutex::default(),
                lists: Mutex::default(),
                open: AtomicUsize::new(0),
                changed: watch::Sender::new(()),
            }),
            runtime: None,
        };
        agent.run();
        agent
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    pub(super) fn run(&mut self) {
        let listener = listen(&self.socket());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let state = Arc::clone(&self.state);
        runtime.spawn(async move {
            let listener = tokio::net::UnixListener::from_std(listener).unwrap();
            Server::builder()
                .add_service(
                    spire::delegated_identity_server::DelegatedIdentityServer::new(Service(
                        Arc::clone(&state),
                    )),
                )
                .add_service(
                    workload_api::spiffe_workload_api_server::SpiffeWorkloadApiServer::new(
                        Service(state),
                    ),
                )
                .serve_with_incoming(UnixListenerStream::new(listener))
                .await
        });
        self.runtime = Some(runtime);
    }

    pub(super) fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        let _ = std::fs::remove_file(self.socket());
        self.state.open.store(0, Ordering::SeqCst);
    }

    /// From now on does this, on the open streams as well.
    pub(super) fn mode(&self, mode: Mode) {
        *self.state.mode.lock().unwrap() = mode;
        self.push();
    }

    /// Sends what it sends once more; SVIDs are new ones.
    pub(super) fn push(&self) {
        self.state.changed.send_replace(());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop();
    }
}

fn listen(path: &Path) -> UnixListener {
    let listener = UnixListener::bind(path).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

struct Service(Arc<State>);

struct Material {
    id: WorkloadIdentity,
    chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
}

impl State {
    fn mode_now(&self) -> Mode {
        *self.mode.lock().unwrap()
    }

    fn issue(&self, identity: &WorkloadIdentity) -> Material {
        let mode = self.mode_now();
        let id = match mode {
            Mode::OtherIdentity => crate::testing::workload("td", "shop", "admin"),
            _ => identity.clone(),
        };
        let mut params = LeafParams::good(&id);
        params.algorithm = *self.algorithm.lock().unwrap();
        if mode == Mode::Expired {
            params.not_after = SystemTime::now() - std::time::Duration::from_secs(5);
        }
        let pair = params.key();
        let other = KeyPair::generate().unwrap();
        let ca = match mode {
            Mode::UnrelatedRoot => &self.partner,
            _ => &self.ca,
        };
        let chain = match mode {
            Mode::OtherKey => ca.chain_for(&params, &other),
            Mode::GarbageChain => vec![CertificateDer::from(vec![0x30, 0x03, 1, 2, 3])],
            Mode::EmptyChain => Vec::new(),
            Mode::IssuerBeforeLeaf => {
                let mut chain = ca.chain_for(&params, &pair);
                chain.insert(0, self.partner.root().clone());
                chain
            }
            Mode::LongChain => {
                let mut chain = ca.chain_for(&params, &pair);
                chain.extend(vec![self.partner.root().clone(); MAX_CHAIN_LENGTH]);
                chain
            }
            _ => ca.chain_for(&params, &pair),
        };
        let key = match mode {
            Mode::GarbageKey => vec![1, 2, 3],
            _ => pair.serialize_der(),
        };
        Material { id, chain, key }
    }

    /// Roots of the own trust domain, one behind the other.
    fn own_roots(&self) -> Vec<u8> {
        match self.mode_now() {
            Mode::EmptyBundle => Vec::new(),
            Mode::GarbageBundle => vec![0x30, 0x03, 1, 2, 3],
            Mode::TwoRoots => [self.ca.root().as_ref(), self.partner.root().as_ref()].concat(),
            _ => self.ca.root().to_vec(),
        }
    }

    fn federated(&self) -> Vec<(String, Vec<u8>)> {
        match self.mode_now() {
            Mode::WithFederation | Mode::OtherBundleOnly => {
                vec![("spiffe://partner".to_owned(), self.partner.root().to_vec())]
            }
            _ => Vec::new(),
        }
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Counts itself among the open streams while it lives.
struct Open(Arc<State>);

impl Drop for Open {
    fn drop(&mut self) {
        // Saturates: a stopped agent starts from none.
        let less = |open: usize| Some(open.saturating_sub(1));
        let _ = self
            .0
            .open
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
    }
}

/// An answer now and with each change.
fn stream<T: Send + 'static>(
    state: &Arc<State>,
    answer: impl Fn(&State) -> Option<T> + Send + 'static,
) -> Result<Response<Answers<T>>, Status> {
    if state.mode_now() == Mode::Denied {
        return Err(Status::permission_denied("no identity issued"));
    }
    let (sender, receiver) = mpsc::channel(4);
    let state = Arc::clone(state);
    state.open.fetch_add(1, Ordering::SeqCst);
    let open = Open(Arc::clone(&state));
    let mut changed = state.changed.subscribe();
    tokio::spawn(async move {
        let _open = open;
        loop {
            if state.mode_now() != Mode::Silent
                && let Some(answer) = answer(&state)
                && sender.send(Ok(answer)).await.is_err()
            {
                return;
            }
            tokio::select! {
                changed = changed.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
            }
        }
    });
    Ok(Response::new(Box::pin(
        ReceiverStream::new(receiver).map(|item| item),
    )))
}

#[tonic::async_trait]
impl spire::delegated_identity_server::DelegatedIdentity for Service {
    type SubscribeToX509SVIDsStream = Answers<spire::SubscribeToX509SvidsResponse>;
    type SubscribeToX509BundlesStream = Answers<spire::SubscribeToX509BundlesResponse>;

    async fn subscribe_to_x509svi_ds(
        &self,
        request: Request<spire::SubscribeToX509SvidsRequest>,
    ) -> Result<Response<Self::SubscribeToX509SVIDsStream>, Status> {
        let request = request.into_inner();
        assert_eq!(request.pid, 0);
        let selectors: Vec<String> = request
            .selectors
            .iter()
            .map(|selector| format!("{} {}", selector.r#type, selector.value))
            .collect();
        let part = |prefix: &str| {
            let found = selectors.iter().find_map(|s| s.strip_prefix(prefix));
            found.unwrap_or("none").to_owned()
        };
        let identity = crate::testing::workload("td", &part("k8s ns:"), &part("k8s sa:"));
        self.0.selectors.lock().unwrap().push(selectors);
        stream(&self.0, move |state| {
            let material = state.issue(&identity);
            let svid = spire::X509SvidWithKey {
                x509_svid: Some(spire::X509Svid {
                    cert_chain: material.chain.iter().map(|der| der.to_vec()).collect(),
                    id: Some(spire::SpiffeId {
                        trust_domain: material.id.trust_domain().to_string(),
                        path: material.id.spiffe_id().path().to_owned(),
                    }),
                    expires_at: 0,
                    hint: String::new(),
                }),
                x509_svid_key: material.key,
            };
            let x509_svids = match state.mode_now() {
                Mode::NoSvid => Vec::new(),
                _ => vec![svid],
            };
            Some(spire::SubscribeToX509SvidsResponse {
                x509_svids,
                federates_with: Vec::new(),
            })
        })
    }

    async fn subscribe_to_x509_bundles(
        &self,
        _request: Request<spire::SubscribeToX509BundlesRequest>,
    ) -> Result<Response<Self::SubscribeToX509BundlesStream>, Status> {
        stream(&self.0, |state| {
            let mut all: HashMap<String, Vec<u8>> = state.federated().into_iter().collect();
            let mode = state.mode_now();
            if mode != Mode::NoBundle && mode != Mode::OtherBundleOnly {
                all.insert("spiffe://td".to_owned(), state.own_roots());
            }
            Some(spire::SubscribeToX509BundlesResponse {
                ca_certificates: all,
            })
        })
    }
}

#[tonic::async_trait]
impl workload_api::spiffe_workload_api_server::SpiffeWorkloadApi for Service {
    type FetchX509SVIDStream = Answers<workload_api::X509SvidResponse>;
    type FetchX509BundlesStream = Answers<workload_api::X509BundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<workload_api::X509SvidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let marked = request.metadata().get("workload.spiffe.io");
        assert_eq!(marked.unwrap().to_str().unwrap(), "true");
        stream(&self.0, |state| {
            let material = state.issue(&state.caller);
            let svid = workload_api::X509Svid {
                spiffe_id: material.id.to_string(),
                x509_svid: material.chain.iter().flat_map(|der| der.to_vec()).collect(),
                x509_svid_key: material.key,
                bundle: state.own_roots(),
                hint: String::new(),
            };
            let svids = match state.mode_now() {
                Mode::NoSvid => Vec::new(),
                _ => vec![svid],
            };
            Some(workload_api::X509SvidResponse {
                svids,
                crl: state.lists.lock().unwrap().clone(),
                federated_bundles: state.federated().into_iter().collect(),
            })
        })
    }

    async fn fetch_x509_bundles(
        &self,
        _request: Request<workload_api::X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        Err(Status::unimplemented("nobody asks for it"))
    }
}
