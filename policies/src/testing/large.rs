//! More than a block of terms, and many nested prefixes. Values come from a seed: as
//! strategies of their own they would take longer to make than to judge.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::small::{attempt, attempt_from, rule};
use super::{Attempt, Case, named};
use crate::{
    Action, Cidr, Clause, Match, Peer, Policy, PolicyName, Rule, Scope, StringMatch,
    WorkloadPolicies,
};

/// Rules in a set: inside a block, just past one, past sixteen, and near all.
const RULES: [usize; 6] = [200, 257, 600, 1100, 4200, 12_000];

/// Hundreds to thousands of rules that match little, with some rules of [`rule`] strewn
/// in: one in a thousand or one in three.
pub fn many_terms(attempts: usize) -> impl Strategy<Value = Case> {
    let strewn = (vec(rule(), 1..12), select(&[1000, 100, 3][..]));
    let shape = (select(&RULES[..]), 1..400usize, 0..=10u64);
    let targets = vec((attempt(), any::<u64>()), attempts);
    (any::<u64>(), strewn, shape, targets).prop_map(
        |(seed, (pool, one_in), (rules, per_policy, denied), targets)| {
            let mut random = Random(seed);
            // A rule that multiplies out is many terms already.
            let rules = if one_in == 3 { rules.min(1100) } else { rules };
            let rules: Vec<Rule> = (0..rules)
                .map(|number| {
                    if random.below(one_in) == 0 {
                        pool[random.below(pool.len() as u64) as usize].clone()
                    } else {
                        narrow_rule(&mut random, number)
                    }
                })
                .collect();
            let policies = rules
                .chunks(per_policy)
                .map(|rules| policy(rules.to_vec(), random.below(10) < denied));
            let policies = applied(policies.collect());
            let attempts = targets
                .into_iter()
                .map(|(attempt, target)| aim(attempt, Random(target), rules.len() as u64))
                .collect();
            Case { policies, attempts }
        },
    )
}

/// Hundreds to thousands of prefixes, nested up to a host, in lists of several policies.
pub fn many_cidrs(attempts: usize) -> impl Strategy<Value = Case> {
    let shape = (select(&[100, 1000, 5000][..]), 1..20usize, any::<bool>());
    let targets = vec((attempt(), any::<u64>()), attempts);
    (any::<u64>(), shape, targets).prop_map(|(seed, (cidrs, lists, with_zero), targets)| {
        let mut random = Random(seed);
        let mut all: Vec<Cidr> = (0..cidrs).map(|_| random.cidr()).collect();
        if with_zero {
            all.extend(["::/0", "0.0.0.0/0"].map(|text| text.parse::<Cidr>().unwrap()));
        }
        let mut matches = vec![Match::default(); lists];
        for cidr in all {
            let m = &mut matches[random.below(lists as u64) as usize];
            if random.below(3) == 0 {
                m.not_source_ips.push(cidr);
            } else {
                m.source_ips.push(cidr);
            }
        }
        let policies = matches
            .into_iter()
            .map(|m| {
                let deny = random.below(2) == 0;
                policy(vec![one_match(m)], deny)
            })
            .collect();
        let attempts = targets
            .into_iter()
            .map(|(attempt, target)| {
                let source = Random(target).address();
                attempt_from(attempt.peer, source, attempt.port)
            })
            .collect();
        Case {
            policies: applied(policies),
            attempts,
        }
    })
}

/// A rule that only connections aimed at its number match.
fn narrow_rule(random: &mut Random, number: usize) -> Rule {
    let port = Match {
        destination_ports: vec![number as u16],
        ..Match::default()
    };
    let principal = Match {
        principals: vec![StringMatch::exact(format!("td/ns/n/sa/s{number}")).unwrap()],
        ..Match::default()
    };
    let source = Match {
        source_ips: vec![Cidr::new(host(number as u64), 32).unwrap()],
        ..Match::default()
    };
    match random.below(6) {
        0 => one_match(port),
        1 => one_match(principal),
        2 => one_match(source),
        3 => Rule {
            clauses: [port, principal]
                .map(|m| Clause { matches: vec![m] })
                .into(),
        },
        4 => one_match(Match {
            source_ips: source.source_ips,
            ..port
        }),
        _ => one_match(Match {
            not_destination_ports: port.destination_ports,
            ..principal
        }),
    }
}

/// A connection that one of the narrow rules may match, or one that misses it by a field.
fn aim(attempt: Attempt, mut random: Random, rules: u64) -> Attempt {
    let target = random.below(rules);
    let mut hits = || random.below(3) != 0;
    let port = if hits() { target as u16 } else { attempt.port };
    let source = if hits() { host(target) } else { attempt.source };
    let peer = if hits() {
        let id = format!("spiffe://td/ns/n/sa/s{target}");
        Some(id.parse::<Peer>().unwrap())
    } else {
        attempt.peer
    };
    attempt_from(peer, source, port)
}

fn host(number: u64) -> IpAddr {
    Ipv4Addr::from_bits(0x0a80_0000 | number as u32 & 0xffff).into()
}

fn one_match(m: Match) -> Rule {
    Rule {
        clauses: vec![Clause { matches: vec![m] }],
    }
}

fn policy(rules: Vec<Rule>, deny: bool) -> Policy {
    Policy {
        name: PolicyName::new("a", "p"),
        scope: Scope::Namespace,
        action: if deny { Action::Deny } else { Action::Allow },
        dry_run: false,
        rules,
    }
}

fn applied(policies: Vec<Policy>) -> WorkloadPolicies {
    WorkloadPolicies {
        policies: named(policies),
        ..WorkloadPolicies::default()
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Few distinct bytes, so that prefixes of them nest.
    fn address(&mut self) -> IpAddr {
        let mut byte = || [0, 1, 2, 255][self.below(4) as usize];
        let tail = [byte(), byte(), byte()];
        if self.below(3) == 0 {
            let mut octets = [0; 16];
            octets[0] = 0xfd;
            octets[7] = tail[0];
            octets[11] = tail[1];
            octets[15] = tail[2];
            Ipv6Addr::from(octets).into()
        } else {
            Ipv4Addr::new(10, tail[0], tail[1], tail[2]).into()
        }
    }

    fn cidr(&mut self) -> Cidr {
        let address = self.address();
        let bits = if address.is_ipv4() { 32 } else { 128 };
        // Short ones are rare: they hide the others.
        let length = bits - self.below(bits / 2 + 1).min(self.below(bits + 1));
        Cidr::new(address, length as u32).unwrap()
    }
}
