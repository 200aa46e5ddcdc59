//! Sockets, TLS and the gRPC server.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use futures::StreamExt;
use ringfence_identity::ca_proto::istio_certificate_service_server::IstioCertificateServiceServer;
use ringfence_xds::MAX_MESSAGE_BYTES;
use ringfence_xds::proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use rustls::crypto::aws_lc_rs;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, version};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::ads::AdsService;
use crate::ca::{Ca, CaError};
use crate::ca_service::CaService;
use crate::config::{MeshConfig, ServerName};
use crate::state::MeshState;

/// The server certificate in use; replaced before it expires.
#[derive(Debug)]
pub(crate) struct ServerCertificate {
    ca: Arc<Ca>,
    current: ArcSwap<CertifiedKey>,
}

impl ServerCertificate {
    pub(crate) fn new(ca: Arc<Ca>, config: &MeshConfig) -> Result<Arc<Self>, CaError> {
        let current = ca.roots().server_certificate(&names(config), VALIDITY)?;
        Ok(Arc::new(Self {
            ca,
            current: ArcSwap::from(current),
        }))
    }

    /// Makes the certificate again at half its life, when its names change and when
    /// the roots do. `clock` is the wall clock.
    pub(crate) async fn keep_fresh(
        &self,
        mut state: watch::Receiver<Arc<MeshState>>,
        clock: impl Fn() -> SystemTime,
    ) {
        let mut roots = self.ca.subscribe();
        let mut made_for = names(state.borrow_and_update().config());
        let mut made = clock();
        // They may have changed since the first certificate was made.
        roots.mark_changed();
        loop {
            let mut roots_changed = false;
            tokio::select! {
                changed = state.changed() => if changed.is_err() { return },
                changed = roots.changed() => match changed {
                    Ok(()) => roots_changed = true,
                    Err(_) => return,
                },
                () = tokio::time::sleep(until_due(made, clock())) => {}
            }
            let wanted = names(state.borrow_and_update().config());
            let old = age(made, clock()) >= VALIDITY / 2;
            if wanted == made_for && !old && !roots_changed {
                continue;
            }
            let current = roots.borrow_and_update().clone();
            match current.server_certificate(&wanted, VALIDITY) {
                Ok(certificate) => {
                    self.current.store(certificate);
                    (made_for, made) = (wanted, clock());
                    tracing::info!("made a new server certificate");
                }
                Err(error) => {
                    tracing::error!(%error, "cannot make a new server certificate; the old one stays")
                }
            }
        }
    }
}

/// The wall clock counts, also after the machine was suspended. A certificate from the
/// future is as good as an old one: the clock was wrong.
fn age(made: SystemTime, now: SystemTime) -> Duration {
    now.duration_since(made).unwrap_or(VALIDITY)
}

fn until_due(made: SystemTime, now: SystemTime) -> Duration {
    (VALIDITY / 2)
        .saturating_sub(age(made, now))
        .clamp(Duration::from_secs(1), LONGEST_WAIT)
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

/// What the certificate is valid for: the addresses listened on and the extra names.
fn names(config: &MeshConfig) -> Vec<ServerName> {
    let listen = config
        .listen
        .iter()
        .map(SocketAddr::ip)
        .filter(|ip| !ip.is_unspecified())
        .map(ServerName::Ip);
    let mut names: Vec<_> = listen.collect();
    names.extend(config.server_names.iter().cloned());
    let mut seen = Vec::new();
    names.retain(|name| {
        !seen.contains(name) && {
            seen.push(name.clone());
            true
        }
    });
    names
}

pub(crate) fn bind(addresses: &[SocketAddr]) -> Result<Vec<TcpListener>, Error> {
    addresses
        .iter()
        .map(|address| {
            bind_one(*address).map_err(|source| Error::Listen {
                address: *address,
                source,
            })
        })
        .collect()
}

fn bind_one(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        // `[::]` is IPv6 only, whatever the sysctl says, so that it can stand beside `0.0.0.0`.
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Serves until `shutdown`.
pub(crate) async fn serve(
    listeners: Vec<TcpListener>,
    certificate: Arc<ServerCertificate>,
    state: watch::Receiver<Arc<MeshState>>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let ca = certificate.ca.clone();
    let acceptor = TlsAcceptor::from(Arc::new(tls_config(certificate)?));
    let (connections, incoming) = mpsc::channel(1);
    let handshakes = Arc::new(Semaphore::new(CONCURRENT_HANDSHAKES));
    for listener in listeners {
        let accept = accept(
            listener,
            acceptor.clone(),
            connections.clone(),
            handshakes.clone(),
        );
        let shutdown = shutdown.clone();
        tokio::spawn(async move { shutdown.run_until_cancelled(accept).await });
    }
    drop(connections);

    let ca_service = IstioCertificateServiceServer::new(CaService::new(ca, state.clone()))
        .max_decoding_message_size(MAX_CERTIFICATE_REQUEST);
    let ads_service =
        AggregatedDiscoveryServiceServer::new(AdsService::new(state, shutdown.clone()))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_ANSWER))
        .max_concurrent_streams(Some(STREAMS_PER_CONNECTION))
        .add_service(ca_service)
        .add_service(ads_service)
        .serve_with_incoming_shutdown(
            ReceiverStream::new(incoming).map(Ok::<_, std::io::Error>),
            shutdown.cancelled_owned(),
        )
        .await
        .map_err(Error::Serve)
}

fn tls_config(certificate: Arc<ServerCertificate>) -> Result<ServerConfig, Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])
        .map_err(|e| Error::Ca(CaError::ServerKey(e)))?
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    connections: mpsc::Sender<TlsStream<TcpStream>>,
    handshakes: Arc<Semaphore>,
) {
    loop {
        // Never closed.
        let Ok(permit) = handshakes.clone().acquire_owned().await else {
            return;
        };
        let (tcp, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                // Out of descriptors or memory: another attempt at once would only spin.
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (acceptor, connections) = (acceptor.clone(), connections.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let _ = tcp.set_nodelay(true);
            match tokio::time::timeout(HANDSHAKE, acceptor.accept(tcp)).await {
                Ok(Ok(stream)) => {
                    let _ = connections.send(stream).await;
                }
                Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
                Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
            }
        });
    }
}

/// For messages: where to reach this server.
pub(crate) fn addresses(listeners: &[TcpListener]) -> std::io::Result<Vec<SocketAddr>> {
    listeners.iter().map(TcpListener::local_addr).collect()
}

const VALIDITY: Duration = Duration::from_secs(24 * 60 * 60);
const LONGEST_WAIT: Duration = Duration::from_secs(60 * 60);
const HANDSHAKE: Duration = Duration::from_secs(10);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(10);
const CONCURRENT_HANDSHAKES: usize = 256;
const STREAMS_PER_CONNECTION: u32 = 128;
/// A CSR of the largest RSA key is far below.
const MAX_CERTIFICATE_REQUEST: usize = 64 << 10;
const BACKLOG: i32 = 1024;

#[cfg(test)]
mod tests;
