//! The two places where a connection is judged: the agent's last hop, and plaintext
//! from the wire.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr},
    os::fd::AsFd,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
use ringfence_bpf_common::{
    AGENT_DIAL, AGENT_LAST_HOP, Addr, AgentSocket, HOOK_CONNECT, HOOK_SK_LOOKUP, IDENTITY_NONE,
    Reason, SET_HAS_ALLOW, SET_POLICY_NOT_RECEIVED, SET_STRICT, SET_UNREPRESENTABLE, Verdict,
};
use ringfence_datapath::socket_cookie;
use ringfence_policies::SourcePrefix;
use socket2::{Domain, Socket, Type};
use support::*;

const ALICE: u32 = 1;
const MALLORY: u32 = 2;
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3));

/// Connects as the agent does.
fn agent_connect(lab: &Lab, entry: AgentSocket, to: SocketAddr) -> io::Result<Socket> {
    let socket = lab.pod.socket(Domain::for_address(to));
    let cookie = socket_cookie(socket.as_fd()).unwrap();
    let _registered = lab.datapath.register_socket(cookie, entry).unwrap();
    lab.pod.run(|| socket.connect(&to.into()))?;
    Ok(socket)
}

fn last_hop(lab: &Lab, identity: u32, source: IpAddr, to: SocketAddr) -> io::Result<Socket> {
    let entry = AgentSocket {
        role: AGENT_LAST_HOP,
        identity,
        source: Addr::from(source),
    };
    agent_connect(lab, entry, to)
}

/// STRICT, and one ALLOW term that holds for Alice.
fn only_alice(lab: &Lab) {
    let identities = [
        (IDENTITY_NONE, terms(&[])),
        (ALICE, terms(&[0])),
        (MALLORY, terms(&[])),
    ];
    lab.install(SET_STRICT | SET_HAS_ALLOW, &identities);
}

#[test]
fn last_hop_is_judged_by_the_identity() {
    if !can_run("last_hop_is_judged_by_the_identity") {
        return;
    }
    let lab = Lab::new();
    only_alice(&lab);
    let server = lab.pod.listen(at(Ipv6Addr::UNSPECIFIED.into(), 8080));
    for to in [at(POD4, 8080), at(POD6, 8080), at(mapped(POD4), 8080)] {
        last_hop(&lab, ALICE, CLIENT, to).unwrap();
        server.accept().unwrap();
        assert_eq!(errno(last_hop(&lab, MALLORY, CLIENT, to)), libc::EPERM);
        assert_eq!(
            errno(last_hop(&lab, 77, CLIENT, to)),
            libc::EPERM,
            "not prepared"
        );
        assert_eq!(
            errno(last_hop(&lab, IDENTITY_NONE, CLIENT, to)),
            libc::EPERM
        );
    }
    server.set_nonblocking(true).unwrap();
    assert!(
        server.accept().is_err(),
        "the application saw no refused connection"
    );
    assert_eq!(
        (
            lab.counter("last_hop_allowed"),
            lab.counter("last_hop_denied")
        ),
        (3, 9)
    );
}

/// Connects as the agent does, with the client's own address.
fn transparent_last_hop(
    lab: &Lab,
    identity: u32,
    source: IpAddr,
    to: SocketAddr,
) -> io::Result<Socket> {
    let socket = lab.pod.socket(Domain::for_address(to));
    // One flag of the socket serves both families.
    setsockopt(&socket, sockopt::IpTransparent, &true).unwrap();
    socket.set_mark(0x111).unwrap();
    socket.bind(&at(source, 0).into()).unwrap();
    let cookie = socket_cookie(socket.as_fd()).unwrap();
    let entry = AgentSocket {
        role: AGENT_LAST_HOP,
        identity,
        source: Addr::from(source),
    };
    let _registered = lab.datapath.register_socket(cookie, entry).unwrap();
    lab.pod
        .run(|| socket.connect_timeout(&to.into(), Duration::from_secs(3)))?;
    Ok(socket)
}

#[test]
fn last_hop_bears_the_clients_address_under_strict() {
    if !can_run("last_hop_bears_the_clients_address_under_strict") {
        return;
    }
    let lab = Lab::new();
    only_alice(&lab);
    lab.route_last_hops();
    let server = lab.pod.listen(at(Ipv6Addr::UNSPECIFIED.into(), 8080));
    // Far away, and on the wire where it could itself speak plaintext.
    let far6 = IpAddr::V6(Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, 9));
    for (client, to) in [(CLIENT, POD4), (MESH4, POD4), (far6, POD6), (MESH6, POD6)] {
        let mut hop = transparent_last_hop(&lab, ALICE, client, at(to, 8080)).unwrap();
        let (mut stream, source) = server.accept().unwrap();
        assert_eq!(source.ip().to_canonical(), client);
        hop.write_all(b"question").unwrap();
        let mut buffer = [0; 8];
        stream.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"question");

        let cookie = socket_cookie(hop.as_fd()).unwrap();
        let hops = lab.datapath.last_hops().unwrap();
        assert_eq!(hops.len(), 1);
        assert_eq!((hops[0].1, hops[0].0.netns), (cookie, lab.cookie));
        assert_eq!(hops[0].0.source, endpoint(client, source.port()));
        assert_eq!(hops[0].0.listener, endpoint(to, 8080));
        // The same client in plaintext stays out.
        if client == MESH4 || client == MESH6 {
            let refused = lab.wire.run(|| {
                let socket = Socket::new(Domain::for_address(at(to, 0)), Type::STREAM, None)?;
                socket.bind(&at(client, 0).into())?;
                socket.connect_timeout(&at(to, 8080).into(), Duration::from_secs(3))
            });
            assert_eq!(errno(refused), libc::ECONNREFUSED);
        }
        // The application closes first, so that no TIME_WAIT keeps the hop's socket.
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(hop.read(&mut buffer).unwrap(), 0);
        hop.shutdown(Shutdown::Write).unwrap();
        eventually("the last hop is removed at its end", || {
            lab.datapath.last_hops().unwrap().is_empty()
        });
        let refused = transparent_last_hop(&lab, MALLORY, client, at(to, 8080));
        assert_eq!(errno(refused), libc::EPERM);
    }
    // A port that nobody listens on: refused by the kernel, and nothing is left.
    let refused = transparent_last_hop(&lab, ALICE, CLIENT, at(POD4, 8081));
    assert_eq!(errno(refused), libc::ECONNREFUSED);
    assert!(lab.datapath.last_hops().unwrap().is_empty());
    server.set_nonblocking(true).unwrap();
    assert!(server.accept().is_err());
}

#[test]
fn identity_bound_later_is_admitted() {
    if !can_run("identity_bound_later_is_admitted") {
        return;
    }
    let lab = Lab::new();
    only_alice(&lab);
    let _server = lab.pod.listen(at(POD4, 8080));
    assert_eq!(
        errno(last_hop(&lab, 3, CLIENT, at(POD4, 8080))),
        libc::EPERM
    );
    lab.datapath.bind_identity(SET, 3, &terms(&[0])).unwrap();
    last_hop(&lab, 3, CLIENT, at(POD4, 8080)).unwrap();
}

#[test]
fn last_hop_reaches_the_pod_alone_and_never_the_agent() {
    if !can_run("last_hop_reaches_the_pod_alone_and_never_the_agent") {
        return;
    }
    let lab = Lab::new();
    lab.install(0, &[(ALICE, terms(&[]))]);
    let _plain = lab.wire.listen(at(PLAIN4, 8080));
    let _loopback = lab.pod.listen(at(Ipv4Addr::LOCALHOST.into(), 8081));
    let _agent = lab.pod.listen(at(POD4, INBOUND));
    let _application = lab.pod.listen(at(POD4, 8082));
    for to in [
        at(PLAIN4, 8080),
        at(Ipv4Addr::LOCALHOST.into(), 8081),
        at(POD4, INBOUND),
        at(POD4, OUTBOUND),
    ] {
        assert_eq!(
            errno(last_hop(&lab, ALICE, CLIENT, to)),
            libc::EPERM,
            "{to}"
        );
    }
    last_hop(&lab, ALICE, CLIENT, at(POD4, 8082)).unwrap();
}

#[test]
fn policy_by_source_and_port_decides() {
    if !can_run("policy_by_source_and_port_decides") {
        return;
    }
    let lab = Lab::new();
    // Term 0 denies 10.1.0.0/16 but not 10.1.2.0/24; term 1 denies port 8081; term 65
    // denies fd01::/16.
    let mut set = any_connection(0);
    set.deny_terms = 256;
    set.other_sources = terms(&[1]);
    set.other_ports = terms(&[0, 65]);
    let prefix = |addr: &str, length| SourcePrefix {
        addr: addr.parse::<IpAddr>().unwrap().into(),
        length,
    };
    set.sources = vec![
        (prefix("10.1.0.0", 96 + 16), terms(&[0, 1])),
        (prefix("10.1.2.0", 96 + 24), terms(&[1])),
        (prefix("fd01::", 16), terms(&[1, 65])),
    ];
    set.ports = vec![(8081, terms(&[0, 1, 65]))];
    let alice = [(ALICE, terms(&[0, 1, 65]))];
    lab.datapath.install_set(7, &set, &alice).unwrap();
    // The same prefix in another set means something else.
    set.sources = vec![(prefix("10.1.2.0", 96 + 24), terms(&[0, 1, 65]))];
    lab.datapath.install_set(8, &set, &[]).unwrap();
    let pod = ringfence_bpf_common::Pod {
        policy_set: 7,
        ..lab.entry()
    };
    lab.datapath.update_pod(lab.cookie, &pod).unwrap();
    let _servers = [8080, 8081].map(|port| lab.pod.listen(at(Ipv6Addr::UNSPECIFIED.into(), port)));
    for (source, port, allowed) in [
        ("10.1.9.9", 8080, false),
        ("10.1.2.3", 8080, true),
        ("10.2.0.1", 8080, true),
        ("10.2.0.1", 8081, false),
        ("fd01::1", 8080, false),
        ("fd02::1", 8080, true),
    ] {
        let outcome = last_hop(&lab, ALICE, source.parse().unwrap(), at(POD4, port));
        assert_eq!(outcome.is_ok(), allowed, "{source} to port {port}");
    }
}

#[test]
fn agent_dial_passes_untouched() {
    if !can_run("agent_dial_passes_untouched") {
        return;
    }
    let lab = Lab::new();
    let peer = lab.wire.listen(at(MESH4, INBOUND));
    let entry = AgentSocket {
        role: AGENT_DIAL,
        identity: 0,
        source: Addr::NONE,
    };
    agent_connect(&lab, entry, at(MESH4, INBOUND)).unwrap();
    peer.accept().unwrap();
    // The registration ended with its guard.
    assert_eq!(errno(lab.pod.connect(at(MESH4, INBOUND))), libc::EPERM);
}

#[test]
fn plaintext_from_the_wire_is_refused_under_strict() {
    if !can_run("plaintext_from_the_wire_is_refused_under_strict") {
        return;
    }
    let lab = Lab::new();
    only_alice(&lab);
    let server = lab.pod.listen(at(Ipv6Addr::UNSPECIFIED.into(), 8080));
    server.set_nonblocking(true).unwrap();
    for to in [at(POD4, 8080), at(POD6, 8080)] {
        assert_eq!(errno(lab.wire.connect(to)), libc::ECONNREFUSED, "{to}");
    }
    assert!(server.accept().is_err(), "the application accepted nothing");
    assert_eq!(
        (
            lab.counter("plaintext_allowed"),
            lab.counter("plaintext_denied")
        ),
        (0, 2)
    );
}

#[test]
fn plaintext_from_the_wire_passes_under_permissive() {
    if !can_run("plaintext_from_the_wire_passes_under_permissive") {
        return;
    }
    let lab = Lab::new();
    let server = lab.pod.listen(at(Ipv6Addr::UNSPECIFIED.into(), 8080));
    for (to, client) in [(POD4, PLAIN4), (POD6, PLAIN6)] {
        let stream = lab.wire.connect(at(to, 8080)).unwrap();
        let (_, source) = server.accept().unwrap();
        assert_eq!(source.port(), stream.local_addr().unwrap().port());
        assert_eq!(source.ip().to_canonical().is_ipv4(), client.is_ipv4());
    }
    assert_eq!(
        (
            lab.counter("plaintext_allowed"),
            lab.counter("plaintext_denied")
        ),
        (2, 0)
    );
}

#[test]
fn tunnels_arrive_and_the_outbound_port_is_closed_to_the_wire() {
    if !can_run("tunnels_arrive_and_the_outbound_port_is_closed_to_the_wire") {
        return;
    }
    let lab = Lab::new();
    only_alice(&lab);
    let _inbound = lab.pod.listen(at(POD4, INBOUND));
    let _outbound = lab.agent(POD4);
    lab.wire.connect(at(POD4, INBOUND)).unwrap();
    assert_eq!(
        errno(lab.wire.connect(at(POD4, OUTBOUND))),
        libc::ECONNREFUSED
    );
}

#[test]
fn whatever_is_unknown_is_denied() {
    if !can_run("whatever_is_unknown_is_denied") {
        return;
    }
    let lab = Lab::new();
    let _server = lab.pod.listen(at(POD4, 8080));
    lab.wire.connect(at(POD4, 8080)).unwrap();
    let everyone = [(IDENTITY_NONE, terms(&[])), (ALICE, terms(&[]))];
    for flags in [SET_UNREPRESENTABLE, SET_POLICY_NOT_RECEIVED] {
        lab.install(flags, &everyone);
        assert_eq!(errno(lab.wire.connect(at(POD4, 8080))), libc::ECONNREFUSED);
        assert_eq!(
            errno(last_hop(&lab, ALICE, CLIENT, at(POD4, 8080))),
            libc::EPERM
        );
    }
    for policy_set in [0, 99] {
        let pod = ringfence_bpf_common::Pod {
            policy_set,
            ..lab.entry()
        };
        lab.datapath.update_pod(lab.cookie, &pod).unwrap();
        assert_eq!(errno(lab.wire.connect(at(POD4, 8080))), libc::ECONNREFUSED);
        assert_eq!(
            errno(last_hop(&lab, ALICE, CLIENT, at(POD4, 8080))),
            libc::EPERM
        );
    }
}

#[test]
fn events_tell_each_verdict() {
    if !can_run("events_tell_each_verdict") {
        return;
    }
    let lab = Lab::new();
    only_alice(&lab);
    let _server = lab.pod.listen(at(POD4, 8080));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut events = lab.datapath.events().unwrap();
        assert_eq!(events.try_next(), None);
        last_hop(&lab, ALICE, CLIENT, at(POD4, 8080)).unwrap();
        let event = events.next().await.unwrap();
        assert_eq!(
            (event.netns, event.hook, event.identity),
            (lab.cookie, HOOK_CONNECT, ALICE)
        );
        assert_eq!((event.reason, event.term), (Reason::Allowed as u16, 0));
        assert_eq!(event.source.addr, Addr::from(CLIENT));
        assert_eq!(event.destination, endpoint(POD4, 8080));

        last_hop(&lab, MALLORY, CLIENT, at(POD4, 8080)).unwrap_err();
        let event = events.next().await.unwrap();
        assert_eq!(
            (event.reason, event.term),
            (Reason::NotAllowed as u16, Verdict::NO_TERM)
        );

        lab.wire.connect(at(POD4, 8080)).unwrap_err();
        let event = events.next().await.unwrap();
        assert_eq!(
            (event.hook, event.identity),
            (HOOK_SK_LOOKUP, IDENTITY_NONE)
        );
        assert_eq!(event.reason, Reason::PlaintextRefused as u16);
        assert_eq!(event.source.addr, Addr::from(PLAIN4));
        assert_ne!(event.source.port, 0);
        assert_eq!(event.destination, endpoint(POD4, 8080));
    });
}
