//! xDS as Istiod speaks it to a node proxy: the protobuf types and the client
//! of the delta (incremental) aggregated discovery service.
//!
//! [`AdsClient`] keeps one stream open for ever, acknowledges what the
//! [`Handler`] accepts, names what it rejects, and resumes after a reconnect
//! without asking again for what it already has.
//!
//! The client does not interpret resources: which workload has which address,
//! or whether a policy can be compiled, is the handler's business. It also does
//! not keep their contents, only names and versions.

mod client;
mod error;
mod session;

pub use client::{AdsClient, ClientConfig, ConnectionState, NodeInfo};
pub use error::ConnectError;
pub use session::{Delta, Handler, Named, Rejection, Update};

/// Generated protobuf types.
#[allow(missing_debug_implementations, clippy::large_enum_variant)]
pub mod proto {
    pub mod discovery {
        tonic::include_proto!("envoy.service.discovery.v3");
    }
    pub mod workload {
        tonic::include_proto!("istio.workload");
    }
    pub mod security {
        tonic::include_proto!("istio.security");
    }
}

/// Type URL of [`proto::workload::Address`].
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";

/// Type URL of [`proto::security::Authorization`].
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";

/// Largest message either side accepts, in bytes: what Istiod's clients use.
pub const MAX_MESSAGE_BYTES: usize = 200 << 20;
