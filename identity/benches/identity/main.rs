//! `cargo xtask bench identity`: what a handshake costs by key type and key exchange, what the
//! verifier alone costs, and how much memory an SVID under management takes.
//!
//! The result is one JSON object on standard output, progress is on standard error. Both ends
//! of a handshake run on one thread: its CPU time is that of client and server together.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod handshakes;
mod memory;
mod verifier;

use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use ringfence_identity::testing::{CrlParams, TestCa};
use ringfence_identity::{RevocationLists, TrustDomainAliases, TrustStore};
use serde_json::json;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    if let Some(at) = arguments
        .iter()
        .position(|argument| argument == memory::CHILD)
    {
        let identities = arguments[at + 1].parse().unwrap();
        println!("{}", memory::measure(identities));
        return;
    }
    // `cargo test` runs benches too, without the argument that cargo bench gives.
    if !has("--bench") {
        return;
    }
    let effort = if has("--quick") {
        Effort::QUICK
    } else {
        Effort::FULL
    };
    let result = json!({
        "rounds": effort.rounds,
        "listed_serials": LISTED,
        "handshakes": handshakes::measure(&effort),
        "verifier": verifier::measure(&effort),
        "memory": memory::in_processes_of_their_own(effort.managed),
    });
    println!("{result}");
}

/// How much of everything.
struct Effort {
    /// Medians are over these; each visits every combination once.
    rounds: usize,
    /// Of each combination in a round.
    handshakes: u32,
    /// Of each chain in a round.
    verifications: u32,
    /// Identities under management.
    managed: &'static [usize],
}

impl Effort {
    const FULL: Self = Self {
        rounds: 7,
        handshakes: 100,
        verifications: 1000,
        managed: &[1_000, 10_000],
    };
    const QUICK: Self = Self {
        rounds: 3,
        handshakes: 20,
        verifications: 200,
        managed: &[1_000],
    };
}

/// Revoked certificates in the list of [`trust`].
const LISTED: usize = 1_000;

/// The CA's root, and a list of each of its issuers where `revocation` is on.
fn trust(ca: &TestCa, revocation: bool) -> TrustStore {
    let lists = RevocationLists::new();
    if revocation {
        let revoked = (0..LISTED).map(|n| [&[0x7f], n.to_be_bytes().as_slice()].concat());
        let params = CrlParams {
            revoked: revoked.collect(),
            ..CrlParams::default()
        };
        for level in 0..=ca.intermediates().len() {
            let source = format!("level {level}");
            let list = ca.crl(level, &params);
            lists.replace(&source, ca.trust_domain(), &list).unwrap();
        }
    }
    TrustStore::new(ca.bundle(), lists.into(), TrustDomainAliases::default())
}

/// Time on the clock and on the CPU.
#[derive(Clone, Copy)]
struct Cost {
    wall: Duration,
    cpu: Duration,
}

impl Cost {
    /// Of one of `count` calls.
    fn of(count: u32, mut call: impl FnMut()) -> Self {
        let (cpu, wall) = (cpu_time(), Instant::now());
        for _ in 0..count {
            call();
        }
        Self {
            wall: wall.elapsed() / count,
            cpu: (cpu_time() - cpu) / count,
        }
    }
}

/// Of each kind by itself.
fn medians(rounds: &[Cost]) -> Cost {
    let median = |of: fn(&Cost) -> Duration| {
        let mut all: Vec<Duration> = rounds.iter().map(of).collect();
        all.sort();
        all[all.len() / 2]
    };
    Cost {
        wall: median(|cost| cost.wall),
        cpu: median(|cost| cost.cpu),
    }
}

/// User and system time of this process.
fn cpu_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let duration = |time: TimeVal| {
        Duration::from_secs(time.tv_sec().unsigned_abs())
            + Duration::from_micros(time.tv_usec().unsigned_abs())
    };
    duration(usage.user_time()) + duration(usage.system_time())
}
