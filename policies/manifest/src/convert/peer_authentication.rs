//! `PeerAuthentication`: which mode holds for whom. Follows `convertPeerAuthentication`
//! and `convertedSelectorPeerAuthentications` of Istiod's `ambient/authorization.go`, with
//! the difference that the crate's documentation names.

use std::collections::BTreeMap;

use ringfence_policies::{
    Action, Clause, Match, Policy, PolicyName, Rule, STATIC_STRICT, Scope, StringMatch,
};

use super::ConvertedPolicy;
use crate::node::Spot;
use crate::{MtlsMode, PeerAuthentication, Place, Selector, Warning, WarningKind};

/// The modes of a mesh.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Modes {
    static_strict: PolicyName,
    /// Whether workloads without a mode of their own are strict, where that differs from
    /// the mesh.
    namespaces: BTreeMap<String, bool>,
    mesh: bool,
    /// The oldest first: the first that selects a workload decides.
    workloads: Vec<Selected>,
}

#[derive(Clone, Debug, PartialEq)]
struct Selected {
    namespace: String,
    selector: Selector,
    effect: Effect,
}

#[derive(Clone, Debug, PartialEq)]
enum Effect {
    Permissive,
    Strict,
    /// Modes differ by port.
    Ports(Box<ConvertedPolicy>),
}

impl Modes {
    pub(super) fn new(
        manifests: &[PeerAuthentication],
        root_namespace: &str,
        warnings: &mut Vec<Warning>,
    ) -> Self {
        let mut warn = |of: &PeerAuthentication, at: Spot, field: &str, kind: WarningKind| {
            warnings.push(Warning {
                at: Place {
                    line: at.line,
                    column: at.column,
                    ..of.at.clone()
                },
                resource: format!("PeerAuthentication {}", of.name),
                field: field.to_owned(),
                kind,
            });
        };
        let mut by_age: Vec<_> = manifests.iter().collect();
        // Stable: of those without a time the first one written counts as the oldest.
        by_age.sort_by_key(|of| (of.created.is_none(), &of.created));

        let mut whole: BTreeMap<&str, &PeerAuthentication> = BTreeMap::new();
        for &of in by_age.iter().filter(|of| of.selector.is_none()) {
            let first = *whole.entry(&of.name.namespace).or_insert(of);
            if first.name != of.name {
                let kind = WarningKind::Older(first.name.clone());
                warn(of, of.name_at(), "metadata.name", kind);
            }
        }
        let mesh = whole.remove(root_namespace);
        let mesh = mesh.is_some_and(|of| of.mode == MtlsMode::Strict);
        let namespaces = whole.into_iter().filter_map(|(namespace, of)| {
            let strict = match of.mode {
                MtlsMode::Unset => return None,
                MtlsMode::Strict => true,
                MtlsMode::Permissive | MtlsMode::Disable => false,
            };
            Some((namespace.to_owned(), strict))
        });
        let mut modes = Modes {
            static_strict: PolicyName::new(root_namespace, STATIC_STRICT),
            namespaces: namespaces.collect(),
            mesh,
            workloads: Vec::new(),
        };

        for of in by_age {
            if of.mode == MtlsMode::Disable {
                warn(of, of.mode_at, "spec.mtls.mode", WarningKind::Disable);
            }
            let Some(selector) = &of.selector else {
                continue;
            };
            let namespace = &of.name.namespace;
            if namespace == root_namespace && !of.native {
                warn(of, of.name_at(), "spec.selector", WarningKind::RootSelector);
                continue;
            }
            let effect = effect(of, modes.strict_without_selector(namespace));
            for (port, (mode, at)) in &of.ports {
                if *mode == MtlsMode::Disable {
                    let kind = match effect {
                        Effect::Strict => WarningKind::PortStaysStrict,
                        _ => WarningKind::Disable,
                    };
                    warn(of, *at, &format!("spec.portLevelMtls[{port}]"), kind);
                }
            }
            modes.workloads.push(Selected {
                namespace: namespace.clone(),
                selector: selector.clone(),
                effect,
            });
        }
        modes
    }

    /// What single ports need. They are served whether a workload names them or not.
    pub(super) fn policies(&self) -> impl Iterator<Item = &ConvertedPolicy> {
        self.workloads
            .iter()
            .filter_map(|selected| match &selected.effect {
                Effect::Ports(policy) => Some(&**policy),
                Effect::Permissive | Effect::Strict => None,
            })
    }

    pub(super) fn attached(
        &self,
        namespace: &str,
        labels: &BTreeMap<String, String>,
    ) -> Option<PolicyName> {
        let own = self
            .workloads
            .iter()
            .find(|own| own.namespace == namespace && own.selector.selects(labels));
        match own.map(|own| &own.effect) {
            Some(Effect::Permissive) => None,
            Some(Effect::Strict) => Some(self.static_strict.clone()),
            Some(Effect::Ports(policy)) => Some(policy.policy.name.clone()),
            None => self
                .strict_without_selector(namespace)
                .then(|| self.static_strict.clone()),
        }
    }

    fn strict_without_selector(&self, namespace: &str) -> bool {
        self.namespaces.get(namespace).copied().unwrap_or(self.mesh)
    }
}

impl PeerAuthentication {
    fn name_at(&self) -> Spot {
        Spot {
            line: self.at.line,
            column: self.at.column,
        }
    }
}

/// `inherited`: whether the namespace or the mesh is strict.
fn effect(of: &PeerAuthentication, inherited: bool) -> Effect {
    let strict = match of.mode {
        MtlsMode::Unset => inherited,
        MtlsMode::Strict => true,
        MtlsMode::Permissive | MtlsMode::Disable => false,
    };
    let ports_with = |wanted: &[MtlsMode]| -> Vec<u16> {
        let ports = of.ports.iter();
        ports
            .filter(|(_, (mode, _))| wanted.contains(mode))
            .map(|(port, _)| *port)
            .collect()
    };
    let rules = if strict {
        // Istiod takes no notice of ports with DISABLE alone when strictness is inherited.
        let noticed: &[MtlsMode] = match of.mode {
            MtlsMode::Unset => &[MtlsMode::Permissive],
            _ => &[MtlsMode::Permissive, MtlsMode::Disable],
        };
        if ports_with(noticed).is_empty() {
            return Effect::Strict;
        }
        // No identity, and none of these ports.
        let open = ports_with(&[MtlsMode::Permissive, MtlsMode::Disable]);
        let open = open.into_iter().map(|port| {
            clause(Match {
                not_destination_ports: vec![port],
                ..Match::default()
            })
        });
        let mut clauses: Vec<_> = open.collect();
        let without_identity = clause(without_identity());
        match of.mode {
            MtlsMode::Unset => clauses.push(without_identity),
            _ => clauses.insert(0, without_identity),
        }
        vec![Rule { clauses }]
    } else {
        let closed = ports_with(&[MtlsMode::Strict])
            .into_iter()
            .map(|port| Rule {
                clauses: vec![clause(Match {
                    destination_ports: vec![port],
                    ..without_identity()
                })],
            });
        let closed: Vec<_> = closed.collect();
        if closed.is_empty() {
            return Effect::Permissive;
        }
        closed
    };
    Effect::Ports(Box::new(ConvertedPolicy {
        policy: Policy {
            name: PolicyName::new(
                &of.name.namespace,
                format!("{CONVERTED_PREFIX}{}", of.name.name),
            ),
            scope: Scope::WorkloadSelector,
            action: Action::Deny,
            dry_run: false,
            rules,
        },
        selector: of.selector.clone(),
        from: of.at.clone(),
    }))
}

fn clause(one: Match) -> Clause {
    Clause { matches: vec![one] }
}

fn without_identity() -> Match {
    Match {
        not_principals: vec![StringMatch::Presence],
        ..Match::default()
    }
}

/// The underscores keep it out of the names that manifests can have.
const CONVERTED_PREFIX: &str = "converted_peer_authentication_";
