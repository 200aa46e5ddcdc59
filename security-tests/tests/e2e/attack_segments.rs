//! Segments made by hand, and a pod's neighbours on its own node.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};

use anyhow::{Context, Result, ensure};
use ringfence_lab::capture::Capture;
use ringfence_lab::mesh::{Policy, Rule, TEST_PORT, principal};
use ringfence_lab::netns::Netns;
use ringfence_lab::probe::Acceptor;
use ringfence_lab::tcp::{Direction, next_sequence, streams};
use ringfence_lab::topology::Family;
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::server::Server;
use ringfence_security_tests::stage::{
    CLIENT_NODE, PATIENCE, SERVER_NODE, Stage, is_answered, is_refused, only_peer,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::evasions::{ip_packet, octets};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        segments_from_the_node_do_not_get_into_a_last_hop,
        a_neighbour_on_the_same_node_is_reached_through_its_agent_alone,
    ]
}

const PSH_ACK: u8 = 0x18;
const RST: u8 = 0x04;
const RST_ACK: u8 = 0x14;

/// A segment with these numbers (sequence, acknowledged), complete with its checksum.
fn segment(direction: Direction, numbers: (u32, u32), flags: u8, data: &[u8]) -> Vec<u8> {
    let Direction { from, to } = direction;
    let with_checksum = |checksum: u16| {
        let mut tcp = Vec::new();
        tcp.extend(from.port().to_be_bytes());
        tcp.extend(to.port().to_be_bytes());
        tcp.extend(numbers.0.to_be_bytes());
        tcp.extend(numbers.1.to_be_bytes());
        // 20 bytes of header, the flags, the window.
        tcp.extend([5 << 4, flags, 0xff, 0xff]);
        tcp.extend(checksum.to_be_bytes());
        tcp.extend([0, 0]);
        tcp.extend(data);
        tcp
    };
    let tcp = with_checksum(0);
    // RFC 9293, section 3.1; for IPv6 RFC 8200, section 8.1: the sum is the same.
    let mut pseudo = [octets(from.ip()), octets(to.ip())].concat();
    pseudo.extend((tcp.len() as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, 6]);
    pseudo.extend(&tcp);
    let mut sum: u32 = pseudo
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
            [high] => u32::from(*high) << 8,
            _ => 0,
        })
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    ip_packet(from.ip(), to.ip(), &with_checksum(!(sum as u16)))
}

/// Sends packets that are complete from their IP header on.
fn send_raw(netns: &Netns, to: IpAddr, packets: &[Vec<u8>]) -> Result<()> {
    let target = SockAddr::from(SocketAddr::new(to, 0));
    netns
        .run(|| -> std::io::Result<()> {
            let domain = Domain::for_address(SocketAddr::new(to, 0));
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(255)))?;
            for packet in packets {
                socket.send_to(packet, &target)?;
            }
            Ok(())
        })?
        .with_context(|| format!("sending raw packets to {to}"))
}

/// A connection to an echo server, and the segments that would be next in it.
fn watched(
    stage: &Stage,
    watch: (&str, &str),
    from: &str,
    target: SocketAddr,
) -> Result<(TcpStream, Direction, (u32, u32))> {
    let capture = Capture::start(&stage.lab()?.pod(watch.0)?.netns(), watch.1)?;
    let mut stream = stage.connect(from, target)?;
    stream.write_all(b"hello")?;
    stream.read_exact(&mut [0; 5])?;
    let frames = capture.stop()?;
    let source = stage.address(
        from,
        if target.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        },
    )?;
    let direction = streams(&frames)
        .into_keys()
        .find(|way| way.from.ip() == source && way.to.port() == TEST_PORT)
        .context("the connection is not in the capture")?;
    let ours = next_sequence(&frames, direction).context("no segment")?;
    let theirs = next_sequence(&frames, direction.reverse()).context("no answer")?;
    Ok((stream, direction, (ours, theirs)))
}

fn segments_from_the_node_do_not_get_into_a_last_hop(stage: &mut Stage) -> Result<Verdict> {
    const INJECTED: &str = "kernel.guard_injected_segment";
    // What is read, and how it ends.
    let echo = |mut stream: TcpStream| -> Result<(Vec<u8>, Option<std::io::ErrorKind>)> {
        let (mut data, mut buffer) = (Vec::new(), [0; 64]);
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok((data, None)),
                Ok(count) => {
                    let read = buffer.get(..count).unwrap_or_default();
                    data.extend(read);
                    if let Err(error) = stream.write_all(read) {
                        return Ok((data, Some(error.kind())));
                    }
                }
                Err(error) => return Ok((data, Some(error.kind()))),
            }
        }
    };
    let node = stage.lab()?.node(SERVER_NODE)?.netns();
    let at = |pod: &str| stage.lab()?.pod(pod).map(|pod| pod.netns());
    let meshed = Server::start(&at("web")?, TEST_PORT, PATIENCE, echo)?;
    let plain = Server::start(&at("outside-b")?, TEST_PORT, PATIENCE, echo)?;
    for family in Family::BOTH {
        let attack = |direction, (ours, theirs): (u32, u32)| -> [Vec<u8>; 3] {
            [
                segment(direction, (ours, theirs), PSH_ACK, b"evil!"),
                segment(direction, (ours.wrapping_add(5), theirs), RST_ACK, b""),
                segment(direction, (ours, 0), RST, b""),
            ]
        };
        let before = stage.counter(SERVER_NODE, INJECTED)?;
        let (mut stream, direction, numbers) =
            watched(stage, ("web", "lo"), "client", Stage::service(family))?;
        send_raw(&node, direction.to.ip(), &attack(direction, numbers))?;
        stage.wait_counter(SERVER_NODE, INJECTED, before + 3)?;
        let mut answer = [0; 4];
        stream.write_all(b"good")?;
        stream.read_exact(&mut answer)?;
        ensure!(&answer == b"good", "the client read {answer:?}");
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest)?;
        ensure!(rest.is_empty(), "and then {rest:?}");
        let served = meshed.next(PATIENCE)?;
        ensure!(
            served == (b"hellogood".to_vec(), None),
            "the application saw {served:?}"
        );

        // The twin: between two pods outside the mesh the same three do what they are for.
        let target = stage.port("outside-b", family, TEST_PORT)?;
        let (_stream, direction, numbers) =
            watched(stage, ("outside-b", "eth0"), "outside", target)?;
        let [data, reset, _] = attack(direction, numbers);
        send_raw(&node, direction.to.ip(), &[data, reset])?;
        let served = plain.next(PATIENCE)?;
        ensure!(
            served
                == (
                    b"helloevil!".to_vec(),
                    Some(std::io::ErrorKind::ConnectionReset)
                ),
            "the application saw {served:?}"
        );
    }
    Ok(Verdict::Passed)
}

/// `client` and `intruder` are on one node; nothing but its own application is admitted.
fn a_neighbour_on_the_same_node_is_reached_through_its_agent_alone(
    stage: &mut Stage,
) -> Result<Verdict> {
    const TO_MESH: &str = "kernel.guard_plaintext_to_mesh";
    let refused = r#"refused{reason="policy-denied"}"#;
    let netns = stage.lab()?.pod("client")?.netns();
    let mut application = Acceptor::start(&netns, TEST_PORT)?;
    let protect = Policy {
        name: "web-may-use-client".into(),
        app: Some("client".into()),
        rules: vec![Rule {
            principals: vec![principal("web")],
            ports: vec![TEST_PORT],
            ..Rule::default()
        }],
        ..Policy::clients_may_use_web()
    };
    stage.change_mesh(
        |mesh| mesh.policies.push(protect),
        "the neighbour to be protected",
        |stage| {
            is_refused(&stage.attempt("intruder", stage.port("client", Family::V4, TEST_PORT)?)?)
        },
    )?;
    let accepted = application.accepted().len();
    let node = stage.lab()?.node(CLIENT_NODE)?.netns();
    for family in Family::BOTH {
        let target = stage.port("client", family, TEST_PORT)?;
        let before = stage.counter(CLIENT_NODE, refused)?;
        is_refused(&stage.attempt("intruder", target)?).context("the pod's address")?;
        stage.wait_counter(CLIENT_NODE, refused, before + 1)?;
        is_refused(&stage.attempt("outside", target)?).context("from outside the mesh")?;
        let from_node = ringfence_lab::probe::connect(&node, target, b"hello\n", PATIENCE)?;
        is_refused(&from_node).context("from the node itself")?;
        // By its own veth, past every hook of a socket, under its own and a stranger's name.
        let before = stage.counter(CLIENT_NODE, TO_MESH)?;
        for source in ["intruder", "outside", "web"] {
            let direction = Direction {
                from: stage.port(source, family, 4000)?,
                to: target,
            };
            let syn = segment(direction, (1, 0), 0x02, b"hello\n");
            let intruder = stage.lab()?.pod("intruder")?.netns();
            send_raw(&intruder, target.ip(), &[syn])?;
        }
        stage.wait_counter(CLIENT_NODE, TO_MESH, before + 3)?;
    }
    ensure!(
        application.accepted().len() == accepted,
        "the neighbour accepted {:?}",
        application.accepted()
    );
    drop(application);
    for family in Family::BOTH {
        let mut application = Acceptor::start(&netns, TEST_PORT)?;
        is_answered(&stage.attempt("web", stage.port("client", family, TEST_PORT)?)?)?;
        only_peer(&mut application, stage.address("web", family)?)?;
    }
    Ok(Verdict::Passed)
}
