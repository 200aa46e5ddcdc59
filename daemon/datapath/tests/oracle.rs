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
    num::NonZeroU32,
    time::{Duration, Instant},
};

use proptest::{
    strategy::Strategy,
    test_runner::{Config, TestCaseError, TestError, TestRunner},
};
use ringfence_bpf_common::{Addr, IDENTITY_NONE, Query, authorize};
use ringfence_datapath::{Datapath, DatapathError};
use ringfence_policies::{
    Peer, Tables, compile,
    testing::{Attempt, Case, addresses, case, expected},
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
    eprintln!(
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
    let fail = |what: String| -> Result<Agreed, _> { Err(TestCaseError::fail(what)) };
    let compiled = compile(&case.policies, addresses());
    let number = NonZeroU32::new(set).unwrap();
    let mut tables = Tables::default();
    if !tables.insert(number, &compiled) {
        return fail("no room in memory".into());
    }
    let mut identities: BTreeMap<&Peer, u32> = BTreeMap::new();
    let mut masks = vec![(IDENTITY_NONE, compiled.identity_mask(None))];
    for peer in case.attempts.iter().filter_map(|a| a.peer.as_ref()) {
        let next = identities.len() as u32 + 1;
        if *identities.entry(peer).or_insert(next) == next {
            masks.push((next, compiled.identity_mask(Some(peer))));
            let identity = NonZeroU32::new(next).unwrap();
            if !tables.insert_identity(number, &compiled, identity, peer) {
                return fail("no room in memory".into());
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
        Err(DatapathError::Full { .. }) => {
            datapath.remove_set(set).unwrap();
            return Ok(Agreed::NoRoom);
        }
        Err(error) => return fail(format!("not installed: {error}")),
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
    let queries: Vec<Query> = case.attempts.iter().map(query).collect();
    let verdicts = datapath.judge(&queries).unwrap();
    datapath.remove_set(set).unwrap();
    for ((attempt, query), kernel) in case.attempts.iter().zip(&queries).zip(verdicts) {
        let memory = authorize(&tables, query);
        if memory != kernel {
            return fail(format!("kernel {kernel:?}, memory {memory:?}: {attempt:?}"));
        }
        let reference = expected(&case.policies, &compiled, attempt);
        let decision = compiled.decision(kernel);
        if decision != reference {
            return fail(format!(
                "kernel {decision:?}, reference {reference:?}: {attempt:?}"
            ));
        }
    }
    Ok(Agreed::All)
}
