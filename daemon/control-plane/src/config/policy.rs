//! Checks of authorization policies and peer authentication.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use ringfence_manifest::{MtlsMode, PeerAuthentication, Place, Selector};
use ringfence_policies::PolicyName;
use serde_saphyr::{Location, Spanned};

use super::check::Checker;
use super::{
    Action, Cidr, Operation, Policy, Rule, Source, TextMatch, Workload, schema, selects, value,
};

impl Checker<'_> {
    pub(super) fn policies(
        &mut self,
        raw: Vec<schema::Policy>,
        root_namespace: &str,
        workloads: &[Workload],
    ) -> Vec<Policy> {
        let mut policies = Vec::new();
        let mut names = HashMap::new();
        for (index, policy) in raw.into_iter().enumerate() {
            let field = format!("policies[{index}]");
            let at = policy.name.referenced;
            let name = self.object_name(&format!("{field}.name"), policy.name);
            let namespace = self.object_name(&format!("{field}.namespace"), policy.namespace);
            self.unique(
                &mut names,
                (namespace.clone(), name.clone()),
                at,
                &format!("{field}.name"),
                || format!("a policy `{namespace}/{name}`"),
            );
            let anywhere = namespace == root_namespace;
            let selector = policy.selector.and_then(|selector| {
                let in_scope = |w: &&Workload| anywhere || w.namespace == namespace;
                self.selector(
                    &format!("{field}.selector"),
                    selector,
                    workloads.iter().filter(in_scope),
                )
            });
            let action = match policy.action {
                None => Action::Allow,
                Some(action) => match action.value.as_str() {
                    "ALLOW" => Action::Allow,
                    "DENY" => Action::Deny,
                    other => {
                        let message = format!("`{other}` is not an action: expected ALLOW or DENY");
                        self.diagnostics.error(
                            action.referenced,
                            format!("{field}.action"),
                            message,
                        );
                        Action::Deny
                    }
                },
            };
            if policy.rules.is_empty() && action == Action::Deny {
                self.diagnostics.warning(
                    at,
                    format!("{field}.rules"),
                    "is empty: a DENY policy without rules denies nothing",
                );
            }
            let rules = policy
                .rules
                .into_iter()
                .enumerate()
                .map(|(i, rule)| self.rule(&format!("{field}.rules[{i}]"), rule));
            let rules = rules.collect();
            policies.push(Policy {
                name,
                namespace,
                selector,
                action,
                rules,
            });
        }
        policies
    }

    fn rule(&mut self, field: &str, rule: schema::Rule) -> Rule {
        Rule {
            from: self.clause(&format!("{field}.from"), rule.from, Self::source),
            to: self.clause(&format!("{field}.to"), rule.to, Self::operation),
        }
    }

    /// An empty list or an element without any value is a mistake, not a wish:
    /// one reading of it matches everything, the other nothing.
    fn clause<Raw, T: PartialEq + Default>(
        &mut self,
        field: &str,
        raw: Option<Spanned<Vec<Spanned<Raw>>>>,
        convert: impl Fn(&mut Self, &str, Raw) -> T,
    ) -> Vec<T> {
        let Some(raw) = raw else { return Vec::new() };
        if raw.value.is_empty() {
            self.diagnostics.error(
                raw.referenced,
                field,
                "is an empty list: fill it, or leave it out to match everything",
            );
        }
        let mut clause = Vec::new();
        for (index, element) in raw.value.into_iter().enumerate() {
            let field = format!("{field}[{index}]");
            let errors_before = self.diagnostics.errors.len();
            let converted = convert(self, &field, element.value);
            if converted == T::default() && self.diagnostics.errors.len() == errors_before {
                self.diagnostics.error(
                    element.referenced,
                    field,
                    "has no value in any field, so it would match nothing",
                );
            }
            clause.push(converted);
        }
        clause
    }

    fn source(&mut self, field: &str, raw: schema::Source) -> Source {
        let f = |name: &str| format!("{field}.{name}");
        Source {
            principals: self.matches(&f("principals"), raw.principals, value::principal),
            not_principals: self.matches(
                &f("not_principals"),
                raw.not_principals,
                value::principal,
            ),
            namespaces: self.matches(&f("namespaces"), raw.namespaces, value::text_match),
            not_namespaces: self.matches(
                &f("not_namespaces"),
                raw.not_namespaces,
                value::text_match,
            ),
            ip_blocks: self.blocks(&f("ip_blocks"), raw.ip_blocks),
            not_ip_blocks: self.blocks(&f("not_ip_blocks"), raw.not_ip_blocks),
        }
    }

    fn operation(&mut self, field: &str, raw: schema::Operation) -> Operation {
        Operation {
            ports: self.ports(&format!("{field}.ports"), raw.ports),
            not_ports: self.ports(&format!("{field}.not_ports"), raw.not_ports),
        }
    }

    fn matches(
        &mut self,
        field: &str,
        raw: Vec<schema::Text>,
        parse: impl Fn(&str) -> Result<TextMatch, String>,
    ) -> Vec<TextMatch> {
        let parsed = raw.into_iter().enumerate();
        parsed
            .filter_map(|(i, text)| {
                self.take(
                    &format!("{field}[{i}]"),
                    text.referenced,
                    parse(&text.value),
                )
            })
            .collect()
    }

    fn blocks(&mut self, field: &str, raw: Vec<schema::Text>) -> Vec<Cidr> {
        let mut blocks = Vec::new();
        for (index, text) in raw.into_iter().enumerate() {
            let field = format!("{field}[{index}]");
            if let Some((cidr, cleared)) =
                self.take(&field, text.referenced, value::cidr(&text.value))
            {
                if cleared {
                    let message = format!(
                        "`{}` has bits beyond its prefix: read as {}/{}",
                        text.value, cidr.address, cidr.length
                    );
                    self.diagnostics.warning(text.referenced, field, message);
                }
                blocks.push(cidr);
            }
        }
        blocks
    }

    fn ports(&mut self, field: &str, raw: Vec<Spanned<i64>>) -> Vec<u16> {
        let parsed = raw.into_iter().enumerate();
        parsed
            .filter_map(|(i, p)| {
                self.take(&format!("{field}[{i}]"), p.referenced, value::port(p.value))
            })
            .collect()
    }

    pub(super) fn peer_authentication(
        &mut self,
        raw: Vec<schema::PeerAuthentication>,
        workloads: &[Workload],
    ) -> Vec<PeerAuthentication> {
        let mut result: Vec<PeerAuthentication> = Vec::new();
        let mut whole_namespaces = HashMap::new();
        let mut selected: HashMap<(&str, &str), (MtlsMode, Location)> = HashMap::new();
        for (index, raw) in raw.into_iter().enumerate() {
            let field = format!("peer_authentication[{index}]");
            let at = raw.namespace.referenced;
            let namespace = self.object_name(&format!("{field}.namespace"), raw.namespace);
            let mode = match raw.mode.value.as_str() {
                "STRICT" => MtlsMode::Strict,
                "PERMISSIVE" => MtlsMode::Permissive,
                other => {
                    let message = format!("`{other}` is not a mode: expected STRICT or PERMISSIVE");
                    self.diagnostics
                        .error(raw.mode.referenced, format!("{field}.mode"), message);
                    continue;
                }
            };
            let in_scope = |w: &&Workload| w.namespace == namespace;
            let selector: Option<BTreeMap<_, _>> = match raw.selector {
                None => {
                    self.unique(
                        &mut whole_namespaces,
                        namespace.clone(),
                        at,
                        &format!("{field}.namespace"),
                        || format!("peer authentication for the whole of `{namespace}`"),
                    );
                    None
                }
                Some(selector) => self.selector(
                    &format!("{field}.selector"),
                    selector,
                    workloads.iter().filter(in_scope),
                ),
            };
            for workload in workloads.iter().filter(in_scope) {
                if !selector
                    .as_ref()
                    .is_some_and(|selector| selects(selector, &workload.labels))
                {
                    continue;
                }
                let earlier = selected
                    .entry((&workload.namespace, &workload.name))
                    .or_insert((mode, at));
                if earlier.0 != mode {
                    let message = format!(
                        "selects workload `{}/{}` with another mode than the entry at line {}",
                        workload.namespace,
                        workload.name,
                        earlier.1.line()
                    );
                    self.diagnostics
                        .error(raw.mode.referenced, format!("{field}.mode"), message);
                }
            }
            let place = Place {
                file: Arc::from(self.diagnostics.file),
                line: at.line(),
                column: at.column(),
            };
            // No manifest can have such a name.
            let name = PolicyName::new(namespace, field);
            let selector = selector.and_then(Selector::new);
            result.push(PeerAuthentication::native(name, selector, mode, place));
        }
        result
    }
}
