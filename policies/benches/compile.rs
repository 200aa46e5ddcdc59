//! What compiling costs: `cargo bench -p ringfence-policies`. Prints, and asserts nothing.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use ringfence_bpf_common::Block;
use ringfence_policies::{
    Action, BlockStore, Cidr, Clause, CompiledSet, Layout, Match, Peer, Policy, PolicyChange,
    PolicyName, PolicyStore, Rule, Scope, StringMatch, WorkloadAddresses, compile,
};

fn main() {
    println!("one workload                             compile   terms sources  ports   blocks");
    for policies in [1, 10, 100, 1000, 2000] {
        let all = (0..policies).map(ordinary).collect();
        report(&format!("{policies} policies"), all);
    }
    report("10 000 prefixes, 1 policy", with_prefixes(1, 10_000, false));
    let mut apart = with_prefixes(10_000, 10_000, false);
    let matches = apart
        .drain(..)
        .flat_map(|mut p| p.rules.swap_remove(0).clauses.swap_remove(0).matches);
    let clause = Clause {
        matches: matches.collect(),
    };
    let mut one = policy(0, vec![]);
    one.rules[0].clauses = vec![clause];
    report("10 000 prefixes, 1 policy, a match each", vec![one]);
    report(
        "10 000 prefixes, 2 000 policies",
        with_prefixes(2000, 10_000, false),
    );
    report(
        "10 000 nested, 2 000 policies, half `not`",
        with_prefixes(2000, 10_000, true),
    );

    println!("\n100 000 identities, 2 000 policies on the workload");
    for (what, wildcard) in [("exact principals", false), ("wildcards", true)] {
        let policies = (0..2000).map(|i| by_principal(i, wildcard)).collect();
        let compiled = compiled(policies);
        let peers: Vec<Peer> = (0..100_000).map(peer).collect();
        let took = time(|| {
            for peer in &peers {
                black_box(compiled.identity_mask(Some(peer)));
            }
        });
        println!(
            "{what:<40} {:>7.2} us each",
            took.as_secs_f64() * 1e6 / 100_000.0
        );
    }

    println!("\nstore of 10 000 policies in 1 000 namespaces");
    let mut store = PolicyStore::new("istio-system");
    let all: Vec<Policy> = (0..10_000).map(ordinary).collect();
    let took = time(|| {
        store.apply(all.iter().cloned().map(PolicyChange::Put));
    });
    println!("{:<40} {took:>7.2?}", "all put");
    let took = time(|| {
        store.apply(all.iter().cloned().map(PolicyChange::Put));
    });
    println!("{:<40} {took:>7.2?}", "all put again, unchanged");
    let mut changed = ordinary(17);
    changed.rules.clear();
    let took = time(|| {
        black_box(store.apply([PolicyChange::Put(changed.clone())]));
    });
    println!("{:<40} {took:>7.2?}", "one changed");
    let took = time(|| {
        black_box(store.applicable("ns17", [] as [&str; 0]));
    });
    println!("{:<40} {took:>7.2?}", "what applies to a workload");
}

fn report(what: &str, policies: Vec<Policy>) {
    let mut store = PolicyStore::new("istio-system");
    let global = |mut policy: Policy| {
        policy.scope = Scope::Global;
        PolicyChange::Put(policy)
    };
    store.apply(policies.into_iter().map(global));
    let policies = store.applicable("a", [] as [&str; 0]);
    let mut best = Duration::MAX;
    let mut compiled = CompiledSet::default();
    for _ in 0..5 {
        best = best.min(time(|| compiled = compile(&policies, ADDRESSES)));
    }
    assert_eq!(compiled.problems, []);
    let mut blocks = Counted(0);
    compiled
        .lay_out(&mut Layout::default(), &mut blocks)
        .unwrap();
    println!(
        "{what:<40} {best:>7.2?} {:>7} {:>7} {:>6} {:>8}",
        compiled.terms.len(),
        compiled.sources.len(),
        compiled.ports.len(),
        blocks.0,
    );
}

const ADDRESSES: WorkloadAddresses = WorkloadAddresses {
    v4: Some(Ipv4Addr::new(10, 9, 0, 1)),
    v6: None,
};

fn compiled(policies: Vec<Policy>) -> CompiledSet {
    let policies = ringfence_policies::WorkloadPolicies {
        policies: policies.into_iter().map(Into::into).collect(),
        ..Default::default()
    };
    compile(&policies, ADDRESSES)
}

fn time(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

struct Counted(usize);

impl BlockStore for Counted {
    fn store(&mut self, blocks: &[Block]) -> Option<u32> {
        self.0 += blocks.len();
        Some(0)
    }
}

/// Who may talk to which port, as most policies say; every tenth is a DENY.
fn ordinary(i: usize) -> Policy {
    let principals = (0..3).map(|k| format!("cluster.local/ns/ns{}/sa/sa{k}", i + k));
    let from = Match {
        principals: principals.map(|p| StringMatch::exact(p).unwrap()).collect(),
        ..Match::default()
    };
    let to = Match {
        destination_ports: vec![80, 443, 8000 + (i % 100) as u16],
        ..Match::default()
    };
    policy(i, vec![from, to])
}

fn by_principal(i: usize, wildcard: bool) -> Policy {
    let namespace = i % 1000;
    let principal = if wildcard {
        format!("cluster.local/ns/ns{namespace}/*")
    } else {
        format!("cluster.local/ns/ns{namespace}/sa/sa{}", i / 1000)
    };
    let from = Match {
        principals: vec![principal.parse().unwrap()],
        ..Match::default()
    };
    policy(i, vec![from])
}

fn peer(i: usize) -> Peer {
    let id = format!("spiffe://cluster.local/ns/ns{}/sa/sa{}", i % 1000, i / 1000);
    id.parse().unwrap()
}

fn with_prefixes(policies: usize, prefixes: usize, nested: bool) -> Vec<Policy> {
    let each = prefixes / policies;
    let cidr = |n: usize| {
        let address = Ipv4Addr::from_bits((n as u32).wrapping_mul(0x0001_0193) | 0x0a00_0000);
        let length = if nested { 12 + n as u32 % 21 } else { 32 };
        Cidr::new(address.into(), length).unwrap()
    };
    (0..policies)
        .map(|i| {
            let cidrs: Vec<Cidr> = (i * each..(i + 1) * each).map(cidr).collect();
            let from = if nested && i % 2 == 0 {
                Match {
                    not_source_ips: cidrs,
                    ..Match::default()
                }
            } else {
                Match {
                    source_ips: cidrs,
                    ..Match::default()
                }
            };
            policy(i, vec![from])
        })
        .collect()
}

fn policy(i: usize, clauses: Vec<Match>) -> Policy {
    Policy {
        name: PolicyName::new(format!("ns{}", i % 1000), format!("policy-{i:05}")),
        scope: Scope::Namespace,
        action: if i.is_multiple_of(10) {
            Action::Deny
        } else {
            Action::Allow
        },
        dry_run: false,
        rules: vec![Rule {
            clauses: clauses
                .into_iter()
                .map(|m| Clause { matches: vec![m] })
                .collect(),
        }],
    }
}
