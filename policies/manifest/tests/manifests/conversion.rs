//! Rules, and what of them is left at L4.

use ringfence_manifest::{L7Handling, LostCondition, WarningKind, convert};
use ringfence_policies::{Action, Clause, Match, Policy, Rule, Scope};

use crate::harness::{ROOT, policy, read, warnings};

use L7Handling::{DenyAsL4, IstioExact};

fn yaml(action: &str, rules: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: demo}}\nspec:\n  action: {action}\n  rules:\n{rules}"
    )
}

/// One clause for each element, one match for each of its elements.
fn rule(clauses: &[&[Match]]) -> Rule {
    let clauses = clauses.iter().map(|matches| Clause {
        matches: matches.to_vec(),
    });
    Rule {
        clauses: clauses.collect(),
    }
}

fn ports(ports: &[u16]) -> Match {
    Match {
        destination_ports: ports.to_vec(),
        ..Match::default()
    }
}

fn namespaces(names: &[&str]) -> Match {
    Match {
        namespaces: names.iter().map(|name| name.parse().unwrap()).collect(),
        ..Match::default()
    }
}

#[test]
fn every_l4_field_arrives_in_its_place() {
    let text = yaml(
        "ALLOW",
        r#"
  - from:
    - source:
        principals: ["td/ns/a/sa/b", "td/*", "*/sa/b", "*"]
        notPrincipals: ["x"]
        namespaces: ["a", "b*"]
        notNamespaces: ["c"]
        serviceAccounts: ["sa", "other/sa"]
        notServiceAccounts: ["y"]
        ipBlocks: ["10.0.0.0/8", "fd00::1"]
        notIpBlocks: ["10.1.0.0/16"]
    to:
    - operation: {ports: ["80", "443"], notPorts: ["0"]}
    when:
    - {key: destination.ip, values: ["10.0.0.1"], notValues: ["10.0.0.2"]}
    - {key: destination.port, values: ["1"], notValues: ["2"]}
    - {key: source.ip, values: ["::/0"], notValues: ["::1"]}
    - {key: source.namespace, values: ["n"], notValues: ["m"]}
    - {key: source.principal, values: ["p"], notValues: ["q"]}
"#,
    );
    let strings = |list: &[&str]| list.iter().map(|s| s.parse().unwrap()).collect::<Vec<_>>();
    let cidrs = |list: &[&str]| list.iter().map(|s| s.parse().unwrap()).collect::<Vec<_>>();
    let account =
        |ns: &str, sa: &str| ringfence_policies::ServiceAccountMatch::new(ns, sa).unwrap();
    let expected = rule(&[
        &[Match {
            destination_ports: vec![80, 443],
            not_destination_ports: vec![0],
            ..Match::default()
        }],
        &[Match {
            principals: strings(&["td/ns/a/sa/b", "td/*", "*/sa/b", "*"]),
            not_principals: strings(&["x"]),
            namespaces: strings(&["a", "b*"]),
            not_namespaces: strings(&["c"]),
            service_accounts: vec![account("demo", "sa"), account("other", "sa")],
            not_service_accounts: vec![account("demo", "y")],
            source_ips: cidrs(&["10.0.0.0/8", "fd00::1"]),
            not_source_ips: cidrs(&["10.1.0.0/16"]),
            ..Match::default()
        }],
        &[Match {
            destination_ips: cidrs(&["10.0.0.1"]),
            not_destination_ips: cidrs(&["10.0.0.2"]),
            ..Match::default()
        }],
        &[Match {
            destination_ports: vec![1],
            not_destination_ports: vec![2],
            ..Match::default()
        }],
        &[Match {
            source_ips: cidrs(&["::/0"]),
            not_source_ips: cidrs(&["::1"]),
            ..Match::default()
        }],
        &[Match {
            namespaces: strings(&["n"]),
            not_namespaces: strings(&["m"]),
            ..Match::default()
        }],
        &[Match {
            principals: strings(&["p"]),
            not_principals: strings(&["q"]),
            ..Match::default()
        }],
    ]);
    assert_eq!(
        policy(&text, IstioExact),
        Policy {
            name: "demo/p".parse().unwrap(),
            scope: Scope::Namespace,
            action: Action::Allow,
            dry_run: false,
            rules: vec![expected],
        }
    );
}

#[test]
fn scope_follows_selector_and_root_namespace() {
    let with = |namespace: &str, selector: &str| {
        let text = yaml("ALLOW", "  - {}\n").replace("namespace: demo", namespace);
        policy(&format!("{text}{selector}"), IstioExact).scope
    };
    let selector = "  selector: {matchLabels: {app: web}}\n";
    assert_eq!(with("namespace: demo", ""), Scope::Namespace);
    assert_eq!(with("namespace: istio-system", ""), Scope::Global);
    assert_eq!(with("namespace: demo", selector), Scope::WorkloadSelector);
    assert_eq!(
        with("namespace: istio-system", selector),
        Scope::WorkloadSelector
    );
}

/// Every condition that Istio has and L4 has not, as `from`, `to` and `when`.
const L7: &[&str] = &[
    "from: [{source: {requestPrincipals: [x]}}]",
    "from: [{source: {notRequestPrincipals: [x]}}]",
    "from: [{source: {remoteIpBlocks: [10.0.0.1]}}]",
    "from: [{source: {notRemoteIpBlocks: [10.0.0.1]}}]",
    "from: [{source: {trustDomains: [td]}}]",
    "from: [{source: {notTrustDomains: [td]}}]",
    "to: [{operation: {hosts: [x]}}]",
    "to: [{operation: {notHosts: [x]}}]",
    "to: [{operation: {methods: [GET]}}]",
    "to: [{operation: {notMethods: [GET]}}]",
    "to: [{operation: {paths: [/x]}}]",
    "to: [{operation: {notPaths: [/x]}}]",
    "when: [{key: 'request.headers[X]', values: [v]}]",
    "when: [{key: remote.ip, values: [10.0.0.1]}]",
    "when: [{key: source.serviceAccount, values: [a/b]}]",
    "when: [{key: source.trustDomain, values: [td]}]",
    "when: [{key: request.auth.principal, notValues: [v]}]",
    "when: [{key: request.auth.audiences, values: [v]}]",
    "when: [{key: request.auth.presenter, values: [v]}]",
    "when: [{key: 'request.auth.claims[iss]', values: [v]}]",
    "when: [{key: 'request.auth.claims[a][b]', values: [v]}]",
    "when: [{key: connection.sni, values: [v]}]",
    "when: [{key: 'experimental.envoy.filters.network.x[y]', values: [z]}]",
];

#[test]
fn allow_rule_with_any_condition_beyond_l4_is_left_out_in_both_modes() {
    for l7 in L7 {
        let text = yaml(
            "ALLOW",
            &format!("  - {l7}\n  - to: [{{operation: {{ports: ['80']}}}}]\n"),
        );
        for handling in [IstioExact, DenyAsL4] {
            let converted = policy(&text, handling);
            assert_eq!(converted.rules, [rule(&[&[ports(&[80])]])], "{l7}");
        }
        let converted = convert(&read(&text), ROOT, IstioExact);
        let kinds: Vec<_> = converted.warnings.iter().map(|w| &w.kind).collect();
        assert_eq!(
            kinds,
            [&WarningKind::Lost(LostCondition::AllowRule)],
            "{l7}"
        );
    }
}

#[test]
fn deny_rule_of_conditions_beyond_l4_is_inert_and_denies_everything_as_l4() {
    for l7 in L7 {
        let text = yaml("DENY", &format!("  - {l7}\n"));
        let inert = rule(&[&[Match::default()]]);
        assert_eq!(policy(&text, IstioExact).rules, [inert], "{l7}");
        assert_eq!(policy(&text, DenyAsL4).rules, [Rule::default()], "{l7}");
        for (handling, effect) in [
            (IstioExact, LostCondition::DenyRuleInert),
            (DenyAsL4, LostCondition::DenyWidened),
        ] {
            let converted = convert(&read(&text), ROOT, handling);
            let kinds: Vec<_> = converted.warnings.iter().map(|w| &w.kind).collect();
            assert_eq!(kinds, [&WarningKind::Lost(effect)], "{l7}");
        }
    }
}

#[test]
fn allow_policy_that_loses_its_rules_still_refuses() {
    let text = yaml("ALLOW", "  - to: [{operation: {methods: [GET]}}]\n");
    assert_eq!(policy(&text, IstioExact).rules, []);
    let converted = convert(&read(&text), ROOT, IstioExact);
    assert_eq!(
        warnings(&converted),
        [
            "m.yaml:7:32: AuthorizationPolicy demo/p: spec.rules[0].to[0].operation.methods: cannot be checked at L4: the ALLOW rule is left out, what it would admit is refused",
            "m.yaml:3:18: AuthorizationPolicy demo/p: spec.rules: no rule is left: the policy admits nothing, and its workloads refuse what no other ALLOW policy admits",
        ]
    );
}

/// Rule, its form as Istiod sends it, its form as L4 DENY, and what is warned about.
type Row = (
    &'static str,
    fn() -> Rule,
    fn() -> Rule,
    &'static [LostCondition],
);

const DENY: &[Row] = &[
    // Conditions beside L4 ones in the same element.
    (
        "from: [{source: {namespaces: [a], requestPrincipals: [x]}}], to: [{operation: {ports: ['80']}}]",
        || rule(&[&[ports(&[80])], &[namespaces(&["a"])]]),
        || rule(&[&[ports(&[80])], &[namespaces(&["a"])]]),
        &[LostCondition::DenyWidened],
    ),
    // An element without L4 beside one with it.
    (
        "to: [{operation: {ports: ['80']}}, {operation: {methods: [GET]}}]",
        || rule(&[&[ports(&[80]), Match::default()]]),
        || rule(&[]),
        &[LostCondition::DenyAlternativeInert],
    ),
    // One list without L4 makes the whole rule inert.
    (
        "from: [{source: {namespaces: [a]}}], to: [{operation: {methods: [GET], paths: [/x]}}]",
        || rule(&[&[Match::default()], &[namespaces(&["a"])]]),
        || rule(&[&[namespaces(&["a"])]]),
        &[LostCondition::DenyRuleInert, LostCondition::DenyRuleInert],
    ),
    (
        "when: [{key: source.namespace, values: [a]}, {key: connection.sni, values: [x]}]",
        || rule(&[&[namespaces(&["a"])], &[Match::default()]]),
        || rule(&[&[namespaces(&["a"])]]),
        &[LostCondition::DenyRuleInert],
    ),
    // Nothing is lost.
    (
        "from: [{source: {namespaces: [a]}}], to: [{operation: {ports: ['80']}}]",
        || rule(&[&[ports(&[80])], &[namespaces(&["a"])]]),
        || rule(&[&[ports(&[80])], &[namespaces(&["a"])]]),
        &[],
    ),
    ("", || rule(&[]), || rule(&[]), &[]),
];

#[test]
fn deny_rules_convert_as_istiod_does_or_as_l4() {
    for (text, exact, as_l4, effects) in DENY {
        let text = yaml("DENY", &format!("  - {{{text}}}\n"));
        assert_eq!(policy(&text, IstioExact).rules, [exact()], "{text}");
        assert_eq!(policy(&text, DenyAsL4).rules, [as_l4()], "{text}");
        let converted = convert(&read(&text), ROOT, IstioExact);
        let expected: Vec<_> = effects.iter().map(|e| WarningKind::Lost(*e)).collect();
        let kinds: Vec<_> = converted.warnings.into_iter().map(|w| w.kind).collect();
        assert_eq!(kinds, expected, "{text}");
    }
}

#[test]
fn policies_without_a_part_at_l4_are_left_out_with_a_warning() {
    for (from, to, expected) in [
        (
            "action: ALLOW",
            "action: AUDIT",
            "m.yaml:5:11: AuthorizationPolicy demo/p: spec.action: AUDIT is not enforced",
        ),
        (
            "action: ALLOW",
            "action: CUSTOM\n  provider: {name: x}",
            "m.yaml:5:11: AuthorizationPolicy demo/p: spec.action: CUSTOM is not enforced",
        ),
        (
            "action: ALLOW",
            "targetRef: {kind: Gateway, group: gateway.networking.k8s.io, name: x}",
            "m.yaml:5:14: AuthorizationPolicy demo/p: spec.targetRef: the policy is for a waypoint",
        ),
        (
            "action: ALLOW",
            "targetRefs: [{kind: Service, group: '', name: x}]",
            "m.yaml:5:15: AuthorizationPolicy demo/p: spec.targetRefs: the policy is for a waypoint",
        ),
    ] {
        let text = yaml("ALLOW", "  - {}\n").replace(from, to);
        let converted = convert(&read(&text), ROOT, DenyAsL4);
        assert_eq!(converted.policies().count(), 0, "{to}");
        let warnings = warnings(&converted);
        assert!(
            warnings.len() == 1 && warnings[0].starts_with(expected),
            "{warnings:?}\n{expected}"
        );
    }
}

#[test]
fn odd_values_are_warned_about() {
    let text = yaml(
        "DENY",
        "  - from: [{source: {ipBlocks: [10.1.2.3/8, 10.0.0.0/8, 10.1.2.3, 'FD00::/8']}}]\n",
    );
    let converted = convert(&read(&text), ROOT, IstioExact);
    assert_eq!(
        warnings(&converted),
        [
            "m.yaml:7:33: AuthorizationPolicy demo/p: spec.rules[0].from[0].source.ipBlocks[0]: has bits beyond its prefix: read as 10.0.0.0/8"
        ]
    );
    let text = yaml("DENY", "    []\n");
    let converted = convert(&read(&text), ROOT, IstioExact);
    assert_eq!(
        warnings(&converted),
        [
            "m.yaml:7:5: AuthorizationPolicy demo/p: spec.rules: is empty: a DENY policy without rules denies nothing"
        ]
    );
}
