//! SPIFFE identities for a node agent that acts for many workloads.
//!
//! * [`SpiffeId`], [`TrustDomain`], [`WorkloadIdentity`]: names, parsed strictly.
//! * [`Svid`]: a certificate chain and its private key, checked when made.
//! * [`TrustBundles`]: the roots of each trust domain, replaced without a lock
//!   on the handshake path.
//! * [`PeerVerifier`]: judges one peer of one connection; the only maker of
//!   [`VerifiedPeer`].
//! * [`tls`]: rustls configurations of one connection (TLS 1.3 only, mutual).
//! * [`SvidSource`] and [`CaClient`]: where SVIDs come from.
//! * [`SvidManager`]: keeps an SVID for each wanted identity.
//!
//! What this crate does *not* do: revocation lists, trust-domain aliases, and
//! authorization. That a peer is verified says who it is, not what it may do.

mod bundles;
mod ca;
mod chain;
mod leaf;
mod manager;
mod source;
mod spiffe_id;
mod svid;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tls;
mod verifier;

pub use bundles::{BundleError, TrustBundles};
pub use ca::{CaClient, CaClientConfig, CaConfigError};
pub use leaf::MAX_CERTIFICATE_BYTES;
pub use manager::{
    Clock, MAX_CONCURRENT_FETCHES, ManagerConfig, NoSvid, SvidManager, SvidState, SvidStatus,
};
pub use source::{FetchError, FetchFuture, FetchProblem, Issued, SvidSource};
pub use spiffe_id::{InvalidSpiffeId, SpiffeId, TrustDomain, WorkloadIdentity};
pub use svid::{Svid, SvidError};
pub use verifier::{
    CLOCK_SKEW, ExpectedPeer, MAX_CHAIN_LENGTH, PeerRefusal, PeerVerifier, VerifiedPeer,
};

/// Generated client and server of Istio's certificate service.
pub mod ca_proto {
    tonic::include_proto!("istio.v1.auth");
}
