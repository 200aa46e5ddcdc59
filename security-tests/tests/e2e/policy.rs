//! Who is admitted: by identity, in plaintext, and while policies change.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use ringfence_lab::mesh::{Policy, Rule, TEST_PORT, principal};
use ringfence_lab::probe::{self, Acceptor, Outcome};
use ringfence_lab::topology::Family;
use ringfence_security_tests::cases;
use ringfence_security_tests::edits::{admit_by_address, allow, deny, mode};
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::server::Server;
use ringfence_security_tests::stage::{
    PATIENCE, SERVER_NODE, Stage, is_answered, is_refused, only_peer,
};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        an_identity_that_no_policy_admits_is_refused_before_the_application_accepts,
        plaintext_is_refused_by_strict_and_accepted_by_permissive,
        a_deny_rule_refuses_what_was_allowed_from_then_on,
        a_live_connection_ends_when_a_policy_denies_it_and_only_then,
        changes_of_policy_never_let_a_denied_identity_through,
        deny_rules_know_addresses_and_namespaces,
    ]
}

fn an_identity_that_no_policy_admits_is_refused_before_the_application_accepts(
    stage: &mut Stage,
) -> Result<Verdict> {
    for family in Family::BOTH {
        for target in [
            Stage::service(family),
            stage.port("web", family, TEST_PORT)?,
        ] {
            let refused = r#"refused{reason="policy-denied"}"#;
            let before = stage.counter(SERVER_NODE, refused)?;
            let mut application = stage.application()?;
            is_refused(&stage.attempt("intruder", target)?).context("intruder")?;
            stage.wait_counter(SERVER_NODE, refused, before + 1)?;
            is_answered(&stage.attempt("client", target)?).context("client")?;
            only_peer(&mut application, stage.address("client", family)?)?;
        }
    }
    Ok(Verdict::Passed)
}

fn plaintext(stage: &Stage, family: Family) -> Result<Outcome> {
    stage.attempt("outside", stage.port("web", family, TEST_PORT)?)
}

fn plaintext_is_refused_by_strict_and_accepted_by_permissive(stage: &mut Stage) -> Result<Verdict> {
    let mut application = stage.application()?;
    let refused = |stage: &Stage| {
        Family::BOTH
            .into_iter()
            .try_for_each(|family| is_refused(&plaintext(stage, family)?))
    };
    refused(stage).context("STRICT, and no policy that admits them")?;
    // The intruder's arrival tells when the policy is in force; plaintext is still not.
    let intruder =
        |stage: &Stage| is_answered(&stage.attempt("intruder", Stage::service(Family::V4))?);
    stage.change_mesh(
        admit_by_address,
        "the policy that admits everybody",
        intruder,
    )?;
    refused(stage).context("STRICT, and a policy that admits them")?;
    let outside = [
        stage.address("outside", Family::V4)?,
        stage.address("outside", Family::V6)?,
    ];
    ensure!(
        application
            .accepted()
            .iter()
            .all(|peer| !outside.contains(&peer.ip())),
        "the application accepted {:?}",
        application.accepted()
    );
    drop(application);

    let accepted = |stage: &Stage| {
        Family::BOTH.into_iter().try_for_each(|family| {
            let mut application = stage.application()?;
            is_answered(&plaintext(stage, family)?)?;
            only_peer(&mut application, stage.address("outside", family)?)
        })
    };
    stage.change_mesh(|mesh| mode(mesh, "PERMISSIVE"), "PERMISSIVE", accepted)?;

    let mut application = stage.application()?;
    stage.change_mesh(|mesh| mode(mesh, "STRICT"), "STRICT again", refused)?;
    let admitted = application.accepted().len();
    for family in Family::BOTH {
        for _ in 0..5 {
            is_refused(&plaintext(stage, family)?).context("STRICT again")?;
        }
    }
    ensure!(
        application.accepted().len() == admitted,
        "the application accepted plaintext again"
    );
    Ok(Verdict::Passed)
}

fn a_deny_rule_refuses_what_was_allowed_from_then_on(stage: &mut Stage) -> Result<Verdict> {
    let rule = Rule {
        principals: vec![principal("client")],
        ports: vec![TEST_PORT],
        ..Rule::default()
    };
    let client = |stage: &Stage, family| stage.attempt("client", Stage::service(family));
    let mut application = stage.application()?;
    for family in Family::BOTH {
        is_answered(&client(stage, family)?)?;
    }
    stage.change_mesh(
        |mesh| mesh.policies.push(deny("no-more", rule)),
        "the deny rule",
        |stage| {
            Family::BOTH
                .into_iter()
                .try_for_each(|family| is_refused(&client(stage, family)?))
        },
    )?;
    let accepted = application.accepted().len();
    for _ in 0..10 {
        for family in Family::BOTH {
            is_refused(&client(stage, family)?).context("after the first refusal")?;
        }
    }
    ensure!(
        application.accepted().len() == accepted,
        "the application accepted more than was answered"
    );
    stage.change_mesh(
        |mesh| mesh.policies.retain(|policy| policy.name != "no-more"),
        "the deny rule to be gone",
        |stage| {
            Family::BOTH
                .into_iter()
                .try_for_each(|family| is_answered(&client(stage, family)?))
        },
    )?;
    Ok(Verdict::Passed)
}

fn a_live_connection_ends_when_a_policy_denies_it_and_only_then(
    stage: &mut Stage,
) -> Result<Verdict> {
    let web = stage.lab()?.pod("web")?.netns();
    let server = Server::start(&web, TEST_PORT, PATIENCE, |mut stream| {
        let mut back = stream.try_clone()?;
        // The reset that ends the stream is the result.
        Ok(std::io::copy(&mut stream, &mut back).map_err(|error| error.kind()))
    })?;
    let mut live = Vec::new();
    for family in Family::BOTH {
        live.push(stage.connect("client", Stage::service(family))?);
    }
    let goes_on = |stream: &mut TcpStream| -> Result<()> {
        stream.write_all(b"hello\n")?;
        stream.read_exact(&mut [0; 6])?;
        Ok(())
    };
    live.iter_mut().try_for_each(goes_on)?;
    // A change that admits them as before.
    let other = Rule {
        principals: vec![principal("intruder")],
        ports: vec![9001],
        ..Rule::default()
    };
    stage
        .lab_mut()?
        .update_mesh(|mesh| mesh.policies.push(allow("more", other)))?;
    live.iter_mut()
        .try_for_each(goes_on)
        .context("a change that still admits them")?;

    let rule = Rule {
        principals: vec![principal("client")],
        ..Rule::default()
    };
    stage
        .lab_mut()?
        .update_mesh(|mesh| mesh.policies.push(deny("no-more", rule)))?;
    for stream in &mut live {
        let read = stream.read(&mut [0; 1]).map_err(|error| error.kind());
        ensure!(
            read == Err(ErrorKind::ConnectionReset),
            "the client saw {read:?} instead of a reset"
        );
        let served = server.next(PATIENCE)?;
        ensure!(
            served == Err(ErrorKind::ConnectionReset),
            "the server saw {served:?} instead of a reset"
        );
    }
    Ok(Verdict::Passed)
}

fn changes_of_policy_never_let_a_denied_identity_through(stage: &mut Stage) -> Result<Verdict> {
    let netns = stage.lab()?.pod("intruder")?.netns();
    let target = Stage::service(Family::V4);
    let mut application = stage.application()?;
    let (stop, attempts, answers) = (
        AtomicBool::new(false),
        AtomicUsize::new(0),
        AtomicUsize::new(0),
    );
    std::thread::scope(|scope| -> Result<()> {
        let intruder = scope.spawn(|| -> Result<()> {
            while !stop.load(Ordering::Acquire) {
                let outcome = probe::connect(&netns, target, b"hello\n", PATIENCE)?;
                attempts.fetch_add(1, Ordering::Relaxed);
                if !outcome.is_refusal() {
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(())
        });
        let changed = change_policies_ten_times(stage);
        stop.store(true, Ordering::Release);
        intruder
            .join()
            .map_err(|_| anyhow::anyhow!("the intruder panicked"))??;
        changed
    })?;
    let (attempts, answers) = (attempts.into_inner(), answers.into_inner());
    ensure!(attempts > 10, "only {attempts} attempts during ten changes");
    ensure!(answers == 0, "{answers} of {attempts} attempts got through");
    let intruder = stage.address("intruder", Family::V4)?;
    ensure!(
        application
            .accepted()
            .iter()
            .all(|peer| peer.ip() != intruder),
        "the application accepted the intruder"
    );
    Ok(Verdict::Passed)
}

/// Each state denies the intruder, by the ALLOW policy that does not name it, by a DENY
/// policy, or by both.
fn change_policies_ten_times(stage: &mut Stage) -> Result<()> {
    for turn in 0..10u16 {
        let denial = deny(
            "not-the-intruder",
            Rule {
                principals: vec![principal("intruder")],
                ..Rule::default()
            },
        );
        stage.lab_mut()?.update_mesh(|mesh| match turn % 3 {
            0 => mesh.policies = vec![Policy::clients_may_use_web(), denial],
            1 => mesh.policies = vec![denial],
            _ => {
                let mut other = Policy::clients_may_use_web();
                other
                    .rules
                    .iter_mut()
                    .for_each(|rule| rule.ports.push(10_000 + turn));
                mesh.policies = vec![other];
            }
        })?;
    }
    Ok(())
}

fn deny_rules_know_addresses_and_namespaces(stage: &mut Stage) -> Result<Verdict> {
    let client4 = stage.address("client", Family::V4)?;
    let attempt = |stage: &Stage, family| stage.attempt("client", Stage::service(family));
    let _application: Acceptor = stage.application()?;
    // One family of the client only: the other one stays admitted.
    let rule = Rule {
        ip_blocks: vec![format!("{client4}/32")],
        ..Rule::default()
    };
    stage.change_mesh(
        |mesh| mesh.policies.push(deny("by-address", rule)),
        "the rule by address",
        |stage| is_refused(&attempt(stage, Family::V4)?),
    )?;
    is_answered(&attempt(stage, Family::V6)?).context("the address that no rule names")?;
    let rule = Rule {
        namespaces: vec!["demo".into()],
        ..Rule::default()
    };
    stage.change_mesh(
        |mesh| mesh.policies.push(deny("by-namespace", rule)),
        "the rule by namespace",
        |stage| is_refused(&attempt(stage, Family::V6)?),
    )?;
    is_refused(&attempt(stage, Family::V4)?)?;
    Ok(Verdict::Passed)
}
