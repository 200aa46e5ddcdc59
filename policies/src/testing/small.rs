//! Few policies with everything in them that a policy can have.

use std::fmt::Debug;
use std::net::IpAddr;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::{Attempt, Case, POD4, POD6, named};
use crate::{
    Action, Cidr, Clause, Match, Mode, Peer, Policy, PolicyName, Rule, Scope, ServiceAccountMatch,
    StringMatch, WorkloadPolicies,
};

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

/// Up to five policies of up to three rules.
pub fn small(attempts: usize) -> impl Strategy<Value = Case> {
    (policies(), vec(attempt(), attempts))
        .prop_map(|(policies, attempts)| Case { policies, attempts })
}

fn policies() -> impl Strategy<Value = WorkloadPolicies> {
    (
        vec(policy(), 0..6),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.02),
    )
        .prop_map(|(policies, strict, missing)| WorkloadPolicies {
            policies: named(policies),
            mode: if strict {
                Mode::Strict
            } else {
                Mode::Permissive
            },
            // Rare, because it hides everything else.
            missing: if missing {
                vec!["a/late".to_owned()]
            } else {
                vec![]
            },
            rejected: Vec::new(),
        })
}

/// A policy of up to three rules, sometimes a dry run.
fn policy() -> impl Strategy<Value = Policy> {
    (
        select(&[Action::Allow, Action::Deny][..]),
        prop::bool::weighted(0.15),
        vec(rule(), 0..4),
    )
        .prop_map(|(action, dry_run, rules)| Policy {
            name: PolicyName::new("a", "p"),
            scope: Scope::Namespace,
            action,
            dry_run,
            rules,
        })
}

/// A rule of up to three clauses: mixed ones, and ones about a single dimension.
pub fn rule() -> impl Strategy<Value = Rule> {
    let mixed = || vec(match_(), 0..4).prop_map(|matches| Clause { matches });
    let pieces = || vec(single(), 0..4).prop_map(|matches| Clause { matches });
    let clause = prop_oneof![3 => mixed(), 2 => pure_clause(), 1 => pieces()];
    vec(clause, 0..4).prop_map(|clauses| Rule { clauses })
}

/// A rule each clause of which is about a single dimension: one term, or none.
pub fn pure_rule() -> impl Strategy<Value = Rule> {
    vec(pure_clause(), 0..5).prop_map(|clauses| Rule { clauses })
}

fn pure_clause() -> impl Strategy<Value = Clause> {
    let any_of = |m: BoxedStrategy<Match>| vec(m, 0..4).prop_map(|matches| Clause { matches });
    prop_oneof![
        any_of(identity().boxed()),
        any_of(sources().boxed()),
        any_of(ports().boxed()),
        any_of(destinations().boxed()),
    ]
}

/// A match about one dimension, or empty.
fn single() -> impl Strategy<Value = Match> {
    prop_oneof![identity(), sources(), ports(), destinations()]
}

/// A match about any of them.
fn match_() -> impl Strategy<Value = Match> {
    (identity(), sources(), ports(), destinations()).prop_map(|(i, s, p, d)| Match {
        source_ips: s.source_ips,
        not_source_ips: s.not_source_ips,
        destination_ports: p.destination_ports,
        not_destination_ports: p.not_destination_ports,
        destination_ips: d.destination_ips,
        not_destination_ips: d.not_destination_ips,
        ..i
    })
}

fn identity() -> impl Strategy<Value = Match> {
    let names = || pattern(select(&NAMESPACES[..]).prop_map(str::to_owned));
    (
        field(names()),
        field(names()),
        field(pattern(principal())),
        field(pattern(principal())),
        field(account()),
        field(account()),
    )
        .prop_map(|fields| Match {
            namespaces: fields.0,
            not_namespaces: fields.1,
            principals: fields.2,
            not_principals: fields.3,
            service_accounts: fields.4,
            not_service_accounts: fields.5,
            ..Match::default()
        })
}

fn sources() -> impl Strategy<Value = Match> {
    (field(cidr()), field(cidr())).prop_map(|(source_ips, not_source_ips)| Match {
        source_ips,
        not_source_ips,
        ..Match::default()
    })
}

fn ports() -> impl Strategy<Value = Match> {
    let ports = || field(select(&PORTS[..]));
    (ports(), ports()).prop_map(|(destination_ports, not_destination_ports)| Match {
        destination_ports,
        not_destination_ports,
        ..Match::default()
    })
}

fn destinations() -> impl Strategy<Value = Match> {
    (field(cidr()), field(cidr())).prop_map(|(destination_ips, not_destination_ips)| Match {
        destination_ips,
        not_destination_ips,
        ..Match::default()
    })
}

/// Mostly absent, as in real matches: full ones never hold.
fn field<T: Debug + Clone>(value: impl Strategy<Value = T>) -> impl Strategy<Value = Vec<T>> {
    prop_oneof![4 => Just(Vec::new()), 1 => vec(value, 1..4)]
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

/// A peer, or plaintext; now and then one that has a second name.
fn peer() -> impl Strategy<Value = Option<Peer>> {
    let peer = (principal(), prop::bool::weighted(0.1)).prop_map(|(principal, aliases)| {
        let peer: Peer = format!("spiffe://{principal}").parse().unwrap();
        if aliases {
            peer.with_aliases(TRUST_DOMAINS).unwrap()
        } else {
            peer
        }
    });
    prop::option::weighted(0.8, peer)
}

/// A connection; the families of its addresses have nothing to do with each other.
pub fn attempt() -> impl Strategy<Value = Attempt> {
    (
        peer(),
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

/// To the workload's address of the same family.
pub fn attempt_from(peer: Option<Peer>, source: IpAddr, port: u16) -> Attempt {
    let destination = if source.to_canonical().is_ipv4() {
        POD4
    } else {
        POD6
    };
    Attempt {
        peer,
        source,
        destination: destination.parse().unwrap(),
        port,
    }
}
