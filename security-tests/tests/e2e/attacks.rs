//! Who is admitted, attacked: addresses that are somebody else's, and bytes before the verdict.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use ringfence_lab::mesh::{Rule, TEST_PORT, principal};
use ringfence_lab::netns::Netns;
use ringfence_lab::probe::GREETING;
use ringfence_lab::topology::Family;
use ringfence_security_tests::cases;
use ringfence_security_tests::edits::{allow, mode};
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::server::{Server, patient};
use ringfence_security_tests::stage::{PATIENCE, SERVER_NODE, Stage, is_answered, is_refused};
use socket2::SockAddr;

use crate::evasions::{ask, tcp};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        a_pod_that_takes_another_pods_address_keeps_its_own_identity,
        plaintext_from_a_taken_address_has_no_identity,
        early_bytes_of_a_denied_identity_are_never_read,
        data_in_a_plaintext_syn_is_never_read_under_strict,
    ]
}

/// An address of one pod, given to another one as well. It is taken back at the end.
#[derive(Debug)]
struct Taken {
    netns: Netns,
    line: String,
}

impl Taken {
    fn address(stage: &Stage, thief: &str, victim: &str, family: Family) -> Result<Self> {
        let netns = stage.lab()?.pod(thief)?.netns();
        let address = stage.address(victim, family)?;
        let flags = if address.is_ipv6() { " nodad" } else { "" };
        netns.ip(&[format!("address add {address} dev eth0{flags}")])?;
        Ok(Taken {
            netns,
            line: format!("address del {address} dev eth0"),
        })
    }

    /// The way to an address leads to another pod of this node, before whatever else does.
    fn route(stage: &Stage, node: &str, thief: &str, victim: IpAddr) -> Result<Self> {
        let netns = stage.lab()?.node(node)?.netns();
        let metric = if victim.is_ipv6() { " metric 1" } else { "" };
        let route = format!("{victim} dev pod-{thief}{metric}");
        netns.ip(&[format!("route prepend {route}")])?;
        Ok(Taken {
            netns,
            line: format!("route del {route}"),
        })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Err(error) = self.netns.ip(std::slice::from_ref(&self.line)) {
            println!("{}: {error:#}", self.line);
        }
    }
}

fn ask_from(stage: &Stage, pod: &str, source: IpAddr, to: SocketAddr) -> Result<Option<Vec<u8>>> {
    let family = if source.is_ipv4() {
        Family::V4
    } else {
        Family::V6
    };
    let socket = tcp(stage, pod, family)?;
    socket.bind(&SockAddr::from(SocketAddr::new(source, 0)))?;
    Ok(ask(socket, to).ok().filter(|answer| !answer.is_empty()))
}

/// The intruder is admitted, so that its identity is not what refuses it. What an agent says
/// of such a source, and what it is told, is in `tunnels.rs`.
fn a_pod_that_takes_another_pods_address_keeps_its_own_identity(
    stage: &mut Stage,
) -> Result<Verdict> {
    let rule = Rule {
        principals: vec![principal("intruder")],
        ports: vec![TEST_PORT],
        ..Rule::default()
    };
    let mut application = stage.application()?;
    stage.change_mesh(
        |mesh| mesh.policies.push(allow("the-intruder-too", rule)),
        "the intruder to be admitted",
        |stage| is_answered(&stage.attempt("intruder", Stage::service(Family::V4))?),
    )?;
    for family in Family::BOTH {
        let (own, others) = (
            stage.address("intruder", family)?,
            stage.address("client", family)?,
        );
        let target = Stage::service(family);
        let taken = Taken::address(stage, "intruder", "client", family)?;
        let answer = ask_from(stage, "intruder", others, target)?;
        ensure!(
            answer.is_none(),
            "from {others} the intruder was answered {answer:?}"
        );
        // What the source address had admitted is not in the way of its own.
        let answer = ask_from(stage, "intruder", own, target)?;
        ensure!(answer.as_deref() == Some(GREETING), "{answer:?} from {own}");
        drop(taken);
        ensure!(
            application
                .accepted()
                .iter()
                .all(|peer| peer.ip() != others),
            "the application accepted {:?}",
            application.accepted()
        );
    }
    Ok(Verdict::Passed)
}

/// The network is the attacker's: packets to the address of `client` come to it.
fn plaintext_from_a_taken_address_has_no_identity(stage: &mut Stage) -> Result<Verdict> {
    const THIEF: &str = "outside-b";
    let both = |stage: &Stage, pod: &str| -> Result<Vec<String>> {
        Family::BOTH
            .into_iter()
            .map(|family| Ok(stage.address(pod, family)?.to_string()))
            .collect()
    };
    let by_address = |blocks: Vec<String>| {
        allow(
            "by-address",
            Rule {
                ip_blocks: blocks,
                ports: vec![TEST_PORT],
                ..Rule::default()
            },
        )
    };
    let spoofed = |stage: &Stage, family| -> Result<Option<Vec<u8>>> {
        let client = stage.address("client", family)?;
        let _route = Taken::route(stage, SERVER_NODE, THIEF, client)?;
        let _address = Taken::address(stage, THIEF, "client", family)?;
        ask_from(stage, THIEF, client, stage.port("web", family, TEST_PORT)?)
    };
    let refused = |stage: &Stage, when: &str| -> Result<()> {
        let application = stage.application()?;
        for family in Family::BOTH {
            let answer = spoofed(stage, family)?;
            ensure!(answer.is_none(), "{when}: answered {answer:?}");
        }
        let mut application = application;
        ensure!(
            application.accepted().is_empty(),
            "{when}: the application accepted {:?}",
            application.accepted()
        );
        Ok(())
    };
    refused(stage, "STRICT")?;
    let outside = both(stage, "outside")?;
    let listening = stage.application()?;
    stage.change_mesh(
        |mesh| {
            mode(mesh, "PERMISSIVE");
            mesh.policies.push(by_address(outside.clone()));
        },
        "PERMISSIVE",
        |stage| is_answered(&stage.attempt("outside", stage.port("web", Family::V4, TEST_PORT)?)?),
    )?;
    drop(listening);
    refused(
        stage,
        "PERMISSIVE, and the address of an identity that is admitted",
    )?;
    // The twin, and what an address is worth in plaintext: the attack itself works.
    let blocks = [outside, both(stage, "client")?].concat();
    let _listening = stage.application()?;
    stage.change_mesh(
        |mesh| {
            mesh.policies.pop();
            mesh.policies.push(by_address(blocks));
        },
        "the address itself to be admitted",
        |stage| {
            for family in Family::BOTH {
                let answer = spoofed(stage, family)?;
                ensure!(answer.as_deref() == Some(GREETING), "{answer:?}");
            }
            Ok(())
        },
    )?;
    Ok(Verdict::Passed)
}

/// What an application has accepted and read so far.
#[derive(Debug, Default)]
struct Seen {
    accepted: AtomicUsize,
    read: AtomicUsize,
}

/// Reads to the end, counting at once what it accepts and reads.
fn reader(stage: &Stage, seen: &Arc<Seen>) -> Result<Server<usize>> {
    let (netns, seen) = (stage.lab()?.pod("web")?.netns(), seen.clone());
    Server::start(&netns, TEST_PORT, PATIENCE, move |mut stream| {
        seen.accepted.fetch_add(1, Ordering::SeqCst);
        let (mut buffer, mut total) = ([0; 4096], 0);
        loop {
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => return Ok(total),
                Ok(count) => {
                    seen.read.fetch_add(count, Ordering::SeqCst);
                    total += count;
                }
            }
        }
    })
}

fn seen_exactly(seen: &Seen, accepted: usize, read: usize) -> Result<()> {
    let counted = (
        seen.accepted.load(Ordering::SeqCst),
        seen.read.load(Ordering::SeqCst),
    );
    ensure!(
        counted == (accepted, read),
        "the application accepted {} connections and read {} bytes, not {accepted} and {read}",
        counted.0,
        counted.1
    );
    Ok(())
}

fn early_bytes_of_a_denied_identity_are_never_read(stage: &mut Stage) -> Result<Verdict> {
    const EARLY: usize = 256 * 1024;
    const TRIES: usize = 10;
    let denied = r#"refused{reason="policy-denied"}"#;
    for family in Family::BOTH {
        for target in [
            Stage::service(family),
            stage.port("web", family, TEST_PORT)?,
        ] {
            let seen = Arc::new(Seen::default());
            let server = reader(stage, &seen)?;
            let before = stage.counter(SERVER_NODE, denied)?;
            for _ in 0..TRIES {
                // The agent's listener answers the SYN before anybody has judged.
                let socket = tcp(stage, "intruder", family)?;
                let _ = socket.connect_timeout(&target.into(), PATIENCE);
                let mut stream = TcpStream::from(socket);
                patient(&stream, PATIENCE)?;
                let _ = stream.write_all(&vec![7; EARLY]);
                let _ = stream.read(&mut [0; 1]);
            }
            stage.wait_counter(SERVER_NODE, denied, before + TRIES as u64)?;
            seen_exactly(&seen, 0, 0)?;
            let mut admitted = stage.connect("client", target)?;
            admitted.write_all(&vec![7; EARLY])?;
            admitted.shutdown(std::net::Shutdown::Write)?;
            ensure!(server.next(PATIENCE)? == EARLY, "bytes are missing");
            seen_exactly(&seen, 1, EARLY)?;
        }
    }
    Ok(Verdict::Passed)
}

/// TCP Fast Open without cookies, on both sides: the SYN's data is the application's as soon
/// as a listener is found for it.
fn data_in_a_plaintext_syn_is_never_read_under_strict(stage: &mut Stage) -> Result<Verdict> {
    const MSG_FASTOPEN: i32 = 0x2000_0000;
    const KEY: &str = "net/ipv4/tcp_fastopen";
    /// Client, server, data without a cookie, answered without one, for every listener.
    const ALWAYS: &str = "1543";
    let pods = [
        stage.lab()?.pod("outside")?.netns(),
        stage.lab()?.pod("web")?.netns(),
    ];
    let send = |stage: &Stage, family| -> Result<()> {
        let socket = tcp(stage, "outside", family)?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let target = stage.port("web", family, TEST_PORT)?;
        socket
            .send_to_with_flags(b"early", &target.into(), MSG_FASTOPEN)
            .context("refused")?;
        Ok(())
    };
    let attack = |stage: &mut Stage| -> Result<()> {
        let seen = Arc::new(Seen::default());
        let server = reader(stage, &seen)?;
        for family in Family::BOTH {
            let sent = send(stage, family);
            // The SYN leaves, and is answered with a reset.
            let refused = stage.attempt("outside", stage.port("web", family, TEST_PORT)?)?;
            is_refused(&refused).with_context(|| format!("{sent:?}"))?;
        }
        seen_exactly(&seen, 0, 0)?;
        drop(server);
        let blocks = ["10.77.1.0/24".to_owned(), "fd77:1::/64".to_owned()];
        let seen = Arc::new(Seen::default());
        let server = reader(stage, &seen)?;
        stage.change_mesh(
            |mesh| {
                mode(mesh, "PERMISSIVE");
                mesh.policies.push(allow(
                    "by-address",
                    Rule {
                        ip_blocks: blocks.to_vec(),
                        ports: vec![TEST_PORT],
                        ..Rule::default()
                    },
                ));
            },
            "PERMISSIVE",
            |stage| send(stage, Family::V4),
        )?;
        ensure!(server.next(PATIENCE)? == 5, "the SYN's data is missing");
        send(stage, Family::V6)?;
        ensure!(server.next(PATIENCE)? == 5, "the SYN's data is missing");
        Ok(())
    };
    for pod in &pods {
        pod.sysctl(KEY, ALWAYS)?;
    }
    let done = attack(stage);
    for pod in &pods {
        pod.sysctl(KEY, "1")?;
    }
    done.map(|()| Verdict::Passed)
}
