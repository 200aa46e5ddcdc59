//! From manifests to what an ambient node is sent.

mod authorization;
mod peer_authentication;

use std::collections::{BTreeMap, BTreeSet};

use ringfence_policies::{Policy, PolicyName};

use crate::{Manifests, Place, Selector, Warning};
use peer_authentication::Modes;

/// What becomes of a DENY rule with conditions that L4 cannot check. ALLOW rules with
/// such conditions are left out in both cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum L7Handling {
    /// As Istiod: an alternative that has only such conditions never matches, so that the
    /// rule may deny **nothing**; others hold without them.
    #[default]
    IstioExact,
    /// The conditions are dropped: the rule denies at least what it says, and more.
    DenyAsL4,
}

/// Policies to be served, and which workloads name them.
#[derive(Clone, Debug, PartialEq)]
pub struct Converted {
    /// What is worth knowing, in the order of the manifests.
    pub warnings: Vec<Warning>,
    authorization: Vec<ConvertedPolicy>,
    modes: Modes,
    root_namespace: String,
}

/// A policy, and what it was made of.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvertedPolicy {
    pub policy: Policy,
    /// The workloads that [`Converted::attached`] names it for; `None` when it holds for
    /// its namespace or the mesh.
    pub selector: Option<Selector>,
    pub from: Place,
}

/// Converts all of them. `root_namespace` is the mesh's, `istio-system` in Istio.
pub fn convert(manifests: &Manifests, root_namespace: &str, l7: L7Handling) -> Converted {
    let mut warnings = manifests.notices.clone();
    let authorization = manifests
        .authorization
        .iter()
        .filter_map(|policy| authorization::convert(policy, root_namespace, l7, &mut warnings))
        .collect();
    let modes = Modes::new(
        &manifests.peer_authentication,
        root_namespace,
        &mut warnings,
    );
    Converted {
        warnings,
        authorization,
        modes,
        root_namespace: root_namespace.to_owned(),
    }
}

impl Converted {
    /// All policies. The one that stands for STRICT is not among them: agents know it by
    /// its name.
    pub fn policies(&self) -> impl Iterator<Item = &ConvertedPolicy> {
        self.authorization.iter().chain(self.modes.policies())
    }

    /// The policies that a workload of `namespace` with these `labels` has to name: those
    /// that select it, and those its PeerAuthentication became. Those of its namespace and
    /// the global ones hold without being named.
    pub fn attached(
        &self,
        namespace: &str,
        labels: &BTreeMap<String, String>,
    ) -> BTreeSet<PolicyName> {
        let selecting = self.authorization.iter().filter(|converted| {
            let of = &converted.policy.name.namespace;
            let selects = converted.selector.as_ref().map(|s| s.selects(labels));
            (of == namespace || *of == self.root_namespace) && selects == Some(true)
        });
        let mut names: BTreeSet<_> = selecting.map(|c| c.policy.name.clone()).collect();
        names.extend(self.modes.attached(namespace, labels));
        names
    }
}
