//! Why a handshake failed, sorted by whose fault it is.

use std::io;

use ringfence_identity::PeerRefusal;
use rustls::{AlertDescription, Error, PeerIncompatible};

use crate::error::Fault;

/// Why there is no authenticated connection. The connection is closed in every case.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// What came first was no TLS record.
    #[error("peer does not speak TLS")]
    NotTls,
    #[error("peer does not speak TLS 1.3, and nothing older is accepted")]
    VersionTooOld,
    #[error("peer showed no certificate")]
    NoCertificate,
    /// The verifier said no.
    #[error("peer's identity is refused: {0}")]
    PeerRefused(PeerRefusal),
    /// No protocol in common, or none agreed on.
    #[error("peer does not speak a tunnel protocol that we speak (ALPN)")]
    AlpnMismatch,
    #[error("peer closed the connection during the handshake")]
    Closed,
    #[error("handshake took longer than allowed")]
    Timeout,
    #[error("peer sent more handshake bytes than allowed")]
    TooLarge,
    /// The peer refused us. Behind `certificate_*`, `unknown_ca` and `access_denied` is its
    /// verifier's verdict on our certificate.
    #[error("peer refused the handshake: TLS alert {0:?}")]
    PeerAlert(AlertDescription),
    /// TLS 1.3, and no common suite, group or signature algorithm.
    #[error("peer shares no TLS parameters with us: {0:?}")]
    Incompatible(PeerIncompatible),
    #[error("peer broke TLS: {0}")]
    Misbehaved(#[source] Error),
    #[error("connection failed during the handshake")]
    Network(#[source] io::Error),
    /// A bug or a defect on this side.
    #[error("TLS failed on this side: {0}")]
    Internal(#[source] Error),
    /// The verifier has no verdict although the handshake is complete: the configuration
    /// was built with another verifier.
    #[error("no verified peer after a complete handshake (a bug in the caller)")]
    NotVerified,
}

impl HandshakeError {
    /// Stable name for logs, metrics and status.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::NotTls => "not-tls",
            Self::VersionTooOld => "version-too-old",
            Self::NoCertificate => "no-certificate",
            Self::PeerRefused(refusal) => refusal.as_str(),
            Self::AlpnMismatch => "alpn-mismatch",
            Self::Closed => "closed",
            Self::Timeout => "timeout",
            Self::TooLarge => "too-large",
            Self::PeerAlert(_) => "peer-alert",
            Self::Incompatible(_) => "incompatible",
            Self::Misbehaved(_) => "misbehaved",
            Self::Network(_) => "network",
            Self::Internal(_) => "internal",
            Self::NotVerified => "not-verified",
        }
    }

    pub const fn fault(&self) -> Fault {
        match self {
            Self::NotTls
            | Self::VersionTooOld
            | Self::NoCertificate
            | Self::PeerRefused(_)
            | Self::AlpnMismatch
            | Self::TooLarge
            | Self::PeerAlert(_)
            | Self::Incompatible(_)
            | Self::Misbehaved(_) => Fault::Peer,
            Self::Closed | Self::Timeout | Self::Network(_) => Fault::Network,
            Self::Internal(_) | Self::NotVerified => Fault::Local,
        }
    }

    pub(super) fn io(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Network(e),
        }
    }

    /// Sorts what rustls says, with what the verifier knows.
    pub(super) fn tls(e: Error, refusal: Option<PeerRefusal>) -> Self {
        match (e, refusal) {
            (_, Some(PeerRefusal::NoCertificate)) | (Error::NoCertificatesPresented, _) => {
                Self::NoCertificate
            }
            (_, Some(refusal)) => Self::PeerRefused(refusal),
            (Error::AlertReceived(AlertDescription::NoApplicationProtocol), _)
            | (Error::NoApplicationProtocol, _) => Self::AlpnMismatch,
            (Error::AlertReceived(AlertDescription::ProtocolVersion), _) => Self::VersionTooOld,
            (Error::AlertReceived(alert), _) => Self::PeerAlert(alert),
            (
                Error::PeerIncompatible(
                    PeerIncompatible::ServerDoesNotSupportTls12Or13
                    | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                    | PeerIncompatible::SupportedVersionsExtensionRequired
                    | PeerIncompatible::Tls12NotOffered
                    | PeerIncompatible::Tls12NotOfferedOrEnabled
                    | PeerIncompatible::Tls13RequiredForQuic,
                ),
                _,
            ) => Self::VersionTooOld,
            (Error::PeerIncompatible(what), _) => Self::Incompatible(what),
            (
                e @ (Error::EncryptError
                | Error::UnsupportedNameType
                | Error::General(_)
                | Error::FailedToGetCurrentTime
                | Error::FailedToGetRandomBytes
                | Error::HandshakeNotComplete
                | Error::BadMaxFragmentSize
                | Error::InconsistentKeys(_)
                | Error::InvalidCertRevocationList(_)
                | Error::Other(_)),
                _,
            ) => Self::Internal(e),
            (e, _) => Self::Misbehaved(e),
        }
    }
}
