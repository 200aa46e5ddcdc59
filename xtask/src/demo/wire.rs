//! The wire between the nodes, as a listener without keys sees it.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use ringfence_lab::Lab;
use ringfence_lab::capture::{Capture, frames_with};
use ringfence_lab::tcp::{Direction, Stream, streams};
use ringfence_lab::tls::{APPLICATION_DATA, Records};
use ringfence_lab::topology::Family;

use super::Demo;
use super::report::{Rows, seen};
use super::traffic::MARKER;

/// Where tunnels arrive.
pub const TUNNEL_PORT: u16 = 15008;
/// Sent to a server outside the mesh: it must be visible, or the capture proves nothing.
const CONTROL: &str = "ringfence-demo-visible-9b3e";

/// A capture on the receiving node's end of the wire.
pub struct Listening(Result<Capture>);

impl Listening {
    pub fn start(lab: &Lab) -> Self {
        Listening(start(lab))
    }
}

fn start(lab: &Lab) -> Result<Capture> {
    let [sender, receiver, ..] = lab.topology().nodes.as_slice() else {
        anyhow::bail!("a lab of fewer than two nodes");
    };
    Capture::start(&receiver.netns(), &lab.topology().wire(sender))
}

impl Demo {
    pub fn wire(&mut self, rows: &mut Rows, listening: Listening) {
        rows.add("the wire: TLS 1.3 records, no marker", || {
            let capture = listening.0?;
            let legacy = self.lab.pod("legacy")?.address(Family::V4);
            self.curl("client", legacy, 8080, &format!("/echo/{CONTROL}"))?;
            let frames = capture.stop()?;
            ensure!(
                frames_with(&frames, CONTROL.as_bytes()) > 0,
                "the capture misses even a request in plaintext: it cannot be trusted"
            );
            let leaks = frames_with(&frames, MARKER.as_bytes());
            ensure!(leaks == 0, "{leaks} of {} packets carry the marker in plaintext", frames.len());
            let tunnels = Tunnels::of(&streams(&frames))?;
            seen(format!(
                "{} packets: {} tunnels {}, {} records of application data, marker in none (a plaintext control is seen)",
                frames.len(),
                tunnels.connections,
                tunnels.cipher,
                tunnels.records
            ))
        });
    }
}

struct Tunnels {
    connections: usize,
    records: usize,
    cipher: &'static str,
}

impl Tunnels {
    /// Every connection to the tunnel port must be TLS 1.3 from its first to its last byte.
    fn of(streams: &std::collections::BTreeMap<Direction, Stream>) -> Result<Self> {
        let mut tunnels = Tunnels {
            connections: 0,
            records: 0,
            cipher: "",
        };
        let dialled = streams.keys().filter(|direction| is_tunnel(direction.to));
        for direction in dialled {
            let answer = streams
                .get(&direction.reverse())
                .context("a tunnel without an answer")?;
            let request = streams
                .get(direction)
                .context("a tunnel without a request")?;
            for (name, stream) in [("to", request), ("from", answer)] {
                ensure!(
                    stream.unplaced == 0,
                    "{} bytes {name} {} could not be placed",
                    stream.unplaced,
                    direction.to
                );
                let records = Records::parse(&stream.bytes);
                if let Some(violation) = records.violation {
                    anyhow::bail!("what goes {name} {} is not TLS: {violation}", direction.to);
                }
                tunnels.records += records.count(APPLICATION_DATA);
                if let Some(hello) = records.server_hello {
                    ensure!(
                        hello.is_tls13(),
                        "{} chose version {:04x}",
                        direction.to,
                        hello.version
                    );
                    tunnels.cipher = hello.cipher_name();
                    tunnels.connections += 1;
                }
            }
        }
        ensure!(
            tunnels.connections > 0,
            "no TLS handshake to port {TUNNEL_PORT} was captured"
        );
        ensure!(
            tunnels.records > 0,
            "no application data to port {TUNNEL_PORT} was captured"
        );
        Ok(tunnels)
    }
}

fn is_tunnel(address: SocketAddr) -> bool {
    address.port() == TUNNEL_PORT
}
