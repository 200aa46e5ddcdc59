//! All that peers are judged by, in one handle.

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::sync::watch;

use crate::aliases::TrustDomainAliases;
use crate::bundles::TrustBundles;
use crate::chain::{self, Link, Role};
use crate::revocation::RevocationLists;
use crate::spiffe_id::SpiffeId;
use crate::svid::Svid;
use crate::verifier::{PeerRefusal, VerifiedPeer};

/// Trust bundles, revocation lists and trust-domain aliases. Clones share them;
/// reading takes no lock.
#[derive(Clone)]
pub struct TrustStore {
    bundles: Arc<TrustBundles>,
    revocation: Arc<RevocationLists>,
    aliases: Arc<ArcSwap<TrustDomainAliases>>,
}

impl TrustStore {
    /// Over bundles and lists that others keep up to date.
    pub fn new(
        bundles: Arc<TrustBundles>,
        revocation: Arc<RevocationLists>,
        aliases: TrustDomainAliases,
    ) -> Self {
        Self {
            bundles,
            revocation,
            aliases: Arc::new(ArcSwap::from_pointee(aliases)),
        }
    }

    /// The roots of each trust domain.
    pub fn bundles(&self) -> &Arc<TrustBundles> {
        &self.bundles
    }

    /// The revocation lists of each trust domain.
    pub fn revocation(&self) -> &Arc<RevocationLists> {
        &self.revocation
    }

    /// The aliases in use.
    pub fn aliases(&self) -> Arc<TrustDomainAliases> {
        self.aliases.load_full()
    }

    /// Puts other aliases to use, for all clones.
    pub fn set_aliases(&self, aliases: TrustDomainAliases) {
        self.aliases.store(Arc::new(aliases));
    }

    /// Judges a peer of a live connection as if it came now: its chain to the
    /// bundle as it is now, expiry, and revocation.
    ///
    /// A connection outlives its certificates where those are short-lived, and a
    /// root that was rotated out: the answer is `Expired` or `Untrusted` for
    /// peers that did nothing wrong. To cut only those whose certificate was
    /// taken back, ask [`revoked`](Self::revoked).
    pub fn verify_again(&self, peer: &VerifiedPeer, now: SystemTime) -> Result<(), PeerRefusal> {
        let (leaf, intermediates) = peer
            .chain()
            .split_first()
            .ok_or(PeerRefusal::NoCertificate)?;
        self.prove(peer.id(), leaf, intermediates, peer.role(), unix(now))
            .map(|_| ())
    }

    /// Judges a peer of a live connection by revocation alone: the certificates
    /// that its handshake was accepted by, against the lists as they are now.
    /// Neither expiry nor a root that has left the bundle counts. The only
    /// refusals are [`Revoked`](PeerRefusal::Revoked) and
    /// [`RevocationUnknown`](PeerRefusal::RevocationUnknown).
    ///
    /// For each live stream, whenever [`changes`](Self::changes) tells of one,
    /// and when a list passes its `next_update`.
    pub fn revoked(&self, peer: &VerifiedPeer, now: SystemTime) -> Result<(), PeerRefusal> {
        match self.revocation.of(&peer.id().trust_domain()) {
            Some(lists) => lists.judge(peer.path(), unix(now)),
            None => Ok(()),
        }
    }

    /// Whether a list takes back `svid`, one of ours, or its issuer: nobody who has
    /// the list would accept it. Nothing else is an error here; whether a list
    /// covers it at all is for peers to judge.
    pub fn own_revoked(&self, svid: &Svid, now: SystemTime) -> Result<(), PeerRefusal> {
        let id = svid.id();
        let Some((leaf, intermediates)) = svid.chain().split_first() else {
            return Ok(());
        };
        if !self.revocation.required(&id.trust_domain()) {
            return Ok(());
        }
        match self.prove(id, leaf, intermediates, Role::Client, unix(now)) {
            Err(refusal @ PeerRefusal::Revoked { .. }) => Err(refusal),
            _ => Ok(()),
        }
    }

    /// Tells of changes of bundles and lists, from now on.
    pub fn changes(&self) -> TrustChanges {
        TrustChanges {
            bundles: self.bundles.subscribe(),
            revocation: self.revocation.subscribe(),
        }
    }

    /// The path by which `id`'s chain leads to a root of `id`'s own domain.
    pub(crate) fn prove(
        &self,
        id: &SpiffeId,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: Role,
        now: UnixTime,
    ) -> Result<Vec<Link>, PeerRefusal> {
        let domain = id.trust_domain();
        let Some(bundle) = self.bundles.bundle(&domain) else {
            return Err(PeerRefusal::UnknownTrustDomain(domain));
        };
        let lists = self.revocation.of(&domain);
        chain::verify(leaf, intermediates, &bundle, lists.as_deref(), role, now)
    }
}

impl From<Arc<TrustBundles>> for TrustStore {
    /// Without aliases and revocation lists.
    fn from(bundles: Arc<TrustBundles>) -> Self {
        Self::new(
            bundles,
            Arc::new(RevocationLists::new()),
            TrustDomainAliases::default(),
        )
    }
}

impl std::fmt::Debug for TrustStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrustStore")
            .field("bundles", &self.bundles)
            .field("revocation", &self.revocation)
            .field("aliases", &self.aliases.load())
            .finish()
    }
}

/// What [`TrustStore::changes`] answers.
#[derive(Debug)]
pub struct TrustChanges {
    bundles: watch::Receiver<u64>,
    revocation: watch::Receiver<u64>,
}

impl TrustChanges {
    /// Waits for the next change; several at once count as one. Safe to drop at
    /// any await. Pending for ever once the store is gone.
    pub async fn changed(&mut self) -> TrustChange {
        tokio::select! {
            Ok(()) = self.revocation.changed() => TrustChange::Revocation,
            Ok(()) = self.bundles.changed() => TrustChange::Bundles,
            else => std::future::pending().await,
        }
    }
}

/// What changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrustChange {
    /// The roots of some trust domain.
    Bundles,
    /// The revocation lists of some trust domain.
    Revocation,
}

fn unix(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(
        time.duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default(),
    )
}
