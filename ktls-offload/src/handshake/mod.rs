//! TLS 1.3 handshakes on a TCP socket, read exactly record by record.
//!
//! Not one byte behind the last handshake record leaves the kernel, so that whichever
//! record layer takes over starts on a record boundary with nothing left in our memory.
//! rustls runs unbuffered: it sees complete records and owns no socket.
//!
//! Not guaranteed: that the *peer* has finished. A client is done before the server has
//! judged its certificate; the verdict comes as an alert in place of `READY`.

mod error;

use std::sync::Arc;
use std::time::Duration;

use ringfence_identity::{PeerVerifier, VerifiedPeer};
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::pki_types::ServerName;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, InsufficientSizeError, UnbufferedStatus};
use rustls::{
    ClientConfig, CommonState, Error, ExtractedSecrets, NamedGroup, ServerConfig,
    SupportedCipherSuite,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub use error::HandshakeError;

/// Handshake bytes a peer may send in all. A chain of ten certificates and post-quantum
/// key shares need a tenth of it.
pub const MAX_HANDSHAKE_BYTES: usize = 128 * 1024;

/// How long an alert may take to get out and be read.
const ALERT_TIMEOUT: Duration = Duration::from_secs(1);

/// An authenticated connection whose records are nobody's yet.
pub struct Handshaken {
    pub tcp: TcpStream,
    pub peer: VerifiedPeer,
    pub alpn: Vec<u8>,
    pub suite: SupportedCipherSuite,
    pub kx_group: Option<NamedGroup>,
    /// Traffic keys and the number of the next record, each direction.
    pub secrets: ExtractedSecrets,
    /// What a KeyUpdate needs, for protocols that have it. Holds traffic secrets.
    pub key_schedule: KeySchedule,
}

impl std::fmt::Debug for Handshaken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handshaken")
            .field("peer", &self.peer)
            .field("suite", &self.suite.suite())
            .field("kx_group", &self.kx_group)
            .finish_non_exhaustive()
    }
}

/// rustls's key schedule after the handshake.
pub enum KeySchedule {
    Client(Box<KernelConnection<ClientConnectionData>>),
    Server(Box<KernelConnection<ServerConnectionData>>),
}

impl std::fmt::Debug for KeySchedule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeySchedule(..)")
    }
}

/// Shakes hands as the client. `verifier` must be the one inside `config`, and new.
pub async fn client(
    tcp: TcpStream,
    config: Arc<ClientConfig>,
    verifier: &PeerVerifier,
    timeout: Duration,
) -> Result<Handshaken, HandshakeError> {
    // No SNI: the peer is known by its SPIFFE ID. rustls wants a name nevertheless.
    let name = tcp.peer_addr().map_err(HandshakeError::io)?.ip();
    let conn = UnbufferedClientConnection::new(config, ServerName::IpAddress(name.into()))
        .map_err(HandshakeError::Internal)?;
    within(timeout, Box::pin(run(tcp, conn, verifier))).await
}

/// Shakes hands as the server. `verifier` must be the one inside `config`, and new.
pub async fn server(
    tcp: TcpStream,
    config: Arc<ServerConfig>,
    verifier: &PeerVerifier,
    timeout: Duration,
) -> Result<Handshaken, HandshakeError> {
    let conn = UnbufferedServerConnection::new(config).map_err(HandshakeError::Internal)?;
    within(timeout, Box::pin(run(tcp, conn, verifier))).await
}

async fn within<T>(
    timeout: Duration,
    work: impl Future<Output = Result<T, HandshakeError>>,
) -> Result<T, HandshakeError> {
    tokio::time::timeout(timeout, work)
        .await
        .unwrap_or(Err(HandshakeError::Timeout))
}

/// Either end of an unbuffered rustls connection.
trait Endpoint: Send {
    type Data;
    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn common(&self) -> &CommonState;
    fn finish(self) -> Result<(ExtractedSecrets, KeySchedule), Error>;
}

impl Endpoint for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
    fn common(&self) -> &CommonState {
        self
    }
    fn finish(self) -> Result<(ExtractedSecrets, KeySchedule), Error> {
        self.dangerous_into_kernel_connection()
            .map(|(secrets, kept)| (secrets, KeySchedule::Client(Box::new(kept))))
    }
}

impl Endpoint for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
    fn common(&self) -> &CommonState {
        self
    }
    fn finish(self) -> Result<(ExtractedSecrets, KeySchedule), Error> {
        self.dangerous_into_kernel_connection()
            .map(|(secrets, kept)| (secrets, KeySchedule::Server(Box::new(kept))))
    }
}

async fn run<E: Endpoint>(
    mut tcp: TcpStream,
    mut conn: E,
    verifier: &PeerVerifier,
) -> Result<Handshaken, HandshakeError> {
    let mut incoming = Vec::new();
    let mut outgoing = Vec::new();
    let mut total = 0;
    loop {
        let step = step(&mut conn, &mut incoming, &mut outgoing);
        if !outgoing.is_empty() {
            let sent = tcp.write_all(&outgoing).await;
            outgoing.clear();
            // If TLS failed, that is the error to tell, not that the alert did not get out.
            if step.is_ok() {
                sent.map_err(HandshakeError::io)?;
            }
        }
        match step {
            Ok(Step::Read) => total += read_record(&mut tcp, &mut incoming, total).await?,
            Ok(Step::Done) => break,
            Err(StepError::Closed) => return Err(HandshakeError::Closed),
            Err(StepError::Tls(e)) => {
                let refusal = verifier.refusal_of(&e);
                let _ = tokio::time::timeout(ALERT_TIMEOUT, deliver_alert(tcp)).await;
                return Err(HandshakeError::tls(e, refusal));
            }
        }
    }
    if !incoming.is_empty() {
        // Cannot be: rustls has taken every record whole.
        return Err(HandshakeError::Misbehaved(Error::HandshakeNotComplete));
    }
    let common = conn.common();
    let alpn = common
        .alpn_protocol()
        .ok_or(HandshakeError::AlpnMismatch)?
        .to_vec();
    let suite = common
        .negotiated_cipher_suite()
        .ok_or(HandshakeError::Internal(Error::HandshakeNotComplete))?;
    let kx_group = common
        .negotiated_key_exchange_group()
        .map(|group| group.name());
    let peer = verifier.verified().ok_or(HandshakeError::NotVerified)?;
    let (secrets, key_schedule) = conn.finish().map_err(HandshakeError::Internal)?;
    Ok(Handshaken {
        tcp,
        peer,
        alpn,
        suite,
        kx_group,
        secrets,
        key_schedule,
    })
}

enum Step {
    Read,
    Done,
}

enum StepError {
    Tls(Error),
    Closed,
}

/// Feeds `incoming` to rustls until it wants more or is done; what it wants sent is
/// appended to `outgoing`, alerts included.
fn step<E: Endpoint>(
    conn: &mut E,
    incoming: &mut Vec<u8>,
    outgoing: &mut Vec<u8>,
) -> Result<Step, StepError> {
    let result = loop {
        let UnbufferedStatus { discard, state } = conn.process(incoming);
        let next = match state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                encode(&mut data, outgoing).map(|()| None)
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                // `outgoing` is sent before the next byte is read.
                data.done();
                Ok(None)
            }
            Ok(ConnectionState::BlockedHandshake) => Ok(Some(Step::Read)),
            Ok(ConnectionState::WriteTraffic(_)) => Ok(Some(Step::Done)),
            Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Err(StepError::Closed),
            // Application data before the handshake is over, or early data (never offered).
            Ok(_) => Err(StepError::Tls(Error::HandshakeNotComplete)),
            Err(e) => Err(StepError::Tls(e)),
        };
        incoming.drain(..discard.min(incoming.len()));
        match next {
            Ok(None) => {}
            // A server may send (but not: receive) application data before the client's
            // last flight; it is not done until it has that.
            Ok(Some(Step::Done)) if conn.common().is_handshaking() => break Ok(Step::Read),
            Ok(Some(step)) => break Ok(step),
            Err(e) => break Err(e),
        }
    };
    if result.is_err() {
        collect_alert(conn, incoming, outgoing);
    }
    result
}

/// After an error rustls may still have an alert for the peer.
///
/// It must not be asked when it has none: it would go on with the bytes behind the offending
/// message, and asserts that it never has to send a second fatal alert (rustls 0.23.46).
fn collect_alert<E: Endpoint>(conn: &mut E, incoming: &mut [u8], outgoing: &mut Vec<u8>) {
    while conn.common().wants_write() {
        match conn.process(incoming).state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                if encode(&mut data, outgoing).is_err() {
                    return;
                }
            }
            _ => return,
        }
    }
}

fn encode<Data>(
    data: &mut rustls::unbuffered::EncodeTlsData<'_, Data>,
    outgoing: &mut Vec<u8>,
) -> Result<(), StepError> {
    let start = outgoing.len();
    loop {
        let room = outgoing.get_mut(start..).unwrap_or(&mut []);
        match data.encode(room) {
            Ok(n) => {
                outgoing.truncate(start + n);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => {
                outgoing.resize(start + required_size, 0);
            }
            Err(EncodeError::AlreadyEncoded) => {
                return Err(StepError::Tls(Error::EncryptError));
            }
        }
    }
}

/// Reads exactly one record and appends it to `incoming`. Returns its length.
async fn read_record(
    tcp: &mut TcpStream,
    incoming: &mut Vec<u8>,
    total: usize,
) -> Result<usize, HandshakeError> {
    const HEADER: usize = 5;
    /// RFC 8446 §5.2.
    const MAX_BODY: usize = (1 << 14) + 256;
    let mut header = [0u8; HEADER];
    tcp.read_exact(&mut header)
        .await
        .map_err(HandshakeError::io)?;
    let [record_type, major, _, hi, lo] = header;
    let body = usize::from(u16::from_be_bytes([hi, lo]));
    // change_cipher_spec to application_data; a first record can only be of the middle two.
    let types = if total == 0 { 21..=22 } else { 20..=23 };
    if !types.contains(&record_type) || major != 3 || body == 0 {
        return Err(HandshakeError::NotTls);
    }
    if body > MAX_BODY || total + HEADER + body > MAX_HANDSHAKE_BYTES {
        return Err(HandshakeError::TooLarge);
    }
    let start = incoming.len();
    incoming.extend_from_slice(&header);
    incoming.resize(start + HEADER + body, 0);
    let room = incoming.get_mut(start + HEADER..).unwrap_or(&mut []);
    tcp.read_exact(room).await.map_err(HandshakeError::io)?;
    Ok(HEADER + body)
}

/// Keeps the socket until the peer has had the chance to read our alert: closing with its
/// bytes unread would send an RST, which destroys the alert.
async fn deliver_alert(mut tcp: TcpStream) {
    if tcp.shutdown().await.is_err() {
        return;
    }
    let mut sink = [0u8; 1024];
    let mut budget = MAX_HANDSHAKE_BYTES;
    while let Ok(n) = tcp.read(&mut sink).await {
        budget = budget.saturating_sub(n);
        if n == 0 || budget == 0 {
            return;
        }
    }
}
