//! Joins one application connection and one stream of a tunnel until both are done.
//!
//! Order and completeness: a direction has one reader and one writer, so bytes keep their
//! order; `END` is sent after the last byte is with the kernel, and a received `END`
//! becomes a FIN after the last byte is. Whatever is not a proven, complete end in both
//! directions reaches the application as RST, never as a clean end of file.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::error::{Fault, TunnelError};
use crate::protocol::{Message, ProtocolError, RefuseReason, ResetReason, StreamId};
use crate::record::{AppEnd, CopyError, Incoming};
use crate::stream::StreamHandle;
use crate::sys::{self, TcpState, fd};
use crate::tunnel::{Role, RxHalf, Tunnel, TxHalf};

/// What became of a stream.
#[derive(Debug)]
#[must_use]
pub struct RelayEnd {
    /// Application bytes handed to the tunnel.
    pub bytes_tx: u64,
    /// Bytes from the tunnel handed to the application.
    pub bytes_rx: u64,
    pub outcome: Outcome,
    /// The idle tunnel, when the stream finished and the tunnel may serve another.
    pub tunnel: Option<Tunnel>,
}

/// How a stream ended.
#[derive(Debug)]
pub enum Outcome {
    /// Complete in both directions.
    Finished,
    /// Our application reset its connection (or it broke); the peer was told.
    AppReset,
    /// The peer's application, or the peer's agent, reset the stream.
    PeerReset(ResetReason),
    /// The server did not open the stream. Our application saw RST.
    Refused(RefuseReason),
    /// [`StreamHandle::cut`] was called.
    Cut(ResetReason),
    /// The tunnel broke; our application saw RST.
    Tunnel(TunnelError),
}

impl Outcome {
    /// Stable name for logs, metrics and status.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::AppReset => "app-reset",
            Self::PeerReset(_) => "peer-reset",
            Self::Refused(_) => "refused",
            Self::Cut(_) => "cut",
            Self::Tunnel(e) => e.as_str(),
        }
    }
}

/// Relays the open stream of `tunnel` to and from `app` until it ends.
///
/// Client: call after [`Tunnel::open`]; the server's answer is taken here. Server: call
/// after [`Tunnel::opened`]. The application's connection is closed when this returns:
/// with FIN if the stream finished, with RST otherwise.
///
/// Must be polled until it returns: dropping it, even before the first poll, resets the
/// application and breaks the tunnel. To end a stream, use [`StreamHandle::cut`].
pub fn relay(
    app: TcpStream,
    tunnel: Tunnel,
    stream: Arc<StreamHandle>,
) -> impl Future<Output = RelayEnd> + Send {
    // Until the stream is known to be complete, whatever closes this socket (a dropped
    // future, the death of the process) must show as RST and never as a clean end.
    let _ = sys::set_reset_on_close(fd(&app), true);
    relay_to_the_end(app, tunnel, stream)
}

async fn relay_to_the_end(
    app: TcpStream,
    mut tunnel: Tunnel,
    stream: Arc<StreamHandle>,
) -> RelayEnd {
    let outcome = match tunnel.active {
        Some(active) if active.opened || tunnel.role == Role::Client => {
            // Small messages must not wait for an acknowledgement.
            let _ = app.set_nodelay(true);
            run(&app, &mut tunnel, active.id, active.opened, &stream).await
        }
        _ => Outcome::Tunnel(
            ProtocolError::Unexpected {
                got: "relay",
                expected: "an open stream",
            }
            .into(),
        ),
    };
    let reusable = end(app, &mut tunnel, &outcome).await;
    RelayEnd {
        bytes_tx: stream.bytes_tx(),
        bytes_rx: stream.bytes_rx(),
        outcome,
        tunnel: reusable.then_some(tunnel),
    }
}

async fn run(
    app: &TcpStream,
    tunnel: &mut Tunnel,
    id: StreamId,
    opened: bool,
    stream: &StreamHandle,
) -> Outcome {
    let ends = Ends::default();
    let Tunnel { sock, tx, rx, .. } = tunnel;
    let up = up(app, sock, tx, id, &ends, stream);
    let down = down(app, sock, rx, id, opened, &ends, stream);
    // Fair by chance: both directions draw on one task budget, and select! polls them in
    // random order.
    let result = tokio::select! {
        result = up => result,
        result = down => result,
        reason = stream.cut_requested() => Err(Outcome::Cut(reason)),
    };
    result.map_or_else(|outcome| outcome, |()| Outcome::Finished)
}

/// Which directions are complete. Atomic so that the relay can move between threads; only
/// one of them ever runs it.
#[derive(Debug, Default)]
struct Ends {
    /// `END` was sent.
    up: AtomicBool,
    /// `END` was received and passed on.
    down: AtomicBool,
}

/// Application to tunnel. Returns `Ok` only if this was the second direction to complete.
async fn up(
    app: &TcpStream,
    sock: &TcpStream,
    tx: &mut TxHalf,
    id: StreamId,
    ends: &Ends,
    stream: &StreamHandle,
) -> Result<(), Outcome> {
    match tx.records.copy_from(app, sock, &stream.counters).await {
        Ok(AppEnd::Eof) => {}
        Err(CopyError::App(e)) => return Err(app_failed(id, &e)),
        Err(CopyError::Tunnel(e)) => return Err(Outcome::Tunnel(e)),
    }
    if !fin_is_proven(app, ends.down.load(Ordering::Relaxed)) {
        return Err(Outcome::AppReset);
    }
    tx.send(sock, &Message::End { stream: id })
        .await
        .map_err(Outcome::Tunnel)?;
    ends.up.store(true, Ordering::Relaxed);
    if ends.down.load(Ordering::Relaxed) {
        return Ok(());
    }
    // Nothing more will be read from the application; its reset must still be noticed.
    match app.ready(Interest::ERROR).await {
        Ok(_) | Err(_) => Err(Outcome::AppReset),
    }
}

/// After an RST, reads give the queued data, one error, and then zero for ever: a zero is
/// an end only if the state of the connection says that a FIN came.
fn fin_is_proven(app: &TcpStream, our_fin_sent: bool) -> bool {
    match sys::tcp_state(fd(app)) {
        Ok(TcpState::FinReceived) => true,
        // Both FINs exchanged leaves no connection either; the error of a reset would have
        // been read before the zero.
        Ok(TcpState::Closed) => our_fin_sent,
        Ok(TcpState::Other) | Err(_) => false,
    }
}

/// Tunnel to application. Returns `Ok` only if this was the second direction to complete.
async fn down(
    app: &TcpStream,
    sock: &TcpStream,
    rx: &mut RxHalf,
    id: StreamId,
    opened: bool,
    ends: &Ends,
    stream: &StreamHandle,
) -> Result<(), Outcome> {
    if !opened {
        await_opened(sock, rx, id).await?;
    }
    let incoming = rx
        .records
        .copy_to(sock, app, &mut rx.inbound, &stream.counters)
        .await
        .map_err(|e| match e {
            CopyError::App(e) => app_failed(id, &e),
            CopyError::Tunnel(e) => Outcome::Tunnel(e),
        })?;
    match incoming {
        Incoming::Message(Message::End { stream }) if stream == id => {}
        other => return Err(unexpected(other, id, "END or RESET")),
    }
    sys::shutdown_write(fd(app)).map_err(|e| app_failed(id, &e))?;
    ends.down.store(true, Ordering::Relaxed);
    if ends.up.load(Ordering::Relaxed) {
        return Ok(());
    }
    // Between the peer's END and ours only a RESET can come.
    let other = rx.recv(sock).await.map_err(Outcome::Tunnel)?;
    Err(unexpected(other, id, "RESET"))
}

/// Any error of the application's socket ends its connection; for the peer that is a reset.
fn app_failed(id: StreamId, error: &std::io::Error) -> Outcome {
    tracing::debug!(stream = %id, %error, "application connection failed");
    Outcome::AppReset
}

async fn await_opened(sock: &TcpStream, rx: &mut RxHalf, id: StreamId) -> Result<(), Outcome> {
    match rx.recv(sock).await.map_err(Outcome::Tunnel)? {
        Incoming::Message(Message::Opened { stream }) if stream == id => Ok(()),
        Incoming::Message(Message::Refused { stream, reason }) if stream == id => {
            Err(Outcome::Refused(reason))
        }
        other => Err(unexpected(other, id, "OPENED or REFUSED")),
    }
}

/// `RESET`, which may always come, or something that may not.
fn unexpected(incoming: Incoming, id: StreamId, expected: &'static str) -> Outcome {
    Outcome::Tunnel(match incoming {
        Incoming::Message(Message::Reset { stream, reason }) if stream == id => {
            return Outcome::PeerReset(reason);
        }
        Incoming::Message(
            Message::Opened { stream }
            | Message::Refused { stream, .. }
            | Message::End { stream }
            | Message::Reset { stream, .. },
        ) if stream != id => ProtocolError::WrongStream.into(),
        Incoming::Message(other) => ProtocolError::Unexpected {
            got: other.kind().as_str(),
            expected,
        }
        .into(),
        Incoming::CloseNotify => TunnelError::ClosedMidStream,
        Incoming::Eof => TunnelError::Truncated,
    })
}

/// Brings both connections to the end that `outcome` demands. `true`: the tunnel is idle
/// and may be used again.
async fn end(app: TcpStream, tunnel: &mut Tunnel, outcome: &Outcome) -> bool {
    let tell = match outcome {
        Outcome::Finished => {
            let _ = sys::set_reset_on_close(fd(&app), false);
            tunnel.active = None;
            return !tunnel.is_worn();
        }
        Outcome::AppReset => Some(ResetReason::AppReset),
        Outcome::Cut(reason) => Some(*reason),
        Outcome::PeerReset(_) | Outcome::Refused(_) => None,
        Outcome::Tunnel(TunnelError::RecordLimit) => Some(ResetReason::RecordLimit),
        Outcome::Tunnel(TunnelError::Alert(_) | TunnelError::ClosedMidStream) => None,
        Outcome::Tunnel(e) => match e.fault() {
            Fault::Peer => Some(ResetReason::Protocol),
            Fault::Local => Some(ResetReason::Internal),
            Fault::Network => None,
        },
    };
    reset_app(app).await;
    match (tell, tunnel.active) {
        (Some(reason), Some(active)) => {
            let message = Message::Reset {
                stream: active.id,
                reason,
            };
            // The peer closes when it has read it; if it does not, we do.
            let _ = tunnel.say_goodbye(Some(message)).await;
        }
        _ => tunnel.abort(),
    }
    false
}

/// Closes the application's connection with RST, after what it was sent has had a moment
/// to get there: the reset comes behind the data in the stream, and should so here.
async fn reset_app(app: TcpStream) {
    const TRIES: u32 = 40;
    const PAUSE: Duration = Duration::from_millis(5);
    for _ in 0..TRIES {
        // The kernel has no event for an empty send queue. Nearly always it is empty.
        match sys::unacknowledged(fd(&app)) {
            Ok(0) | Err(_) => break,
            Ok(_) => tokio::time::sleep(PAUSE).await,
        }
    }
    drop(app);
}
