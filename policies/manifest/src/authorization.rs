//! The specification of an `AuthorizationPolicy`.

use ringfence_policies::{Cidr, Match, PolicyName};

use crate::model::{Action, AuthorizationPolicy, Condition, Lost, Rule};
use crate::node::{Spot, Value};
use crate::parse::Metadata;
use crate::reader::{Field, Fields, Reader};
use crate::value::{self, Key};
use crate::{Problem, WarningKind};

impl Reader {
    pub(crate) fn authorization_policy(
        &mut self,
        metadata: Metadata,
        spec: Option<Field>,
    ) -> AuthorizationPolicy {
        let mut policy = AuthorizationPolicy {
            name: metadata.name,
            action_at: Spot {
                line: metadata.at.line,
                column: metadata.at.column,
            },
            at: metadata.at,
            selector: None,
            action: Action::Allow,
            target: None,
            dry_run: metadata.dry_run,
            rules: Vec::new(),
        };
        // Without a specification it is an ALLOW policy without rules: it admits nothing.
        let Some(Field { path, node }) = spec else {
            return policy;
        };
        let known = &[
            "selector",
            "targetRef",
            "targetRefs",
            "rules",
            "action",
            "provider",
        ];
        let mut spec = self.fields(&path, node, known);
        if let Some((action, at)) = self.parsed(spec.take("action"), action) {
            (policy.action, policy.action_at) = (action, at);
        }
        let selector = spec.take("selector");
        let selector_at = selector.as_ref().map(|selector| selector.node.at);
        policy.selector = selector.and_then(|selector| self.selector(selector));
        policy.target = self.target(&mut spec);
        if let (Some((target, _)), Some(at)) = (policy.target, selector_at) {
            self.error(at, spec.path("selector"), Problem::Exclusive(target));
        }
        if let Some(Field { path, node }) = spec.take("provider") {
            if policy.action != Action::Custom {
                self.error(node.at, path.clone(), Problem::Provider);
            }
            let mut provider = self.fields(&path, node, &["name"]);
            self.required_text(&mut provider, "name");
        }
        policy.rules = self.rules(&mut spec, policy.action, &policy.name);
        policy
    }

    fn target(&mut self, spec: &mut Fields) -> Option<(&'static str, Spot)> {
        let mut target = None;
        if let Some(one) = spec.take("targetRef") {
            target = Some(("targetRef", one.node.at));
            self.target_ref(one);
        }
        let several = spec.take("targetRefs");
        let several_at = several.as_ref().map(|several| several.node.at);
        for one in self.list(several) {
            self.target_ref(one);
        }
        match (target, several_at) {
            (Some(_), Some(at)) => {
                self.error(at, spec.path("targetRefs"), Problem::Exclusive("targetRef"));
            }
            (None, Some(at)) => target = Some(("targetRefs", at)),
            (_, None) => {}
        }
        target
    }

    fn target_ref(&mut self, field: Field) {
        let known = &["group", "kind", "name", "namespace"];
        let mut fields = self.fields(&field.path, field.node, known);
        self.required_text(&mut fields, "kind");
        self.required_text(&mut fields, "name");
        for optional in ["group", "namespace"] {
            // The empty group is the core one.
            self.parsed(fields.take(optional), |_| Ok(()));
        }
    }

    fn required_text(&mut self, fields: &mut Fields, name: &str) {
        match fields.take(name) {
            Some(field) => {
                self.parsed(Some(field), value::any);
            }
            None => self.error(fields.at, fields.path(name), Problem::Missing),
        }
    }

    fn rules(&mut self, spec: &mut Fields, action: Action, name: &PolicyName) -> Vec<Rule> {
        let Some(Field { path, node }) = spec.take("rules") else {
            if action == Action::Deny {
                self.error(spec.at, spec.path("rules"), Problem::DenyWithoutRules);
            }
            return Vec::new();
        };
        // Istio takes an empty list: ALLOW then admits nothing, which is a common idiom.
        if matches!(&node.value, Value::List(rules) if rules.is_empty()) {
            if action == Action::Deny {
                self.warn(node.at, path, WarningKind::DeniesNothing);
            }
            return Vec::new();
        }
        let rules = self.list(Some(Field { path, node }));
        rules
            .into_iter()
            .map(|rule| self.rule(rule, name))
            .collect()
    }

    fn rule(&mut self, field: Field, name: &PolicyName) -> Rule {
        let mut rule = self.fields(&field.path, field.node, &["from", "to", "when"]);
        let from = self.list(rule.take_even_null("from"));
        let from = from.into_iter().filter_map(|from| {
            let source = self.only(from, &["source"])?;
            Some(self.source(source, name))
        });
        let from = from.collect();
        let to = self.list(rule.take_even_null("to"));
        let to = to.into_iter().filter_map(|to| {
            let operation = self.only(to, &["operation"])?;
            Some(self.operation(operation))
        });
        let to = to.collect();
        let when = self.list(rule.take_even_null("when"));
        let when = when.into_iter().filter_map(|when| self.when(when));
        let when = when.collect();
        Rule { from, to, when }
    }

    /// The one field that an element of `from` or `to` has.
    fn only(&mut self, field: Field, name: &'static [&'static str]) -> Option<Field> {
        let mut fields = self.fields(&field.path, field.node, name);
        let taken = name.iter().find_map(|name| fields.take(name));
        if taken.is_none() {
            let path = fields.path(name.first().copied().unwrap_or_default());
            self.error(fields.at, path, Problem::Missing);
        }
        taken
    }

    fn source(&mut self, field: Field, name: &PolicyName) -> Condition {
        let at = field.node.at;
        let errors_before = self.errors.len();
        let mut source = self.fields(&field.path, field.node, SOURCE);
        let account = |text: &str| value::service_account(text, name);
        let mut list = |field: &str| source.take_even_null(field);
        let l4 = Match {
            principals: self.values(list("principals"), value::principal),
            not_principals: self.values(list("notPrincipals"), value::principal),
            namespaces: self.values(list("namespaces"), value::pattern),
            not_namespaces: self.values(list("notNamespaces"), value::pattern),
            service_accounts: self.values(list("serviceAccounts"), account),
            not_service_accounts: self.values(list("notServiceAccounts"), account),
            source_ips: self.blocks(list("ipBlocks")),
            not_source_ips: self.blocks(list("notIpBlocks")),
            ..Match::default()
        };
        let mut lost = Vec::new();
        for name in ["remoteIpBlocks", "notRemoteIpBlocks"] {
            self.lost(&mut lost, list(name), |text| value::cidr(text).map(drop));
        }
        for name in [
            "requestPrincipals",
            "notRequestPrincipals",
            "trustDomains",
            "notTrustDomains",
        ] {
            self.lost(&mut lost, list(name), value::any);
        }
        self.condition(Condition { l4, lost }, at, &field.path, errors_before)
    }

    fn operation(&mut self, field: Field) -> Condition {
        let at = field.node.at;
        let errors_before = self.errors.len();
        let mut operation = self.fields(&field.path, field.node, OPERATION);
        let mut list = |field: &str| operation.take_even_null(field);
        let l4 = Match {
            destination_ports: self.values(list("ports"), port),
            not_destination_ports: self.values(list("notPorts"), port),
            ..Match::default()
        };
        let mut lost = Vec::new();
        for name in [
            "hosts",
            "notHosts",
            "methods",
            "notMethods",
            "paths",
            "notPaths",
        ] {
            self.lost(&mut lost, list(name), value::any);
        }
        self.condition(Condition { l4, lost }, at, &field.path, errors_before)
    }

    fn when(&mut self, field: Field) -> Option<Condition> {
        let at = field.node.at;
        let errors_before = self.errors.len();
        let mut when = self.fields(&field.path, field.node, &["key", "values", "notValues"]);
        let Some(key) = when.take("key") else {
            self.error(at, when.path("key"), Problem::Missing);
            return None;
        };
        let key_path = key.path.clone();
        let (key, key_at) = self.parsed(Some(key), value::key)?;
        let (yes, no) = (
            when.take_even_null("values"),
            when.take_even_null("notValues"),
        );
        if yes.is_none() && no.is_none() {
            self.error(at, field.path, Problem::NoCondition);
            return None;
        }
        let mut l4 = Match::default();
        match key {
            Key::SourceIp => {
                l4.source_ips = self.blocks(yes);
                l4.not_source_ips = self.blocks(no);
            }
            Key::DestinationIp => {
                l4.destination_ips = self.blocks(yes);
                l4.not_destination_ips = self.blocks(no);
            }
            Key::SourceNamespace => {
                l4.namespaces = self.values(yes, value::pattern);
                l4.not_namespaces = self.values(no, value::pattern);
            }
            Key::SourcePrincipal => {
                l4.principals = self.values(yes, value::principal);
                l4.not_principals = self.values(no, value::principal);
            }
            Key::DestinationPort => {
                l4.destination_ports = self.values(yes, port);
                l4.not_destination_ports = self.values(no, port);
            }
            Key::Other => {
                self.values(yes, value::any);
                self.values(no, value::any);
                let lost = vec![Lost {
                    field: key_path,
                    at: key_at,
                }];
                return Some(Condition { l4, lost });
            }
        }
        let lost = Vec::new();
        Some(self.condition(Condition { l4, lost }, at, &field.path, errors_before))
    }

    /// Conditions that L4 cannot check; their values are checked for shape.
    fn lost(
        &mut self,
        lost: &mut Vec<Lost>,
        field: Option<Field>,
        check: impl Fn(&str) -> Result<(), Problem>,
    ) {
        if let Some(field) = field {
            lost.push(Lost {
                field: field.path.clone(),
                at: field.node.at,
            });
            self.values(Some(field), check);
        }
    }

    fn blocks(&mut self, field: Option<Field>) -> Vec<Cidr> {
        let mut blocks = Vec::new();
        for element in self.list(field) {
            let path = element.path.clone();
            let parse = |text: &str| Ok((value::cidr(text)?, text.to_owned()));
            let Some(((block, written), at)) = self.parsed(Some(element), parse) else {
                continue;
            };
            let address = written.split('/').next().unwrap_or_default();
            if address.parse() != Ok(block.address()) {
                let read_as = block.to_string();
                self.warn(at, path, WarningKind::HostBits { read_as });
            }
            blocks.push(block);
        }
        blocks
    }

    /// A condition without any field matches nothing, which nobody means.
    fn condition(
        &mut self,
        condition: Condition,
        at: Spot,
        path: &str,
        errors_before: usize,
    ) -> Condition {
        let says_nothing = condition.l4.is_empty() && condition.lost.is_empty();
        if says_nothing && self.errors.len() == errors_before {
            self.error(at, path, Problem::NoCondition);
        }
        condition
    }
}

fn action(text: &str) -> Result<Action, Problem> {
    match text {
        "ALLOW" => Ok(Action::Allow),
        "DENY" => Ok(Action::Deny),
        "AUDIT" => Ok(Action::Audit),
        "CUSTOM" => Ok(Action::Custom),
        _ => Err(Problem::Action(text.to_owned())),
    }
}

fn port(text: &str) -> Result<u16, Problem> {
    value::port(text, 0)
}

const SOURCE: &[&str] = &[
    "principals",
    "notPrincipals",
    "requestPrincipals",
    "notRequestPrincipals",
    "namespaces",
    "notNamespaces",
    "serviceAccounts",
    "notServiceAccounts",
    "ipBlocks",
    "notIpBlocks",
    "remoteIpBlocks",
    "notRemoteIpBlocks",
    "trustDomains",
    "notTrustDomains",
];
const OPERATION: &[&str] = &[
    "hosts",
    "notHosts",
    "ports",
    "notPorts",
    "methods",
    "notMethods",
    "paths",
    "notPaths",
];
