//! Policies that a workload names and that have not arrived: a control plane that keeps them
//! back, connections that wait, and what becomes of them when it sends the policies after
//! all, or never does.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{Scope, ScopedJoinHandle};

use anyhow::{Context, Result, bail, ensure};
use ringfence_lab::mesh::{Rule, TEST_PORT, principal};
use ringfence_lab::probe::{self, Outcome};
use ringfence_lab::process::wait_until;
use ringfence_lab::topology::Family;
use ringfence_security_tests::cases;
use ringfence_security_tests::edits::{admit_by_address, allow, deny, mode};
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::operator::{audited, both_say, explain, json};
use ringfence_security_tests::stage::{
    PATIENCE, SERVER_NODE, Stage, is_answered, is_refused, only_peer,
};
use ringfence_security_tests::withheld::Withholding;
use serde_json::Value;

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        connections_wait_for_every_policy_that_is_named_and_then_these_decide,
        connections_wait_for_a_strict_port_and_then_plaintext_alone_is_refused,
        a_policy_that_never_comes_is_waited_for_and_then_refuses_with_that_reason,
        a_strict_workload_waits_for_nothing,
    ]
}

/// Packets that were dropped because their connection has to wait.
const WAITING: &str = "kernel.guard_waiting_for_policy";
const REFUSED: &str = r#"refused{reason="policy-not-received"}"#;
/// Longer than a case takes, in seconds.
const FOR_EVER: u64 = 3600;

/// Runs `work` with an agent of `web` that waits for so many seconds, and whose control plane
/// keeps these policies back from the start.
fn withholding<T>(
    stage: &mut Stage,
    hold_seconds: u64,
    names: &[&str],
    work: impl FnOnce(&mut Stage, &Withholding) -> Result<T>,
) -> Result<T> {
    let lab = stage.lab()?;
    let real: SocketAddr = lab.mesh()?.listen.parse()?;
    let netns = lab.node(SERVER_NODE)?.netns();
    let control_plane = Withholding::start(&netns, real, &lab.root_certificate())?;
    control_plane.keep_back(names);
    let real = format!("\"https://{real}\"");
    let addresses = format!("\"{}\"\n  ca_address: {real}", control_plane.url());
    let configure = |text: &str| {
        let text = text.replace(&real, &addresses);
        format!("{text}policy_hold_seconds: {hold_seconds}\n")
    };
    stage.with_agents(&[SERVER_NODE], configure, |stage| {
        stage.lab()?.wait_ready(PATIENCE)?;
        // STRICT, which is known by its name: with it nobody has to wait.
        stage.settle()?;
        work(stage, &control_plane)
    })
}

fn by(service_account: &str) -> Rule {
    Rule {
        principals: vec![principal(service_account)],
        ..Rule::default()
    }
}

/// What `ringfence policies` finds wrong with `web`.
fn problems(stage: &Stage) -> Result<String> {
    let listed = json(stage, SERVER_NODE, &["policies", "--workload", "demo/web"])?;
    Ok(listed["workloads"][0]["problems"].to_string())
}

fn waits_for(stage: &Stage, names: &str) -> Result<()> {
    let problems = problems(stage)?;
    ensure!(
        problems.contains(&format!("new connections wait for {names} (")),
        "{problems}"
    );
    Ok(())
}

/// Connections to the test port of `web`, and how many of them have ended.
struct Begun<'scope> {
    clients: Vec<ScopedJoinHandle<'scope, Result<Outcome>>>,
    ended: &'scope AtomicUsize,
}

impl<'scope> Begun<'scope> {
    /// One from each of these pods and over either family: from `outside` in plaintext, from
    /// every other through a tunnel.
    fn from(
        scope: &'scope Scope<'scope, '_>,
        stage: &Stage,
        pods: &[&str],
        ended: &'scope AtomicUsize,
    ) -> Result<Self> {
        let mut clients = Vec::new();
        for pod in pods {
            for family in Family::BOTH {
                let netns = stage.lab()?.pod(pod)?.netns();
                let target = stage.port("web", family, TEST_PORT)?;
                clients.push(scope.spawn(move || {
                    let outcome = probe::connect(&netns, target, b"hello\n", PATIENCE);
                    ended.fetch_add(1, Ordering::AcqRel);
                    outcome
                }));
            }
        }
        Ok(Begun { clients, ended })
    }

    fn all_wait(&self) -> Result<()> {
        let ended = self.ended.load(Ordering::Acquire);
        ensure!(ended == 0, "{ended} connections have not waited");
        Ok(())
    }

    /// How they end, in the order in which they were begun.
    fn outcomes(self) -> Result<Vec<Outcome>> {
        let join = |client: ScopedJoinHandle<'_, Result<Outcome>>| {
            client
                .join()
                .map_err(|_| anyhow::anyhow!("a client panicked"))?
        };
        self.clients.into_iter().map(join).collect()
    }
}

/// Packets in plaintext have been turned back since the count was `before`: over either
/// family, and one of them a second time. By then, a second later, what came through tunnels
/// has long arrived.
fn turned_back(stage: &Stage, before: u64) -> Result<()> {
    let count = stage.counter(SERVER_NODE, WAITING)? - before;
    ensure!(count >= 3, "{count} packets were turned back");
    Ok(())
}

/// Connects, sees everybody wait for `missing`, and calls `arrive` with what shows that they
/// wait still. Returns how they end.
fn wait_until_it_arrives(
    stage: &Stage,
    pods: &[&str],
    missing: &str,
    arrive: impl FnOnce(&mut dyn FnMut() -> Result<()>) -> Result<()>,
) -> Result<(Vec<Outcome>, Vec<IpAddr>)> {
    wait_until("the wait to begin", PATIENCE, || waits_for(stage, missing))?;
    let mut application = stage.application()?;
    let before = stage.counter(SERVER_NODE, WAITING)?;
    let ended = AtomicUsize::new(0);
    let outcomes = std::thread::scope(|scope| {
        let begun = Begun::from(scope, stage, pods, &ended)?;
        wait_until("everybody to wait", PATIENCE, || turned_back(stage, before))?;
        let mut wait_still = || {
            begun.all_wait()?;
            let accepted = application.accepted();
            ensure!(accepted.is_empty(), "the application accepted {accepted:?}");
            Ok(())
        };
        wait_still()?;
        let outside = stage.address("outside", Family::V6)?.to_string();
        for (from, family) in [("demo/client", Family::V4), (&outside, Family::V6)] {
            let explained = explain(stage, from, family)?;
            both_say(&explained, "deny", "policy-not-received")?;
            let notes = explained["notes"].to_string();
            ensure!(notes.contains("new connections wait"), "{explained}");
        }
        arrive(&mut wait_still)?;
        begun.outcomes()
    })?;
    let accepted = application.accepted().iter().map(SocketAddr::ip);
    Ok((outcomes, accepted.collect()))
}

/// From pods in the order of [`Begun::from`]: these were answered, and accepted, and the
/// others were refused.
fn only_answered(
    stage: &Stage,
    pods: &[(&str, bool)],
    (outcomes, mut accepted): (Vec<Outcome>, Vec<IpAddr>),
) -> Result<()> {
    let mut expected = Vec::new();
    for ((pod, answered), outcomes) in pods.iter().zip(outcomes.chunks(2)) {
        for (family, outcome) in Family::BOTH.into_iter().zip(outcomes) {
            if *answered {
                expected.push(stage.address(pod, family)?);
                is_answered(outcome)
            } else {
                is_refused(outcome)
            }
            .with_context(|| format!("{pod} over {family:?}"))?;
        }
    }
    accepted.sort();
    expected.sort();
    ensure!(
        accepted == expected,
        "the application accepted {accepted:?}, not {expected:?}"
    );
    Ok(())
}

fn connections_wait_for_every_policy_that_is_named_and_then_these_decide(
    stage: &mut Stage,
) -> Result<Verdict> {
    const MISSING: [&str; 2] = ["demo/admits", "demo/denies"];
    withholding(stage, FOR_EVER, &MISSING, |stage, control_plane| {
        let mut outside = Rule::default();
        for family in Family::BOTH {
            let address = stage.address("outside", family)?;
            outside.ip_blocks.push(address.to_string());
        }
        let mut admits = allow("admits", by("intruder"));
        admits.rules.push(outside);
        stage.lab_mut()?.update_mesh(|mesh| {
            mode(mesh, "PERMISSIVE");
            mesh.policies.extend([admits, deny("denies", by("client"))]);
        })?;
        let pods = [("intruder", true), ("outside", true), ("client", false)];
        let arrive = |wait_still: &mut dyn FnMut() -> Result<()>| {
            control_plane.let_go("demo/admits");
            wait_until("one of the two to arrive", PATIENCE, || {
                waits_for(stage, "demo/denies")
            })?;
            wait_still()?;
            control_plane.let_go("demo/denies");
            Ok(())
        };
        let ends = wait_until_it_arrives(
            stage,
            &pods.map(|(pod, _)| pod),
            "demo/admits, demo/denies",
            arrive,
        )?;
        only_answered(stage, &pods, ends)?;
        let problems = problems(stage)?;
        ensure!(problems == "[]", "{problems}");
        Ok(Verdict::Passed)
    })
}

/// A port with a mode of its own is a policy on the wire, made by the control plane.
fn connections_wait_for_a_strict_port_and_then_plaintext_alone_is_refused(
    stage: &mut Stage,
) -> Result<Verdict> {
    const CONVERTED: &str = "demo/converted_peer_authentication_web";
    let folder = stage.lab()?.dir().join("manifests");
    std::fs::create_dir_all(&folder)?;
    let manifest = folder.join("strict-port.yaml");
    std::fs::write(
        &manifest,
        format!(
            "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: web, namespace: demo}}
spec:
  selector: {{matchLabels: {{app: web}}}}
  mtls: {{mode: PERMISSIVE}}
  portLevelMtls: {{{TEST_PORT}: {{mode: STRICT}}}}
"
        ),
    )?;
    withholding(stage, FOR_EVER, &[CONVERTED], |stage, control_plane| {
        stage.lab_mut()?.update_mesh(|mesh| {
            admit_by_address(mesh);
            mesh.manifests.push(manifest);
        })?;
        let audited_before = audited(stage, SERVER_NODE)?.len();
        let pods = [("client", true), ("outside", false)];
        let ends = wait_until_it_arrives(stage, &pods.map(|(pod, _)| pod), CONVERTED, |_| {
            control_plane.let_go(CONVERTED);
            Ok(())
        })?;
        only_answered(stage, &pods, ends)?;
        wait_until("the audit log", PATIENCE, || {
            let new = audited(stage, SERVER_NODE)?.split_off(audited_before);
            let refused = new.iter().filter(|r| {
                r["verdict"] == "deny" && r["hook"] == "plaintext" && r["policy"] == CONVERTED
            });
            ensure!(refused.count() == 2, "{new:?}");
            Ok(())
        })?;
        Ok(Verdict::Passed)
    })
}

fn a_policy_that_never_comes_is_waited_for_and_then_refuses_with_that_reason(
    stage: &mut Stage,
) -> Result<Verdict> {
    // In seconds, up to what the patience of a client leaves.
    for hold in [5, 25, 60] {
        if never_comes(stage, hold)? {
            return Ok(Verdict::Passed);
        }
    }
    bail!("this machine needs more than a minute for a few connections")
}

/// `false`: the wait was over before everybody waited.
fn never_comes(stage: &mut Stage, hold_seconds: u64) -> Result<bool> {
    const MISSING: &str = "demo/never";
    const OVER: &str = "the wait for it is over";
    withholding(stage, hold_seconds, &[MISSING], |stage, control_plane| {
        stage.lab_mut()?.update_mesh(|mesh| {
            mode(mesh, "PERMISSIVE");
            admit_by_address(mesh);
            mesh.policies.push(allow("never", by("client")));
        })?;
        let is_over = || Ok::<_, anyhow::Error>(problems(stage)?.contains(OVER));
        wait_until("the wait to begin", PATIENCE, || {
            if is_over()? {
                return Ok(());
            }
            waits_for(stage, MISSING)
        })?;
        let mut application = stage.application()?;
        let waiting_before = stage.counter(SERVER_NODE, WAITING)?;
        let refused_before = stage.counter(SERVER_NODE, REFUSED)?;
        let audited_before = audited(stage, SERVER_NODE)?.len();
        let ended = AtomicUsize::new(0);
        let outcomes = std::thread::scope(|scope| {
            let begun = Begun::from(scope, stage, &["client", "outside"], &ended)?;
            wait_until("everybody to wait", PATIENCE, || {
                if is_over()? {
                    return Ok(());
                }
                turned_back(stage, waiting_before)
            })?;
            let waited = begun.all_wait();
            if is_over()? {
                return Ok(None);
            }
            waited?;
            begun.outcomes().map(Some)
        })?;
        let Some(outcomes) = outcomes else {
            return Ok(false);
        };
        outcomes.iter().try_for_each(is_refused)?;
        stage.wait_counter(SERVER_NODE, REFUSED, refused_before + 2)?;
        refusals_are_told(stage, audited_before)?;

        // From now on nobody waits.
        let waiting_before = stage.counter(SERVER_NODE, WAITING)?;
        for pod in ["client", "outside"] {
            for family in Family::BOTH {
                let target = stage.port("web", family, TEST_PORT)?;
                is_refused(&stage.attempt(pod, target)?).with_context(|| format!("{pod} again"))?;
            }
        }
        let waiting = stage.counter(SERVER_NODE, WAITING)?;
        ensure!(waiting == waiting_before, "they waited again");
        let accepted = application.accepted();
        ensure!(accepted.is_empty(), "the application accepted {accepted:?}");

        // It may come later than never.
        control_plane.let_go(MISSING);
        wait_until("the policy to decide", PATIENCE, || {
            for pod in ["client", "outside"] {
                for family in Family::BOTH {
                    let target = stage.port("web", family, TEST_PORT)?;
                    is_answered(&stage.attempt(pod, target)?)?;
                }
            }
            Ok(())
        })?;
        Ok(true)
    })
}

/// By every means that operators have.
fn refusals_are_told(stage: &Stage, audited_before: usize) -> Result<()> {
    const REASON: &str = "policy-not-received";
    for family in Family::BOTH {
        let outside = stage.address("outside", family)?.to_string();
        for from in ["demo/client", &outside] {
            both_say(&explain(stage, from, family)?, "deny", REASON)?;
        }
    }
    let problems = problems(stage)?;
    ensure!(problems.contains(REASON), "{problems}");
    let client = format!("spiffe://{}", principal("client"));
    wait_until("the audit log", PATIENCE, || {
        let new = audited(stage, SERVER_NODE)?.split_off(audited_before);
        let count = |hook: &str, identity: Option<&str>| {
            let is = |r: &&Value| {
                r["verdict"] == "deny"
                    && r["reason"] == REASON
                    && r["hook"] == hook
                    && r["src.identity"].as_str() == identity
            };
            new.iter().filter(is).count()
        };
        ensure!(
            count("last-hop", Some(&client)) == 2 && count("plaintext", None) == 2,
            "{new:?}"
        );
        Ok(())
    })
}

fn a_strict_workload_waits_for_nothing(stage: &mut Stage) -> Result<Verdict> {
    const STRICT: &str = "ringfence-system/istio_converted_static_strict";
    withholding(stage, FOR_EVER, &[STRICT], |stage, _| {
        let has = stage.status(SERVER_NODE)?.policies;
        ensure!(has.iter().all(|policy| policy.name != STRICT), "{has:?}");
        let before = stage.counter(SERVER_NODE, WAITING)?;
        for family in Family::BOTH {
            let mut application = stage.application()?;
            let target = stage.port("web", family, TEST_PORT)?;
            is_refused(&stage.attempt("outside", target)?)?;
            is_answered(&stage.attempt("client", target)?)?;
            only_peer(&mut application, stage.address("client", family)?)?;
            let outside = stage.address("outside", family)?.to_string();
            both_say(
                &explain(stage, &outside, family)?,
                "deny",
                "plaintext-refused",
            )?;
        }
        let waiting = stage.counter(SERVER_NODE, WAITING)?;
        ensure!(
            waiting == before,
            "{} packets had to wait",
            waiting - before
        );
        let problems = problems(stage)?;
        ensure!(problems == "[]", "{problems}");
        Ok(Verdict::Passed)
    })
}
