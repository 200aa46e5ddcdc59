//! The identity of a peer, as proven by its handshake.

use std::sync::Arc;

use rustls_pki_types::CertificateDer;

use crate::chain::{Link, Role};
use crate::leaf::Leaf;
use crate::spiffe_id::{SpiffeId, WorkloadIdentity};

/// A peer whose identity was proven. Only [`PeerVerifier`](super::PeerVerifier)
/// makes one, so holding one is the proof.
///
/// It says what was true at the handshake: it does not expire by itself, and
/// does not follow later changes of what is trusted. To judge it again, see
/// [`TrustStore::verify_again`](crate::TrustStore::verify_again) and
/// [`TrustStore::revoked`](crate::TrustStore::revoked).
#[derive(Clone, PartialEq, Eq)]
pub struct VerifiedPeer {
    facts: Leaf,
    chain: Arc<[CertificateDer<'static>]>,
    path: Arc<[Link]>,
    role: Role,
}

impl VerifiedPeer {
    pub(super) fn new(
        facts: Leaf,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        path: Vec<Link>,
        role: Role,
    ) -> Self {
        let chain = std::iter::once(leaf)
            .chain(intermediates)
            .map(|der| der.clone().into_owned())
            .collect();
        Self {
            facts,
            chain,
            path: path.into(),
            role,
        }
    }

    /// The peer's SPIFFE ID.
    pub fn id(&self) -> &SpiffeId {
        &self.facts.id
    }

    /// The peer as a Kubernetes service account, if its ID has that form.
    pub fn identity(&self) -> Option<WorkloadIdentity> {
        WorkloadIdentity::try_from(self.facts.id.clone()).ok()
    }

    /// The leaf's serial number, lower-case hex.
    pub fn serial(&self) -> &str {
        &self.facts.serial
    }

    /// The leaf's issuer, as a printable distinguished name.
    pub fn issuer(&self) -> &str {
        &self.facts.issuer
    }

    /// First moment of the leaf's validity, Unix seconds.
    pub fn not_before(&self) -> i64 {
        self.facts.not_before
    }

    /// Last moment of the leaf's validity, Unix seconds.
    pub fn not_after(&self) -> i64 {
        self.facts.not_after
    }

    /// The DER certificates the peer sent, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The certificates by which it was accepted, leaf first, and their issuers.
    pub(crate) fn path(&self) -> &[Link] {
        &self.path
    }

    pub(crate) fn role(&self) -> Role {
        self.role
    }

    pub(super) fn leaf(&self) -> Option<&CertificateDer<'static>> {
        self.chain.first()
    }
}

impl std::fmt::Debug for VerifiedPeer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerifiedPeer")
            .field("id", &self.facts.id)
            .field("serial", &self.facts.serial)
            .field("issuer", &self.facts.issuer)
            .field("not_after", &self.facts.not_after)
            .finish_non_exhaustive()
    }
}
