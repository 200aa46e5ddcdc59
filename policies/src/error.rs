//! What can be wrong with a policy (the operator's or the control plane's fault) and
//! with an identity (the peer's).

use crate::PolicyName;

/// One value of a policy that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    #[error("`{0}` is not an IP prefix; write for example 10.0.0.0/8, 10.1.2.3 or fd00::/8")]
    NotAPrefix(String),
    #[error("an address has 4 or 16 bytes, not {0}")]
    AddressBytes(usize),
    #[error("prefix length {length} is out of range; this family has at most {max}")]
    PrefixLength { length: u32, max: u8 },
    #[error("`{0}` is an IPv4-mapped IPv6 prefix, which no connection can match; write it as IPv4")]
    MappedPrefix(String),
    #[error("port {0} is out of range (0 to 65535)")]
    Port(u32),
    #[error("an empty string matches nothing; write `*` for \"any\"")]
    EmptyString,
    #[error("the match has no kind (exact, prefix, suffix or presence)")]
    NoMatchKind,
    #[error("`{0}` has a `*` that is neither its first nor its last character")]
    Wildcard(String),
    #[error("a service account needs a namespace and a name")]
    ServiceAccount,
    #[error("scope {0} is not known")]
    Scope(i32),
    #[error("action {0} is not known")]
    Action(i32),
    #[error("`{0}` is not a policy name of the form namespace/name")]
    Name(String),
}

impl ValueError {
    /// Says where the value stands, for example `rules[0].clauses[1].matches[0].source_ips`.
    pub fn at(self, policy: &PolicyName, path: impl Into<String>) -> PolicyError {
        PolicyError {
            policy: policy.clone(),
            path: path.into(),
            problem: self,
        }
    }
}

/// A policy that cannot be used as it stands.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("policy {policy}: {path}: {problem}")]
pub struct PolicyError {
    pub policy: PolicyName,
    /// The field, in the notation of the policy's own structure.
    pub path: String,
    pub problem: ValueError,
}

/// A string that is not a SPIFFE ID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    #[error("`{0}` does not begin with spiffe://")]
    Scheme(String),
    #[error("`{0}` has no valid trust domain (a-z, 0-9, `.`, `-`, `_`; at most 255 characters)")]
    TrustDomain(String),
    #[error(
        "`{0}` has a path segment that is empty, `.`, `..` or has a character outside a-z A-Z 0-9 . - _"
    )]
    Path(String),
    #[error("a SPIFFE ID has at most 2048 bytes, this one has {0}")]
    TooLong(usize),
}
