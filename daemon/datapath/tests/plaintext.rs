//! Plaintext connections that are there already, when policy or the mesh changes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod frames;
mod support;

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use frames::*;
use ringfence_bpf_common::{
    POD_READY, POD_REGISTRY_ONLY, Pod, SET_STRICT, WORKLOAD_MESH, Workload,
};
use ringfence_datapath::{Ended, GuardHook, SocketDiag};
use ringfence_policies::CompiledSet;
use socket2::{Domain, Socket, Type};
use support::*;

const STRICT_SET: u32 = 9;

/// From an address of the wire.
fn connect_from(lab: &Lab, from: IpAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    lab.wire.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.bind(&at(from, 0).into())?;
        socket.connect_timeout(&to.into(), Duration::from_secs(3))?;
        Ok(TcpStream::from(socket))
    })
}

/// Ends what is refused by `admits`, with the tables settled first.
fn end(lab: &Lab, admits: impl Fn(SocketAddr, SocketAddr) -> bool) -> Ended {
    let mut sockets = lab.pod.run(SocketDiag::open).unwrap();
    lab.datapath.settle().unwrap();
    lab.datapath
        .end_refused(&mut sockets, lab.cookie, admits)
        .unwrap()
}

/// Points the pod at a set that refuses plaintext, as the agent does.
fn strict(lab: &Lab) {
    let mut set = CompiledSet::default();
    set.flags = SET_STRICT;
    lab.datapath.install_set(STRICT_SET, &set, &[]).unwrap();
    let entry = Pod {
        policy_set: STRICT_SET,
        ..lab.entry()
    };
    lab.datapath.update_pod(lab.cookie, &entry).unwrap();
}

fn works(one: &mut TcpStream, other: &mut TcpStream) {
    carries(one, other);
    carries(other, one);
}

fn carries(from: &mut TcpStream, to: &mut TcpStream) {
    let mut buffer = [0; 4];
    from.write_all(b"ping").unwrap();
    to.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"ping");
}

fn read_error(stream: &mut TcpStream) -> ErrorKind {
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    stream.read(&mut [0; 1]).unwrap_err().kind()
}

#[test]
fn inbound_connection_ends_when_policy_admits_it_no_more_and_only_then() {
    if !can_run("inbound_connection_ends_when_policy_admits_it_no_more_and_only_then") {
        return;
    }
    let lab = Lab::new();
    let server = lab.pod.listen(at(Ipv6Addr::UNSPECIFIED.into(), 8080));
    for (pod, refused, admitted) in [(POD4, PLAIN4, MESH4), (POD6, PLAIN6, MESH6)] {
        let connect = |from| {
            let client = connect_from(&lab, from, at(pod, 8080)).unwrap();
            (client, server.accept().unwrap().0)
        };
        let (mut client, mut application) = connect(refused);
        let (mut twin_client, mut twin) = connect(admitted);
        assert_eq!(end(&lab, |_, _| true), Ended::default());
        works(&mut client, &mut application);
        let ended = end(&lab, |source, destination| {
            assert_eq!(destination, at(pod, 8080));
            source.ip() != refused
        });
        assert_eq!((ended.inbound, ended.outbound), (1, 0));
        assert_eq!(read_error(&mut application), ErrorKind::ConnectionAborted);
        assert_eq!(read_error(&mut client), ErrorKind::ConnectionReset);
        works(&mut twin_client, &mut twin);
        drop((twin_client, twin));
    }
}

#[test]
fn connection_that_waits_to_be_accepted_or_completed_ends_too() {
    if !can_run("connection_that_waits_to_be_accepted_or_completed_ends_too") {
        return;
    }
    let lab = Lab::new();
    set_hardware_addresses(&lab.pod, &lab.wire);
    let server = lab.pod.listen(at(POD4, 8080));
    let mut waiting = connect_from(&lab, PLAIN4, at(POD4, 8080)).unwrap();
    // A handshake that stops in the middle: nobody has that address.
    let nobody = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 99));
    lab.pod
        .ip("neigh add 10.77.0.99 lladdr 02:00:00:00:00:01 dev eth0");
    let mut wire = Wiretap::new(&lab.wire, Some("eth0"));
    let syn = Segment::new((nobody, 4000), (POD4, 8080), SYN);
    wire.send(&syn.frame(true));
    let answer = wire.wait_for("SYN-ACK", |frame| {
        tcp_header(frame).is_some_and(|(from, to, ..)| (from, to) == (8080, 4000))
    });
    let (_, _, theirs, ours, _) = tcp_header(&answer).unwrap();

    strict(&lab);
    assert_eq!(end(&lab, |_, _| false).inbound, 2);
    assert_eq!(read_error(&mut waiting), ErrorKind::ConnectionReset);
    // The rest of the handshake finds nothing.
    let rest = Segment {
        sequence: ours,
        acknowledged: theirs.wrapping_add(1),
        ..Segment::new((nobody, 4000), (POD4, 8080), ACK | PSH)
    };
    wire.send(&rest.with(b"late").frame(true));
    wire.wait_for("RST", |frame| {
        tcp_header(frame)
            .is_some_and(|(from, to, _, _, flags)| (from, to, flags & RST) == (8080, 4000, RST))
    });
    assert_eq!(end(&lab, |_, _| false), Ended::default());
    server.set_nonblocking(true).unwrap();
    // The kernel may hand out the dead connection; it must not hand out a living one.
    while let Ok((mut stream, _)) = server.accept() {
        assert_eq!(read_error(&mut stream), ErrorKind::ConnectionAborted);
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn no_connection_of_a_burst_survives_a_swap_that_refuses_it() {
    if !can_run("no_connection_of_a_burst_survives_a_swap_that_refuses_it") {
        return;
    }
    const ROUNDS: usize = 10;
    const CLIENTS: usize = 4;
    let lab = Lab::new();
    let server = lab.pod.listen(at(POD4, 8080));
    let accepted = Mutex::new(Vec::new());
    let stop = AtomicBool::new(false);
    let (mut made, mut refused) = (0, 0);
    thread::scope(|scope| {
        // Also if an assertion fails: the scope waits for its threads.
        let _stop = StopOnDrop(&stop);
        scope.spawn(|| {
            server.set_nonblocking(true).unwrap();
            while !stop.load(Ordering::Relaxed) {
                match server.accept() {
                    Ok((stream, _)) => accepted.lock().unwrap().push(stream),
                    Err(_) => thread::yield_now(),
                }
            }
        });
        for _ in 0..ROUNDS {
            lab.datapath.update_pod(lab.cookie, &lab.entry()).unwrap();
            let swapped = AtomicBool::new(false);
            let burst: Vec<TcpStream> = thread::scope(|scope| {
                let client = || {
                    lab.wire.run(|| {
                        let mut streams = Vec::new();
                        let mut refusals = 0;
                        while !swapped.load(Ordering::Relaxed) {
                            match TcpStream::connect(at(POD4, 8080)) {
                                Ok(stream) => streams.push(stream),
                                Err(_) => refusals += 1,
                            }
                        }
                        (streams, refusals)
                    })
                };
                let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
                eventually("the burst has begun", || {
                    accepted.lock().unwrap().len() > 20
                });
                strict(&lab);
                let ended = end(&lab, |_, _| false);
                assert!(ended.inbound > 0);
                swapped.store(true, Ordering::Relaxed);
                let outcomes = clients.into_iter().map(|client| client.join().unwrap());
                outcomes
                    .flat_map(|(streams, refusals)| {
                        refused += refusals;
                        streams
                    })
                    .collect()
            });
            made += burst.len();
            for mut stream in burst {
                // Where the server's end was ended before it was established, the client
                // hears of it when it says something.
                if stream.write_all(b"x").is_ok() {
                    let error = read_error(&mut stream);
                    assert_eq!(error, ErrorKind::ConnectionReset, "a connection survived");
                }
            }
            accepted.lock().unwrap().clear();
        }
    });
    assert!(
        made > ROUNDS && refused > 0,
        "{made} made, {refused} refused"
    );
}

#[test]
fn outbound_connection_ends_when_its_destination_is_in_the_mesh() {
    if !can_run("outbound_connection_ends_when_its_destination_is_in_the_mesh") {
        return;
    }
    let lab = Lab::bare();
    let servers = [MESH4, PLAIN4, MESH6, PLAIN6].map(|address| lab.wire.listen(at(address, 8080)));
    let mut pairs = servers.iter().map(|server| {
        let app = lab.pod.connect(server.local_addr().unwrap()).unwrap();
        (app, server.accept().unwrap().0)
    });
    let mut old: Vec<_> = pairs.by_ref().collect();
    let mesh = Workload {
        flags: WORKLOAD_MESH,
    };
    for address in [MESH4, MESH6] {
        lab.datapath.put_workload(address.into(), mesh).unwrap();
    }
    lab.install(0, &[(0, terms(&[]))]);
    lab.enrol();
    assert_eq!(end(&lab, |_, _| true).outbound, 2, "made before enrolment");
    for (index, (app, peer)) in old.iter_mut().enumerate() {
        if index % 2 == 0 {
            assert_eq!(read_error(app), ErrorKind::ConnectionAborted);
            assert_eq!(read_error(peer), ErrorKind::ConnectionReset);
        } else {
            works(app, peer);
        }
    }
    // One that is in the mesh from now on.
    lab.datapath.put_workload(PLAIN4.into(), mesh).unwrap();
    assert_eq!(end(&lab, |_, _| true).outbound, 1);
    assert_eq!(read_error(&mut old[1].0), ErrorKind::ConnectionAborted);
    let (app, peer) = &mut old[3];
    works(app, peer);
}

#[test]
fn connect_that_is_under_way_at_enrolment_comes_to_nothing() {
    if !can_run("connect_that_is_under_way_at_enrolment_comes_to_nothing") {
        return;
    }
    for guarded in [true, false] {
        let lab = Lab::bare();
        // Somebody who does not answer yet: the SYN is sent again and again.
        let silent = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 88));
        // In this order: a device that changes its address forgets all neighbours, and a SYN
        // that waits for one comes to its end after three seconds.
        set_hardware_addresses(&lab.pod, &lab.wire);
        lab.pod
            .ip("neigh add 10.77.0.88 lladdr 02:00:00:00:00:01 dev eth0");
        lab.install(0, &[(0, terms(&[]))]);
        if guarded {
            // It lets everything pass until the pod is enrolled.
            guard(&lab, GuardHook::of_this_kernel());
        }
        let app = lab.pod.socket(Domain::IPV4);
        app.set_nonblocking(true).unwrap();
        let begun = lab.pod.run(|| app.connect(&at(silent, 8080).into()));
        assert_eq!(errno(begun), libc::EINPROGRESS);
        let mesh = Workload {
            flags: WORKLOAD_MESH,
        };
        lab.datapath.put_workload(silent.into(), mesh).unwrap();
        lab.enrol();
        // Before the address is there: a SYN that found nobody would be answered by a reset.
        let server = lab.wire.socket(Domain::IPV4);
        server.set_freebind_v4(true).unwrap();
        server.bind(&at(silent, 8080).into()).unwrap();
        server.listen(1).unwrap();
        server.set_nonblocking(true).unwrap();
        lab.wire.ip("addr add 10.77.0.88/24 dev eth0");
        if guarded {
            eventually("the SYN that is sent again is dropped", || {
                lab.counter("guard_plaintext_to_mesh") > 0
            });
            assert!(server.accept().is_err());
        } else {
            eventually("it arrives", || server.accept().is_ok());
        }
        assert_eq!(end(&lab, |_, _| true).outbound, 1);
        let error = app.take_error().unwrap().unwrap();
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
    }
}

#[test]
fn registry_only_ends_what_the_registry_does_not_know() {
    if !can_run("registry_only_ends_what_the_registry_does_not_know") {
        return;
    }
    let lab = Lab::new();
    for (known, unknown) in [
        (PLAIN4, IpAddr::V4(Ipv4Addr::new(10, 77, 0, 7))),
        (PLAIN6, "fd77::7".parse().unwrap()),
    ] {
        let family = if unknown.is_ipv4() {
            "/24"
        } else {
            "/64 nodad"
        };
        lab.wire.ip(&format!("addr add {unknown}{family} dev eth0"));
        let flags = Workload { flags: 0 };
        lab.datapath.put_workload(known.into(), flags).unwrap();
        let mut pairs = [known, unknown].map(|address| {
            let server = lab.wire.listen(at(address, 8080));
            let app = lab.pod.connect(at(address, 8080)).unwrap();
            (app, server.accept().unwrap().0)
        });
        assert_eq!(end(&lab, |_, _| true), Ended::default());
        let entry = Pod {
            flags: POD_READY | POD_REGISTRY_ONLY,
            ..lab.entry()
        };
        lab.datapath.update_pod(lab.cookie, &entry).unwrap();
        assert_eq!(end(&lab, |_, _| true).outbound, 1);
        assert_eq!(read_error(&mut pairs[1].0), ErrorKind::ConnectionAborted);
        let (app, peer) = &mut pairs[0];
        works(app, peer);
        lab.datapath.update_pod(lab.cookie, &lab.entry()).unwrap();
    }
}

#[test]
fn older_inbound_connections_are_known_by_their_listener() {
    if !can_run("older_inbound_connections_are_known_by_their_listener") {
        return;
    }
    let lab = Lab::bare();
    let server = lab.pod.listen(at(Ipv6Addr::UNSPECIFIED.into(), 8080));
    let mut client = connect_from(&lab, PLAIN4, at(POD4, 8080)).unwrap();
    let (mut application, _) = server.accept().unwrap();
    // Outbound, to a port that the pod has a listener on as well: the local one counts.
    let outside = lab.wire.listen(at(PLAIN4, 8080));
    let mut app = lab.pod.connect(at(PLAIN4, 8080)).unwrap();
    let (mut peer, _) = outside.accept().unwrap();
    lab.install(0, &[(0, terms(&[]))]);
    lab.enrol();
    assert_eq!(end(&lab, |_, _| true), Ended::default());
    strict(&lab);
    let ended = end(&lab, |_, _| false);
    assert_eq!((ended.inbound, ended.outbound), (1, 0));
    assert_eq!(read_error(&mut client), ErrorKind::ConnectionReset);
    assert_eq!(read_error(&mut application), ErrorKind::ConnectionAborted);
    works(&mut app, &mut peer);
}

#[test]
fn what_stays_inside_the_pod_and_tunnels_are_left_alone() {
    if !can_run("what_stays_inside_the_pod_and_tunnels_are_left_alone") {
        return;
    }
    let lab = Lab::new();
    let any = Ipv6Addr::UNSPECIFIED.into();
    let mut pairs = Vec::new();
    let server = lab.pod.listen(at(any, 8080));
    for to in [
        at(POD4, 8080),
        at(POD6, 8080),
        at(Ipv4Addr::LOCALHOST.into(), 8080),
    ] {
        let app = lab.pod.connect(to).unwrap();
        pairs.push((app, server.accept().unwrap().0));
    }
    // Redirected: the agent's listener takes it.
    let agent = lab.agent(POD4);
    let app = lab.pod.connect(at(MESH4, 80)).unwrap();
    pairs.push((app, agent.accept().unwrap().0));
    // A tunnel from elsewhere.
    let tunnels = lab.pod.listen(at(POD4, INBOUND));
    let peer = connect_from(&lab, MESH4, at(POD4, INBOUND)).unwrap();
    pairs.push((peer, tunnels.accept().unwrap().0));
    strict(&lab);
    assert_eq!(end(&lab, |_, _| false), Ended::default());
    for (one, other) in &mut pairs {
        works(one, other);
    }
}

#[test]
fn held_pod_keeps_no_plaintext_from_the_wire() {
    if !can_run("held_pod_keeps_no_plaintext_from_the_wire") {
        return;
    }
    let lab = Lab::new();
    let server = lab.pod.listen(at(POD4, 8080));
    let mut client = connect_from(&lab, PLAIN4, at(POD4, 8080)).unwrap();
    let _application = server.accept().unwrap();
    let held = Pod {
        flags: 0,
        ..lab.entry()
    };
    lab.datapath.update_pod(lab.cookie, &held).unwrap();
    assert_eq!(end(&lab, |_, _| true).inbound, 1);
    assert_eq!(read_error(&mut client), ErrorKind::ConnectionReset);
}
