//! Forms that are taken: lists, exports of a cluster, JSON, aliases, other kinds.

use std::path::Path;

use ringfence_manifest::{OtherKinds, parse};

use crate::harness::{attached, errors, exact, read, warnings};

const POLICY: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a, namespace: b}\n";

#[test]
fn what_a_cluster_exports_is_read() {
    let converted = exact(
        r#"
apiVersion: v1
kind: List
metadata: {resourceVersion: ""}
items:
- apiVersion: security.istio.io/v1
  kind: AuthorizationPolicy
  metadata:
    annotations:
      kubectl.kubernetes.io/last-applied-configuration: |
        {"apiVersion":"security.istio.io/v1"}
    creationTimestamp: "2026-01-31T08:00:00Z"
    generation: 2
    labels: {team: shop}
    managedFields: [{manager: kubectl, fieldsV1: {f:spec: {}}}]
    name: a
    namespace: b
    ownerReferences: [{kind: X, name: y}]
    resourceVersion: "12345"
    uid: 6f9619ff-8b86-d011-b42d-00cf4fc964ff
  spec:
    rules:
    - from:
      - source: {namespaces: [c]}
  status:
    conditions: [{type: ZtunnelAccepted, status: "True"}]
"#,
    );
    assert_eq!(converted.policies().count(), 1);
    assert_eq!(warnings(&converted), [""; 0]);
}

#[test]
fn typed_lists_empty_lists_and_json_are_read() {
    let json = r#"{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicyList", "items": [
        {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
         "metadata": {"name": "a", "namespace": "b"},
         "spec": {"rules": [{"to": [{"operation": {"ports": ["80"]}}]}]}}]}"#;
    assert_eq!(read(json).authorization_policies().count(), 1);
    let empty = "apiVersion: v1\nkind: List\nitems: []\n";
    assert_eq!(read(empty).authorization_policies().count(), 0);
    assert_eq!(
        errors("apiVersion: v1\nkind: List\nitems: {}\n"),
        ["m.yaml:3:8: document 1: items: is a mapping, expected a list"]
    );
}

#[test]
fn error_in_a_list_names_the_item() {
    let text = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod}\n- {kind: Pod}\n";
    assert_eq!(
        errors(text),
        ["m.yaml:5:3: document 1, items[1]: apiVersion: is missing"]
    );
}

#[test]
fn empty_documents_and_files_give_nothing() {
    for text in ["", "\n", "# a comment\n", "---\n---\n", "null\n"] {
        assert_eq!(read(text).authorization_policies().count(), 0, "{text:?}");
    }
    let between = format!("---\n---\n{POLICY}---\n");
    assert_eq!(read(&between).authorization_policies().count(), 1);
}

#[test]
fn fields_without_a_value_are_absent_as_for_kubernetes() {
    let converted = exact(&format!(
        "{POLICY}spec:\n  selector:\n  action:\n  rules:\n  - to: [{{operation: {{ports: ['80']}}}}]\n"
    ));
    assert_eq!(converted.policies().count(), 1);
    let spec = exact(&format!("{POLICY}spec:\n"));
    assert_eq!(spec.policies().next().unwrap().policy.rules, []);
}

#[test]
fn anchors_are_followed_and_the_place_is_where_they_are_used() {
    let text = format!(
        "{POLICY}spec:\n  rules:\n  - to: &to [{{operation: {{ports: ['80']}}}}]\n  - to: *to\n    from: [{{source: {{namespaces: [x]}}}}]\n"
    );
    let converted = exact(&text);
    assert_eq!(converted.policies().next().unwrap().policy.rules.len(), 2);
}

#[test]
fn alias_bomb_is_an_error() {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for n in 1..12 {
        let before = format!("*a{}, ", n - 1).repeat(9);
        text.push_str(&format!("a{n}: &a{n} [{before}]\n"));
    }
    assert_eq!(errors(&text).len(), 1);
}

#[test]
fn deep_nesting_is_an_error() {
    for text in [
        "[".repeat(100_000),
        "- ".repeat(100_000),
        "{a: ".repeat(100_000),
    ] {
        assert_eq!(errors(&text).len(), 1);
    }
}

#[test]
fn thousands_of_policies_fit_in_one_file() {
    let mut text = String::new();
    for n in 0..3_000 {
        text.push_str(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p{n}, namespace: b}}\nspec: {{rules: [{{to: [{{operation: {{ports: ['80']}}}}]}}]}}\n---\n"
        ));
    }
    assert_eq!(read(&text).authorization_policies().count(), 3_000);
}

#[test]
fn other_kinds_are_skipped_with_a_notice_or_refused() {
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\n---\n{POLICY}---\napiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: jwt, namespace: b}}\nspec: {{}}\n"
    );
    let converted = exact(&text);
    assert_eq!(converted.policies().count(), 1);
    assert_eq!(
        warnings(&converted),
        [
            "m.yaml:2:7: Service web: skipped: not a policy (v1)",
            "m.yaml:10:7: RequestAuthentication jwt: skipped: not a policy (security.istio.io/v1)",
        ]
    );
    let refused = parse(&text, Path::new("m.yaml"), OtherKinds::Refuse).unwrap_err();
    assert_eq!(
        refused[0].to_string(),
        "m.yaml:2:7: document 1: kind: is a `Service`: expected AuthorizationPolicy or PeerAuthentication"
    );
    assert_eq!(refused.len(), 2);
}

#[test]
fn selecting_policies_are_named_by_the_workloads_that_they_select() {
    let selecting = |name: &str, namespace: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{selector: {{matchLabels: {{app: web, tier: front}}}}}}\n---\n"
        )
    };
    let converted = exact(&format!(
        "{}{}{}{POLICY}",
        selecting("z", "shop"),
        selecting("all", "istio-system"),
        selecting("z", "other")
    ));
    let both = "app=web,tier=front,version=v1";
    assert_eq!(
        attached(&converted, "shop", both),
        ["istio-system/all", "shop/z"]
    );
    assert_eq!(attached(&converted, "third", both), ["istio-system/all"]);
    assert_eq!(attached(&converted, "shop", "app=web"), [""; 0]);
    // That one holds for its namespace without being named.
    assert_eq!(attached(&converted, "b", ""), [""; 0]);
}
