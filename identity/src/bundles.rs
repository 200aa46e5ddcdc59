//! Trust bundles: the roots of each trust domain.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::leaf::MAX_CERTIFICATE_BYTES;
use crate::spiffe_id::TrustDomain;

/// The roots of every trust domain that peers may come from.
///
/// Reading takes no lock: a handshake sees either the bundle before a change or
/// the one after it. A trust domain may have several sources (a CA and a
/// federated bundle, say); its roots are the union of what they last gave. A
/// refused change leaves what was there.
///
/// This type does not persist anything and does not fetch anything.
pub struct TrustBundles {
    published: ArcSwap<BTreeMap<TrustDomain, Arc<Bundle>>>,
    sources: Mutex<BTreeMap<(TrustDomain, String), Vec<Root>>>,
    changed: watch::Sender<u64>,
}

impl TrustBundles {
    /// No trust domain is known: everyone is refused.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces the roots that `source` gave for `trust_domain`.
    ///
    /// Answers whether that changed anything. Duplicates count once.
    pub fn replace(
        &self,
        source: &str,
        trust_domain: &TrustDomain,
        roots: &[CertificateDer<'_>],
    ) -> Result<bool, BundleError> {
        let roots = read_roots(trust_domain, roots)?;
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (trust_domain.clone(), source.to_owned());
        if sources.get(&key).is_some_and(|old| *old == roots) {
            return Ok(false);
        }
        sources.insert(key, roots);
        self.publish(&sources, trust_domain);
        Ok(true)
    }

    /// Takes away what `source` gave for `trust_domain`. Without another
    /// source for it, its peers are refused from now on.
    pub fn remove(&self, source: &str, trust_domain: &TrustDomain) -> bool {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let removed = sources
            .remove(&(trust_domain.clone(), source.to_owned()))
            .is_some();
        if removed {
            self.publish(&sources, trust_domain);
        }
        removed
    }

    /// The DER roots of a trust domain, empty when it is not known.
    pub fn roots(&self, trust_domain: &TrustDomain) -> Vec<CertificateDer<'static>> {
        self.bundle(trust_domain).map_or_else(Vec::new, |bundle| {
            bundle.roots.iter().map(|root| root.der.clone()).collect()
        })
    }

    /// The trust domains that have roots.
    pub fn trust_domains(&self) -> Vec<TrustDomain> {
        self.published.load().keys().cloned().collect()
    }

    /// Told of every change; the number counts them. Once told, readers see the
    /// new bundles.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(crate) fn bundle(&self, trust_domain: &TrustDomain) -> Option<Arc<Bundle>> {
        self.published.load().get(trust_domain).cloned()
    }

    /// Called with the lock on `sources`, so that two changes cannot overtake
    /// each other between reading and storing.
    fn publish(
        &self,
        sources: &BTreeMap<(TrustDomain, String), Vec<Root>>,
        trust_domain: &TrustDomain,
    ) {
        let mut roots: Vec<Root> = Vec::new();
        for ((domain, _), given) in sources {
            if domain != trust_domain {
                continue;
            }
            for root in given {
                if !roots.contains(root) {
                    roots.push(root.clone());
                }
            }
        }
        let mut all = BTreeMap::clone(&self.published.load());
        if roots.is_empty() {
            all.remove(trust_domain);
        } else {
            all.insert(trust_domain.clone(), Arc::new(Bundle::from_roots(roots)));
        }
        self.published.store(Arc::new(all));
        self.changed
            .send_modify(|count| *count = count.wrapping_add(1));
    }
}

impl Default for TrustBundles {
    fn default() -> Self {
        Self {
            published: ArcSwap::default(),
            sources: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }
}

impl std::fmt::Debug for TrustBundles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map()
            .entries(
                self.published
                    .load()
                    .iter()
                    .map(|(domain, bundle)| (domain, bundle.roots.len())),
            )
            .finish()
    }
}

/// The roots of one trust domain.
pub(crate) struct Bundle {
    roots: Vec<Root>,
    anchors: Vec<TrustAnchor<'static>>,
    /// Unix seconds: up to here every root is valid.
    first_expiry: i64,
}

impl Bundle {
    /// A bundle that is in use nowhere yet: to check what a CA sent.
    pub(crate) fn of(
        trust_domain: &TrustDomain,
        roots: &[CertificateDer<'_>],
    ) -> Result<Self, BundleError> {
        Ok(Self::from_roots(read_roots(trust_domain, roots)?))
    }

    fn from_roots(roots: Vec<Root>) -> Self {
        Self {
            anchors: roots.iter().map(|root| root.anchor.clone()).collect(),
            first_expiry: roots
                .iter()
                .map(|root| root.not_after)
                .min()
                .unwrap_or(i64::MIN),
            roots,
        }
    }

    /// The anchors that have not expired. webpki ignores the dates of an
    /// anchor; a root past its last day must not vouch for anyone.
    pub(crate) fn anchors_at(&self, now: UnixTime) -> Cow<'_, [TrustAnchor<'static>]> {
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        if now <= self.first_expiry {
            return Cow::Borrowed(&self.anchors);
        }
        self.roots
            .iter()
            .filter(|root| root.not_after >= now)
            .map(|root| root.anchor.clone())
            .collect()
    }

    pub(crate) fn contains(&self, certificate: &CertificateDer<'_>) -> bool {
        self.roots.iter().any(|root| root.der == *certificate)
    }
}

#[derive(Clone)]
struct Root {
    der: CertificateDer<'static>,
    anchor: TrustAnchor<'static>,
    not_after: i64,
}

impl PartialEq for Root {
    fn eq(&self, other: &Self) -> bool {
        self.der == other.der
    }
}

/// Why a bundle was refused. The source of the bundle is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// An empty bundle would cut off the whole trust domain.
    #[error("the bundle of trust domain {0} has no root: keeping the one in use")]
    Empty(TrustDomain),
    /// More roots than anyone has.
    #[error("the bundle of trust domain {trust_domain} has {count} roots, more than {MAX_ROOTS}")]
    TooMany {
        /// Whose bundle it is.
        trust_domain: TrustDomain,
        /// How many there were.
        count: usize,
    },
    /// Not a certificate that can be a root.
    #[error("root {position} of trust domain {trust_domain} is {problem}")]
    BadRoot {
        /// Whose bundle it is.
        trust_domain: TrustDomain,
        /// Counted from 1.
        position: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
}

fn read_roots(
    trust_domain: &TrustDomain,
    roots: &[CertificateDer<'_>],
) -> Result<Vec<Root>, BundleError> {
    if roots.is_empty() {
        return Err(BundleError::Empty(trust_domain.clone()));
    }
    if roots.len() > MAX_ROOTS {
        return Err(BundleError::TooMany {
            trust_domain: trust_domain.clone(),
            count: roots.len(),
        });
    }
    let mut read: Vec<Root> = Vec::with_capacity(roots.len());
    for (index, der) in roots.iter().enumerate() {
        let root = read_root(der).map_err(|problem| BundleError::BadRoot {
            trust_domain: trust_domain.clone(),
            position: index.saturating_add(1),
            problem,
        })?;
        if !read.contains(&root) {
            read.push(root);
        }
    }
    Ok(read)
}

fn read_root(der: &CertificateDer<'_>) -> Result<Root, &'static str> {
    if der.len() > MAX_CERTIFICATE_BYTES {
        return Err("larger than 64 KiB");
    }
    let (rest, certificate) =
        X509Certificate::from_der(der).map_err(|_| "not an X.509 certificate")?;
    if !rest.is_empty() {
        return Err("followed by bytes that are not part of it");
    }
    if !certificate.is_ca() {
        return Err("not a CA certificate");
    }
    let anchor = webpki::anchor_from_trusted_cert(der)
        .map_err(|_| "not usable as a trust anchor")?
        .to_owned();
    Ok(Root {
        der: der.clone().into_owned(),
        anchor,
        not_after: certificate.validity().not_after.timestamp(),
    })
}

const MAX_ROOTS: usize = 64;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::{CaParams, TestCa, workload};

    fn td() -> TrustDomain {
        TrustDomain::parse("td").unwrap()
    }

    fn root() -> CertificateDer<'static> {
        TestCa::new("td").root().clone()
    }

    #[test]
    fn sources_add_up_and_each_replaces_only_its_own() {
        let (a, b, c) = (root(), root(), root());
        let bundles = TrustBundles::new();
        assert!(
            bundles
                .replace("ca", &td(), std::slice::from_ref(&a))
                .unwrap()
        );
        assert!(
            bundles
                .replace("file", &td(), std::slice::from_ref(&b))
                .unwrap()
        );
        assert_eq!(bundles.roots(&td()), [a, b.clone()]);
        assert!(
            bundles
                .replace("ca", &td(), &[c.clone(), c.clone()])
                .unwrap()
        );
        assert_eq!(bundles.roots(&td()), [c.clone(), b.clone()]);
        assert!(
            !bundles.replace("ca", &td(), &[c]).unwrap(),
            "nothing changed"
        );
        assert!(bundles.remove("ca", &td()));
        assert_eq!(bundles.roots(&td()), [b]);
        assert!(!bundles.remove("ca", &td()));
    }

    #[test]
    fn a_refused_bundle_leaves_the_one_in_use() {
        let good = root();
        let bundles = TrustBundles::new();
        bundles
            .replace("ca", &td(), std::slice::from_ref(&good))
            .unwrap();

        let empty = bundles.replace("ca", &td(), &[]).unwrap_err();
        assert_eq!(empty, BundleError::Empty(td()));
        let leaf = TestCa::shared().svid(&workload("td", "a", "b")).chain()[0].clone();
        let mut trailing = good.to_vec();
        trailing.push(0);
        for bad in [
            leaf,
            CertificateDer::from(vec![0x30, 0x03, 1, 2, 3]),
            CertificateDer::from(trailing),
            CertificateDer::from(vec![0x30; MAX_CERTIFICATE_BYTES + 1]),
        ] {
            let error = bundles
                .replace("ca", &td(), &[good.clone(), bad])
                .unwrap_err();
            assert!(
                matches!(error, BundleError::BadRoot { position: 2, .. }),
                "{error}"
            );
        }
        let many = vec![good.clone(); MAX_ROOTS + 1];
        let error = bundles.replace("ca", &td(), &many).unwrap_err();
        assert!(matches!(error, BundleError::TooMany { .. }), "{error}");

        assert_eq!(bundles.roots(&td()), [good]);
    }

    #[test]
    fn expired_roots_drop_out_and_the_others_stay() {
        let old = TestCa::with_root(
            "td",
            &CaParams {
                not_after: std::time::SystemTime::now() - std::time::Duration::from_secs(5),
                ..CaParams::default()
            },
        );
        let bundle = Bundle::of(&td(), &[old.root().clone(), root()]).unwrap();
        assert_eq!(bundle.anchors_at(UnixTime::now()).len(), 1);
        assert_eq!(
            bundle
                .anchors_at(UnixTime::since_unix_epoch(std::time::Duration::ZERO))
                .len(),
            2
        );
    }
}
