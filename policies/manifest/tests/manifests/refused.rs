//! Each mistake is an error with its place, resource and field.

use crate::harness::{errors, read};

/// Every line of it is the target of a row of the table below.
const GOOD: &str = r#"apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: web
  namespace: demo
  annotations: {istio.io/dry-run: "true"}
spec:
  selector:
    matchLabels: {app: web}
  action: DENY
  rules:
  - from:
    - source:
        principals: ["cluster.local/ns/a/sa/b"]
        ipBlocks: ["10.0.0.0/8"]
        serviceAccounts: ["a/b"]
    to:
    - operation:
        ports: ["80"]
        methods: ["GET"]
    when:
    - key: source.namespace
      values: ["a"]
---
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata:
  name: web
  namespace: demo
  creationTimestamp: 2026-01-31T08:00:00Z
spec:
  selector:
    matchLabels: {app: web}
  mtls:
    mode: STRICT
  portLevelMtls:
    8080:
      mode: DISABLE
"#;

/// What is replaced by what, then what the error must begin with.
const ERRORS: &[(&str, &str, &str)] = &[
    // Syntax.
    ("  action: DENY", "  action: [", "m.yaml:12:3: document 1: "),
    (
        "  action: DENY",
        "  action: DENY\n  action: DENY",
        "m.yaml:11:3: document 1: ",
    ),
    (
        "---\n",
        "---\n- a\n---\n",
        "m.yaml:25:1: document 2: is a list, expected a mapping",
    ),
    // Type and version.
    (
        "security.istio.io/v1\n",
        "security.istio.io/v1alpha1\n",
        "m.yaml:1:13: document 1: apiVersion: `security.istio.io/v1alpha1` is not served",
    ),
    (
        "security.istio.io/v1\n",
        "securty.istio.io/v1\n",
        "m.yaml:1:13: document 1: apiVersion: `securty.istio.io/v1` is not served",
    ),
    (
        "kind: AuthorizationPolicy",
        "kind: AuthorisationPolicy",
        "m.yaml:2:7: document 1: kind: `AuthorisationPolicy` is not a kind",
    ),
    (
        "kind: AuthorizationPolicy\n",
        "",
        "m.yaml:1:1: document 1: kind: is missing",
    ),
    (
        "kind: PeerAuthentication",
        "kind: 7",
        "m.yaml:26:7: document 2: kind: is a number, expected text",
    ),
    // Metadata.
    (
        "  name: web\n  namespace: demo\n  ann",
        "  namespace: demo\n  ann",
        "m.yaml:4:3: document 1: metadata.name: is missing",
    ),
    (
        "  namespace: demo\n  ann",
        "  ann",
        "m.yaml:4:3: document 1: metadata.namespace: is missing: kubectl would take",
    ),
    (
        "  name: web\n  namespace: demo\n  ann",
        "  name: converted_peer_authentication_web\n  namespace: demo\n  ann",
        "m.yaml:4:9: document 1: metadata.name: `converted_peer_authentication_web` is not a name",
    ),
    (
        "  namespace: demo\n  ann",
        "  namespaces: demo\n  ann",
        "m.yaml:5:3: document 1: metadata.namespaces: unknown field `namespaces`",
    ),
    (
        "dry-run: \"true\"",
        "dry-run: \"yes\"",
        "m.yaml:6:35: AuthorizationPolicy demo/web: metadata.annotations[istio.io/dry-run]: `yes` is neither",
    ),
    (
        "dry-run: \"true\"",
        "dry-run: true",
        "m.yaml:6:35: AuthorizationPolicy demo/web: metadata.annotations[istio.io/dry-run]: is true or false, expected text (put it in quotes)",
    ),
    (
        "2026-01-31T08:00:00Z",
        "yesterday",
        "m.yaml:30:22: PeerAuthentication demo/web: metadata.creationTimestamp: `yesterday` is not a time",
    ),
    // The specification.
    (
        "  action: DENY",
        "  acton: DENY",
        "m.yaml:10:3: AuthorizationPolicy demo/web: spec.acton: unknown field `acton`: expected one of selector, targetRef,",
    ),
    (
        "  action: DENY",
        "  action: REFUSE",
        "m.yaml:10:11: AuthorizationPolicy demo/web: spec.action: `REFUSE` is not an action",
    ),
    (
        "  action: DENY",
        "  action: DENY\n  provider: {name: x}",
        "m.yaml:11:13: AuthorizationPolicy demo/web: spec.provider: goes with `action: CUSTOM` only",
    ),
    (
        "  action: DENY",
        "  targetRef: {kind: Service, name: x}",
        "m.yaml:9:5: AuthorizationPolicy demo/web: spec.selector: cannot be combined with `targetRef`",
    ),
    (
        "  action: DENY",
        "  targetRefs: [{kind: Service}]",
        "m.yaml:10:16: AuthorizationPolicy demo/web: spec.targetRefs[0].name: is missing",
    ),
    (
        "    matchLabels: {app: web}\n  action",
        "    matchLabels: {}\n  action",
        "m.yaml:9:5: AuthorizationPolicy demo/web: spec.selector: is empty",
    ),
    (
        "    matchLabels: {app: web}\n  action",
        "    matchExpressions: []\n  action",
        "m.yaml:9:5: AuthorizationPolicy demo/web: spec.selector.matchExpressions: unknown field",
    ),
    (
        "    matchLabels: {app: web}\n  action",
        "    matchLabels: {version: 1}\n  action",
        "m.yaml:9:28: AuthorizationPolicy demo/web: spec.selector.matchLabels[version]: is a number, expected text (put it in quotes)",
    ),
    (
        "    matchLabels: {app: web}\n  action",
        "    matchLabels: {app: we*}\n  action",
        "m.yaml:9:5: AuthorizationPolicy demo/web: spec.selector: `we*` has a `*`",
    ),
    // Rules.
    (
        "  - from:\n    - source:\n",
        "  -\n  - from:\n    - source:\n",
        "m.yaml:12:4: AuthorizationPolicy demo/web: spec.rules[0]: is empty, expected a mapping",
    ),
    (
        "    - source:\n",
        "    - sources:\n",
        "m.yaml:13:7: AuthorizationPolicy demo/web: spec.rules[0].from[0].sources: unknown field `sources`: expected one of source",
    ),
    (
        "    to:\n    - operation:\n        ports: [\"80\"]\n        methods: [\"GET\"]\n",
        "    to: []\n",
        "m.yaml:17:9: AuthorizationPolicy demo/web: spec.rules[0].to: is empty",
    ),
    (
        "    to:\n    - operation:\n        ports: [\"80\"]\n        methods: [\"GET\"]\n",
        "    to:\n    - operation: {}\n",
        "m.yaml:18:18: AuthorizationPolicy demo/web: spec.rules[0].to[0].operation: has no condition",
    ),
    (
        "[\"cluster.local/ns/a/sa/b\"]",
        "[]",
        "m.yaml:14:21: AuthorizationPolicy demo/web: spec.rules[0].from[0].source.principals: is empty",
    ),
    (
        "[\"cluster.local/ns/a/sa/b\"]",
        "",
        "m.yaml:14:19: AuthorizationPolicy demo/web: spec.rules[0].from[0].source.principals: is empty",
    ),
    (
        "[\"cluster.local/ns/a/sa/b\"]",
        "cluster.local/ns/a/sa/b",
        "m.yaml:14:21: AuthorizationPolicy demo/web: spec.rules[0].from[0].source.principals: is text, expected a list",
    ),
    (
        "\"cluster.local/ns/a/sa/b\"",
        "\"spiffe://cluster.local/ns/a/sa/b\"",
        "m.yaml:14:22: AuthorizationPolicy demo/web: spec.rules[0].from[0].source.principals[0]: `spiffe://cluster.local/ns/a/sa/b` would never match",
    ),
    (
        "\"cluster.local/ns/a/sa/b\"",
        "\"cluster.local/ns/*/sa/b\"",
        "m.yaml:14:22: AuthorizationPolicy demo/web: spec.rules[0].from[0].source.principals[0]: `cluster.local/ns/*/sa/b` has a `*`",
    ),
    (
        "\"10.0.0.0/8\"",
        "\"10.0.0.0/8\", \"10.0.0/33\"",
        "m.yaml:15:34: AuthorizationPolicy demo/web: spec.rules[0].from[0].source.ipBlocks[1]: `10.0.0/33` is not an IP prefix",
    ),
    (
        "\"10.0.0.0/8\"",
        "\"10.0.0.0/33\"",
        "m.yaml:15:20: AuthorizationPolicy demo/web: spec.rules[0].from[0].source.ipBlocks[0]: prefix length 33",
    ),
    (
        "        ipBlocks: [\"10.0.0.0/8\"]",
        "        remoteIpBlocks: [\"host\"]",
        "m.yaml:15:26: AuthorizationPolicy demo/web: spec.rules[0].from[0].source.remoteIpBlocks[0]: `host` is not",
    ),
    (
        "[\"a/b\"]",
        "[\"a/*\"]",
        "m.yaml:16:27: AuthorizationPolicy demo/web: spec.rules[0].from[0].source.serviceAccounts[0]: `a/*` is not a service account",
    ),
    (
        "[\"a/b\"]",
        "[\"/b\"]",
        "m.yaml:16:27: AuthorizationPolicy demo/web: spec.rules[0].from[0].source.serviceAccounts[0]: `/b` is not",
    ),
    (
        "[\"80\"]",
        "[80]",
        "m.yaml:19:17: AuthorizationPolicy demo/web: spec.rules[0].to[0].operation.ports[0]: is a number, expected text (put it in quotes)",
    ),
    (
        "[\"80\"]",
        "[\"65536\"]",
        "m.yaml:19:17: AuthorizationPolicy demo/web: spec.rules[0].to[0].operation.ports[0]: `65536` is not a port",
    ),
    (
        "[\"80\"]",
        "[\"+80\"]",
        "m.yaml:19:17: AuthorizationPolicy demo/web: spec.rules[0].to[0].operation.ports[0]: `+80`",
    ),
    (
        "[\"80\"]",
        "[\"http\"]",
        "m.yaml:19:17: AuthorizationPolicy demo/web: spec.rules[0].to[0].operation.ports[0]: `http`",
    ),
    (
        "[\"GET\"]",
        "[\"\"]",
        "m.yaml:20:19: AuthorizationPolicy demo/web: spec.rules[0].to[0].operation.methods[0]: an empty string",
    ),
    (
        "        methods:",
        "        method:",
        "m.yaml:20:9: AuthorizationPolicy demo/web: spec.rules[0].to[0].operation.method: unknown field `method`: expected one of hosts,",
    ),
    (
        "key: source.namespace",
        "key: source.user",
        "m.yaml:22:12: AuthorizationPolicy demo/web: spec.rules[0].when[0].key: `source.user` is not a condition key",
    ),
    (
        "key: source.namespace",
        "key: request.headers",
        "m.yaml:22:12: AuthorizationPolicy demo/web: spec.rules[0].when[0].key: `request.headers` is not",
    ),
    (
        "      values: [\"a\"]\n",
        "",
        "m.yaml:22:7: AuthorizationPolicy demo/web: spec.rules[0].when[0]: has no condition",
    ),
    (
        "    - key: source.namespace\n      values",
        "    - values",
        "m.yaml:22:7: AuthorizationPolicy demo/web: spec.rules[0].when[0].key: is missing",
    ),
    (
        "key: source.namespace\n      values: [\"a\"]",
        "key: destination.ip\n      values: [\"a\"]",
        "m.yaml:23:16: AuthorizationPolicy demo/web: spec.rules[0].when[0].values[0]: `a` is not an IP prefix",
    ),
    // Modes.
    (
        "mode: STRICT",
        "mode: strict",
        "m.yaml:35:11: PeerAuthentication demo/web: spec.mtls.mode: `strict` is not a mode",
    ),
    (
        "    8080:",
        "    0:",
        "m.yaml:37:5: PeerAuthentication demo/web: spec.portLevelMtls[0]: `0` is not a port: expected a number from 1 to",
    ),
    (
        "    8080:",
        "    http:",
        "m.yaml:37:5: PeerAuthentication demo/web: spec.portLevelMtls[http]: `http` is not a port",
    ),
    (
        "  selector:\n    matchLabels: {app: web}\n  mtls",
        "  mtls",
        "m.yaml:35:5: PeerAuthentication demo/web: spec.portLevelMtls: needs a `selector`",
    ),
    (
        "      mode: DISABLE",
        "      modus: DISABLE",
        "m.yaml:38:7: PeerAuthentication demo/web: spec.portLevelMtls[8080].modus: unknown field",
    ),
    (
        "kind: PeerAuthentication\nmetadata:\n  name: web\n  namespace: demo\n  creationTimestamp: 2026-01-31T08:00:00Z\nspec:\n  selector:\n    matchLabels: {app: web}\n  mtls:\n    mode: STRICT\n  portLevelMtls:\n    8080:\n      mode: DISABLE\n",
        "kind: AuthorizationPolicy\nmetadata:\n  name: web\n  namespace: demo\n",
        "m.yaml:28:9: AuthorizationPolicy demo/web: metadata.name: is there already, at m.yaml:4:9",
    ),
];

#[test]
fn each_error_names_file_line_column_resource_field_and_what_was_expected() {
    read(GOOD);
    let mut wrong = Vec::new();
    for (from, to, expected) in ERRORS {
        assert!(GOOD.contains(from), "the table is out of date: {from}");
        let errors = errors(&GOOD.replacen(from, to, 1));
        if !errors.iter().any(|error| error.starts_with(expected)) {
            wrong.push(format!(
                "{to}\n got: {}\nwant: {expected}",
                errors.join("\n      ")
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn all_errors_of_all_documents_are_reported_in_the_order_of_the_file() {
    let text = GOOD
        .replace("kind: source", "kind: x")
        .replace("\"10.0.0.0/8\"", "\"x\"")
        .replace("\"80\"", "\"x\", \"y\"")
        .replace("mode: STRICT", "mode: x")
        .replace("8080", "x");
    let lines: Vec<_> = errors(&text)
        .iter()
        .map(|error| error.split(':').nth(1).unwrap().to_owned())
        .collect();
    assert_eq!(lines, ["15", "19", "19", "35", "37"]);
}

#[test]
fn deny_policy_without_rules_is_an_error_and_an_empty_list_is_not() {
    let deny = |rest: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: a, namespace: b}}\nspec:\n  action: DENY\n{rest}"
        )
    };
    assert_eq!(
        errors(&deny("")),
        [
            "m.yaml:5:3: AuthorizationPolicy b/a: spec.rules: are missing, so nothing would ever be denied: `rules: [{}]` denies everything"
        ]
    );
    read(&deny("  rules: []\n"));
    read(&deny("  rules: [{}]\n"));
}

#[test]
fn file_of_a_directory_cannot_repeat_another_ones_policy() {
    let mut all = read(GOOD);
    let errors = all.merge(read(GOOD)).unwrap_err();
    assert_eq!(errors.len(), 2);
    let mut all = read(GOOD);
    all.merge(read(&GOOD.replace("name: web", "name: other")))
        .unwrap();
    assert_eq!(all.authorization_policies().count(), 2);
    assert_eq!(all.peer_authentications().count(), 2);
}
