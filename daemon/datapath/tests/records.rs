//! Records of original destinations: none is lost, none is left, none goes to another
//! connection.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, TcpStream},
    os::fd::AsRawFd,
    time::Duration,
};

use ringfence_bpf_common::{Handshake, LAYOUT_VERSION, OriginalDst};
use socket2::{Domain, Socket};
use support::*;

fn bound(lab: &Lab, own: IpAddr, port: u16) -> Socket {
    let socket = lab.pod.socket(Domain::for_address(at(own, port)));
    socket.set_reuse_address(true).unwrap();
    socket.bind(&at(own, port).into()).unwrap();
    socket
}

/// Connects from a port that an earlier socket had; tried again while that is being closed,
/// which may wait for a process that another test has just forked.
fn reused(lab: &Lab, own: IpAddr, port: u16, to: std::net::SocketAddr) -> Socket {
    let mut connected = None;
    eventually("the port is free again", || {
        let socket = bound(lab, own, port);
        match lab.pod.run(|| socket.connect(&to.into())) {
            Ok(()) => connected = Some(socket),
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
            Err(error) => panic!("{error}"),
        }
        connected.is_some()
    });
    connected.unwrap()
}

/// Ends a connection by RST.
fn abort(socket: Socket) {
    socket.set_linger(Some(Duration::ZERO)).unwrap();
}

/// What arrived before the connection ended, however it ended.
fn received(stream: &mut TcpStream) -> Vec<u8> {
    let mut data = Vec::new();
    match stream.read_to_end(&mut data) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{error}"),
        _ => data,
    }
}

/// Records whose connection has no agent's end yet.
fn waiting(lab: &Lab) -> usize {
    let pins = lab.pin_dir().join(format!("v{LAYOUT_VERSION}"));
    let map = aya::maps::MapData::from_pin(pins.join("ORIGINAL_DST")).unwrap();
    let map = aya::maps::Map::from_map_data(map).unwrap();
    let map = aya::maps::HashMap::<_, Handshake, OriginalDst>::try_from(map).unwrap();
    map.keys().map(Result::unwrap).count()
}

#[test]
fn refused_connect_leaves_no_record() {
    if !can_run("refused_connect_leaves_no_record") {
        return;
    }
    let lab = Lab::new();
    assert_eq!(errno(lab.pod.connect(at(MESH4, 80))), libc::ECONNREFUSED);
    assert_eq!(waiting(&lab), 0);
}

#[test]
fn three_connections_in_a_row_from_one_port_keep_their_own_destinations() {
    if !can_run("three_connections_in_a_row_from_one_port_keep_their_own_destinations") {
        return;
    }
    let lab = Lab::new();
    for (own, mesh) in [(POD4, MESH4), (POD6, MESH6)] {
        let agent = lab.agent(own);
        // Each has ended before the next one begins, and the agent sleeps all the while.
        for port in [81u8, 82, 83] {
            let mut socket = reused(&lab, own, 40_001, at(mesh, port.into()));
            socket.write_all(&[port; 100]).unwrap();
            abort(socket);
        }
        let last = reused(&lab, own, 40_001, at(mesh, 84));
        for port in [81u8, 82, 83] {
            let (mut stream, source) = agent.accept().unwrap();
            assert_eq!(source, at(own, 40_001));
            let record = lab
                .original(&stream)
                .expect("the record of this very socket");
            assert_eq!(record.asked, endpoint(mesh, port.into()));
            assert_eq!(received(&mut stream), [port; 100], "not another's bytes");
        }
        let (stream, _) = agent.accept().unwrap();
        let record = lab.original(&stream).unwrap();
        assert_eq!(record.asked, endpoint(mesh, 84));
        assert_eq!(record.cookie, cookie(&last));
    }
    assert_eq!((waiting(&lab), lab.counter("no_room")), (0, 0));
}

#[test]
fn connections_in_a_row_are_not_mixed_up_while_the_agent_accepts() {
    if !can_run("connections_in_a_row_are_not_mixed_up_while_the_agent_accepts") {
        return;
    }
    const TURNS: u16 = 200;
    let lab = Lab::new();
    let agent = lab.agent(POD4);
    let right = std::thread::scope(|scope| {
        let accepting = scope.spawn(|| {
            let mut right = 0;
            loop {
                let (mut stream, source) = agent.accept().unwrap();
                let record = lab.original(&stream);
                if source.port() != 40_001 {
                    break right;
                }
                // Of one that was aborted on the way the record may be gone, the bytes too.
                let data = received(&mut stream);
                if let (Some(record), [a, b]) = (record, &*data) {
                    assert_eq!(record.asked.port, u16::from_be_bytes([*a, *b]));
                    right += 1;
                }
            }
        });
        for port in 1..=TURNS {
            let mut socket = reused(&lab, POD4, 40_001, at(MESH4, port));
            let _ = socket.write_all(&port.to_be_bytes());
            abort(socket);
        }
        drop(lab.pod.connect(at(MESH4, 80)).unwrap());
        accepting.join().unwrap()
    });
    assert!(right > 0, "none was accepted with its bytes");
    eventually("no record is left", || waiting(&lab) == 0);
}

fn cookie(socket: &Socket) -> u64 {
    ringfence_datapath::socket_cookie(std::os::fd::AsFd::as_fd(socket)).unwrap()
}

#[test]
fn closed_connection_in_the_backlog_keeps_its_record() {
    if !can_run("closed_connection_in_the_backlog_keeps_its_record") {
        return;
    }
    let lab = Lab::new();
    let agent = lab.agent(POD4);
    let mut app = lab.pod.connect(at(MESH4, 80)).unwrap();
    app.write_all(b"sent before the agent accepted").unwrap();
    drop(app);
    let (mut stream, _) = agent.accept().unwrap();
    assert_eq!(received(&mut stream), b"sent before the agent accepted");
    let record = lab.original(&stream).unwrap();
    assert_eq!(record.asked, endpoint(MESH4, 80));
}

#[test]
fn port_that_is_free_while_its_closed_connection_waits_is_another_connection() {
    if !can_run("port_that_is_free_while_its_closed_connection_waits_is_another_connection") {
        return;
    }
    let lab = Lab::new();
    let agent = lab.agent(POD4);
    // The first ends in the backlog, and its port is free again while the agent sleeps.
    lab.pod
        .run(|| std::fs::write("/proc/sys/net/ipv4/tcp_fin_timeout", "1"))
        .unwrap();
    drop(reused(&lab, POD4, 40_001, at(MESH4, 80)));
    // The kernel tells nobody when it drops a socket in FIN_WAIT2: it is asked again.
    let _second = reused(&lab, POD4, 40_001, at(MESH4, 81));
    for port in [80, 81] {
        let (stream, source) = agent.accept().unwrap();
        assert_eq!(source, at(POD4, 40_001));
        let record = lab.original(&stream).unwrap();
        assert_eq!(record.asked, endpoint(MESH4, port));
    }
}

/// The agent's end comes about with the first byte, not with the handshake: what a full
/// backlog does, too.
fn accepts_late(listener: &impl AsRawFd) {
    let seconds: libc::c_int = 60;
    // SAFETY: an open socket, and the kernel reads as many bytes as are told to be there.
    let result = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_DEFER_ACCEPT,
            (&raw const seconds).cast(),
            size_of_val(&seconds) as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

#[test]
fn record_waits_for_the_agents_end_as_long_as_the_applications_lives() {
    if !can_run("record_waits_for_the_agents_end_as_long_as_the_applications_lives") {
        return;
    }
    let lab = Lab::new();
    let agent = lab.agent(POD4);
    accepts_late(&agent);
    // One that never gets an end of the agent's.
    let first = reused(&lab, POD4, 40_001, at(MESH4, 80));
    assert_eq!(waiting(&lab), 1);
    abort(first);
    eventually("its record goes with it", || waiting(&lab) == 0);
    // The next one from its port gets one late, and its own record.
    let mut second = reused(&lab, POD4, 40_001, at(MESH4, 81));
    let other = lab.pod.connect(at(MESH4, 82)).unwrap();
    assert_eq!(waiting(&lab), 2);
    second.write_all(b"late").unwrap();
    let (stream, _) = agent.accept().unwrap();
    assert_eq!(lab.original(&stream).unwrap().asked, endpoint(MESH4, 81));
    assert_eq!(waiting(&lab), 1);
    // Whoever leaves takes along what is left.
    lab.datapath.withdraw(lab.cookie).unwrap();
    assert_eq!(waiting(&lab), 0);
    drop(other);
}

#[test]
fn handshake_by_cookie_has_its_record() {
    if !can_run("handshake_by_cookie_has_its_record") {
        return;
    }
    let lab = Lab::new();
    // Always, not only under a flood.
    lab.pod
        .run(|| std::fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2"))
        .unwrap();
    for (own, mesh) in [(POD4, MESH4), (POD6, MESH6)] {
        let agent = lab.agent(own);
        let app = reused(&lab, own, 40_001, at(mesh, 80));
        let (stream, _) = agent.accept().unwrap();
        let record = lab.original(&stream).unwrap();
        assert_eq!(
            (record.asked, record.cookie),
            (endpoint(mesh, 80), cookie(&app))
        );
    }
    let statistics = lab
        .pod
        .run(|| std::fs::read_to_string("/proc/thread-self/net/netstat"))
        .unwrap();
    let mut lines = statistics
        .lines()
        .filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let received = names.split(' ').position(|name| name == "SyncookiesRecv");
    let received = values.split(' ').nth(received.unwrap()).unwrap();
    assert_eq!(received, "2", "cookies that came back");
}

#[test]
fn connection_that_nobody_redirected_has_no_record() {
    if !can_run("connection_that_nobody_redirected_has_no_record") {
        return;
    }
    let lab = Lab::bare();
    let agent = lab.agent(POD4);
    // Dialled before the enrolment; afterwards `connect` refuses the port.
    let _early = lab.pod.connect(at(POD4, OUTBOUND)).unwrap();
    accepts_late(&agent);
    let mut halfway = lab.pod.connect(at(POD4, OUTBOUND)).unwrap();
    lab.install(0, &[(0, terms(&[]))]);
    lab.enrol();
    halfway.write_all(b"established after it").unwrap();
    for _ in 0..2 {
        let (stream, _) = agent.accept().unwrap();
        assert_eq!(lab.original(&stream), None);
    }
    // Nor has any other socket of the pod, the redirected one itself included.
    let mesh = ringfence_bpf_common::Workload {
        flags: ringfence_bpf_common::WORKLOAD_MESH,
    };
    lab.datapath.put_workload(MESH4.into(), mesh).unwrap();
    let mut redirected = lab.pod.connect(at(MESH4, 80)).unwrap();
    redirected.write_all(b"go").unwrap();
    let (stream, _) = agent.accept().unwrap();
    assert!(lab.original(&stream).is_some(), "the accept twin");
    assert_eq!(lab.original(&redirected), None);
    assert_eq!(lab.original(&agent), None);
}

#[test]
fn many_connections_in_the_backlog_keep_their_own_records() {
    if !can_run("many_connections_in_the_backlog_keep_their_own_records") {
        return;
    }
    let lab = Lab::new();
    let agent = lab.pod.run(|| {
        let socket = Socket::new(Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&at(POD4, OUTBOUND).into()).unwrap();
        socket.listen(4096).unwrap();
        socket
    });
    lab.pod
        .run(|| std::fs::write("/proc/sys/net/core/somaxconn", "4096"))
        .unwrap();
    lab.pod.run(|| agent.listen(4096)).unwrap();
    let apps: Vec<_> = (1..=500)
        .map(|port| lab.pod.connect(at(MESH4, port)).unwrap())
        .collect();
    for app in &apps {
        let (stream, _) = agent.accept().unwrap();
        let record = lab.original(&stream).expect("a record");
        // The backlog is a queue: they come in order.
        assert_eq!(
            record.asked,
            endpoint(MESH4, app.peer_addr().unwrap().port())
        );
    }
    assert_eq!((waiting(&lab), lab.counter("no_room")), (0, 0));
}
