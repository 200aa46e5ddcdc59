//! Manifests beside the mesh file, served and reloaded.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;

use common::agent::{Agent, names};
use common::{Mesh, WORKLOADS};
use ringfence_control_plane::validate;
use ringfence_xds::proto::workload::address::Type;

const WEB: &str = "Kubernetes//Pod/demo/web";
const STRICT: &str = "ringfence-system/istio_converted_static_strict";

const POLICY: &str = r#"apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web, namespace: demo}
spec:
  selector: {matchLabels: {app: web}}
  rules:
  - from:
    - source: {serviceAccounts: [client], ipBlocks: [10.77.0.0/16, "fd00::/8"]}
    to:
    - operation: {ports: ["80"]}
"#;
const MODE: &str = r#"apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: web, namespace: demo}
spec:
  selector: {matchLabels: {app: web}}
  mtls: {mode: STRICT}
"#;

/// A mesh whose file names the folder `policies`.
fn mesh(files: &[(&str, &str)], extra: &str) -> Mesh {
    let mesh = Mesh::with("127.0.0.1:0", &format!("manifests: [policies]\n{extra}"));
    fs::create_dir(folder(&mesh)).unwrap();
    for (name, text) in files {
        fs::write(folder(&mesh).join(name), text).unwrap();
    }
    mesh
}

fn folder(mesh: &Mesh) -> std::path::PathBuf {
    mesh.folder.path().join("policies")
}

fn error(mesh: &Mesh) -> String {
    let root = mesh.folder.path().display().to_string();
    let error = validate(&mesh.path()).unwrap_err().to_string();
    error.replace(&format!("{root}/"), "")
}

fn warnings(mesh: &Mesh) -> Vec<String> {
    let root = mesh.folder.path().display().to_string();
    let warnings = validate(&mesh.path()).unwrap().warnings;
    warnings
        .iter()
        .map(|warning| warning.to_string().replace(&format!("{root}/"), ""))
        .collect()
}

#[tokio::test]
async fn policies_and_modes_of_manifests_reach_the_agents() {
    let mesh = mesh(
        &[("a.yaml", POLICY), ("b.yml", MODE), ("note.txt", "x")],
        "",
    );
    let server = mesh.start();
    let mut agent = Agent::start(&mesh, server.address, "a");
    let policies = agent.policies().await;
    assert_eq!(names(&policies), ["demo/web"]);
    let policy = &policies.upserted[0].value;
    let clauses = &policy.rules[0].clauses;
    assert_eq!(clauses[0].matches[0].destination_ports, [80]);
    let from = &clauses[1].matches[0];
    assert_eq!(from.service_accounts[0].service_account, "client");
    assert_eq!(from.source_ips[0].address, [10, 77, 0, 0]);
    assert_eq!(from.source_ips[0].length, 16);
    assert_eq!(from.source_ips[1].address.len(), 16);
    assert_eq!(from.source_ips[1].length, 8);

    let addresses = agent.addresses().await;
    for named in &addresses.upserted {
        if let Some(Type::Workload(workload)) = &named.value.r#type {
            let expected: &[&str] = match named.name.as_str() {
                WEB => &["demo/web", STRICT],
                _ => &[],
            };
            assert_eq!(workload.authorization_policies, expected, "{}", named.name);
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn changed_added_and_removed_manifests_are_taken_as_they_come() {
    let mesh = mesh(&[], "");
    let mut server = mesh.start();
    let mut agent = Agent::start(&mesh, server.address, "a");
    assert!(agent.policies().await.upserted.is_empty());
    agent.addresses().await;

    write(&folder(&mesh).join("a.yaml"), POLICY);
    assert_eq!(names(&agent.policies().await), ["demo/web"]);
    assert_eq!(names(&agent.addresses().await), [WEB]);

    // A bad file: what is in force stays, and the reason names the place.
    write(
        &folder(&mesh).join("b.yaml"),
        &MODE.replace("STRICT", "strict"),
    );
    let status = server.reloaded(|status| status.rejected.is_some()).await;
    let reason = status.rejected.unwrap();
    assert!(
        reason.contains("policies/b.yaml:6:16: PeerAuthentication demo/web: spec.mtls.mode: `strict` is not a mode"),
        "{reason}"
    );
    write(&folder(&mesh).join("b.yaml"), MODE);
    server.reloaded(|status| status.rejected.is_none()).await;
    assert_eq!(names(&agent.addresses().await), [WEB]);

    fs::remove_file(folder(&mesh).join("a.yaml")).unwrap();
    assert_eq!(agent.policies().await.removed, ["demo/web"]);
    server.stop().await;
}

#[tokio::test]
async fn folder_that_is_replaced_is_seen_again() {
    let mesh = mesh(&[("a.yaml", POLICY)], "");
    let mut server = mesh.start();
    let mut agent = Agent::start(&mesh, server.address, "a");
    assert_eq!(names(&agent.policies().await), ["demo/web"]);
    fs::rename(folder(&mesh), mesh.folder.path().join("old")).unwrap();
    server.reloaded(|status| status.rejected.is_some()).await;
    fs::create_dir(folder(&mesh)).unwrap();
    assert_eq!(agent.policies().await.removed, ["demo/web"]);
    write(&folder(&mesh).join("a.yaml"), POLICY);
    assert_eq!(names(&agent.policies().await), ["demo/web"]);
    server.stop().await;
}

#[tokio::test]
async fn manifest_that_keeps_a_mesh_file_out_of_force_is_watched() {
    let mesh = Mesh::new();
    let mut server = mesh.start();
    fs::create_dir(folder(&mesh)).unwrap();
    fs::write(folder(&mesh).join("a.yaml"), "kind: x\n").unwrap();
    mesh.write(&format!("{WORKLOADS}manifests: [policies]\n"));
    server.reloaded(|status| status.rejected.is_some()).await;
    write(&folder(&mesh).join("a.yaml"), POLICY);
    server.reloaded(|status| status.generation == 2).await;
    server.stop().await;
}

#[test]
fn every_error_of_every_file_is_reported() {
    let mesh = mesh(
        &[
            ("a.yaml", &POLICY.replace("\"80\"", "80")),
            ("b.yaml", &MODE.replace("STRICT", "strict")),
            ("c.yaml", POLICY),
        ],
        "l7: maybe",
    );
    let error = error(&mesh);
    let starts = [
        "mesh.yaml:4:5: l7: `maybe` is not",
        "policies/a.yaml:10:27: AuthorizationPolicy demo/web: spec.rules[0].to[0].operation.ports[0]: is a number",
        "policies/b.yaml:6:16: PeerAuthentication demo/web: spec.mtls.mode: `strict`",
    ];
    let lines: Vec<_> = error.lines().collect();
    assert_eq!(lines.len(), starts.len(), "{error}");
    for (line, start) in lines.iter().zip(starts) {
        assert!(line.starts_with(start), "{error}");
    }
}

#[test]
fn conflicts_are_errors() {
    // The same policy in two files.
    let files = mesh(&[("a.yaml", POLICY), ("b.yaml", POLICY)], "");
    assert_eq!(
        error(&files),
        "policies/b.yaml:3:18: AuthorizationPolicy demo/web: metadata.name: is there already, at policies/a.yaml:3:18"
    );
    let native = "policies: [{name: web, namespace: demo}]";
    assert_eq!(
        error(&mesh(&[("a.yaml", POLICY)], native)),
        "policies/a.yaml:3:18: AuthorizationPolicy demo/web: metadata.name: the mesh file has a policy of that name in `policies`"
    );
    validate(&mesh(&[("a.yaml", POLICY)], &native.replace("web", "other")).path()).unwrap();

    for (native, manifest, conflict) in [
        ("selector: {app: web}, mode: STRICT", MODE, true),
        ("mode: STRICT", MODE, false),
        (
            "mode: PERMISSIVE",
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: all, namespace: demo}\nspec: {}\n",
            true,
        ),
    ] {
        let native = format!("peer_authentication: [{{namespace: demo, {native}}}]");
        let mesh = mesh(&[("a.yaml", manifest)], &native);
        if conflict {
            let error = error(&mesh);
            assert!(
                error.starts_with("policies/a.yaml:3:18: PeerAuthentication demo/")
                    && error
                        .ends_with("holds for the same workloads as the entry at mesh.yaml:4:35"),
                "{error}"
            );
        } else {
            validate(&mesh.path()).unwrap();
        }
    }
}

#[test]
fn missing_and_empty_paths_are_told() {
    let mesh = Mesh::with("127.0.0.1:0", "manifests: [absent, policies]");
    fs::create_dir(folder(&mesh)).unwrap();
    let missing = error(&mesh);
    assert!(
        missing.starts_with("mesh.yaml:3:13: manifests[0]: cannot read absent:"),
        "{missing}"
    );
    fs::write(mesh.folder.path().join("absent"), POLICY).unwrap();
    assert_eq!(
        warnings(&mesh),
        ["mesh.yaml:3:21: manifests[1]: policies has no file that ends in .yaml, .yml or .json"]
    );
}

#[tokio::test]
async fn http_conditions_are_warned_about_and_handled_as_the_mesh_file_says() {
    let deny = POLICY
        .replace("  rules:", "  action: DENY\n  rules:")
        .replace("ports: [\"80\"]", "methods: [GET]");
    for (l7, clauses, warning) in [
        ("", 2, "the DENY rule never matches"),
        ("l7: istio-exact", 2, "the DENY rule never matches"),
        ("l7: deny-as-l4", 1, "refuses more"),
    ] {
        let mesh = mesh(&[("a.yaml", &deny)], l7);
        let warnings = warnings(&mesh);
        assert!(
            warnings.len() == 1
                && warnings[0].starts_with("policies/a.yaml:11:28: AuthorizationPolicy demo/web: spec.rules[0].to[0].operation.methods: cannot be checked at L4")
                && warnings[0].contains(warning),
            "{warnings:?}"
        );
        let server = mesh.start();
        let mut agent = Agent::start(&mesh, server.address, "a");
        let policies = agent.policies().await;
        assert_eq!(policies.upserted[0].value.rules[0].clauses.len(), clauses);
        server.stop().await;
    }
}

#[test]
fn selector_that_selects_nothing_is_warned_about() {
    let text = POLICY.replace("app: web", "app: wbe");
    assert_eq!(
        warnings(&mesh(&[("a.yaml", &text)], "")),
        ["policies/a.yaml:3:18: AuthorizationPolicy demo/web: spec.selector: selects no workload"]
    );
}

/// As editors do: another file is renamed over it.
fn write(path: &Path, text: &str) {
    let fresh = path.with_extension("new");
    fs::write(&fresh, text).unwrap();
    fs::rename(fresh, path).unwrap();
}
