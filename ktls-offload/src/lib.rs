//! From a TCP connection to an authenticated, encrypted tunnel whose bytes stay in the
//! kernel.
//!
//! * [`probe`]: can this kernel protect TLS records, and if not, why.
//! * [`handshake`]: TLS 1.3 by rustls, read exactly record by record.
//! * [`Tunnel`]: the `ringfence/1` protocol (`docs/protocol.md`) over kernel or software
//!   records; both behave the same.
//! * [`relay`]: one application connection joined to one stream of a tunnel.
//! * [`protocol`]: the control messages, a pure codec.
//!
//! What this crate does *not* do: decide who may open which stream, find the application,
//! or keep pools of tunnels. It opens no connection by itself, except the probe's, on
//! loopback.

#[cfg(test)]
extern crate self as ktls_offload;

#[cfg(test)]
#[path = "../tests/common/mod.rs"]
#[macro_use]
mod common;
mod error;
pub mod handshake;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod interop;
mod pool;
mod probe;
pub mod protocol;
mod record;
mod relay;
mod stream;
mod sys;
mod tunnel;

pub use error::{Fault, TunnelError};
pub use handshake::HandshakeError;
pub use probe::{KernelSuites, RecordLayer, SoftwareReason, probe};
pub use protocol::{ALPN, Open, RandomUnavailable, RefuseReason, ResetReason, StreamId};
pub use relay::{Outcome, RelayEnd, relay};
pub use stream::StreamHandle;
pub use tunnel::{ConnectError, Role, Session, Tunnel, TunnelConfig};

#[cfg(test)]
mod size_tests {
    /// A live stream costs one relay future; an idle pooled tunnel one `Tunnel`.
    #[tokio::test]
    async fn streams_and_tunnels_are_small() {
        let tunnel = size_of::<crate::Tunnel>();
        assert!(tunnel <= 512, "{tunnel} bytes in a tunnel");
        let (client, _server) = crate::common::tunnels(crate::common::SOFTWARE).await;
        let (app, _) = crate::common::tcp_pair().await;
        let relay = size_of_val(&crate::relay(app, client, std::sync::Arc::default()));
        assert!(relay <= 4096, "{relay} bytes in a relay");
    }
}
