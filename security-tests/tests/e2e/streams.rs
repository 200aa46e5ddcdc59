//! How connections begin and end: what the application sees must be what it would see
//! without a mesh between.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};

use anyhow::{Context, Result, bail, ensure};
use ringfence_lab::mesh::TEST_PORT;
use ringfence_lab::topology::Family;
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::server::{Server, reset};
use ringfence_security_tests::stage::{PATIENCE, Stage, is_answered, is_reset};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        a_server_answers_after_the_client_has_ended_its_half,
        a_client_goes_on_after_the_server_has_ended_its_half,
        a_server_may_speak_first,
        a_reset_by_the_server_is_a_reset_for_the_client,
        a_reset_by_the_client_is_a_reset_for_the_server,
        a_clean_end_is_no_reset,
        a_closed_application_port_is_a_reset,
    ]
}

const QUESTION: &[u8] = b"question";
const ANSWER: &[u8] = b"answer";

fn serve<T: Send + 'static>(
    stage: &Stage,
    serve: impl Fn(TcpStream) -> Result<T> + Send + Sync + 'static,
) -> Result<Server<T>> {
    Server::start(
        &stage.lab()?.pod("web")?.netns(),
        TEST_PORT,
        PATIENCE,
        serve,
    )
}

fn rest(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream
        .read_to_end(&mut bytes)
        .context("reading up to the end of the stream")?;
    Ok(bytes)
}

fn a_server_answers_after_the_client_has_ended_its_half(stage: &mut Stage) -> Result<Verdict> {
    let server = serve(stage, |mut stream| {
        let question = rest(&mut stream)?;
        stream.write_all(ANSWER)?;
        Ok(question)
    })?;
    for family in Family::BOTH {
        let mut client = stage.connect("client", Stage::service(family))?;
        client.write_all(QUESTION)?;
        client.shutdown(Shutdown::Write)?;
        ensure!(rest(&mut client)? == ANSWER, "another answer");
        ensure!(server.next(PATIENCE)? == QUESTION, "another question");
    }
    Ok(Verdict::Passed)
}

fn a_client_goes_on_after_the_server_has_ended_its_half(stage: &mut Stage) -> Result<Verdict> {
    let server = serve(stage, |mut stream| {
        stream.write_all(ANSWER)?;
        stream.shutdown(Shutdown::Write)?;
        rest(&mut stream)
    })?;
    for family in Family::BOTH {
        let mut client = stage.connect("client", Stage::service(family))?;
        ensure!(rest(&mut client)? == ANSWER, "another answer");
        client.write_all(QUESTION)?;
        client.shutdown(Shutdown::Write)?;
        ensure!(server.next(PATIENCE)? == QUESTION, "another question");
    }
    Ok(Verdict::Passed)
}

fn a_server_may_speak_first(stage: &mut Stage) -> Result<Verdict> {
    let server = serve(stage, |mut stream| {
        stream.write_all(ANSWER)?;
        rest(&mut stream)
    })?;
    for family in Family::BOTH {
        let mut client = stage.connect("client", Stage::service(family))?;
        let mut banner = [0; ANSWER.len()];
        client.read_exact(&mut banner).context("the banner")?;
        ensure!(banner == ANSWER, "another banner");
        client.write_all(QUESTION)?;
        drop(client);
        ensure!(server.next(PATIENCE)? == QUESTION, "another question");
    }
    Ok(Verdict::Passed)
}

fn a_reset_by_the_server_is_a_reset_for_the_client(stage: &mut Stage) -> Result<Verdict> {
    let server = serve(stage, |mut stream| {
        stream.read_exact(&mut [0; QUESTION.len()])?;
        stream.write_all(ANSWER)?;
        reset(stream)
    })?;
    for family in Family::BOTH {
        let mut client = stage.connect("client", Stage::service(family))?;
        client.write_all(QUESTION)?;
        must_be_reset(&mut client)?;
        server.next(PATIENCE)?;
    }
    Ok(Verdict::Passed)
}

fn a_reset_by_the_client_is_a_reset_for_the_server(stage: &mut Stage) -> Result<Verdict> {
    let server = serve(stage, |mut stream| {
        stream.write_all(ANSWER)?;
        must_be_reset(&mut stream)
    })?;
    for family in Family::BOTH {
        let mut client = stage.connect("client", Stage::service(family))?;
        client.read_exact(&mut [0; ANSWER.len()])?;
        reset(client)?;
        server.next(PATIENCE)?;
    }
    Ok(Verdict::Passed)
}

fn must_be_reset(stream: &mut TcpStream) -> Result<()> {
    match stream.read_to_end(&mut Vec::new()) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(error).context("instead of a reset"),
        Ok(_) => bail!("a clean end instead of a reset"),
    }
}

fn a_clean_end_is_no_reset(stage: &mut Stage) -> Result<Verdict> {
    let server = serve(stage, |mut stream| {
        stream.read_exact(&mut [0; QUESTION.len()])?;
        stream.write_all(ANSWER)?;
        Ok(())
    })?;
    let mut client = stage.connect("client", Stage::service(Family::V4))?;
    client.write_all(QUESTION)?;
    ensure!(rest(&mut client)? == ANSWER, "another answer");
    server.next(PATIENCE)?;
    Ok(Verdict::Passed)
}

fn a_closed_application_port_is_a_reset(stage: &mut Stage) -> Result<Verdict> {
    for family in Family::BOTH {
        is_reset(&stage.attempt("client", Stage::service(family))?).context(family.name())?;
        // The twin: a moment later somebody listens there.
        let _application = stage.application()?;
        is_answered(&stage.attempt("client", Stage::service(family))?)?;
    }
    Ok(Verdict::Passed)
}
