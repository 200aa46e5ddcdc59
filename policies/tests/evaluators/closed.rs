//! What closes a workload: nothing that cannot be understood is skipped.

use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU32;

use ringfence_bpf_common::{
    Addr, MAX_TERMS, Query, SET_POLICY_NOT_RECEIVED, SET_UNREPRESENTABLE, authorize,
};
use ringfence_policies::{
    Action, Cidr, Clause, CompiledSet, Connection, MAX_COMPARISONS, MAX_SOURCES, MAX_VALUES, Match,
    Peer, PolicyStore, Problem, Reason, RejectedPolicy, Rule, STATIC_STRICT, Scope, Tables,
    WorkloadAddresses, WorkloadPolicies, compile, evaluate,
};

use crate::harness::{
    Kernel, POD4, addresses, applied, judge, kernel_decision, peer, policy, rule,
};

fn to_port_80(peer: Option<&Peer>) -> Connection<'_> {
    let source: IpAddr = "10.1.0.1".parse().unwrap();
    Connection {
        peer,
        source,
        destination: POD4.parse().unwrap(),
        port: 80,
    }
}

fn port_match(port: u16) -> Match {
    Match {
        destination_ports: vec![port],
        ..Match::default()
    }
}

#[test]
fn policy_not_received_refuses_until_it_arrives() {
    let cart = peer("spiffe://td/ns/shop/sa/cart");
    let mut store = PolicyStore::new("istio-system");
    let late = store.applicable("shop", ["shop/late"]);
    for peer in [Some(&cart), None] {
        let decision = judge(&late, &to_port_80(peer)).reason;
        assert_eq!(decision, Reason::PolicyNotReceived);
    }
    let compiled = compile(&late, addresses());
    assert_eq!(
        compiled.flags & SET_POLICY_NOT_RECEIVED,
        SET_POLICY_NOT_RECEIVED
    );
    assert_eq!(
        compiled.problems,
        [Problem::NotReceived("shop/late".into())]
    );

    let mut arrived = policy("late", Action::Allow, vec![rule(vec![])]);
    arrived.scope = Scope::WorkloadSelector;
    store.insert(arrived);
    let now = store.applicable("shop", ["shop/late"]);
    assert_eq!(
        judge(&now, &to_port_80(Some(&cart))).reason,
        Reason::Allowed
    );
    assert!(compile(&now, addresses()).problems.is_empty());
}

#[test]
fn static_strict_policy_works_before_and_after_it_arrives() {
    let cart = peer("spiffe://td/ns/shop/sa/cart");
    let named = [format!("istio-system/{STATIC_STRICT}")];
    let mut store = PolicyStore::new("istio-system");
    for _ in 0..2 {
        let policies = store.applicable("shop", &named);
        assert_eq!(
            judge(&policies, &to_port_80(None)).reason,
            Reason::PlaintextRefused
        );
        assert!(judge(&policies, &to_port_80(Some(&cart))).allows());
        // As Istiod sends it: DENY whoever has no principal.
        let no_principal = Match {
            not_principals: vec!["*".parse().unwrap()],
            ..Match::default()
        };
        let mut sent = policy(
            STATIC_STRICT,
            Action::Deny,
            vec![rule(vec![vec![no_principal]])],
        );
        sent.name.namespace = "istio-system".into();
        sent.scope = Scope::WorkloadSelector;
        store.insert(sent);
    }
}

#[test]
fn policy_with_a_bad_value_closes_its_workloads_with_the_reason() {
    let mut store = PolicyStore::new("istio-system");
    let bad = policy("bad", Action::Deny, vec![]);
    let error = Cidr::from_bytes(&[10, 0, 0], 8)
        .unwrap_err()
        .at(&bad.name, "rules[0].clauses[0].matches[0].source_ips[0]");
    store.insert_rejected(RejectedPolicy {
        name: bad.name,
        scope: Some(Scope::Namespace),
        dry_run: false,
        error,
    });
    let closed = store.applicable("shop", [] as [&str; 0]);
    assert_eq!(
        judge_reason(&closed),
        (Reason::Unrepresentable, Reason::Unrepresentable)
    );
    let compiled = compile(&closed, addresses());
    assert_eq!(
        compiled.problems[0].to_string(),
        "policy shop/bad: rules[0].clauses[0].matches[0].source_ips[0]: \
         an address has 4 or 16 bytes, not 3"
    );
    let elsewhere = store.applicable("other", [] as [&str; 0]);
    assert!(judge(&elsewhere, &to_port_80(None)).allows());
}

fn judge_reason(policies: &WorkloadPolicies) -> (Reason, Reason) {
    let c = to_port_80(None);
    let kernel = kernel_decision(&compile(policies, addresses()), &c);
    (
        ringfence_policies::evaluate(policies, &c).reason,
        kernel.reason,
    )
}

#[test]
fn set_is_full_at_the_limit_and_closed_beyond_it() {
    let rules = |n: usize| {
        (0..n)
            .map(|i| rule(vec![vec![port_match(i as u16)]]))
            .collect()
    };
    let full: Vec<Rule> = rules(MAX_TERMS);
    let at_limit = applied(vec![policy("full", Action::Deny, full.clone())]);
    let compiled = compile(&at_limit, addresses());
    assert_eq!(
        (compiled.terms.len(), compiled.problems.len()),
        (MAX_TERMS, 0)
    );
    let mut kernel = Kernel::of(&compiled);
    let mut at = |port| {
        kernel.decision(&Connection {
            port,
            ..to_port_80(None)
        })
    };
    for port in [0, 63, 64, 255, 256, 4095, 4096, 16_383] {
        assert_eq!(at(port).rule, Some(usize::from(port)));
    }
    assert!(at(16_384).allows());

    let beyond = applied(vec![
        policy("full", Action::Deny, full),
        policy("one-more", Action::Allow, vec![rule(vec![])]),
    ]);
    let compiled = compile(&beyond, addresses());
    assert_eq!(compiled.flags & SET_UNREPRESENTABLE, SET_UNREPRESENTABLE);
    assert!(
        compiled.problems[0]
            .to_string()
            .starts_with("policy shop/one-more ")
    );
    denies_everything(&compiled);
}

/// Nothing of the policies is in the tables of a set that has a problem.
fn denies_everything(compiled: &CompiledSet) {
    assert!(compiled.terms.is_empty() && compiled.sources.is_empty() && compiled.ports.is_empty());
    let mut kernel = Kernel::of(compiled);
    let cart = peer("spiffe://td/ns/shop/sa/cart");
    for peer in [Some(&cart), None] {
        let decision = kernel.decision(&to_port_80(peer));
        assert_eq!(decision.reason, Reason::Unrepresentable);
    }
}

/// Two fields of different dimensions.
fn mixed_match(i: u16) -> Match {
    Match {
        principals: vec![format!("td/ns/shop/sa/{i}").parse().unwrap()],
        ..port_match(i)
    }
}

#[test]
fn exponential_rule_is_refused_without_being_built() {
    let clause = Clause {
        matches: (0..10).map(mixed_match).collect(),
    };
    let exponential = Rule {
        clauses: vec![clause.clone(); 60],
    };
    let compiled = compile(
        &applied(vec![policy("p", Action::Deny, vec![exponential])]),
        addresses(),
    );
    assert!(matches!(
        compiled.problems[..],
        [Problem::TooManyTerms {
            limit: MAX_TERMS,
            ..
        }]
    ));
    denies_everything(&compiled);

    // A clause that can never hold empties the product, however large the others are.
    let mut clauses = vec![clause; 60];
    clauses.push(Clause {
        matches: vec![Match::default()],
    });
    let inert = applied(vec![policy("p", Action::Deny, vec![Rule { clauses }])]);
    assert!(judge(&inert, &to_port_80(None)).allows());
}

#[test]
fn clauses_about_one_dimension_are_not_multiplied_out() {
    let clause = Clause {
        matches: (0..10).map(port_match).collect(),
    };
    let not_five = Clause {
        matches: vec![Match {
            not_destination_ports: vec![5],
            ..Match::default()
        }],
    };
    let mut clauses = vec![clause; 60];
    clauses.push(not_five);
    let long = applied(vec![policy("p", Action::Deny, vec![Rule { clauses }])]);
    assert_eq!(compile(&long, addresses()).terms.len(), 1);
    for (port, denied) in [(0, true), (9, true), (5, false), (10, false)] {
        let attempt = Connection {
            port,
            ..to_port_80(None)
        };
        assert_eq!(!judge(&long, &attempt).allows(), denied, "{port}");
    }
}

fn ipv4_hosts(n: u32) -> Vec<Cidr> {
    (0..n)
        .map(|i| Cidr::new(Ipv4Addr::from_bits(0x0b00_0000 + 2 * i).into(), 32).unwrap())
        .collect()
}

#[test]
fn ten_thousand_prefixes_and_two_thousand_policies_fit() {
    let listed = Match {
        source_ips: ipv4_hosts(10_000),
        ..Match::default()
    };
    let mut policies = vec![policy(
        "0-listed",
        Action::Deny,
        vec![rule(vec![vec![listed]])],
    )];
    policies.extend((0..1999u16).map(|i| {
        let rules = vec![rule(vec![vec![mixed_match(i)]])];
        policy(&format!("p{i:04}"), Action::Allow, rules)
    }));
    let all = applied(policies);
    let compiled = compile(&all, addresses());
    assert_eq!((compiled.terms.len(), compiled.problems.len()), (2000, 0));
    assert_eq!(compiled.sources.len(), 10_000);
    assert_eq!(compiled.ports.len(), 1999);

    let cart = peer("spiffe://td/ns/shop/sa/80");
    let mut kernel = Kernel::of(&compiled);
    for (source, port, expected) in [
        ("11.0.0.0", 80, Reason::Denied),
        ("11.0.78.30", 80, Reason::Denied),
        ("11.0.0.1", 80, Reason::Allowed),
        ("11.0.78.32", 80, Reason::Allowed),
        ("11.0.0.1", 81, Reason::NotAllowed),
    ] {
        let attempt = Connection {
            source: source.parse().unwrap(),
            port,
            ..to_port_80(Some(&cart))
        };
        let decision = kernel.decision(&attempt);
        assert_eq!(decision.reason, expected, "{source} {port}");
        assert_eq!(decision, evaluate(&all, &attempt));
    }
}

#[test]
fn more_prefixes_than_a_set_holds_close_it() {
    for (n, fits) in [(MAX_SOURCES, true), (MAX_SOURCES + 1, false)] {
        let listed = Match {
            source_ips: ipv4_hosts(n as u32),
            ..Match::default()
        };
        let rules = vec![rule(vec![vec![listed]])];
        let compiled = compile(
            &applied(vec![policy("p", Action::Allow, rules)]),
            addresses(),
        );
        if fits {
            assert_eq!((compiled.sources.len(), compiled.problems.len()), (n, 0));
        } else {
            assert_eq!(
                compiled.problems,
                [Problem::TooManySources { limit: MAX_SOURCES }]
            );
            denies_everything(&compiled);
        }
    }
}

#[test]
fn rule_of_very_many_clauses_is_one_term_or_too_many_choices() {
    let any = || Clause {
        matches: vec![Match {
            destination_ports: (0..100).collect(),
            ..Match::default()
        }],
    };
    let mut rule = Rule {
        clauses: vec![any(); 100_000],
    };
    let one = applied(vec![policy("p", Action::Deny, vec![rule.clone()])]);
    let compiled = compile(&one, addresses());
    assert_eq!((compiled.terms.len(), compiled.problems.len()), (1, 0));
    assert!(!judge(&one, &to_port_80(None)).allows());

    // Thirty-two terms, each of which would list all clauses.
    rule.clauses.extend((0..5).map(|_| Clause {
        matches: vec![mixed_match(80), mixed_match(81)],
    }));
    let compiled = compile(
        &applied(vec![policy("p", Action::Deny, vec![rule])]),
        addresses(),
    );
    assert_eq!(
        compiled.problems,
        [Problem::TooManyValues { limit: MAX_VALUES }]
    );
    denies_everything(&compiled);
}

#[test]
fn lists_that_take_too_long_to_compare_close_the_set() {
    // Matches with a `not_` twin cannot be put together: each port is asked of each.
    let rules = |n: u16| {
        let matches = (0..n).map(|i| Match {
            destination_ports: vec![i],
            not_destination_ports: vec![i + 1],
            ..Match::default()
        });
        vec![rule(vec![matches.collect()])]
    };
    let compiled = compile(
        &applied(vec![policy("p", Action::Allow, rules(1000))]),
        addresses(),
    );
    assert_eq!(compiled.problems, []);
    let compiled = compile(
        &applied(vec![policy("p", Action::Allow, rules(8000))]),
        addresses(),
    );
    assert_eq!(
        compiled.problems,
        [Problem::TooManyComparisons {
            limit: MAX_COMPARISONS
        }]
    );
    denies_everything(&compiled);
}

#[test]
fn ten_thousand_sources_of_one_rule_are_one_term() {
    let by_account = (0..10_000u32).map(|i| Match {
        principals: vec![format!("td/ns/shop/sa/s{i}").parse().unwrap()],
        ..Match::default()
    });
    let by_address = ipv4_hosts(10_000).into_iter().map(|cidr| Match {
        source_ips: vec![cidr],
        ..Match::default()
    });
    let all = applied(vec![policy(
        "p",
        Action::Allow,
        vec![rule(vec![by_account.collect(), by_address.collect()])],
    )]);
    let compiled = compile(&all, addresses());
    assert_eq!((compiled.terms.len(), compiled.problems.len()), (1, 0));
    let last = peer("spiffe://td/ns/shop/sa/s9999");
    for (source, expected) in [("11.0.78.30", true), ("11.0.78.31", false)] {
        let attempt = Connection {
            source: source.parse().unwrap(),
            ..to_port_80(Some(&last))
        };
        assert_eq!(judge(&all, &attempt).allows(), expected, "{source}");
    }
}

#[test]
fn long_lists_that_multiply_out_close_the_set() {
    // 100 * 100 terms, each with two lists of 200 ports of its own.
    let clause = |shift: u16| Clause {
        matches: (0..100)
            .map(|i| Match {
                destination_ports: (0..200).map(|port| port + i + shift).collect(),
                ..mixed_match(i)
            })
            .collect(),
    };
    let repeated = Rule {
        clauses: vec![clause(0), clause(1000)],
    };
    let compiled = compile(
        &applied(vec![policy("p", Action::Allow, vec![repeated])]),
        addresses(),
    );
    assert_eq!(
        compiled.problems,
        [Problem::TooManyValues { limit: MAX_VALUES }]
    );
    denies_everything(&compiled);
}

#[test]
fn dry_run_policy_takes_no_room() {
    let rules: Vec<Rule> = vec![rule(vec![]); MAX_TERMS + 1];
    let mut trial = policy("trial", Action::Deny, rules);
    trial.dry_run = true;
    assert!(
        compile(&applied(vec![trial]), addresses())
            .problems
            .is_empty()
    );
}

#[test]
fn unknown_set_and_unprepared_identity_are_refused() {
    let compiled = compile(&WorkloadPolicies::default(), addresses());
    let mut tables = Tables::new();
    let set = NonZeroU32::MIN;
    assert!(tables.insert(set, &compiled));
    let query = Query {
        set: 1,
        identity: 5,
        source: Addr::v4([10, 1, 0, 1]),
        port: 80,
        destination_v4: true,
    };
    assert_eq!(authorize(&tables, &query).reason, Reason::UnknownIdentity);
    assert!(tables.insert_identity(
        set,
        &compiled,
        NonZeroU32::new(5).unwrap(),
        &peer("spiffe://td/a"),
    ));
    assert_eq!(authorize(&tables, &query).reason, Reason::NoAllowPolicy);
    assert_eq!(
        authorize(&tables, &Query { set: 2, ..query }).reason,
        Reason::NoPolicySet
    );
    assert_eq!(
        authorize(&tables, &Query { set: 0, ..query }).reason,
        Reason::NoPolicySet
    );
    tables.remove(set);
    assert_eq!(authorize(&tables, &query).reason, Reason::NoPolicySet);
}

#[test]
fn workload_without_an_address_of_the_family_is_judged_on_the_safe_side() {
    let by_destination = Match {
        destination_ips: vec!["fd00::/8".parse().unwrap()],
        ..Match::default()
    };
    let v4_only = WorkloadAddresses {
        v6: None,
        ..addresses()
    };
    let over_v6 = Connection {
        destination: "fd09::1".parse().unwrap(),
        ..to_port_80(None)
    };
    for (action, expected) in [
        (Action::Deny, Reason::Denied),
        (Action::Allow, Reason::NotAllowed),
    ] {
        let with = applied(vec![policy(
            "p",
            action,
            vec![rule(vec![vec![by_destination.clone()]])],
        )]);
        assert_eq!(
            kernel_decision(&compile(&with, v4_only), &over_v6).reason,
            expected
        );
    }
    // Without a destination condition nothing is in doubt.
    let any = applied(vec![policy("p", Action::Allow, vec![rule(vec![])])]);
    assert_eq!(
        kernel_decision(&compile(&any, v4_only), &over_v6).reason,
        Reason::Allowed
    );
}

#[test]
fn tables_hold_sets_apart() {
    let deny = applied(vec![policy(
        "p",
        Action::Deny,
        vec![rule(vec![vec![Match {
            source_ips: vec!["10.0.0.0/8".parse().unwrap()],
            ..port_match(80)
        }]])],
    )]);
    let (closed, open) = (
        compile(&deny, addresses()),
        compile(&WorkloadPolicies::default(), addresses()),
    );
    let (one, two) = (NonZeroU32::new(1).unwrap(), NonZeroU32::new(2).unwrap());
    let mut tables = Tables::new();
    assert!(tables.insert(one, &closed));
    assert!(tables.insert(two, &open));
    let query = Query {
        set: 1,
        identity: 0,
        source: Addr::v4([10, 1, 0, 1]),
        port: 80,
        destination_v4: true,
    };
    assert_eq!(authorize(&tables, &query).reason, Reason::Denied);
    assert!(authorize(&tables, &Query { set: 2, ..query }).allows());
    // Replaced: nothing of the old set answers.
    assert!(tables.insert(one, &open));
    assert!(authorize(&tables, &query).allows());
}
