//! Which mode a PeerAuthentication gives to whom.

use ringfence_policies::{Clause, Match, Rule, StringMatch};

use crate::harness::{attached, exact, warnings};

const STRICT: &str = "istio-system/istio_converted_static_strict";
const PORTS: &str = "foo/converted_peer_authentication_own";

/// Modes of mesh, namespace and workload (`-`: no such policy), ports of the workload.
fn mesh(mesh: &str, namespace: &str, own: &str, ports: &str) -> String {
    let one = |name: &str, namespace: &str, mode: &str, rest: &str| match mode {
        "-" => String::new(),
        mode => format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{mtls: {{mode: {mode}}}{rest}}}\n---\n"
        ),
    };
    let rest = match ports {
        "" => ", selector: {matchLabels: {app: a}}".to_owned(),
        ports => format!(", selector: {{matchLabels: {{app: a}}}}, portLevelMtls: {{{ports}}}"),
    };
    format!(
        "{}{}{}",
        one("default", "istio-system", mesh, ""),
        one("default", "foo", namespace, ""),
        one("own", "foo", own, &rest)
    )
}

fn without_identity() -> Match {
    Match {
        not_principals: vec![StringMatch::Presence],
        ..Match::default()
    }
}

fn clause(one: Match) -> Clause {
    Clause { matches: vec![one] }
}

fn other_than(port: u16) -> Clause {
    clause(Match {
        not_destination_ports: vec![port],
        ..Match::default()
    })
}

#[test]
fn most_specific_mode_that_is_set_decides() {
    // Mesh, namespace, workload; strict for the workload, strict beside it?
    for (root, namespace, own, selected, beside) in [
        ("-", "-", "-", false, false),
        ("STRICT", "-", "-", true, true),
        ("PERMISSIVE", "-", "-", false, false),
        ("UNSET", "-", "-", false, false),
        ("-", "STRICT", "-", true, true),
        ("STRICT", "PERMISSIVE", "-", false, false),
        ("STRICT", "DISABLE", "-", false, false),
        ("STRICT", "UNSET", "-", true, true),
        ("-", "-", "STRICT", true, false),
        ("STRICT", "-", "PERMISSIVE", false, true),
        ("STRICT", "-", "DISABLE", false, true),
        ("STRICT", "-", "UNSET", true, true),
        ("PERMISSIVE", "STRICT", "UNSET", true, true),
        ("STRICT", "PERMISSIVE", "UNSET", false, false),
        ("STRICT", "UNSET", "UNSET", true, true),
        ("STRICT", "PERMISSIVE", "STRICT", true, false),
    ] {
        let converted = exact(&mesh(root, namespace, own, ""));
        let what = format!("{root} {namespace} {own}");
        let names = |strict: bool| if strict { vec![STRICT] } else { vec![] };
        assert_eq!(
            attached(&converted, "foo", "app=a,b=c"),
            names(selected),
            "{what}"
        );
        assert_eq!(
            attached(&converted, "foo", "app=b"),
            names(beside),
            "{what}"
        );
        let elsewhere = names(root == "STRICT");
        assert_eq!(attached(&converted, "bar", "app=a"), elsewhere, "{what}");
        assert_eq!(
            attached(&converted, "istio-system", "app=a"),
            elsewhere,
            "{what}"
        );
        assert_eq!(converted.policies().count(), 0, "{what}");
    }
}

#[test]
fn modes_of_ports_become_a_deny_policy() {
    let closed = |ports: &[u16]| -> Vec<Rule> {
        let rules = ports.iter().map(|port| Rule {
            clauses: vec![clause(Match {
                destination_ports: vec![*port],
                ..without_identity()
            })],
        });
        rules.collect()
    };
    let own_strict = vec![Rule {
        clauses: vec![clause(without_identity()), other_than(8080)],
    }];
    let inherited = vec![Rule {
        clauses: vec![other_than(8080), clause(without_identity())],
    }];
    // Mesh, namespace, workload, ports; what the workload names, the policy's rules.
    for (root, namespace, own, ports, named, rules) in [
        (
            "-",
            "-",
            "PERMISSIVE",
            "9090: {mode: STRICT}",
            PORTS,
            closed(&[9090]),
        ),
        (
            "-",
            "-",
            "DISABLE",
            "9090: {mode: STRICT}",
            PORTS,
            closed(&[9090]),
        ),
        (
            "-",
            "-",
            "UNSET",
            "9090: {mode: STRICT}",
            PORTS,
            closed(&[9090]),
        ),
        (
            "-",
            "-",
            "PERMISSIVE",
            "9090: {mode: STRICT}, 8080: {mode: PERMISSIVE}",
            PORTS,
            closed(&[9090]),
        ),
        (
            "PERMISSIVE",
            "PERMISSIVE",
            "UNSET",
            "9090: {mode: STRICT}, 8080: {mode: STRICT}",
            PORTS,
            closed(&[8080, 9090]),
        ),
        (
            "STRICT",
            "PERMISSIVE",
            "UNSET",
            "9090: {mode: STRICT}",
            PORTS,
            closed(&[9090]),
        ),
        (
            "PERMISSIVE",
            "UNSET",
            "UNSET",
            "9090: {mode: STRICT}, 8080: {mode: PERMISSIVE}",
            PORTS,
            closed(&[9090]),
        ),
        (
            "-",
            "-",
            "STRICT",
            "8080: {mode: PERMISSIVE}",
            PORTS,
            own_strict.clone(),
        ),
        (
            "-",
            "-",
            "STRICT",
            "8080: {mode: DISABLE}",
            PORTS,
            own_strict.clone(),
        ),
        (
            "-",
            "-",
            "STRICT",
            "9090: {mode: STRICT}, 8080: {mode: PERMISSIVE}",
            PORTS,
            own_strict,
        ),
        (
            "STRICT",
            "-",
            "UNSET",
            "8080: {mode: PERMISSIVE}",
            PORTS,
            inherited.clone(),
        ),
        (
            "PERMISSIVE",
            "STRICT",
            "UNSET",
            "8080: {mode: PERMISSIVE}",
            PORTS,
            inherited.clone(),
        ),
        (
            "STRICT",
            "-",
            "UNSET",
            "8080: {mode: PERMISSIVE}, 9090: {mode: STRICT}",
            PORTS,
            inherited.clone(),
        ),
        // Nothing differs from the workload's own mode.
        ("-", "-", "STRICT", "9090: {mode: STRICT}", STRICT, vec![]),
        ("-", "-", "STRICT", "9090: {mode: UNSET}", STRICT, vec![]),
        (
            "-",
            "-",
            "PERMISSIVE",
            "9090: {mode: PERMISSIVE}",
            "",
            vec![],
        ),
        ("-", "-", "UNSET", "9090: {mode: DISABLE}", "", vec![]),
        (
            "STRICT",
            "-",
            "UNSET",
            "9090: {mode: STRICT}",
            STRICT,
            vec![],
        ),
        // Istiod takes no notice of DISABLE here.
        (
            "STRICT",
            "-",
            "UNSET",
            "9090: {mode: DISABLE}",
            STRICT,
            vec![],
        ),
        // Istiod names a policy that it never sends: here it is what was meant.
        (
            "STRICT",
            "-",
            "PERMISSIVE",
            "9090: {mode: STRICT}",
            PORTS,
            closed(&[9090]),
        ),
        (
            "STRICT",
            "UNSET",
            "UNSET",
            "8080: {mode: PERMISSIVE}",
            PORTS,
            inherited,
        ),
    ] {
        let converted = exact(&mesh(root, namespace, own, ports));
        let what = format!("{root} {namespace} {own} {ports}");
        let names = attached(&converted, "foo", "app=a").join(" ");
        assert_eq!(names, named, "{what}");
        let policies: Vec<_> = converted.policies().collect();
        let converted_rules: Vec<_> = policies
            .iter()
            .flat_map(|p| p.policy.rules.clone())
            .collect();
        assert_eq!(converted_rules, rules, "{what}");
        assert!(policies.iter().all(|p| p.policy.name.to_string() == PORTS));
    }
}

#[test]
fn oldest_of_a_scope_wins_and_the_others_are_warned_about() {
    let whole = |name: &str, mode: &str, created: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: foo{created}}}\nspec: {{mtls: {{mode: {mode}}}}}\n---\n"
        )
    };
    let at = |time: &str| format!(", creationTimestamp: \"{time}\"");
    for (first, second, strict) in [
        ("", "", true),
        ("", "2026-01-01T00:00:00Z", false),
        ("2026-01-01T00:00:00Z", "", true),
        ("2026-01-02T00:00:00Z", "2026-01-01T23:59:59Z", false),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z", true),
    ] {
        let created = |time: &str| {
            if time.is_empty() {
                String::new()
            } else {
                at(time)
            }
        };
        let text =
            whole("a", "STRICT", &created(first)) + &whole("b", "PERMISSIVE", &created(second));
        let converted = exact(&text);
        assert_eq!(
            !attached(&converted, "foo", "").is_empty(),
            strict,
            "{text}"
        );
        let warnings = warnings(&converted);
        let (loser, winner) = if strict {
            ("b", "foo/a")
        } else {
            ("a", "foo/b")
        };
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(
            warnings[0].contains(&format!(
                "PeerAuthentication foo/{loser}: metadata.name: has no effect: {winner} has"
            )),
            "{warnings:?}"
        );
    }
}

#[test]
fn oldest_that_selects_a_workload_decides() {
    let own = |name: &str, label: &str, mode: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: foo}}\nspec: {{selector: {{matchLabels: {{{label}}}}}, mtls: {{mode: {mode}}}}}\n---\n"
        )
    };
    let converted = exact(&(own("a", "app: a", "STRICT") + &own("b", "tier: x", "PERMISSIVE")));
    assert_eq!(attached(&converted, "foo", "app=a,tier=x"), [STRICT]);
    assert_eq!(attached(&converted, "foo", "tier=x"), [""; 0]);
    let converted = exact(&(own("b", "tier: x", "PERMISSIVE") + &own("a", "app: a", "STRICT")));
    assert_eq!(attached(&converted, "foo", "app=a,tier=x"), [""; 0]);
}

#[test]
fn what_has_no_effect_is_warned_about() {
    let text = mesh("-", "-", "STRICT", "8080: {mode: DISABLE}").replace("foo", "istio-system");
    let converted = exact(&text);
    assert_eq!(attached(&converted, "istio-system", "app=a"), [""; 0]);
    assert_eq!(
        warnings(&converted),
        [
            "m.yaml:3:18: PeerAuthentication istio-system/own: spec.selector: has no effect: in the root namespace only a PeerAuthentication without selector counts"
        ]
    );
    for (root, own, port, expected) in [
        (
            "STRICT",
            "UNSET",
            "DISABLE",
            "spec.portLevelMtls[8080]: has no effect, the port stays STRICT",
        ),
        (
            "-",
            "STRICT",
            "DISABLE",
            "spec.portLevelMtls[8080]: DISABLE is read as PERMISSIVE",
        ),
        (
            "-",
            "DISABLE",
            "STRICT",
            "spec.mtls.mode: DISABLE is read as PERMISSIVE",
        ),
    ] {
        let text = mesh(root, "-", own, &format!("8080: {{mode: {port}}}"));
        let warnings = warnings(&exact(&text));
        assert!(
            warnings.len() == 1 && warnings[0].contains(expected),
            "{warnings:?}"
        );
    }
}
