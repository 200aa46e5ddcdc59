//! What refuses nothing: dry runs, policies for waypoints, actions that are no verdict.

use super::{Example, IP};

pub const EXAMPLES: &[Example] = &[
    Example {
        what: "ambient: a policy with targetRefs is the waypoint's, not the node's",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: productpage-waypoint, namespace: default}
spec:
  targetRefs:
  - kind: Service
    group: ""
    name: productpage
  action: ALLOW
  rules:
  - from:
    - source:
        principals: [cluster.local/ns/default/sa/curl]
    to:
    - operation:
        methods: ["GET"]
"#,
        rows: &[(
            "default",
            "app=productpage",
            "default/other",
            IP,
            9080,
            true,
        )],
    },
    Example {
        what: "dry run: nothing is refused",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: deny-everything
  namespace: foo
  annotations:
    "istio.io/dry-run": "true"
spec:
  action: DENY
  rules:
  - {}
"#,
        rows: &[("foo", "", "foo/a", IP, 80, true)],
    },
    Example {
        what: "dry run switched off",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: deny-everything
  namespace: foo
  annotations: {istio.io/dry-run: "false"}
spec: {action: DENY, rules: [{}]}
"#,
        rows: &[("foo", "", "foo/a", IP, 80, false)],
    },
    Example {
        what: "AUDIT and CUSTOM decide nothing",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: audit, namespace: foo}
spec: {action: AUDIT, rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ext-authz, namespace: foo}
spec:
  action: CUSTOM
  provider: {name: sample-ext-authz-grpc}
  rules:
  - to:
    - operation: {paths: ["/headers"]}
"#,
        rows: &[("foo", "", "foo/a", IP, 80, true)],
    },
];
