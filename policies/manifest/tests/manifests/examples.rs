//! The L4 examples of Istio's documentation (authorization for TCP traffic, the policy
//! reference, ambient L4 policies, ingress, trust domains, dry run), each with connections
//! that it admits and connections that it refuses. Where an example has HTTP conditions,
//! this is what is left of it at L4.

use crate::harness::{To, exact, judge};

/// Namespace, labels, who, from which address, to which port; admitted?
type Row = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    u16,
    bool,
);

struct Example {
    what: &'static str,
    yaml: &'static str,
    rows: &'static [Row],
}

const IP: &str = "10.1.2.3";

const EXAMPLES: &[Example] = &[
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
        what: "ambient: only the gateway's account reaches the product page",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: productpage-ztunnel
  namespace: default
spec:
  selector:
    matchLabels:
      app: productpage
  action: ALLOW
  rules:
  - from:
    - source:
        principals:
        - cluster.local/ns/default/sa/bookinfo-gateway-istio
"#,
        rows: &[
            (
                "default",
                "app=productpage,version=v1",
                "default/bookinfo-gateway-istio",
                IP,
                9080,
                true,
            ),
            (
                "default",
                "app=productpage,version=v1",
                "default/curl",
                IP,
                9080,
                false,
            ),
            ("default", "app=productpage,version=v1", "", IP, 9080, false),
            ("default", "app=reviews", "default/curl", IP, 9080, true),
        ],
    },
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
        what: "service accounts, of the own namespace and of another",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: accounts, namespace: foo}
spec:
  rules:
  - from:
    - source:
        serviceAccounts: ["web", "bar/batch"]
"#,
        rows: &[
            ("foo", "", "foo/web", IP, 80, true),
            ("foo", "", "spiffe://old.td/ns/foo/sa/web", IP, 80, true),
            ("foo", "", "bar/batch", IP, 80, true),
            ("foo", "", "bar/web", IP, 80, false),
            ("foo", "", "foo/batch", IP, 80, false),
        ],
    },
    Example {
        what: "all service accounts but one",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: accounts, namespace: foo}
spec:
  action: DENY
  rules:
  - from:
    - source:
        notServiceAccounts: ["foo/web"]
"#,
        rows: &[
            ("foo", "", "foo/web", IP, 80, true),
            ("foo", "", "foo/other", IP, 80, false),
            ("foo", "", "", IP, 80, false),
        ],
    },
    Example {
        what: "only peers with an identity",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: require-mtls, namespace: foo}
spec:
  action: DENY
  rules:
  - from:
    - source:
        notPrincipals: ["*"]
"#,
        rows: &[
            ("foo", "", "bar/a", IP, 80, true),
            ("foo", "", "", IP, 80, false),
        ],
    },
    Example {
        what: "ingress: address blocks",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ingress-policy, namespace: istio-system}
spec:
  selector:
    matchLabels:
      app: istio-ingressgateway
  action: ALLOW
  rules:
  - from:
    - source:
        ipBlocks: ["1.2.3.4", "5.6.7.0/24"]
"#,
        rows: &[
            (
                "istio-system",
                "app=istio-ingressgateway",
                "",
                "1.2.3.4",
                443,
                true,
            ),
            (
                "istio-system",
                "app=istio-ingressgateway",
                "",
                "5.6.7.255",
                443,
                true,
            ),
            (
                "istio-system",
                "app=istio-ingressgateway",
                "",
                "::ffff:5.6.7.1",
                443,
                true,
            ),
            (
                "istio-system",
                "app=istio-ingressgateway",
                "",
                "1.2.3.5",
                443,
                false,
            ),
        ],
    },
    Example {
        what: "ingress: addresses that a proxy reports are unknown at L4",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ingress-policy, namespace: istio-system}
spec:
  selector:
    matchLabels:
      app: istio-ingressgateway
  action: ALLOW
  rules:
  - from:
    - source:
        remoteIpBlocks: ["1.2.3.4", "5.6.7.0/24"]
"#,
        rows: &[(
            "istio-system",
            "app=istio-ingressgateway",
            "",
            "1.2.3.4",
            443,
            false,
        )],
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
    Example {
        what: "trust domains in principals are compared literally",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: service-httpbin, namespace: foo}
spec:
  rules:
  - from:
    - source:
        principals: ["old-td/ns/curl-allow/sa/curl", "*/ns/any/sa/job", "new-td/*"]
"#,
        rows: &[
            (
                "foo",
                "",
                "spiffe://old-td/ns/curl-allow/sa/curl",
                IP,
                80,
                true,
            ),
            (
                "foo",
                "",
                "spiffe://third/ns/curl-allow/sa/curl",
                IP,
                80,
                false,
            ),
            ("foo", "", "spiffe://third/ns/any/sa/job", IP, 80, true),
            ("foo", "", "spiffe://new-td/ns/x/sa/y", IP, 80, true),
            ("foo", "", "spiffe://new-td2/ns/x/sa/y", IP, 80, false),
        ],
    },
    Example {
        what: "conditions: addresses, namespaces and ports, all of them",
        yaml: r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: conditions, namespace: foo}
spec:
  rules:
  - when:
    - key: source.namespace
      values: ["bar"]
    - key: source.ip
      values: ["10.1.0.0/16"]
      notValues: ["10.1.9.0/24"]
    - key: destination.port
      values: ["80", "443"]
    - key: destination.ip
      values: ["10.0.0.80"]
    - key: source.principal
      notValues: ["*/sa/evil"]
"#,
        rows: &[
            ("foo", "", "bar/a", IP, 80, true),
            ("foo", "", "bar/evil", IP, 80, false),
            ("foo", "", "baz/a", IP, 80, false),
            ("foo", "", "bar/a", "10.1.9.1", 80, false),
            ("foo", "", "bar/a", "10.2.0.1", 80, false),
            ("foo", "", "bar/a", IP, 81, false),
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

#[test]
fn documented_examples_admit_and_refuse_what_they_say() {
    let mut wrong = Vec::new();
    for example in EXAMPLES {
        let converted = exact(example.yaml);
        for &(namespace, labels, from, source, port, admitted) in example.rows {
            let to = To {
                namespace,
                labels,
                from,
                source,
                port,
            };
            let decision = judge(&converted, to);
            if decision.allows() != admitted {
                wrong.push(format!(
                    "{}: `{from}` {source} -> {namespace} {{{labels}}}:{port}: {decision:?}",
                    example.what
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
