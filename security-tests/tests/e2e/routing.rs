//! What the connect hook makes of destinations that are no mesh workloads, and of the agent's
//! own ports.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use ringfence_lab::mesh::{Service, TEST_PORT};
use ringfence_lab::probe::{self, Acceptor, Outcome};
use ringfence_lab::topology::{Family, LEGACY_VIP};
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::stage::{
    CLIENT_NODE, OUTBOUND_PORT, PATIENCE, SERVER_NODE, Stage, TUNNEL_PORT, is_answered, is_refused,
};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        a_destination_outside_the_mesh_is_reached_without_the_agents,
        a_service_without_an_endpoint_refuses_the_connection,
        a_process_of_a_pod_cannot_dial_the_agents_ports,
        the_outbound_port_is_closed_to_the_wire,
    ]
}

/// Counters that move when an agent has to do with a connection.
const AGENT_COUNTERS: [&str; 4] = [
    "outbound_accepted",
    "inbound_accepted",
    "handshakes",
    "kernel.redirected",
];

fn a_destination_outside_the_mesh_is_reached_without_the_agents(
    stage: &mut Stage,
) -> Result<Verdict> {
    let both = |stage: &Stage| -> Result<Vec<Vec<u64>>> {
        [CLIENT_NODE, SERVER_NODE]
            .map(|node| {
                let status = stage.status(node)?;
                Ok(AGENT_COUNTERS
                    .iter()
                    .map(|name| status.counter(name))
                    .collect())
            })
            .into_iter()
            .collect()
    };
    let before = both(stage)?;
    let request = b"GET / HTTP/1.0\r\n\r\n";
    for family in Family::BOTH {
        let targets = [
            stage.port("legacy", family, 8080)?,
            SocketAddr::new(family.of(LEGACY_VIP), 8080),
        ];
        for target in targets {
            let netns = stage.lab()?.pod("client")?.netns();
            match probe::connect(&netns, target, request, PATIENCE)? {
                Outcome::Answered(answered) => {
                    ensure!(
                        answered.answer.starts_with(b"HTTP/1.1 200"),
                        "{target} gave another answer"
                    );
                    ensure!(
                        answered.peer == target,
                        "getpeername says {} and not {target}",
                        answered.peer
                    );
                }
                other => anyhow::bail!("{target}: {other:?}"),
            }
        }
    }
    let after = both(stage)?;
    ensure!(
        before == after,
        "{AGENT_COUNTERS:?} were {before:?} and are {after:?}"
    );
    // The twin: a destination in the mesh moves them.
    let _application = stage.application()?;
    is_answered(&stage.attempt("client", Stage::service(Family::V4))?)?;
    ensure!(
        both(stage)? != before,
        "{AGENT_COUNTERS:?} do not move at all"
    );
    Ok(Verdict::Passed)
}

fn a_service_without_an_endpoint_refuses_the_connection(stage: &mut Stage) -> Result<Verdict> {
    let addresses: [IpAddr; 2] = [
        Ipv4Addr::new(10, 96, 0, 30).into(),
        Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0x30).into(),
    ];
    let refused = |stage: &Stage| -> Result<()> {
        for address in addresses {
            let outcome = stage.attempt("client", SocketAddr::new(address, TEST_PORT))?;
            ensure!(
                outcome == Outcome::NotConnected(ErrorKind::ConnectionRefused),
                "{address}: {outcome:?}"
            );
        }
        Ok(())
    };
    let service = |app: &str| Service {
        name: "empty".into(),
        addresses: addresses.to_vec(),
        ports: vec![(TEST_PORT, TEST_PORT)],
        app: app.into(),
    };
    stage.change_mesh(
        |mesh| mesh.services.push(service("nobody")),
        "the empty service",
        refused,
    )?;
    // The twin: with an endpoint the same addresses answer.
    let _application = stage.application()?;
    let answered = |stage: &Stage| {
        addresses.into_iter().try_for_each(|address| {
            is_answered(&stage.attempt("client", SocketAddr::new(address, TEST_PORT))?)
        })
    };
    stage.change_mesh(
        |mesh| {
            mesh.services.retain(|known| known.name != "empty");
            mesh.services.push(service("web"));
        },
        "the service to have an endpoint",
        answered,
    )?;
    Ok(Verdict::Passed)
}

fn a_process_of_a_pod_cannot_dial_the_agents_ports(stage: &mut Stage) -> Result<Verdict> {
    let before = stage.counter(CLIENT_NODE, "kernel.agent_port_refused")?;
    let mut attempts = 0;
    for family in Family::BOTH {
        let any: IpAddr = match family {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        let addresses = [
            stage.address("client", family)?,
            family.loopback(),
            any,
            stage.address("web", family)?,
            // Another pod of the same node.
            stage.address("intruder", family)?,
        ];
        for address in addresses {
            for port in [OUTBOUND_PORT, TUNNEL_PORT] {
                let outcome = stage.attempt("client", SocketAddr::new(address, port))?;
                ensure!(
                    outcome == Outcome::NotConnected(ErrorKind::PermissionDenied),
                    "{address} port {port}: {outcome:?}"
                );
                attempts += 1;
            }
        }
    }
    let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped();
    let outcome = stage.attempt("client", SocketAddr::new(mapped.into(), OUTBOUND_PORT))?;
    ensure!(
        outcome == Outcome::NotConnected(ErrorKind::PermissionDenied),
        "{mapped}: {outcome:?}"
    );
    let moved = stage.counter(CLIENT_NODE, "kernel.agent_port_refused")? - before;
    ensure!(
        moved == attempts + 1,
        "{} attempts, and kernel.agent_port_refused moved by {moved}",
        attempts + 1
    );
    // The twin: other ports of the pod itself are nobody's business.
    let _own = Acceptor::start(&stage.lab()?.pod("client")?.netns(), TEST_PORT)?;
    for family in Family::BOTH {
        for address in [stage.address("client", family)?, family.loopback()] {
            is_answered(&stage.attempt("client", SocketAddr::new(address, TEST_PORT))?)?;
        }
    }
    Ok(Verdict::Passed)
}

fn the_outbound_port_is_closed_to_the_wire(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        let outcome = stage.attempt("outside", stage.port("web", family, OUTBOUND_PORT)?)?;
        is_refused(&outcome)?;
        ensure!(
            outcome == Outcome::NotConnected(ErrorKind::ConnectionRefused),
            "{}: {outcome:?}",
            family.name()
        );
        // The twin: tunnels are accepted, and what is no TLS is closed without a word.
        let outcome = stage.attempt("outside", stage.port("web", family, TUNNEL_PORT)?)?;
        ensure!(
            matches!(outcome, Outcome::Closed(_)),
            "{}: {outcome:?}",
            family.name()
        );
    }
    Ok(Verdict::Passed)
}
