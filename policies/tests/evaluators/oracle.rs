//! Differential test: reference and compiled tables on generated policies. The universes
//! are small and nested, so that values collide, cover and just miss each other.

use std::net::IpAddr;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use ringfence_bpf_common::SET_UNREPRESENTABLE;
use ringfence_policies::{
    Action, Cidr, Clause, Connection, Match, Mode, Peer, Policy, PolicyName, Reason, Rule, Scope,
    ServiceAccountMatch, StringMatch, WorkloadPolicies, compile, evaluate,
};

use crate::harness::{POD4, POD6, addresses, kernel_decision};

const NAMESPACES: [&str; 4] = ["a", "ab", "b", "ba"];
const ACCOUNTS: [&str; 3] = ["a", "x", "xa"];
const TRUST_DOMAINS: [&str; 2] = ["td", "td2"];
const PORTS: [u16; 5] = [0, 80, 81, 443, 65535];
const PREFIXES: [&str; 22] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.2.0/24",
    "10.1.2.2/31",
    "10.1.2.3/32",
    "10.9.0.0/16",
    "10.9.0.1/32",
    "128.0.0.0/1",
    "0.0.0.0/1",
    "10.1.2.128/25",
    "::/0",
    "::/1",
    "::/64",
    "::/80",
    "::/96",
    "::fffe:0:0/95",
    "fd00::/8",
    "fd01::/16",
    "fd01::1/128",
    "fd09::/16",
    "::10.1.2.3/128",
];
const SOURCES: [&str; 16] = [
    "10.0.0.1",
    "10.1.0.1",
    "10.1.2.2",
    "10.1.2.3",
    "10.1.2.4",
    "10.1.2.200",
    "10.9.0.1",
    "192.0.2.1",
    "::ffff:10.1.2.3",
    "::ffff:192.0.2.1",
    "::10.1.2.3",
    "::1",
    "fd00::1",
    "fd01::1",
    "fd01::2",
    "2001:db8::1",
];

#[derive(Clone, Debug)]
struct Attempt {
    peer: Option<Peer>,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
}

fn principal() -> impl Strategy<Value = String> {
    let kubernetes = (
        select(&TRUST_DOMAINS[..]),
        select(&NAMESPACES[..]),
        select(&ACCOUNTS[..]),
    )
        .prop_map(|(td, ns, sa)| format!("{td}/ns/{ns}/sa/{sa}"));
    let other = (
        select(&TRUST_DOMAINS[..]),
        select(&["", "/vm", "/ns/a", "/ns/a/sa/a/x"][..]),
    )
        .prop_map(|(td, path)| format!("{td}{path}"));
    prop_oneof![6 => kubernetes, 1 => other]
}

/// Patterns that are likely to match one of `texts`, or to miss it narrowly.
fn pattern(texts: impl Strategy<Value = String>) -> impl Strategy<Value = StringMatch> {
    (texts, any::<prop::sample::Index>(), 0..8u8).prop_map(|(text, cut, kind)| {
        let cut = cut.index(text.len()) + 1;
        match kind {
            0 => StringMatch::Presence,
            1..=2 => StringMatch::prefix(&text[..cut]).unwrap(),
            3..=4 => StringMatch::suffix(&text[cut - 1..]).unwrap(),
            _ => StringMatch::exact(text).unwrap(),
        }
    })
}

fn account() -> impl Strategy<Value = ServiceAccountMatch> {
    (select(&NAMESPACES[..]), select(&ACCOUNTS[..]))
        .prop_map(|(ns, sa)| ServiceAccountMatch::new(ns, sa).unwrap())
}

fn cidr() -> impl Strategy<Value = Cidr> {
    let listed = select(&PREFIXES[..]).prop_map(|text| text.parse().unwrap());
    // Any length over the addresses that connections come from.
    let cut = (select(&SOURCES[..]), any::<u32>()).prop_filter_map("mapped", |(ip, n)| {
        let ip: IpAddr = ip.parse().unwrap();
        Cidr::new(ip, n % if ip.is_ipv4() { 33 } else { 129 }).ok()
    });
    prop_oneof![3 => listed, 1 => cut]
}

/// Mostly absent, as in real matches: full ones never hold.
fn field<T: std::fmt::Debug + Clone>(
    value: impl Strategy<Value = T>,
) -> impl Strategy<Value = Vec<T>> {
    (prop::bool::weighted(0.2), vec(value, 1..4))
        .prop_map(|(present, values)| if present { values } else { Vec::new() })
}

fn match_() -> impl Strategy<Value = Match> {
    let names = || pattern(select(&NAMESPACES[..]).prop_map(str::to_owned));
    let identity = (
        field(names()),
        field(names()),
        field(pattern(principal())),
        field(pattern(principal())),
        field(account()),
        field(account()),
    );
    let network = (
        field(cidr()),
        field(cidr()),
        field(cidr()),
        field(cidr()),
        field(select(&PORTS[..])),
        field(select(&PORTS[..])),
    );
    (identity, network).prop_map(|(i, n)| Match {
        namespaces: i.0,
        not_namespaces: i.1,
        principals: i.2,
        not_principals: i.3,
        service_accounts: i.4,
        not_service_accounts: i.5,
        source_ips: n.0,
        not_source_ips: n.1,
        destination_ips: n.2,
        not_destination_ips: n.3,
        destination_ports: n.4,
        not_destination_ports: n.5,
    })
}

fn rule() -> impl Strategy<Value = Rule> {
    let clause = vec(match_(), 0..4).prop_map(|matches| Clause { matches });
    vec(clause, 0..4).prop_map(|clauses| Rule { clauses })
}

fn policy() -> impl Strategy<Value = Policy> {
    (
        select(&[Action::Allow, Action::Deny][..]),
        prop::bool::weighted(0.15),
        vec(rule(), 0..4),
    )
        .prop_map(|(action, dry_run, rules)| Policy {
            name: PolicyName::new("a", "set below"),
            scope: Scope::Namespace,
            action,
            dry_run,
            rules,
        })
}

fn policies() -> impl Strategy<Value = WorkloadPolicies> {
    (
        vec(policy(), 0..6),
        prop::bool::weighted(0.2),
        subsequence(vec!["a/late"], 0..=1),
    )
        .prop_map(|(policies, strict, missing)| WorkloadPolicies {
            policies: policies
                .into_iter()
                .enumerate()
                .map(|(i, mut policy)| {
                    policy.name.name = format!("p{i}");
                    Arc::new(policy)
                })
                .collect(),
            mode: if strict {
                Mode::Strict
            } else {
                Mode::Permissive
            },
            // Rare, because it hides everything else.
            missing: if strict {
                missing.into_iter().map(str::to_owned).collect()
            } else {
                vec![]
            },
            rejected: Vec::new(),
        })
}

fn attempt() -> impl Strategy<Value = Attempt> {
    let peer = principal().prop_map(|p| format!("spiffe://{p}").parse::<Peer>().unwrap());
    (
        prop::option::weighted(0.8, peer),
        select(&SOURCES[..]),
        select(&[POD4, POD6][..]),
        prop_oneof![4 => select(&PORTS[..]), 1 => any::<u16>()],
    )
        .prop_map(|(peer, source, destination, port)| Attempt {
            peer,
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            port,
        })
}

fn agree(policies: &WorkloadPolicies, attempts: &[Attempt]) -> Result<(), TestCaseError> {
    let compiled = compile(policies, addresses());
    for Attempt {
        peer,
        source,
        destination,
        port,
    } in attempts
    {
        let connection = Connection {
            peer: peer.as_ref(),
            source: *source,
            destination: *destination,
            port: *port,
        };
        let kernel = kernel_decision(&compiled, &connection);
        if compiled.set.flags & SET_UNREPRESENTABLE != 0 {
            prop_assert_eq!(kernel.reason, Reason::Unrepresentable);
            continue;
        }
        let reference = evaluate(policies, &connection);
        prop_assert_eq!(reference, kernel, "{:?}", connection);
    }
    Ok(())
}

/// Policy sets per run; each is asked about 16 connections.
const CASES: u32 = 4096;

proptest! {
    #![proptest_config(ProptestConfig { cases: CASES, ..ProptestConfig::default() })]

    #[test]
    fn compiled_tables_decide_as_the_reference_does(
        policies in policies(),
        attempts in vec(attempt(), 16),
    ) {
        agree(&policies, &attempts)?;
    }

    /// One policy with one rule: most verdicts of the large sets are decided by few of
    /// their terms, here every condition counts.
    #[test]
    fn single_rule_decides_as_the_reference_does(
        action in select(&[Action::Allow, Action::Deny][..]),
        rule in rule(),
        attempts in vec(attempt(), 16),
    ) {
        let policy = Policy {
            name: PolicyName::new("a", "p"),
            scope: Scope::Namespace,
            action,
            dry_run: false,
            rules: vec![rule],
        };
        let policies = WorkloadPolicies { policies: vec![Arc::new(policy)], ..Default::default() };
        agree(&policies, &attempts)?;
    }
}
