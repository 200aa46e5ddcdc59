//! Record layers: TLS 1.3 records protected by the kernel or by software.
//!
//! Both halves of [`Records`] behave the same whichever layer is under them; what a
//! received record *means* is decided once, in [`Inbound::interpret`].
//!
//! Not guaranteed here: that a control message fits the state of the stream (`relay`),
//! and the far end's record limit (its own duty, RFC 8446 §5.5).

pub(crate) mod aead;
pub(crate) mod kernel;
pub(crate) mod software;

use std::io;

use tokio::net::TcpStream;

use crate::error::TunnelError;
use crate::protocol::{CONTENT_TYPE, MAX_MESSAGE, Message, Receiver};
use crate::stream::Counters;

pub(crate) const TYPE_ALERT: u8 = 21;
pub(crate) const TYPE_HANDSHAKE: u8 = 22;
pub(crate) const TYPE_DATA: u8 = 23;

/// Longest plaintext of one record (RFC 8446 §5.1), in bytes.
pub(crate) const MAX_PLAINTEXT: usize = 1 << 14;

/// A tunnel that has sent this many records serves no further stream. Far below
/// RFC 8446's 2^24.5 for AES-GCM.
pub(crate) const RETIRE_RECORDS: u64 = 1 << 23;

/// A tunnel never sends more records than this.
pub(crate) const MAX_RECORDS: u64 = 1 << 24;

/// Session tickets a peer may send in the life of a tunnel (we ask for none).
const MAX_TICKETS: u32 = 8;

/// Empty data records in a row before the peer is called abusive.
const MAX_EMPTY: u32 = 32;

/// The alert `close_notify`, level warning (RFC 8446 §6.1).
pub(crate) const CLOSE_NOTIFY: [u8; 2] = [1, 0];

/// What ended a run of application data.
#[derive(Debug)]
pub(crate) enum Incoming {
    Message(Message),
    CloseNotify,
    /// FIN with no close_notify before it.
    Eof,
}

/// Which side of a copy failed.
#[derive(Debug)]
pub(crate) enum CopyError {
    App(io::Error),
    Tunnel(TunnelError),
}

impl From<TunnelError> for CopyError {
    fn from(e: TunnelError) -> Self {
        Self::Tunnel(e)
    }
}

/// How the application ended its direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AppEnd {
    /// A zero-length read; whether it was a FIN is for the caller to prove.
    Eof,
}

/// Receiving state that is the same for both layers.
#[derive(Debug, Default)]
pub(crate) struct Inbound {
    pub(crate) control: Receiver,
    tickets: u32,
    empty: u32,
}

impl Inbound {
    /// Decides what a record other than non-empty application data means.
    /// `Ok(None)`: nothing, go on reading.
    pub(crate) fn interpret(
        &mut self,
        record_type: u8,
        payload: &[u8],
    ) -> Result<Option<Incoming>, TunnelError> {
        match record_type {
            CONTENT_TYPE if payload.len() > MAX_MESSAGE => Err(TunnelError::OversizedRecord),
            CONTENT_TYPE => Ok(self.control.accept(payload)?.map(Incoming::Message)),
            TYPE_ALERT => match payload {
                [_, 0] => Ok(Some(Incoming::CloseNotify)),
                // user_canceled (RFC 8446 §6.1) is followed by close_notify.
                [_, 90] => self.empty_record().map(|()| None),
                [_, description] => Err(TunnelError::Alert(*description)),
                _ => Err(TunnelError::BadAlert),
            },
            TYPE_HANDSHAKE => self.handshake(payload).map(|()| None),
            TYPE_DATA => self.empty_record().map(|()| None),
            other => Err(TunnelError::UnknownContentType(other)),
        }
    }

    /// Messages after the handshake: session tickets, whole ones, are dropped; nothing else
    /// is allowed.
    fn handshake(&mut self, mut payload: &[u8]) -> Result<(), TunnelError> {
        const NEW_SESSION_TICKET: u8 = 4;
        const KEY_UPDATE: u8 = 24;
        if payload.is_empty() {
            return Err(TunnelError::BadRecord);
        }
        while let [kind, rest @ ..] = payload {
            match *kind {
                NEW_SESSION_TICKET => {}
                KEY_UPDATE => return Err(TunnelError::KeyUpdate),
                other => return Err(TunnelError::UnexpectedHandshake(other)),
            }
            let body = rest.split_first_chunk::<3>().and_then(|([a, b, c], rest)| {
                let len = u32::from_be_bytes([0, *a, *b, *c]);
                rest.split_at_checked(usize::try_from(len).ok()?)
            });
            let Some((_ticket, rest)) = body else {
                return Err(TunnelError::UnexpectedHandshake(*kind));
            };
            self.tickets += 1;
            if self.tickets > MAX_TICKETS {
                return Err(TunnelError::Flood("session tickets"));
            }
            payload = rest;
        }
        Ok(())
    }

    /// Counts a record without content.
    pub(crate) fn empty_record(&mut self) -> Result<(), TunnelError> {
        self.empty += 1;
        if self.empty > MAX_EMPTY {
            return Err(TunnelError::Flood("empty records"));
        }
        Ok(())
    }

    pub(crate) fn data_seen(&mut self) {
        self.empty = 0;
    }
}

/// The sending half of a tunnel's records.
#[derive(Debug)]
pub(crate) enum TxRecords {
    Kernel(kernel::Tx),
    Software(Box<software::Tx>),
}

/// The receiving half of a tunnel's records.
#[derive(Debug)]
pub(crate) enum RxRecords {
    Kernel(kernel::Rx),
    Software(Box<software::Rx>),
}

impl TxRecords {
    /// Sends one whole record, after everything sent before.
    ///
    /// Cancellation: bytes already sealed stay queued and go out before the next record.
    pub(crate) async fn send(
        &mut self,
        sock: &TcpStream,
        record_type: u8,
        payload: &[u8],
    ) -> Result<(), TunnelError> {
        match self {
            Self::Kernel(tx) => tx.send(sock, record_type, payload).await,
            Self::Software(tx) => tx.send(sock, record_type, payload).await,
        }
    }

    /// Copies application bytes into records until `app` reads zero bytes. All bytes read
    /// have then been handed to the tunnel's socket.
    pub(crate) async fn copy_from(
        &mut self,
        app: &TcpStream,
        sock: &TcpStream,
        counters: &Counters,
    ) -> Result<AppEnd, CopyError> {
        match self {
            Self::Kernel(tx) => tx.copy_from(app, sock, counters).await,
            Self::Software(tx) => tx.copy_from(app, sock, counters).await,
        }
    }

    /// Records sent so far (kernel layer: as of the last look, never too low).
    pub(crate) fn records(&self) -> u64 {
        match self {
            Self::Kernel(tx) => tx.records(),
            Self::Software(tx) => tx.records(),
        }
    }
}

impl RxRecords {
    /// The next record that is not application data. Application data is an error.
    pub(crate) async fn recv(
        &mut self,
        sock: &TcpStream,
        inbound: &mut Inbound,
    ) -> Result<Incoming, TunnelError> {
        match self {
            Self::Kernel(rx) => rx.recv(sock, inbound).await,
            Self::Software(rx) => rx.recv(sock, inbound).await,
        }
    }

    /// Copies application data to `app` until another record comes. All data before that
    /// record has then been handed to `app`'s socket.
    pub(crate) async fn copy_to(
        &mut self,
        sock: &TcpStream,
        app: &TcpStream,
        inbound: &mut Inbound,
        counters: &Counters,
    ) -> Result<Incoming, CopyError> {
        match self {
            Self::Kernel(rx) => rx.copy_to(sock, app, inbound, counters).await,
            Self::Software(rx) => rx.copy_to(sock, app, inbound, counters).await,
        }
    }

    /// Reads and throws away what comes until end of file or an error.
    pub(crate) async fn discard(&mut self, sock: &TcpStream) {
        match self {
            Self::Kernel(rx) => rx.discard(sock).await,
            Self::Software(rx) => rx.discard(sock).await,
        }
    }

    /// Bytes of later records that we hold in user memory (always 0 in the kernel layer).
    pub(crate) fn buffered(&self) -> usize {
        match self {
            Self::Kernel(_) => 0,
            Self::Software(rx) => rx.buffered(),
        }
    }
}
