//! The kernel against the reference: generated policies are compiled and put into the
//! maps, and the program that judges connections is asked about generated connections
//! (`BPF_PROG_RUN`). The reference evaluator, the same tables in memory and the kernel must
//! agree in every verdict, and in the policy and rule that decided.
//!
//! `RINGFENCE_ORACLE_PAIRS` sets how many pairs of policies and connection are judged.
//! Without it there are 100 000, or as many as a slow machine (a guest without KVM) does
//! in 45 seconds; the number is printed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    cell::Cell,
    collections::BTreeMap,
    net::Ipv4Addr,
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, Map, MapData};
use proptest::{
    strategy::Strategy,
    test_runner::{Config, TestCaseError, TestError, TestRunner},
};
use ringfence_bpf_common::{
    Addr, Block, IDENTITY_NONE, LAYOUT_VERSION, Query, SourceKey, SourceMatch, authorize,
};
use ringfence_datapath::{Datapath, DatapathError};
use ringfence_policies::{
    Action, Cidr, Clause, CompiledSet, Match, Peer, Policy, Rule, Scope, StringMatch, Tables,
    WorkloadPolicies, compile,
    testing::{Attempt, Case, POD4, POD6, addresses, case, expected},
};
use support::*;

/// Pairs of a run that is not told otherwise.
const PAIRS: usize = 100_000;
/// Connections that are judged by one workload's policies.
const ATTEMPTS: usize = 256;
const PATIENCE: Duration = Duration::from_secs(45);

#[test]
fn kernel_decides_as_the_reference_does() {
    if !can_run("kernel_decides_as_the_reference_does") {
        return;
    }
    let asked = std::env::var("RINGFENCE_ORACLE_PAIRS").ok();
    let wanted = asked
        .as_ref()
        .map_or(PAIRS, |number| number.parse().unwrap());
    let lab = Lab::bare();
    let mut runner = TestRunner::new(Config {
        failure_persistence: None,
        // A large case is slow to make smaller.
        max_shrink_time: 20_000,
        ..Config::default()
    });
    let strategy = case(ATTEMPTS);
    let begin = Instant::now();
    let (pairs, sets, too_large) = (Cell::new(0), Cell::new(0), Cell::new(0));
    while pairs.get() < wanted && (asked.is_some() || begin.elapsed() < PATIENCE) {
        let tree = strategy.new_tree(&mut runner).unwrap();
        let outcome = runner.run_one(tree, |case| {
            sets.set(sets.get() + 1);
            match agree(&lab.datapath, sets.get(), &case)? {
                Agreed::All => pairs.set(pairs.get() + case.attempts.len()),
                Agreed::NoRoom => too_large.set(too_large.get() + 1),
            }
            Ok(())
        });
        match outcome {
            Ok(_) => {}
            Err(TestError::Fail(why, case)) => panic!("{why}\nsmallest: {case:#?}"),
            Err(error) => panic!("{error}"),
        }
    }
    let (pairs, sets, too_large) = (pairs.get(), sets.get(), too_large.get());
    let cut = if pairs < wanted { ", CUT SHORT" } else { "" };
    // For `cargo xtask bench policy`.
    println!(
        "oracle: {pairs} of {wanted} pairs of {sets} policy sets, {too_large} of them too large for \
         the kernel's tables, in {:.1} s{cut}",
        begin.elapsed().as_secs_f64()
    );
    assert!(pairs > 0 && too_large * 2 <= sets);
    // Nothing was left behind.
    eventually("the sets are given back", || {
        lab.datapath.collect_sets().unwrap();
        lab.datapath.policy_usage().blocks == 0
    });
}

/// What was found of one workload.
enum Agreed {
    All,
    /// The set does not fit into the kernel's tables, beside those that still wait for
    /// their grace period: the agent closes such a workload.
    NoRoom,
}

/// Whether all three agree about one workload.
fn agree(datapath: &Datapath, set: u32, case: &Case) -> Result<Agreed, TestCaseError> {
    let Some(installed) = Installed::new(datapath, set, case)? else {
        datapath.remove_set(set).unwrap();
        return Ok(Agreed::NoRoom);
    };
    let compared = installed.compare(datapath, case);
    datapath.remove_set(set).unwrap();
    compared.map(|()| Agreed::All)
}

/// A workload's policies in memory and in the kernel.
struct Installed {
    compiled: CompiledSet,
    tables: Tables,
    /// One for each connection of the case.
    queries: Vec<Query>,
}

impl Installed {
    /// `None`: not whole in the kernel, which has no room for it.
    fn new(datapath: &Datapath, set: u32, case: &Case) -> Result<Option<Self>, TestCaseError> {
        let fail = |what: &str| TestCaseError::fail(what.to_owned());
        let compiled = compile(&case.policies, addresses());
        let number = NonZeroU32::new(set).unwrap();
        let mut tables = Tables::default();
        if !tables.insert(number, &compiled) {
            return Err(fail("no room in memory"));
        }
        let mut identities: BTreeMap<&Peer, u32> = BTreeMap::new();
        let mut masks = vec![(IDENTITY_NONE, compiled.identity_mask(None))];
        for peer in case.attempts.iter().filter_map(|a| a.peer.as_ref()) {
            let next = identities.len() as u32 + 1;
            if *identities.entry(peer).or_insert(next) == next {
                masks.push((next, compiled.identity_mask(Some(peer))));
                let identity = NonZeroU32::new(next).unwrap();
                if !tables.insert_identity(number, &compiled, identity, peer) {
                    return Err(fail("no room in memory"));
                }
            }
        }
        // Some are known beforehand, the others come later.
        let (early, late) = masks.split_at(masks.len().div_ceil(2));
        let installed = datapath.install_set(set, &compiled, early).and_then(|()| {
            late.iter()
                .try_for_each(|(n, mask)| datapath.bind_identity(set, *n, mask))
        });
        match installed {
            Ok(()) => {}
            Err(DatapathError::Full { .. }) => return Ok(None),
            Err(error) => return Err(fail(&format!("not installed: {error}"))),
        }
        let query = |attempt: &Attempt| Query {
            set,
            identity: attempt
                .peer
                .as_ref()
                .map_or(IDENTITY_NONE, |p| identities[p]),
            source: Addr::from(attempt.source),
            port: attempt.port,
            destination_v4: attempt.destination.is_ipv4(),
        };
        let queries = case.attempts.iter().map(query).collect();
        Ok(Some(Installed {
            compiled,
            tables,
            queries,
        }))
    }

    fn compare(&self, datapath: &Datapath, case: &Case) -> Result<(), TestCaseError> {
        let fail = |what: String| Err(TestCaseError::fail(what));
        let verdicts = datapath.judge(&self.queries).unwrap();
        for ((attempt, query), kernel) in case.attempts.iter().zip(&self.queries).zip(verdicts) {
            let memory = authorize(&self.tables, query);
            if memory != kernel {
                return fail(format!("kernel {kernel:?}, memory {memory:?}: {attempt:?}"));
            }
            let reference = expected(&case.policies, &self.compiled, attempt);
            let decision = self.compiled.decision(kernel);
            if decision != reference {
                return fail(format!(
                    "kernel {decision:?}, reference {reference:?}: {attempt:?}"
                ));
            }
        }
        Ok(())
    }
}

/// The limits that are promised, at once: 2 000 policies of one workload, 10 000 prefixes,
/// and nearly all the terms that a set holds, most of which hold for most addresses.
#[test]
fn largest_set_fits_twice_and_is_judged_as_the_reference_does() {
    if !can_run("largest_set_fits_twice_and_is_judged_as_the_reference_does") {
        return;
    }
    const PREFIXES: u32 = 10_000;
    let host = |number: u32| Ipv4Addr::from_bits(0x0a00_0000 | number << 8 | 17).into();
    let rule = |number: u32| {
        let block = || Cidr::new(host(number), [24, 28, 32][number as usize % 3]).unwrap();
        one_match(Match {
            source_ips: (number < PREFIXES).then(block).into_iter().collect(),
            destination_ports: vec![8000 + (number % 100) as u16],
            ..Match::default()
        })
    };
    let rules: Vec<Rule> = (0..16_000).map(rule).collect();
    let policies = rules.chunks(8).enumerate().map(|(number, rules)| {
        let action = [Action::Allow, Action::Deny][usize::from(number % 50 == 7)];
        policy(number, action, rules.to_vec())
    });
    // No rule has the port, or its rules begin behind the prefixes or with one of them.
    let attempts = (0..256).map(|number| Attempt {
        peer: None,
        source: host(number * 37 % (PREFIXES + 100)),
        destination: POD4.parse().unwrap(),
        port: 7990 + (number * 37 % 111) as u16,
    });
    let case = Case {
        policies: applied(policies.collect()),
        attempts: attempts.collect(),
    };
    let lab = Lab::bare();
    let installed = Installed::new(&lab.datapath, 1, &case).unwrap();
    let installed = installed.expect("there is room");
    let compiled = &installed.compiled;
    assert_eq!(compiled.terms.len(), 16_000);
    let plaintext = [(IDENTITY_NONE, compiled.identity_mask(None))];
    lab.datapath.install_set(2, compiled, &plaintext).unwrap();
    installed.compare(&lab.datapath, &case).unwrap();
    let (usage, room) = (lab.datapath.policy_usage(), lab.datapath.policy_room());
    eprintln!("two of the largest sets: {usage:?} of {room:?}");
}

/// Every bit that matters and every entry, changed in the kernel alone: what compares the
/// evaluators has to see each of them.
#[test]
fn planted_difference_is_found() {
    if !can_run("planted_difference_is_found") {
        return;
    }
    let case = distinct_case();
    let lab = Lab::bare();
    let installed = Installed::new(&lab.datapath, 1, &case).unwrap().unwrap();
    let agrees = || installed.compare(&lab.datapath, &case).is_ok();
    assert!(agrees(), "nothing is planted yet");
    let mut planted = 0;
    let mut found = |what: String| {
        assert!(!agrees(), "not found: {what}");
        planted += 1;
    };

    let map = |name| {
        let layout = format!("v{LAYOUT_VERSION}");
        MapData::from_pin(lab.pin_dir().join(layout).join(name)).unwrap()
    };
    let blocks = Map::Array(map("POLICY_BLOCKS"));
    let mut blocks: Array<_, Block> = blocks.try_into().unwrap();
    for index in 0..lab.datapath.policy_usage().blocks {
        let intact = blocks.get(&index, 0).unwrap();
        for term in 0..installed.compiled.terms.len() {
            let mut other = intact;
            other.0[term / 64] ^= 1 << (term % 64);
            blocks.set(index, other, 0).unwrap();
            found(format!("term {term} of block {index}"));
        }
        blocks.set(index, intact, 0).unwrap();
    }

    let sources = Map::HashMap(map("POLICY_SOURCES"));
    let mut sources: HashMap<_, SourceKey, SourceMatch> = sources.try_into().unwrap();
    let keys: Vec<SourceKey> = sources.keys().map(Result::unwrap).collect();
    for key in &keys {
        let intact = sources.get(key, 0).unwrap();
        sources.remove(key).unwrap();
        found(format!("{key:?} is missing"));
        let longer = SourceKey {
            length: key.length + 1,
            ..*key
        };
        sources.insert(longer, intact, 0).unwrap();
        found(format!("{key:?} is another prefix"));
        sources.remove(&longer).unwrap();
        if intact.lengths != 0 {
            let last = SourceMatch {
                lengths: 0,
                ..intact
            };
            sources.insert(key, last, 0).unwrap();
            found(format!("the search ends with {key:?}"));
        }
        let never = SourceMatch {
            lengths: u64::MAX,
            ..intact
        };
        sources.insert(key, never, 0).unwrap();
        found(format!("the search does not end behind {key:?}"));
        sources.insert(key, intact, 0).unwrap();
    }
    assert!(agrees(), "everything is as it was");
    // Six prefixes of policies and a marker.
    assert_eq!(keys.len(), 7, "{keys:?}");
    eprintln!("oracle: {planted} planted differences, all found");
}

/// Policies and connections such that each term and each prefix alone decides something.
fn distinct_case() -> Case {
    // Longest first: of two terms that match, the lower one decides.
    let prefixes = [
        "10.1.2.3/32",
        "10.1.2.0/24",
        "10.1.0.0/16",
        "10.9.9.9/32",
        "fd01::1/128",
        "fd01::/16",
    ];
    let mut policies: Vec<Policy> = prefixes
        .iter()
        .enumerate()
        .map(|(number, prefix)| {
            let rule = one_match(Match {
                source_ips: vec![prefix.parse().unwrap()],
                destination_ports: vec![8000 + number as u16],
                ..Match::default()
            });
            policy(number, Action::Allow, vec![rule])
        })
        .collect();
    let client = one_match(Match {
        principals: vec![StringMatch::exact("td/ns/n/sa/client").unwrap()],
        ..Match::default()
    });
    policies.push(policy(prefixes.len(), Action::Allow, vec![client]));
    let sources = [
        "10.1.9.9", "10.1.2.9", "10.1.2.3", "10.9.9.8", "10.9.9.9", "10.2.0.1", "fd01::2",
        "fd01::1", "fd02::1",
    ];
    let mut attempts = Vec::new();
    for source in sources {
        for port in 8000..8007 {
            for peer in [None, Some("spiffe://td/ns/n/sa/client")] {
                for destination in [POD4, POD6] {
                    attempts.push(Attempt {
                        peer: peer.map(|peer| peer.parse().unwrap()),
                        source: source.parse().unwrap(),
                        destination: destination.parse().unwrap(),
                        port,
                    });
                }
            }
        }
    }
    Case {
        policies: applied(policies),
        attempts,
    }
}

fn one_match(one: Match) -> Rule {
    Rule {
        clauses: vec![Clause { matches: vec![one] }],
    }
}

fn policy(number: usize, action: Action, rules: Vec<Rule>) -> Policy {
    Policy {
        name: format!("a/p{number:05}").parse().unwrap(),
        scope: Scope::Namespace,
        action,
        dry_run: false,
        rules,
    }
}

fn applied(policies: Vec<Policy>) -> WorkloadPolicies {
    WorkloadPolicies {
        policies: policies.into_iter().map(Arc::new).collect(),
        ..WorkloadPolicies::default()
    }
}
