//! SPIFFE identities for a node agent that acts for many workloads.
//!
//! * [`SpiffeId`], [`TrustDomain`], [`WorkloadIdentity`]: names, parsed strictly.
//! * [`Svid`]: a certificate chain and its private key, checked when made.
//! * [`TrustBundles`]: the roots of each trust domain, replaced without a lock
//!   on the handshake path.
//! * [`RevocationLists`]: what issuers have taken back; once configured, nobody
//!   passes without them.
//! * [`TrustDomainAliases`]: other names of a trust domain.
//! * [`TrustStore`]: the three together, and the judge of live connections.
//! * [`PeerVerifier`]: judges one peer of one connection; the only maker of
//!   [`VerifiedPeer`].
//! * [`tls`]: rustls configurations of one connection (TLS 1.3 only, mutual).
//! * [`SvidSource`]: where SVIDs come from: [`CaClient`] (Istiod and our own CA),
//!   [`DelegatedIdentity`] and [`WorkloadApi`] (SPIRE), [`FileSource`].
//! * [`SvidManager`]: keeps an SVID for each wanted identity.
//! * [`keep_out_of_dumps`]: for the process that all these keys are in.
//!
//! What this crate does *not* do: authorization (that a peer is verified says who
//! it is, not what it may do), OCSP, fetching revocation lists, JWT-SVIDs.

mod aliases;
mod bundles;
mod ca;
mod chain;
#[cfg(test)]
mod debug_tests;
mod dumps;
mod encoding;
mod files;
mod leaf;
mod manager;
mod revocation;
mod source;
mod spiffe_id;
mod spire;
mod svid;
mod template;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tls;
mod trust;
mod verifier;

pub use aliases::{AliasError, TrustDomainAliases};
pub use bundles::{BundleError, TrustBundles};
pub use ca::{CaClient, CaClientConfig, CaConfigError};
pub use dumps::{DumpError, keep_out_of_dumps};
pub use files::{
    BUNDLE_FILE, CERTIFICATE_FILE, FileLayout, FileSource, FileSourceConfig, FileSourceError,
    KEY_FILE,
};
pub use leaf::MAX_CERTIFICATE_BYTES;
pub use manager::{
    Clock, MAX_CONCURRENT_FETCHES, ManagerConfig, NoSvid, SvidEvent, SvidManager, SvidState,
    SvidStatus,
};
pub use revocation::{CrlError, CrlProblem, CrlStatus, RevocationLists};
pub use source::{FetchError, FetchFuture, FetchProblem, Issued, SourceUpdate, SvidSource};
pub use spiffe_id::{InvalidSpiffeId, SpiffeId, TrustDomain, WorkloadIdentity};
pub use spire::{
    DelegatedIdentity, DelegatedIdentityConfig, SpireConfigError, WorkloadApi, WorkloadApiConfig,
};
pub use svid::{Svid, SvidError};
pub use template::{IdentityTemplate, TemplateError};
pub use trust::{TrustChange, TrustChanges, TrustStore};
pub use verifier::{
    CLOCK_SKEW, ExpectedPeer, MAX_CHAIN_LENGTH, PeerRefusal, PeerVerifier, VerifiedPeer,
};

/// Generated client and server of Istio's certificate service.
pub mod ca_proto {
    tonic::include_proto!("istio.v1.auth");
}

/// Generated client and server of SPIRE's Delegated Identity API.
pub mod spire_proto {
    tonic::include_proto!("spire.api.agent.delegatedidentity.v1");

    impl std::fmt::Debug for X509SvidWithKey {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("X509SvidWithKey")
                .field("x509_svid", &self.x509_svid)
                .finish_non_exhaustive()
        }
    }
}

/// Generated client and server of the X.509 part of the SPIFFE Workload API.
pub mod workload_proto {
    tonic::include_proto!("_");

    impl std::fmt::Debug for X509Svid {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("X509Svid")
                .field("spiffe_id", &self.spiffe_id)
                .finish_non_exhaustive()
        }
    }
}
