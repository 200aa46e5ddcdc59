//! Who gets certificates from the embedded CA: a node, by its token, for the workloads that
//! are placed on it, and nobody else for anybody.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ringfence_identity::{
    CaClient, CaClientConfig, FetchError, FetchProblem, Issued, TrustDomain, WorkloadIdentity,
};
use ringfence_lab::mesh::TRUST_DOMAIN;
use ringfence_lab::topology::NAMESPACE;
use ringfence_security_tests::authority::Authority;
use ringfence_security_tests::cases;
use ringfence_security_tests::harness::{Case, Verdict};
use ringfence_security_tests::stage::{CLIENT_NODE, PATIENCE, SERVER_NODE, Stage};

pub fn cases() -> Vec<Case<Stage>> {
    cases![
        a_node_gets_certificates_for_its_own_workloads_only,
        a_wrong_token_gets_no_certificate,
        a_control_plane_under_another_root_is_not_trusted,
    ]
}

const TTL: Duration = Duration::from_secs(3600);

/// Asks the CA, from the network of `node`, with that token and root.
fn fetch(
    stage: &Stage,
    node: &str,
    token: PathBuf,
    root: PathBuf,
    service_account: &str,
) -> Result<Result<Issued, FetchError>> {
    let identity = WorkloadIdentity::new(
        TrustDomain::parse(TRUST_DOMAIN)?,
        NAMESPACE,
        service_account,
    )?;
    let config = CaClientConfig {
        address: format!("https://{}", stage.lab()?.mesh()?.listen),
        server_name: None,
        root_file: root,
        token_file: token,
        cluster_id: "Kubernetes".into(),
        timeout: PATIENCE,
    };
    let netns = stage.lab()?.node(node)?.netns();
    netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async { Ok(CaClient::new(config)?.fetch(&identity, TTL).await) })
    })?
}

fn token(stage: &Stage, node: &str) -> Result<PathBuf> {
    Ok(stage.lab()?.dir().join(format!("{node}.token")))
}

fn is_unauthenticated(result: &Result<Issued, FetchError>) -> Result<()> {
    let error = result.as_ref().err().context("a certificate was issued")?;
    ensure!(
        matches!(error.problem, FetchProblem::Refused { .. }),
        "{error}"
    );
    Ok(())
}

fn a_node_gets_certificates_for_its_own_workloads_only(stage: &mut Stage) -> Result<Verdict> {
    let root = stage.lab()?.root_certificate();
    for (node, own, foreign) in [
        (CLIENT_NODE, "client", "web"),
        (SERVER_NODE, "web", "client"),
    ] {
        let issued = fetch(stage, node, token(stage, node)?, root.clone(), own)??;
        ensure!(
            issued
                .svid
                .id()
                .to_string()
                .ends_with(&format!("/sa/{own}")),
            "{:?}",
            issued.svid
        );
        for stranger in [foreign, "nobody", "legacy"] {
            let answer = fetch(stage, node, token(stage, node)?, root.clone(), stranger)?;
            is_unauthenticated(&answer).with_context(|| format!("{node} for {stranger}"))?;
        }
    }
    Ok(Verdict::Passed)
}

fn a_wrong_token_gets_no_certificate(stage: &mut Stage) -> Result<Verdict> {
    let root = stage.lab()?.root_certificate();
    let right = std::fs::read_to_string(token(stage, CLIENT_NODE)?)?;
    let mut changed: Vec<u8> = right.trim().into();
    if let Some(last) = changed.last_mut() {
        *last = if *last == b'0' { b'1' } else { b'0' };
    }
    let cut = right
        .trim()
        .get(..right.trim().len() - 1)
        .unwrap_or_default();
    let file = stage.lab()?.dir().join("wrong.token");
    for wrong in [changed.as_slice(), cut.as_bytes(), b"x"] {
        std::fs::write(&file, wrong)?;
        is_unauthenticated(&fetch(
            stage,
            CLIENT_NODE,
            file.clone(),
            root.clone(),
            "client",
        )?)?;
    }
    // The twin.
    std::fs::write(&file, right)?;
    fetch(stage, CLIENT_NODE, file, root, "client")??;
    Ok(Verdict::Passed)
}

fn a_control_plane_under_another_root_is_not_trusted(stage: &mut Stage) -> Result<Verdict> {
    let root = stage.lab()?.dir().join("another-root.pem");
    std::fs::write(&root, Authority::another_root_pem()?)?;
    let answer = fetch(
        stage,
        CLIENT_NODE,
        token(stage, CLIENT_NODE)?,
        root,
        "client",
    )?;
    let error = answer
        .err()
        .context("the token was sent to a server that was not authenticated")?;
    ensure!(
        matches!(error.problem, FetchProblem::Unreachable(_)),
        "{error}"
    );
    Ok(Verdict::Passed)
}
