//! SPIFFE IDs, trust domains and the Kubernetes form of a workload's identity.
//!
//! Syntax: SPIFFE-ID standard, sections 2.1 to 2.4. The `spiffe` crate folds
//! upper case and sets no total length when it parses; here only the canonical
//! text is accepted, so that equal identities are always equal strings (policy
//! compares principals literally).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A valid SPIFFE ID in canonical form, with a path: `spiffe://td/segment…`.
///
/// At most 2048 bytes. An ID without a path names a trust domain, not a
/// workload, and does not parse (X.509-SVID standard, section 2).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId(spiffe::SpiffeId);

impl SpiffeId {
    /// Parses a canonical SPIFFE ID.
    pub fn parse(text: &str) -> Result<Self, InvalidSpiffeId> {
        if text.len() > MAX_SPIFFE_ID_BYTES {
            return Err(InvalidSpiffeId::TooLong(text.len()));
        }
        let id = spiffe::SpiffeId::new(text)?;
        if id.path().is_empty() {
            return Err(InvalidSpiffeId::NoPath);
        }
        if id.to_string() != text {
            return Err(InvalidSpiffeId::NotCanonical);
        }
        Ok(Self(id))
    }

    /// The trust domain whose bundle must have issued this identity.
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.0.trust_domain().clone())
    }

    /// The path, with its leading slash.
    pub fn path(&self) -> &str {
        self.0.path()
    }

    /// The ID without `spiffe://`: how Istio policies write a principal.
    pub fn principal(&self) -> String {
        format!("{}{}", self.0.trust_domain_name(), self.0.path())
    }

    /// The same path in another trust domain. Where a longer domain name would
    /// make the ID longer than 2048 bytes, the ID stays as it is.
    pub(crate) fn in_trust_domain(&self, trust_domain: &TrustDomain) -> Self {
        Self::parse(&format!("spiffe://{trust_domain}{}", self.path()))
            .unwrap_or_else(|_| self.clone())
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

/// A valid trust domain name in lower case, at most 255 bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(spiffe::TrustDomain);

impl TrustDomain {
    /// Parses a bare name (`cluster.local`); a URI is refused.
    pub fn parse(name: &str) -> Result<Self, InvalidSpiffeId> {
        let parsed = spiffe::TrustDomain::new(name)?;
        if parsed.as_str() != name {
            return Err(InvalidSpiffeId::NotCanonical);
        }
        Ok(Self(parsed))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for TrustDomain {
    type Err = InvalidSpiffeId;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::parse(name)
    }
}

/// The identity of a Kubernetes service account:
/// `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkloadIdentity(Arc<Parts>);

#[derive(PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Parts {
    id: SpiffeId,
    trust_domain: TrustDomain,
    namespace: String,
    service_account: String,
}

impl WorkloadIdentity {
    /// Makes an identity from its parts; each must be a valid path segment.
    pub fn new(
        trust_domain: TrustDomain,
        namespace: impl AsRef<str>,
        service_account: impl AsRef<str>,
    ) -> Result<Self, InvalidSpiffeId> {
        let (namespace, service_account) = (namespace.as_ref(), service_account.as_ref());
        let identity = Self::parse(&format!(
            "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"
        ))?;
        // A part with a slash in it must not come back as other parts.
        if identity.namespace() == namespace && identity.service_account() == service_account {
            Ok(identity)
        } else {
            Err(InvalidSpiffeId::NotAWorkload)
        }
    }

    /// Parses `spiffe://TD/ns/NS/sa/SA`.
    pub fn parse(text: &str) -> Result<Self, InvalidSpiffeId> {
        Self::try_from(SpiffeId::parse(text)?)
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.trust_domain
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    /// The service account's name.
    pub fn service_account(&self) -> &str {
        &self.0.service_account
    }

    /// The SPIFFE ID of this identity.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.0.id
    }
}

impl TryFrom<SpiffeId> for WorkloadIdentity {
    type Error = InvalidSpiffeId;

    fn try_from(id: SpiffeId) -> Result<Self, Self::Error> {
        let mut segments = id.path().split('/');
        let parts = (
            segments.next(),
            segments.next(),
            segments.next(),
            segments.next(),
            segments.next(),
            segments.next(),
        );
        let (Some(""), Some("ns"), Some(namespace), Some("sa"), Some(service_account), None) =
            parts
        else {
            return Err(InvalidSpiffeId::NotAWorkload);
        };
        let (namespace, service_account) = (namespace.to_owned(), service_account.to_owned());
        Ok(Self(Arc::new(Parts {
            trust_domain: id.trust_domain(),
            namespace,
            service_account,
            id,
        })))
    }
}

impl fmt::Display for WorkloadIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.id, f)
    }
}

impl fmt::Debug for WorkloadIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.id, f)
    }
}

impl FromStr for WorkloadIdentity {
    type Err = InvalidSpiffeId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

/// Why a text is not the name it should be.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidSpiffeId {
    /// Not a SPIFFE ID or trust domain by the standard's grammar.
    #[error("not a SPIFFE ID: {0}")]
    Syntax(#[from] spiffe::SpiffeIdError),
    /// Longer than the standard allows.
    #[error("a SPIFFE ID has at most {MAX_SPIFFE_ID_BYTES} bytes, not {0}")]
    TooLong(usize),
    /// Upper case in the scheme or the trust domain, or a URI where a name belongs.
    #[error(
        "not in canonical form (scheme and trust domain are lower case, a trust domain is a bare name)"
    )]
    NotCanonical,
    /// Names a trust domain only.
    #[error("the ID names a trust domain, not a workload: it has no path")]
    NoPath,
    /// Valid, but not a Kubernetes service account.
    #[error("not of the form spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT")]
    NotAWorkload,
}

/// SPIFFE-ID standard, section 2.3.
const MAX_SPIFFE_ID_BYTES: usize = 2048;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn canonical_ids_parse_and_print_unchanged() {
        for text in [
            "spiffe://cluster.local/ns/default/sa/web",
            "spiffe://td/x",
            "spiffe://a_b-c.d1/A/b.c_d-e/...",
        ] {
            let id = SpiffeId::parse(text).unwrap();
            assert_eq!(id.to_string(), text);
            assert_eq!(id.principal(), &text["spiffe://".len()..]);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let too_long = format!("spiffe://td/{}", "a".repeat(2037));
        let long_domain = format!("spiffe://{}/a", "d".repeat(256));
        for text in [
            "",
            "spiffe://",
            "spiffe:///path",
            "spiffe://td",
            "spiffe://td/",
            "spiffe://td/a/",
            "spiffe://td//a",
            "spiffe://td/./a",
            "spiffe://td/../a",
            "SPIFFE://td/a",
            "Spiffe://td/a",
            "spiffe://TD/a",
            "http://td/a",
            "https://spiffe://td/a",
            "spiffe:/td/a",
            "spiffe://td:80/a",
            "spiffe://user@td/a",
            "spiffe://td/a?q",
            "spiffe://td/a#f",
            "spiffe://td/%41",
            "spiffe://td/a b",
            "spiffe://td/\u{e9}",
            "spiffe://t\u{e4}/a",
            "spiffe://td/a\0",
            "spiffe://td/a\n",
            " spiffe://td/a",
            "spiffe://td/a ",
            "spiffe://*/a",
            "spiffe://td/*",
            &too_long,
            &long_domain,
        ] {
            assert!(SpiffeId::parse(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn the_longest_id_parses() {
        let text = format!("spiffe://td/{}", "a".repeat(2036));
        assert_eq!(text.len(), 2048);
        SpiffeId::parse(&text).unwrap();
    }

    #[test]
    fn trust_domains_are_bare_lower_case_names() {
        assert_eq!(
            TrustDomain::parse("cluster.local").unwrap().as_str(),
            "cluster.local"
        );
        for text in [
            "",
            "Cluster.local",
            "spiffe://cluster.local",
            "a/b",
            "a:b",
            "a b",
        ] {
            assert!(TrustDomain::parse(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn workload_identity_is_exactly_ns_and_sa() {
        let identity = WorkloadIdentity::parse("spiffe://td/ns/shop/sa/cart").unwrap();
        assert_eq!(identity.trust_domain().as_str(), "td");
        assert_eq!(identity.namespace(), "shop");
        assert_eq!(identity.service_account(), "cart");
        for text in [
            "spiffe://td/ns/shop",
            "spiffe://td/ns/shop/sa",
            "spiffe://td/ns/shop/sa/cart/more",
            "spiffe://td/sa/cart/ns/shop",
            "spiffe://td/NS/shop/SA/cart",
            "spiffe://td/workload/db",
        ] {
            assert_eq!(
                WorkloadIdentity::parse(text),
                Err(InvalidSpiffeId::NotAWorkload)
            );
        }
    }

    #[test]
    fn parts_cannot_smuggle_in_other_parts() {
        let td = || TrustDomain::parse("td").unwrap();
        for (namespace, account) in [
            ("a/sa/b", "c"),
            ("a", "b/c"),
            ("", "b"),
            ("a", ""),
            ("..", "b"),
            ("a b", "c"),
        ] {
            assert!(WorkloadIdentity::new(td(), namespace, account).is_err());
        }
        assert!(WorkloadIdentity::new(td(), "a", "b").is_ok());
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_accepts_only_what_prints_back(text in "\\PC{0,64}") {
            if let Ok(id) = SpiffeId::parse(&text) {
                prop_assert_eq!(id.to_string(), text);
            }
        }

        #[test]
        fn near_misses_never_parse_to_something_else(
            text in "[sS]piffe://[a-zA-Z0-9._/:@-]{0,20}(/[a-z./%?#-]{0,8}){0,5}",
        ) {
            if let Ok(id) = SpiffeId::parse(&text) {
                prop_assert_eq!(id.to_string(), text);
            }
        }

        #[test]
        fn workload_identities_round_trip(
            td in "[a-z0-9][a-z0-9._-]{0,20}",
            ns in "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?",
            sa in "[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?",
        ) {
            let identity =
                WorkloadIdentity::new(TrustDomain::parse(&td).unwrap(), &ns, &sa).unwrap();
            prop_assert_eq!(&WorkloadIdentity::parse(&identity.to_string()).unwrap(), &identity);
            prop_assert_eq!(identity.namespace(), ns);
            prop_assert_eq!(identity.service_account(), sa);
        }
    }
}
