//! Authorization policies as Istio defines them for L4.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::{Cidr, Peer, ValueError};

/// One authorization policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Policy {
    pub name: PolicyName,
    pub scope: Scope,
    pub action: Action,
    /// Evaluated and reported, never enforced.
    pub dry_run: bool,
    /// Any of them; none never matches.
    pub rules: Vec<Rule>,
}

/// All of its clauses; none matches everything.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize)]
pub struct Rule {
    pub clauses: Vec<Clause>,
}

/// Any of its matches; none matches everything.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize)]
pub struct Clause {
    pub matches: Vec<Match>,
}

/// All of its fields; any of a field's values; none of a `not_` field's. An empty field
/// says nothing, and a match whose fields are all empty matches **nothing**.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize)]
pub struct Match {
    pub namespaces: Vec<StringMatch>,
    pub not_namespaces: Vec<StringMatch>,
    /// Compared with [`Peer::principals`]: without `spiffe://`, trust domain included.
    pub principals: Vec<StringMatch>,
    pub not_principals: Vec<StringMatch>,
    pub service_accounts: Vec<ServiceAccountMatch>,
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    pub source_ips: Vec<Cidr>,
    pub not_source_ips: Vec<Cidr>,
    pub destination_ips: Vec<Cidr>,
    pub not_destination_ips: Vec<Cidr>,
    /// The application's own port, never the tunnel's.
    pub destination_ports: Vec<u16>,
    pub not_destination_ports: Vec<u16>,
}

impl Match {
    /// Whether no field is set: such a match holds for nothing.
    pub fn is_empty(&self) -> bool {
        // Every field by name: a field added later does not compile until it is here.
        let Match {
            namespaces,
            not_namespaces,
            principals,
            not_principals,
            service_accounts,
            not_service_accounts,
            source_ips,
            not_source_ips,
            destination_ips,
            not_destination_ips,
            destination_ports,
            not_destination_ports,
        } = self;
        namespaces.is_empty()
            && not_namespaces.is_empty()
            && principals.is_empty()
            && not_principals.is_empty()
            && service_accounts.is_empty()
            && not_service_accounts.is_empty()
            && source_ips.is_empty()
            && not_source_ips.is_empty()
            && destination_ips.is_empty()
            && not_destination_ips.is_empty()
            && destination_ports.is_empty()
            && not_destination_ports.is_empty()
    }
}

/// A string pattern. Build it with the constructors, which refuse empty strings.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StringMatch {
    Exact(String),
    Prefix(String),
    Suffix(String),
    /// Any string that is there at all.
    Presence,
}

impl StringMatch {
    pub fn exact(text: impl Into<String>) -> Result<Self, ValueError> {
        non_empty(text.into()).map(StringMatch::Exact)
    }

    pub fn prefix(text: impl Into<String>) -> Result<Self, ValueError> {
        non_empty(text.into()).map(StringMatch::Prefix)
    }

    pub fn suffix(text: impl Into<String>) -> Result<Self, ValueError> {
        non_empty(text.into()).map(StringMatch::Suffix)
    }

    /// Whether a string that is there matches. Callers decide what an absent string
    /// means: it matches no pattern.
    pub fn matches(&self, text: &str) -> bool {
        match self {
            StringMatch::Exact(exact) => text == exact,
            StringMatch::Prefix(prefix) => text.starts_with(prefix.as_str()),
            StringMatch::Suffix(suffix) => text.ends_with(suffix.as_str()),
            StringMatch::Presence => !text.is_empty(),
        }
    }
}

impl FromStr for StringMatch {
    type Err = ValueError;

    /// As operators write it: `x`, `x*`, `*x` or `*`. A `*` elsewhere is an error:
    /// Istio would compare it literally, which nobody means.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (rest, pattern): (&str, fn(String) -> StringMatch) = if text == "*" {
            return Ok(StringMatch::Presence);
        } else if let Some(rest) = text.strip_prefix('*') {
            (rest, StringMatch::Suffix)
        } else if let Some(rest) = text.strip_suffix('*') {
            (rest, StringMatch::Prefix)
        } else {
            (text, StringMatch::Exact)
        };
        if rest.contains('*') {
            return Err(ValueError::Wildcard(text.to_owned()));
        }
        non_empty(rest.to_owned()).map(pattern)
    }
}

impl fmt::Display for StringMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StringMatch::Exact(exact) => f.write_str(exact),
            StringMatch::Prefix(prefix) => write!(f, "{prefix}*"),
            StringMatch::Suffix(suffix) => write!(f, "*{suffix}"),
            StringMatch::Presence => f.write_str("*"),
        }
    }
}

/// A Kubernetes service account, in any trust domain.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct ServiceAccountMatch {
    pub namespace: String,
    pub service_account: String,
}

impl ServiceAccountMatch {
    pub fn new(
        namespace: impl Into<String>,
        service_account: impl Into<String>,
    ) -> Result<Self, ValueError> {
        let (namespace, service_account) = (namespace.into(), service_account.into());
        if namespace.is_empty() || service_account.is_empty() {
            return Err(ValueError::ServiceAccount);
        }
        Ok(ServiceAccountMatch {
            namespace,
            service_account,
        })
    }

    /// Whether `peer` is this account. Both are compared literally.
    pub fn matches(&self, peer: &Peer) -> bool {
        peer.namespace() == Some(self.namespace.as_str())
            && peer.service_account() == Some(self.service_account.as_str())
    }
}

/// A port from the wire, where it has 32 bits: cutting it would match another port.
pub fn port(number: u32) -> Result<u16, ValueError> {
    u16::try_from(number).map_err(|_| ValueError::Port(number))
}

/// Which workloads a policy applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// All.
    Global,
    /// Those of the policy's namespace.
    Namespace,
    /// Those that name it.
    WorkloadSelector,
}

impl Scope {
    /// From its number in `istio.security.Scope`.
    pub fn from_wire(number: i32) -> Result<Self, ValueError> {
        match number {
            0 => Ok(Scope::Global),
            1 => Ok(Scope::Namespace),
            2 => Ok(Scope::WorkloadSelector),
            _ => Err(ValueError::Scope(number)),
        }
    }
}

/// What a match means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    Allow,
    Deny,
}

impl Action {
    /// From its number in `istio.security.Action`.
    pub fn from_wire(number: i32) -> Result<Self, ValueError> {
        match number {
            0 => Ok(Action::Allow),
            1 => Ok(Action::Deny),
            _ => Err(ValueError::Action(number)),
        }
    }
}

/// `namespace/name`, which is also the policy's xDS resource name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(into = "String")]
pub struct PolicyName {
    pub namespace: String,
    pub name: String,
}

impl PolicyName {
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        PolicyName {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl FromStr for PolicyName {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.split_once('/') {
            Some((namespace, name)) if !name.is_empty() && !name.contains('/') => {
                Ok(PolicyName::new(namespace, name))
            }
            _ => Err(ValueError::Name(text.to_owned())),
        }
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl From<PolicyName> for String {
    fn from(name: PolicyName) -> String {
        name.to_string()
    }
}

impl Policy {
    /// What a status page shows.
    pub fn summary(&self) -> PolicySummary {
        PolicySummary {
            name: self.name.clone(),
            action: self.action,
            scope: self.scope,
            dry_run: self.dry_run,
            rules: self.rules.len(),
        }
    }
}

/// A policy in one line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PolicySummary {
    pub name: PolicyName,
    pub action: Action,
    pub scope: Scope,
    pub dry_run: bool,
    /// How many rules it has.
    pub rules: usize,
}

impl fmt::Display for PolicySummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let action = match self.action {
            Action::Allow => "ALLOW",
            Action::Deny => "DENY",
        };
        let scope = match self.scope {
            Scope::Global => "all workloads",
            Scope::Namespace => "its namespace",
            Scope::WorkloadSelector => "selected workloads",
        };
        let rules = match self.rules {
            0 => "no rules (never matches)".to_owned(),
            1 => "1 rule".to_owned(),
            n => format!("{n} rules"),
        };
        let dry_run = if self.dry_run { ", dry run" } else { "" };
        write!(f, "{}: {action}, {scope}, {rules}{dry_run}", self.name)
    }
}

fn non_empty(text: String) -> Result<String, ValueError> {
    if text.is_empty() {
        Err(ValueError::EmptyString)
    } else {
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn patterns_match_what_they_say_and_nothing_else() {
        for (pattern, yes, no) in [
            ("td/ns/a/sa/b", "td/ns/a/sa/b", "td/ns/a/sa/bb"),
            ("td/ns/a/*", "td/ns/a/sa/b", "td2/ns/a/sa/b"),
            ("*/sa/b", "td/ns/a/sa/b", "td/ns/a/sa/b2"),
            ("*", "x", ""),
        ] {
            let parsed: StringMatch = pattern.parse().unwrap();
            assert!(parsed.matches(yes), "{pattern} {yes}");
            assert!(!parsed.matches(no), "{pattern} {no}");
            assert_eq!(parsed.to_string(), pattern);
        }
    }

    #[test]
    fn pattern_without_meaning_is_refused() {
        for text in ["", "**", "a*b", "*a*", "a**"] {
            assert!(text.parse::<StringMatch>().is_err(), "{text}");
        }
        assert_eq!(StringMatch::exact(""), Err(ValueError::EmptyString));
        assert_eq!(StringMatch::prefix(""), Err(ValueError::EmptyString));
        assert_eq!(StringMatch::suffix(""), Err(ValueError::EmptyString));
        assert!(StringMatch::exact("a*b").is_ok_and(|m| m.matches("a*b") && !m.matches("axb")));
    }

    #[test]
    fn service_account_ignores_the_trust_domain_and_nothing_else() {
        let account = ServiceAccountMatch::new("a", "b").unwrap();
        for (id, expected) in [
            ("spiffe://td/ns/a/sa/b", true),
            ("spiffe://other/ns/a/sa/b", true),
            ("spiffe://td/ns/b/sa/a", false),
            ("spiffe://td/ns/a/sa/bb", false),
            ("spiffe://td/a/b", false),
        ] {
            assert_eq!(account.matches(&id.parse().unwrap()), expected, "{id}");
        }
        assert_eq!(
            ServiceAccountMatch::new("a", ""),
            Err(ValueError::ServiceAccount)
        );
        assert_eq!(
            ServiceAccountMatch::new("", "b"),
            Err(ValueError::ServiceAccount)
        );
    }

    #[test]
    fn port_beyond_16_bits_is_refused_and_not_cut() {
        assert_eq!(port(0), Ok(0));
        assert_eq!(port(65535), Ok(65535));
        assert_eq!(port(65536 + 80), Err(ValueError::Port(65616)));
    }

    #[test]
    fn numbers_from_the_wire_are_checked() {
        assert_eq!(Scope::from_wire(2), Ok(Scope::WorkloadSelector));
        assert_eq!(Scope::from_wire(3), Err(ValueError::Scope(3)));
        assert_eq!(Action::from_wire(1), Ok(Action::Deny));
        assert_eq!(Action::from_wire(-1), Err(ValueError::Action(-1)));
    }

    #[test]
    fn policy_name_needs_exactly_one_slash() {
        assert_eq!("a/b".parse(), Ok(PolicyName::new("a", "b")));
        for text in ["", "a", "a/", "a/b/c"] {
            assert!(text.parse::<PolicyName>().is_err(), "{text}");
        }
    }

    #[test]
    fn summary_reads_like_a_sentence() {
        let policy = Policy {
            name: PolicyName::new("shop", "cart"),
            scope: Scope::Namespace,
            action: Action::Deny,
            dry_run: true,
            rules: vec![Rule::default()],
        };
        assert_eq!(
            policy.summary().to_string(),
            "shop/cart: DENY, its namespace, 1 rule, dry run"
        );
    }

    #[test]
    fn error_names_policy_field_and_value() {
        let error = "10.0.0.0/40".parse::<Cidr>().unwrap_err().at(
            &PolicyName::new("shop", "cart"),
            "rules[0].clauses[1].matches[0].source_ips",
        );
        assert_eq!(
            error.to_string(),
            "policy shop/cart: rules[0].clauses[1].matches[0].source_ips: \
             prefix length 40 is out of range; this family has at most 32"
        );
    }
}
