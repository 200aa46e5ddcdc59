//! Post-quantum key exchange: what is agreed on is reported, and can be required.

use anyhow::{Context, Result, ensure};
use ktls_offload::protocol::Message;
use ringfence_lab::status::Handshake;
use ringfence_lab::topology::Family;
use ringfence_security_tests::authority::{Leaf, spiffe_id};
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::peer::{KeyExchange, Peer};
use ringfence_security_tests::stage::{
    CLIENT_NODE, PATIENCE, SERVER_NODE, Stage, is_answered, is_reset,
};

use crate::handshakes::knock;
use crate::impostor::{announce, with_server};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        a_classical_peer_is_served_and_its_key_exchange_reported,
        a_classical_peer_is_refused_where_post_quantum_is_required,
    ]
}

const HYBRID: &str = "X25519MLKEM768";
const CLASSICAL: &str = "X25519";
const INCOMPATIBLE: &str = "handshake_failures{reason=\"incompatible\"}";

/// The last handshake that an agent had with that peer.
fn last(stage: &Stage, node: &str, service_account: &str) -> Result<Handshake> {
    let peer = spiffe_id(service_account);
    let handshakes = stage.status(node)?.handshakes;
    let mut with_peer = handshakes.into_iter().filter(|known| known.peer == peer);
    with_peer
        .next()
        .with_context(|| format!("{node} knows no handshake with {peer}"))
}

/// A tunnel of a hostile peer to `web`.
fn tunnel(stage: &Stage, key_exchange: KeyExchange) -> Result<Peer> {
    let credentials = stage.authority()?.issue(&Leaf::of("client"))?;
    let stream = knock(stage, Family::V4)?;
    Peer::connect_by(stream, Some(&credentials), &[b"ringfence/1"], key_exchange)
}

fn is_served(stage: &Stage, key_exchange: KeyExchange, reported: &str) -> Result<()> {
    let mut peer = tunnel(stage, key_exchange)?;
    ensure!(peer.hear()? == Message::Ready, "no READY");
    peer.leave()?;
    let handshake = last(stage, SERVER_NODE, "client")?;
    ensure!(handshake.key_exchange == reported, "{handshake:?}");
    Ok(())
}

/// `client` dials a server in the decoy's place that knows these key exchanges.
fn dials(stage: &Stage, key_exchange: KeyExchange) -> Result<bool> {
    let credentials = stage.authority()?.issue(&Leaf::of("decoy"))?;
    let (met, outcome) = with_server(stage, credentials, key_exchange)?;
    match met {
        Ok(first) => {
            ensure!(first == b"hello\n", "the server was sent {first:?}");
            is_answered(&outcome)?;
            Ok(true)
        }
        Err(_) => {
            is_reset(&outcome)?;
            Ok(false)
        }
    }
}

fn a_classical_peer_is_served_and_its_key_exchange_reported(stage: &mut Stage) -> Result<Verdict> {
    is_served(stage, KeyExchange::X25519, CLASSICAL)?;
    is_served(stage, KeyExchange::Any, HYBRID)?;
    announce(stage)?;
    for (key_exchange, reported) in [(KeyExchange::X25519, CLASSICAL), (KeyExchange::Any, HYBRID)] {
        ensure!(dials(stage, key_exchange)?, "{key_exchange:?} is refused");
        let handshake = last(stage, CLIENT_NODE, "decoy")?;
        ensure!(handshake.key_exchange == reported, "{handshake:?}");
    }
    Ok(Verdict::Passed)
}

fn a_classical_peer_is_refused_where_post_quantum_is_required(
    stage: &mut Stage,
) -> Result<Verdict> {
    announce(stage)?;
    stage.with_agents(
        &[CLIENT_NODE, SERVER_NODE],
        |text| format!("{text}identity: {{key_exchange: require-post-quantum}}\n"),
        |stage| {
            stage.lab()?.wait_ready(PATIENCE)?;
            stage.settle()?;
            for (node, peer) in [(CLIENT_NODE, "web"), (SERVER_NODE, "client")] {
                let handshake = last(stage, node, peer)?;
                ensure!(handshake.key_exchange == HYBRID, "{node}: {handshake:?}");
            }

            let before = stage.counter(SERVER_NODE, INCOMPATIBLE)?;
            let met = tunnel(stage, KeyExchange::X25519);
            ensure!(met.is_err(), "a classical client is welcome");
            stage.wait_counter(SERVER_NODE, INCOMPATIBLE, before + 1)?;
            is_served(stage, KeyExchange::Any, HYBRID)?;

            ensure!(
                !dials(stage, KeyExchange::X25519)?,
                "a classical server was used"
            );
            ensure!(
                dials(stage, KeyExchange::Any)?,
                "a hybrid server is refused"
            );
            Ok(())
        },
    )?;
    Ok(Verdict::Passed)
}
