//! Which policies apply to which workload.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::{Policy, PolicyError, PolicyName, Scope};

/// Name, in the root namespace, of the policy that stands for PeerAuthentication STRICT.
/// It is known by name: a workload that names it is strict, arrived or not.
pub const STATIC_STRICT: &str = "istio_converted_static_strict";

/// Every policy that was received, usable or not.
#[derive(Debug, Clone)]
pub struct PolicyStore {
    root_namespace: String,
    entries: BTreeMap<PolicyName, Entry>,
    /// Policies that apply without being named.
    attached: BTreeMap<Attachment, BTreeSet<PolicyName>>,
}

/// A policy with a value that cannot be used. It is kept, because leaving it out could
/// admit what it was meant to refuse: the workloads it applies to are closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RejectedPolicy {
    pub name: PolicyName,
    /// `None` when the scope itself is what could not be read: then the widest scope that
    /// a policy of this namespace can have is assumed.
    pub scope: Option<Scope>,
    /// A dry-run policy closes nothing.
    pub dry_run: bool,
    pub error: PolicyError,
}

/// Whether plaintext is refused before any policy is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Plaintext is judged by the policies, without an identity.
    #[default]
    Permissive,
    /// Plaintext is refused.
    Strict,
}

/// All that decides about connections to one workload.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct WorkloadPolicies {
    /// Sorted by name, each once; dry-run policies included.
    pub policies: Vec<Arc<Policy>>,
    pub mode: Mode,
    /// Named by the workload and not received (yet): the workload is closed.
    pub missing: Vec<String>,
    /// Applicable and unusable: the workload is closed.
    pub rejected: Vec<Arc<RejectedPolicy>>,
}

impl PolicyStore {
    /// `root_namespace`: the mesh's, `istio-system` unless configured otherwise.
    pub fn new(root_namespace: impl Into<String>) -> Self {
        PolicyStore {
            root_namespace: root_namespace.into(),
            entries: BTreeMap::new(),
            attached: BTreeMap::new(),
        }
    }

    /// Adds a policy, or replaces the one with its name.
    pub fn insert(&mut self, policy: Policy) {
        let (name, scope) = (policy.name.clone(), policy.scope);
        self.put(name, scope, Entry::Usable(Arc::new(policy)));
    }

    /// Adds a policy that cannot be used, or replaces the one with its name.
    pub fn insert_rejected(&mut self, policy: RejectedPolicy) {
        let name = policy.name.clone();
        let widest = if name.namespace == self.root_namespace {
            Scope::Global
        } else {
            Scope::Namespace
        };
        self.put(
            name,
            policy.scope.unwrap_or(widest),
            Entry::Rejected(Arc::new(policy)),
        );
    }

    /// Whether there was a policy of that name.
    pub fn remove(&mut self, name: &PolicyName) -> bool {
        for names in self.attached.values_mut() {
            names.remove(name);
        }
        self.entries.remove(name).is_some()
    }

    /// The usable policies, by name.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.entries.values().filter_map(|entry| match entry {
            Entry::Usable(policy) => Some(policy),
            Entry::Rejected(_) => None,
        })
    }

    /// The unusable policies, by name.
    pub fn rejected(&self) -> impl Iterator<Item = &Arc<RejectedPolicy>> {
        self.entries.values().filter_map(|entry| match entry {
            Entry::Usable(_) => None,
            Entry::Rejected(rejected) => Some(rejected),
        })
    }

    /// What applies to a workload of `namespace` that names the policies `named`
    /// (`namespace/name`). A name that is not of that form is a policy that never arrives.
    pub fn applicable<S: AsRef<str>>(
        &self,
        namespace: &str,
        named: impl IntoIterator<Item = S>,
    ) -> WorkloadPolicies {
        let attachments = [Attachment::All, Attachment::Namespace(namespace.to_owned())];
        let mut names: BTreeSet<PolicyName> = attachments
            .iter()
            .filter_map(|a| self.attached.get(a))
            .flatten()
            .cloned()
            .collect();

        let mut out = WorkloadPolicies::default();
        let mut missing = BTreeSet::new();
        for text in named {
            let text = text.as_ref();
            match text.parse::<PolicyName>() {
                Ok(name) if self.is_static_strict(&name) || self.entries.contains_key(&name) => {
                    names.insert(name);
                }
                _ => {
                    missing.insert(text.to_owned());
                }
            }
        }
        out.missing.extend(missing);
        for name in names {
            if self.is_static_strict(&name) {
                out.mode = Mode::Strict;
            }
            match self.entries.get(&name) {
                Some(Entry::Usable(policy)) => out.policies.push(Arc::clone(policy)),
                Some(Entry::Rejected(rejected)) if !rejected.dry_run => {
                    out.rejected.push(Arc::clone(rejected));
                }
                Some(Entry::Rejected(_)) | None => {}
            }
        }
        out
    }

    fn put(&mut self, name: PolicyName, scope: Scope, entry: Entry) {
        self.remove(&name);
        let attachment = match scope {
            Scope::Global => Some(Attachment::All),
            Scope::Namespace => Some(Attachment::Namespace(name.namespace.clone())),
            Scope::WorkloadSelector => None,
        };
        if let Some(attachment) = attachment {
            self.attached
                .entry(attachment)
                .or_default()
                .insert(name.clone());
        }
        self.entries.insert(name, entry);
    }

    fn is_static_strict(&self, name: &PolicyName) -> bool {
        name.name == STATIC_STRICT && name.namespace == self.root_namespace
    }
}

#[derive(Debug, Clone)]
enum Entry {
    Usable(Arc<Policy>),
    Rejected(Arc<RejectedPolicy>),
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Attachment {
    All,
    Namespace(String),
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::{Action, ValueError};

    fn policy(name: &str, scope: Scope) -> Policy {
        Policy {
            name: name.parse().unwrap(),
            scope,
            action: Action::Allow,
            dry_run: false,
            rules: Vec::new(),
        }
    }

    fn rejected(name: &str, scope: Option<Scope>) -> RejectedPolicy {
        let name: PolicyName = name.parse().unwrap();
        let error = ValueError::Port(70000).at(&name, "destination_ports");
        RejectedPolicy {
            name,
            scope,
            dry_run: false,
            error,
        }
    }

    fn names(applicable: &WorkloadPolicies) -> Vec<String> {
        applicable
            .policies
            .iter()
            .map(|p| p.name.to_string())
            .collect()
    }

    const NAMES_NONE: [&str; 0] = [];

    #[test]
    fn workload_gets_global_namespace_and_named_policies_only() {
        let mut store = PolicyStore::new("root");
        store.insert(policy("root/everywhere", Scope::Global));
        store.insert(policy("a/all", Scope::Namespace));
        store.insert(policy("a/chosen", Scope::WorkloadSelector));
        store.insert(policy("a/other", Scope::WorkloadSelector));
        store.insert(policy("b/all", Scope::Namespace));

        let of_a = store.applicable("a", ["a/chosen", "a/all", "a/chosen"]);
        assert_eq!(names(&of_a), ["a/all", "a/chosen", "root/everywhere"]);
        assert_eq!(
            names(&store.applicable("b", NAMES_NONE)),
            ["b/all", "root/everywhere"]
        );
        assert_eq!(
            names(&store.applicable("c", NAMES_NONE)),
            ["root/everywhere"]
        );
        assert!(of_a.missing.is_empty() && of_a.mode == Mode::Permissive);
    }

    #[test]
    fn changed_scope_and_removal_leave_nothing_behind() {
        let mut store = PolicyStore::new("root");
        store.insert(policy("a/p", Scope::Namespace));
        store.insert(policy("a/p", Scope::WorkloadSelector));
        assert!(names(&store.applicable("a", NAMES_NONE)).is_empty());
        assert_eq!(names(&store.applicable("a", ["a/p"])), ["a/p"]);
        assert!(store.remove(&"a/p".parse().unwrap()));
        assert!(!store.remove(&"a/p".parse().unwrap()));
        assert_eq!(store.applicable("a", ["a/p"]).missing, ["a/p"]);
    }

    #[test]
    fn static_strict_is_known_by_name_in_the_root_namespace_only() {
        let store = PolicyStore::new("root");
        let strict = store.applicable("a", ["root/istio_converted_static_strict"]);
        assert_eq!((strict.mode, strict.missing.len()), (Mode::Strict, 0));

        let impostor = store.applicable("a", ["a/istio_converted_static_strict"]);
        assert_eq!(impostor.mode, Mode::Permissive);
        assert_eq!(impostor.missing, ["a/istio_converted_static_strict"]);
    }

    #[test]
    fn static_strict_that_arrives_stays_strict() {
        let mut store = PolicyStore::new("root");
        store.insert(policy(
            "root/istio_converted_static_strict",
            Scope::WorkloadSelector,
        ));
        let named = store.applicable("a", ["root/istio_converted_static_strict"]);
        assert_eq!(named.mode, Mode::Strict);
        assert_eq!(store.applicable("a", NAMES_NONE).mode, Mode::Permissive);
    }

    #[test]
    fn named_policy_that_never_came_is_missing_whatever_its_name() {
        let store = PolicyStore::new("root");
        let applicable = store.applicable("a", ["a/late", "no-slash", ""]);
        assert_eq!(applicable.missing, ["", "a/late", "no-slash"]);
    }

    #[test]
    fn rejected_policy_closes_the_workloads_it_applies_to_and_no_others() {
        let mut store = PolicyStore::new("root");
        store.insert_rejected(rejected("a/p", Some(Scope::Namespace)));
        assert_eq!(store.applicable("a", NAMES_NONE).rejected.len(), 1);
        assert!(store.applicable("b", NAMES_NONE).rejected.is_empty());
        // It did arrive, so it is not missing.
        assert!(store.applicable("b", ["a/p"]).missing.is_empty());

        store.insert(policy("a/p", Scope::Namespace));
        assert!(store.applicable("a", NAMES_NONE).rejected.is_empty());
    }

    #[test]
    fn rejected_policy_of_unknown_scope_takes_the_widest_of_its_namespace() {
        let mut store = PolicyStore::new("root");
        store.insert_rejected(rejected("a/p", None));
        assert_eq!(store.applicable("a", NAMES_NONE).rejected.len(), 1);
        assert!(store.applicable("b", NAMES_NONE).rejected.is_empty());
        store.insert_rejected(rejected("root/p", None));
        assert_eq!(store.applicable("b", NAMES_NONE).rejected.len(), 1);
    }

    #[test]
    fn rejected_dry_run_policy_closes_nothing() {
        let mut store = PolicyStore::new("root");
        store.insert_rejected(RejectedPolicy {
            dry_run: true,
            ..rejected("a/p", Some(Scope::Namespace))
        });
        assert_eq!(store.applicable("a", ["a/p"]), WorkloadPolicies::default());
    }
}
