//! Certificates and roots that are exchanged while everything goes on.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use ktls_offload::protocol::Message;
use ringfence_control_plane::rotate::{self, RotationPhase};
use ringfence_control_plane::{RotationReport, RotationStep};
use ringfence_lab::mesh::{TEST_PORT, TRUST_DOMAIN};
use ringfence_lab::process::wait_until;
use ringfence_lab::status::{Handshake, Status};
use ringfence_lab::topology::{Family, PodSpec};
use ringfence_security_tests::authority::{Authority, Leaf, spiffe_id};
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::load::{Kind, Load};
use ringfence_security_tests::peer::{ALERT, Peer};
use ringfence_security_tests::server::{Server, echo};
use ringfence_security_tests::stage::{CLIENT_NODE, PATIENCE, SERVER_NODE, Stage};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;

use crate::handshakes::knock;

pub fn cases() -> Vec<Case<Stage>> {
    cases![fifty_streams_live_through_six_rotations_and_a_new_root]
}

const STREAMS: u64 = 50;
/// Of each identity.
const ROTATIONS: usize = 6;
/// Idle streams wait that long for a word.
const WHOLE_TEST: Duration = Duration::from_secs(1800);
/// TLS alert unknown_ca (RFC 8446, section 6.2).
const UNKNOWN_CA: u8 = 48;

fn fifty_streams_live_through_six_rotations_and_a_new_root(stage: &mut Stage) -> Result<Verdict> {
    // `cargo xtask test` sets it for its guests, which share the cores.
    if std::env::var_os("RINGFENCE_EMULATED").is_some() {
        return Ok(Verdict::Skipped(
            "certificates of 20 s are too short for an emulated processor that is shared".into(),
        ));
    }
    let short_lived = |config: &mut ringfence_lab::LabConfig| {
        config.svid_ttl = "20s".into();
        config.pods = PodSpec::defaults(2)
            .into_iter()
            .map(|pod| PodSpec {
                serves: false,
                ..pod
            })
            .collect();
    };
    stage.beside("rot", short_lived, |stage| rotate_under_load(stage))?;
    Ok(Verdict::Passed)
}

fn rotate_under_load(stage: &Stage) -> Result<()> {
    let old = stage.authority()?;
    is_welcome(stage, &old)?;
    let ends_before = stream_ends(stage)?;

    let servers = ["web", "client"].map(|pod| -> Result<Server<u64>> {
        Server::start(&stage.lab()?.pod(pod)?.netns(), TEST_PORT, WHOLE_TEST, echo)
    });
    let mut load = Load::new();
    for (number, kind) in (0..STREAMS).zip(Kind::ALL.into_iter().cycle()) {
        // Six in a row have all kinds in both directions.
        let way = WAYS.get(usize::from(number % 6 > 2)).context("two ways")?;
        let family = Family::BOTH
            .get(usize::from(number % 4 > 1))
            .context("two families")?;
        let target = way.target(stage, *family)?;
        let stream = stage.connect(way.from.0, target)?;
        stream.set_read_timeout(Some(WHOLE_TEST))?;
        let name = format!("stream {number}, {kind:?} from {} to {target}", way.from.0);
        load.add(name, kind, stream, number);
    }

    let mut witness = Witness::new(stage)?;
    let mut rotation = RootRotation::new(stage)?;
    while witness.rotations() < ROTATIONS || !rotation.is_over(&witness) {
        load.watch(Duration::from_secs(1))?;
        for way in &WAYS {
            witness.connect(stage, way)?;
        }
        rotation.go_on(stage, &witness)?;
    }

    let new = stage.authority()?;
    for node in [CLIENT_NODE, SERVER_NODE] {
        for svid in stage.status(node)?.svids {
            ensure!(
                svid.issuer != rotation.old_issuer,
                "{} is still of the old root",
                svid.id
            );
        }
    }
    let shown = is_welcome(stage, &new)?;
    chains_to(&shown, &stage.lab()?.root_certificate())?;
    is_unknown(stage, &old).context("a certificate of the root that was taken out")?;

    for stream in &mut witness.held {
        exchange(stream).context("a connection that was made on the way")?;
    }
    let (handshakes, rotations) = (witness.handshakes, witness.rotations());
    let fresh = std::mem::take(&mut witness.held).len();
    ensure!(
        handshakes >= fresh,
        "{fresh} new connections made {handshakes} handshakes"
    );
    let carried = load.end(PATIENCE)?;
    wait_until("all streams to end", PATIENCE, || {
        for node in [CLIENT_NODE, SERVER_NODE] {
            let left = stage.status(node)?.streams.len();
            ensure!(left == 0, "{node} has {left}");
        }
        Ok(())
    })?;
    for server in servers {
        drop(server?);
    }
    for (end, count) in stream_ends(stage)? {
        let before = ends_before.get(&end).copied().unwrap_or_default();
        ensure!(
            end.contains("\"finished\"") || count == before,
            "{} streams ended by {end}",
            count - before
        );
    }
    println!(
        "{} streams and {fresh} new connections over {rotations} rotations and one of the root: {handshakes} handshakes, each under the newest certificate; {} bytes there and back, 0 lost; 0 resets",
        carried.streams, carried.bytes
    );
    Ok(())
}

/// From a pod of a node to a pod of another.
struct Way {
    from: (&'static str, &'static str),
    to: (&'static str, &'static str),
}

const WAYS: [Way; 2] = [
    Way {
        from: ("client", CLIENT_NODE),
        to: ("web", SERVER_NODE),
    },
    Way {
        from: ("web", SERVER_NODE),
        to: ("client", CLIENT_NODE),
    },
];

impl Way {
    fn target(&self, stage: &Stage, family: Family) -> Result<SocketAddr> {
        stage.port(self.to.0, family, TEST_PORT)
    }
}

/// Makes new connections and looks under which certificates.
struct Witness {
    /// Serial numbers of each identity, oldest first.
    serials: BTreeMap<String, Vec<String>>,
    /// Open to the end: a connection that ended would leave its tunnel to the next one.
    held: Vec<TcpStream>,
    handshakes: usize,
}

impl Witness {
    fn new(stage: &Stage) -> Result<Self> {
        let mut witness = Witness {
            serials: BTreeMap::new(),
            held: Vec::new(),
            handshakes: 0,
        };
        for node in [CLIENT_NODE, SERVER_NODE] {
            witness.note(&stage.status(node)?);
        }
        Ok(witness)
    }

    fn note(&mut self, status: &Status) {
        for svid in &status.svids {
            let serials = self.serials.entry(svid.id.clone()).or_default();
            if serials.last() != Some(&svid.serial) {
                serials.push(svid.serial.clone());
            }
        }
    }

    /// How often the identity that did so least has changed its certificate.
    fn rotations(&self) -> usize {
        let counts = self.serials.values().map(|serials| serials.len() - 1);
        counts.min().unwrap_or_default()
    }

    /// One new connection, whose handshake must be under certificates that were the newest
    /// when it was made: those of just before or those of just after.
    fn connect(&mut self, stage: &Stage, way: &Way) -> Result<()> {
        let look =
            || -> Result<[Status; 2]> { Ok([stage.status(way.from.1)?, stage.status(way.to.1)?]) };
        let before = look()?;
        let mut stream = stage.connect(way.from.0, way.target(stage, Family::V4)?)?;
        exchange(&mut stream).context("a new connection")?;
        self.held.push(stream);
        let after = look()?;
        for (side, pod, direction) in [(0, way.to.0, "outbound"), (1, way.from.0, "inbound")] {
            let (Some(before_here), Some(after_here)) = (before.get(side), after.get(side)) else {
                continue;
            };
            // The peer's certificate is told by the peer's agent, not by the one that saw it.
            let peer = spiffe_id(pod);
            let mut newest = Vec::new();
            for status in [before.get(1 - side), after.get(1 - side)]
                .into_iter()
                .flatten()
            {
                newest.push(status.svid(&peer)?.serial.clone());
            }
            for handshake in made_between(before_here, after_here)? {
                ensure!(
                    handshake.direction == direction && handshake.peer == peer,
                    "an unexpected handshake: {handshake:?}"
                );
                ensure!(
                    newest.contains(&handshake.serial),
                    "{direction} handshake with {peer} under {}, whose newest is {newest:?}",
                    handshake.serial
                );
                self.handshakes += 1;
            }
        }
        after.iter().for_each(|status| self.note(status));
        Ok(())
    }
}

/// The handshakes that the second look at an agent has and the first has not.
fn made_between<'a>(before: &Status, after: &'a Status) -> Result<&'a [Handshake]> {
    let count = after.counter("handshakes") - before.counter("handshakes");
    let new = after.handshakes.get(..usize::try_from(count)?);
    new.with_context(|| format!("{count} handshakes at once"))
}

/// An exchange of the embedded CA's root, step by step and as early as it cuts nobody off.
struct RootRotation {
    old_issuer: String,
    /// How many serial numbers each identity had when the last step was in force.
    finished: Option<BTreeMap<String, usize>>,
}

impl RootRotation {
    fn new(stage: &Stage) -> Result<Self> {
        let status = stage.status(CLIENT_NODE)?;
        step(stage, "prepare")?;
        Ok(RootRotation {
            old_issuer: status.svid(&spiffe_id("client"))?.issuer.clone(),
            finished: None,
        })
    }

    fn go_on(&mut self, stage: &Stage, witness: &Witness) -> Result<()> {
        let report = report(stage)?;
        let due = report.served
            && report
                .next
                .is_some_and(|next| next.not_before.is_some_and(|at| at <= SystemTime::now()));
        match (report.phase, report.next) {
            (_, Some(next)) if due => {
                let name = match next.step {
                    RotationStep::Switch => "switch",
                    RotationStep::Finish => "finish",
                    other => anyhow::bail!("`{other}` comes next"),
                };
                step(stage, name)
            }
            (RotationPhase::Idle, None) if report.served && self.finished.is_none() => {
                let counts = witness.serials.iter();
                self.finished = Some(
                    counts
                        .map(|(id, serials)| (id.clone(), serials.len()))
                        .collect(),
                );
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Agents learn of the roots with their next certificate: everybody has got one since.
    fn is_over(&self, witness: &Witness) -> bool {
        self.finished.as_ref().is_some_and(|then| {
            let mut serials = witness.serials.iter();
            serials.all(|(id, now)| then.get(id).is_some_and(|then| now.len() > *then))
        })
    }
}

fn report(stage: &Stage) -> Result<RotationReport> {
    let state = stage.lab()?.mesh()?.state_dir.clone();
    Ok(rotate::status(&state, TRUST_DOMAIN)?)
}

/// A step as an operator takes it.
fn step(stage: &Stage, name: &str) -> Result<()> {
    let output = Command::new(stage.binary())
        .args(["rotate-root", "--config"])
        .arg(stage.lab()?.mesh_file())
        .arg(name)
        .stdin(Stdio::null())
        .output()?;
    ensure!(
        output.status.success(),
        "`ringfence rotate-root {name}`: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

pub fn exchange(stream: &mut TcpStream) -> Result<()> {
    const WORD: &[u8] = b"word";
    stream.write_all(WORD)?;
    let mut back = [0; WORD.len()];
    stream.read_exact(&mut back)?;
    ensure!(back == WORD, "another word came back");
    Ok(())
}

/// How many streams ended how, on both nodes.
fn stream_ends(stage: &Stage) -> Result<BTreeMap<String, u64>> {
    let mut ends = BTreeMap::new();
    for node in [CLIENT_NODE, SERVER_NODE] {
        for (name, count) in stage.status(node)?.counters {
            if name.starts_with("stream_ends{") {
                *ends.entry(name).or_default() += count;
            }
        }
    }
    Ok(ends)
}

/// A certificate of `client` from that CA is accepted by `web`, whose chain is returned.
fn is_welcome(stage: &Stage, authority: &Authority) -> Result<Vec<CertificateDer<'static>>> {
    let mut peer = peer_of(stage, authority)?;
    ensure!(peer.hear()? == Message::Ready, "no READY");
    let shown = peer.certificates().to_vec();
    peer.leave()?;
    Ok(shown)
}

fn is_unknown(stage: &Stage, authority: &Authority) -> Result<()> {
    let records = peer_of(stage, authority)?.until_closed()?;
    ensure!(
        records == [(ALERT, vec![2, UNKNOWN_CA])],
        "records {records:?} instead of an alert"
    );
    Ok(())
}

fn peer_of(stage: &Stage, authority: &Authority) -> Result<Peer> {
    let credentials = authority.issue(&Leaf::of("client"))?;
    Peer::connect(
        knock(stage, Family::V4)?,
        Some(&credentials),
        &[b"ringfence/1"],
    )
}

/// Whether a chain leads to one of the roots in a PEM file.
pub fn chains_to(chain: &[CertificateDer<'_>], roots: &Path) -> Result<()> {
    let read = CertificateDer::pem_file_iter(roots)?.collect::<Result<_, _>>()?;
    chains_to_roots(chain, read).with_context(|| roots.display().to_string())
}

/// By rustls's own verifier: ours is under test.
pub fn chains_to_roots(
    chain: &[CertificateDer<'_>],
    roots: Vec<CertificateDer<'static>>,
) -> Result<()> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider).build()?;
    let (leaf, intermediates) = chain.split_first().context("an empty chain")?;
    verifier
        .verify_client_cert(leaf, intermediates, UnixTime::now())
        .context("the chain leads to none of the roots")?;
    Ok(())
}
