//! Istio's L4 semantics, row by row, through both evaluators: all but identities.

use ringfence_policies::{
    Action, Match, Mode, PolicyName, Reason, WorkloadPolicies, evaluate_with_dry_run,
};

use crate::harness::{applied, from, judge, matches, only, peer, policy, ports, rule, strings};

const CART: &str = "spiffe://td/ns/shop/sa/cart";

#[test]
fn empty_cases_are_decided_as_istio_does() {
    let cart = peer(CART);
    let c = from(Some(&cart), "10.1.0.1", 80);
    let empty = Match::default();

    for action in [Action::Allow, Action::Deny] {
        let decision = judge(&applied(vec![policy("p", action, vec![])]), &c);
        assert_eq!(
            decision.policy, None,
            "a policy without rules never matches"
        );
    }
    assert!(matches(rule(vec![]), &c), "a rule without clauses matches");
    assert!(matches(rule(vec![vec![]]), &c), "an empty clause matches");
    assert!(matches(rule(vec![vec![], vec![]]), &c));
    assert!(!matches(only(empty.clone()), &c), "an empty match does not");
    assert!(!matches(rule(vec![vec![empty.clone(), empty.clone()]]), &c));
    assert!(!matches(rule(vec![vec![], vec![empty.clone()]]), &c));
    assert!(!matches(
        rule(vec![vec![ports(&[80])], vec![empty.clone()]]),
        &c
    ));
    assert!(matches(rule(vec![vec![empty, ports(&[80])]]), &c));
}

#[test]
fn no_policy_admits_and_an_allow_policy_without_rules_admits_nobody() {
    let cart = peer(CART);
    for peer in [Some(&cart), None] {
        let c = from(peer, "10.1.0.1", 80);
        let none = judge(&WorkloadPolicies::default(), &c);
        assert_eq!((none.allows(), none.reason), (true, Reason::NoAllowPolicy));
        let nobody = judge(&applied(vec![policy("nobody", Action::Allow, vec![])]), &c);
        assert_eq!(
            (nobody.allows(), nobody.reason),
            (false, Reason::NotAllowed)
        );
        let nothing = judge(&applied(vec![policy("nothing", Action::Deny, vec![])]), &c);
        assert_eq!(
            (nothing.allows(), nothing.reason),
            (true, Reason::NoAllowPolicy)
        );
    }
}

#[test]
fn deny_comes_before_allow_and_names_its_policy_and_rule() {
    let cart = peer(CART);
    let policies = applied(vec![
        policy(
            "allow",
            Action::Allow,
            vec![only(ports(&[443])), only(ports(&[80, 81]))],
        ),
        policy(
            "deny",
            Action::Deny,
            vec![only(ports(&[1])), only(ports(&[81]))],
        ),
    ]);
    let at = |port| {
        let decision = judge(&policies, &from(Some(&cart), "10.1.0.1", port));
        (
            decision.reason,
            decision.policy.map(|p| p.name),
            decision.rule,
        )
    };
    assert_eq!(at(80), (Reason::Allowed, Some("allow".into()), Some(1)));
    assert_eq!(at(443), (Reason::Allowed, Some("allow".into()), Some(0)));
    assert_eq!(at(81), (Reason::Denied, Some("deny".into()), Some(1)));
    assert_eq!(at(82), (Reason::NotAllowed, None, None));
}

#[test]
fn clauses_are_anded_and_matches_ored_across_dimensions() {
    let (cart, other) = (peer(CART), peer("spiffe://td/ns/shop/sa/other"));
    let by_principal = Match {
        principals: strings(&["td/ns/shop/sa/cart"]),
        ..Match::default()
    };
    let by_source = Match {
        source_ips: vec!["10.1.0.0/16".parse().unwrap()],
        ..Match::default()
    };
    let r = rule(vec![
        vec![by_principal, by_source],
        vec![ports(&[80]), ports(&[81])],
    ]);
    for (peer, source, port, expected) in [
        (&cart, "10.2.0.1", 80, true),
        (&other, "10.1.0.1", 81, true),
        (&cart, "10.1.0.1", 82, false),
        (&other, "10.2.0.1", 80, false),
    ] {
        assert_eq!(
            matches(r.clone(), &from(Some(peer), source, port)),
            expected
        );
    }
}

#[test]
fn addresses_match_by_family_and_prefix() {
    for (prefix, source, expected) in [
        ("10.0.0.0/8", "10.1.0.1", true),
        ("10.0.0.0/8", "11.1.0.1", false),
        ("10.0.0.0/8", "::ffff:10.1.0.1", true),
        ("10.0.0.0/8", "fd00::1", false),
        ("0.0.0.0/0", "192.0.2.1", true),
        ("0.0.0.0/0", "fd00::1", false),
        ("::/0", "fd00::1", true),
        ("::/0", "192.0.2.1", false),
        ("::/0", "::ffff:192.0.2.1", false),
        ("::/64", "192.0.2.1", false),
        ("::/96", "::192.0.2.1", true),
        ("fd00::/8", "fd01::1", true),
        ("fd00::/8", "2001:db8::1", false),
        ("10.1.0.1", "10.1.0.1", true),
        ("10.1.0.1", "10.1.0.2", false),
    ] {
        let list = vec![prefix.parse().unwrap()];
        let c = from(None, source, 80);
        let yes = Match {
            source_ips: list.clone(),
            ..Match::default()
        };
        let not = Match {
            not_source_ips: list,
            ..Match::default()
        };
        assert_eq!(matches(only(yes), &c), expected, "{source} in {prefix}");
        assert_eq!(
            matches(only(not), &c),
            !expected,
            "{source} not in {prefix}"
        );
    }
}

#[test]
fn nested_prefixes_each_answer_for_themselves() {
    // "10/8 except 10.1/16" beside "10.1.2/24".
    let outer = Match {
        source_ips: vec!["10.0.0.0/8".parse().unwrap()],
        not_source_ips: vec!["10.1.0.0/16".parse().unwrap()],
        ..Match::default()
    };
    let inner = Match {
        source_ips: vec!["10.1.2.0/24".parse().unwrap()],
        ..Match::default()
    };
    let r = rule(vec![vec![outer, inner]]);
    for (source, expected) in [
        ("10.0.0.1", true),
        ("10.1.0.1", false),
        ("10.1.2.1", true),
        ("11.0.0.1", false),
    ] {
        assert_eq!(
            matches(r.clone(), &from(None, source, 80)),
            expected,
            "{source}"
        );
    }
}

#[test]
fn destination_addresses_are_the_workloads_own() {
    for (prefix, v4, v6) in [
        ("10.9.0.0/16", true, false),
        ("10.8.0.0/16", false, false),
        ("fd09::/16", false, true),
        ("::/0", false, true),
        ("0.0.0.0/0", true, false),
    ] {
        let list = vec![prefix.parse().unwrap()];
        let yes = Match {
            destination_ips: list.clone(),
            ..Match::default()
        };
        let not = Match {
            not_destination_ips: list,
            ..Match::default()
        };
        for (source, expected) in [("192.0.2.1", v4), ("2001:db8::1", v6)] {
            let c = from(None, source, 80);
            assert_eq!(
                matches(only(yes.clone()), &c),
                expected,
                "{prefix} {source}"
            );
            assert_eq!(
                matches(only(not.clone()), &c),
                !expected,
                "{prefix} {source}"
            );
        }
    }
}

#[test]
fn ports_match_exactly_at_both_ends_of_the_range() {
    for (list, port, expected) in [
        (vec![0], 0, true),
        (vec![65535], 65535, true),
        (vec![65535], 0, false),
        (vec![80, 443], 443, true),
        (vec![80, 443], 8080, false),
    ] {
        let not = Match {
            not_destination_ports: list.clone(),
            ..Match::default()
        };
        let c = from(None, "10.1.0.1", port);
        assert_eq!(matches(only(ports(&list)), &c), expected, "{list:?} {port}");
        assert_eq!(matches(only(not), &c), !expected, "not {list:?} {port}");
    }
}

#[test]
fn strict_refuses_plaintext_and_only_plaintext() {
    let cart = peer(CART);
    let everyone = policy("everyone", Action::Allow, vec![rule(vec![])]);
    let strict = WorkloadPolicies {
        mode: Mode::Strict,
        ..applied(vec![everyone.clone()])
    };
    let permissive = applied(vec![everyone]);

    let plaintext = judge(&strict, &from(None, "10.1.0.1", 80));
    assert_eq!(
        (plaintext.allows(), plaintext.reason),
        (false, Reason::PlaintextRefused)
    );
    assert!(judge(&strict, &from(Some(&cart), "10.1.0.1", 80)).allows());
    assert!(judge(&permissive, &from(None, "10.1.0.1", 80)).allows());
}

#[test]
fn dry_run_policies_are_reported_and_not_enforced() {
    let cart = peer(CART);
    let c = from(Some(&cart), "10.1.0.1", 80);
    for (action, would) in [
        (Action::Deny, Reason::Denied),
        (Action::Allow, Reason::NotAllowed),
    ] {
        let rules = if action == Action::Deny {
            vec![rule(vec![])]
        } else {
            vec![]
        };
        let mut trial = policy("trial", action, rules);
        trial.dry_run = true;
        let policies = applied(vec![trial.clone()]);
        assert_eq!(judge(&policies, &c).reason, Reason::NoAllowPolicy);
        assert_eq!(evaluate_with_dry_run(&policies, &c).unwrap().reason, would);

        trial.dry_run = false;
        let enforced = applied(vec![trial]);
        assert_eq!(judge(&enforced, &c).reason, would);
        assert_eq!(evaluate_with_dry_run(&enforced, &c), None);
    }
}

#[test]
fn dry_run_allow_adds_nothing_to_what_is_allowed() {
    let c = from(None, "10.1.0.1", 80);
    let nobody = policy("nobody", Action::Allow, vec![]);
    let mut everyone = policy("everyone", Action::Allow, vec![rule(vec![])]);
    everyone.dry_run = true;
    let policies = applied(vec![everyone, nobody]);
    assert_eq!(judge(&policies, &c).reason, Reason::NotAllowed);
    let would = evaluate_with_dry_run(&policies, &c).unwrap();
    assert_eq!(would.policy, Some(PolicyName::new("shop", "everyone")));
}

#[test]
fn fields_of_a_match_are_anded_and_values_of_a_field_ored() {
    let (cart, pay) = (peer(CART), peer("spiffe://td/ns/shop/sa/pay"));
    let m = || Match {
        namespaces: strings(&["other", "shop"]),
        principals: strings(&["td/ns/shop/sa/cart", "td/ns/shop/sa/p*"]),
        source_ips: vec!["10.1.0.0/16".parse().unwrap(), "fd01::/16".parse().unwrap()],
        not_source_ips: vec!["10.1.9.0/24".parse().unwrap()],
        destination_ports: vec![80, 443],
        ..Match::default()
    };
    for (peer, source, port, expected) in [
        (Some(&cart), "10.1.0.1", 80, true),
        (Some(&pay), "fd01::1", 443, true),
        (Some(&pay), "10.2.0.1", 443, false),
        (Some(&pay), "10.1.9.1", 443, false),
        (Some(&cart), "10.1.0.1", 81, false),
        (
            Some(&self::peer("spiffe://td/ns/shop/sa/x")),
            "10.1.0.1",
            80,
            false,
        ),
        (
            Some(&self::peer("spiffe://td/vm/pay")),
            "10.1.0.1",
            80,
            false,
        ),
        (None, "10.1.0.1", 80, false),
    ] {
        let c = from(peer, source, port);
        assert_eq!(matches(only(m()), &c), expected, "{peer:?} {source} {port}");
    }
}

#[test]
fn negative_list_excludes_what_the_positive_one_has() {
    let c = from(None, "10.1.2.3", 80);
    for (yes, not, expected) in [
        ("10.0.0.0/8", "10.1.2.3", false),
        ("10.1.2.3", "10.0.0.0/8", false),
        ("10.0.0.0/8", "10.1.2.4", true),
        ("10.1.2.3", "10.1.2.3", false),
    ] {
        let m = Match {
            source_ips: vec![yes.parse().unwrap()],
            not_source_ips: vec![not.parse().unwrap()],
            ..Match::default()
        };
        assert_eq!(matches(only(m), &c), expected, "{yes} not {not}");
    }
    let m = Match {
        destination_ports: vec![80, 81],
        not_destination_ports: vec![80],
        ..Match::default()
    };
    assert!(!matches(only(m.clone()), &c));
    assert!(matches(only(m), &from(None, "10.1.2.3", 81)));
}
