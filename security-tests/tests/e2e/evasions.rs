//! What a process of an enrolled pod can try with unusual sockets, `CAP_NET_RAW` included, to
//! get past the connect hook or to pass for the agent.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use ringfence_lab::capture::frames_with;
use ringfence_lab::mesh::{Mesh, Policy, Rule, TEST_PORT};
use ringfence_lab::probe::GREETING;
use ringfence_lab::process::wait_until;
use ringfence_lab::topology::{Family, LEGACY_VIP};
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::server::{Server, patient};
use ringfence_security_tests::stage::{
    CLIENT_NODE, PATIENCE, SERVER_NODE, Stage, TUNNEL_PORT, is_answered, only_peer,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::wire::{listen, plaintext_frames};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        the_agents_mark_opens_neither_its_ports_nor_a_way_around_the_mesh,
        a_borrowed_source_address_gains_nothing,
        an_enrolled_pod_gets_no_mptcp_socket,
        raw_segments_towards_the_mesh_do_not_leave_the_node,
        live_plaintext_ends_when_the_policy_refuses_it,
        registry_only_pods_reach_what_the_registry_knows_alone,
        a_socket_bound_to_a_device_cannot_leave_in_plaintext,
        tcp_fast_open_goes_through_the_mesh,
        secrets_and_control_sockets_are_for_their_owner_alone,
    ]
}

/// The mark of the agent's last hop. Any process with CAP_NET_RAW can set it.
const LAST_HOP_MARK: u32 = 0x5246_0111;

/// A TCP socket made in a pod.
fn socket(
    stage: &Stage,
    pod: &str,
    family: Family,
    protocol: Protocol,
) -> Result<std::io::Result<Socket>> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    stage
        .lab()?
        .pod(pod)?
        .netns()
        .run(|| Socket::new(domain, Type::STREAM, Some(protocol)))
}

pub fn tcp(stage: &Stage, pod: &str, family: Family) -> Result<Socket> {
    socket(stage, pod, family, Protocol::TCP)?.context("making a TCP socket")
}

pub fn connect(socket: &Socket, to: SocketAddr) -> std::io::Result<()> {
    socket.connect_timeout(&SockAddr::from(to), PATIENCE)
}

pub fn is_forbidden(result: &std::io::Result<()>) -> Result<()> {
    let kind = result.as_ref().err().map(std::io::Error::kind);
    ensure!(
        kind == Some(ErrorKind::PermissionDenied),
        "{result:?} instead of EPERM"
    );
    Ok(())
}

/// Connects and asks. A refusal may come at any step: the listener that takes a redirected
/// connection has accepted before anybody is asked.
pub fn ask(socket: Socket, target: SocketAddr) -> std::io::Result<Vec<u8>> {
    connect(&socket, target)?;
    let mut stream = TcpStream::from(socket);
    patient(&stream, PATIENCE)?;
    stream.write_all(b"hello\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// `client` is greeted, and nobody else gets a byte.
pub fn only_client_is_greeted(pod: &str, answer: &std::io::Result<Vec<u8>>) -> Result<()> {
    match (pod, answer) {
        ("client", Ok(answer)) if answer == GREETING => Ok(()),
        ("client", _) => bail!("client: {answer:?}"),
        (_, Ok(answer)) if !answer.is_empty() => bail!("{pod} was answered {answer:?}"),
        // Silence would be neither an answer nor a refusal.
        (_, Err(error)) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            bail!("{pod}: {error}")
        }
        _ => Ok(()),
    }
}

fn the_agents_mark_opens_neither_its_ports_nor_a_way_around_the_mesh(
    stage: &mut Stage,
) -> Result<Verdict> {
    for family in Family::BOTH {
        let marked = |pod| -> Result<Socket> {
            let socket = tcp(stage, pod, family)?;
            socket.set_mark(LAST_HOP_MARK)?;
            Ok(socket)
        };
        is_forbidden(&connect(
            &marked("client")?,
            stage.port("web", family, TUNNEL_PORT)?,
        ))?;
        let own = stage.port("client", family, TUNNEL_PORT)?;
        is_forbidden(&connect(&marked("client")?, own))?;

        let mut application = stage.application()?;
        let capture = listen(stage)?;
        let target = stage.port("web", family, TEST_PORT)?;
        let before = stage.counter(CLIENT_NODE, "outbound_accepted")?;
        for pod in ["intruder", "client"] {
            only_client_is_greeted(pod, &ask(marked(pod)?, target))?;
        }
        stage.wait_counter(CLIENT_NODE, "outbound_accepted", before + 2)?;
        only_peer(&mut application, stage.address("client", family)?)?;
        ensure!(
            plaintext_frames(&capture.stop()?, target) == 0,
            "plaintext on the wire"
        );
    }
    Ok(Verdict::Passed)
}

fn a_borrowed_source_address_gains_nothing(stage: &mut Stage) -> Result<Verdict> {
    // The intruder speaks from the address of `client`, which policy admits. The mark brings
    // the answers of its own agent's listener back to it.
    let mut application = stage.application()?;
    let socket = tcp(stage, "intruder", Family::V4)?;
    socket.set_ip_transparent_v4(true)?;
    socket.set_mark(LAST_HOP_MARK)?;
    let client = stage.address("client", Family::V4)?;
    socket.bind(&SockAddr::from(SocketAddr::new(client, 0)))?;
    only_client_is_greeted("intruder", &ask(socket, Stage::service(Family::V4)))?;
    ensure!(
        application.accepted().is_empty(),
        "the application accepted {:?}",
        application.accepted()
    );
    is_answered(&stage.attempt("client", Stage::service(Family::V4))?)?;
    only_peer(&mut application, client)?;
    Ok(Verdict::Passed)
}

fn an_enrolled_pod_gets_no_mptcp_socket(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        // Whoever is not enrolled gets one, where the kernel has them at all.
        if socket(stage, "outside", family, Protocol::MPTCP)?.is_err() {
            return Ok(Verdict::Skipped("this kernel has no MPTCP".into()));
        }
        for pod in ["intruder", "client"] {
            let refused = socket(stage, pod, family, Protocol::MPTCP)?;
            // What a kernel without it says, so that programs take TCP instead.
            let errno = refused
                .as_ref()
                .err()
                .and_then(std::io::Error::raw_os_error);
            ensure!(
                errno == Some(Errno::EPROTONOSUPPORT as i32),
                "{pod}: {refused:?}"
            );
            tcp(stage, pod, family)?;
        }
    }
    Ok(Verdict::Passed)
}

pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// A TCP segment in an IP packet, as a raw socket takes it.
pub fn ip_packet(source: IpAddr, to: IpAddr, tcp: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    if to.is_ipv4() {
        packet.extend([0x45, 0]);
        packet.extend((20 + tcp.len() as u16).to_be_bytes());
        // The kernel fills in the checksum.
        packet.extend([0, 0, 0, 0, 64, 6, 0, 0]);
    } else {
        packet.extend([0x60, 0, 0, 0]);
        packet.extend((tcp.len() as u16).to_be_bytes());
        packet.extend([6, 64]);
    }
    packet.extend(octets(source));
    packet.extend(octets(to));
    packet.extend(tcp);
    packet
}

/// A SYN as a process with CAP_NET_RAW writes it, past every hook of a socket.
fn raw_syn(source: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(source.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    // Sequence numbers, 20 bytes of header, SYN, window; no checksum: nobody is to take it.
    tcp.extend([0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, 2, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend(data);
    ip_packet(source.ip(), to.ip(), &tcp)
}

fn raw_segments_towards_the_mesh_do_not_leave_the_node(stage: &mut Stage) -> Result<Verdict> {
    const MARKER: &[u8] = b"written-by-hand-";
    const DROPPED: &str = "kernel.guard_plaintext_to_mesh";
    for family in Family::BOTH {
        let send = |from: &str, to: SocketAddr, marker: &[u8]| -> Result<()> {
            let domain = match family {
                Family::V4 => Domain::IPV4,
                Family::V6 => Domain::IPV6,
            };
            let source = stage.port(from, family, 4000)?;
            let netns = stage.lab()?.pod(from)?.netns();
            let sent = netns.run(|| -> std::io::Result<usize> {
                // IPPROTO_RAW: the header is ours.
                let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(255)))?;
                // An IPv6 raw socket takes no port.
                let target = SockAddr::from(SocketAddr::new(to.ip(), 0));
                socket.send_to(&raw_syn(source, to, marker), &target)
            })?;
            sent.with_context(|| format!("{from} to {to}"))?;
            Ok(())
        };
        let capture = listen(stage)?;
        let before = stage.counter(CLIENT_NODE, DROPPED)?;
        let web = stage.port("web", family, TEST_PORT)?;
        send("client", web, &[MARKER, b"one"].concat())?;
        stage.wait_counter(CLIENT_NODE, DROPPED, before + 1)?;
        // A service's address would be translated behind the guard.
        send("client", Stage::service(family), &[MARKER, b"two"].concat())?;
        stage.wait_counter(CLIENT_NODE, DROPPED, before + 2)?;
        // The twin: outside the mesh it is nobody's business.
        let legacy = stage.port("legacy", family, 8080)?;
        send("client", legacy, &[MARKER, b"three"].concat())?;
        stage.attempt("client", legacy)?;
        let frames = capture.stop()?;
        for (number, expected) in [(&b"one"[..], 0), (b"two", 0), (b"three", 1)] {
            let seen = frames_with(&frames, &[MARKER, number].concat());
            ensure!(seen == expected, "{seen} frames with {number:?}");
        }
    }
    Ok(Verdict::Passed)
}

/// Plaintext from outside is admitted, a connection is made, and STRICT comes back.
fn live_plaintext_ends_when_the_policy_refuses_it(stage: &mut Stage) -> Result<Verdict> {
    let mode = |mesh: &mut Mesh, mode: &str| {
        for entry in &mut mesh.peer_authentication {
            entry.mode = mode.to_owned();
        }
    };
    let web = stage.lab()?.pod("web")?.netns();
    let server = Server::start(&web, TEST_PORT, PATIENCE, |mut stream| {
        let mut back = stream.try_clone()?;
        // What ends the connection is the result.
        Ok(std::io::copy(&mut stream, &mut back).map_err(|error| error.kind()))
    })?;
    let goes_on = |stream: &mut TcpStream| -> Result<()> {
        stream.write_all(b"hello\n")?;
        stream.read_exact(&mut [0; 6])?;
        Ok(())
    };
    let mut live = Vec::new();
    let mut meshed = stage.connect("client", Stage::service(Family::V4))?;
    stage.change_mesh(
        |mesh| {
            mode(mesh, "PERMISSIVE");
            mesh.policies.push(Policy {
                name: "anyone-may-use-the-test-port".into(),
                rules: vec![Rule {
                    ip_blocks: vec!["10.77.0.0/16".into(), "fd77::/16".into()],
                    ports: vec![TEST_PORT],
                    ..Rule::default()
                }],
                ..Policy::clients_may_use_web()
            });
        },
        "PERMISSIVE",
        |stage| {
            for family in Family::BOTH {
                let target = stage.port("web", family, TEST_PORT)?;
                let mut stream = stage.connect("outside", target)?;
                goes_on(&mut stream)?;
                live.push(stream);
            }
            Ok(())
        },
    )?;
    live.iter_mut().try_for_each(goes_on)?;
    stage.lab_mut()?.update_mesh(|mesh| mode(mesh, "STRICT"))?;
    for stream in &mut live {
        let read = stream.read(&mut [0; 1]).map_err(|error| error.kind());
        ensure!(
            read == Err(ErrorKind::ConnectionReset),
            "the client saw {read:?} instead of a reset"
        );
        let served = server.next(PATIENCE)?;
        ensure!(
            served == Err(ErrorKind::ConnectionAborted),
            "the application saw {served:?}"
        );
    }
    goes_on(&mut meshed).context("a stream of the mesh, which is admitted as before")?;
    Ok(Verdict::Passed)
}

fn registry_only_pods_reach_what_the_registry_knows_alone(stage: &mut Stage) -> Result<Verdict> {
    let file = stage.lab()?.agent_config(CLIENT_NODE);
    let text = std::fs::read_to_string(&file)?;
    let outside = stage.lab()?.pod("outside")?.netns();
    let listener = Server::start(&outside, TEST_PORT, PATIENCE, |mut stream| {
        stream.read(&mut [0; 1]).context("the client")
    })?;
    let outcome = (|| {
        let mut live = Vec::new();
        for family in Family::BOTH {
            live.push(stage.connect("client", stage.port("outside", family, TEST_PORT)?)?);
        }
        // `intruder` is on the same node and keeps its own mode.
        let egress = "egress:\n  mode: registry-only\n  overrides:\n  \
                      - {namespace: demo, name: intruder, mode: allow-any}\n";
        std::fs::write(&file, format!("{text}{egress}"))?;
        for stream in &mut live {
            let read = stream.read(&mut [0; 1]).map_err(|error| error.kind());
            ensure!(
                read == Err(ErrorKind::ConnectionAborted),
                "what was connected saw {read:?}"
            );
        }
        for family in Family::BOTH {
            let unknown = stage.port("outside", family, TEST_PORT)?;
            is_forbidden(&connect(&tcp(stage, "client", family)?, unknown))?;
            connect(&tcp(stage, "intruder", family)?, unknown).context("intruder")?;
            // Workloads in and outside the mesh, and services with either.
            let mut application = stage.application()?;
            is_answered(&stage.attempt("client", Stage::service(family))?)?;
            only_peer(&mut application, stage.address("client", family)?)?;
            for known in [
                stage.port("legacy", family, 8080)?,
                SocketAddr::new(family.of(LEGACY_VIP), 8080),
            ] {
                connect(&tcp(stage, "client", family)?, known)
                    .with_context(|| format!("to {known}"))?;
            }
        }
        Ok(())
    })();
    std::fs::write(&file, text)?;
    outcome?;
    let unknown = stage.port("outside", Family::V4, TEST_PORT)?;
    wait_until("the mode to be as it was", PATIENCE, || {
        connect(&tcp(stage, "client", Family::V4)?, unknown).context("client")
    })?;
    drop(listener);
    Ok(Verdict::Passed)
}

fn a_socket_bound_to_a_device_cannot_leave_in_plaintext(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        let bound = || -> Result<Socket> {
            let socket = tcp(stage, "client", family)?;
            socket.bind_device(Some(b"eth0"))?;
            Ok(socket)
        };
        for target in [
            Stage::service(family),
            stage.port("web", family, TEST_PORT)?,
        ] {
            is_forbidden(&connect(&bound()?, target)).with_context(|| format!("to {target}"))?;
        }
        connect(&bound()?, stage.port("legacy", family, 8080)?).context("to legacy")?;
    }
    Ok(Verdict::Passed)
}

fn tcp_fast_open_goes_through_the_mesh(stage: &mut Stage) -> Result<Verdict> {
    /// sendto(2) that connects and sends at once.
    const MSG_FASTOPEN: i32 = 0x2000_0000;
    for family in Family::BOTH {
        for pod in ["intruder", "client"] {
            let mut application = stage.application()?;
            let capture = listen(stage)?;
            let target = stage.port("web", family, TEST_PORT)?;
            let before = stage.counter(CLIENT_NODE, "outbound_accepted")?;
            let socket = tcp(stage, pod, family)?;
            match socket.send_to_with_flags(b"hello\n", &SockAddr::from(target), MSG_FASTOPEN) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {
                    return Ok(Verdict::Skipped(
                        "TCP Fast Open is switched off here".into(),
                    ));
                }
                Err(error) => return Err(error).with_context(|| format!("{pod} to {target}")),
            }
            let mut stream = TcpStream::from(socket);
            patient(&stream, PATIENCE)?;
            let mut answer = Vec::new();
            let answer = stream.read_to_end(&mut answer).map(|_| answer);
            only_client_is_greeted(pod, &answer)?;
            stage.wait_counter(CLIENT_NODE, "outbound_accepted", before + 1)?;
            if pod == "client" {
                only_peer(&mut application, stage.address("client", family)?)?;
            }
            let frames = capture.stop()?;
            ensure!(
                frames_with(&frames, b"hello\n") == 0,
                "the data of the SYN is on the wire"
            );
        }
    }
    Ok(Verdict::Passed)
}

fn secrets_and_control_sockets_are_for_their_owner_alone(stage: &mut Stage) -> Result<Verdict> {
    let lab = stage.lab()?;
    let ca_key = lab.root_certificate().with_file_name("ca-key.pem");
    for path in [
        lab.agent_socket(CLIENT_NODE),
        lab.agent_socket(SERVER_NODE),
        ca_key,
    ] {
        let mode = std::fs::metadata(&path)
            .with_context(|| path.display().to_string())?
            .permissions()
            .mode();
        ensure!(
            mode & 0o077 == 0,
            "{} has mode {:o}",
            path.display(),
            mode & 0o7777
        );
    }
    Ok(Verdict::Passed)
}
