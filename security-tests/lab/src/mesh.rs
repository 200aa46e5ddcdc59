//! The mesh file of the control plane: what the lab puts into it, and how it is written.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::topology::{LEGACY_VIP, NAMESPACE, Role, Topology, WEB_VIP};

/// Trust domain of the lab's identities.
pub const TRUST_DOMAIN: &str = "cluster.local";
/// Namespace of policies that hold everywhere.
pub const ROOT_NAMESPACE: &str = "ringfence-system";
/// Holds the marker by which [`crate::Lab::update_mesh`] sees that a change has arrived.
const REVISION_NAMESPACE: &str = "lab-revision";

/// The name that policies give to the identity of a service account of the lab.
pub fn principal(service_account: &str) -> String {
    format!("{TRUST_DOMAIN}/ns/{NAMESPACE}/sa/{service_account}")
}

/// Content of a mesh file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    pub listen: String,
    pub state_dir: PathBuf,
    pub svid_ttl: String,
    pub nodes: Vec<(String, PathBuf)>,
    pub workloads: Vec<Workload>,
    pub services: Vec<Service>,
    pub policies: Vec<Policy>,
    pub peer_authentication: Vec<PeerAuthentication>,
    /// Files in the form that Kubernetes has.
    pub manifests: Vec<PathBuf>,
    /// Counts changes; 0 is not written.
    pub revision: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    pub name: String,
    pub service_account: String,
    pub node: String,
    pub addresses: Vec<IpAddr>,
    pub mesh: bool,
    pub labels: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    pub name: String,
    pub addresses: Vec<IpAddr>,
    /// Port of the service and of its endpoints.
    pub ports: Vec<(u16, u16)>,
    pub app: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    pub name: String,
    pub namespace: String,
    /// Value of the label `app`; `None` selects the whole namespace.
    pub app: Option<String>,
    pub action: Action,
    pub rules: Vec<Rule>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    Allow,
    Deny,
}

/// Conditions that must all hold; an empty list is no condition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    pub principals: Vec<String>,
    pub namespaces: Vec<String>,
    pub ip_blocks: Vec<String>,
    pub ports: Vec<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerAuthentication {
    pub app: Option<String>,
    /// `STRICT` or `PERMISSIVE`.
    pub mode: String,
}

/// Ports of the service `web`: nginx, redis, iperf3.
pub const WEB_PORTS: [u16; 3] = [8080, 6379, 5201];
/// A port of `web` that policies admit for `client` and on which no program listens until
/// a test does.
pub const TEST_PORT: u16 = 9000;

impl Mesh {
    /// STRICT everywhere; `client` may use `web`, nobody else may.
    pub fn of(topology: &Topology, listen: IpAddr, dir: &Path) -> Self {
        let both = |vip: (std::net::Ipv4Addr, std::net::Ipv6Addr)| vec![vip.0.into(), vip.1.into()];
        let same = |ports: &[u16]| ports.iter().map(|port| (*port, *port)).collect();
        let mut services = Vec::new();
        if topology.pods.iter().any(|pod| pod.spec.app == "web") {
            services.push(Service {
                name: "web".into(),
                addresses: both(WEB_VIP),
                ports: [(80, 8080), (TEST_PORT, TEST_PORT)]
                    .into_iter()
                    .chain(WEB_PORTS.map(|p| (p, p)))
                    .collect(),
                app: "web".into(),
            });
        }
        if topology.pods.iter().any(|pod| pod.spec.app == "legacy") {
            services.push(Service {
                name: "legacy".into(),
                addresses: both(LEGACY_VIP),
                ports: same(&[8080, 5201]),
                app: "legacy".into(),
            });
        }
        Mesh {
            listen: format!("{listen}:15012"),
            state_dir: dir.join("ca"),
            svid_ttl: "24h".into(),
            nodes: topology
                .nodes
                .iter()
                .map(|node| (node.name.clone(), dir.join(format!("{}.token", node.name))))
                .collect(),
            workloads: workloads(topology),
            services,
            policies: vec![Policy::clients_may_use_web()],
            peer_authentication: vec![PeerAuthentication {
                app: None,
                mode: "STRICT".into(),
            }],
            manifests: Vec::new(),
            revision: 0,
        }
    }

    /// Name, in the status of an agent, of the marker of this revision.
    pub fn revision_marker(&self) -> String {
        format!("{REVISION_NAMESPACE}/revision-{}", self.revision)
    }

    /// Writes the file in one step, so that the control plane never reads half of it.
    pub fn write(&self, path: &Path) -> Result<()> {
        let fresh = path.with_extension("yaml.new");
        std::fs::write(&fresh, self.to_yaml())
            .with_context(|| format!("writing {}", fresh.display()))?;
        std::fs::rename(&fresh, path).with_context(|| format!("replacing {}", path.display()))
    }

    /// The file's text.
    pub fn to_yaml(&self) -> String {
        let mut out = String::from(
            "# Written by the lab; the control plane reads it again when it changes.\n",
        );
        // Writing to a String cannot fail.
        let _ = self.write_yaml(&mut out);
        out
    }

    fn write_yaml(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "trust_domain: {}", quoted(TRUST_DOMAIN))?;
        writeln!(out, "root_namespace: {}", quoted(ROOT_NAMESPACE))?;
        writeln!(out, "listen: [{}]", quoted(&self.listen))?;
        writeln!(
            out,
            "state_dir: {}",
            quoted(&self.state_dir.to_string_lossy())
        )?;
        writeln!(out, "svid_ttl: {}", quoted(&self.svid_ttl))?;
        writeln!(out, "nodes:")?;
        for (name, token) in &self.nodes {
            let token = quoted(&token.to_string_lossy());
            writeln!(out, "  - {{name: {}, token_file: {token}}}", quoted(name))?;
        }
        writeln!(out, "workloads:")?;
        for workload in &self.workloads {
            workload.write_yaml(out)?;
        }
        writeln!(out, "services:{}", empty(&self.services))?;
        for service in &self.services {
            service.write_yaml(out)?;
        }
        let marker = self.marker();
        let policies: Vec<&Policy> = self.policies.iter().chain(marker.iter()).collect();
        writeln!(out, "policies:{}", empty(&policies))?;
        for policy in policies {
            policy.write_yaml(out)?;
        }
        writeln!(
            out,
            "peer_authentication:{}",
            empty(&self.peer_authentication)
        )?;
        for entry in &self.peer_authentication {
            let mut fields = format!("namespace: {}", quoted(NAMESPACE));
            if let Some(app) = &entry.app {
                write!(fields, ", selector: {{app: {}}}", quoted(app))?;
            }
            writeln!(out, "  - {{{fields}, mode: {}}}", entry.mode)?;
        }
        let manifests: Vec<_> = self.manifests.iter().map(|path| path.display()).collect();
        writeln!(out, "manifests: {}", list(&manifests))
    }

    /// A policy of a namespace without workloads, for nothing but its name.
    fn marker(&self) -> Option<Policy> {
        (self.revision > 0).then(|| Policy {
            name: format!("revision-{}", self.revision),
            namespace: REVISION_NAMESPACE.into(),
            app: None,
            action: Action::Allow,
            rules: vec![Rule {
                ports: vec![1],
                ..Rule::default()
            }],
        })
    }
}

fn workloads(topology: &Topology) -> Vec<Workload> {
    topology
        .pods
        .iter()
        .filter(|pod| pod.spec.role != Role::Outside)
        .map(|pod| Workload {
            name: pod.name().to_owned(),
            service_account: pod.name().to_owned(),
            node: topology
                .node_of(pod)
                .map(|node| node.name.clone())
                .unwrap_or_default(),
            addresses: vec![pod.addresses.0.into(), pod.addresses.1.into()],
            mesh: pod.spec.role == Role::Mesh,
            labels: [("app".to_owned(), pod.spec.app.clone())].into(),
        })
        .collect()
}

impl Policy {
    /// `client`, and nobody else, may connect to the ports of `web`.
    pub fn clients_may_use_web() -> Self {
        Policy {
            name: "clients-may-use-web".into(),
            namespace: NAMESPACE.into(),
            app: Some("web".into()),
            action: Action::Allow,
            rules: vec![Rule {
                principals: vec![principal("client")],
                ports: WEB_PORTS.into_iter().chain([TEST_PORT]).collect(),
                ..Rule::default()
            }],
        }
    }

    fn write_yaml(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "  - name: {}", quoted(&self.name))?;
        writeln!(out, "    namespace: {}", quoted(&self.namespace))?;
        if let Some(app) = &self.app {
            writeln!(out, "    selector: {{app: {}}}", quoted(app))?;
        }
        let action = match self.action {
            Action::Allow => "ALLOW",
            Action::Deny => "DENY",
        };
        writeln!(out, "    action: {action}")?;
        writeln!(out, "    rules:{}", empty(&self.rules))?;
        for rule in &self.rules {
            writeln!(out, "      - {{{}}}", rule.fields().join(", "))?;
        }
        Ok(())
    }
}

impl Rule {
    fn fields(&self) -> Vec<String> {
        let from: Vec<String> = [
            ("principals", &self.principals),
            ("namespaces", &self.namespaces),
            ("ip_blocks", &self.ip_blocks),
        ]
        .into_iter()
        .filter(|(_, values)| !values.is_empty())
        .map(|(name, values)| format!("{name}: {}", list(values)))
        .collect();
        let mut fields = Vec::new();
        if !from.is_empty() {
            fields.push(format!("from: [{{{}}}]", from.join(", ")));
        }
        if !self.ports.is_empty() {
            let ports: Vec<String> = self.ports.iter().map(u16::to_string).collect();
            fields.push(format!("to: [{{ports: [{}]}}]", ports.join(", ")));
        }
        fields
    }
}

impl Workload {
    fn write_yaml(&self, out: &mut String) -> std::fmt::Result {
        let labels: Vec<String> = self
            .labels
            .iter()
            .map(|(key, value)| format!("{key}: {}", quoted(value)))
            .collect();
        writeln!(out, "  - name: {}", quoted(&self.name))?;
        writeln!(out, "    namespace: {}", quoted(NAMESPACE))?;
        writeln!(
            out,
            "    service_account: {}",
            quoted(&self.service_account)
        )?;
        writeln!(out, "    node: {}", quoted(&self.node))?;
        writeln!(out, "    addresses: {}", list(&self.addresses))?;
        writeln!(out, "    mesh: {}", self.mesh)?;
        writeln!(out, "    labels: {{{}}}", labels.join(", "))
    }
}

impl Service {
    fn write_yaml(&self, out: &mut String) -> std::fmt::Result {
        let ports: Vec<String> = self
            .ports
            .iter()
            .map(|(port, target)| format!("{{port: {port}, target_port: {target}}}"))
            .collect();
        writeln!(out, "  - name: {}", quoted(&self.name))?;
        writeln!(out, "    namespace: {}", quoted(NAMESPACE))?;
        writeln!(out, "    addresses: {}", list(&self.addresses))?;
        writeln!(out, "    ports: [{}]", ports.join(", "))?;
        writeln!(out, "    selector: {{app: {}}}", quoted(&self.app))
    }
}

fn empty<T>(list: &[T]) -> &'static str {
    if list.is_empty() { " []" } else { "" }
}

fn list<T: ToString>(values: &[T]) -> String {
    let values: Vec<String> = values
        .iter()
        .map(|value| quoted(&value.to_string()))
        .collect();
    format!("[{}]", values.join(", "))
}

/// A double-quoted scalar: JSON's escapes are YAML's.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::topology::PodSpec;

    fn mesh() -> Mesh {
        let topology = Topology::new("rf-", 2, PodSpec::defaults(2)).unwrap();
        Mesh::of(&topology, "10.77.0.1".parse().unwrap(), Path::new("/run/x"))
    }

    #[test]
    fn outsiders_are_unknown_to_the_control_plane() {
        let mesh = mesh();
        assert!(
            mesh.workloads
                .iter()
                .any(|workload| workload.name == "legacy" && !workload.mesh)
        );
        assert!(
            !mesh
                .workloads
                .iter()
                .any(|workload| workload.name.starts_with("outside"))
        );
    }

    #[test]
    fn a_rule_without_conditions_is_an_empty_map() {
        let mut mesh = mesh();
        mesh.policies = vec![Policy {
            rules: vec![Rule::default()],
            ..Policy::clients_may_use_web()
        }];
        assert!(
            mesh.to_yaml().contains("rules:\n      - {}\n"),
            "{}",
            mesh.to_yaml()
        );
    }

    #[test]
    fn a_revision_marker_is_written_only_after_a_change() {
        let mut mesh = mesh();
        assert!(!mesh.to_yaml().contains("lab-revision"));
        mesh.revision = 3;
        assert!(mesh.to_yaml().contains("\"revision-3\""));
    }

    #[test]
    fn text_is_quoted_so_that_it_stays_text() {
        assert_eq!(quoted("a\"b: c"), r#""a\"b: c""#);
    }
}
