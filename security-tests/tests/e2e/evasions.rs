//! What a process of an enrolled pod can try with unusual sockets, `CAP_NET_RAW` included, to
//! get past the connect hook or to pass for the agent.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use ringfence_lab::capture::frames_with;
use ringfence_lab::mesh::TEST_PORT;
use ringfence_lab::probe::GREETING;
use ringfence_lab::topology::Family;
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::server::patient;
use ringfence_security_tests::stage::{
    CLIENT_NODE, PATIENCE, SERVER_NODE, Stage, TUNNEL_PORT, is_answered, only_peer,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::wire::{listen, plaintext_frames};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        the_agents_mark_opens_neither_its_ports_nor_a_way_around_the_mesh,
        a_borrowed_source_address_gains_nothing,
        an_mptcp_socket_cannot_leave_in_plaintext,
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

fn tcp(stage: &Stage, pod: &str, family: Family) -> Result<Socket> {
    socket(stage, pod, family, Protocol::TCP)?.context("making a TCP socket")
}

fn connect(socket: &Socket, to: SocketAddr) -> std::io::Result<()> {
    socket.connect_timeout(&SockAddr::from(to), PATIENCE)
}

fn is_forbidden(result: &std::io::Result<()>) -> Result<()> {
    let kind = result.as_ref().err().map(std::io::Error::kind);
    ensure!(
        kind == Some(ErrorKind::PermissionDenied),
        "{result:?} instead of EPERM"
    );
    Ok(())
}

/// Connects and asks. A refusal may come at any step: the listener that takes a redirected
/// connection has accepted before anybody is asked.
fn ask(socket: Socket, target: SocketAddr) -> std::io::Result<Vec<u8>> {
    connect(&socket, target)?;
    let mut stream = TcpStream::from(socket);
    patient(&stream, PATIENCE)?;
    stream.write_all(b"hello\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// `client` is greeted, and nobody else gets a byte.
fn only_client_is_greeted(pod: &str, answer: &std::io::Result<Vec<u8>>) -> Result<()> {
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

fn an_mptcp_socket_cannot_leave_in_plaintext(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        for target in [
            Stage::service(family),
            stage.port("web", family, TEST_PORT)?,
        ] {
            let mut application = stage.application()?;
            let capture = listen(stage)?;
            for pod in ["intruder", "client"] {
                let Some(socket) = mptcp(stage, pod, family)? else {
                    return Ok(Verdict::Skipped("this kernel has no MPTCP".into()));
                };
                // Refused by the hook, or taken into the mesh like any other connection.
                let answer = ask(socket, target);
                let forbidden = answer
                    .as_ref()
                    .is_err_and(|error| error.kind() == ErrorKind::PermissionDenied);
                if !forbidden {
                    only_client_is_greeted(pod, &answer).with_context(|| format!("to {target}"))?;
                }
            }
            let client = stage.address("client", family)?;
            let accepted = application.accepted();
            ensure!(
                accepted.iter().all(|peer| peer.ip() == client),
                "the application accepted {accepted:?}"
            );
            let frames = capture.stop()?;
            ensure!(
                frames_with(&frames, b"hello\n") == 0,
                "a request is on the wire"
            );
            ensure!(
                frames_with(&frames, GREETING) == 0,
                "an answer is on the wire"
            );
        }
        // The twin: outside the mesh it is nobody's business.
        if let Some(socket) = mptcp(stage, "client", family)? {
            connect(&socket, stage.port("legacy", family, 8080)?).context("to legacy")?;
        }
    }
    Ok(Verdict::Passed)
}

/// An MPTCP socket in a pod, on a kernel that has them.
fn mptcp(stage: &Stage, pod: &str, family: Family) -> Result<Option<Socket>> {
    match socket(stage, pod, family, Protocol::MPTCP)? {
        Ok(socket) => Ok(Some(socket)),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EPROTONOSUPPORT | Errno::ENOPROTOOPT | Errno::EINVAL) => Ok(None),
            _ => Err(error).context("making an MPTCP socket"),
        },
    }
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
