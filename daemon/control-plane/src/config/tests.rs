#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::fs;

use tempfile::TempDir;

use super::value::{cidr, duration, host_address, port, principal, text_match};
use super::*;

/// Every line of it is the target of a row of the table below.
const GOOD: &str = r#"trust_domain: cluster.local
listen: ["127.0.0.1:0"]
state_dir: state
svid_ttl: 1h30m
nodes:
  - name: node-a
    token_file: a.token
workloads:
  - name: web
    namespace: demo
    node: node-a
    addresses: [10.0.0.1, "fd00::1"]
    labels: {app: web}
services:
  - name: web
    namespace: demo
    addresses: [10.96.0.1]
    ports: [{port: 80, target_port: 8080}]
    selector: {app: web}
policies:
  - name: deny
    namespace: demo
    selector: {app: web}
    action: DENY
    rules:
      - from: [{principals: ["cluster.local/ns/demo/sa/x"], ip_blocks: ["10.0.0.0/8"]}]
        to: [{ports: [8080]}]
peer_authentication:
  - namespace: demo
    mode: STRICT
"#;

#[test]
fn good_file_is_taken_without_warnings() {
    let loaded = load(GOOD).unwrap();
    assert_eq!(loaded.warnings, []);
    let config = loaded.config;
    assert_eq!(config.svid_ttl, Duration::from_secs(5400));
    assert_eq!(config.cluster_id, "Kubernetes");
    assert!(!config.cluster_id_required);
    assert_eq!(config.root_namespace, "ringfence-system");
    assert_eq!(config.services[0].hostname, "web.demo.svc.cluster.local");
    assert_eq!(config.workloads[0].service_account, "default");
    assert!(config.workloads[0].mesh && config.workloads[0].healthy);
    assert_eq!(config.nodes[0].token.as_str(), "0123456789abcdef");
}

/// What is replaced by what, then `line:column: field: message…` as it must appear.
const ERRORS: &[(&str, &str, &str)] = &[
    // Syntax and types.
    (
        "trust_domain: cluster.local",
        "trust_domain: [",
        "mesh.yaml:",
    ),
    (
        "    node: node-a\n",
        "    node: node-a\n    colour: red\n",
        "mesh.yaml:12:5: workloads[0].colour: unknown field `colour`",
    ),
    (
        "trust_domain:",
        "trust_domian:",
        "mesh.yaml:1:1: trust_domian: unknown field",
    ),
    (
        "    action: DENY\n",
        "    action: DENY\n    action: DENY\n",
        "mesh.yaml:25:5: policies[0]",
    ),
    (
        "{port: 80,",
        "{port: http,",
        "mesh.yaml:18:20: services[0].ports[0].port: is not a whole number",
    ),
    (
        "    labels: {app: web}",
        "    mesh: maybe",
        "mesh.yaml:13:11: workloads[0].mesh: is neither true nor false",
    ),
    ("    node: node-a\n", "", "missing field `node`"),
    // Values.
    (
        "trust_domain: cluster.local",
        "trust_domain: Cluster/X",
        "mesh.yaml:1:15: trust_domain: `Cluster/X` is not a trust domain",
    ),
    (
        "\"127.0.0.1:0\"",
        "localhost",
        "mesh.yaml:2:10: listen[0]: `localhost` is not address:port",
    ),
    ("[\"127.0.0.1:0\"]", "[]", "mesh.yaml:2:9: listen: is empty"),
    (
        "1h30m",
        "soon",
        "mesh.yaml:4:11: svid_ttl: `soon` is not a duration",
    ),
    (
        "  - name: node-a",
        "  - name: Node_A",
        "mesh.yaml:6:11: nodes[0].name: `Node_A` is not a name",
    ),
    (
        "a.token",
        "absent.token",
        "mesh.yaml:7:17: nodes[0].token_file: cannot read",
    ),
    (
        "a.token",
        "empty.token",
        "mesh.yaml:7:17: nodes[0].token_file:",
    ),
    (
        "    node: node-a\n",
        "    node: node-z\n",
        "mesh.yaml:11:11: workloads[0].node: `node-z` is not in `nodes`: expected one of [node-a]",
    ),
    (
        "10.0.0.1,",
        "10.0.0.256,",
        "mesh.yaml:12:17: workloads[0].addresses[0]: `10.0.0.256` is not an IP address",
    ),
    (
        "\"fd00::1\"",
        "\"::ffff:10.0.0.9\"",
        "mesh.yaml:12:27: workloads[0].addresses[1]: `::ffff:10.0.0.9` is an IPv4-mapped address: write it as 10.0.0.9",
    ),
    (
        "[10.96.0.1]",
        "[10.0.0.1]",
        "mesh.yaml:17:17: services[0].addresses[0]: address 10.0.0.1 is already at line 12",
    ),
    (
        "[10.96.0.1]",
        "[]",
        "mesh.yaml:17:16: services[0].addresses: is empty",
    ),
    (
        "target_port: 8080",
        "target_port: 0",
        "mesh.yaml:18:37: services[0].ports[0].target_port: 0 is not a port: expected 1 to 65535",
    ),
    (
        "{port: 80,",
        "{port: 65536,",
        "mesh.yaml:18:20: services[0].ports[0].port: 65536 is not a port",
    ),
    (
        "    selector: {app: web}\npolicies",
        "    selector: {}\npolicies",
        "mesh.yaml:19:15: services[0].selector: is empty",
    ),
    (
        "action: DENY",
        "action: AUDIT",
        "mesh.yaml:24:13: policies[0].action: `AUDIT` is not an action: expected ALLOW or DENY",
    ),
    (
        "\"cluster.local/ns",
        "\"spiffe://cluster.local/ns",
        "mesh.yaml:26:30: policies[0].rules[0].from[0].principals[0]: `spiffe://cluster.local/ns/demo/sa/x` would never match",
    ),
    (
        "sa/x\"",
        "*/x\"",
        "mesh.yaml:26:30: policies[0].rules[0].from[0].principals[0]: `cluster.local/ns/demo/*/x` has `*` inside",
    ),
    (
        "10.0.0.0/8",
        "10.0.0.0/33",
        "mesh.yaml:26:73: policies[0].rules[0].from[0].ip_blocks[0]: `10.0.0.0/33` is not an IP block",
    ),
    (
        "ports: [8080]",
        "ports: [-1]",
        "mesh.yaml:27:23: policies[0].rules[0].to[0].ports[0]: -1 is not a port",
    ),
    (
        "[{ports: [8080]}]",
        "[{}]",
        "mesh.yaml:27:14: policies[0].rules[0].to[0]: has no value in any field",
    ),
    (
        "[{ports: [8080]}]",
        "[]",
        "mesh.yaml:27:13: policies[0].rules[0].to: is an empty list",
    ),
    (
        "mode: STRICT",
        "mode: DISABLE",
        "mesh.yaml:30:11: peer_authentication[0].mode: `DISABLE` is not a mode: expected STRICT or PERMISSIVE",
    ),
];

#[test]
fn each_error_names_file_line_column_field_and_what_was_expected() {
    for (from, to, expected) in ERRORS {
        assert!(GOOD.contains(from), "the table is out of date: {from}");
        let error = load(&GOOD.replacen(from, to, 1)).expect_err(to).to_string();
        assert!(
            error.contains(expected),
            "{to}\n got: {error}\nwant: {expected}"
        );
    }
}

#[test]
fn all_errors_are_reported_at_once_in_the_order_of_the_file() {
    let text = GOOD
        .replace("1h30m", "soon")
        .replace("10.0.0.1,", "x,")
        .replace("mode: STRICT", "mode: MAYBE");
    let ConfigError::Invalid(errors) = load(&text).unwrap_err() else {
        panic!("not semantic")
    };
    let lines: Vec<_> = errors.iter().map(|error| error.line).collect();
    assert_eq!(lines, [4, 12, 30]);
}

#[test]
fn duplicates_are_errors() {
    let node = "  - name: node-a\n    token_file: a.token\n";
    let other = "  - name: node-b\n    token_file: b.token\n";
    let workload = GOOD
        .split("workloads:\n")
        .nth(1)
        .unwrap()
        .split("services:")
        .next()
        .unwrap();
    let service = GOOD
        .split("services:\n")
        .nth(1)
        .unwrap()
        .split("policies:")
        .next()
        .unwrap();
    let policy = GOOD
        .split("policies:\n")
        .nth(1)
        .unwrap()
        .split("peer_auth")
        .next()
        .unwrap();
    let peer = "  - namespace: demo\n    mode: STRICT\n";
    for (part, again, expected) in [
        (
            node,
            node,
            "nodes[1].name: a node `node-a` is already at line 6",
        ),
        (
            node,
            &other.replace("b.token", "a.token"),
            "holds the token of node `node-a` too",
        ),
        (
            workload,
            &workload
                .replace("10.0.0.1", "10.0.0.2")
                .replace("fd00::1", "fd00::2"),
            "a workload `demo/web` is already",
        ),
        (
            service,
            &service.replace("10.96.0.1", "10.96.0.2"),
            "a service `demo/web.demo.svc.cluster.local` is already",
        ),
        (policy, policy, "a policy `demo/deny` is already"),
        (
            peer,
            peer,
            "peer authentication for the whole of `demo` is already",
        ),
        (
            "{port: 80, target_port: 8080}",
            ", {port: 80}",
            "port 80 is already",
        ),
    ] {
        let error = load(&GOOD.replacen(part, &format!("{part}{again}"), 1))
            .expect_err(expected)
            .to_string();
        assert!(error.contains(expected), "got: {error}\nwant: {expected}");
    }
    load(&GOOD.replacen(node, &format!("{node}{other}"), 1)).unwrap();
}

#[test]
fn selectors_with_contradicting_modes_are_an_error() {
    let two = |second: &str| {
        format!(
            "{GOOD}  - namespace: demo\n    selector: {{app: web}}\n    mode: STRICT\n  - namespace: demo\n    selector: {{app: web}}\n    mode: {second}\n"
        )
    };
    load(&two("STRICT")).unwrap();
    let error = load(&two("PERMISSIVE")).unwrap_err().to_string();
    assert!(error.contains("mesh.yaml:36:11: peer_authentication[2].mode: selects workload `demo/web` with another mode"), "{error}");
}

#[test]
fn odd_things_are_warnings() {
    for (from, to, expected) in [
        (
            "    selector: {app: web}\n    action",
            "    selector: {app: wbe}\n    action",
            "mesh.yaml:23:15: policies[0].selector: selects no workload",
        ),
        (
            "    selector: {app: web}\npolicies",
            "policies",
            "mesh.yaml:15:11: services[0].selector: is missing",
        ),
        (
            "10.0.0.0/8",
            "10.1.2.3/8",
            "`10.1.2.3/8` has bits beyond its prefix: read as 10.0.0.0/8",
        ),
        ("a.token", "short.token", "easily guessed"),
    ] {
        let loaded = load(&GOOD.replacen(from, to, 1)).unwrap();
        assert_eq!(loaded.warnings.len(), 1, "{to}: {:?}", loaded.warnings);
        let warning = loaded.warnings[0].to_string();
        assert!(
            warning.contains(expected),
            "got: {warning}\nwant: {expected}"
        );
    }
}

#[test]
fn missing_file_is_named() {
    let error = MeshConfig::load(Path::new("/nonexistent/mesh.yaml"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("/nonexistent/mesh.yaml"), "{error}");
}

#[test]
fn token_is_not_in_debug_output() {
    let text = format!("{:?}", load(GOOD).unwrap());
    assert!(!text.contains("0123456789abcdef"));
}

#[test]
fn durations_and_their_limits() {
    for (text, seconds) in [
        ("1s", 1),
        ("90m", 5400),
        ("1h30m", 5400),
        ("365d", 31_536_000),
    ] {
        assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
    }
    for text in [
        "",
        "0s",
        "24",
        "h",
        "1w",
        "-1h",
        "366d",
        "1.5h",
        "99999999999999999999h",
        "9999999999999999d",
    ] {
        duration(text).expect_err(text);
    }
}

#[test]
fn blocks_are_masked_and_bad_ones_refused() {
    let block = |text: &str, length| Cidr {
        address: text.parse().unwrap(),
        length,
    };
    assert_eq!(cidr("10.0.0.1"), Ok((block("10.0.0.1", 32), false)));
    assert_eq!(cidr("0.0.0.0/0"), Ok((block("0.0.0.0", 0), false)));
    assert_eq!(cidr("10.1.2.3/8"), Ok((block("10.0.0.0", 8), true)));
    assert_eq!(cidr("fd00::1/16"), Ok((block("fd00::", 16), true)));
    assert_eq!(cidr("::/0"), Ok((block("::", 0), false)));
    for text in [
        "",
        "10.0.0.0/",
        "10.0.0.0/+8",
        "10.0.0.0/256",
        "10.0.0/8",
        "::/129",
        "::ffff:10.0.0.0/104",
        "a/8",
        "10.0.0.0/8/8",
    ] {
        cidr(text).expect_err(text);
    }
}

#[test]
fn text_matches_and_bad_ones() {
    assert_eq!(text_match("a"), Ok(TextMatch::Exact("a".into())));
    assert_eq!(text_match("a*"), Ok(TextMatch::Prefix("a".into())));
    assert_eq!(text_match("*a"), Ok(TextMatch::Suffix("a".into())));
    assert_eq!(text_match("*"), Ok(TextMatch::Presence));
    for text in ["", "a*b", "*a*", "**"] {
        text_match(text).expect_err(text);
    }
    principal("spiffe://x").expect_err("scheme");
    principal("x").unwrap();
}

#[test]
fn host_addresses_are_unicast() {
    host_address("10.0.0.1").unwrap();
    for text in [
        "0.0.0.0",
        "127.0.0.1",
        "::",
        "::1",
        "224.0.0.1",
        "ff02::1",
        "255.255.255.255",
    ] {
        host_address(text).expect_err(text);
    }
    port(1).unwrap();
    port(65535).unwrap();
    port(i64::MAX).unwrap_err();
}

fn load(text: &str) -> Result<Loaded, ConfigError> {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("mesh.yaml"), text).unwrap();
    fs::write(folder.path().join("a.token"), "0123456789abcdef\n").unwrap();
    fs::write(folder.path().join("b.token"), "fedcba9876543210").unwrap();
    fs::write(folder.path().join("short.token"), "x").unwrap();
    fs::write(folder.path().join("empty.token"), " \n").unwrap();
    MeshConfig::load(&folder.path().join("mesh.yaml"))
}
