//! The identity dimension: asked once per identity, so indexed by the exact names that
//! conditions demand.

use std::collections::HashMap;

use super::dimension::{Condition, Lists, Part, mask_where};
use crate::{Match, Peer, ServiceAccountMatch, StringMatch, TermMask};

/// What a match says about the peer's identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Names {
    namespaces: Lists<StringMatch>,
    principals: Lists<StringMatch>,
    service_accounts: Lists<ServiceAccountMatch>,
}

impl Part for Names {
    const DIMENSION: u8 = super::terms::IDENTITY;

    fn any_of(matches: &[&Match]) -> Vec<Self> {
        let names = |m: &&Match| Names {
            namespaces: Lists::new(&m.namespaces, &m.not_namespaces),
            principals: Lists::new(&m.principals, &m.not_principals),
            service_accounts: Lists::new(&m.service_accounts, &m.not_service_accounts),
        };
        matches.iter().map(names).collect()
    }

    fn len(&self) -> usize {
        self.namespaces.len() + self.principals.len() + self.service_accounts.len()
    }
}

/// The conditions, and by which exact name each can be found.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Identities {
    conditions: Vec<Condition<Names>>,
    /// Terms without a condition.
    any: TermMask,
    by_principal: HashMap<String, Vec<usize>>,
    by_namespace: HashMap<String, Vec<usize>>,
    by_account: HashMap<ServiceAccountMatch, Vec<usize>>,
    /// Conditions that no exact name leads to: asked for every identity.
    unindexed: Vec<usize>,
}

impl Identities {
    pub fn new(conditions: Vec<Condition<Names>>) -> Self {
        let mut index = Identities {
            any: mask_where(&conditions, |condition| condition.parts.is_empty()),
            ..Identities::default()
        };
        for (number, condition) in conditions.iter().enumerate() {
            if condition.parts.is_empty() {
                continue;
            }
            // All parts must hold, so one whose every element demands an exact name is
            // enough to find the condition by.
            let keys = condition
                .parts
                .iter()
                .filter_map(|any| any.iter().map(Names::key).collect::<Option<Vec<_>>>())
                .min_by_key(|keys| keys.iter().map(Key::len).sum::<usize>());
            let Some(keys) = keys else {
                index.unindexed.push(number);
                continue;
            };
            for key in keys {
                match key {
                    Key::Principals(names) => enter(&mut index.by_principal, names, number),
                    Key::Namespaces(names) => enter(&mut index.by_namespace, names, number),
                    Key::Accounts(accounts) => {
                        for account in accounts {
                            let of_account = index.by_account.entry(account.clone());
                            of_account.or_default().push(number);
                        }
                    }
                }
            }
        }
        index.conditions = conditions;
        index
    }

    /// The terms whose condition holds for a peer, or for plaintext (`None`).
    pub fn mask(&self, peer: Option<&Peer>) -> TermMask {
        let mut found: Vec<usize> = self.unindexed.clone();
        if let Some(peer) = peer {
            for principal in peer.principals() {
                found.extend(self.by_principal.get(principal).into_iter().flatten());
            }
            if let Some(namespace) = peer.namespace() {
                found.extend(self.by_namespace.get(namespace).into_iter().flatten());
                if let Some(service_account) = peer.service_account() {
                    let account = ServiceAccountMatch {
                        namespace: namespace.to_owned(),
                        service_account: service_account.to_owned(),
                    };
                    found.extend(self.by_account.get(&account).into_iter().flatten());
                }
            }
        }
        let mut mask = self.any.clone();
        for condition in found.iter().filter_map(|n| self.conditions.get(*n)) {
            if condition.holds(|names| names.hold(peer)) {
                mask.add(&condition.terms);
            }
        }
        mask
    }
}

/// Exact names one of which a match demands.
enum Key<'a> {
    Principals(&'a [StringMatch]),
    Namespaces(&'a [StringMatch]),
    Accounts(&'a [ServiceAccountMatch]),
}

impl Key<'_> {
    fn len(&self) -> usize {
        match self {
            Key::Principals(names) | Key::Namespaces(names) => names.len(),
            Key::Accounts(accounts) => accounts.len(),
        }
    }
}

impl Names {
    /// The narrowest names that this demands.
    fn key(&self) -> Option<Key<'_>> {
        let all_exact = |list: &[StringMatch]| {
            !list.is_empty() && list.iter().all(|m| matches!(m, StringMatch::Exact(_)))
        };
        if all_exact(&self.principals.positive) {
            Some(Key::Principals(&self.principals.positive))
        } else if !self.service_accounts.positive.is_empty() {
            Some(Key::Accounts(&self.service_accounts.positive))
        } else if all_exact(&self.namespaces.positive) {
            Some(Key::Namespaces(&self.namespaces.positive))
        } else {
            None
        }
    }

    fn hold(&self, peer: Option<&Peer>) -> bool {
        // An absent name is matched by no pattern, so that positive lists fail and
        // negative ones hold.
        let namespace = peer.and_then(Peer::namespace);
        self.namespaces
            .holds(|list| namespace.is_some_and(|n| matches_any(list, n)))
            && self
                .principals
                .holds(|list| peer.is_some_and(|p| p.principals().any(|p| matches_any(list, p))))
            && self
                .service_accounts
                .holds(|list| peer.is_some_and(|peer| list.iter().any(|a| a.matches(peer))))
    }
}

/// `list` is sorted, which puts exact patterns first.
fn matches_any(list: &[StringMatch], name: &str) -> bool {
    let exact = list.partition_point(|m| matches!(m, StringMatch::Exact(_)));
    let (exact, patterns) = list.split_at(exact);
    exact
        .binary_search_by(|m| match m {
            StringMatch::Exact(text) => text.as_str().cmp(name),
            _ => std::cmp::Ordering::Greater,
        })
        .is_ok()
        || patterns.iter().any(|m| m.matches(name))
}

fn enter(index: &mut HashMap<String, Vec<usize>>, names: &[StringMatch], number: usize) {
    for name in names {
        if let StringMatch::Exact(text) = name {
            index.entry(text.clone()).or_default().push(number);
        }
    }
}
