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
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
struct Account {
    namespace: String,
    service_account: String,
}

impl Peer {
    /// The SPIFFE ID without `spiffe://`: what `principals` are compared with. Never empty.
    pub fn principal(&self) -> &str {
        &self.principal
    }

    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
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
        let in_trust_domain =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
        if !(1..=255).contains(&trust_domain.len()) || !trust_domain.bytes().all(in_trust_domain) {
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
