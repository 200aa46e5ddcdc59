//! A SPIRE agent as its Delegated Identity API shows it, over a real Unix socket.

use std::collections::HashMap;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result};
use ringfence_identity::spire_proto as proto;
use ringfence_lab::mesh::TRUST_DOMAIN;
use ringfence_lab::topology::NAMESPACE;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status};

use crate::authority::{Authority, Leaf};

/// Runs until it is dropped.
#[derive(Debug)]
pub struct SpireAgent {
    entries: Arc<Entries>,
    runtime: Option<Runtime>,
}

/// What the agent's server would have told it.
#[derive(Debug)]
struct Entries {
    authority: Authority,
    /// DER by trust domain, one certificate behind the other.
    bundles: HashMap<String, Vec<u8>>,
    /// Whether any workload is registered.
    registered: AtomicBool,
    /// Of the SVIDs that it gives now.
    serial: AtomicU64,
    changed: watch::Sender<()>,
}

impl SpireAgent {
    /// Gives SVIDs of `authority`, with that serial number, to every service account of the
    /// lab, and these bundles.
    pub fn start(
        socket: &Path,
        authority: Authority,
        bundles: HashMap<String, Vec<u8>>,
        serial: u64,
    ) -> Result<Self> {
        let listener = UnixListener::bind(socket)
            .with_context(|| format!("listening on {}", socket.display()))?;
        listener.set_nonblocking(true)?;
        let entries = Arc::new(Entries {
            authority,
            bundles,
            registered: AtomicBool::new(true),
            serial: AtomicU64::new(serial),
            changed: watch::Sender::new(()),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let service = Service(entries.clone());
        runtime.spawn(async move {
            let listener = tokio::net::UnixListener::from_std(listener)?;
            tonic::transport::Server::builder()
                .add_service(
                    proto::delegated_identity_server::DelegatedIdentityServer::new(service),
                )
                .serve_with_incoming(UnixListenerStream::new(listener))
                .await
                .map_err(std::io::Error::other)
        });
        Ok(SpireAgent {
            entries,
            runtime: Some(runtime),
        })
    }

    /// Pushes new SVIDs.
    pub fn rotate(&self, serial: u64) {
        self.entries.serial.store(serial, Ordering::SeqCst);
        self.entries.changed.send_replace(());
    }

    /// From now on no workload is registered.
    pub fn forget_workloads(&self) {
        self.entries.registered.store(false, Ordering::SeqCst);
        self.entries.changed.send_replace(());
    }
}

impl Drop for SpireAgent {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Entries {
    fn svids(&self, service_account: &str) -> Result<Vec<proto::X509SvidWithKey>> {
        if !self.registered.load(Ordering::SeqCst) {
            return Ok(Vec::new());
        }
        let issued = self.authority.issue(&Leaf {
            serial: Some(self.serial.load(Ordering::SeqCst)),
            ..Leaf::of(service_account)
        })?;
        Ok(vec![proto::X509SvidWithKey {
            x509_svid: Some(proto::X509Svid {
                cert_chain: issued.chain.iter().map(|der| der.to_vec()).collect(),
                id: Some(proto::SpiffeId {
                    trust_domain: TRUST_DOMAIN.into(),
                    path: format!("/ns/{NAMESPACE}/sa/{service_account}"),
                }),
                ..Default::default()
            }),
            x509_svid_key: issued.key.secret_der().to_vec(),
        }])
    }
}

struct Service(Arc<Entries>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// An answer now and with each change.
fn answers<T: Send + 'static>(
    entries: &Arc<Entries>,
    answer: impl Fn(&Entries) -> Result<T> + Send + 'static,
) -> Response<Answers<T>> {
    let (sender, receiver) = mpsc::channel(4);
    let (entries, mut changed) = (entries.clone(), entries.changed.subscribe());
    tokio::spawn(async move {
        loop {
            let answer = answer(&entries).map_err(|error| Status::internal(error.to_string()));
            if sender.send(answer).await.is_err() || changed.changed().await.is_err() {
                return;
            }
        }
    });
    Response::new(Box::pin(ReceiverStream::new(receiver)))
}

#[tonic::async_trait]
impl proto::delegated_identity_server::DelegatedIdentity for Service {
    type SubscribeToX509SVIDsStream = Answers<proto::SubscribeToX509SvidsResponse>;
    type SubscribeToX509BundlesStream = Answers<proto::SubscribeToX509BundlesResponse>;

    async fn subscribe_to_x509svi_ds(
        &self,
        request: Request<proto::SubscribeToX509SvidsRequest>,
    ) -> Result<Response<Self::SubscribeToX509SVIDsStream>, Status> {
        let request = request.into_inner();
        let account = request.selectors.iter().find_map(|selector| {
            let value = selector.value.strip_prefix("sa:");
            value
                .filter(|_| selector.r#type == "k8s")
                .map(str::to_owned)
        });
        let account = account.ok_or_else(|| Status::invalid_argument("no k8s:sa selector"))?;
        Ok(answers(&self.0, move |entries| {
            Ok(proto::SubscribeToX509SvidsResponse {
                x509_svids: entries.svids(&account)?,
                federates_with: Vec::new(),
            })
        }))
    }

    async fn subscribe_to_x509_bundles(
        &self,
        _request: Request<proto::SubscribeToX509BundlesRequest>,
    ) -> Result<Response<Self::SubscribeToX509BundlesStream>, Status> {
        Ok(answers(&self.0, |entries| {
            let named =
                |(domain, der): (&String, &Vec<u8>)| (format!("spiffe://{domain}"), der.clone());
            Ok(proto::SubscribeToX509BundlesResponse {
                ca_certificates: entries.bundles.iter().map(named).collect(),
            })
        }))
    }
}
