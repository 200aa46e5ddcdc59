//! Records of original destinations: none is lost, none is left, none goes to another
//! connection.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    io::{ErrorKind, Read, Write},
    net::SocketAddr,
    time::Duration,
};

use socket2::{Domain, Socket};
use support::*;

fn bound(lab: &Lab, port: u16) -> Socket {
    let socket = lab.pod.socket(Domain::IPV4);
    socket.set_reuse_address(true).unwrap();
    socket.bind(&at(POD4, port).into()).unwrap();
    socket
}

#[test]
fn record_of_a_refused_connect_is_removed() {
    if !can_run("record_of_a_refused_connect_is_removed") {
        return;
    }
    let lab = Lab::new();
    let socket = bound(&lab, 40001);
    let refused = lab.pod.run(|| socket.connect(&at(MESH4, 80).into()));
    assert_eq!(errno(refused), libc::ECONNREFUSED);
    let record =
        lab.datapath
            .take_original_destination(lab.cookie, at(POD4, 40001), at(POD4, OUTBOUND));
    assert_eq!(record, None);
}

#[test]
fn record_of_an_aborted_connection_serves_nobody_and_is_removed() {
    if !can_run("record_of_an_aborted_connection_serves_nobody_and_is_removed") {
        return;
    }
    let lab = Lab::new();
    let agent = lab.agent(POD4);
    let take = || {
        lab.datapath
            .take_original_destination(lab.cookie, at(POD4, 40001), at(POD4, OUTBOUND))
    };
    let aborted = |port| {
        let socket = bound(&lab, 40001);
        lab.pod
            .run(|| socket.connect(&at(MESH4, port).into()))
            .unwrap();
        (&socket).write_all(b"for the first alone").unwrap();
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        drop(socket);
    };
    aborted(80);
    // Closing may wait for a process that another test has just forked; the RST tells.
    let (mut stream, _) = agent.accept().unwrap();
    while !matches!(stream.read(&mut [0; 64]), Err(e) if e.kind() == ErrorKind::ConnectionReset) {}
    assert_eq!(take(), None);

    // The port is used again while the first still waits in the backlog, with its bytes.
    aborted(80);
    let second = bound(&lab, 40001);
    lab.pod
        .run(|| second.connect(&at(MESH4, 81).into()))
        .unwrap();
    agent.accept().unwrap();
    assert_eq!(
        take(),
        None,
        "the record of the second, for the bytes of the first"
    );
    agent.accept().unwrap();
    assert_eq!(take(), None);

    // Nothing is left that the next one would suffer from.
    drop(second);
    let third = bound(&lab, 40002);
    lab.pod
        .run(|| third.connect(&at(MESH4, 81).into()))
        .unwrap();
    agent.accept().unwrap();
    let record =
        lab.datapath
            .take_original_destination(lab.cookie, at(POD4, 40002), at(POD4, OUTBOUND));
    assert_eq!(record.unwrap().asked, endpoint(MESH4, 81));
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
    let (mut stream, source) = agent.accept().unwrap();
    let mut received = String::new();
    stream.read_to_string(&mut received).unwrap();
    assert_eq!(received, "sent before the agent accepted");
    let local = stream.local_addr().unwrap();
    let record = lab
        .datapath
        .take_original_destination(lab.cookie, source, local)
        .unwrap();
    assert_eq!(record.asked, endpoint(MESH4, 80));
}

#[test]
fn record_that_two_connections_claim_serves_neither() {
    if !can_run("record_that_two_connections_claim_serves_neither") {
        return;
    }
    let lab = Lab::new();
    let agent = lab.agent(POD4);
    // The first ends in the backlog, and its port is free again while the agent sleeps.
    lab.pod
        .run(|| std::fs::write("/proc/sys/net/ipv4/tcp_fin_timeout", "1"))
        .unwrap();
    let first = bound(&lab, 40001);
    lab.pod
        .run(|| first.connect(&at(MESH4, 80).into()))
        .unwrap();
    drop(first);
    let _second = (0..200)
        .find_map(|_| {
            let second = bound(&lab, 40001);
            second.set_nonblocking(true).unwrap();
            match errno(lab.pod.run(|| second.connect(&at(MESH4, 81).into()))) {
                libc::EINPROGRESS => Some(second),
                // The kernel tells nobody when it drops a socket in FIN_WAIT2: ask again.
                libc::EADDRNOTAVAIL => {
                    std::thread::park_timeout(Duration::from_millis(50));
                    None
                }
                other => panic!("errno {other}"),
            }
        })
        .expect("the port is free again");
    let (_stream, source) = agent.accept().unwrap();
    assert_eq!(source, at(POD4, 40001));
    let record = lab
        .datapath
        .take_original_destination(lab.cookie, source, at(POD4, OUTBOUND));
    assert_eq!(record, None, "which of the two it is for, nobody can say");
    assert_eq!(lab.counter("no_room"), 1);
}

#[test]
fn unknown_connection_has_no_record() {
    if !can_run("unknown_connection_has_no_record") {
        return;
    }
    let lab = Lab::new();
    let source: SocketAddr = at(POD4, 4242);
    let listener = at(POD4, OUTBOUND);
    assert_eq!(
        lab.datapath
            .take_original_destination(lab.cookie, source, listener),
        None
    );
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
        let (_, source) = agent.accept().unwrap();
        let source = source.as_socket().unwrap();
        let record = lab
            .datapath
            .take_original_destination(lab.cookie, source, at(POD4, OUTBOUND))
            .expect("a record");
        // The backlog is a queue: they come in order.
        assert_eq!(
            record.asked,
            endpoint(MESH4, app.peer_addr().unwrap().port())
        );
    }
    assert_eq!(lab.counter("no_room"), 0);
}
