//! From what is written to what is meant. Goes on after an error, so that all
//! of them are shown; the result is thrown away if there was one.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_saphyr::{Location, Spanned};
use zeroize::Zeroizing;

use super::diagnostic::{Diagnostic, Diagnostics};
use super::{
    ConfigError, Loaded, MeshConfig, Node, Service, ServicePort, Workload, manifests, schema,
    selects, value,
};

pub(super) fn check(file: &Path, mesh: schema::Mesh) -> Result<Loaded, ConfigError> {
    let directory = file.parent().unwrap_or(Path::new("")).to_owned();
    let mut checker = Checker {
        diagnostics: Diagnostics::new(file),
        directory,
        addresses: HashMap::new(),
    };
    let config = checker.mesh(mesh);
    let Diagnostics {
        mut errors,
        warnings,
        ..
    } = checker.diagnostics;
    if errors.is_empty() {
        return Ok(Loaded { config, warnings });
    }
    // The mesh file first, then the manifests.
    errors.sort_by(|a, b| {
        let key = |d: &Diagnostic| (d.file != file, d.file.clone(), d.line, d.column);
        key(a).cmp(&key(b))
    });
    Err(ConfigError::Invalid(errors))
}

pub(super) struct Checker<'a> {
    pub(super) diagnostics: Diagnostics<'a>,
    /// Relative paths start here.
    pub(super) directory: PathBuf,
    /// Who has which address.
    addresses: HashMap<IpAddr, Location>,
}

impl Checker<'_> {
    fn mesh(&mut self, mesh: schema::Mesh) -> MeshConfig {
        let trust_domain = match mesh.trust_domain {
            Some(text) => {
                self.take(
                    "trust_domain",
                    text.referenced,
                    value::trust_domain(&text.value),
                );
                text.value
            }
            None => DEFAULT_TRUST_DOMAIN.to_owned(),
        };
        let root_namespace = match mesh.root_namespace {
            Some(text) => self.object_name("root_namespace", text),
            None => DEFAULT_ROOT_NAMESPACE.to_owned(),
        };
        let cluster_id_required = mesh.cluster_id.is_some();
        let cluster_id = match mesh.cluster_id {
            Some(text) => {
                let ok = !text.value.is_empty()
                    && text
                        .value
                        .bytes()
                        .all(|b| b.is_ascii_graphic() && b != b'/');
                let result = if ok {
                    Ok(())
                } else {
                    Err("expected printable ASCII without spaces and `/`".to_owned())
                };
                self.take("cluster_id", text.referenced, result);
                text.value
            }
            None => DEFAULT_CLUSTER_ID.to_owned(),
        };
        let svid_ttl = mesh
            .svid_ttl
            .and_then(|t| self.take("svid_ttl", t.referenced, value::duration(&t.value)));
        let server_names = mesh.server_names.into_iter().enumerate();
        let server_names = server_names
            .filter_map(|(i, t)| {
                self.take(
                    &format!("server_names[{i}]"),
                    t.referenced,
                    value::server_name(&t.value),
                )
            })
            .collect();
        let listen = self.listen(mesh.listen);
        let nodes = self.nodes(mesh.nodes);
        let workloads = self.workloads(mesh.workloads, &nodes);
        let services = self.services(mesh.services, &workloads);
        let policies = self.policies(mesh.policies, &root_namespace, &workloads);
        let native_modes = self.peer_authentication(mesh.peer_authentication, &workloads);
        let manifests::Served {
            converted,
            folders: manifest_folders,
        } = self.manifests(
            mesh.manifests,
            mesh.l7,
            manifests::Native {
                root_namespace: &root_namespace,
                workloads: &workloads,
                policies: &policies,
                modes: native_modes,
            },
        );
        MeshConfig {
            trust_domain,
            root_namespace,
            cluster_id,
            cluster_id_required,
            listen,
            state_dir: self
                .directory
                .join(mesh.state_dir.unwrap_or_else(|| DEFAULT_STATE_DIR.into())),
            server_names,
            svid_ttl: svid_ttl.unwrap_or(DEFAULT_SVID_TTL),
            nodes,
            workloads,
            services,
            policies,
            converted,
            manifest_folders,
        }
    }

    fn listen(&mut self, raw: Spanned<Vec<schema::Text>>) -> Vec<SocketAddr> {
        if raw.value.is_empty() {
            self.diagnostics.error(
                raw.referenced,
                "listen",
                "is empty: expected at least one address:port",
            );
        }
        let mut listen = Vec::new();
        let mut seen = HashMap::new();
        for (index, text) in raw.value.into_iter().enumerate() {
            let field = format!("listen[{index}]");
            let parsed = text.value.parse::<SocketAddr>().map_err(|_| {
                format!(
                    "`{}` is not address:port: expected like 10.0.0.1:15012 or [::]:15012",
                    text.value
                )
            });
            if let Some(address) = self.take(&field, text.referenced, parsed) {
                // Port 0 lets the kernel choose, any number of times.
                if address.port() != 0 {
                    self.unique(&mut seen, address, text.referenced, &field, || {
                        format!("`{address}`")
                    });
                }
                listen.push(address);
            }
        }
        listen
    }

    fn nodes(&mut self, raw: Vec<schema::Node>) -> Vec<Node> {
        let mut nodes = Vec::new();
        let mut names = HashMap::new();
        for (index, node) in raw.into_iter().enumerate() {
            let at = node.name.referenced;
            let name = self.object_name(&format!("nodes[{index}].name"), node.name);
            self.unique(
                &mut names,
                name.clone(),
                at,
                &format!("nodes[{index}].name"),
                || format!("a node `{name}`"),
            );
            let field = format!("nodes[{index}].token_file");
            let at = node.token_file.referenced;
            let token_file = self.directory.join(node.token_file.value);
            let Some(token) = self.take(&field, at, read_token(&token_file)) else {
                continue;
            };
            if token.len() < SHORT_TOKEN {
                let message = format!(
                    "{} holds fewer than {SHORT_TOKEN} characters: easily guessed",
                    token_file.display()
                );
                self.diagnostics.warning(at, &field, message);
            }
            // Two nodes with one token could not be told apart.
            if let Some(other) = nodes.iter().find(|node: &&Node| node.token == token) {
                let message = format!(
                    "{} holds the token of node `{}` too",
                    token_file.display(),
                    other.name
                );
                self.diagnostics.error(at, &field, message);
            }
            nodes.push(Node {
                name,
                token,
                token_file,
            });
        }
        nodes
    }

    fn workloads(&mut self, raw: Vec<schema::Workload>, nodes: &[Node]) -> Vec<Workload> {
        let mut workloads = Vec::new();
        let mut names = HashMap::new();
        for (index, workload) in raw.into_iter().enumerate() {
            let field = format!("workloads[{index}]");
            let at = workload.name.referenced;
            let name = self.object_name(&format!("{field}.name"), workload.name);
            let namespace = self.object_name(&format!("{field}.namespace"), workload.namespace);
            self.unique(
                &mut names,
                (namespace.clone(), name.clone()),
                at,
                &format!("{field}.name"),
                || format!("a workload `{namespace}/{name}`"),
            );
            let service_account = match workload.service_account {
                Some(text) => self.object_name(&format!("{field}.service_account"), text),
                None => DEFAULT_SERVICE_ACCOUNT.to_owned(),
            };
            let node = workload.node.value;
            if !nodes.iter().any(|known| known.name == node) {
                let known: Vec<_> = nodes.iter().map(|node| node.name.as_str()).collect();
                let message = format!(
                    "`{node}` is not in `nodes`: expected one of [{}]",
                    known.join(", ")
                );
                self.diagnostics
                    .error(workload.node.referenced, format!("{field}.node"), message);
            }
            workloads.push(Workload {
                name,
                namespace,
                service_account,
                node,
                addresses: self.host_addresses(&format!("{field}.addresses"), workload.addresses),
                mesh: workload.mesh.unwrap_or(true),
                labels: workload.labels,
                healthy: workload.healthy.unwrap_or(true),
            });
        }
        workloads
    }

    fn services(&mut self, raw: Vec<schema::Service>, workloads: &[Workload]) -> Vec<Service> {
        let mut services = Vec::new();
        let mut hostnames = HashMap::new();
        for (index, service) in raw.into_iter().enumerate() {
            let field = format!("services[{index}]");
            let at = service.name.referenced;
            let name = self.object_name(&format!("{field}.name"), service.name);
            let namespace = self.object_name(&format!("{field}.namespace"), service.namespace);
            let (hostname, hostname_at) = match service.hostname {
                Some(text) => {
                    let hostname_at = text.referenced;
                    (
                        self.object_name(&format!("{field}.hostname"), text),
                        hostname_at,
                    )
                }
                None => (format!("{name}.{namespace}.svc.{CLUSTER_DOMAIN}"), at),
            };
            let key = (namespace.clone(), hostname.clone());
            self.unique(
                &mut hostnames,
                key,
                hostname_at,
                &format!("{field}.hostname"),
                || format!("a service `{namespace}/{hostname}`"),
            );
            let selector = match service.selector {
                Some(selector) => {
                    let in_scope = |w: &&Workload| w.namespace == namespace;
                    self.selector(
                        &format!("{field}.selector"),
                        selector,
                        workloads.iter().filter(in_scope),
                    )
                    .unwrap_or_default()
                }
                None => {
                    let message = "is missing, so the service has no endpoint";
                    self.diagnostics
                        .warning(at, format!("{field}.selector"), message);
                    BTreeMap::new()
                }
            };
            services.push(Service {
                name,
                namespace,
                hostname,
                addresses: self.host_addresses(&format!("{field}.addresses"), service.addresses),
                ports: self.service_ports(&format!("{field}.ports"), service.ports),
                selector,
            });
        }
        services
    }

    fn service_ports(
        &mut self,
        field: &str,
        raw: Spanned<Vec<schema::ServicePort>>,
    ) -> Vec<ServicePort> {
        if raw.value.is_empty() {
            self.diagnostics.error(
                raw.referenced,
                field,
                "is empty: expected at least one port",
            );
        }
        let mut ports = Vec::new();
        let mut seen = HashMap::new();
        for (index, entry) in raw.value.into_iter().enumerate() {
            let at = entry.port.referenced;
            let port_field = format!("{field}[{index}].port");
            let port = self.take(&port_field, at, value::port(entry.port.value));
            let target_port = match entry.target_port {
                Some(target) => self.take(
                    &format!("{field}[{index}].target_port"),
                    target.referenced,
                    value::port(target.value),
                ),
                None => port,
            };
            let (Some(port), Some(target_port)) = (port, target_port) else {
                continue;
            };
            self.unique(&mut seen, port, at, &port_field, || format!("port {port}"));
            ports.push(ServicePort { port, target_port });
        }
        ports
    }

    fn host_addresses(&mut self, field: &str, raw: Spanned<Vec<schema::Text>>) -> Vec<IpAddr> {
        if raw.value.is_empty() {
            self.diagnostics.error(
                raw.referenced,
                field,
                "is empty: expected at least one IP address",
            );
        }
        let mut result = Vec::new();
        for (index, text) in raw.value.into_iter().enumerate() {
            let field = format!("{field}[{index}]");
            let Some(address) =
                self.take(&field, text.referenced, value::host_address(&text.value))
            else {
                continue;
            };
            let mut addresses = std::mem::take(&mut self.addresses);
            self.unique(&mut addresses, address, text.referenced, &field, || {
                format!("address {address}")
            });
            self.addresses = addresses;
            result.push(address);
        }
        result
    }

    /// `None` after an error. Selecting nothing is odd (a typing mistake?), not wrong.
    pub(super) fn selector<'w>(
        &mut self,
        field: &str,
        selector: Spanned<schema::Labels>,
        mut in_scope: impl Iterator<Item = &'w Workload>,
    ) -> Option<schema::Labels> {
        if selector.value.is_empty() {
            self.diagnostics.error(
                selector.referenced,
                field,
                "is empty: expected labels like {app: web}, or leave it out",
            );
            return None;
        }
        if !in_scope.any(|workload| selects(&selector.value, &workload.labels)) {
            self.diagnostics
                .warning(selector.referenced, field, "selects no workload");
        }
        Some(selector.value)
    }

    pub(super) fn object_name(&mut self, field: &str, text: schema::Text) -> String {
        self.take(field, text.referenced, value::object_name(&text.value));
        text.value
    }

    pub(super) fn unique<K: Eq + Hash>(
        &mut self,
        seen: &mut HashMap<K, Location>,
        key: K,
        at: Location,
        field: &str,
        what: impl FnOnce() -> String,
    ) {
        match seen.get(&key) {
            Some(earlier) => {
                let message = format!("{} is already at line {}", what(), earlier.line());
                self.diagnostics.error(at, field, message);
            }
            None => {
                seen.insert(key, at);
            }
        }
    }

    pub(super) fn take<T>(
        &mut self,
        field: &str,
        at: Location,
        result: Result<T, String>,
    ) -> Option<T> {
        result
            .map_err(|message| self.diagnostics.error(at, field, message))
            .ok()
    }
}

fn read_token(path: &Path) -> Result<Zeroizing<String>, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    let text = Zeroizing::new(text);
    let token = text.trim();
    if token.is_empty() {
        return Err(format!(
            "{} is empty: expected the node's bearer token",
            path.display()
        ));
    }
    if !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(format!(
            "{} holds more than one token: expected printable ASCII without spaces",
            path.display()
        ));
    }
    Ok(Zeroizing::new(token.to_owned()))
}

const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
const DEFAULT_ROOT_NAMESPACE: &str = "ringfence-system";
/// Istio's name for the first cluster.
const DEFAULT_CLUSTER_ID: &str = "Kubernetes";
const DEFAULT_STATE_DIR: &str = "/var/lib/ringfence";
const DEFAULT_SERVICE_ACCOUNT: &str = "default";
const DEFAULT_SVID_TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// DNS domain of service hostnames; not the trust domain.
const CLUSTER_DOMAIN: &str = "cluster.local";
const SHORT_TOKEN: usize = 16;
