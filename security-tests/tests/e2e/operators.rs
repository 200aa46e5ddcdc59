//! What operators are told about policy: by commands, against what really happens.

use std::io::{ErrorKind, Read, Write};

use anyhow::{Context, Result, ensure};
use ringfence_lab::mesh::{Policy, Rule, TEST_PORT, principal};
use ringfence_lab::process::wait_until;
use ringfence_lab::topology::{Family, NAMESPACE};
use ringfence_security_tests::cases;
use ringfence_security_tests::edits::{admit_by_address, deny, mode};
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::operator::{
    audited, both_say, complaint, explain, json, manifest, ringfence,
};
use ringfence_security_tests::server::Server;
use ringfence_security_tests::stage::{
    CLIENT_NODE, PATIENCE, SERVER_NODE, Stage, is_answered, is_refused,
};
use serde_json::Value;

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        an_explanation_is_what_the_kernel_says_and_what_happens,
        an_explanation_names_the_field_that_does_not_match,
        a_question_that_cannot_be_answered_is_refused_with_what_is_wrong,
        a_dry_run_shows_the_stream_that_is_cut_once_it_is_applied_and_changes_nothing,
        a_dry_run_shows_what_would_be_admitted_and_plaintext_that_would_be_cut,
        every_verdict_is_a_line_of_the_audit_log_and_a_count,
        policies_are_listed_with_what_they_say,
    ]
}

/// The policy that admits `client` in a fresh lab.
const ADMITS: &str = "demo/clients-may-use-web";

fn an_explanation_is_what_the_kernel_says_and_what_happens(stage: &mut Stage) -> Result<Verdict> {
    let _application = stage.application()?;
    for family in Family::BOTH {
        let client = explain(stage, "demo/client", family)?;
        both_say(&client, "allow", "allowed")?;
        ensure!(client["kernel"]["policy"] == ADMITS, "{client}");
        ensure!(client["kernel"]["rule"] == 0, "{client}");
        is_answered(&stage.attempt("client", Stage::service(family))?)?;

        let id = format!("spiffe://{}", principal("intruder"));
        let intruder = explain(stage, &id, family)?;
        both_say(&intruder, "deny", "not-allowed-by-any-policy")?;
        is_refused(&stage.attempt("intruder", Stage::service(family))?)?;

        let outside = stage.address("outside", family)?.to_string();
        let plaintext = explain(stage, &outside, family)?;
        both_say(&plaintext, "deny", "plaintext-refused")?;
        ensure!(plaintext["identity"].is_null(), "{plaintext}");
        let target = stage.port("web", family, TEST_PORT)?;
        is_refused(&stage.attempt("outside", target)?)?;
    }
    // By name and port, as a person would ask.
    let output = ringfence(
        stage,
        SERVER_NODE,
        &[
            "authz",
            "explain",
            "--from",
            "demo/client",
            "--to",
            "demo/web:9000",
        ],
    )?;
    let page = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{page}");
    for line in [
        &format!("kernel     ALLOW (allowed) by {ADMITS}, rule 0"),
        "the two agree",
    ] {
        ensure!(page.contains(line), "`{line}` is missing:\n{page}");
    }

    stage.change_mesh(
        |mesh| {
            admit_by_address(mesh);
            mode(mesh, "PERMISSIVE");
        },
        "plaintext to be admitted",
        |stage| {
            let target = stage.port("web", Family::V4, TEST_PORT)?;
            is_answered(&stage.attempt("outside", target)?)
        },
    )?;
    for family in Family::BOTH {
        let outside = stage.address("outside", family)?.to_string();
        let plaintext = explain(stage, &outside, family)?;
        both_say(&plaintext, "allow", "allowed")?;
        ensure!(
            plaintext["kernel"]["policy"] == "demo/anyone-may-use-the-test-port",
            "{plaintext}"
        );
    }
    Ok(Verdict::Passed)
}

fn an_explanation_names_the_field_that_does_not_match(stage: &mut Stage) -> Result<Verdict> {
    let why_not =
        |explanation: &Value| explanation["policies"][0]["rules"][0]["why_not"].to_string();
    let intruder = explain(stage, "demo/intruder", Family::V4)?;
    let why = why_not(&intruder);
    ensure!(
        why.contains("principals") && why.contains(&principal("intruder")),
        "{why}"
    );
    ensure!(
        !why.contains("destination_ports"),
        "the port matches: {why}"
    );
    let other_port = json(
        stage,
        SERVER_NODE,
        &[
            "authz",
            "explain",
            "--from",
            "demo/client",
            "--to",
            "demo/web:9999",
        ],
    )?;
    both_say(&other_port, "deny", "not-allowed-by-any-policy")?;
    let why = why_not(&other_port);
    ensure!(
        why.contains("destination_ports: 9999") && !why.contains("principals"),
        "{why}"
    );
    Ok(Verdict::Passed)
}

fn a_question_that_cannot_be_answered_is_refused_with_what_is_wrong(
    stage: &mut Stage,
) -> Result<Verdict> {
    for (from, to, expected) in [
        ("demo/client", "demo/web", "PORT"),
        ("demo/client", "demo/web:65536", "65536"),
        ("demo/client", "demo/nobody:80", "demo/nobody"),
        // Its agent is on the other node.
        ("demo/web", "demo/client:80", "demo/client"),
        ("demo/nobody", "demo/web:9000", "demo/nobody"),
        ("spiffe://", "demo/web:9000", "spiffe://"),
        (
            "spiffe://cluster.local/ns/a/sa/b",
            "demo/web:9000",
            "--source",
        ),
        ("x", "demo/web:9000", "--from x"),
        ("10.77.0.1", "[fd77::1]:9000", "fd77::1"),
    ] {
        let said = complaint(
            stage,
            SERVER_NODE,
            &["authz", "explain", "--from", from, "--to", to],
        )?;
        ensure!(said.contains(expected), "--from {from} --to {to}: {said}");
    }
    let file = manifest(stage, "broken.yaml", "kind: AuthorizationPolicy\nspec: [")?;
    let said = complaint(stage, SERVER_NODE, &["authz", "dry-run", &file])?;
    ensure!(said.contains("broken.yaml:"), "{said}");
    let unknown = denial("demo", "no-more", "client").replace("principals", "principles");
    let file = manifest(stage, "unknown.yaml", &unknown)?;
    let said = complaint(stage, SERVER_NODE, &["authz", "dry-run", &file])?;
    ensure!(said.contains("principles"), "{said}");
    // The agent is as well as before.
    both_say(
        &explain(stage, "demo/client", Family::V4)?,
        "allow",
        "allowed",
    )?;
    Ok(Verdict::Passed)
}

/// Denies a service account everything in a namespace.
fn denial(namespace: &str, name: &str, account: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  action: DENY
  rules:
  - from:
    - source: {{principals: [\"{}\"]}}
",
        principal(account)
    )
}

fn changes(report: &Value) -> Vec<Value> {
    let workloads = report["workloads"].as_array().into_iter().flatten();
    workloads
        .flat_map(|workload| workload["changes"].as_array().cloned().unwrap_or_default())
        .collect()
}

fn a_dry_run_shows_the_stream_that_is_cut_once_it_is_applied_and_changes_nothing(
    stage: &mut Stage,
) -> Result<Verdict> {
    let web = stage.lab()?.pod("web")?.netns();
    let _server = Server::start(&web, TEST_PORT, PATIENCE, |mut stream| {
        let mut back = stream.try_clone()?;
        Ok(std::io::copy(&mut stream, &mut back).map_err(|error| error.kind()))
    })?;
    let mut live = stage.connect("client", Stage::service(Family::V4))?;
    let mut goes_on = || -> Result<()> {
        live.write_all(b"hello\n")?;
        live.read_exact(&mut [0; 6])?;
        Ok(())
    };
    goes_on()?;

    // The twin: a denial of somebody else.
    let other = manifest(
        stage,
        "other.yaml",
        &denial(NAMESPACE, "no-more", "intruder"),
    )?;
    let report = json(stage, SERVER_NODE, &["authz", "dry-run", &other])?;
    ensure!(
        !changes(&report)
            .iter()
            .any(|change| change["kind"] == "stream"),
        "{report}"
    );

    let file = manifest(
        stage,
        "no-more.yaml",
        &denial(NAMESPACE, "no-more", "client"),
    )?;
    let report = json(stage, SERVER_NODE, &["authz", "dry-run", &file])?;
    ensure!(report["policies"][0]["what"] == "new", "{report}");
    let cut: Vec<_> = changes(&report)
        .into_iter()
        .filter(|change| change["kind"] == "stream")
        .collect();
    ensure!(cut.len() == 1, "{report}");
    ensure!(
        cut[0]["before"]["policy"] == ADMITS
            && cut[0]["after"]["verdict"] == "deny"
            && cut[0]["after"]["policy"] == "demo/no-more"
            && cut[0]["after"]["rule"] == 0,
        "{report}"
    );
    let listed = stage.status(SERVER_NODE)?.streams;
    ensure!(
        listed
            .iter()
            .any(|stream| cut[0]["stream"] == stream.id.as_str()),
        "{listed:?} has no {}",
        cut[0]["stream"]
    );
    let page = ringfence(stage, SERVER_NODE, &["authz", "dry-run", &file])?;
    let page = String::from_utf8_lossy(&page.stdout).into_owned();
    ensure!(page.contains("WOULD BE CUT"), "{page}");
    goes_on().context("a dry run changes nothing")?;
    both_say(
        &explain(stage, "demo/client", Family::V4)?,
        "allow",
        "allowed",
    )?;

    stage.lab_mut()?.update_mesh(|mesh| {
        let rule = Rule {
            principals: vec![principal("client")],
            ..Rule::default()
        };
        mesh.policies.push(Policy {
            app: None,
            ..deny("no-more", rule)
        });
    })?;
    let read = live.read(&mut [0; 1]).map_err(|error| error.kind());
    ensure!(
        read == Err(ErrorKind::ConnectionReset),
        "the client saw {read:?} instead of a reset"
    );
    // What is in force already is no change.
    let report = json(stage, SERVER_NODE, &["authz", "dry-run", &file])?;
    ensure!(report["policies"][0]["what"] == "unchanged", "{report}");
    ensure!(changes(&report).is_empty(), "{report}");
    Ok(Verdict::Passed)
}

fn a_dry_run_shows_what_would_be_admitted_and_plaintext_that_would_be_cut(
    stage: &mut Stage,
) -> Result<Verdict> {
    let _application = stage.application()?;
    is_refused(&stage.attempt("intruder", Stage::service(Family::V4))?)?;
    let admit = format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: clients-may-use-web, namespace: demo}}
spec:
  selector: {{matchLabels: {{app: web}}}}
  rules:
  - from:
    - source: {{principals: [\"{}\"]}}
",
        principal("intruder")
    );
    // The same name: it takes the place of the one that admits `client`.
    let file = manifest(stage, "instead.yaml", &admit)?;
    let report = wait_for(stage, &["authz", "dry-run", &file], |report| {
        let of = |account: &str, verdict: &str| {
            let id = format!("spiffe://{}", principal(account));
            changes(report)
                .iter()
                .any(|c| c["identity"] == id.as_str() && c["after"]["verdict"] == verdict)
        };
        of("intruder", "allow")
    })?;
    ensure!(report["policies"][0]["what"] == "replaces", "{report}");

    // A selector that nobody can answer is said, and taken as no.
    let new = admit.replace("clients-may-use-web", "another");
    let file = manifest(stage, "another.yaml", &new)?;
    let report = json(stage, SERVER_NODE, &["authz", "dry-run", &file])?;
    ensure!(
        report["warnings"].to_string().contains("--labels"),
        "{report}"
    );
    ensure!(changes(&report).is_empty(), "{report}");
    let labels = ["authz", "dry-run", &file, "--labels", "demo/web:app=web"];
    let report = json(stage, SERVER_NODE, &labels)?;
    ensure!(
        report["policies"][0]["applies_to"][0] == "demo/web",
        "{report}"
    );
    ensure!(!changes(&report).is_empty(), "{report}");

    // Live plaintext, and a mode that refuses it.
    drop(_application);
    let web = stage.lab()?.pod("web")?.netns();
    stage.change_mesh(
        |mesh| {
            admit_by_address(mesh);
            mode(mesh, "PERMISSIVE");
        },
        "plaintext to be admitted",
        |stage| {
            let _application = stage.application()?;
            let target = stage.port("web", Family::V6, TEST_PORT)?;
            is_answered(&stage.attempt("outside", target)?)
        },
    )?;
    let _server = Server::start(&web, TEST_PORT, PATIENCE, |mut stream| {
        let mut back = stream.try_clone()?;
        Ok(std::io::copy(&mut stream, &mut back).map_err(|error| error.kind()))
    })?;
    let mut live = stage.connect("outside", stage.port("web", Family::V6, TEST_PORT)?)?;
    live.write_all(b"hello\n")?;
    live.read_exact(&mut [0; 6])?;
    let strict = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: demo}
spec: {mtls: {mode: STRICT}}
";
    let file = manifest(stage, "strict.yaml", strict)?;
    let report = json(stage, SERVER_NODE, &["authz", "dry-run", &file])?;
    let cut = |report: &Value| {
        changes(report).iter().any(|change| {
            change["kind"] == "plaintext" && change["after"]["reason"] == "plaintext-refused"
        })
    };
    ensure!(cut(&report), "{report}");
    let permissive = manifest(
        stage,
        "permissive.yaml",
        &strict.replace("STRICT", "PERMISSIVE"),
    )?;
    let report = json(stage, SERVER_NODE, &["authz", "dry-run", &permissive])?;
    ensure!(!cut(&report), "{report}");
    live.write_all(b"hello\n")?;
    live.read_exact(&mut [0; 6])?;
    Ok(Verdict::Passed)
}

/// Verdicts are read a moment after they were given.
fn wait_for(stage: &Stage, arguments: &[&str], is: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = Value::Null;
    wait_until(&arguments.join(" "), PATIENCE, || {
        last = json(stage, SERVER_NODE, arguments)?;
        ensure!(is(&last), "{last}");
        Ok(())
    })?;
    Ok(last)
}

fn every_verdict_is_a_line_of_the_audit_log_and_a_count(stage: &mut Stage) -> Result<Verdict> {
    let _application = stage.application()?;
    let before = audited(stage, SERVER_NODE)?.len();
    is_answered(&stage.attempt("client", Stage::service(Family::V4))?)?;
    is_refused(&stage.attempt("intruder", Stage::service(Family::V6))?)?;
    let target = stage.port("web", Family::V4, TEST_PORT)?;
    is_refused(&stage.attempt("outside", target)?)?;
    let client = format!("spiffe://{}", principal("client"));
    let intruder = format!("spiffe://{}", principal("intruder"));
    wait_until("the audit log", PATIENCE, || {
        let new = audited(stage, SERVER_NODE)?.split_off(before);
        let has = |is: &dyn Fn(&Value) -> bool| new.iter().any(is);
        ensure!(
            has(&|r| r["verdict"] == "allow"
                && r["policy"] == ADMITS
                && r["src.identity"] == client.as_str()
                && r["src.workload"] == "client"
                && r["dst.workload"] == "web"
                && r["direction"] == "inbound"
                && r["hook"] == "last-hop"
                && r["connection_security_policy"] == "mutual_tls"),
            "the client: {new:?}"
        );
        ensure!(
            has(&|r| r["verdict"] == "deny"
                && r["src.identity"] == intruder.as_str()
                && r["reason"] == "not-allowed-by-any-policy"
                && r.get("policy").is_none()),
            "the intruder: {new:?}"
        );
        ensure!(
            has(&|r| r["verdict"] == "deny"
                && r["hook"] == "plaintext"
                && r["reason"] == "plaintext-refused"
                && r["connection_security_policy"] == "none"),
            "plaintext: {new:?}"
        );
        Ok(())
    })?;
    let denied = ringfence(stage, SERVER_NODE, &["authz", "log", "--denied", "--json"])?;
    let denied = String::from_utf8_lossy(&denied.stdout).into_owned();
    ensure!(denied.contains(&intruder), "{denied}");
    ensure!(!denied.contains("\"allow\",\"reason\""), "{denied}");

    let metrics = ringfence(stage, SERVER_NODE, &["status", "--metrics"])?;
    let metrics = String::from_utf8_lossy(&metrics.stdout).into_owned();
    let series = [
        format!(
            "ringfence_verdicts_total{{workload=\"demo/web\",policy=\"{ADMITS}\",rule=\"0\",action=\"allow\",reason=\"allowed\"}}"
        ),
        "ringfence_verdicts_total{workload=\"demo/web\",policy=\"\",rule=\"\",action=\"deny\",reason=\"plaintext-refused\"}".into(),
        "ringfence_policy_table_entries{table=\"sets\"}".into(),
        "ringfence_policy_table_limit{table=\"blocks\"}".into(),
        "ringfence_policy_enforcement_seconds_count".into(),
        "ringfence_policy_compile_seconds_count".into(),
        "ringfence_kernel_total{event=\"last_hop_denied\"}".into(),
    ];
    for name in series {
        let line = metrics.lines().find_map(|line| line.strip_prefix(&name));
        let value = line.and_then(|value| value.trim().parse::<f64>().ok());
        ensure!(value.is_some_and(|v| v > 0.0), "{name}: {line:?}");
    }
    let lost = metrics
        .lines()
        .find(|line| line.starts_with("ringfence_audit_lines_lost_total"));
    ensure!(
        lost == Some("ringfence_audit_lines_lost_total 0"),
        "{lost:?}"
    );
    Ok(Verdict::Passed)
}

fn policies_are_listed_with_what_they_say(stage: &mut Stage) -> Result<Verdict> {
    let listed = json(stage, SERVER_NODE, &["policies", "--workload", "demo/web"])?;
    let web = &listed["workloads"][0];
    ensure!(
        web["mode"] == "strict" && web["policies"][0]["name"] == ADMITS,
        "{listed}"
    );
    ensure!(web["policies"][0]["scope"] == "selector", "{listed}");
    ensure!(
        web["policies"][0]["rules"][0]
            .as_str()
            .is_some_and(|rule| rule.contains(&principal("client"))),
        "{listed}"
    );
    ensure!(
        web["terms"].as_u64().is_some_and(|terms| terms > 0),
        "{listed}"
    );
    ensure!(
        listed["blind_spots"].to_string().contains("AUDIT"),
        "{listed}"
    );
    let page = ringfence(stage, CLIENT_NODE, &["policies"])?;
    let page = String::from_utf8_lossy(&page.stdout).into_owned();
    // Neither of them has a policy of its own: they share one set.
    for line in ["demo/client", "shared   with demo/", "not visible here"] {
        ensure!(page.contains(line), "`{line}` is missing:\n{page}");
    }
    let said = complaint(
        stage,
        SERVER_NODE,
        &["policies", "--workload", "demo/client"],
    )?;
    ensure!(said.contains("demo/client"), "{said}");
    Ok(Verdict::Passed)
}
