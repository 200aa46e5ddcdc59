//! Manifests that were read: valid, and not converted yet.

use std::collections::{BTreeMap, HashMap};

use ringfence_policies::{Match, PolicyName};

use crate::node::Spot;
use crate::{ManifestError, Place, Problem, Warning};

/// The policies of any number of files.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Manifests {
    pub(crate) authorization: Vec<AuthorizationPolicy>,
    pub(crate) peer_authentication: Vec<PeerAuthentication>,
    pub(crate) notices: Vec<Warning>,
    seen: HashMap<(&'static str, PolicyName), Place>,
}

impl Manifests {
    /// In the order of the files.
    pub fn authorization_policies(&self) -> impl Iterator<Item = &AuthorizationPolicy> {
        self.authorization.iter()
    }

    /// In the order of the files.
    pub fn peer_authentications(&self) -> impl Iterator<Item = &PeerAuthentication> {
        self.peer_authentication.iter()
    }

    /// Adds what another file has. The errors are resources that both have.
    pub fn merge(&mut self, other: Manifests) -> Result<(), Vec<ManifestError>> {
        let mut errors = Vec::new();
        for policy in other.authorization {
            errors.extend(self.add_authorization(policy).err());
        }
        for policy in other.peer_authentication {
            errors.extend(self.add_peer_authentication(policy).err());
        }
        self.notices.extend(other.notices);
        if errors.is_empty() {
            Ok(())
        } else {
            Err(errors)
        }
    }

    pub(crate) fn add_authorization(
        &mut self,
        policy: AuthorizationPolicy,
    ) -> Result<(), ManifestError> {
        self.unique("AuthorizationPolicy", &policy.name, &policy.at)?;
        self.authorization.push(policy);
        Ok(())
    }

    /// Adds one that does not come from a manifest, too.
    pub fn add_peer_authentication(
        &mut self,
        policy: PeerAuthentication,
    ) -> Result<(), ManifestError> {
        self.unique("PeerAuthentication", &policy.name, &policy.at)?;
        self.peer_authentication.push(policy);
        Ok(())
    }

    fn unique(
        &mut self,
        kind: &'static str,
        name: &PolicyName,
        at: &Place,
    ) -> Result<(), ManifestError> {
        match self.seen.insert((kind, name.clone()), at.clone()) {
            None => Ok(()),
            Some(earlier) => Err(ManifestError {
                at: at.clone(),
                resource: format!("{kind} {name}"),
                field: "metadata.name".to_owned(),
                problem: Problem::Duplicate(earlier),
            }),
        }
    }
}

/// Labels that a workload must have, all of them; at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector {
    labels: BTreeMap<String, String>,
}

impl Selector {
    /// `None` without labels: whether that selects everything or nothing is not agreed on.
    pub fn new(labels: BTreeMap<String, String>) -> Option<Self> {
        (!labels.is_empty()).then_some(Selector { labels })
    }

    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.labels
    }

    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.labels
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// An `AuthorizationPolicy`.
#[derive(Clone, Debug, PartialEq)]
pub struct AuthorizationPolicy {
    pub(crate) name: PolicyName,
    pub(crate) at: Place,
    pub(crate) selector: Option<Selector>,
    pub(crate) action: Action,
    pub(crate) action_at: Spot,
    /// The field that says so, and its place, when the policy is for a waypoint.
    pub(crate) target: Option<(&'static str, Spot)>,
    pub(crate) dry_run: bool,
    pub(crate) rules: Vec<Rule>,
}

impl AuthorizationPolicy {
    pub fn name(&self) -> &PolicyName {
        &self.name
    }

    /// Where its name is written.
    pub fn place(&self) -> &Place {
        &self.at
    }

    pub fn selector(&self) -> Option<&Selector> {
        self.selector.as_ref()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Allow,
    Deny,
    Audit,
    Custom,
}

/// One of `from`, one of `to`, all of `when`; an empty list says nothing.
#[derive(Clone, Debug, PartialEq, Default)]
pub(crate) struct Rule {
    pub from: Vec<Condition>,
    pub to: Vec<Condition>,
    pub when: Vec<Condition>,
}

/// A source, an operation or a `when`: what of it L4 can check, and what it cannot.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Condition {
    pub l4: Match,
    pub lost: Vec<Lost>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Lost {
    pub field: String,
    pub at: Spot,
}

/// Which connections a workload takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MtlsMode {
    /// As the scope around it.
    Unset,
    /// Mutual TLS only.
    Strict,
    /// Plaintext as well.
    Permissive,
    /// At L4 the same as `Permissive`.
    Disable,
}

/// A `PeerAuthentication`.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerAuthentication {
    pub(crate) name: PolicyName,
    pub(crate) at: Place,
    pub(crate) selector: Option<Selector>,
    pub(crate) mode: MtlsMode,
    pub(crate) mode_at: Spot,
    /// Only with a selector.
    pub(crate) ports: BTreeMap<u16, (MtlsMode, Spot)>,
    /// `metadata.creationTimestamp`, which sorts as text; none is newer than any.
    pub(crate) created: Option<String>,
    pub(crate) native: bool,
}

impl PeerAuthentication {
    /// One that was not written as a manifest: its selector counts in the root namespace
    /// as well. `name` must differ from all others.
    pub fn native(name: PolicyName, selector: Option<Selector>, mode: MtlsMode, at: Place) -> Self {
        let mode_at = Spot {
            line: at.line,
            column: at.column,
        };
        PeerAuthentication {
            name,
            at,
            selector,
            mode,
            mode_at,
            ports: BTreeMap::new(),
            created: None,
            native: true,
        }
    }

    pub fn name(&self) -> &PolicyName {
        &self.name
    }

    /// Where its name is written.
    pub fn place(&self) -> &Place {
        &self.at
    }

    /// `None`: for its whole namespace, or for the mesh.
    pub fn selector(&self) -> Option<&Selector> {
        self.selector.as_ref()
    }
}
