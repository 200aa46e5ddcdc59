//! Who connects: identities, service accounts, namespaces, addresses.

use super::{Example, IP};

pub const EXAMPLES: &[Example] = &[
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
];
