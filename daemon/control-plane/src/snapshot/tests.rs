#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::fs;

use tempfile::TempDir;

use super::*;

const MESH: &str = r#"
listen: ["127.0.0.1:0"]
root_namespace: root
nodes: [{name: node-a, token_file: token}]
workloads:
  - {name: web, namespace: demo, service_account: web, node: node-a, addresses: [10.0.0.1, "fd00::1"], labels: {app: web, tier: front}}
  - {name: db, namespace: demo, node: node-a, addresses: [10.0.0.2], mesh: false, healthy: false}
  - {name: other, namespace: elsewhere, node: node-a, addresses: [10.0.0.3], labels: {app: web}}
services:
  - {name: web, namespace: demo, addresses: [10.96.0.1, "fd96::1"], ports: [{port: 80, target_port: 8080}], selector: {app: web}}
  - {name: front, namespace: demo, addresses: [10.96.0.2], ports: [{port: 81}], selector: {tier: front}}
policies:
  - {name: selected, namespace: demo, selector: {app: web}, action: DENY, rules: [{from: [{principals: ["*", "a*", "*b", "c"], ip_blocks: [10.0.0.0/8, "fd00::/16"]}, {not_namespaces: [x]}], to: [{ports: [80], not_ports: [81]}]}]}
  - {name: whole, namespace: demo, rules: [{}]}
  - {name: global, namespace: root}
  - {name: everywhere, namespace: root, selector: {app: web}}
peer_authentication:
"#;

#[test]
fn workload_carries_identity_addresses_services_and_selected_policies() {
    let web = workload("demo/web", "[]");
    assert_eq!(web.uid, "Kubernetes//Pod/demo/web");
    assert_eq!(
        web.addresses,
        [vec![10, 0, 0, 1], [&[0xfd][..], &[0; 14], &[1]].concat()]
    );
    assert_eq!(
        (web.trust_domain.as_str(), web.service_account.as_str()),
        ("cluster.local", "web")
    );
    assert_eq!(web.tunnel_protocol(), TunnelProtocol::Hbone);
    assert_eq!(web.status(), WorkloadStatus::Healthy);
    assert_eq!(web.node, "node-a");
    let services: Vec<_> = web.services.keys().map(String::as_str).collect();
    assert_eq!(
        services,
        [
            "demo/front.demo.svc.cluster.local",
            "demo/web.demo.svc.cluster.local"
        ]
    );
    assert_eq!(
        web.services["demo/web.demo.svc.cluster.local"].ports,
        [Port {
            service_port: 80,
            target_port: 8080
        }]
    );
    assert_eq!(
        web.services["demo/front.demo.svc.cluster.local"].ports,
        [Port {
            service_port: 81,
            target_port: 81
        }]
    );
    assert_eq!(
        web.authorization_policies,
        ["demo/selected", "root/everywhere"]
    );
}

#[test]
fn workload_that_no_selector_matches_has_no_services_and_no_policies() {
    let db = workload("demo/db", "[]");
    assert!(db.services.is_empty() && db.authorization_policies.is_empty());
    assert_eq!(db.tunnel_protocol(), TunnelProtocol::None);
    assert_eq!(db.status(), WorkloadStatus::Unhealthy);
    assert_eq!(db.service_account, "default");
    // Same labels, other namespace: only the policy of the root namespace selects it.
    let other = workload("elsewhere/other", "[]");
    assert_eq!(other.authorization_policies, ["root/everywhere"]);
    assert!(other.services.is_empty());
}

#[test]
fn the_most_specific_peer_authentication_decides() {
    let strict = |key: &str, peer: &str| {
        workload(key, peer)
            .authorization_policies
            .contains(&"root/istio_converted_static_strict".to_owned())
    };
    let mesh = "[{namespace: root, mode: STRICT}]";
    assert!(strict("demo/web", mesh) && strict("elsewhere/other", mesh));
    let namespace = "[{namespace: root, mode: STRICT}, {namespace: demo, mode: PERMISSIVE}]";
    assert!(!strict("demo/web", namespace) && strict("elsewhere/other", namespace));
    let one = "[{namespace: demo, mode: PERMISSIVE}, {namespace: demo, selector: {app: web}, mode: STRICT}]";
    assert!(strict("demo/web", one) && !strict("demo/db", one) && !strict("elsewhere/other", one));
    assert!(!strict("demo/web", "[]"));
}

#[test]
fn strict_is_a_reference_and_not_a_resource() {
    let snapshot = render("[{namespace: root, mode: STRICT}]");
    let names: Vec<_> = snapshot.authorizations.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "demo/selected",
            "demo/whole",
            "root/everywhere",
            "root/global"
        ]
    );
}

#[test]
fn policies_have_istios_scopes_and_shapes() {
    let policy = |name: &str| {
        let snapshot = render("[]");
        Authorization::decode(
            snapshot.authorizations[name]
                .resource
                .as_ref()
                .unwrap()
                .value
                .as_slice(),
        )
        .unwrap()
    };
    let selected = policy("demo/selected");
    assert_eq!(
        (selected.scope(), selected.action()),
        (Scope::WorkloadSelector, ProtoAction::Deny)
    );
    let [from, to] = selected.rules[0].clauses.as_slice() else {
        panic!("two clauses")
    };
    let kinds: Vec<_> = from.matches[0]
        .principals
        .iter()
        .map(|p| p.match_type.clone().unwrap())
        .collect();
    let expected = [
        MatchType::Presence(()),
        MatchType::Prefix("a".into()),
        MatchType::Suffix("b".into()),
        MatchType::Exact("c".into()),
    ];
    assert_eq!(kinds, expected);
    let lengths: Vec<_> = from.matches[0]
        .source_ips
        .iter()
        .map(|ip| (ip.address.len(), ip.length))
        .collect();
    assert_eq!(lengths, [(4, 8), (16, 16)]);
    assert_eq!(from.matches[1].not_namespaces.len(), 1);
    assert_eq!(
        (
            to.matches[0].destination_ports[0],
            to.matches[0].not_destination_ports[0]
        ),
        (80, 81)
    );

    let whole = policy("demo/whole");
    assert_eq!(
        (whole.scope(), whole.action()),
        (Scope::Namespace, ProtoAction::Allow)
    );
    assert!(
        whole.rules[0].clauses.is_empty(),
        "a rule without clauses matches"
    );
    let global = policy("root/global");
    assert_eq!(global.scope(), Scope::Global);
    assert!(global.rules.is_empty(), "no rules never match");
    assert_eq!(policy("root/everywhere").scope(), Scope::WorkloadSelector);
}

#[test]
fn versions_depend_on_the_content_alone() {
    let versions = |peer: &str| {
        let snapshot = render(peer);
        let addresses = snapshot
            .addresses
            .into_iter()
            .map(|(name, resource)| (name, resource.version));
        addresses.collect::<BTreeMap<_, _>>()
    };
    assert_eq!(versions("[]"), versions("[]"));
    let strict = versions("[{namespace: demo, mode: STRICT}]");
    let changed: Vec<_> = versions("[]")
        .into_iter()
        .filter(|(name, v)| strict[name] != *v)
        .map(|(n, _)| n)
        .collect();
    assert_eq!(
        changed,
        ["Kubernetes//Pod/demo/db", "Kubernetes//Pod/demo/web"]
    );
}

fn workload(key: &str, peer_authentication: &str) -> ProtoWorkload {
    let snapshot = render(peer_authentication);
    let resource = &snapshot.addresses[&format!("Kubernetes//Pod/{key}")];
    let address = Address::decode(resource.resource.as_ref().unwrap().value.as_slice()).unwrap();
    match address.r#type {
        Some(address::Type::Workload(workload)) => workload,
        other => panic!("not a workload: {other:?}"),
    }
}

fn render(peer_authentication: &str) -> Snapshot {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("mesh.yaml");
    fs::write(folder.path().join("token"), "0123456789abcdef").unwrap();
    fs::write(
        &path,
        MESH.replace(
            "peer_authentication:",
            &format!("peer_authentication: {peer_authentication}"),
        ),
    )
    .unwrap();
    Snapshot::render(&MeshConfig::load(&path).unwrap().config)
}
