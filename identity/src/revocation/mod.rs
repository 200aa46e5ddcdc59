//! Certificate revocation lists, held next to the trust bundles.

#[cfg(test)]
mod edition_tests;
mod list;
#[cfg(test)]
mod openssl_tests;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use tokio::sync::watch;
use x509_parser::asn1_rs::Any;
use x509_parser::prelude::{FromDer, X509Certificate};

pub(crate) use self::list::point_uris;
use self::list::{Crl, Timeliness};
use crate::chain::Link;
use crate::spiffe_id::TrustDomain;
use crate::verifier::PeerRefusal;

/// The revocation lists of each trust domain.
///
/// Reading takes no lock. A trust domain without a source is not checked. From
/// the moment a source is configured for it ([`require`](Self::require) or a
/// first [`replace`](Self::replace), even one that fails) every certificate of a
/// peer's path below the root must be covered by a list that its issuer signed
/// and that has not reached its `nextUpdate`; else the peer is refused. There is
/// no soft failure.
///
/// Peers are checked on both sides of a handshake, and again for live streams by
/// [`TrustStore::revoked`](crate::TrustStore::revoked). Roots are not: a root
/// that is no longer trusted leaves the bundle.
///
/// An older edition of a list never replaces a newer one of the same source
/// (RFC 5280 section 5.2.3: the CRL number, else `thisUpdate`): old content that
/// is put back must not clear whom newer content revoked. Nothing is remembered
/// over a restart. Lists that do not name the key they are signed with are
/// compared only while there is one of that issuer.
///
/// This type fetches nothing: the content of a file or ConfigMap is given to it,
/// or the lists in a Workload API's answer. It follows no distribution point.
pub struct RevocationLists {
    published: ArcSwap<BTreeMap<TrustDomain, Arc<DomainLists>>>,
    sources: Mutex<Sources>,
    changed: watch::Sender<u64>,
}

impl RevocationLists {
    /// Nothing is checked.
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on nobody of `trust_domain` is accepted without a valid list,
    /// though `source` has not given any yet.
    pub fn require(&self, source: &str, trust_domain: &TrustDomain) {
        let mut sources = self.sources();
        let key = (trust_domain.clone(), source.to_owned());
        if let std::collections::btree_map::Entry::Vacant(vacant) = sources.entry(key) {
            vacant.insert(Vec::new());
            self.publish(&sources, trust_domain);
        }
    }

    /// Replaces the lists that `source` gave for the issuers of `trust_domain`:
    /// PEM (`X509 CRL`, any number of them) or the DER of one.
    ///
    /// Answers whether that changed anything. Content that is refused leaves the
    /// lists in use; if there are none, the trust domain is closed (see
    /// [`require`](Self::require)). In place of a list that is
    /// [older](CrlProblem::Older) than the one in use, that one stays; what else
    /// is in the content is put to use all the same.
    pub fn replace(
        &self,
        source: &str,
        trust_domain: &TrustDomain,
        content: &[u8],
    ) -> Result<bool, CrlError> {
        self.put(source, trust_domain, read(content))
    }

    /// [`replace`](Self::replace) with the DER of each list.
    pub fn replace_der(
        &self,
        source: &str,
        trust_domain: &TrustDomain,
        lists: &[CertificateRevocationListDer<'_>],
    ) -> Result<bool, CrlError> {
        self.put(source, trust_domain, read_der(lists))
    }

    fn put(
        &self,
        source: &str,
        trust_domain: &TrustDomain,
        lists: Result<Vec<Crl>, CrlProblem>,
    ) -> Result<bool, CrlError> {
        let refused = |problem| CrlError {
            trust_domain: trust_domain.clone(),
            source_name: source.to_owned(),
            problem,
        };
        let lists = match lists {
            Ok(lists) => lists,
            Err(problem) => {
                self.require(source, trust_domain);
                return Err(refused(problem));
            }
        };
        let mut lists: Vec<Arc<Crl>> = lists.into_iter().map(Arc::new).collect();
        let mut sources = self.sources();
        let key = (trust_domain.clone(), source.to_owned());
        let in_use = sources.get(&key).map(Vec::as_slice).unwrap_or_default();
        let older = keep_newer(&mut lists, in_use);
        let same = sources.get(&key).is_some_and(|old| {
            old.len() == lists.len() && old.iter().zip(&lists).all(|(a, b)| a.der == b.der)
        });
        if !same {
            sources.insert(key, lists);
            self.publish(&sources, trust_domain);
        }
        older.map_or(Ok(!same), |problem| Err(refused(problem)))
    }

    /// Takes `source` away. Without another one the trust domain is no longer
    /// checked: this is a change of configuration, not of content.
    pub fn remove(&self, source: &str, trust_domain: &TrustDomain) -> bool {
        let mut sources = self.sources();
        let removed = sources
            .remove(&(trust_domain.clone(), source.to_owned()))
            .is_some();
        if removed {
            self.publish(&sources, trust_domain);
        }
        removed
    }

    /// Whether peers of this trust domain need a valid list.
    pub fn required(&self, trust_domain: &TrustDomain) -> bool {
        self.published.load().contains_key(trust_domain)
    }

    /// All lists, for status pages and for a warning before `next_update`.
    pub fn snapshot(&self) -> Vec<CrlStatus> {
        self.sources()
            .iter()
            .flat_map(|((trust_domain, source), lists)| {
                lists.iter().map(|list| CrlStatus {
                    trust_domain: trust_domain.clone(),
                    source: source.clone(),
                    issuer: list.issuer_name.clone(),
                    this_update: list.this_update,
                    next_update: list.next_update,
                    revoked: list.len(),
                })
            })
            .collect()
    }

    /// Told of every change; the number counts them.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(crate) fn of(&self, trust_domain: &TrustDomain) -> Option<Arc<DomainLists>> {
        self.published.load().get(trust_domain).cloned()
    }

    /// Called with the lock on `sources`.
    fn publish(&self, sources: &Sources, trust_domain: &TrustDomain) {
        let mut configured = false;
        let mut lists = DomainLists::default();
        for ((domain, _), given) in sources {
            if domain == trust_domain {
                configured = true;
                for list in given {
                    let same_issuer = lists.by_issuer.entry(list.issuer.clone()).or_default();
                    same_issuer.push(Arc::clone(list));
                }
            }
        }
        let mut all = BTreeMap::clone(&self.published.load());
        if configured {
            all.insert(trust_domain.clone(), Arc::new(lists));
        } else {
            all.remove(trust_domain);
        }
        self.published.store(Arc::new(all));
        self.changed
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    fn sources(&self) -> MutexGuard<'_, Sources> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for RevocationLists {
    fn default() -> Self {
        Self {
            published: ArcSwap::default(),
            sources: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }
}

impl std::fmt::Debug for RevocationLists {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map()
            .entries(
                self.published
                    .load()
                    .iter()
                    .map(|(domain, lists)| (domain, lists.by_issuer.len())),
            )
            .finish()
    }
}

/// One list, for a status page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrlStatus {
    /// Whose peers it is about.
    pub trust_domain: TrustDomain,
    /// Who gave it.
    pub source: String,
    /// Who issued it, as a printable distinguished name.
    pub issuer: String,
    /// When it was made, Unix seconds.
    pub this_update: i64,
    /// From when on it is no longer valid, Unix seconds.
    pub next_update: i64,
    /// How many serial numbers it lists.
    pub revoked: usize,
}

/// Content that cannot be used as revocation lists: its source is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("revocation lists of trust domain {trust_domain} from {source_name}: {problem}")]
pub struct CrlError {
    /// Whose lists these should be.
    pub trust_domain: TrustDomain,
    /// Who gave them.
    pub source_name: String,
    /// What is wrong with them.
    pub problem: CrlProblem,
}

/// What is wrong with content that should be revocation lists.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CrlProblem {
    /// An empty file is a failed write more often than a wish.
    #[error("there is no list in it (expected PEM `X509 CRL` or one DER list)")]
    Empty,
    /// Larger than any that is meant.
    #[error("it has {0} bytes, more than {MAX_BYTES}")]
    TooLarge(usize),
    /// More than any trust domain has.
    #[error("it holds more than {MAX_LISTS} lists")]
    TooMany,
    /// PEM armour that does not parse.
    #[error("it is not PEM: {0}")]
    Pem(String),
    /// A list that was replaced already: an old file was put back, or a mirror
    /// is behind.
    #[error(
        "the list of issuer {issuer} ({offered}) is older than the one in use ({in_use}), which stays"
    )]
    Older {
        /// A printable distinguished name.
        issuer: String,
        /// Number and date of what came.
        offered: String,
        /// Number and date of what stays.
        in_use: String,
    },
    /// A list that cannot be used.
    #[error("list {position}: {problem}")]
    List {
        /// Counted from 1.
        position: usize,
        /// What is wrong with it.
        problem: String,
    },
}

/// The lists of one trust domain.
#[derive(Default)]
pub(crate) struct DomainLists {
    /// By the DER contents of the issuer's name. Several lists of one name are
    /// several keys (a rotated root keeps its name) or several scopes.
    by_issuer: HashMap<Vec<u8>, Vec<Arc<Crl>>>,
}

impl DomainLists {
    /// Judges every certificate of a path, leaf first.
    pub(crate) fn judge(&self, path: &[Link], now: UnixTime) -> Result<(), PeerRefusal> {
        // A revoked certificate anywhere is the better reason to give.
        let mut unknown = None;
        for link in path {
            match self.judge_one(link, now) {
                Err(PeerRefusal::RevocationUnknown(why)) => {
                    unknown.get_or_insert(why);
                }
                other => other?,
            }
        }
        unknown.map_or(Ok(()), |why| Err(PeerRefusal::RevocationUnknown(why)))
    }

    fn judge_one(&self, link: &Link, now: UnixTime) -> Result<(), PeerRefusal> {
        let unknown = |why: &str| {
            Err(PeerRefusal::RevocationUnknown(format!(
                "{why} of issuer {}",
                link.issuer_name
            )))
        };
        let Some(lists) = self.by_issuer.get(&link.issuer) else {
            return unknown("there is no revocation list");
        };
        // RFC 5280 section 6.3.3 (f).
        if !link.issuer_signs_crls {
            return unknown("key usage cRLSign is missing in the certificate");
        }
        let mut best = "no revocation list covers this certificate";
        let mut current = false;
        for list in lists.iter().filter(|list| list.covers(link)) {
            if !list.signed_by(&link.issuer_public_key) {
                best = "no revocation list is signed by the key";
                continue;
            }
            // An overdue list cannot clear anybody; what it revokes stays so.
            if list.lists(&link.serial) {
                return Err(PeerRefusal::Revoked {
                    serial: crate::leaf::hex(&link.serial),
                    issuer: link.issuer_name.clone(),
                });
            }
            match list.timeliness(now) {
                Timeliness::Current => current = true,
                Timeliness::Overdue => best = "nextUpdate has passed in the revocation list",
                Timeliness::NotYet => best = "thisUpdate lies ahead in the revocation list",
            }
        }
        if current { Ok(()) } else { unknown(best) }
    }
}

type Sources = BTreeMap<(TrustDomain, String), Vec<Arc<Crl>>>;

/// Whether the certificate's holder signed this list. Content that is no list
/// was signed by nobody.
pub(crate) fn issued_by(
    list: &CertificateRevocationListDer<'_>,
    issuer: &CertificateDer<'_>,
) -> bool {
    let Ok((_, issuer)) = X509Certificate::from_der(issuer) else {
        return false;
    };
    let Ok((_, public_key)) = Any::from_der(issuer.public_key().raw) else {
        return false;
    };
    Crl::parse(list)
        .is_ok_and(|list| list.issued_under(issuer.subject()) && list.signed_by(public_key.data))
}

/// Puts what is in use in place of editions in `lists` that are older, and tells
/// of one of them. An old edition beside a newer one replaces nothing.
fn keep_newer(lists: &mut Vec<Arc<Crl>>, in_use: &[Arc<Crl>]) -> Option<CrlProblem> {
    let mut problem = None;
    for used in in_use {
        let series = |list: &&Arc<Crl>| list.same_series(used);
        let offered: Vec<Arc<Crl>> = lists.iter().filter(series).cloned().collect();
        // Of unnamed keys one cannot tell which list follows which.
        let several = offered.len() > 1 || in_use.iter().filter(series).count() > 1;
        let Some(first) = offered.first() else {
            continue;
        };
        if (several && !used.names_its_key()) || !offered.iter().all(|list| list.older_than(used)) {
            continue;
        }
        problem = Some(CrlProblem::Older {
            issuer: used.issuer_name.clone(),
            offered: first.edition(),
            in_use: used.edition(),
        });
        if let Some(place) = lists.iter_mut().find(|list| list.same_series(used)) {
            *place = Arc::clone(used);
        }
        lists.retain(|list| Arc::ptr_eq(list, used) || !list.same_series(used));
    }
    problem
}

fn read(content: &[u8]) -> Result<Vec<Crl>, CrlProblem> {
    if content.len() > MAX_BYTES {
        return Err(CrlProblem::TooLarge(content.len()));
    }
    // A SEQUENCE of more than 127 bytes: its second byte is not text, as PEM is.
    let ders: Vec<CertificateRevocationListDer<'_>> = if matches!(content, [0x30, 0x80..=0xff, ..])
    {
        vec![CertificateRevocationListDer::from(content)]
    } else {
        CertificateRevocationListDer::pem_slice_iter(content)
            .take(MAX_LISTS.saturating_add(1))
            .collect::<Result<_, _>>()
            .map_err(|error| CrlProblem::Pem(error.to_string()))?
    };
    read_der(&ders)
}

fn read_der(ders: &[CertificateRevocationListDer<'_>]) -> Result<Vec<Crl>, CrlProblem> {
    if ders.is_empty() {
        return Err(CrlProblem::Empty);
    }
    if ders.len() > MAX_LISTS {
        return Err(CrlProblem::TooMany);
    }
    let bytes = ders.iter().map(|der| der.len()).sum();
    if bytes > MAX_BYTES {
        return Err(CrlProblem::TooLarge(bytes));
    }
    ders.iter()
        .enumerate()
        .map(|(index, der)| {
            Crl::parse(der).map_err(|problem| CrlProblem::List {
                position: index.saturating_add(1),
                problem,
            })
        })
        .collect()
}

/// About 400 000 revoked certificates.
const MAX_BYTES: usize = 16 * 1024 * 1024;
const MAX_LISTS: usize = 64;
