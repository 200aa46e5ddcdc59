//! The mesh as xDS resources, rendered the way Istiod renders it.

mod converted;

use std::collections::BTreeMap;
use std::net::IpAddr;

use prost::Message;
use prost_types::Any;
use ringfence_xds::proto::discovery::Resource;
use ringfence_xds::proto::security::{
    Action as ProtoAction, Address as ProtoCidr, Authorization, Clause, Match, Rule as ProtoRule,
    Scope, StringMatch, string_match::MatchType,
};
use ringfence_xds::proto::workload::{
    Address, NetworkAddress, NetworkMode, Port, PortList, Service as ProtoService, TunnelProtocol,
    Workload as ProtoWorkload, WorkloadStatus, address,
};
use ringfence_xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

use crate::config::{
    Action, Cidr, MeshConfig, Operation, Policy, Service, ServicePort, Source, TextMatch, Workload,
    selects,
};

/// All resources of one type by name.
pub(crate) type Resources = BTreeMap<String, Resource>;

#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    addresses: Resources,
    authorizations: Resources,
}

impl Snapshot {
    pub(crate) fn render(config: &MeshConfig) -> Self {
        let workloads = config.workloads.iter().map(|workload| {
            let rendered = render_workload(config, workload);
            (
                rendered.uid.clone(),
                Address {
                    r#type: Some(address::Type::Workload(rendered)),
                },
            )
        });
        let services = config.services.iter().map(|service| {
            (
                service_key(service),
                Address {
                    r#type: Some(address::Type::Service(render_service(service))),
                },
            )
        });
        let addresses = workloads
            .chain(services)
            .map(|(name, value)| resource(ADDRESS_TYPE, name, &value));
        let authorizations = config.policies.iter().map(|policy| {
            resource(
                AUTHORIZATION_TYPE,
                policy_key(policy),
                &render_policy(config, policy),
            )
        });
        let converted = config.converted.policies().map(|converted| {
            let policy = &converted.policy;
            let name = policy.name.to_string();
            resource(AUTHORIZATION_TYPE, name, &converted::render(policy))
        });
        Self {
            addresses: addresses.collect(),
            authorizations: authorizations.chain(converted).collect(),
        }
    }

    /// `None`: a type that is not served here.
    pub(crate) fn resources(&self, type_url: &str) -> Option<&Resources> {
        match type_url {
            ADDRESS_TYPE => Some(&self.addresses),
            AUTHORIZATION_TYPE => Some(&self.authorizations),
            _ => None,
        }
    }
}

fn resource(type_url: &str, name: String, value: &impl Message) -> (String, Resource) {
    let value = value.encode_to_vec();
    // The content is the version: a restarted control plane gives unchanged
    // resources the versions that the agents already know.
    let digest = ring::digest::digest(&ring::digest::SHA256, &value);
    let version = digest
        .as_ref()
        .iter()
        .take(VERSION_BYTES)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let any = Any {
        type_url: type_url.to_owned(),
        value,
    };
    (
        name.clone(),
        Resource {
            version,
            resource: Some(any),
            name,
            aliases: Vec::new(),
        },
    )
}

fn render_workload(config: &MeshConfig, workload: &Workload) -> ProtoWorkload {
    let Workload {
        name,
        namespace,
        labels,
        ..
    } = workload;
    let cluster = &config.cluster_id;
    let services = config
        .services
        .iter()
        .filter(|s| {
            s.namespace == *namespace && !s.selector.is_empty() && selects(&s.selector, labels)
        })
        .map(|service| {
            (
                service_key(service),
                PortList {
                    ports: ports(&service.ports),
                },
            )
        });
    let services: BTreeMap<_, _> = services.collect();
    let app = labels
        .get("app.kubernetes.io/name")
        .or_else(|| labels.get("app"))
        .unwrap_or(name);
    let status = if workload.healthy {
        WorkloadStatus::Healthy
    } else {
        WorkloadStatus::Unhealthy
    };
    let tunnel = if workload.mesh {
        TunnelProtocol::Hbone
    } else {
        TunnelProtocol::None
    };
    ProtoWorkload {
        name: name.clone(),
        namespace: namespace.clone(),
        addresses: workload.addresses.iter().map(address_bytes).collect(),
        tunnel_protocol: tunnel as i32,
        trust_domain: config.trust_domain.clone(),
        service_account: workload.service_account.clone(),
        node: workload.node.clone(),
        canonical_name: app.clone(),
        canonical_revision: labels
            .get("version")
            .cloned()
            .unwrap_or_else(|| "latest".to_owned()),
        workload_name: name.clone(),
        authorization_policies: policies_of(config, workload),
        status: status as i32,
        cluster_id: cluster.clone(),
        uid: format!("{cluster}//Pod/{namespace}/{name}"),
        services,
        network_mode: NetworkMode::Standard as i32,
        ..ProtoWorkload::default()
    }
}

/// The policies that a workload names itself: those with a selector, and what stands for
/// its mode. Those of its namespace and the global ones apply without being named.
fn policies_of(config: &MeshConfig, workload: &Workload) -> Vec<String> {
    let selected = config.policies.iter().filter(|policy| {
        let in_scope =
            policy.namespace == workload.namespace || policy.namespace == config.root_namespace;
        in_scope
            && policy
                .selector
                .as_ref()
                .is_some_and(|selector| selects(selector, &workload.labels))
    });
    let mut names: Vec<_> = selected.map(policy_key).collect();
    let attached = config
        .converted
        .attached(&workload.namespace, &workload.labels);
    names.extend(attached.iter().map(ToString::to_string));
    names
}

fn render_service(service: &Service) -> ProtoService {
    let addresses = service.addresses.iter();
    ProtoService {
        name: service.name.clone(),
        namespace: service.namespace.clone(),
        hostname: service.hostname.clone(),
        addresses: addresses
            .map(|a| NetworkAddress {
                network: String::new(),
                address: address_bytes(a),
            })
            .collect(),
        ports: ports(&service.ports),
        ..ProtoService::default()
    }
}

fn render_policy(config: &MeshConfig, policy: &Policy) -> Authorization {
    let scope = if policy.selector.is_some() {
        Scope::WorkloadSelector
    } else if policy.namespace == config.root_namespace {
        Scope::Global
    } else {
        Scope::Namespace
    };
    let action = match policy.action {
        Action::Allow => ProtoAction::Allow,
        Action::Deny => ProtoAction::Deny,
    };
    let rules = policy.rules.iter().map(|rule| {
        let from: Vec<_> = rule.from.iter().map(render_source).collect();
        let to: Vec<_> = rule.to.iter().map(render_operation).collect();
        // A clause without a match would match everything, as its absence does.
        let clauses = [from, to].into_iter().filter(|matches| !matches.is_empty());
        ProtoRule {
            clauses: clauses.map(|matches| Clause { matches }).collect(),
        }
    });
    Authorization {
        name: policy.name.clone(),
        namespace: policy.namespace.clone(),
        scope: scope as i32,
        action: action as i32,
        rules: rules.collect(),
        dry_run: false,
    }
}

fn render_source(source: &Source) -> Match {
    Match {
        principals: text_matches(&source.principals),
        not_principals: text_matches(&source.not_principals),
        namespaces: text_matches(&source.namespaces),
        not_namespaces: text_matches(&source.not_namespaces),
        source_ips: cidrs(&source.ip_blocks),
        not_source_ips: cidrs(&source.not_ip_blocks),
        ..Match::default()
    }
}

fn render_operation(operation: &Operation) -> Match {
    Match {
        destination_ports: operation.ports.iter().copied().map(u32::from).collect(),
        not_destination_ports: operation.not_ports.iter().copied().map(u32::from).collect(),
        ..Match::default()
    }
}

fn text_matches(matches: &[TextMatch]) -> Vec<StringMatch> {
    let render = |text: &TextMatch| match text {
        TextMatch::Exact(text) => MatchType::Exact(text.clone()),
        TextMatch::Prefix(text) => MatchType::Prefix(text.clone()),
        TextMatch::Suffix(text) => MatchType::Suffix(text.clone()),
        TextMatch::Presence => MatchType::Presence(()),
    };
    matches
        .iter()
        .map(|text| StringMatch {
            match_type: Some(render(text)),
        })
        .collect()
}

fn cidrs(blocks: &[Cidr]) -> Vec<ProtoCidr> {
    let render = |block: &Cidr| ProtoCidr {
        address: address_bytes(&block.address),
        length: block.length.into(),
    };
    blocks.iter().map(render).collect()
}

fn ports(ports: &[ServicePort]) -> Vec<Port> {
    let render = |p: &ServicePort| Port {
        service_port: p.port.into(),
        target_port: p.target_port.into(),
    };
    ports.iter().map(render).collect()
}

fn address_bytes(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn service_key(service: &Service) -> String {
    format!("{}/{}", service.namespace, service.hostname)
}

fn policy_key(policy: &Policy) -> String {
    format!("{}/{}", policy.namespace, policy.name)
}

/// Enough that two contents never share a version by chance.
const VERSION_BYTES: usize = 16;

#[cfg(test)]
mod tests;
