//! What an agent says about whom to trust, put to use.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustls_pki_types::CertificateRevocationListDer;

use super::Bundles;
use crate::spiffe_id::TrustDomain;
use crate::trust::TrustStore;

/// The revocation lists of an answer, by the trust domain of their issuers.
pub(super) type Lists = BTreeMap<TrustDomain, Vec<CertificateRevocationListDer<'static>>>;

/// Puts what a source says into the [`TrustStore`].
pub(super) struct TrustKeeper {
    source: String,
    trust: TrustStore,
    given: Mutex<Given>,
}

/// The trust domains this source has given something for so far.
#[derive(Default)]
struct Given {
    bundles: BTreeSet<TrustDomain>,
    lists: BTreeSet<TrustDomain>,
}

impl TrustKeeper {
    pub(super) fn new(source: &str, trust: TrustStore) -> Self {
        Self {
            source: source.to_owned(),
            trust,
            given: Mutex::default(),
        }
    }

    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// `all` replaces everything the source gave before. A bundle that cannot be
    /// used leaves the one in use; a trust domain that is not among them is no
    /// longer federated with and is taken away.
    pub(super) fn bundles(&self, all: &Bundles) {
        let (source, mut given) = (self.source(), self.given());
        for (domain, roots) in all {
            match self.trust.bundles().replace(source, domain, roots) {
                Ok(changed) => {
                    if changed {
                        tracing::info!(source, trust_domain = %domain, roots = roots.len(), "trust bundle changed");
                    }
                    given.bundles.insert(domain.clone());
                }
                Err(error) => {
                    tracing::warn!(source, trust_domain = %domain, "{error}");
                }
            }
        }
        let gone = given
            .bundles
            .extract_if(.., |domain| !all.contains_key(domain));
        for domain in gone {
            self.trust.bundles().remove(source, &domain);
            tracing::info!(source, trust_domain = %domain, "trust bundle taken away");
        }
    }

    /// Adds the lists to those that are configured. From a trust domain's first
    /// list on, nobody of it passes without one: what the agent gave stays in
    /// use when it gives none any more, until it ends by itself, and nobody
    /// passes after that. Only a trust domain whose bundle is gone is let go.
    pub(super) fn lists(&self, all: &Lists) {
        let (source, mut given) = (self.source(), self.given());
        let revocation = self.trust.revocation();
        for (domain, lists) in all {
            given.lists.insert(domain.clone());
            match revocation.replace_der(source, domain, lists) {
                Ok(true) => {
                    tracing::info!(source, trust_domain = %domain, lists = lists.len(), "revocation lists changed");
                }
                Ok(false) => {}
                Err(error) => tracing::error!(source, trust_domain = %domain, "{error}"),
            }
        }
        for domain in given
            .lists
            .iter()
            .filter(|domain| !all.contains_key(*domain))
        {
            tracing::warn!(source, trust_domain = %domain, "no revocation lists any more: keeping those in use");
        }
        let Given { bundles, lists } = &mut *given;
        lists.retain(|domain| {
            let stays = bundles.contains(domain) || all.contains_key(domain);
            if !stays {
                revocation.remove(source, domain);
            }
            stays
        });
    }

    fn given(&self) -> MutexGuard<'_, Given> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
