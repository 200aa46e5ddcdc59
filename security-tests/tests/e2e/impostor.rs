//! A server in the place of a workload: whoever answers at its address must prove its
//! identity before it gets a byte.

use anyhow::{Context, Result, ensure};
use ktls_offload::protocol::{CONTENT_TYPE, Message, decode};
use ringfence_lab::mesh::{Mesh, TEST_PORT, Workload};
use ringfence_lab::probe::Outcome;
use ringfence_lab::topology::Family;
use ringfence_security_tests::authority::{Authority, Credentials, Leaf};
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::peer::{DATA, KeyExchange, Peer, Received};
use ringfence_security_tests::server::Server;
use ringfence_security_tests::stage::{
    CLIENT_NODE, PATIENCE, SERVER_NODE, Stage, TUNNEL_PORT, is_reset,
};

pub fn cases() -> Vec<Case<Stage>> {
    cases![a_server_gets_a_byte_only_under_an_identity_of_the_destination]
}

/// The pod in whose place the test answers. No agent has enrolled it.
const POD: &str = "outside-b";

/// The first bytes that our server was sent, or how it was turned away before: in the
/// handshake, or after it without a stream.
pub type Met = Result<Vec<u8>, String>;

/// Accepts one tunnel, and answers its stream with an echo.
fn meet(
    stream: std::net::TcpStream,
    credentials: &Credentials,
    key_exchange: KeyExchange,
) -> Result<Met> {
    let mut peer = match Peer::accept(stream, credentials, &[b"ringfence/1"], key_exchange) {
        Ok(peer) => peer,
        Err(error) => return Ok(Err(format!("{error:#}"))),
    };
    if let Err(error) = peer.say(Message::Ready) {
        return Ok(Err(format!("{error:#}")));
    }
    let stream = match peer.receive()? {
        Received::Record(CONTENT_TYPE, content) => match decode(&content)?.0 {
            Message::Open(open) => open.stream,
            other => anyhow::bail!("{other:?} instead of OPEN"),
        },
        other => return Ok(Err(format!("{other:?}"))),
    };
    peer.say(Message::Opened { stream })?;
    match peer.receive()? {
        Received::Record(DATA, content) => {
            peer.put(DATA, &content)?;
            peer.say(Message::End { stream })?;
            Ok(Ok(content))
        }
        other => anyhow::bail!("{other:?} instead of data"),
    }
}

fn a_server_gets_a_byte_only_under_an_identity_of_the_destination(
    stage: &mut Stage,
) -> Result<Verdict> {
    announce(stage)?;
    let ours = stage.authority()?;
    let expired = {
        let mut leaf = Leaf::of("decoy");
        leaf.not_after = leaf.not_before + std::time::Duration::from_secs(1);
        leaf
    };
    let impostors = [
        (
            "another service account",
            &ours,
            Leaf::of("intruder"),
            "wrong-identity",
        ),
        ("an expired certificate", &ours, expired, "expired"),
        (
            "another CA",
            &Authority::stranger()?,
            Leaf::of("decoy"),
            "untrusted",
        ),
    ];
    for (what, authority, leaf, reason) in impostors {
        let failures = format!("handshake_failures{{reason=\"{reason}\"}}");
        let before = stage.counter(CLIENT_NODE, &failures)?;
        let (met, outcome) = with_server(stage, authority.issue(&leaf)?, KeyExchange::Any)?;
        ensure!(met.is_err(), "{what}: {met:?}");
        is_reset(&outcome).context(what)?;
        stage
            .wait_counter(CLIENT_NODE, &failures, before + 1)
            .context(what)?;
    }
    // The twin.
    let (met, outcome) = with_server(stage, ours.issue(&Leaf::of("decoy"))?, KeyExchange::Any)?;
    ensure!(
        met.as_deref() == Ok(b"hello\n".as_slice()),
        "the right identity: {met:?}"
    );
    ensure!(
        matches!(&outcome, Outcome::Answered(answered) if answered.answer == b"hello\n"),
        "the right identity: {outcome:?}"
    );
    Ok(Verdict::Passed)
}

/// Makes [`POD`] the place of the workload `decoy`.
pub fn announce(stage: &mut Stage) -> Result<()> {
    let addresses = Family::BOTH
        .map(|family| stage.address(POD, family))
        .into_iter()
        .collect::<Result<_>>()?;
    let decoy = Workload {
        name: "decoy".into(),
        service_account: "decoy".into(),
        node: SERVER_NODE.into(),
        addresses,
        mesh: true,
        labels: [("app".to_owned(), "decoy".to_owned())].into(),
    };
    // Nothing listens yet: the connect is taken over by the agent, whose dial is refused. A
    // direct connect would be refused to the application itself.
    stage.change_mesh(
        |mesh: &mut Mesh| mesh.workloads.push(decoy),
        "the agents to know the decoy",
        |stage| is_reset(&stage.attempt("client", stage.port(POD, Family::V4, TEST_PORT)?)?),
    )
}

/// One attempt of `client` with our server in the decoy's place.
pub fn with_server(
    stage: &Stage,
    credentials: Credentials,
    key_exchange: KeyExchange,
) -> Result<(Met, Outcome)> {
    let netns = stage.lab()?.pod(POD)?.netns();
    let server = Server::start(&netns, TUNNEL_PORT, PATIENCE, move |stream| {
        meet(stream, &credentials, key_exchange)
    })?;
    let outcome = stage.attempt("client", stage.port(POD, Family::V4, TEST_PORT)?)?;
    Ok((server.next(PATIENCE)?, outcome))
}
