//! The mesh file as it is written. Values that need more than a type are kept
//! as text with their place, so that every mistake can be reported at once.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde_saphyr::Spanned;

pub(super) type Text = Spanned<String>;
pub(super) type Labels = BTreeMap<String, String>;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mesh {
    pub trust_domain: Option<Text>,
    pub root_namespace: Option<Text>,
    pub cluster_id: Option<Text>,
    pub listen: Spanned<Vec<Text>>,
    pub state_dir: Option<PathBuf>,
    #[serde(default)]
    pub server_names: Vec<Text>,
    pub svid_ttl: Option<Text>,
    #[serde(default)]
    pub nodes: Vec<Node>,
    #[serde(default)]
    pub workloads: Vec<Workload>,
    #[serde(default)]
    pub services: Vec<Service>,
    #[serde(default)]
    pub policies: Vec<Policy>,
    #[serde(default)]
    pub peer_authentication: Vec<PeerAuthentication>,
    #[serde(default)]
    pub manifests: Vec<Spanned<PathBuf>>,
    pub l7: Option<Text>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Node {
    pub name: Text,
    pub token_file: Spanned<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Workload {
    pub name: Text,
    pub namespace: Text,
    pub service_account: Option<Text>,
    pub node: Text,
    pub addresses: Spanned<Vec<Text>>,
    pub mesh: Option<bool>,
    #[serde(default)]
    pub labels: Labels,
    pub healthy: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Service {
    pub name: Text,
    pub namespace: Text,
    pub hostname: Option<Text>,
    pub addresses: Spanned<Vec<Text>>,
    pub ports: Spanned<Vec<ServicePort>>,
    pub selector: Option<Spanned<Labels>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServicePort {
    pub port: Spanned<i64>,
    pub target_port: Option<Spanned<i64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Policy {
    pub name: Text,
    pub namespace: Text,
    pub selector: Option<Spanned<Labels>>,
    pub action: Option<Text>,
    #[serde(default)]
    pub rules: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rule {
    pub from: Option<Spanned<Vec<Spanned<Source>>>>,
    pub to: Option<Spanned<Vec<Spanned<Operation>>>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
pub(super) struct Source {
    pub principals: Vec<Text>,
    pub not_principals: Vec<Text>,
    pub namespaces: Vec<Text>,
    pub not_namespaces: Vec<Text>,
    pub ip_blocks: Vec<Text>,
    pub not_ip_blocks: Vec<Text>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
pub(super) struct Operation {
    pub ports: Vec<Spanned<i64>>,
    pub not_ports: Vec<Spanned<i64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PeerAuthentication {
    pub namespace: Text,
    pub selector: Option<Spanned<Labels>>,
    pub mode: Text,
}
