//! `PeerAuthentication`: of the mesh, a namespace, a workload, a port.

use super::{Example, IP};

pub const EXAMPLES: &[Example] = &[
    Example {
        what: "strict for the mesh",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec:
  mtls: {mode: STRICT}
"#,
        rows: &[
            ("foo", "", "", IP, 80, false),
            ("istio-system", "", "", IP, 80, false),
            ("foo", "", "foo/a", IP, 80, true),
        ],
    },
    Example {
        what: "strict for a namespace, permissive for a workload in it",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: foo}
spec:
  mtls: {mode: STRICT}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: finance, namespace: foo}
spec:
  selector:
    matchLabels: {app: finance}
  mtls: {mode: PERMISSIVE}
"#,
        rows: &[
            ("foo", "", "", IP, 80, false),
            ("foo", "app=finance", "", IP, 80, true),
            ("bar", "", "", IP, 80, true),
        ],
    },
    Example {
        what: "strict for a workload except one port",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: finance, namespace: foo}
spec:
  selector:
    matchLabels: {app: finance}
  mtls: {mode: STRICT}
  portLevelMtls:
    8080: {mode: DISABLE}
"#,
        rows: &[
            ("foo", "app=finance", "", IP, 80, false),
            ("foo", "app=finance", "", IP, 8080, true),
            ("foo", "app=finance", "foo/a", IP, 80, true),
            ("foo", "", "", IP, 80, true),
        ],
    },
    Example {
        what: "the namespace's mode for a workload except one port",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: foo}
spec:
  mtls: {mode: STRICT}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: finance, namespace: foo}
spec:
  selector:
    matchLabels: {app: finance}
  mtls: {mode: UNSET}
  portLevelMtls:
    "8080": {mode: PERMISSIVE}
"#,
        rows: &[
            ("foo", "app=finance", "", IP, 80, false),
            ("foo", "app=finance", "", IP, 8080, true),
            ("foo", "", "", IP, 8080, false),
        ],
    },
    Example {
        what: "strict, and an ALLOW policy on top",
        yaml: r#"
apiVersion: v1
kind: List
items:
- apiVersion: security.istio.io/v1
  kind: PeerAuthentication
  metadata: {name: default, namespace: foo}
  spec: {mtls: {mode: STRICT}}
- apiVersion: security.istio.io/v1
  kind: AuthorizationPolicy
  metadata: {name: from-bar, namespace: foo}
  spec:
    rules:
    - from: [{source: {namespaces: [bar]}}]
    - from: [{source: {ipBlocks: [10.1.2.3]}}]
"#,
        rows: &[
            ("foo", "", "bar/a", "10.9.9.9", 80, true),
            ("foo", "", "baz/a", "10.9.9.9", 80, false),
            ("foo", "", "baz/a", IP, 80, true),
            ("foo", "", "", IP, 80, false),
        ],
    },
];
