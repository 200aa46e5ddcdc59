//! Errors of an established tunnel, sorted by whose fault they are.

use std::io;

use crate::probe::SoftwareReason;
use crate::protocol::{ProtocolError, RandomUnavailable};

/// Who has to act on an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The other end broke a rule or refused us.
    Peer,
    /// The connection between us broke.
    Network,
    /// Our own node: the kernel, limits, configuration.
    Local,
}

impl Fault {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Network => "network",
            Self::Local => "local",
        }
    }
}

/// Why a tunnel ended. Every one of them closes the tunnel.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// A control message broke the protocol.
    #[error("peer broke the tunnel protocol: {0}")]
    Protocol(#[from] ProtocolError),
    /// A record that does not open, or whose framing is wrong.
    #[error("peer sent a record that does not decrypt or is malformed")]
    BadRecord,
    #[error(
        "peer sent a record longer than TLS 1.3 allows, or a control record of more than 4096 bytes"
    )]
    OversizedRecord,
    #[error("peer sent a record of content type {0:#04x}, which has no meaning here")]
    UnknownContentType(u8),
    #[error("peer sent handshake message {0} after the handshake")]
    UnexpectedHandshake(u8),
    /// KeyUpdate is refused on `ringfence/1`.
    #[error("peer asked for a key update, which ringfence/1 does not have")]
    KeyUpdate,
    #[error("peer floods us with {0}")]
    Flood(&'static str),
    /// The peer closed with a fatal alert (RFC 8446 §6.2).
    #[error("peer ended the tunnel with TLS alert {0}")]
    Alert(u8),
    #[error("peer sent a malformed alert")]
    BadAlert,
    /// FIN without close_notify: bytes may be missing.
    #[error("connection ended without close_notify: data may be missing")]
    Truncated,
    /// close_notify while a stream was open.
    #[error("peer closed the tunnel in the middle of a stream")]
    ClosedMidStream,
    /// The AEAD limit of this connection is reached.
    #[error("the tunnel has sent as many records as its keys allow")]
    RecordLimit,
    #[error("{during} took too long")]
    Timeout { during: &'static str },
    #[error("connection to the peer failed while {during}")]
    Network {
        during: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{during} failed on this node")]
    Local {
        during: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("kernel records are required and not available here: {0}")]
    KernelRequired(SoftwareReason),
    #[error(transparent)]
    Random(#[from] RandomUnavailable),
}

impl TunnelError {
    /// Stable name for logs, metrics and status.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Protocol(e) => e.as_str(),
            Self::BadRecord => "bad-record",
            Self::OversizedRecord => "oversized-record",
            Self::UnknownContentType(_) => "unknown-content-type",
            Self::UnexpectedHandshake(_) => "unexpected-handshake",
            Self::KeyUpdate => "key-update",
            Self::Flood(_) => "flood",
            Self::Alert(_) => "alert",
            Self::BadAlert => "bad-alert",
            Self::Truncated => "truncated",
            Self::ClosedMidStream => "closed-mid-stream",
            Self::RecordLimit => "record-limit",
            Self::Timeout { .. } => "timeout",
            Self::Network { .. } => "network",
            Self::Local { .. } => "local",
            Self::KernelRequired(_) => "kernel-required",
            Self::Random(_) => "no-random",
        }
    }

    pub const fn fault(&self) -> Fault {
        match self {
            Self::Protocol(_)
            | Self::BadRecord
            | Self::OversizedRecord
            | Self::UnknownContentType(_)
            | Self::UnexpectedHandshake(_)
            | Self::KeyUpdate
            | Self::Flood(_)
            | Self::Alert(_)
            | Self::BadAlert
            | Self::ClosedMidStream => Fault::Peer,
            Self::Truncated | Self::Timeout { .. } | Self::Network { .. } => Fault::Network,
            Self::RecordLimit | Self::Local { .. } | Self::KernelRequired(_) | Self::Random(_) => {
                Fault::Local
            }
        }
    }

    /// An error of the tunnel's socket: the network's, unless this node ran out of something.
    pub(crate) fn io(during: &'static str, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(
                libc::EMFILE
                | libc::ENFILE
                | libc::ENOMEM
                | libc::ENOBUFS
                | libc::EPERM
                | libc::EACCES
                | libc::EBADF
                | libc::EINVAL
                | libc::EOPNOTSUPP,
            ) => Self::Local { during, source },
            _ => Self::Network { during, source },
        }
    }
}
