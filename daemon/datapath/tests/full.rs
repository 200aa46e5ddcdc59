//! Tables and the ring of events without room: no verdict depends on them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::AsFd,
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData, MapError};
use nix::sys::socket::{setsockopt, sockopt};
use ringfence_bpf_common::{
    AGENT_LAST_HOP, Addr, AgentSocket, Endpoint, Flow, Handshake, LAYOUT_VERSION, OriginalDst,
    SET_STRICT,
};
use ringfence_datapath::socket_cookie;
use socket2::Domain;
use support::*;

const ALICE: u32 = 1;
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3));

/// Fills a pinned table with entries that concern nobody.
fn fill<K: aya::Pod, V: aya::Pod>(lab: &Lab, table: &str, key: impl Fn(Flow) -> K, value: V) {
    let pin = lab.pin_dir().join(format!("v{LAYOUT_VERSION}")).join(table);
    let map = MapData::from_pin(pin).unwrap();
    let map = Map::from_map_data(map).unwrap();
    let mut map = HashMap::<_, K, V>::try_from(map).unwrap();
    for number in 0.. {
        let flow = Flow {
            netns: number,
            source: Endpoint::new(Addr::NONE, 0),
            listener: Endpoint::new(Addr::NONE, 0),
        };
        match map.insert(key(flow), value, 0) {
            Ok(()) => {}
            Err(MapError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::E2BIG) =>
            {
                assert!(number > 1000);
                return;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn last_hop(lab: &Lab) -> std::io::Result<()> {
    let socket = lab.pod.socket(Domain::IPV4);
    setsockopt(&socket, sockopt::IpTransparent, &true).unwrap();
    socket.set_mark(0x111).unwrap();
    socket.bind(&at(CLIENT, 0).into()).unwrap();
    let entry = AgentSocket {
        role: AGENT_LAST_HOP,
        identity: ALICE,
        source: Addr::from(CLIENT),
    };
    let cookie = socket_cookie(socket.as_fd()).unwrap();
    let _registered = lab.datapath.register_socket(cookie, entry).unwrap();
    lab.pod
        .run(|| socket.connect_timeout(&at(POD4, 8080).into(), Duration::from_secs(3)))
}

#[test]
fn last_hop_that_cannot_be_recorded_is_refused_under_strict() {
    if !can_run("last_hop_that_cannot_be_recorded_is_refused_under_strict") {
        return;
    }
    let lab = Lab::new();
    lab.install(SET_STRICT, &[(ALICE, terms(&[]))]);
    lab.route_last_hops();
    let _server = lab.pod.listen(at(POD4, 8080));
    last_hop(&lab).unwrap();
    fill(&lab, "LAST_HOPS", |flow| flow, 1u64);
    assert_eq!(errno(last_hop(&lab)), libc::ECONNREFUSED);
    assert_eq!(lab.counter("no_room"), 1);
}

#[test]
fn redirected_connection_that_cannot_be_recorded_has_no_destination() {
    if !can_run("redirected_connection_that_cannot_be_recorded_has_no_destination") {
        return;
    }
    let lab = Lab::new();
    let agent = lab.agent(POD4);
    let plain = lab.wire.listen(at(MESH4, 8080));
    plain.set_nonblocking(true).unwrap();
    let taken = || {
        let _app = lab.pod.connect(at(MESH4, 8080)).unwrap();
        let (stream, _) = agent.accept().unwrap();
        lab.original(&stream)
    };
    assert!(taken().is_some());
    let handshake = |flow| Handshake {
        flow,
        ..Handshake::default()
    };
    fill(&lab, "ORIGINAL_DST", handshake, OriginalDst::default());
    assert_eq!(taken(), None);
    assert_eq!(lab.counter("no_room"), 1);
    assert!(plain.accept().is_err(), "nothing went out in plaintext");
}

#[test]
fn full_ring_of_events_loses_events_and_no_verdict() {
    if !can_run("full_ring_of_events_loses_events_and_no_verdict") {
        return;
    }
    let lab = Lab::new();
    lab.install(SET_STRICT, &[(ALICE, terms(&[]))]);
    let server = lab.pod.listen(at(POD4, 8080));
    server.set_nonblocking(true).unwrap();
    // 256 KiB, and 72 bytes for an event: nobody reads.
    let mut refused = 0;
    lab.wire.run(|| {
        while lab.counter("events_lost") < 100 {
            let outcome = std::net::TcpStream::connect(at(POD4, 8080));
            assert_eq!(errno(outcome), libc::ECONNREFUSED);
            refused += 1;
            assert!(refused < 10_000, "the ring does not fill");
        }
    });
    assert!(server.accept().is_err(), "the application saw nobody");
    assert_eq!(lab.counter("plaintext_denied"), refused);
    // What is admitted is admitted, too.
    lab.install(0, &[(0, terms(&[]))]);
    lab.wire.connect(at(POD4, 8080)).unwrap();
    assert!(lab.counter("events_lost") > 100);
}
