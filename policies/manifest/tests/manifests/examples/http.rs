//! Policies with HTTP conditions: what is left of them at L4.

use super::{Example, IP};

pub const EXAMPLES: &[Example] = &[
    Example {
        what: "an HTTP method makes the ALLOW rule one that TCP never matches",
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
        methods: ["GET"]
        ports: ["9000"]
"#,
        rows: &[
            ("foo", "app=tcp-echo", "foo/a", IP, 9000, false),
            ("foo", "app=tcp-echo", "foo/a", IP, 9001, false),
        ],
    },
    Example {
        what: "an HTTP method in a DENY rule with a port leaves the port",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: tcp-policy, namespace: foo}
spec:
  selector:
    matchLabels: {app: tcp-echo}
  action: DENY
  rules:
  - to:
    - operation:
        methods: ["GET"]
        ports: ["9000"]
"#,
        rows: &[
            ("foo", "app=tcp-echo", "foo/a", IP, 9000, false),
            ("foo", "app=tcp-echo", "foo/a", IP, 9001, true),
        ],
    },
    Example {
        what: "the reference's first example: two alternatives, a method and a claim",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: httpbin, namespace: foo}
spec:
  action: ALLOW
  rules:
  - from:
    - source:
        principals: ["cluster.local/ns/default/sa/curl"]
    - source:
        namespaces: ["test"]
    to:
    - operation:
        methods: ["GET"]
        paths: ["/info*"]
    - operation:
        methods: ["POST"]
        paths: ["/data"]
    when:
    - key: request.auth.claims[iss]
      values: ["https://issuer.example"]
"#,
        rows: &[
            ("foo", "", "default/curl", IP, 80, false),
            ("foo", "", "test/a", IP, 80, false),
        ],
    },
    Example {
        what: "the same without its HTTP conditions",
        yaml: r#"
apiVersion: security.istio.io/v1beta1
kind: AuthorizationPolicy
metadata: {name: httpbin, namespace: foo}
spec:
  action: ALLOW
  rules:
  - from:
    - source:
        principals: ["cluster.local/ns/default/sa/curl"]
    - source:
        namespaces: ["test"]
"#,
        rows: &[
            ("foo", "", "default/curl", IP, 80, true),
            (
                "foo",
                "",
                "spiffe://other.td/ns/default/sa/curl",
                IP,
                80,
                false,
            ),
            ("foo", "", "test/a", IP, 80, true),
            ("foo", "", "testing/a", IP, 80, false),
            ("foo", "", "", IP, 80, false),
        ],
    },
    Example {
        what: "DENY of a method from a namespace has no effect at L4",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: httpbin, namespace: foo}
spec:
  action: DENY
  rules:
  - from:
    - source:
        namespaces: ["dev"]
    to:
    - operation:
        methods: ["POST"]
"#,
        rows: &[
            ("foo", "", "dev/a", IP, 80, true),
            ("foo", "", "bar/a", IP, 80, true),
        ],
    },
    Example {
        what: "a server name is no part of L4",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: egress, namespace: foo}
spec:
  rules:
  - when:
    - key: connection.sni
      values: ["www.example.com"]
"#,
        rows: &[("foo", "", "foo/a", IP, 443, false)],
    },
    Example {
        what: "normalization: a DENY of paths denies no connection",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-admin, namespace: foo}
spec:
  action: DENY
  rules:
  - to:
    - operation:
        paths: ["/admin"]
"#,
        rows: &[("foo", "", "foo/a", IP, 80, true)],
    },
    Example {
        what: "normalization: an ALLOW of all paths but some admits no connection",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow-others, namespace: foo}
spec:
  rules:
  - to:
    - operation:
        notPaths: ["/admin"]
"#,
        rows: &[("foo", "", "foo/a", IP, 80, false)],
    },
];
