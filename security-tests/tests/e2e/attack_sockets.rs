//! What a process of an enrolled pod tries with addresses and ports of its sockets: forms of
//! loopback, the ends of the port range, binding where it should not, one port twice.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use ringfence_lab::mesh::{Action, Mesh, Policy, Rule, TEST_PORT, principal};
use ringfence_lab::probe::{Acceptor, GREETING};
use ringfence_lab::process::wait_until;
use ringfence_lab::topology::Family;
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::server::{Server, patient, reset};
use ringfence_security_tests::stage::{
    CLIENT_NODE, OUTBOUND_PORT, PATIENCE, SERVER_NODE, Stage, TUNNEL_PORT, is_answered, is_refused,
    only_peer,
};
use socket2::{SockAddr, Socket};

use crate::evasions::{ask, connect, is_forbidden, tcp};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        no_form_of_loopback_reaches_the_agent_or_another_pod,
        what_listens_on_loopback_is_not_reached_through_the_mesh,
        an_ipv4_mapped_socket_is_judged_as_ipv4,
        ports_at_the_ends_of_the_range_are_ports_like_others,
        the_agents_ports_cannot_be_bound_by_a_process_of_the_pod,
        a_foreign_address_is_bound_in_vain,
        a_port_used_twice_never_mixes_two_destinations,
    ]
}

fn family_of(address: IpAddr) -> Family {
    if address.is_ipv4() {
        Family::V4
    } else {
        Family::V6
    }
}

/// Every way to say "myself", and a host's unspecified addresses.
fn own_names(stage: &Stage, pod: &str) -> Result<Vec<IpAddr>> {
    let own4 = stage.address(pod, Family::V4)?;
    let IpAddr::V4(v4) = own4 else {
        anyhow::bail!("{own4} is not IPv4")
    };
    Ok(vec![
        Ipv4Addr::LOCALHOST.into(),
        Ipv4Addr::new(127, 1, 2, 3).into(),
        Ipv4Addr::UNSPECIFIED.into(),
        own4,
        Ipv6Addr::LOCALHOST.into(),
        Ipv6Addr::UNSPECIFIED.into(),
        stage.address(pod, Family::V6)?,
        Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(),
        Ipv4Addr::UNSPECIFIED.to_ipv6_mapped().into(),
        v4.to_ipv6_mapped().into(),
    ])
}

fn no_form_of_loopback_reaches_the_agent_or_another_pod(stage: &mut Stage) -> Result<Verdict> {
    const POD: &str = "intruder";
    let own = own_names(stage, POD)?;
    let mut others = stage.application()?;
    let before = stage.counter(CLIENT_NODE, "outbound_accepted")?;
    for address in &own {
        let socket = || tcp(stage, POD, family_of(*address));
        for port in [TUNNEL_PORT, OUTBOUND_PORT] {
            is_forbidden(&connect(&socket()?, SocketAddr::new(*address, port)))
                .with_context(|| format!("{address} port {port}"))?;
        }
        let nobody = connect(&socket()?, SocketAddr::new(*address, TEST_PORT));
        ensure!(
            nobody.as_ref().map_err(std::io::Error::kind) == Err(ErrorKind::ConnectionRefused),
            "{address}: {nobody:?}, and nothing listens in the pod"
        );
    }
    let netns = stage.lab()?.pod(POD)?.netns();
    let mut local = Acceptor::start(&netns, TEST_PORT)?;
    for address in &own {
        let answer = ask(
            tcp(stage, POD, family_of(*address))?,
            SocketAddr::new(*address, TEST_PORT),
        )
        .with_context(|| format!("{address}, where the pod itself listens"))?;
        ensure!(answer == GREETING, "{address} answered {answer:?}");
        local.next(PATIENCE).context("the pod's own listener")?;
    }
    ensure!(
        stage.counter(CLIENT_NODE, "outbound_accepted")? == before,
        "the agent took a connection of the pod to itself"
    );
    ensure!(
        others.accepted().is_empty(),
        "another pod accepted {:?}",
        others.accepted()
    );
    Ok(Verdict::Passed)
}

fn what_listens_on_loopback_is_not_reached_through_the_mesh(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        let loopback = SocketAddr::new(family.loopback(), TEST_PORT);
        let netns = stage.lab()?.pod("web")?.netns();
        let private = netns.run(|| std::net::TcpListener::bind(loopback))??;
        private.set_nonblocking(true)?;
        for target in [
            Stage::service(family),
            stage.port("web", family, TEST_PORT)?,
        ] {
            is_refused(&stage.attempt("client", target)?).context("admitted, and not for it")?;
        }
        let accepted = private.accept().map(|(_, peer)| peer);
        ensure!(
            accepted.as_ref().map_err(std::io::Error::kind) == Err(ErrorKind::WouldBlock),
            "the listener on loopback accepted {accepted:?}"
        );
        drop(private);
        let mut application = stage.application()?;
        is_answered(&stage.attempt("client", Stage::service(family))?)?;
        only_peer(&mut application, stage.address("client", family)?)?;
    }
    Ok(Verdict::Passed)
}

fn mapped(address: IpAddr, port: u16) -> SocketAddr {
    let address = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    SocketAddr::new(address.into(), port)
}

fn an_ipv4_mapped_socket_is_judged_as_ipv4(stage: &mut Stage) -> Result<Verdict> {
    let web = mapped(stage.address("web", Family::V4)?, TEST_PORT);
    let service = mapped(Stage::service(Family::V4).ip(), TEST_PORT);
    let client = stage.address("client", Family::V4)?;
    for target in [web, service] {
        let mut application = stage.application()?;
        is_refused(&stage.attempt("intruder", target)?).context("intruder")?;
        is_refused(&stage.attempt("outside", web)?).context("plaintext")?;
        is_answered(&stage.attempt("client", target)?).context("client")?;
        only_peer(&mut application, client)?;
    }
    // A rule on the IPv4 address holds for it, and for IPv6 it does not.
    let rule = Rule {
        ip_blocks: vec![format!("{client}/32")],
        ..Rule::default()
    };
    let _application = stage.application()?;
    stage.change_mesh(
        |mesh| {
            mesh.policies.push(Policy {
                name: "by-address".into(),
                action: Action::Deny,
                rules: vec![rule],
                ..Policy::clients_may_use_web()
            })
        },
        "the rule by address",
        |stage| is_refused(&stage.attempt("client", web)?),
    )?;
    is_refused(&stage.attempt("client", service)?)?;
    is_answered(&stage.attempt("client", Stage::service(Family::V6))?).context("IPv6")?;
    Ok(Verdict::Passed)
}

fn ports_at_the_ends_of_the_range_are_ports_like_others(stage: &mut Stage) -> Result<Verdict> {
    const LAST: u16 = u16::MAX;
    let admit = |mesh: &mut Mesh| {
        mesh.policies.push(Policy {
            name: "the-last-port".into(),
            rules: vec![Rule {
                principals: vec![principal("client")],
                ports: vec![LAST],
                ..Rule::default()
            }],
            ..Policy::clients_may_use_web()
        });
    };
    let netns = stage.lab()?.pod("web")?.netns();
    let mut last = Acceptor::start(&netns, LAST)?;
    let mut before_last = Acceptor::start(&netns, LAST - 1)?;
    let to_last = |stage: &Stage, pod, family| stage.attempt(pod, stage.port("web", family, LAST)?);
    for family in Family::BOTH {
        is_refused(&to_last(stage, "client", family)?).context("before there is a rule")?;
    }
    ensure!(last.accepted().is_empty(), "{:?}", last.accepted());
    stage.change_mesh(admit, "the last port to be admitted", |stage| {
        is_answered(&to_last(stage, "client", Family::V4)?)
    })?;
    for family in Family::BOTH {
        is_answered(&to_last(stage, "client", family)?)?;
        is_refused(&to_last(stage, "intruder", family)?).context("intruder")?;
        for pod in ["client", "intruder", "outside"] {
            is_refused(&stage.attempt(pod, stage.port("web", family, LAST - 1)?)?)
                .with_context(|| format!("{pod} to the port before"))?;
            let zero = stage.attempt(pod, stage.port("web", family, 0)?)?;
            is_refused(&zero).with_context(|| format!("{pod} to port 0"))?;
        }
        let none = stage.attempt("client", SocketAddr::new(Stage::service(family).ip(), 0))?;
        is_refused(&none).context("port 0 of the service")?;
    }
    ensure!(
        before_last.accepted().is_empty(),
        "{:?}",
        before_last.accepted()
    );
    let clients: Vec<IpAddr> = Family::BOTH
        .into_iter()
        .map(|family| stage.address("client", family))
        .collect::<Result<_>>()?;
    ensure!(
        last.accepted()
            .iter()
            .all(|peer| clients.contains(&peer.ip())),
        "the last port accepted {:?}",
        last.accepted()
    );
    Ok(Verdict::Passed)
}

/// Binds with everything that makes it easier, and listens.
fn listen_at(stage: &Stage, pod: &str, at: SocketAddr) -> Result<std::io::Result<Socket>> {
    let family = family_of(at.ip());
    let socket = tcp(stage, pod, family)?;
    Ok((|| {
        socket.set_reuse_address(true)?;
        setsockopt(&socket, sockopt::ReusePort, &true)?;
        // Both make foreign addresses bindable.
        match family {
            Family::V4 => socket.set_ip_transparent_v4(true)?,
            Family::V6 => socket.set_freebind_v6(true)?,
        }
        socket.bind(&SockAddr::from(at))?;
        socket.listen(8)?;
        Ok(socket)
    })())
}

fn the_agents_ports_cannot_be_bound_by_a_process_of_the_pod(stage: &mut Stage) -> Result<Verdict> {
    for pod in ["intruder", "web"] {
        let mut names = own_names(stage, pod)?;
        for family in Family::BOTH {
            names.push(stage.address("client", family)?);
        }
        for address in names {
            for port in [TUNNEL_PORT, OUTBOUND_PORT] {
                let at = SocketAddr::new(address, port);
                let bound = listen_at(stage, pod, at)?;
                ensure!(
                    bound.as_ref().map_err(std::io::Error::kind).err()
                        == Some(ErrorKind::AddrInUse),
                    "{pod} at {at}: {bound:?}"
                );
            }
            let at = SocketAddr::new(address, OUTBOUND_PORT + 1);
            listen_at(stage, pod, at)?.with_context(|| format!("{pod} at {at}"))?;
        }
    }
    stage.settle()?;
    Ok(Verdict::Passed)
}

/// A listener at the address of `web`, in the pod of the intruder, gets nothing; and a connect
/// from the address of `client` is not the client's.
fn a_foreign_address_is_bound_in_vain(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        let mut application = stage.application()?;
        let web = stage.port("web", family, TEST_PORT)?;
        let trap = listen_at(stage, "intruder", web)?.context("binding transparently")?;
        trap.set_nonblocking(true)?;
        let client = stage.address("client", family)?;
        for target in [web, Stage::service(family)] {
            is_refused(&stage.attempt("intruder", target)?).context("the pod itself")?;
            let socket = tcp(stage, "intruder", family)?;
            match family {
                Family::V4 => socket.set_freebind_v4(true)?,
                Family::V6 => socket.set_freebind_v6(true)?,
            }
            socket.bind(&SockAddr::from(SocketAddr::new(client, 0)))?;
            // The answers of its own agent go astray, which it need not wait for.
            socket.set_nonblocking(true)?;
            let _ = socket.connect(&target.into());
        }
        let caught = trap.accept().map(|(_, peer)| peer);
        ensure!(
            caught.as_ref().map_err(std::io::Error::kind).err() == Some(ErrorKind::WouldBlock),
            "the listener at the address of web accepted {caught:?}"
        );
        is_answered(&stage.attempt("client", web)?).context("client")?;
        only_peer(&mut application, client)?;
    }
    Ok(Verdict::Passed)
}

/// What was read by a server, connection after connection.
type Record = Arc<Mutex<Vec<u8>>>;

fn recorder(stage: &Stage, port: u16) -> Result<(Server<()>, Record)> {
    let all = Record::default();
    let (netns, record) = (stage.lab()?.pod("web")?.netns(), all.clone());
    let server = Server::start(&netns, port, PATIENCE, move |mut stream| {
        let mut data = Vec::new();
        // What came before a reset counts, too.
        let _ = stream.read_to_end(&mut data);
        record
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(data);
        Ok(())
    })?;
    Ok((server, all))
}

/// The intruder may use two ports and not the third. From one source port it connects to all
/// of them in a row, and ends each connection while the agent has hardly accepted it.
fn a_port_used_twice_never_mixes_two_destinations(stage: &mut Stage) -> Result<Verdict> {
    const DENIED: u16 = TEST_PORT + 1;
    const OTHER: u16 = TEST_PORT + 2;
    const TURNS: u16 = 60;
    let (_denied_server, denied) = recorder(stage, DENIED)?;
    let (_other_server, other) = recorder(stage, OTHER)?;
    let (_first_server, first) = recorder(stage, TEST_PORT)?;
    let rule = Rule {
        principals: vec![principal("intruder")],
        ports: vec![TEST_PORT, OTHER],
        ..Rule::default()
    };
    let went = |from: &Record, tag: u8| {
        from.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&tag)
    };
    stage.lab_mut()?.update_mesh(|mesh| {
        mesh.policies.push(Policy {
            name: "two-ports-of-three".into(),
            rules: vec![rule],
            ..Policy::clients_may_use_web()
        });
    })?;
    for family in Family::BOTH {
        for turn in 0..TURNS {
            let source = SocketAddr::new(stage.address("intruder", family)?, 42_000 + turn);
            let orderly = turn % 2 == 0;
            let mut destinations = [(TEST_PORT, b'1'), (DENIED, b'2'), (OTHER, b'3')];
            destinations.rotate_left(usize::from(turn % 3));
            if turn % 12 >= 6 {
                destinations.swap(0, 2);
            }
            for (port, tag) in destinations {
                let socket = tcp(stage, "intruder", family)?;
                socket.set_reuse_address(true)?;
                setsockopt(&socket, sockopt::ReusePort, &true)?;
                if socket.bind(&source.into()).is_err()
                    || connect(&socket, stage.port("web", family, port)?).is_err()
                {
                    continue;
                }
                let mut stream = TcpStream::from(socket);
                patient(&stream, PATIENCE)?;
                let _ = stream.write_all(&[tag; 64]);
                if orderly {
                    let _ = stream.shutdown(Shutdown::Write);
                } else {
                    reset(stream)?;
                }
            }
        }
        // One after another, each gets where it is admitted, once the agents are done with the
        // burst: a machine that is slow at handshakes refuses some of those under way.
        for (port, tag, server) in [(TEST_PORT, b'1', &first), (OTHER, b'3', &other)] {
            let to = stage.port("web", family, port)?;
            wait_until("the end of the burst", PATIENCE, || {
                let mut stream = stage.connect("intruder", to)?;
                stream.write_all(&[tag])?;
                stream.shutdown(Shutdown::Write)?;
                stream.read_to_end(&mut Vec::new())?;
                Ok(())
            })?;
            ensure!(went(server, tag), "port {port} has read nothing");
        }
    }
    wait_until("every stream to be done with", PATIENCE, || {
        let streams = stage.status(SERVER_NODE)?.streams;
        ensure!(streams.is_empty(), "{streams:?}");
        Ok(())
    })?;
    for (name, server, tags) in [
        ("the first", &first, *b"23"),
        ("the other", &other, *b"12"),
        ("the denied", &denied, *b"13"),
    ] {
        for tag in tags {
            ensure!(!went(server, tag), "{name} port has read another's bytes");
        }
    }
    ensure!(!went(&denied, b'2'), "the denied port was reached");
    Ok(Verdict::Passed)
}
