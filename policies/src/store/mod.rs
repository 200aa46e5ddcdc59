//! Which policies apply to which workload.

use std::collections::{BTreeMap, BTreeSet, HashMap};
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
    /// Policies that apply to every workload without being named.
    global: BTreeSet<PolicyName>,
    /// Policies that apply to the workloads of their namespace without being named.
    by_namespace: HashMap<String, BTreeSet<PolicyName>>,
}

/// One thing that a control plane says about a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyChange {
    /// Adds it, or replaces the one with its name.
    Put(Policy),
    /// The same, and it cannot be used.
    Reject(RejectedPolicy),
    /// Forgets it.
    Remove(PolicyName),
}

/// The workloads for which [`PolicyStore::applicable`] may answer differently than before.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Affected {
    /// Every workload.
    pub all: bool,
    /// Those of these namespaces.
    pub namespaces: BTreeSet<String>,
    /// Those that name one of these policies (`namespace/name`).
    pub names: BTreeSet<String>,
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
            global: BTreeSet::new(),
            by_namespace: HashMap::new(),
        }
    }

    /// Makes changes, in order, and says whom they concern. A policy that is put as it
    /// stands already keeps its place in memory and concerns nobody.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = PolicyChange>) -> Affected {
        let mut affected = Affected::default();
        for change in changes {
            match change {
                PolicyChange::Put(policy) => {
                    let name = policy.name.clone();
                    self.put(name, Some(Entry::Usable(Arc::new(policy))), &mut affected);
                }
                PolicyChange::Reject(policy) => {
                    let name = policy.name.clone();
                    self.put(name, Some(Entry::Rejected(Arc::new(policy))), &mut affected);
                }
                PolicyChange::Remove(name) => self.put(name, None, &mut affected),
            }
        }
        affected
    }

    /// Adds a policy, or replaces the one with its name.
    pub fn insert(&mut self, policy: Policy) {
        self.apply([PolicyChange::Put(policy)]);
    }

    /// Adds a policy that cannot be used, or replaces the one with its name.
    pub fn insert_rejected(&mut self, policy: RejectedPolicy) {
        self.apply([PolicyChange::Reject(policy)]);
    }

    /// Whether there was a policy of that name.
    pub fn remove(&mut self, name: &PolicyName) -> bool {
        let affected = self.apply([PolicyChange::Remove(name.clone())]);
        !affected.is_empty()
    }

    /// The number of policies, usable or not.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no policy.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
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

    /// The usable policy of that name.
    pub fn policy(&self, name: &PolicyName) -> Option<&Arc<Policy>> {
        match self.entries.get(name)? {
            Entry::Usable(policy) => Some(policy),
            Entry::Rejected(_) => None,
        }
    }

    /// The unusable policy of that name.
    pub fn rejected_policy(&self, name: &PolicyName) -> Option<&Arc<RejectedPolicy>> {
        match self.entries.get(name)? {
            Entry::Usable(_) => None,
            Entry::Rejected(rejected) => Some(rejected),
        }
    }

    /// What applies to a workload of `namespace` that names the policies `named`
    /// (`namespace/name`). A name that is not of that form is a policy that never arrives.
    /// Costs what applies, however many policies there are.
    pub fn applicable<S: AsRef<str>>(
        &self,
        namespace: &str,
        named: impl IntoIterator<Item = S>,
    ) -> WorkloadPolicies {
        let mut out = WorkloadPolicies::default();
        let mut missing = BTreeSet::new();
        let mut arrived = BTreeSet::new();
        for text in named {
            let text = text.as_ref();
            let name = text.parse::<PolicyName>().ok();
            let strict = name.as_ref().is_some_and(|n| self.is_static_strict(n));
            if strict {
                out.mode = Mode::Strict;
            }
            match name.and_then(|name| self.entries.get_key_value(&name)) {
                Some((name, _)) => {
                    arrived.insert(name);
                }
                None if strict => {}
                None => {
                    missing.insert(text.to_owned());
                }
            }
        }
        out.missing.extend(missing);
        arrived.extend(&self.global);
        arrived.extend(self.by_namespace.get(namespace).into_iter().flatten());
        for name in arrived {
            if self.is_static_strict(name) {
                out.mode = Mode::Strict;
            }
            match self.entries.get(name) {
                Some(Entry::Usable(policy)) => out.policies.push(Arc::clone(policy)),
                Some(Entry::Rejected(rejected)) if !rejected.dry_run => {
                    out.rejected.push(Arc::clone(rejected));
                }
                Some(Entry::Rejected(_)) | None => {}
            }
        }
        out
    }

    fn put(&mut self, name: PolicyName, entry: Option<Entry>, affected: &mut Affected) {
        if self.entries.get(&name) == entry.as_ref() {
            return;
        }
        affected.names.insert(name.to_string());
        if let Some(old) = self.entries.remove(&name) {
            match self.scope(&name, &old) {
                Scope::Global => {
                    affected.all = true;
                    self.global.remove(&name);
                }
                Scope::Namespace => {
                    affected.namespaces.insert(name.namespace.clone());
                    if let Some(names) = self.by_namespace.get_mut(&name.namespace) {
                        names.remove(&name);
                        if names.is_empty() {
                            self.by_namespace.remove(&name.namespace);
                        }
                    }
                }
                Scope::WorkloadSelector => {}
            }
        }
        let Some(new) = entry else { return };
        match self.scope(&name, &new) {
            Scope::Global => {
                affected.all = true;
                self.global.insert(name.clone());
            }
            Scope::Namespace => {
                affected.namespaces.insert(name.namespace.clone());
                let names = self.by_namespace.entry(name.namespace.clone());
                names.or_default().insert(name.clone());
            }
            Scope::WorkloadSelector => {}
        }
        self.entries.insert(name, new);
    }

    /// Of a policy whose scope could not be read: the widest that it can have.
    fn scope(&self, name: &PolicyName, entry: &Entry) -> Scope {
        match entry {
            Entry::Usable(policy) => policy.scope,
            Entry::Rejected(policy) => policy.scope.unwrap_or({
                if name.namespace == self.root_namespace {
                    Scope::Global
                } else {
                    Scope::Namespace
                }
            }),
        }
    }

    fn is_static_strict(&self, name: &PolicyName) -> bool {
        name.name == STATIC_STRICT && name.namespace == self.root_namespace
    }
}

impl Affected {
    /// Whether it concerns a workload of `namespace` that names the policies `named`.
    pub fn concerns<S: AsRef<str>>(
        &self,
        namespace: &str,
        named: impl IntoIterator<Item = S>,
    ) -> bool {
        self.all
            || self.namespaces.contains(namespace)
            || (!self.names.is_empty()
                && named.into_iter().any(|n| self.names.contains(n.as_ref())))
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        !self.all && self.namespaces.is_empty() && self.names.is_empty()
    }

    /// Adds what another change concerns.
    pub fn merge(&mut self, other: Affected) {
        self.all |= other.all;
        self.namespaces.extend(other.namespaces);
        self.names.extend(other.names);
    }
}

impl WorkloadPolicies {
    /// Whether these are the same policies *in memory* (as two answers of one store are
    /// until one of them changes), which costs one comparison of pointers each. What is
    /// the same is also equal.
    pub fn same(&self, other: &WorkloadPolicies) -> bool {
        let WorkloadPolicies {
            policies,
            mode,
            missing,
            rejected,
        } = self;
        *mode == other.mode
            && *missing == other.missing
            && same_pointers(policies, &other.policies)
            && same_pointers(rejected, &other.rejected)
    }
}

fn same_pointers<T>(a: &[Arc<T>], b: &[Arc<T>]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
}

#[derive(Debug, Clone, PartialEq)]
enum Entry {
    Usable(Arc<Policy>),
    Rejected(Arc<RejectedPolicy>),
}

#[cfg(test)]
mod tests;
