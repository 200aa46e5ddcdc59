//! What is wrong with a manifest, and what a conversion loses.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use ringfence_policies::{PolicyName, ValueError};

/// A place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub file: Arc<Path>,
    /// From 1; 0 when the place is not known.
    pub line: u64,
    /// From 1, in characters; 0 when the place is not known.
    pub column: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line != 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        Ok(())
    }
}

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestError {
    pub at: Place,
    /// `AuthorizationPolicy demo/web`, or `document 3` for one that has no name.
    pub resource: String,
    /// As in `spec.rules[0].to[0].operation.ports[1]`; empty for the document as a whole.
    pub field: String,
    pub problem: Problem,
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        located(f, &self.at, &self.resource, &self.field, &self.problem)
    }
}

impl std::error::Error for ManifestError {}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    #[error("{0}")]
    Syntax(String),
    #[error("unknown field `{name}`: expected one of {}", known.join(", "))]
    UnknownField {
        name: String,
        known: &'static [&'static str],
    },
    #[error("is {found}, expected {expected}{}", quote(found, expected))]
    Type {
        found: &'static str,
        expected: &'static str,
    },
    #[error("is missing")]
    Missing,
    #[error("is missing: kubectl would take the namespace from its context; write it")]
    MissingNamespace,
    #[error("is empty, which is no condition at all: fill it, or leave it out")]
    EmptyList,
    #[error("is empty: expected labels under `matchLabels`; leave it out to select everything")]
    EmptySelector,
    #[error("has no condition in any field, so it would match nothing")]
    NoCondition,
    #[error("`{0}` is not served: expected security.istio.io/v1 or security.istio.io/v1beta1")]
    ApiVersion(String),
    #[error("`{0}` is not a kind of security.istio.io")]
    Kind(String),
    #[error("is a `{0}`: expected AuthorizationPolicy or PeerAuthentication")]
    OtherKind(String),
    #[error("`{0}` is not a name: expected lower-case letters, digits, `-` and `.`, at most 253")]
    Name(String),
    #[error("`{0}` is not an action: expected ALLOW, DENY, AUDIT or CUSTOM")]
    Action(String),
    #[error("`{0}` is not a mode: expected UNSET, DISABLE, PERMISSIVE or STRICT")]
    Mode(String),
    #[error("`{0}` is not a port: expected a number from {1} to 65535")]
    Port(String, u16),
    #[error("`{0}` is not a condition key that Istio has")]
    Key(String),
    #[error("`{0}` is not a service account: expected NAME or NAMESPACE/NAME, without `*`")]
    ServiceAccount(String),
    #[error("`{0}` would never match: write principals without the scheme `spiffe://`")]
    Scheme(String),
    #[error("`{0}` is neither true nor false")]
    Bool(String),
    #[error("`{0}` is not a time: expected like 2026-01-31T08:00:00Z")]
    Time(String),
    #[error("`{0}` has a `*`: selectors compare labels literally")]
    SelectorWildcard(String),
    #[error("cannot be combined with `{0}`")]
    Exclusive(&'static str),
    #[error("goes with `action: CUSTOM` only")]
    Provider,
    #[error("are missing, so nothing would ever be denied: `rules: [{{}}]` denies everything")]
    DenyWithoutRules,
    #[error("needs a `selector`: modes of single ports cannot hold for a namespace or the mesh")]
    PortsWithoutSelector,
    #[error("is there already, at {0}")]
    Duplicate(Place),
    #[error(transparent)]
    Value(#[from] ValueError),
}

/// Something that a reader of the manifests would not expect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    pub at: Place,
    pub resource: String,
    pub field: String,
    pub kind: WarningKind,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        located(f, &self.at, &self.resource, &self.field, &self.kind)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WarningKind {
    /// Another kind, of this `apiVersion`: skipped.
    OtherKind { api_version: String },
    /// Bits beyond a prefix were set; read as this.
    HostBits { read_as: String },
    /// A DENY policy whose list of rules is empty.
    DeniesNothing,
    /// The policy has no part at L4.
    NotSent(NotSent),
    /// A condition that L4 cannot check.
    Lost(LostCondition),
    /// An ALLOW policy of which no rule is left: it still refuses what others do not admit.
    NoRuleLeft,
    /// A selector of the root namespace's PeerAuthentication: without effect.
    RootSelector,
    /// DISABLE, read as PERMISSIVE.
    Disable,
    /// DISABLE of a port has no effect here: the port stays STRICT.
    PortStaysStrict,
    /// Another PeerAuthentication of the same scope is older, or comes first.
    Older(PolicyName),
}

/// Why a policy has no part at L4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotSent {
    Audit,
    Custom,
    TargetRef,
}

/// What becomes of a rule with a condition that L4 cannot check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostCondition {
    /// The ALLOW rule is left out: less is admitted than is written.
    AllowRule,
    /// The DENY rule never matches: **less is denied than is written**.
    DenyRuleInert,
    /// This alternative of a DENY rule never matches: **less is denied than is written**.
    DenyAlternativeInert,
    /// The DENY rule holds without the condition: more is denied than is written.
    DenyWidened,
}

impl fmt::Display for WarningKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            WarningKind::OtherKind { api_version } => {
                return write!(f, "skipped: not a policy ({api_version})");
            }
            WarningKind::HostBits { read_as } => {
                return write!(f, "has bits beyond its prefix: read as {read_as}");
            }
            WarningKind::Older(name) => {
                return write!(f, "has no effect: {name} has the same scope and is older");
            }
            WarningKind::DeniesNothing => "is empty: a DENY policy without rules denies nothing",
            WarningKind::NotSent(NotSent::Audit) => "AUDIT is not enforced at L4: left out",
            WarningKind::NotSent(NotSent::Custom) => "CUSTOM is not enforced at L4: left out",
            WarningKind::NotSent(NotSent::TargetRef) => {
                "the policy is for a waypoint or gateway: left out"
            }
            WarningKind::Lost(LostCondition::AllowRule) => {
                "cannot be checked at L4: the ALLOW rule is left out, what it would admit is refused"
            }
            WarningKind::Lost(LostCondition::DenyRuleInert) => {
                "cannot be checked at L4: the DENY rule never matches, what it would refuse is \
                 not refused here (`deny-as-l4` refuses it)"
            }
            WarningKind::Lost(LostCondition::DenyAlternativeInert) => {
                "cannot be checked at L4: this alternative of the DENY rule never matches, what it \
                 would refuse is not refused here (`deny-as-l4` refuses it)"
            }
            WarningKind::Lost(LostCondition::DenyWidened) => {
                "cannot be checked at L4: the DENY rule holds without it and refuses more"
            }
            WarningKind::NoRuleLeft => {
                "no rule is left: the policy admits nothing, and its workloads refuse what no \
                 other ALLOW policy admits"
            }
            WarningKind::RootSelector => {
                "has no effect: in the root namespace only a PeerAuthentication without selector \
                 counts"
            }
            WarningKind::Disable => "DISABLE is read as PERMISSIVE: mutual TLS is taken as well",
            WarningKind::PortStaysStrict => {
                "has no effect, the port stays STRICT: write PERMISSIVE, or the workload's own mode"
            }
        };
        f.write_str(text)
    }
}

fn located(
    f: &mut fmt::Formatter<'_>,
    at: &Place,
    resource: &str,
    field: &str,
    what: &dyn fmt::Display,
) -> fmt::Result {
    write!(f, "{at}: {resource}: ")?;
    if !field.is_empty() {
        write!(f, "{field}: ")?;
    }
    write!(f, "{what}")
}

/// `ports: [80]` and `version: 1` look right and are refused by Kubernetes.
fn quote(found: &str, expected: &str) -> &'static str {
    if expected == "text" && matches!(found, "a number" | "true or false") {
        " (put it in quotes)"
    } else {
        ""
    }
}
