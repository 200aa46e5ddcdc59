//! The mesh file: read, parsed and checked as a whole. A [`MeshConfig`] that
//! exists is valid; there is no partly valid one.

mod check;
mod diagnostic;
mod manifests;
mod policy;
mod schema;
mod value;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ringfence_manifest::Converted;
use zeroize::Zeroizing;

pub use diagnostic::{ConfigError, Diagnostic};

/// A checked mesh file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct MeshConfig {
    pub trust_domain: String,
    pub root_namespace: String,
    pub cluster_id: String,
    /// Requests that name another cluster are refused (the file names one).
    pub cluster_id_required: bool,
    pub listen: Vec<SocketAddr>,
    pub state_dir: PathBuf,
    pub server_names: Vec<ServerName>,
    pub svid_ttl: Duration,
    pub nodes: Vec<Node>,
    pub workloads: Vec<Workload>,
    pub services: Vec<Service>,
    pub policies: Vec<Policy>,
    /// From the manifests that the file names; the modes of its `peer_authentication` are
    /// in it as well.
    pub converted: Converted,
    /// Folders in which files of the configuration come and go.
    pub manifest_folders: Vec<PathBuf>,
}

/// A mesh file together with what was odd about it.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub config: MeshConfig,
    pub warnings: Vec<Diagnostic>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ServerName {
    Dns(String),
    Ip(IpAddr),
}

#[derive(Clone, PartialEq)]
pub(crate) struct Node {
    pub name: String,
    pub token: Zeroizing<String>,
    pub token_file: PathBuf,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Workload {
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    pub node: String,
    pub addresses: Vec<IpAddr>,
    pub mesh: bool,
    pub labels: BTreeMap<String, String>,
    pub healthy: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Service {
    pub name: String,
    pub namespace: String,
    pub hostname: String,
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// Empty selects nothing.
    pub selector: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ServicePort {
    pub port: u16,
    pub target_port: u16,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Policy {
    pub name: String,
    pub namespace: String,
    pub selector: Option<BTreeMap<String, String>>,
    pub action: Action,
    pub rules: Vec<Rule>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Allow,
    Deny,
}

/// Both lists empty: matches every connection.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rule {
    pub from: Vec<Source>,
    pub to: Vec<Operation>,
}

/// At least one list is not empty.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Source {
    pub principals: Vec<TextMatch>,
    pub not_principals: Vec<TextMatch>,
    pub namespaces: Vec<TextMatch>,
    pub not_namespaces: Vec<TextMatch>,
    pub ip_blocks: Vec<Cidr>,
    pub not_ip_blocks: Vec<Cidr>,
}

/// At least one list is not empty.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Operation {
    pub ports: Vec<u16>,
    pub not_ports: Vec<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TextMatch {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Presence,
}

/// Bits beyond the prefix are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cidr {
    pub address: IpAddr,
    /// Bits: 0..=32 or 0..=128.
    pub length: u8,
}

impl MeshConfig {
    /// Reads the file, and the token files and manifests that it names.
    pub(crate) fn load(path: &Path) -> Result<Loaded, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let mut track = serde_path_to_error::Track::new();
        let parsed = serde_saphyr::with_deserializer_from_str(&text, |deserializer| {
            let deserializer = serde_path_to_error::Deserializer::new(deserializer, &mut track);
            <schema::Mesh as serde::Deserialize>::deserialize(deserializer)
        });
        let mesh = parsed.map_err(|error| ConfigError::syntax(path, &error, &track.path()))?;
        check::check(path, mesh)
    }

    /// The other files that this configuration depends on.
    pub(crate) fn token_files(&self) -> impl Iterator<Item = &Path> {
        self.nodes.iter().map(|node| node.token_file.as_path())
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Does a selector with these labels select something that has those?
pub(crate) fn selects(
    selector: &BTreeMap<String, String>,
    labels: &BTreeMap<String, String>,
) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests;
