//! Who is admitted, attacked: addresses that are somebody else's, bytes before the verdict,
//! bursts while policies change, segments by hand, and a pod's neighbours on its own node.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ringfence_lab::capture::Capture;
use ringfence_lab::mesh::{Action, Mesh, Policy, Rule, TEST_PORT, principal};
use ringfence_lab::netns::Netns;
use ringfence_lab::probe::{Acceptor, GREETING};
use ringfence_lab::process::wait_until;
use ringfence_lab::tcp::{Direction, next_sequence, streams};
use ringfence_lab::topology::Family;
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::server::{Server, patient};
use ringfence_security_tests::stage::{
    CLIENT_NODE, PATIENCE, SERVER_NODE, Stage, is_answered, is_refused, only_peer,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::evasions::{ask, ip_packet, octets, tcp};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        a_pod_that_takes_another_pods_address_keeps_its_own_identity,
        plaintext_from_a_taken_address_has_no_identity,
        early_bytes_of_a_denied_identity_are_never_read,
        data_in_a_plaintext_syn_is_never_read_under_strict,
        no_stream_outlives_a_swap_that_denies_it_by_a_second,
        segments_from_the_node_do_not_get_into_a_last_hop,
        a_neighbour_on_the_same_node_is_reached_through_its_agent_alone,
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

fn admit(name: &str, rule: Rule) -> Policy {
    Policy {
        name: name.into(),
        rules: vec![rule],
        ..Policy::clients_may_use_web()
    }
}

fn mode(mesh: &mut Mesh, mode: &str) {
    for entry in &mut mesh.peer_authentication {
        entry.mode = mode.to_owned();
    }
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
        |mesh| mesh.policies.push(admit("the-intruder-too", rule)),
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
        admit(
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
                mesh.policies.push(admit(
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

/// What one client of the burst has met.
#[derive(Debug, Default)]
struct Met {
    refusals: AtomicUsize,
    errors: Mutex<Vec<(Instant, std::io::Error)>>,
    /// When each echo was asked for that came back.
    echoes: Mutex<Vec<Instant>>,
}

impl Met {
    fn last_echo(&self) -> Option<Instant> {
        let echoes = self.echoes.lock().unwrap_or_else(PoisonError::into_inner);
        echoes.last().copied()
    }
}

/// Connects and asks for echoes on each connection until it ends, again and again. With
/// `short`, each connection ends after one echo.
fn burst(
    netns: &Netns,
    target: SocketAddr,
    short: bool,
    stop: &AtomicBool,
    met: &Met,
) -> Result<()> {
    let echo = |stream: &mut TcpStream| -> std::io::Result<()> {
        let asked = Instant::now();
        stream.write_all(b"?")?;
        stream.read_exact(&mut [0; 1])?;
        met.echoes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(asked);
        Ok(())
    };
    let once = || -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
        patient(&stream, PATIENCE)?;
        echo(&mut stream)?;
        while !short && !stop.load(Ordering::Acquire) {
            std::thread::park_timeout(Duration::from_millis(10));
            echo(&mut stream)?;
        }
        Ok(())
    };
    netns.run(|| {
        while !stop.load(Ordering::Acquire) {
            if let Err(error) = once() {
                met.refusals.fetch_add(1, Ordering::AcqRel);
                met.errors
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push((Instant::now(), error));
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
    })
}

fn no_stream_outlives_a_swap_that_denies_it_by_a_second(stage: &mut Stage) -> Result<Verdict> {
    // As in the rotation case: a second is nothing there.
    if std::env::var_os("RINGFENCE_EMULATED").is_some() {
        return Ok(Verdict::Skipped(
            "a second is too short for an emulated processor that is shared".into(),
        ));
    }
    let web = stage.lab()?.pod("web")?.netns();
    let _server = Server::start(
        &web,
        TEST_PORT,
        PATIENCE,
        ringfence_security_tests::server::echo,
    )?;
    let rule = |ports: Vec<u16>| Rule {
        principals: vec![principal("intruder")],
        ports,
        ..Rule::default()
    };
    stage
        .lab_mut()?
        .update_mesh(|mesh| mesh.policies.push(admit("swapped", rule(vec![TEST_PORT]))))?;
    let denied: Vec<Met> = (0..4).map(|_| Met::default()).collect();
    let others: Vec<Met> = (0..4).map(|_| Met::default()).collect();
    let stop = AtomicBool::new(false);
    let (one, two) = (
        stage.lab()?.pod("intruder")?.netns(),
        stage.lab()?.pod("client")?.netns(),
    );
    std::thread::scope(|scope| -> Result<()> {
        let mut clients = Vec::new();
        for (netns, all) in [(&one, &denied), (&two, &others)] {
            for (index, met) in all.iter().enumerate() {
                let family = *Family::BOTH.get(index % 2).unwrap_or(&Family::V4);
                let (short, stop) = (index >= 2, &stop);
                clients.push(
                    scope.spawn(move || burst(netns, Stage::service(family), short, stop, met)),
                );
            }
        }
        let swapped = swap_twenty_times(stage, &denied, rule(Vec::new()));
        stop.store(true, Ordering::Release);
        for client in clients {
            client
                .join()
                .map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        swapped
    })?;
    for met in &others {
        let refusals = met.refusals.load(Ordering::Acquire);
        ensure!(
            refusals == 0 && met.last_echo().is_some(),
            "a client that no swap concerns failed {refusals} times: {:?}",
            met.errors.lock().unwrap_or_else(PoisonError::into_inner)
        );
    }
    Ok(Verdict::Passed)
}

/// Ten times denied, ten times admitted again.
fn swap_twenty_times(stage: &mut Stage, denied: &[Met], rule: Rule) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(1);
    for turn in 0..10 {
        let since = Instant::now();
        wait_until("every stream to be admitted", PATIENCE, || {
            ensure!(
                denied.iter().all(|met| met.last_echo() > Some(since)),
                "not yet in turn {turn}"
            );
            Ok(())
        })?;
        let denial = Policy {
            action: Action::Deny,
            ..admit("denied", rule.clone())
        };
        stage
            .lab_mut()?
            .update_mesh(|mesh| mesh.policies.push(denial))?;
        let in_force = Instant::now();
        let refusals: Vec<usize> = denied
            .iter()
            .map(|met| met.refusals.load(Ordering::Acquire))
            .collect();
        // The limit is over, and everybody has been refused since.
        wait_until("everybody to be refused", PATIENCE, || {
            ensure!(in_force.elapsed() > LIMIT, "the time is not over");
            for (met, before) in denied.iter().zip(&refusals) {
                ensure!(
                    met.refusals.load(Ordering::Acquire) > *before,
                    "one has not been refused in turn {turn}"
                );
            }
            Ok(())
        })?;
        for met in denied {
            let last = met.last_echo().context("no echo at all")?;
            let late = last.saturating_duration_since(in_force);
            ensure!(
                late < LIMIT,
                "turn {turn}: an answer {late:?} after the denial"
            );
        }
        stage
            .lab_mut()?
            .update_mesh(|mesh| mesh.policies.retain(|policy| policy.name != "denied"))?;
    }
    Ok(())
}

const PSH_ACK: u8 = 0x18;
const RST: u8 = 0x04;
const RST_ACK: u8 = 0x14;

/// A segment with these numbers (sequence, acknowledged), complete with its checksum.
fn segment(direction: Direction, numbers: (u32, u32), flags: u8, data: &[u8]) -> Vec<u8> {
    let Direction { from, to } = direction;
    let with_checksum = |checksum: u16| {
        let mut tcp = Vec::new();
        tcp.extend(from.port().to_be_bytes());
        tcp.extend(to.port().to_be_bytes());
        tcp.extend(numbers.0.to_be_bytes());
        tcp.extend(numbers.1.to_be_bytes());
        // 20 bytes of header, the flags, the window.
        tcp.extend([5 << 4, flags, 0xff, 0xff]);
        tcp.extend(checksum.to_be_bytes());
        tcp.extend([0, 0]);
        tcp.extend(data);
        tcp
    };
    let tcp = with_checksum(0);
    // RFC 9293, section 3.1; for IPv6 RFC 8200, section 8.1: the sum is the same.
    let mut pseudo = [octets(from.ip()), octets(to.ip())].concat();
    pseudo.extend((tcp.len() as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, 6]);
    pseudo.extend(&tcp);
    let mut sum: u32 = pseudo
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
            [high] => u32::from(*high) << 8,
            _ => 0,
        })
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    ip_packet(from.ip(), to.ip(), &with_checksum(!(sum as u16)))
}

/// Sends packets that are complete from their IP header on.
fn send_raw(netns: &Netns, to: IpAddr, packets: &[Vec<u8>]) -> Result<()> {
    let target = SockAddr::from(SocketAddr::new(to, 0));
    netns
        .run(|| -> std::io::Result<()> {
            let domain = Domain::for_address(SocketAddr::new(to, 0));
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(255)))?;
            for packet in packets {
                socket.send_to(packet, &target)?;
            }
            Ok(())
        })?
        .with_context(|| format!("sending raw packets to {to}"))
}

/// A connection to an echo server, and the segments that would be next in it.
fn watched(
    stage: &Stage,
    watch: (&str, &str),
    from: &str,
    target: SocketAddr,
) -> Result<(TcpStream, Direction, (u32, u32))> {
    let capture = Capture::start(&stage.lab()?.pod(watch.0)?.netns(), watch.1)?;
    let mut stream = stage.connect(from, target)?;
    stream.write_all(b"hello")?;
    stream.read_exact(&mut [0; 5])?;
    let frames = capture.stop()?;
    let source = stage.address(
        from,
        if target.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        },
    )?;
    let direction = streams(&frames)
        .into_keys()
        .find(|way| way.from.ip() == source && way.to.port() == TEST_PORT)
        .context("the connection is not in the capture")?;
    let ours = next_sequence(&frames, direction).context("no segment")?;
    let theirs = next_sequence(&frames, direction.reverse()).context("no answer")?;
    Ok((stream, direction, (ours, theirs)))
}

fn segments_from_the_node_do_not_get_into_a_last_hop(stage: &mut Stage) -> Result<Verdict> {
    const INJECTED: &str = "kernel.guard_injected_segment";
    // What is read, and how it ends.
    let echo = |mut stream: TcpStream| -> Result<(Vec<u8>, Option<std::io::ErrorKind>)> {
        let (mut data, mut buffer) = (Vec::new(), [0; 64]);
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok((data, None)),
                Ok(count) => {
                    let read = buffer.get(..count).unwrap_or_default();
                    data.extend(read);
                    if let Err(error) = stream.write_all(read) {
                        return Ok((data, Some(error.kind())));
                    }
                }
                Err(error) => return Ok((data, Some(error.kind()))),
            }
        }
    };
    let node = stage.lab()?.node(SERVER_NODE)?.netns();
    let at = |pod: &str| stage.lab()?.pod(pod).map(|pod| pod.netns());
    let meshed = Server::start(&at("web")?, TEST_PORT, PATIENCE, echo)?;
    let plain = Server::start(&at("outside-b")?, TEST_PORT, PATIENCE, echo)?;
    for family in Family::BOTH {
        let attack = |direction, (ours, theirs): (u32, u32)| -> [Vec<u8>; 3] {
            [
                segment(direction, (ours, theirs), PSH_ACK, b"evil!"),
                segment(direction, (ours.wrapping_add(5), theirs), RST_ACK, b""),
                segment(direction, (ours, 0), RST, b""),
            ]
        };
        let before = stage.counter(SERVER_NODE, INJECTED)?;
        let (mut stream, direction, numbers) =
            watched(stage, ("web", "lo"), "client", Stage::service(family))?;
        send_raw(&node, direction.to.ip(), &attack(direction, numbers))?;
        stage.wait_counter(SERVER_NODE, INJECTED, before + 3)?;
        let mut answer = [0; 4];
        stream.write_all(b"good")?;
        stream.read_exact(&mut answer)?;
        ensure!(&answer == b"good", "the client read {answer:?}");
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest)?;
        ensure!(rest.is_empty(), "and then {rest:?}");
        let served = meshed.next(PATIENCE)?;
        ensure!(
            served == (b"hellogood".to_vec(), None),
            "the application saw {served:?}"
        );

        // The twin: between two pods outside the mesh the same three do what they are for.
        let target = stage.port("outside-b", family, TEST_PORT)?;
        let (_stream, direction, numbers) =
            watched(stage, ("outside-b", "eth0"), "outside", target)?;
        let [data, reset, _] = attack(direction, numbers);
        send_raw(&node, direction.to.ip(), &[data, reset])?;
        let served = plain.next(PATIENCE)?;
        ensure!(
            served
                == (
                    b"helloevil!".to_vec(),
                    Some(std::io::ErrorKind::ConnectionReset)
                ),
            "the application saw {served:?}"
        );
    }
    Ok(Verdict::Passed)
}

/// `client` and `intruder` are on one node; nothing but its own application is admitted.
fn a_neighbour_on_the_same_node_is_reached_through_its_agent_alone(
    stage: &mut Stage,
) -> Result<Verdict> {
    const TO_MESH: &str = "kernel.guard_plaintext_to_mesh";
    let refused = r#"refused{reason="policy-denied"}"#;
    let netns = stage.lab()?.pod("client")?.netns();
    let mut application = Acceptor::start(&netns, TEST_PORT)?;
    let protect = Policy {
        name: "web-may-use-client".into(),
        app: Some("client".into()),
        rules: vec![Rule {
            principals: vec![principal("web")],
            ports: vec![TEST_PORT],
            ..Rule::default()
        }],
        ..Policy::clients_may_use_web()
    };
    stage.change_mesh(
        |mesh| mesh.policies.push(protect),
        "the neighbour to be protected",
        |stage| {
            is_refused(&stage.attempt("intruder", stage.port("client", Family::V4, TEST_PORT)?)?)
        },
    )?;
    let accepted = application.accepted().len();
    let node = stage.lab()?.node(CLIENT_NODE)?.netns();
    for family in Family::BOTH {
        let target = stage.port("client", family, TEST_PORT)?;
        let before = stage.counter(CLIENT_NODE, refused)?;
        is_refused(&stage.attempt("intruder", target)?).context("the pod's address")?;
        stage.wait_counter(CLIENT_NODE, refused, before + 1)?;
        is_refused(&stage.attempt("outside", target)?).context("from outside the mesh")?;
        let from_node = ringfence_lab::probe::connect(&node, target, b"hello\n", PATIENCE)?;
        is_refused(&from_node).context("from the node itself")?;
        // By its own veth, past every hook of a socket, under its own and a stranger's name.
        let before = stage.counter(CLIENT_NODE, TO_MESH)?;
        for source in ["intruder", "outside", "web"] {
            let direction = Direction {
                from: stage.port(source, family, 4000)?,
                to: target,
            };
            let syn = segment(direction, (1, 0), 0x02, b"hello\n");
            let intruder = stage.lab()?.pod("intruder")?.netns();
            send_raw(&intruder, target.ip(), &[syn])?;
        }
        stage.wait_counter(CLIENT_NODE, TO_MESH, before + 3)?;
    }
    ensure!(
        application.accepted().len() == accepted,
        "the neighbour accepted {:?}",
        application.accepted()
    );
    drop(application);
    for family in Family::BOTH {
        let mut application = Acceptor::start(&netns, TEST_PORT)?;
        is_answered(&stage.attempt("web", stage.port("client", family, TEST_PORT)?)?)?;
        only_peer(&mut application, stage.address("web", family)?)?;
    }
    Ok(Verdict::Passed)
}
