//! Bursts of connections while policies change.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ringfence_lab::mesh::{Rule, TEST_PORT, principal};
use ringfence_lab::netns::Netns;
use ringfence_lab::process::wait_until;
use ringfence_lab::topology::Family;
use ringfence_security_tests::cases;
use ringfence_security_tests::edits::{allow, deny};
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::server::{Server, echo, patient};
use ringfence_security_tests::stage::{PATIENCE, Stage};

pub fn cases() -> Vec<Case<Stage>> {
    cases![no_stream_outlives_a_swap_that_denies_it_by_a_second]
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
    let _server = Server::start(&web, TEST_PORT, PATIENCE, echo)?;
    let rule = |ports: Vec<u16>| Rule {
        principals: vec![principal("intruder")],
        ports,
        ..Rule::default()
    };
    stage
        .lab_mut()?
        .update_mesh(|mesh| mesh.policies.push(allow("swapped", rule(vec![TEST_PORT]))))?;
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
        let denial = deny("denied", rule.clone());
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
