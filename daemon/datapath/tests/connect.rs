//! Connects of applications, observed from both ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ringfence_bpf_common::{Backend, WORKLOAD_MESH, WORKLOAD_REFUSE, Workload};
use socket2::Domain;
use support::*;

/// Connects to `asked` and checks what the application, the agent and the record say.
fn redirected(lab: &Lab, listener: IpAddr, asked: SocketAddr, backend: SocketAddr) {
    let agent = lab.agent(listener);
    let before = lab.counter("redirected");
    let app = lab.pod.connect(asked).unwrap();
    let (stream, _) = agent.accept().unwrap();
    assert_eq!(
        app.peer_addr().unwrap(),
        asked,
        "getpeername names what was asked for"
    );
    let own = if asked.ip().to_canonical().is_ipv4() {
        POD4
    } else {
        POD6
    };
    assert_eq!(
        app.local_addr().unwrap().ip().to_canonical(),
        own,
        "getsockname is the pod's"
    );
    let record = lab.original(&stream).unwrap();
    assert_eq!(record.asked, endpoint(asked.ip(), asked.port()));
    assert_eq!(record.backend, endpoint(backend.ip(), backend.port()));
    let cookie = ringfence_datapath::socket_cookie(std::os::fd::AsFd::as_fd(&app)).unwrap();
    assert_eq!(record.cookie, cookie);
    assert_eq!(lab.counter("redirected"), before + 1);
    assert_eq!(lab.original(&app), None, "the accepted end alone has it");
}

#[test]
fn mesh_destination_is_redirected_and_its_original_recovered() {
    if !can_run("mesh_destination_is_redirected_and_its_original_recovered") {
        return;
    }
    let lab = Lab::new();
    redirected(&lab, POD4, at(MESH4, 80), at(MESH4, 80));
    redirected(&lab, POD6, at(MESH6, 80), at(MESH6, 80));
    redirected(&lab, POD4, at(mapped(MESH4), 80), at(MESH4, 80));
    // A dual-stack listener sees IPv4 in mapped form: the same record.
    let any = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    redirected(&lab, any, at(MESH4, 80), at(MESH4, 80));
    redirected(&lab, any, at(mapped(MESH4), 80), at(MESH4, 80));
    redirected(&lab, any, at(MESH6, 80), at(MESH6, 80));
}

#[test]
fn service_with_a_mesh_backend_is_redirected_with_the_backend_chosen() {
    if !can_run("service_with_a_mesh_backend_is_redirected_with_the_backend_chosen") {
        return;
    }
    let lab = Lab::new();
    for (vip, backend, own) in [(VIP4, MESH4, POD4), (VIP6, MESH6, POD6)] {
        let backends = [Backend {
            endpoint: endpoint(backend, 8080),
            flags: WORKLOAD_MESH,
        }];
        lab.datapath
            .put_service(endpoint(vip, 80), &backends)
            .unwrap();
        redirected(&lab, own, at(vip, 80), at(backend, 8080));
    }
    redirected(&lab, POD4, at(mapped(VIP4), 80), at(MESH4, 8080));
}

#[test]
fn destination_outside_the_mesh_is_reached_directly() {
    if !can_run("destination_outside_the_mesh_is_reached_directly") {
        return;
    }
    let lab = Lab::new();
    for (asked, listener) in [(PLAIN4, PLAIN4), (PLAIN6, PLAIN6), (mapped(PLAIN4), PLAIN4)] {
        let server = lab.wire.listen(at(listener, 8080));
        let app = lab.pod.connect(at(asked, 8080)).unwrap();
        let (_, source) = server.accept().unwrap();
        assert_eq!(app.peer_addr().unwrap(), at(asked, 8080));
        assert_eq!(source.ip(), if listener.is_ipv4() { POD4 } else { POD6 });
    }
    assert_eq!((lab.counter("direct"), lab.counter("redirected")), (3, 0));
}

#[test]
fn service_with_a_plain_backend_is_connected_directly_and_named_as_asked() {
    if !can_run("service_with_a_plain_backend_is_connected_directly_and_named_as_asked") {
        return;
    }
    let lab = Lab::new();
    for (asked, vip, backend) in [
        (VIP4, VIP4, PLAIN4),
        (VIP6, VIP6, PLAIN6),
        (mapped(VIP4), VIP4, PLAIN4),
    ] {
        let server = lab.wire.listen(at(backend, 8080));
        let backends = [Backend {
            endpoint: endpoint(backend, 8080),
            flags: 0,
        }];
        lab.datapath
            .put_service(endpoint(vip, 80), &backends)
            .unwrap();
        let app = lab.pod.connect(at(asked, 80)).unwrap();
        server.accept().unwrap();
        assert_eq!(app.peer_addr().unwrap(), at(asked, 80));
    }
    assert_eq!(lab.counter("direct"), 3);
}

#[test]
fn every_backend_of_a_service_is_chosen_sometimes() {
    if !can_run("every_backend_of_a_service_is_chosen_sometimes") {
        return;
    }
    let lab = Lab::new();
    let servers = [8081, 8082, 8083].map(|port| lab.wire.listen(at(PLAIN4, port)));
    let backends = [8081, 8082, 8083].map(|port| Backend {
        endpoint: endpoint(PLAIN4, port),
        flags: 0,
    });
    lab.datapath
        .put_service(endpoint(VIP4, 80), &backends)
        .unwrap();
    // A backend that is never chosen in 100 tries: probability 3 * (2/3)^100 < 10^-16.
    let apps: Vec<_> = (0..100)
        .map(|_| lab.pod.connect(at(VIP4, 80)).unwrap())
        .collect();
    for server in servers {
        server.set_nonblocking(true).unwrap();
        server.accept().expect("this backend was chosen");
    }
    drop(apps);
}

#[test]
fn service_follows_its_changes() {
    if !can_run("service_follows_its_changes") {
        return;
    }
    let lab = Lab::new();
    let (first, second) = (
        lab.wire.listen(at(PLAIN4, 8081)),
        lab.wire.listen(at(PLAIN4, 8082)),
    );
    let vip = endpoint(VIP4, 80);
    let to = |port| Backend {
        endpoint: endpoint(PLAIN4, port),
        flags: 0,
    };
    lab.datapath
        .put_service(vip, &[to(8081), to(8081)])
        .unwrap();
    lab.pod.connect(at(VIP4, 80)).unwrap();
    first.accept().unwrap();
    lab.datapath.put_service(vip, &[to(8082)]).unwrap();
    lab.pod.connect(at(VIP4, 80)).unwrap();
    second.accept().unwrap();
    assert_eq!(lab.datapath.services().unwrap(), [vip]);
    lab.datapath.remove_service(&vip).unwrap();
    assert!(lab.datapath.services().unwrap().is_empty());
    assert!(
        lab.pod.connect(at(VIP4, 80)).is_err(),
        "the address is nobody's now"
    );
}

#[test]
fn service_without_endpoint_is_refused() {
    if !can_run("service_without_endpoint_is_refused") {
        return;
    }
    let lab = Lab::new();
    for (asked, vip) in [(VIP4, VIP4), (VIP6, VIP6), (mapped(VIP4), VIP4)] {
        lab.datapath.put_service(endpoint(vip, 80), &[]).unwrap();
        assert_eq!(errno(lab.pod.connect(at(asked, 80))), libc::ECONNREFUSED);
    }
    assert_eq!(lab.counter("no_endpoint"), 3);
}

#[test]
fn agent_ports_are_refused_to_applications() {
    if !can_run("agent_ports_are_refused_to_applications") {
        return;
    }
    let lab = Lab::new();
    let any4 = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let any6 = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let mut before = 0;
    for port in [OUTBOUND, INBOUND] {
        let _agent = lab.pod.listen(at(any6, port));
        let _other_agent = lab.wire.listen(at(any6, port));
        for address in [
            POD4,
            POD6,
            mapped(POD4),
            Ipv4Addr::LOCALHOST.into(),
            Ipv4Addr::new(127, 9, 9, 9).into(),
            Ipv6Addr::LOCALHOST.into(),
            mapped(Ipv4Addr::LOCALHOST.into()),
            any4,
            any6,
            mapped(any4),
            MESH4,
            MESH6,
            mapped(MESH4),
        ] {
            let refused = errno(lab.pod.connect(at(address, port)));
            assert_eq!(refused, libc::EPERM, "{address} port {port}");
            assert_eq!(
                lab.counter("agent_port_refused"),
                before + 1,
                "{address} port {port}"
            );
            before += 1;
        }
        // The port alone is no reason.
        lab.pod.connect(at(PLAIN4, port)).unwrap();
    }
    let backends = [Backend {
        endpoint: endpoint(MESH4, INBOUND),
        flags: WORKLOAD_MESH,
    }];
    lab.datapath
        .put_service(endpoint(VIP4, 80), &backends)
        .unwrap();
    assert_eq!(
        errno(lab.pod.connect(at(VIP4, 80))),
        libc::EPERM,
        "behind a service"
    );
}

#[test]
fn pod_reaches_itself_without_the_agent() {
    if !can_run("pod_reaches_itself_without_the_agent") {
        return;
    }
    let lab = Lab::new();
    // Its own workload is in the mesh, as every pod's is.
    lab.datapath
        .put_workload(
            POD4.into(),
            Workload {
                flags: WORKLOAD_MESH,
            },
        )
        .unwrap();
    let server = lab.pod.listen(at(Ipv6Addr::UNSPECIFIED.into(), 8080));
    let backends = [Backend {
        endpoint: endpoint(POD4, 8080),
        flags: WORKLOAD_MESH,
    }];
    lab.datapath
        .put_service(endpoint(VIP4, 80), &backends)
        .unwrap();
    for to in [
        at(POD4, 8080),
        at(POD6, 8080),
        at(Ipv4Addr::LOCALHOST.into(), 8080),
        at(Ipv6Addr::LOCALHOST.into(), 8080),
        at(VIP4, 80),
    ] {
        let app = lab.pod.connect(to).unwrap();
        server.accept().unwrap();
        assert_eq!(app.peer_addr().unwrap(), to);
    }
    assert_eq!(lab.counter("redirected"), 0);
}

#[test]
fn namespace_that_is_not_enrolled_is_untouched() {
    if !can_run("namespace_that_is_not_enrolled_is_untouched") {
        return;
    }
    let lab = Lab::bare();
    lab.datapath
        .put_workload(
            MESH4.into(),
            Workload {
                flags: WORKLOAD_MESH,
            },
        )
        .unwrap();
    let server = lab.wire.listen(at(MESH4, 8080));
    let app = lab.pod.connect(at(MESH4, 8080)).unwrap();
    let (_, source) = server.accept().unwrap();
    assert_eq!(
        (app.peer_addr().unwrap(), source.ip()),
        (at(MESH4, 8080), POD4)
    );
    assert!(
        lab.datapath
            .counters()
            .unwrap()
            .iter()
            .all(|(_, count)| *count == 0)
    );
}

#[test]
fn withdrawn_namespace_is_untouched_again() {
    if !can_run("withdrawn_namespace_is_untouched_again") {
        return;
    }
    let lab = Lab::new();
    let server = lab.wire.listen(at(MESH4, 8080));
    assert!(
        lab.pod.connect(at(MESH4, 8080)).is_err(),
        "redirected to nobody"
    );
    lab.datapath.withdraw(lab.cookie).unwrap();
    assert!(lab.datapath.pods().unwrap().is_empty());
    lab.pod.connect(at(MESH4, 8080)).unwrap();
    server.accept().unwrap();
}

#[test]
fn held_pod_reaches_itself_alone() {
    if !can_run("held_pod_reaches_itself_alone") {
        return;
    }
    let lab = Lab::new();
    let held = ringfence_bpf_common::Pod {
        flags: 0,
        ..lab.entry()
    };
    lab.datapath.update_pod(lab.cookie, &held).unwrap();
    let _server = lab.wire.listen(at(PLAIN4, 8080));
    let _own = lab.pod.listen(at(POD4, 8080));
    assert_eq!(errno(lab.pod.connect(at(PLAIN4, 8080))), libc::EPERM);
    assert_eq!(errno(lab.pod.connect(at(MESH4, 8080))), libc::EPERM);
    assert_eq!(errno(lab.wire.connect(at(POD4, 8080))), libc::ECONNREFUSED);
    lab.pod.connect(at(POD4, 8080)).unwrap();
    assert_eq!(lab.counter("held"), 2);
}

#[test]
fn what_cannot_be_tunnelled_is_refused_and_never_plain() {
    if !can_run("what_cannot_be_tunnelled_is_refused_and_never_plain") {
        return;
    }
    let lab = Lab::new();
    let server = lab.wire.listen(at(MESH4, 8080));
    server.set_nonblocking(true).unwrap();
    // Bound to a device: the redirect could not arrive.
    let bound = lab.pod.socket(Domain::IPV4);
    bound.bind_device(Some(b"eth0")).unwrap();
    let refused = lab.pod.run(|| bound.connect(&at(MESH4, 8080).into()));
    assert_eq!(errno(refused), libc::EPERM);
    // A workload that must not be connected to.
    lab.datapath
        .put_workload(
            MESH4.into(),
            Workload {
                flags: WORKLOAD_REFUSE,
            },
        )
        .unwrap();
    assert_eq!(errno(lab.pod.connect(at(MESH4, 8080))), libc::EPERM);
    let backends = [Backend {
        endpoint: endpoint(MESH4, 8080),
        flags: WORKLOAD_MESH | WORKLOAD_REFUSE,
    }];
    lab.datapath
        .put_service(endpoint(VIP4, 80), &backends)
        .unwrap();
    assert_eq!(errno(lab.pod.connect(at(VIP4, 80))), libc::EPERM);
    assert_eq!(lab.counter("refused"), 3);
    assert!(server.accept().is_err(), "nothing arrived");
}

#[test]
fn second_connect_of_a_socket_forgets_the_first() {
    if !can_run("second_connect_of_a_socket_forgets_the_first") {
        return;
    }
    let lab = Lab::new();
    let socket = lab.pod.socket(Domain::IPV4);
    // Nobody listens on the agent's port: the redirected connect is refused.
    let refused = lab.pod.run(|| socket.connect(&at(MESH4, 80).into()));
    assert_eq!(errno(refused), libc::ECONNREFUSED);
    let _server = lab.wire.listen(at(PLAIN4, 8080));
    lab.pod
        .run(|| socket.connect(&at(PLAIN4, 8080).into()))
        .unwrap();
    assert_eq!(socket.peer_addr().unwrap(), at(PLAIN4, 8080).into());
}
