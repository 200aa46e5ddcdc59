//! End-to-end and attack tests on one lab: two nodes, the control plane, an agent on each
//! node, unmodified programs in pods. Records are protected by whatever the kernel offers.
//!
//! `cargo test -p ringfence-security-tests` runs all of it as root; words on the command line
//! select cases by name. `RINGFENCE_BIN` names the program under test; without it,
//! `target/release/ringfence` is.

mod attack_segments;
mod attack_sockets;
mod attack_swaps;
mod attacks;
mod certificates;
mod configuration;
mod evasions;
mod expiry;
mod handshakes;
mod identity_sources;
mod impostor;
mod key_exchange;
mod late_policies;
mod lifecycle;
mod operators;
mod policy;
mod revocation;
mod rotation;
mod routing;
mod streams;
mod traffic;
mod tunnels;
mod wire;
mod workload_api;

use std::process::ExitCode;

use ringfence_security_tests::harness::{self, Arguments};

fn main() -> ExitCode {
    // A process of a pod, which a case has started.
    if let [_, flag, socket] = std::env::args().collect::<Vec<_>>().as_slice()
        && flag == workload_api::CLIENT_FLAG
    {
        return workload_api::client(socket);
    }
    let arguments = Arguments::parse(std::env::args().skip(1));
    let cases: Vec<_> = [
        traffic::cases(),
        wire::cases(),
        streams::cases(),
        routing::cases(),
        evasions::cases(),
        policy::cases(),
        attacks::cases(),
        attack_swaps::cases(),
        attack_segments::cases(),
        attack_sockets::cases(),
        late_policies::cases(),
        operators::cases(),
        certificates::cases(),
        handshakes::cases(),
        tunnels::cases(),
        impostor::cases(),
        configuration::cases(),
        revocation::cases(),
        workload_api::cases(),
        key_exchange::cases(),
        identity_sources::cases(),
        expiry::cases(),
        rotation::cases(),
        // These stop parts of the lab, and the last one all of it.
        lifecycle::cases(),
    ]
    .into_iter()
    .flatten()
    .collect();
    harness::run(&cases, &arguments)
}
