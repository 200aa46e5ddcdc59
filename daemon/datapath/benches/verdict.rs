//! What a verdict costs in the kernel, however many policies there are, and what policies
//! cost in time and memory. Prints one JSON object; `cargo xtask bench policy` shows it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd, AsRawFd},
    sync::Arc,
    time::Instant,
};

use aya::maps::MapData;
use ringfence_bpf_common::{Addr, IDENTITY_NONE, LAYOUT_VERSION, Query, Reason};
use ringfence_policies::{
    Action, Cidr, Clause, CompiledSet, Match, Peer, Policy, Rule, Scope, StringMatch,
    WorkloadAddresses, WorkloadPolicies, compile,
};
use serde_json::{Value, json};
use support::*;

/// Runs of a batch of 64 verdicts, each time one is measured.
const RUNS: u32 = 2_000;
const NAMESPACES: usize = 100;

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let rounds = if quick { 3 } else { 15 };
    if !can_run("the benchmark of verdicts") {
        std::process::exit(1);
    }
    let spread = |kind: fn(usize, usize) -> Policy| {
        [1, 10, 100, 1_000, 10_000].map(|policies| {
            let namespaces = policies.min(NAMESPACES);
            let sets = (0..namespaces).map(|n| workload(n, policies / namespaces, kind));
            verdicts(policies, sets.collect(), rounds)
        })
    };
    let one = |kind: fn(usize, usize) -> Policy| {
        [1, 10, 100, 1_000, 2_000]
            .map(|policies| verdicts(policies, vec![workload(0, policies, kind)], rounds))
    };
    let costs = [
        costs(1_000, ordinary, rounds),
        costs(2_000, ordinary, rounds),
        costs(2_000, with_five_blocks, rounds),
    ];
    let report = json!({
        "rounds": rounds,
        "spread": spread(plain),
        "spread_with_blocks": spread(ordinary),
        "spread_with_lengths": spread(of_every_length),
        "one_workload": one(plain),
        "one_workload_with_blocks": one(ordinary),
        "one_workload_with_lengths": one(of_every_length),
        "one_workload_worst": one(entangled),
        "costs": costs,
    });
    println!("{report}");
}

/// An ALLOW policy as people write them: one client, one port, sometimes an address block.
fn ordinary(namespace: usize, k: usize) -> Policy {
    let (source, port) = way(k);
    let block = || Cidr::new(source.into(), 24).unwrap();
    policy(
        namespace,
        k,
        Match {
            principals: vec![StringMatch::exact(client(namespace, k)).unwrap()],
            destination_ports: vec![port],
            source_ips: k.is_multiple_of(4).then(block).into_iter().collect(),
            ..Match::default()
        },
    )
}

/// The same with blocks of every length from /8 to /32 in turn, one inside the other.
fn of_every_length(namespace: usize, k: usize) -> Policy {
    let (source, port) = way(k);
    let block = || Cidr::new(source.into(), 8 + k as u32 / 4 % 25).unwrap();
    policy(
        namespace,
        k,
        Match {
            principals: vec![StringMatch::exact(client(namespace, k)).unwrap()],
            destination_ports: vec![port],
            source_ips: k.is_multiple_of(4).then(block).into_iter().collect(),
            ..Match::default()
        },
    )
}

/// The same with five address blocks in every policy.
fn with_five_blocks(namespace: usize, k: usize) -> Policy {
    let block = |n: usize| {
        let number = 5 * k + n;
        Cidr::new([10, (number / 256) as u8, number as u8, 0].into(), 24).unwrap()
    };
    policy(
        namespace,
        k,
        Match {
            principals: vec![StringMatch::exact(client(namespace, k)).unwrap()],
            destination_ports: vec![way(k).1],
            source_ips: (0..5).map(block).collect(),
            ..Match::default()
        },
    )
}

/// The same without address blocks.
fn plain(namespace: usize, k: usize) -> Policy {
    policy(
        namespace,
        k,
        Match {
            principals: vec![StringMatch::exact(client(namespace, k)).unwrap()],
            destination_ports: vec![way(k).1],
            ..Match::default()
        },
    )
}

/// Where the client of policy `k` comes from, and to which port.
fn way(k: usize) -> ([u8; 4], u16) {
    ([10, (k / 256) as u8, k as u8, 1], 8000 + k as u16 % 16)
}

/// The worst there is: every dimension alone lets half of all terms through, together they
/// let none.
fn entangled(namespace: usize, k: usize) -> Policy {
    let block = ["10.0.0.0/8", "11.0.0.0/8"][k % 2];
    policy(
        namespace,
        k,
        Match {
            source_ips: vec![block.parse::<Cidr>().unwrap()],
            destination_ports: vec![[8001, 8000][k % 2]],
            ..Match::default()
        },
    )
}

fn policy(namespace: usize, k: usize, one: Match) -> Policy {
    Policy {
        name: format!("ns{namespace}/p{k:05}").parse().unwrap(),
        scope: Scope::Namespace,
        action: Action::Allow,
        dry_run: false,
        rules: vec![Rule {
            clauses: vec![Clause { matches: vec![one] }],
        }],
    }
}

fn client(namespace: usize, k: usize) -> String {
    format!("cluster.local/ns/ns{namespace}/sa/client-{k}")
}

fn peer(principal: &str) -> Peer {
    format!("spiffe://{principal}").parse().unwrap()
}

/// The policies of one workload.
fn workload(
    namespace: usize,
    number: usize,
    kind: fn(usize, usize) -> Policy,
) -> (usize, WorkloadPolicies) {
    let policies = WorkloadPolicies {
        policies: (0..number).map(|k| Arc::new(kind(namespace, k))).collect(),
        ..WorkloadPolicies::default()
    };
    (number, policies)
}

fn compiled(policies: &WorkloadPolicies) -> CompiledSet {
    let addresses = WorkloadAddresses {
        v4: Some(Ipv4Addr::new(10, 77, 0, 2)),
        v6: None,
    };
    let set = compile(policies, addresses);
    assert!(set.problems.is_empty(), "{:?}", set.problems);
    set
}

/// Who and from where: a client that the first policy admits, one of the last, nobody's.
fn verdicts(policies: usize, sets: Vec<(usize, WorkloadPolicies)>, rounds: usize) -> Value {
    let lab = Lab::bare();
    let asked = sets.len() / 2;
    let mut worst = false;
    for (n, (number, content)) in sets.iter().enumerate() {
        let set = compiled(content);
        let last = number - 1;
        let identities = [
            (IDENTITY_NONE, None),
            (1, Some(peer(&client(n, 0)))),
            (2, Some(peer(&client(n, last)))),
            (3, Some(peer("cluster.local/ns/other/sa/nobody"))),
        ];
        let masks = identities.map(|(number, peer)| (number, set.identity_mask(peer.as_ref())));
        lab.datapath
            .install_set(n as u32 + 1, &set, &masks)
            .unwrap();
        worst |= content.policies[0].rules[0].clauses[0].matches[0]
            .principals
            .is_empty();
    }
    let last = sets[asked].0 - 1;
    let query = |identity, source: [u8; 4], port| Query {
        set: asked as u32 + 1,
        identity,
        source: Addr::from(IpAddr::from(source)),
        port,
        destination_v4: true,
    };
    let (first_source, first_port) = way(0);
    let (last_source, last_port) = way(last);
    let queries = if worst {
        // The last one is entangled alone: it is what the loop ends with.
        [
            None,
            None,
            Some((query(3, [10, 0, 0, 1], 8000), Reason::NotAllowed)),
        ]
    } else {
        [
            Some((query(1, first_source, first_port), Reason::Allowed)),
            Some((query(2, last_source, last_port), Reason::Allowed)),
            Some((query(3, first_source, first_port), Reason::NotAllowed)),
        ]
    };
    let [first, last, none] = queries.map(|asked| {
        let (query, expected) = asked?;
        let verdict = lab.datapath.judge(&[query]).unwrap()[0];
        assert_eq!(verdict.reason, expected, "{policies} policies: {query:?}");
        Some(median(
            (0..rounds).map(|_| lab.datapath.time_verdict(&query, RUNS).unwrap()),
        ))
    });
    json!({
        "policies": policies,
        "workloads": sets.len(),
        "first_ns": first,
        "last_ns": last,
        "none_ns": none,
    })
}

/// What some policies of one workload cost to compile, to install and to keep.
fn costs(number: usize, kind: fn(usize, usize) -> Policy, rounds: usize) -> Value {
    let lab = Lab::bare();
    let (_, policies) = workload(0, number, kind);
    let matches = policies
        .policies
        .iter()
        .map(|policy| &policy.rules[0].clauses[0].matches[0]);
    let prefixes: usize = matches.map(|m| m.source_ips.len()).sum();
    let compile = median((0..rounds).map(|_| seconds(|| drop(compiled(&policies)))));
    let set = compiled(&policies);
    let someone = peer(&client(0, number / 2));
    let identity = median((0..rounds).map(|_| {
        seconds(|| {
            set.identity_mask(Some(&someone));
        })
    }));
    let plaintext = [(IDENTITY_NONE, set.identity_mask(None))];
    let before = memory(&lab);
    let install = median((1..=rounds as u32).map(|id| {
        let seconds = seconds(|| lab.datapath.install_set(id, &set, &plaintext).unwrap());
        if id > 1 {
            lab.datapath.remove_set(id).unwrap();
        }
        seconds
    }));
    eventually("the other sets are given back", || {
        lab.datapath.collect_sets().unwrap();
        lab.datapath.policy_usage().sets == 1
    });
    let usage = lab.datapath.policy_usage();
    json!({
        "policies": number,
        "prefixes": prefixes,
        "terms": set.terms.len(),
        "compile_seconds": compile,
        "identity_seconds": identity,
        "install_seconds": install,
        "blocks": usage.blocks,
        "sources": usage.sources,
        "ports": usage.ports,
        // The blocks are allocated beforehand: their part is what is in use.
        "map_bytes": memory(&lab).saturating_sub(before) + u64::from(usage.blocks) * 32,
    })
}

/// Bytes of the maps that grow, as the kernel accounts for them.
fn memory(lab: &Lab) -> u64 {
    let maps = [
        "POLICY_SETS",
        "POLICY_IDENTITIES",
        "POLICY_SOURCES",
        "POLICY_PORTS",
    ];
    let bytes = maps.map(|name| {
        let pin = lab.pin_dir().join(format!("v{LAYOUT_VERSION}")).join(name);
        let map = MapData::from_pin(pin).unwrap();
        let fd = map.fd().as_fd().as_raw_fd();
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        let line = info.lines().find_map(|line| line.strip_prefix("memlock:"));
        line.unwrap().trim().parse::<u64>().unwrap()
    });
    bytes.iter().sum()
}

fn seconds(work: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    work();
    begin.elapsed().as_secs_f64()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
