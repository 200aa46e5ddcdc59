//! Where a pod may connect to, and with which sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
};

use io_uring::{IoUring, opcode, types};

use ringfence_bpf_common::{
    Addr, Backend, HOOK_CONNECT, POD_READY, POD_REGISTRY_ONLY, Pod, Reason, Workload,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use support::*;

/// Switches the pod's outbound mode.
fn registry_only(lab: &Lab, on: bool) {
    let entry = Pod {
        flags: if on {
            POD_READY | POD_REGISTRY_ONLY
        } else {
            POD_READY
        },
        ..lab.entry()
    };
    lab.datapath.update_pod(lab.cookie, &entry).unwrap();
}

#[test]
fn registry_only_pod_connects_to_what_the_registry_knows_alone() {
    if !can_run("registry_only_pod_connects_to_what_the_registry_knows_alone") {
        return;
    }
    let lab = Lab::new();
    let any = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let _servers = [8080, 53].map(|port| lab.wire.listen(at(any, port)));
    let _own = lab.pod.listen(at(any, 9000));
    let _agent = lab.agent(any);
    let mut refused = 0;
    for (plain, mesh, vip, pod, loopback) in [
        (PLAIN4, MESH4, VIP4, POD4, IpAddr::V4(Ipv4Addr::LOCALHOST)),
        (PLAIN6, MESH6, VIP6, POD6, IpAddr::V6(Ipv6Addr::LOCALHOST)),
    ] {
        // Domain names over TCP, from a known service.
        let backend = Backend {
            endpoint: endpoint(plain, 53),
            flags: 0,
        };
        lab.datapath
            .put_service(endpoint(vip, 53), &[backend])
            .unwrap();
        for only in [false, true] {
            registry_only(&lab, only);
            let forms = [plain, mapped(plain)];
            for asked in forms {
                let outcome = lab.pod.connect(at(asked, 8080));
                if only {
                    assert_eq!(errno(outcome), libc::EPERM, "{asked}");
                    refused += 1;
                } else {
                    outcome.unwrap();
                }
            }
            for (known, port) in [
                (mesh, 8080),
                (mapped(mesh), 8080),
                (vip, 53),
                (mapped(vip), 53),
                (pod, 9000),
                (loopback, 9000),
                (mapped(loopback), 9000),
            ] {
                lab.pod
                    .connect(at(known, port))
                    .unwrap_or_else(|e| panic!("{known} port {port}, {only}: {e}"));
            }
        }
        // A known service, and a port that it does not have.
        assert_eq!(errno(lab.pod.connect(at(vip, 54))), libc::EPERM);
        refused += 1;
        // A workload outside the mesh that the registry knows.
        lab.datapath
            .put_workload(plain.into(), Workload { flags: 0 })
            .unwrap();
        lab.pod.connect(at(plain, 8080)).unwrap();
        lab.datapath.remove_workload(&plain.into()).unwrap();
    }
    assert_eq!(lab.counter("egress_refused"), refused);
    // Datagrams are not policed, and say so here.
    let datagram = lab
        .pod
        .run(|| Socket::new(Domain::IPV4, Type::DGRAM, None))
        .unwrap();
    lab.pod
        .run(|| datagram.connect(&at(PLAIN4, 8080).into()))
        .unwrap();
}

#[test]
fn refused_egress_is_an_event() {
    if !can_run("refused_egress_is_an_event") {
        return;
    }
    let lab = Lab::new();
    registry_only(&lab, true);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut events = lab.datapath.events().unwrap();
        for (own, unknown) in [(POD4, PLAIN4), (POD6, PLAIN6)] {
            lab.pod.connect(at(unknown, 8080)).unwrap_err();
            let event = events.next().await.unwrap();
            assert_eq!((event.netns, event.hook), (lab.cookie, HOOK_CONNECT));
            assert_eq!(event.reason, Reason::EgressRefused as u16);
            assert_eq!(event.source.addr, Addr::from(own));
            assert_eq!(event.destination, endpoint(unknown, 8080));
        }
    });
}

#[test]
fn enrolled_pod_gets_no_multipath_sockets() {
    if !can_run("enrolled_pod_gets_no_multipath_sockets") {
        return;
    }
    let lab = Lab::bare();
    let multipath = |domain| {
        lab.pod
            .run(|| Socket::new(domain, Type::STREAM, Some(Protocol::MPTCP)))
    };
    let Ok(old) = multipath(Domain::IPV4) else {
        eprintln!("SKIPPED: this kernel has no MPTCP");
        return;
    };
    lab.install(0, &[(0, terms(&[]))]);
    lab.enrol();
    let mesh = Workload {
        flags: ringfence_bpf_common::WORKLOAD_MESH,
    };
    lab.datapath.put_workload(MESH4.into(), mesh).unwrap();
    for domain in [Domain::IPV4, Domain::IPV6] {
        // What a kernel without it says: programs take TCP then.
        assert_eq!(errno(multipath(domain)), libc::EPROTONOSUPPORT);
        lab.pod
            .run(|| Socket::new(domain, Type::STREAM, Some(Protocol::TCP)))
            .unwrap();
    }
    assert_eq!(lab.counter("mptcp_refused"), 2);
    // One from before is shown to `connect` as the TCP socket inside it.
    let server = lab.wire.listen(at(MESH4, 8080));
    server.set_nonblocking(true).unwrap();
    let agent = lab.agent(POD4);
    lab.pod
        .run(|| old.connect(&at(MESH4, 8080).into()))
        .unwrap();
    let (stream, _) = agent.accept().unwrap();
    let record = lab.original(&stream).unwrap();
    assert_eq!(record.asked, endpoint(MESH4, 8080));
    assert!(server.accept().is_err(), "nothing arrived");
    assert_eq!(lab.counter("redirected"), 1);
    // Whoever is not enrolled gets what it asks for.
    lab.wire
        .run(|| Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)))
        .unwrap();
}

/// Connects by io_uring, which makes the system call's way inside the kernel without the
/// system call. The outcome is that of connect(2): 0, or an errno.
fn connect_by_ring(lab: &Lab, to: SocketAddr) -> Option<(Socket, i32)> {
    lab.pod.run(|| {
        let mut ring = match IoUring::new(2) {
            Ok(ring) => ring,
            Err(error) => {
                eprintln!("SKIPPED: no io_uring here: {error}");
                return None;
            }
        };
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
        let address = SockAddr::from(to);
        let connect = opcode::Connect::new(
            types::Fd(socket.as_raw_fd()),
            address.as_ptr().cast(),
            address.len(),
        )
        .build();
        // SAFETY: the address and the socket live until the completion has been awaited.
        unsafe { ring.submission().push(&connect) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        let result = ring.completion().next().unwrap().result();
        Some((socket, -result))
    })
}

#[test]
fn connect_by_io_uring_passes_the_same_hook() {
    if !can_run("connect_by_io_uring_passes_the_same_hook") {
        return;
    }
    let lab = Lab::new();
    let any = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let server = lab.wire.listen(at(any, 8080));
    let agent = lab.agent(any);
    for (mesh, plain) in [(MESH4, PLAIN4), (MESH6, PLAIN6)] {
        registry_only(&lab, false);
        let before = lab.counter("redirected");
        let Some((socket, outcome)) = connect_by_ring(&lab, at(mesh, 8080)) else {
            return;
        };
        assert_eq!(outcome, 0);
        agent.accept().unwrap();
        assert_eq!(lab.counter("redirected"), before + 1);
        assert_eq!(socket.peer_addr().unwrap(), at(mesh, 8080).into());
        let agent_port = connect_by_ring(&lab, at(mesh, INBOUND)).unwrap();
        assert_eq!(agent_port.1, libc::EPERM);
        // The twin: what is outside arrives there, and what is unknown does not leave.
        assert_eq!(connect_by_ring(&lab, at(plain, 8080)).unwrap().1, 0);
        let (_, source) = server.accept().unwrap();
        assert!([POD4, POD6].contains(&source.ip().to_canonical()));
        registry_only(&lab, true);
        let refused = connect_by_ring(&lab, at(plain, 8080)).unwrap();
        assert_eq!(refused.1, libc::EPERM);
    }
    server.set_nonblocking(true).unwrap();
    assert!(
        server.accept().is_err(),
        "nothing went to the mesh in plaintext"
    );
}
