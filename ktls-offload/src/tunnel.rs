//! A `ringfence/1` tunnel: one authenticated connection between two agents, one stream
//! at a time.
//!
//! A tunnel is *idle* when it is new, and again when a stream has ended with `END` in both
//! directions. [`crate::relay`] takes it for a stream and gives it back idle.
//!
//! Not guaranteed: an idle tunnel whose peer has died looks usable until the network says
//! otherwise. A stream lost that way before `OPENED` can be dialled again.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ringfence_identity::{PeerVerifier, VerifiedPeer};
use rustls::{AlertDescription, CipherSuite, ClientConfig, NamedGroup, ServerConfig};
use tokio::net::TcpStream;

use crate::error::{Fault, TunnelError};
use crate::handshake::{self, HandshakeError, Handshaken};
use crate::probe::{RecordLayer, SoftwareReason};
use crate::protocol::{
    ALPN, CONTENT_TYPE, Kind, Message, Open, ProtocolError, RefuseReason, Sender, StreamId,
};
use crate::record::aead::RecordKey;
use crate::record::{
    CLOSE_NOTIFY, Inbound, Incoming, RETIRE_RECORDS, RxRecords, TYPE_ALERT, TxRecords, kernel,
    software,
};
use crate::sys::{self, fd};

/// How a node makes its tunnels.
#[derive(Debug, Clone, Copy)]
pub struct TunnelConfig {
    /// What [`crate::probe`] found, or [`SoftwareReason::Configured`].
    pub records: RecordLayer,
    /// Refuse a tunnel whose records the kernel cannot protect.
    pub require_kernel: bool,
    /// From the first handshake byte to `READY`.
    pub handshake_timeout: Duration,
}

impl TunnelConfig {
    /// Ten seconds for a handshake; software records allowed.
    pub const fn new(records: RecordLayer) -> Self {
        Self {
            records,
            require_kernel: false,
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

/// Why no tunnel came to be.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
}

impl ConnectError {
    /// Stable name for logs, metrics and status.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Handshake(e) => e.as_str(),
            Self::Tunnel(e) => e.as_str(),
        }
    }

    pub const fn fault(&self) -> Fault {
        match self {
            Self::Handshake(e) => e.fault(),
            Self::Tunnel(e) => e.fault(),
        }
    }
}

/// What stays the same for the life of a tunnel.
#[derive(Debug)]
pub struct Session {
    peer: VerifiedPeer,
    record_layer: RecordLayer,
    suite: CipherSuite,
    kx_group: Option<NamedGroup>,
}

impl Session {
    /// Who is at the other end, as proven in the handshake.
    pub const fn peer(&self) -> &VerifiedPeer {
        &self.peer
    }

    /// Who protects the records, and if it is not the kernel, why.
    pub const fn record_layer(&self) -> RecordLayer {
        self.record_layer
    }

    pub const fn cipher_suite(&self) -> CipherSuite {
        self.suite
    }

    pub const fn kx_group(&self) -> Option<NamedGroup> {
        self.kx_group
    }
}

/// Which end of the tunnel we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Dialled; opens streams.
    Client,
    /// Accepted; is asked to open streams.
    Server,
}

/// The stream a tunnel is serving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Active {
    pub(crate) id: StreamId,
    /// Client: `OPENED` has come. Server: `OPENED` was sent.
    pub(crate) opened: bool,
}

/// Sending half of a tunnel.
#[derive(Debug)]
pub(crate) struct TxHalf {
    pub(crate) records: TxRecords,
    sender: Sender,
}

impl TxHalf {
    pub(crate) async fn send(
        &mut self,
        sock: &TcpStream,
        message: &Message,
    ) -> Result<(), TunnelError> {
        let encoded = self.sender.encode(message)?;
        self.records
            .send(sock, CONTENT_TYPE, encoded.as_bytes())
            .await
    }
}

/// Receiving half of a tunnel.
#[derive(Debug)]
pub(crate) struct RxHalf {
    pub(crate) records: RxRecords,
    pub(crate) inbound: Inbound,
}

impl RxHalf {
    pub(crate) async fn recv(&mut self, sock: &TcpStream) -> Result<Incoming, TunnelError> {
        self.records.recv(sock, &mut self.inbound).await
    }
}

/// An established tunnel.
#[derive(Debug)]
pub struct Tunnel {
    pub(crate) sock: TcpStream,
    pub(crate) tx: TxHalf,
    pub(crate) rx: RxHalf,
    pub(crate) role: Role,
    pub(crate) active: Option<Active>,
    session: Arc<Session>,
}

impl Tunnel {
    /// Makes the client's end: handshake, keys into the record layer, `READY` received.
    ///
    /// `tls` is from [`ringfence_identity::tls::client_config`] with `verifier` inside and
    /// [`ALPN`] among its protocols.
    pub async fn connect(
        tcp: TcpStream,
        tls: Arc<ClientConfig>,
        verifier: &PeerVerifier,
        config: &TunnelConfig,
    ) -> Result<Self, ConnectError> {
        let work = async {
            let done = handshake::client(tcp, tls, verifier, config.handshake_timeout).await?;
            let mut tunnel = Self::establish(done, Role::Client, config)?;
            tunnel.await_ready().await?;
            Ok(tunnel)
        };
        within(config.handshake_timeout, work).await
    }

    /// Makes the server's end: handshake, keys into the record layer, `READY` sent.
    ///
    /// `tls` is from [`ringfence_identity::tls::server_config`] with `verifier` inside and
    /// [`ALPN`] among its protocols.
    pub async fn accept(
        tcp: TcpStream,
        tls: Arc<ServerConfig>,
        verifier: &PeerVerifier,
        config: &TunnelConfig,
    ) -> Result<Self, ConnectError> {
        let work = async {
            let done = handshake::server(tcp, tls, verifier, config.handshake_timeout).await?;
            let mut tunnel = Self::establish(done, Role::Server, config)?;
            // Both keys are in: from here on a crash loses no byte the client sends.
            tunnel.tx.send(&tunnel.sock, &Message::Ready).await?;
            Ok(tunnel)
        };
        within(config.handshake_timeout, work).await
    }

    /// Who the peer is and how records are protected. Outlives the tunnel.
    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    pub fn peer(&self) -> &VerifiedPeer {
        self.session.peer()
    }

    pub fn record_layer(&self) -> RecordLayer {
        self.session.record_layer()
    }

    pub fn cipher_suite(&self) -> CipherSuite {
        self.session.cipher_suite()
    }

    pub fn kx_group(&self) -> Option<NamedGroup> {
        self.session.kx_group()
    }

    pub const fn role(&self) -> Role {
        self.role
    }

    /// The tunnel's own socket, for its addresses and kernel figures. Reading or writing
    /// it breaks the tunnel.
    pub const fn tcp(&self) -> &TcpStream {
        &self.sock
    }

    /// Client: asks for a stream. Returns as soon as `OPEN` is with the kernel; the answer
    /// is taken by [`crate::relay`], and data may follow at once.
    pub async fn open(&mut self, open: Open) -> Result<(), TunnelError> {
        self.expect_idle(Kind::Open)?;
        self.tx.send(&self.sock, &Message::Open(open)).await?;
        self.active = Some(Active {
            id: open.stream,
            opened: false,
        });
        Ok(())
    }

    /// Server: waits for the next stream. `None`: the peer closed the tunnel between
    /// streams, as it may. Answer with [`Tunnel::opened`] or [`Tunnel::refuse`].
    pub async fn next_open(&mut self) -> Result<Option<Open>, TunnelError> {
        self.expect_idle(Kind::Open)?;
        match self.rx.recv(&self.sock).await? {
            Incoming::Message(Message::Open(open)) if self.role == Role::Server => {
                self.active = Some(Active {
                    id: open.stream,
                    opened: false,
                });
                Ok(Some(open))
            }
            Incoming::Message(other) => Err(ProtocolError::Unexpected {
                got: other.kind().as_str(),
                expected: "OPEN",
            }
            .into()),
            Incoming::CloseNotify => Ok(None),
            Incoming::Eof => Err(TunnelError::Truncated),
        }
    }

    /// Server: the last hop is connected.
    pub async fn opened(&mut self) -> Result<(), TunnelError> {
        let active = self.unanswered()?;
        let message = Message::Opened { stream: active.id };
        self.tx.send(&self.sock, &message).await?;
        self.active = Some(Active {
            opened: true,
            ..active
        });
        Ok(())
    }

    /// Server: there will be no stream. The tunnel is closed with it, because the client's
    /// data may already be on its way; this waits (2 s at most) until the client has
    /// closed, so that the refusal is not destroyed by an RST.
    pub async fn refuse(mut self, reason: RefuseReason) -> Result<(), TunnelError> {
        let active = self.unanswered()?;
        let message = Message::Refused {
            stream: active.id,
            reason,
        };
        self.say_goodbye(Some(message)).await
    }

    /// Closes an idle tunnel with close_notify.
    pub async fn close(mut self) -> Result<(), TunnelError> {
        self.say_goodbye(None).await
    }

    /// May this idle tunnel serve another stream? `false` if anything has come from the
    /// peer (only a close can), or the keys have served long enough.
    pub fn is_reusable(&self) -> bool {
        self.active.is_none() && !self.is_worn() && self.rx.records.buffered() == 0 && {
            sys::is_quiet(fd(&self.sock))
        }
    }

    /// Client: waits until an idle tunnel is no longer usable (the peer closed it). For a
    /// pool that wants to drop dead tunnels at once. May be cancelled.
    pub async fn unusable(&mut self) -> TunnelError {
        match self.rx.recv(&self.sock).await {
            Ok(Incoming::CloseNotify | Incoming::Eof) => TunnelError::Truncated,
            Ok(Incoming::Message(other)) => ProtocolError::Unexpected {
                got: other.kind().as_str(),
                expected: "nothing on an idle tunnel",
            }
            .into(),
            Err(e) => e,
        }
    }

    pub(crate) fn is_worn(&self) -> bool {
        self.tx.records.records() >= RETIRE_RECORDS
    }

    /// Sends a last message and close_notify, then reads until the peer has closed too.
    /// Two seconds for all of it.
    pub(crate) async fn say_goodbye(
        &mut self,
        message: Option<Message>,
    ) -> Result<(), TunnelError> {
        let work = async {
            if let Some(message) = message {
                self.tx.send(&self.sock, &message).await?;
            }
            // The peer may have closed as soon as it read that message: no error.
            let close_notify = self.tx.records.send(&self.sock, TYPE_ALERT, &CLOSE_NOTIFY);
            if close_notify.await.is_ok() {
                self.rx.records.discard(&self.sock).await;
            }
            Ok(())
        };
        tokio::time::timeout(CLOSE_TIMEOUT, work)
            .await
            .unwrap_or(Ok(()))
    }

    /// From here on dropping the tunnel sends RST.
    pub(crate) fn abort(&self) {
        // Fails on a dead socket only, which is what is wanted.
        let _ = sys::set_reset_on_close(fd(&self.sock), true);
    }

    fn expect_idle(&self, kind: Kind) -> Result<(), TunnelError> {
        if self.active.is_some() {
            return Err(ProtocolError::Unexpected {
                got: kind.as_str(),
                expected: "the end of the current stream",
            }
            .into());
        }
        Ok(())
    }

    fn unanswered(&self) -> Result<Active, TunnelError> {
        match self.active {
            Some(active) if !active.opened && self.role == Role::Server => Ok(active),
            _ => Err(ProtocolError::Unexpected {
                got: "an answer",
                expected: "an OPEN to answer",
            }
            .into()),
        }
    }

    async fn await_ready(&mut self) -> Result<(), ConnectError> {
        match self.rx.recv(&self.sock).await {
            Ok(Incoming::Message(Message::Ready)) => Ok(()),
            Ok(Incoming::Message(other)) => Err(TunnelError::from(ProtocolError::Unexpected {
                got: other.kind().as_str(),
                expected: "READY",
            })
            .into()),
            Ok(Incoming::CloseNotify | Incoming::Eof) => Err(HandshakeError::Closed.into()),
            // The server judges our certificate after we think the handshake is over.
            Err(TunnelError::Alert(alert)) => {
                Err(HandshakeError::PeerAlert(AlertDescription::from(alert)).into())
            }
            Err(e) => Err(e.into()),
        }
    }

    fn establish(
        done: Handshaken,
        role: Role,
        config: &TunnelConfig,
    ) -> Result<Self, ConnectError> {
        if done.alpn != ALPN {
            return Err(HandshakeError::AlpnMismatch.into());
        }
        prepare_socket(&done.tcp)?;
        let suite = done.suite.suite();
        let record_layer = match config.records {
            RecordLayer::Kernel(suites) if !suites.contains(suite) => {
                RecordLayer::Software(SoftwareReason::SuiteUnsupported)
            }
            layer => layer,
        };
        let (tx, rx) = match record_layer {
            RecordLayer::Kernel(_) => {
                let (tx, rx) = kernel::install(&done.tcp, done.suite, done.secrets)?;
                (TxRecords::Kernel(tx), RxRecords::Kernel(rx))
            }
            RecordLayer::Software(reason) if config.require_kernel => {
                return Err(TunnelError::KernelRequired(reason).into());
            }
            RecordLayer::Software(_) => {
                let unsupported = |_| {
                    HandshakeError::Internal(rustls::Error::General(format!(
                        "the software record layer has no {suite:?}"
                    )))
                };
                let tx = RecordKey::new(done.secrets.tx).map_err(unsupported)?;
                let rx = RecordKey::new(done.secrets.rx).map_err(unsupported)?;
                (
                    TxRecords::Software(Box::new(software::Tx::new(tx))),
                    RxRecords::Software(Box::new(software::Rx::new(rx))),
                )
            }
        };
        // `done.key_schedule` is dropped here: ringfence/1 has no KeyUpdate, so the traffic
        // secrets need not live on in our memory.
        Ok(Self {
            sock: done.tcp,
            tx: TxHalf {
                records: tx,
                sender: Sender::default(),
            },
            rx: RxHalf {
                records: rx,
                inbound: Inbound::default(),
            },
            role,
            active: None,
            session: Arc::new(Session {
                peer: done.peer,
                record_layer,
                suite,
                kx_group: done.kx_group,
            }),
        })
    }
}

/// How long the last words of a tunnel may take.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Send buffers below this (bytes of kernel memory) are enlarged. Above it the kernel's
/// own tuning is left alone: setting a size would switch it off.
const MIN_SEND_BUFFER: usize = 32 * 1024;

/// Nagle off (records are complete messages), and no tiny send buffer.
fn prepare_socket(tcp: &TcpStream) -> Result<(), TunnelError> {
    let local = |source: io::Error| TunnelError::Local {
        during: "preparing the tunnel socket",
        source,
    };
    tcp.set_nodelay(true).map_err(local)?;
    if sys::send_buffer(fd(tcp)).map_err(local)? < MIN_SEND_BUFFER {
        sys::set_send_buffer(fd(tcp), 2 * MIN_SEND_BUFFER).map_err(local)?;
    }
    Ok(())
}

async fn within<T>(
    timeout: Duration,
    work: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    tokio::time::timeout(timeout, work)
        .await
        .unwrap_or(Err(HandshakeError::Timeout.into()))
}
