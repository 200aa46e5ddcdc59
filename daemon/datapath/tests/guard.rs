//! The guard at the host side of a pod's veth: what it keeps from connections, how it gets
//! there and how it goes away. Its packets are in `guard_packets.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod frames;
mod support;

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    os::fd::AsFd,
    process::Command,
    time::Duration,
};

use aya::programs::{SchedClassifier, TcAttachType};
use frames::*;
use nix::sys::socket::{setsockopt, sockopt};
use ringfence_bpf_common::{
    AGENT_LAST_HOP, Addr, AgentSocket, Backend, HOOK_GUARD_FROM, HOOK_GUARD_TO, POD_READY,
    POD_REGISTRY_ONLY, Pod, Reason, WORKLOAD_MESH, Workload,
};
use ringfence_datapath::{Device, GuardHook, devices, netns_number, socket_cookie};
use ringfence_policies::{CompiledSet, TermMask};
use socket2::{Domain, Socket, Type};
use support::*;

const ALICE: u32 = 1;
#[test]
fn host_side_is_found_by_the_namespace_of_its_other_end() {
    if !can_run("host_side_is_found_by_the_namespace_of_its_other_end") {
        return;
    }
    let lab = Lab::bare();
    let inside = lab.pod.run(devices).unwrap();
    assert!(inside.iter().any(|d| d.loopback && d.kind.is_none()));
    let inside = inside.into_iter().find(|d| d.name == "eth0").unwrap();
    let outside = host_side(&lab);
    assert_eq!(outside.kind.as_deref(), Some("veth"));
    assert_eq!(
        (outside.peer, inside.peer),
        (Some(inside.index), Some(outside.index))
    );
    let namespace = |netns: &Netns| netns.run(|| File::open("/proc/thread-self/ns/net").unwrap());
    let (pod, stranger) = (namespace(&lab.pod), namespace(&Netns::new()));
    lab.wire.run(|| {
        assert_eq!(netns_number(pod.as_fd()).unwrap(), outside.peer_netns);
        assert!(outside.peer_netns.is_some());
        assert_eq!(netns_number(stranger.as_fd()).unwrap(), None);
    });
}

/// A last hop from `client` to `to`, which Alice is admitted to.
fn last_hop(lab: &Lab, client: IpAddr, to: SocketAddr) -> Socket {
    let socket = lab.pod.socket(Domain::for_address(to));
    setsockopt(&socket, sockopt::IpTransparent, &true).unwrap();
    socket.set_mark(0x111).unwrap();
    socket.bind(&at(client, 0).into()).unwrap();
    let entry = AgentSocket {
        role: AGENT_LAST_HOP,
        identity: ALICE,
        source: Addr::from(client),
    };
    let cookie = socket_cookie(socket.as_fd()).unwrap();
    let _registered = lab.datapath.register_socket(cookie, entry).unwrap();
    lab.pod
        .run(|| socket.connect_timeout(&to.into(), Duration::from_secs(3)))
        .unwrap();
    socket
}

#[test]
fn segments_from_the_wire_do_not_get_into_an_established_last_hop() {
    if !can_run("segments_from_the_wire_do_not_get_into_an_established_last_hop") {
        return;
    }
    for hook in std::iter::once(None).chain(hooks().iter().copied().map(Some)) {
        for (pod, client, ..) in families() {
            let lab = known_lab();
            lab.datapath
                .install_set(
                    SET,
                    &CompiledSet::default(),
                    &[(ALICE, TermMask::default())],
                )
                .unwrap();
            lab.route_last_hops();
            if let Some(hook) = hook {
                guard(&lab, hook);
            }
            let server = lab.pod.listen(at(pod, 8080));
            let mut inside = Wiretap::new(&lab.pod, None);
            let mut hop = last_hop(&lab, client, at(pod, 8080));
            let (mut application, from) = server.accept().unwrap();
            assert_eq!(from.ip(), client);

            let is = |frame: &[u8], wanted: (u16, u16, u8)| {
                tcp_header(frame).is_some_and(|(from, to, _, _, flags)| (from, to, flags) == wanted)
            };
            // The numbers as whoever watches the pod's loopback knows them.
            let answer =
                inside.wait_for("SYN-ACK", |frame| is(frame, (8080, from.port(), SYN | ACK)));
            let (_, _, theirs, ours, _) = tcp_header(&answer).unwrap();
            let segment = |flags| Segment {
                sequence: ours,
                acknowledged: theirs.wrapping_add(1),
                ..Segment::new((client, from.port()), (pod, 8080), flags)
            };
            let wire = Wiretap::new(&lab.wire, Some("eth0"));
            wire.send(&segment(ACK | PSH).with(b"evil").frame(true));
            let mut buffer = [0; 4];
            if hook.is_none() {
                application.read_exact(&mut buffer).unwrap();
                assert_eq!(&buffer, b"evil", "this is what the guard is for");
                let mut reset = segment(RST);
                reset.sequence = reset.sequence.wrapping_add(4);
                wire.send(&reset.frame(true));
                let error = application.read_exact(&mut buffer).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                continue;
            }
            wire.send(&segment(RST).frame(true));
            wire.send(&segment(FIN | ACK).frame(true));
            eventually("all three are dropped", || {
                lab.counter("guard_injected_segment") == 3
            });
            hop.write_all(b"good").unwrap();
            application.read_exact(&mut buffer).unwrap();
            assert_eq!(&buffer, b"good");
            application.write_all(b"fine").unwrap();
            hop.read_exact(&mut buffer).unwrap();
            assert_eq!(&buffer, b"fine");
        }
    }
}

#[test]
fn answers_to_admitted_plaintext_leave() {
    if !can_run("answers_to_admitted_plaintext_leave") {
        return;
    }
    for (pod, mesh, plain, _) in families() {
        let lab = known_lab();
        guard(&lab, GuardHook::of_this_kernel());
        let entry = Pod {
            flags: POD_READY | POD_REGISTRY_ONLY,
            ..lab.entry()
        };
        lab.datapath.update_pod(lab.cookie, &entry).unwrap();
        let server = lab.pod.listen(at(pod, 8080));
        // One that is in the mesh and one that the registry does not know.
        for client in [mesh, plain] {
            let mut stream = lab
                .wire
                .run(|| {
                    let socket =
                        Socket::new(Domain::for_address(at(client, 0)), Type::STREAM, None)?;
                    socket.bind(&at(client, 0).into())?;
                    socket.connect_timeout(&at(pod, 8080).into(), Duration::from_secs(3))?;
                    Ok::<_, std::io::Error>(TcpStream::from(socket))
                })
                .unwrap();
            let (mut application, _) = server.accept().unwrap();
            let answer = vec![7; 100_000];
            let expected = answer.clone();
            let writer = std::thread::spawn(move || {
                application.write_all(&answer).unwrap();
            });
            let mut read = Vec::new();
            stream.read_to_end(&mut read).unwrap();
            assert!(read == expected);
            writer.join().unwrap();
        }
        assert!(DROPS.iter().all(|name| lab.counter(name) == 0));
    }
}

#[test]
fn connection_from_before_the_enrolment_brings_no_more_data_out() {
    if !can_run("connection_from_before_the_enrolment_brings_no_more_data_out") {
        return;
    }
    for guarded in [true, false] {
        let lab = Lab::bare();
        let server = lab.wire.listen(at(MESH4, 8080));
        let mut app = lab.pod.connect(at(MESH4, 8080)).unwrap();
        let (mut peer, _) = server.accept().unwrap();
        let mesh = Workload {
            flags: WORKLOAD_MESH,
        };
        lab.datapath.put_workload(MESH4.into(), mesh).unwrap();
        lab.enrol();
        if guarded {
            guard(&lab, GuardHook::of_this_kernel());
        }
        app.write_all(b"secret").unwrap();
        if guarded {
            eventually("the data is dropped", || {
                lab.counter("guard_plaintext_to_mesh") > 0
            });
            peer.set_nonblocking(true).unwrap();
            let error = peer.read(&mut [0; 6]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
        } else {
            let mut buffer = [0; 6];
            peer.read_exact(&mut buffer).unwrap();
            assert_eq!(&buffer, b"secret");
        }
    }
}

/// Programs at the host side: from the pod and to it.
fn attached(lab: &Lab, hook: GuardHook) -> (usize, usize) {
    lab.wire.run(|| match hook {
        GuardHook::Tcx => {
            let on = |kind| SchedClassifier::query_tcx("eth0", kind).unwrap().1.len();
            (on(TcAttachType::Ingress), on(TcAttachType::Egress))
        }
        GuardHook::Clsact => {
            let on = |side| {
                let output = Command::new("tc")
                    .args(["filter", "show", "dev", "eth0", side])
                    .output()
                    .unwrap();
                String::from_utf8_lossy(&output.stdout)
                    .matches("handle 0x52460001")
                    .count()
            };
            (on("ingress"), on("egress"))
        }
    })
}

#[test]
fn restarted_agent_takes_the_guard_over_and_removal_leaves_nothing() {
    if !can_run("restarted_agent_takes_the_guard_over_and_removal_leaves_nothing") {
        return;
    }
    for &hook in hooks() {
        let mut lab = known_lab();
        assert_eq!(attached(&lab, hook), (0, 0));
        for _ in 0..3 {
            guard(&lab, hook);
            guard(&lab, hook);
            assert_eq!(attached(&lab, hook), (1, 1), "{hook:?}");
            lab.restart();
            assert_eq!(attached(&lab, hook), (1, 1), "without an agent, {hook:?}");
        }
        let syn = Segment::new((POD4, 4000), (MESH4, 8080), SYN).frame(false);
        assert_eq!(
            Bench::new(&lab, false).verdict(&syn),
            "guard_plaintext_to_mesh",
            "by the pinned programs alone"
        );
        lab.wire.run(|| lab.datapath.withdraw(lab.cookie)).unwrap();
        assert_eq!(attached(&lab, hook), (0, 0), "withdrawn, {hook:?}");
        assert_eq!(Bench::new(&lab, false).verdict(&syn), "passes");
        lab.enrol();
        guard(&lab, hook);
        assert_eq!(attached(&lab, hook), (1, 1));
        lab.wire
            .run(|| ringfence_datapath::remove(lab.pin_dir()))
            .unwrap();
        assert_eq!(attached(&lab, hook), (0, 0), "uninstalled, {hook:?}");
    }
}

#[test]
fn filters_that_removal_cannot_find_let_everything_pass() {
    if !can_run("filters_that_removal_cannot_find_let_everything_pass") {
        return;
    }
    let lab = known_lab();
    guard(&lab, GuardHook::Clsact);
    let syn = Segment::new((POD4, 4000), (MESH4, 8080), SYN).frame(false);
    assert_eq!(
        Bench::new(&lab, false).verdict(&syn),
        "guard_plaintext_to_mesh"
    );
    // Not in the namespace of the devices.
    ringfence_datapath::remove(lab.pin_dir()).unwrap();
    assert_eq!(attached(&lab, GuardHook::Clsact), (1, 1));
    assert_eq!(Bench::new(&lab, false).verdict(&syn), "passes");
}

#[test]
fn filters_that_somebody_removed_are_put_back() {
    if !can_run("filters_that_somebody_removed_are_put_back") {
        return;
    }
    let lab = known_lab();
    guard(&lab, GuardHook::Clsact);
    lab.wire.run(|| {
        let status = Command::new("tc")
            .args(["qdisc", "del", "dev", "eth0", "clsact"])
            .status()
            .unwrap();
        assert!(status.success());
    });
    assert_eq!(attached(&lab, GuardHook::Clsact), (0, 0));
    guard(&lab, GuardHook::Clsact);
    assert_eq!(attached(&lab, GuardHook::Clsact), (1, 1));
}

#[test]
fn device_that_is_gone_is_an_error_and_leaves_a_pod_that_can_be_withdrawn() {
    if !can_run("device_that_is_gone_is_an_error_and_leaves_a_pod_that_can_be_withdrawn") {
        return;
    }
    for &hook in hooks() {
        let lab = known_lab();
        guard(&lab, hook);
        let gone = host_side(&lab);
        lab.wire.ip("link del eth0");
        let other = Device {
            index: gone.index + 1000,
            ..gone
        };
        lab.wire
            .run(|| lab.datapath.guard(lab.cookie, &other, hook))
            .unwrap_err();
        lab.wire.run(|| lab.datapath.withdraw(lab.cookie)).unwrap();
    }
}

#[test]
fn service_with_a_backend_is_reached_by_connect_and_not_by_its_address() {
    if !can_run("service_with_a_backend_is_reached_by_connect_and_not_by_its_address") {
        return;
    }
    let lab = known_lab();
    guard(&lab, GuardHook::of_this_kernel());
    let backend = Backend {
        endpoint: endpoint(PLAIN4, 8080),
        flags: 0,
    };
    lab.datapath
        .put_service(endpoint(VIP4, 80), &[backend])
        .unwrap();
    let server = lab.wire.listen(at(PLAIN4, 8080));
    lab.pod.connect(at(VIP4, 80)).unwrap();
    server.accept().unwrap();
    // Whatever translates addresses behind the guard might choose a workload of the mesh.
    let syn = Segment::new((POD4, 4000), (VIP4, 80), SYN).frame(false);
    let verdict = Bench::new(&lab, false).verdict(&syn);
    assert_eq!(verdict, "guard_plaintext_to_mesh");
    let elsewhere = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 9));
    let syn = Segment::new((POD4, 4000), (elsewhere, 80), SYN).frame(false);
    assert_eq!(Bench::new(&lab, false).verdict(&syn), "passes");
}

#[test]
fn drops_are_reported_and_a_flood_of_them_is_not() {
    if !can_run("drops_are_reported_and_a_flood_of_them_is_not") {
        return;
    }
    const FLOOD: u64 = 1000;
    let lab = known_lab();
    guard(&lab, GuardHook::of_this_kernel());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut events = lab.datapath.events().unwrap();
        let out = Wiretap::new(&lab.pod, Some("eth0"));
        out.send(&Segment::new((POD4, 4000), (MESH4, 8080), SYN).frame(false));
        let event = events.next().await.unwrap();
        assert_eq!((event.netns, event.hook), (lab.cookie, HOOK_GUARD_FROM));
        assert_eq!(event.reason, Reason::PlaintextToMesh as u16);
        assert_eq!(event.source, endpoint(POD4, 4000));
        assert_eq!(event.destination, endpoint(MESH4, 8080));
        // Longer than the pause between two reports.
        eventually("a report of the other direction", || {
            let wire = Wiretap::new(&lab.wire, Some("eth0"));
            wire.send(&Segment::new((POD6, 4000), (POD6, 8080), SYN).frame(true));
            events.try_next().is_some_and(|event| {
                (event.hook, event.reason) == (HOOK_GUARD_TO, Reason::OwnAddressFromWire as u16)
            })
        });
        let before = lab.counter("guard_plaintext_to_mesh");
        let frame = Segment::new((POD4, 4000), (MESH4, 8080), SYN).frame(false);
        (0..FLOOD).for_each(|_| out.send(&frame));
        eventually("all are dropped and counted", || {
            lab.counter("guard_plaintext_to_mesh") == before + FLOOD
        });
        let reported = std::iter::from_fn(|| events.try_next()).count();
        assert!(reported < FLOOD as usize / 2, "{reported} reports");
        assert_eq!(lab.counter("events_lost"), 0);
    });
}
