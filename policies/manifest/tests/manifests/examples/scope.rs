//! Nothing, everything, ports: for a namespace, for the mesh, for what a selector selects.

use super::{Example, IP};

pub const EXAMPLES: &[Example] = &[
    Example {
        what: "nothing in a namespace",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow-nothing, namespace: foo}
spec: {}
"#,
        rows: &[
            ("foo", "", "foo/a", IP, 80, false),
            ("foo", "", "", IP, 80, false),
            ("bar", "", "foo/a", IP, 80, true),
        ],
    },
    Example {
        what: "nothing in the mesh",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-all, namespace: istio-system}
spec: {}
"#,
        rows: &[
            ("foo", "", "foo/a", IP, 80, false),
            ("istio-system", "", "foo/a", IP, 80, false),
        ],
    },
    Example {
        what: "everything, written as a rule without conditions",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow-all, namespace: foo}
spec:
  action: ALLOW
  rules:
  - {}
"#,
        rows: &[
            ("foo", "", "bar/a", IP, 80, true),
            ("foo", "", "", IP, 80, true),
        ],
    },
    Example {
        what: "an allow-all does not win over a deny-all",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow-all, namespace: foo}
spec: {action: ALLOW, rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-all, namespace: foo}
spec: {action: DENY, rules: [{}]}
"#,
        rows: &[
            ("foo", "", "bar/a", IP, 80, false),
            ("bar", "", "bar/a", IP, 80, true),
        ],
    },
    Example {
        what: "two ports of a TCP echo server",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: tcp-policy, namespace: foo}
spec:
  selector:
    matchLabels: {app: tcp-echo}
  action: ALLOW
  rules:
  - to:
    - operation:
        ports: ["9000", "9001"]
"#,
        rows: &[
            ("foo", "app=tcp-echo", "foo/a", IP, 9000, true),
            ("foo", "app=tcp-echo", "", IP, 9001, true),
            ("foo", "app=tcp-echo", "foo/a", IP, 9002, false),
            ("foo", "app=other", "foo/a", IP, 9002, true),
            ("bar", "app=tcp-echo", "foo/a", IP, 9002, true),
        ],
    },
    Example {
        what: "a selector of the root namespace works in every namespace",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: databases, namespace: istio-system}
spec:
  selector:
    matchLabels: {tier: database}
  rules:
  - from:
    - source:
        namespaces: ["backend-*"]
    to:
    - operation:
        ports: ["5432"]
"#,
        rows: &[
            ("shop", "tier=database", "backend-a/x", IP, 5432, true),
            ("shop", "tier=database", "backend-a/x", IP, 22, false),
            ("shop", "tier=database", "backend/x", IP, 5432, false),
            ("shop", "tier=web", "backend/x", IP, 5432, true),
        ],
    },
];
