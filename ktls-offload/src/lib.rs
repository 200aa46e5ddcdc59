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
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod interop;
pub mod handshake;
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
