//! The gRPC service on its Unix socket.

use std::collections::HashMap;
use std::fs::Permissions;
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use futures::Stream;
use ringfence_identity::workload_proto::spiffe_workload_api_server::{
    SpiffeWorkloadApi, SpiffeWorkloadApiServer,
};
use ringfence_identity::workload_proto::{
    X509BundlesRequest, X509BundlesResponse, X509Svid, X509SvidRequest, X509SvidResponse,
};
use ringfence_identity::{Svid, TrustDomain, WorkloadIdentity};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

use crate::caller::Caller;

/// An SVID whose key may leave the process.
#[derive(Debug)]
pub struct Exported {
    /// The certificate; its key is the same.
    pub svid: Arc<Svid>,
    /// PKCS#8 DER.
    pub key: ExportedKey,
}

/// Private key bytes that do not print.
pub struct ExportedKey(pub Zeroizing<Vec<u8>>);

impl std::fmt::Debug for ExportedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ExportedKey")
    }
}

/// What [`Workloads::issue`] returns; the error is for the log, not for the caller.
pub type IssueFuture<'a> = Pin<Box<dyn Future<Output = Result<Exported, String>> + Send + 'a>>;

/// What the service needs to know.
pub trait Workloads: Send + Sync + 'static {
    /// The identity of the enrolled pod that the caller is in.
    fn identify(&self, caller: Caller) -> Option<WorkloadIdentity>;

    /// A new SVID with a key of its own.
    fn issue<'a>(&'a self, identity: &'a WorkloadIdentity) -> IssueFuture<'a>;

    /// The trust bundles, DER, by trust domain.
    fn bundles(&self) -> Vec<(TrustDomain, Vec<Vec<u8>>)>;

    /// Completes when the bundles have changed since this call.
    fn bundles_changed(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// Binds the socket, which every process may connect to: who gets what is decided by
/// [`Caller`]. A leftover socket is replaced.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => {
            let what = format!("{} exists and is not a socket", path.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// Serves until the task is dropped.
pub async fn serve(
    listener: UnixListener,
    workloads: Arc<dyn Workloads>,
) -> Result<(), tonic::transport::Error> {
    let incoming = UnixListenerStream::new(listener).map(|stream| stream.map(Connection::new));
    Server::builder()
        .add_service(SpiffeWorkloadApiServer::new(Service { workloads }))
        .serve_with_incoming(incoming)
        .await
}

struct Service {
    workloads: Arc<dyn Workloads>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl SpiffeWorkloadApi for Service {
    type FetchX509SVIDStream = Answers<X509SvidResponse>;
    type FetchX509BundlesStream = Answers<X509BundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509SvidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let identity = self.attested(&request)?;
        let workloads = self.workloads.clone();
        Ok(Response::new(stream(move |answers| async move {
            loop {
                let changed = workloads.bundles_changed();
                let exported = workloads.issue(&identity).await.map_err(|error| {
                    tracing::warn!(%identity, error, "no SVID for an application");
                    Status::unavailable("the SVID cannot be issued now")
                })?;
                let refresh = half_life(&exported.svid);
                send(&answers, svid_response(&exported, &workloads.bundles())).await?;
                // A new SVID at half-life; at once, with the new roots, when they change.
                let _ = tokio::time::timeout(refresh, changed).await;
            }
        })))
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        self.attested(&request)?;
        let workloads = self.workloads.clone();
        Ok(Response::new(stream(move |answers| async move {
            loop {
                let changed = workloads.bundles_changed();
                let bundles = concatenated(&workloads.bundles());
                send(
                    &answers,
                    X509BundlesResponse {
                        crl: Vec::new(),
                        bundles,
                    },
                )
                .await?;
                changed.await;
            }
        })))
    }
}

impl Service {
    fn attested<T>(&self, request: &Request<T>) -> Result<WorkloadIdentity, Status> {
        // SPIFFE Workload API §3: keeps a browser or a proxy from being made to ask.
        if request
            .metadata()
            .get("workload.spiffe.io")
            .is_none_or(|v| v != "true")
        {
            return Err(Status::invalid_argument(
                "the header workload.spiffe.io: true is missing",
            ));
        }
        let caller = request
            .extensions()
            .get::<Option<Caller>>()
            .copied()
            .flatten();
        caller
            .and_then(|caller| self.workloads.identify(caller))
            .ok_or_else(|| Status::permission_denied("no identity issued"))
    }
}

/// Runs `produce` until it fails or the caller goes away.
fn stream<T, F>(produce: impl FnOnce(mpsc::Sender<Result<T, Status>>) -> F) -> Answers<T>
where
    T: Send + 'static,
    F: Future<Output = Result<(), Status>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(1);
    let work = produce(sender.clone());
    tokio::spawn(async move {
        let gone = sender.clone();
        tokio::select! {
            result = work => if let Err(status) = result {
                // The caller may be gone: then nobody needs to know.
                let _ = sender.send(Err(status)).await;
            },
            () = gone.closed() => {}
        }
    });
    Box::pin(ReceiverStream::new(receiver))
}

async fn send<T>(answers: &mpsc::Sender<Result<T, Status>>, answer: T) -> Result<(), Status> {
    answers
        .send(Ok(answer))
        .await
        .map_err(|_| Status::cancelled("the caller is gone"))
}

fn svid_response(exported: &Exported, bundles: &[(TrustDomain, Vec<Vec<u8>>)]) -> X509SvidResponse {
    let own = exported.svid.id().trust_domain();
    let mut all = concatenated(bundles);
    let bundle = all.remove(&domain_id(&own)).unwrap_or_default();
    X509SvidResponse {
        svids: vec![X509Svid {
            spiffe_id: exported.svid.id().to_string(),
            x509_svid: exported
                .svid
                .chain()
                .iter()
                .flat_map(|c| c.iter().copied())
                .collect(),
            x509_svid_key: exported.key.0.to_vec(),
            bundle,
            hint: String::new(),
        }],
        crl: Vec::new(),
        federated_bundles: all,
    }
}

fn concatenated(bundles: &[(TrustDomain, Vec<Vec<u8>>)]) -> HashMap<String, Vec<u8>> {
    bundles
        .iter()
        .map(|(domain, roots)| (domain_id(domain), roots.concat()))
        .collect()
}

fn domain_id(domain: &TrustDomain) -> String {
    format!("spiffe://{}", domain.as_str())
}

/// Half of what is left, and never so little that a short life becomes a busy loop.
fn half_life(svid: &Svid) -> Duration {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let left = svid
        .not_after()
        .saturating_sub_unsigned(now.as_secs())
        .max(0);
    Duration::from_secs(left.unsigned_abs() / 2).max(Duration::from_secs(1))
}

/// A connection and who made it.
struct Connection {
    stream: UnixStream,
    caller: Option<Caller>,
}

impl Connection {
    fn new(stream: UnixStream) -> Self {
        let caller = Caller::of(&stream)
            .inspect_err(
                |error| tracing::warn!(%error, "a caller of the Workload API gets nothing"),
            )
            .ok();
        Connection { stream, caller }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = Option<Caller>;

    fn connect_info(&self) -> Option<Caller> {
        self.caller
    }
}
