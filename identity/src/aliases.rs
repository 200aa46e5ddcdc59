//! Trust domains that stand for the same mesh.

use std::collections::BTreeMap;

use crate::spiffe_id::{SpiffeId, TrustDomain};

/// Which trust domains count as another name of which: explicit local
/// configuration, never learned from a peer or a control plane.
///
/// An alias has exactly one canonical domain, and a canonical domain is never
/// an alias itself, so domains fall into groups of one canonical name and its
/// aliases. What that means, and no more than that:
///
/// * **Chain.** A peer's certificate must chain to the bundle of the trust
///   domain that *its own* SPIFFE ID names. An alias gives no CA a say over
///   another domain's certificates: without a bundle of its own, an alias
///   domain's peers are refused.
/// * **Revocation.** The lists of the domain that the ID names apply.
/// * **Expected identities.** Two IDs of one group with the same path are the
///   same identity: whoever is expected under one name may appear under another.
/// * **Policy.** A peer is judged by every name of its [`group`](Self::group): a policy
///   that names it in any of these domains means it. [`canonical`](Self::canonical) is
///   the ID under which it is counted.
///
/// Hence every CA of a group is trusted to name every workload of the group.
/// Put domains into one group only if they are the same mesh, before and after
/// a renaming; for two meshes that talk to each other use federated bundles.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustDomainAliases {
    canonical: BTreeMap<TrustDomain, TrustDomain>,
}

impl TrustDomainAliases {
    /// Pairs of alias and canonical domain. Naming a pair twice is harmless.
    pub fn new(
        pairs: impl IntoIterator<Item = (TrustDomain, TrustDomain)>,
    ) -> Result<Self, AliasError> {
        let mut canonical: BTreeMap<TrustDomain, TrustDomain> = BTreeMap::new();
        for (alias, of) in pairs {
            if alias == of {
                return Err(AliasError::OfItself(alias));
            }
            match canonical.get(&alias) {
                Some(other) if *other != of => {
                    return Err(AliasError::Ambiguous {
                        alias,
                        first: other.clone(),
                        second: of,
                    });
                }
                _ => canonical.insert(alias, of),
            };
        }
        let chained = canonical
            .iter()
            .find(|(_, of)| canonical.contains_key(*of))
            .map(|(alias, of)| (alias.clone(), of.clone()));
        match chained {
            Some((alias, of)) => Err(AliasError::OfAnAlias { alias, of }),
            None => Ok(Self { canonical }),
        }
    }

    /// The name by which the domain's group is known; the domain itself when it
    /// is nobody's alias.
    pub fn canonical_domain(&self, trust_domain: &TrustDomain) -> TrustDomain {
        self.canonical
            .get(trust_domain)
            .unwrap_or(trust_domain)
            .clone()
    }

    /// Every name of the domain's group, the domain itself included.
    pub fn group<'a>(
        &'a self,
        trust_domain: &TrustDomain,
    ) -> impl Iterator<Item = TrustDomain> + use<'a> {
        let canonical = self.canonical_domain(trust_domain);
        let aliases = self
            .canonical
            .iter()
            .filter({
                let canonical = canonical.clone();
                move |(_, of)| **of == canonical
            })
            .map(|(alias, _)| alias.clone());
        std::iter::once(canonical).chain(aliases)
    }

    /// The same path in the canonical domain: what stands for the identity.
    pub fn canonical(&self, id: &SpiffeId) -> SpiffeId {
        match self.canonical.get(&id.trust_domain()) {
            Some(canonical) => id.in_trust_domain(canonical),
            None => id.clone(),
        }
    }

    /// Whether two IDs are one identity.
    pub fn same(&self, a: &SpiffeId, b: &SpiffeId) -> bool {
        a == b || (a.path() == b.path() && self.canonical(a) == self.canonical(b))
    }

    /// Whether there is no alias at all.
    pub fn is_empty(&self) -> bool {
        self.canonical.is_empty()
    }

    /// Alias and canonical domain of each pair, in order.
    pub fn pairs(&self) -> impl Iterator<Item = (&TrustDomain, &TrustDomain)> {
        self.canonical.iter()
    }
}

/// Why aliases contradict each other: the operator is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AliasError {
    /// A domain is its own name already.
    #[error("trust domain {0} is configured as an alias of itself: remove the entry")]
    OfItself(TrustDomain),
    /// One alias, two canonical domains.
    #[error(
        "trust domain {alias} is configured as an alias of both {first} and {second}: keep one"
    )]
    Ambiguous {
        /// The alias.
        alias: TrustDomain,
        /// One of them.
        first: TrustDomain,
        /// The other.
        second: TrustDomain,
    },
    /// An alias of an alias.
    #[error(
        "trust domain {alias} is an alias of {of}, which is an alias itself: name the canonical one"
    )]
    OfAnAlias {
        /// The alias.
        alias: TrustDomain,
        /// The alias it points to.
        of: TrustDomain,
    },
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn td(name: &str) -> TrustDomain {
        TrustDomain::parse(name).unwrap()
    }

    fn id(text: &str) -> SpiffeId {
        SpiffeId::parse(text).unwrap()
    }

    #[test]
    fn ids_of_one_group_are_the_same_by_path() {
        let aliases = TrustDomainAliases::new([
            (td("old"), td("new")),
            (td("older"), td("new")),
            (td("old"), td("new")),
        ])
        .unwrap();
        let new = id("spiffe://new/ns/a/sa/b");
        for same in ["spiffe://old/ns/a/sa/b", "spiffe://older/ns/a/sa/b"] {
            assert!(aliases.same(&id(same), &new) && aliases.same(&new, &id(same)));
            assert_eq!(aliases.canonical(&id(same)), new);
        }
        assert!(aliases.same(
            &id("spiffe://old/ns/a/sa/b"),
            &id("spiffe://older/ns/a/sa/b")
        ));
        assert_eq!(aliases.canonical(&new), new);
        for other in ["spiffe://old/ns/a/sa/c", "spiffe://else/ns/a/sa/b"] {
            assert!(!aliases.same(&id(other), &new), "{other}");
        }
        assert_eq!(aliases.pairs().count(), 2);
        for member in ["new", "old", "older"] {
            let group: Vec<TrustDomain> = aliases.group(&td(member)).collect();
            assert_eq!(group, [td("new"), td("old"), td("older")], "{member}");
        }
        assert!(aliases.group(&td("else")).eq([td("else")]));
    }

    #[test]
    fn without_aliases_only_equal_ids_are_the_same() {
        let aliases = TrustDomainAliases::default();
        assert!(aliases.is_empty());
        assert!(aliases.same(&id("spiffe://a/x"), &id("spiffe://a/x")));
        assert!(!aliases.same(&id("spiffe://a/x"), &id("spiffe://b/x")));
    }

    #[test]
    fn contradictions_are_refused() {
        let refused = |pairs: &[(&str, &str)]| {
            TrustDomainAliases::new(pairs.iter().map(|(a, b)| (td(a), td(b)))).unwrap_err()
        };
        assert_eq!(refused(&[("a", "a")]), AliasError::OfItself(td("a")));
        assert!(matches!(
            refused(&[("a", "b"), ("a", "c")]),
            AliasError::Ambiguous { .. }
        ));
        for pairs in [[("a", "b"), ("b", "c")], [("b", "c"), ("a", "b")]] {
            assert_eq!(
                refused(&pairs),
                AliasError::OfAnAlias {
                    alias: td("a"),
                    of: td("b")
                }
            );
        }
        assert!(matches!(
            refused(&[("a", "b"), ("b", "a")]),
            AliasError::OfAnAlias { .. }
        ));
    }
}
