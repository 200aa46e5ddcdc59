//! The peer's identity as policies see it.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::PeerError;

/// An identity that has already been verified, split into what policies compare.
///
/// This type parses; it proves nothing. Make it from an identity that the certificate
/// verifier has accepted, never from anything the peer merely says.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Peer {
    principal: String,
    trust_domain: String,
    account: Option<Account>,
    /// The principals under which the same identity is known in other trust domains.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    aliases: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
struct Account {
    namespace: String,
    service_account: String,
}

impl Peer {
    /// The SPIFFE ID without `spiffe://`. Never empty.
    pub fn principal(&self) -> &str {
        &self.principal
    }

    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// Every name that `principals` are compared with: a positive list holds when it has
    /// any of them, and so does what a `not_` list excludes.
    pub fn principals(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.principal)
            .chain(&self.aliases)
            .map(String::as_str)
    }

    /// The same identity, known by the same path in these trust domains too.
    ///
    /// For trust-domain aliases, which are local configuration: whichever name of the
    /// trust domain a policy was written with, before or after a renaming, it means this
    /// peer. Without that a DENY policy that has the other name would admit it.
    pub fn with_aliases<T: AsRef<str>>(
        mut self,
        trust_domains: impl IntoIterator<Item = T>,
    ) -> Result<Self, PeerError> {
        let path = self.principal.split_once('/').map(|(_, path)| path);
        let suffix = path.map_or_else(String::new, |path| format!("/{path}"));
        for trust_domain in trust_domains {
            let trust_domain = trust_domain.as_ref();
            if !is_trust_domain(trust_domain) {
                return Err(PeerError::TrustDomain(trust_domain.to_owned()));
            }
            let principal = format!("{trust_domain}{suffix}");
            if !self.principals().any(|known| known == principal) {
                self.aliases.push(principal);
            }
        }
        self.aliases.sort_unstable();
        Ok(self)
    }

    /// The Kubernetes namespace, for an ID of the form `spiffe://TD/ns/NS/sa/SA`.
    pub fn namespace(&self) -> Option<&str> {
        self.account
            .as_ref()
            .map(|account| account.namespace.as_str())
    }

    /// The Kubernetes service account, for an ID of the form `spiffe://TD/ns/NS/sa/SA`.
    pub fn service_account(&self) -> Option<&str> {
        self.account
            .as_ref()
            .map(|account| account.service_account.as_str())
    }
}

impl FromStr for Peer {
    type Err = PeerError;

    /// Parses a SPIFFE ID (SPIFFE-ID §2). Comparison is literal, so nothing is
    /// normalized: an upper-case trust domain is an error and not another spelling.
    fn from_str(id: &str) -> Result<Self, PeerError> {
        if id.len() > MAX_ID_BYTES {
            return Err(PeerError::TooLong(id.len()));
        }
        let Some(principal) = id.strip_prefix("spiffe://") else {
            return Err(PeerError::Scheme(id.to_owned()));
        };
        let (trust_domain, path) = match principal.split_once('/') {
            Some((trust_domain, path)) => (trust_domain, Some(path)),
            None => (principal, None),
        };
        if !is_trust_domain(trust_domain) {
            return Err(PeerError::TrustDomain(id.to_owned()));
        }
        if path.is_some_and(|path| !path.split('/').all(is_segment)) {
            return Err(PeerError::Path(id.to_owned()));
        }
        let account = path.and_then(|path| {
            let mut segments = path.split('/');
            match (
                segments.next(),
                segments.next(),
                segments.next(),
                segments.next(),
                segments.next(),
            ) {
                (Some("ns"), Some(namespace), Some("sa"), Some(service_account), None) => {
                    Some(Account {
                        namespace: namespace.to_owned(),
                        service_account: service_account.to_owned(),
                    })
                }
                _ => None,
            }
        });
        Ok(Peer {
            principal: principal.to_owned(),
            trust_domain: trust_domain.to_owned(),
            account,
            aliases: Vec::new(),
        })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}", self.principal)
    }
}

/// SPIFFE-ID §2.3: the most that every implementation must take.
const MAX_ID_BYTES: usize = 2048;

fn is_trust_domain(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
    (1..=255).contains(&name.len()) && name.bytes().all(allowed)
}

fn is_segment(segment: &str) -> bool {
    !matches!(segment, "" | "." | "..")
        && segment
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn kubernetes_id_has_all_parts() {
        let peer: Peer = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
        assert_eq!(peer.principal(), "cluster.local/ns/shop/sa/cart");
        assert_eq!(peer.trust_domain(), "cluster.local");
        assert_eq!(peer.namespace(), Some("shop"));
        assert_eq!(peer.service_account(), Some("cart"));
        assert_eq!(peer.to_string(), "spiffe://cluster.local/ns/shop/sa/cart");
    }

    #[test]
    fn id_of_another_shape_has_a_principal_only() {
        for id in [
            "spiffe://td",
            "spiffe://td/vm/web",
            "spiffe://td/ns/shop/sa/cart/extra",
            "spiffe://td/x/ns/shop/sa/cart",
            "spiffe://td/ns/shop",
            "spiffe://td/NS/shop/SA/cart",
            "spiffe://td/sa/cart/ns/shop",
        ] {
            let peer: Peer = id.parse().unwrap();
            assert_eq!(
                (peer.namespace(), peer.service_account()),
                (None, None),
                "{id}"
            );
            assert_eq!(format!("spiffe://{}", peer.principal()), id);
        }
    }

    #[test]
    fn aliases_are_other_names_with_the_same_path() {
        let peer: Peer = "spiffe://new/ns/shop/sa/cart".parse().unwrap();
        let known = peer
            .clone()
            .with_aliases(["old", "new", "old", "older"])
            .unwrap();
        assert_eq!(
            known.principals().collect::<Vec<_>>(),
            [
                "new/ns/shop/sa/cart",
                "old/ns/shop/sa/cart",
                "older/ns/shop/sa/cart"
            ]
        );
        assert_eq!(known.principal(), peer.principal());
        assert_eq!(known.namespace(), Some("shop"));
        assert_eq!(peer.principals().count(), 1);
        let bare: Peer = "spiffe://new".parse().unwrap();
        let bare = bare.with_aliases(["old"]).unwrap();
        assert_eq!(bare.principals().collect::<Vec<_>>(), ["new", "old"]);
    }

    #[test]
    fn alias_that_is_no_trust_domain_is_refused() {
        let peer: Peer = "spiffe://new/ns/shop/sa/cart".parse().unwrap();
        for name in ["", "OLD", "old/ns", "*"] {
            assert!(peer.clone().with_aliases([name]).is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_no_spiffe_id_is_refused() {
        for id in [
            "",
            "td/ns/a/sa/b",
            "https://td/ns/a/sa/b",
            "SPIFFE://td/ns/a/sa/b",
            "spiffe://",
            "spiffe:///ns/a/sa/b",
            "spiffe://TD/ns/a/sa/b",
            "spiffe://td:8080/ns/a/sa/b",
            "spiffe://user@td/ns/a/sa/b",
            "spiffe://td/",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns//sa/b",
            "spiffe://td/ns/../sa/b",
            "spiffe://td/ns/a%2fb/sa/c",
            "spiffe://td/ns/a/sa/b?x",
            "spiffe://td/ns/a/sa/b#x",
            "spiffe://td/ns/a/sa/b\0",
            "spiffe://td/ns/a/sa/b spiffe://x",
        ] {
            assert!(id.parse::<Peer>().is_err(), "{id}");
        }
        let long = format!("spiffe://td/{}", "a".repeat(2048));
        assert_eq!(long.parse::<Peer>(), Err(PeerError::TooLong(long.len())));
        assert!(
            format!("spiffe://{}/a", "a".repeat(256))
                .parse::<Peer>()
                .is_err()
        );
    }
}
