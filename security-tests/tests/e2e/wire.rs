//! What a listener on the wire between the nodes sees, and what the kernel says of the
//! tunnels' sockets.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use anyhow::{Context, Result, ensure};
use ringfence_lab::capture::{Capture, frames_with};
use ringfence_lab::kernel_view::{kernel_tls_missing, tls_sockets};
use ringfence_lab::mesh::TEST_PORT;
use ringfence_lab::tcp::{Direction, Stream, streams};
use ringfence_lab::tls::{APPLICATION_DATA, Records};
use ringfence_lab::topology::Family;
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::server::{Server, echo};
use ringfence_security_tests::stage::{CLIENT_NODE, PATIENCE, SERVER_NODE, Stage, TUNNEL_PORT};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        the_wire_carries_tls13_records_and_no_marker,
        the_kernel_reports_tls_exactly_when_the_agents_say_so,
    ]
}

/// Sent through the mesh in both directions.
const SECRET: &[u8] = b"marker-that-must-not-be-seen-4c1d\n";
/// Sent to a destination outside the mesh: it must be seen, or the capture proves nothing.
const VISIBLE: &str = "marker-that-must-be-seen-77e2";

/// A capture on the server's end of the wire between the nodes.
pub fn listen(stage: &Stage) -> Result<Capture> {
    let lab = stage.lab()?;
    let (from, to) = (lab.node(CLIENT_NODE)?, lab.node(SERVER_NODE)?);
    Capture::start(&to.netns(), &lab.topology().wire(from))
}

/// Plaintext from `client` to a server outside the mesh, for a capture to see.
fn send_visible(stage: &Stage) -> Result<()> {
    let legacy = stage.port("legacy", Family::V4, 8080)?;
    stage.exec(
        "client",
        "curl",
        &[
            "--silent",
            "--fail",
            &format!("http://{legacy}/echo/{VISIBLE}"),
        ],
    )?;
    Ok(())
}

/// Connections that stay open, until one of them has made a new tunnel: idle tunnels are
/// used up first, whose beginning is not in the capture.
fn streams_over_a_new_tunnel(stage: &Stage, family: Family) -> Result<Vec<TcpStream>> {
    let before = stage.counter(SERVER_NODE, "handshakes")?;
    let mut open = Vec::new();
    while stage.counter(SERVER_NODE, "handshakes")? == before {
        ensure!(
            open.len() < 100,
            "100 connections at once, and no new tunnel"
        );
        let mut stream = stage.connect("client", Stage::service(family))?;
        exchange(&mut stream)?;
        open.push(stream);
    }
    Ok(open)
}

fn exchange(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(SECRET)?;
    let mut back = vec![0u8; SECRET.len()];
    stream.read_exact(&mut back)?;
    ensure!(back == SECRET, "the echo differs");
    Ok(())
}

fn finish(mut open: Vec<TcpStream>) -> Result<()> {
    for stream in &mut open {
        exchange(stream)?;
        stream.shutdown(Shutdown::Write)?;
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest)?;
        ensure!(rest.is_empty(), "{} bytes more than were sent", rest.len());
    }
    Ok(())
}

fn the_wire_carries_tls13_records_and_no_marker(stage: &mut Stage) -> Result<Verdict> {
    let _server = Server::start(&stage.lab()?.pod("web")?.netns(), TEST_PORT, PATIENCE, echo)?;
    for family in Family::BOTH {
        let capture = listen(stage)?;
        finish(streams_over_a_new_tunnel(stage, family)?)?;
        send_visible(stage)?;
        let frames = capture.stop()?;
        ensure!(
            frames_with(&frames, VISIBLE.as_bytes()) > 0,
            "the capture misses even a plaintext request"
        );
        let leaks = frames_with(&frames, SECRET);
        ensure!(
            leaks == 0,
            "{leaks} of {} packets carry the marker",
            frames.len()
        );
        all_tls13(&streams(&frames)).context(family.name())?;
    }
    Ok(Verdict::Passed)
}

/// Every connection to the tunnel port is TLS 1.3 from its first to its last byte, and there
/// is at least one.
fn all_tls13(streams: &BTreeMap<Direction, Stream>) -> Result<()> {
    let mut tunnels = 0;
    for (direction, request) in streams {
        // A tunnel from before the capture has no beginning in it.
        if direction.to.port() != TUNNEL_PORT || request.bytes.is_empty() {
            continue;
        }
        let answer = streams
            .get(&direction.reverse())
            .context("a tunnel without an answer")?;
        let mut data = 0;
        for stream in [request, answer] {
            ensure!(
                stream.unplaced == 0,
                "{} bytes could not be placed",
                stream.unplaced
            );
            let records = Records::parse(&stream.bytes);
            if let Some(violation) = records.violation {
                anyhow::bail!("{} speaks no TLS: {violation}", direction.to);
            }
            data += records.count(APPLICATION_DATA);
        }
        let hello = Records::parse(&answer.bytes)
            .server_hello
            .context("a tunnel without a ServerHello")?;
        ensure!(
            hello.is_tls13(),
            "{} chose version {:04x}",
            direction.to,
            hello.version
        );
        ensure!(data > 0, "no application data to {}", direction.to);
        tunnels += 1;
    }
    ensure!(tunnels > 0, "no new tunnel was captured");
    Ok(())
}

fn the_kernel_reports_tls_exactly_when_the_agents_say_so(stage: &mut Stage) -> Result<Verdict> {
    let missing = kernel_tls_missing();
    let _server = Server::start(&stage.lab()?.pod("web")?.netns(), TEST_PORT, PATIENCE, echo)?;
    let mut stream = stage.connect("client", Stage::service(Family::V4))?;
    exchange(&mut stream)?;
    for (node, pod) in [(CLIENT_NODE, "client"), (SERVER_NODE, "web")] {
        let says = stage.status(node)?.record_layer;
        let sockets = tls_sockets(&stage.lab()?.pod(pod)?.netns())?;
        let tunnel = format!(":{TUNNEL_PORT}");
        let ends = |address: &str| address.ends_with(&tunnel);
        let tunnels: Vec<_> = sockets
            .iter()
            .filter(|socket| ends(&socket.local) || ends(&socket.remote))
            .collect();
        match &missing {
            None => {
                ensure!(
                    says.mode == "kernel",
                    "this kernel has TLS; {node} says {says:?}"
                );
                ensure!(
                    !tunnels.is_empty(),
                    "the kernel reports no TLS socket in {pod}: {sockets:?}"
                );
                for tunnel in tunnels {
                    ensure!(
                        tunnel.both_directions() && tunnel.version == "1.3",
                        "{pod}: {tunnel:?}"
                    );
                }
            }
            Some(reason) => {
                ensure!(
                    says.mode == "software",
                    "this kernel has no TLS ({reason}); {node} says {says:?}"
                );
                ensure!(
                    !says.reason.is_empty(),
                    "{node} gives no reason for software records"
                );
                ensure!(sockets.is_empty(), "{pod}: {sockets:?}");
            }
        }
    }
    finish(vec![stream])?;
    Ok(Verdict::Passed)
}

/// Frames that carry any of the plaintext that the lab's probes send.
pub fn plaintext_frames(frames: &[Vec<u8>], to: SocketAddr) -> usize {
    streams(frames)
        .iter()
        .filter(|(direction, stream)| direction.to == to && !stream.bytes.is_empty())
        .count()
}
