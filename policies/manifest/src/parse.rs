//! Documents, lists and metadata.

use std::path::Path;
use std::sync::Arc;

use ringfence_policies::PolicyName;

use crate::node::{Node, Spot, Value, documents};
use crate::reader::{Field, Fields, Reader};
use crate::{ManifestError, Manifests, Place, Problem, WarningKind, value};

/// What to do with resources that are not policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherKinds {
    /// Leave them out, with a warning: a whole directory can be read.
    Skip,
    /// They are errors.
    Refuse,
}

/// Reads the YAML (or JSON) `text` of the file `origin`, which is used in messages only.
/// Any error, and nothing is returned but all errors.
pub fn parse(
    text: &str,
    origin: &Path,
    other_kinds: OtherKinds,
) -> Result<Manifests, Vec<ManifestError>> {
    let mut parser = Parser {
        reader: Reader::new(Arc::from(origin)),
        other_kinds,
        manifests: Manifests::default(),
    };
    for (index, document) in documents(text).into_iter().enumerate() {
        let label = format!("document {}", index + 1);
        parser.reader.resource.clone_from(&label);
        match document {
            Ok(node) => parser.resource(node, &label),
            Err(error) => parser
                .reader
                .error(error.at, "", Problem::Syntax(error.message)),
        }
    }
    let Parser {
        reader,
        mut manifests,
        ..
    } = parser;
    if reader.errors.is_empty() {
        manifests.notices = reader.warnings;
        return Ok(manifests);
    }
    let mut errors = reader.errors;
    errors.sort_by_key(|error| (error.at.line, error.at.column));
    Err(errors)
}

struct Parser {
    reader: Reader,
    other_kinds: OtherKinds,
    manifests: Manifests,
}

/// What both kinds have.
pub(crate) struct Metadata {
    pub name: PolicyName,
    pub at: Place,
    pub created: Option<String>,
    pub dry_run: bool,
}

impl Parser {
    /// A document, or an element of a list in one.
    fn resource(&mut self, node: Node, label: &str) {
        if !matches!(node.value, Value::Map(_)) {
            // Reports the type.
            self.reader.entries("", node);
            return;
        }
        let (Some((api, api_at)), Some((kind, kind_at))) = (
            self.type_field(&node, "apiVersion"),
            self.type_field(&node, "kind"),
        ) else {
            return;
        };
        let ours = api == "security.istio.io" || api.starts_with("security.istio.io/");
        match kind.as_str() {
            "List" if api == "v1" => self.list(node, label),
            "AuthorizationPolicyList" | "PeerAuthenticationList" if ours => self.list(node, label),
            // Another group with these kinds is more likely a typing mistake, which would
            // silently lose a policy, than a policy of something else.
            "AuthorizationPolicy" | "PeerAuthentication" if !SERVED.contains(&api.as_str()) => {
                self.reader
                    .error(api_at, "apiVersion", Problem::ApiVersion(api));
            }
            "AuthorizationPolicy" => {
                let Some((metadata, spec)) = self.head(node, "AuthorizationPolicy") else {
                    return;
                };
                let policy = self.reader.authorization_policy(metadata, spec);
                let added = self.manifests.add_authorization(policy);
                self.reader.errors.extend(added.err());
            }
            "PeerAuthentication" => {
                let Some((metadata, spec)) = self.head(node, "PeerAuthentication") else {
                    return;
                };
                let policy = self.reader.peer_authentication(metadata, spec);
                let added = self.manifests.add_peer_authentication(policy);
                self.reader.errors.extend(added.err());
            }
            _ if ours && kind != "RequestAuthentication" => {
                self.reader.error(kind_at, "kind", Problem::Kind(kind));
            }
            _ if self.other_kinds == OtherKinds::Refuse => {
                self.reader.error(kind_at, "kind", Problem::OtherKind(kind));
            }
            _ => {
                let name = node.get("metadata").and_then(|m| m.get("name"));
                let name = name.map_or("", |name| match &name.value {
                    Value::Text(name) => name,
                    _ => "",
                });
                self.reader.resource = format!("{kind} {name}").trim_end().to_owned();
                let kind = WarningKind::OtherKind { api_version: api };
                self.reader.warn(kind_at, "", kind);
            }
        }
    }

    fn list(&mut self, node: Node, label: &str) {
        let known = &["apiVersion", "kind", "metadata", "items"];
        let mut fields = self.reader.fields("", node, known);
        let Some(Field { path, node }) = fields.take("items") else {
            return;
        };
        // An empty list is what an empty cluster gives.
        let Value::List(items) = node.value else {
            let found = node.value.kind();
            let problem = Problem::Type {
                found,
                expected: "a list",
            };
            self.reader.error(node.at, path, problem);
            return;
        };
        for (index, item) in items.into_iter().enumerate() {
            let label = format!("{label}, items[{index}]");
            self.reader.resource.clone_from(&label);
            self.resource(item, &label);
        }
    }

    /// `apiVersion` or `kind`.
    fn type_field(&mut self, node: &Node, name: &str) -> Option<(String, Spot)> {
        match node.get(name) {
            Some(Node {
                value: Value::Text(text),
                at,
            }) => Some((text.clone(), *at)),
            Some(Node { value, at }) => {
                let problem = Problem::Type {
                    found: value.kind(),
                    expected: "text",
                };
                self.reader.error(*at, name, problem);
                None
            }
            None => {
                self.reader.error(node.at, name, Problem::Missing);
                None
            }
        }
    }

    /// Everything but the specification, which is returned unread. `None` after an error
    /// that leaves the resource without a name.
    fn head(&mut self, node: Node, kind: &str) -> Option<(Metadata, Option<Field>)> {
        let known = &["apiVersion", "kind", "metadata", "spec", "status"];
        let mut fields = self.reader.fields("", node, known);
        let Some(metadata) = fields.take("metadata") else {
            self.reader.error(fields.at, "metadata", Problem::Missing);
            return None;
        };
        let mut metadata = self.reader.fields(&metadata.path, metadata.node, METADATA);
        let name = self.name(&mut metadata, "name", Problem::Missing);
        let namespace = self.name(&mut metadata, "namespace", Problem::MissingNamespace);
        let ((name, at), (namespace, _)) = name.zip(namespace)?;
        let name = PolicyName::new(namespace, name);
        self.reader.resource = format!("{kind} {name}");
        if let Some(labels) = metadata.take("labels") {
            self.reader.labels(labels);
        }
        let created = metadata.take("creationTimestamp");
        let created = self.reader.parsed(created, value::time);
        let annotations = metadata.take("annotations");
        let dry_run = annotations.and_then(|annotations| self.dry_run(annotations));
        let metadata = Metadata {
            name,
            at: self.reader.place(at),
            created: created.map(|(time, _)| time),
            dry_run: dry_run.unwrap_or(false),
        };
        Some((metadata, fields.take("spec")))
    }

    fn name(
        &mut self,
        metadata: &mut Fields,
        field: &str,
        missing: Problem,
    ) -> Option<(String, Spot)> {
        let Some(name) = metadata.take(field) else {
            let path = metadata.path(field);
            self.reader.error(metadata.at, path, missing);
            return None;
        };
        self.reader.parsed(Some(name), value::name)
    }

    fn dry_run(&mut self, annotations: Field) -> Option<bool> {
        let Field { path, node } = annotations;
        let mut dry_run = None;
        for (key, value) in self.reader.entries(&path, node) {
            let Some((key, _)) = self.reader.text(&path, key) else {
                continue;
            };
            let field = Field {
                path: format!("{path}[{key}]"),
                node: value,
            };
            if key == DRY_RUN {
                dry_run = self.reader.parsed(Some(field), value::boolean);
            } else {
                self.reader.text(&field.path, field.node);
            }
        }
        dry_run.map(|(dry_run, _)| dry_run)
    }
}

const SERVED: &[&str] = &["security.istio.io/v1", "security.istio.io/v1beta1"];
const DRY_RUN: &str = "istio.io/dry-run";
/// `ObjectMeta` of Kubernetes.
const METADATA: &[&str] = &[
    "name",
    "namespace",
    "labels",
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];
