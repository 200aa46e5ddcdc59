//! Root rotation of a running control plane, over real TLS.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::{Duration, SystemTime};

use common::agent::{Agent, names};
use common::ask::{Ask, CLIENT, WEB};
use common::{Mesh, Running, TOKEN_A, TOKEN_B, WORKLOADS, read};
use ringfence_control_plane::rotate::RotationPhase;
use ringfence_control_plane::{Error, RotationError, RotationReport, RotationStep, rotate};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

const STEPS: [RotationStep; 3] = [
    RotationStep::Prepare,
    RotationStep::Switch,
    RotationStep::Finish,
];
const CLIENT_WORKLOAD: &str = "Kubernetes//Pod/demo/client";
const NAME: &str = "127.0.0.1";

#[tokio::test]
async fn answers_hold_every_current_root_and_the_leaf_is_of_the_one_that_signs() {
    let mesh = Mesh::new();
    let mut server = mesh.start();
    // One connection over the whole rotation.
    let ask = Ask::new(&mesh, &server).await;
    let (leaf, before) = issued(&ask, TOKEN_A, CLIENT).await;
    let [old] = &before[..] else { panic!() };
    assert!(is_signed(&leaf, old));

    take(&mesh, &mut server, RotationStep::Prepare, true).await;
    let (leaf, both) = issued(&ask, TOKEN_A, CLIENT).await;
    let [first, new] = &both[..] else { panic!() };
    assert!(first == old && is_signed(&leaf, old) && !is_signed(&leaf, new));

    take(&mesh, &mut server, RotationStep::Switch, true).await;
    let (leaf, roots) = issued(&ask, TOKEN_A, CLIENT).await;
    assert!(roots == both && is_signed(&leaf, new) && !is_signed(&leaf, old));

    take(&mesh, &mut server, RotationStep::Finish, true).await;
    let (leaf, after) = issued(&ask, TOKEN_A, CLIENT).await;
    assert!(after == both[1..] && is_signed(&leaf, new));
    server.stop().await;
}

#[tokio::test]
async fn svids_of_neighbouring_steps_trust_each_other_in_both_directions() {
    let mesh = Mesh::new();
    let mut server = mesh.start();
    let ask = Ask::new(&mesh, &server).await;
    let mut before = issued(&ask, TOKEN_A, CLIENT).await;
    for step in STEPS {
        take(&mesh, &mut server, step, true).await;
        let after = issued(&ask, TOKEN_B, WEB).await;
        let trusts = |roots: &[CertificateDer<'_>], leaf| roots.iter().any(|r| is_signed(leaf, r));
        assert!(
            trusts(&before.1, &after.0),
            "{step}: the elder refuses the younger"
        );
        assert!(
            trusts(&after.1, &before.0),
            "{step}: the younger refuses the elder"
        );
        before = after;
    }
    server.stop().await;
}

#[tokio::test]
async fn client_that_reads_the_root_file_again_connects_at_every_step() {
    let mesh = Mesh::new();
    let mut server = mesh.start();
    for step in STEPS {
        take(&mesh, &mut server, step, true).await;
        connects(&read(&mesh.root()), &server).await.unwrap();
    }
    server.stop().await;
}

#[tokio::test]
async fn client_with_the_old_root_alone_connects_until_the_rotation_is_finished() {
    let mesh = Mesh::new();
    let mut server = mesh.start();
    let old = read(&mesh.root());
    take(&mesh, &mut server, RotationStep::Prepare, true).await;
    connects(&old, &server).await.unwrap();
    let both = read(&mesh.root());
    take(&mesh, &mut server, RotationStep::Switch, true).await;
    serves_chain_of(&mesh, &server).await;
    connects(&old, &server).await.unwrap();
    connects(&both, &server).await.unwrap();
    connects(both.strip_prefix(&old).unwrap(), &server)
        .await
        .unwrap();

    take(&mesh, &mut server, RotationStep::Finish, true).await;
    serves_chain_of(&mesh, &server).await;
    connects(&old, &server).await.unwrap_err();
    connects(&both, &server).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn ads_stream_stays_up_over_the_rotation() {
    let mesh = Mesh::new();
    let mut server = mesh.start();
    let mut agent = Agent::start(&mesh, server.address, "a");
    assert!(agent.addresses().await.complete);
    for (n, step) in STEPS.into_iter().enumerate() {
        take(&mesh, &mut server, step, true).await;
        mesh.write(&WORKLOADS.replace("10.77.1.2", &format!("10.77.1.{}", n + 100)));
        let delta = agent.addresses().await;
        // The first update of another stream would be complete.
        assert!(!delta.complete, "{step}");
        assert_eq!(names(&delta), [CLIENT_WORKLOAD]);
    }
    server.stop().await;
}

#[tokio::test]
async fn steps_wait_for_the_lifetime_in_the_mesh_file_and_then_go() {
    let mesh = Mesh::with("127.0.0.1:0", "svid_ttl: 1s");
    let mut server = mesh.start();
    take(&mesh, &mut server, RotationStep::Prepare, false).await;
    for step in [RotationStep::Switch, RotationStep::Finish] {
        let error = rotate(&mesh.path(), step, false).unwrap_err();
        let Error::Rotation(RotationError::TooEarly { until, .. }) = error else {
            panic!("{error}")
        };
        // Nothing happens at that moment that could be awaited.
        let wait = until.duration_since(SystemTime::now()).unwrap_or_default();
        assert!(wait <= Duration::from_secs(1));
        tokio::time::sleep(wait).await;
        take(&mesh, &mut server, step, false).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn control_plane_that_was_down_takes_the_step_when_it_starts() {
    let mesh = Mesh::new();
    mesh.start().stop().await;
    rotate(&mesh.path(), RotationStep::Prepare, false).unwrap();
    // Nobody has got both roots yet.
    let error = rotate(&mesh.path(), RotationStep::Switch, false).unwrap_err();
    assert!(
        matches!(error, Error::Rotation(RotationError::NotServed { .. })),
        "{error}"
    );
    let server = mesh.start();
    let ask = Ask::new(&mesh, &server).await;
    assert_eq!(issued(&ask, TOKEN_A, CLIENT).await.1.len(), 2);
    assert!(
        rotate(&mesh.path(), RotationStep::Status, false)
            .unwrap()
            .served
    );
    server.stop().await;
}

#[tokio::test]
async fn damaged_roots_are_not_taken_and_reported_until_repaired() {
    let mesh = Mesh::new();
    let mut server = mesh.start();
    let ask = Ask::new(&mesh, &server).await;
    let good = read(&mesh.root());
    std::fs::write(mesh.root(), "garbage").unwrap();
    let status = server.reloaded(|s| s.roots_rejected.is_some()).await;
    assert!(status.roots_rejected.unwrap().contains("root-cert.pem"));
    assert!(status.rejected.is_none());
    let (leaf, roots) = issued(&ask, TOKEN_A, CLIENT).await;
    assert!(roots.len() == 1 && is_signed(&leaf, &roots[0]));

    std::fs::write(mesh.root(), good).unwrap();
    let status = server.reloaded(|s| s.roots_rejected.is_none()).await;
    assert_eq!(status.root_generation, 1);
    server.stop().await;
}

/// Takes a step and waits until the control plane has taken it.
async fn take(
    mesh: &Mesh,
    server: &mut Running,
    step: RotationStep,
    force: bool,
) -> RotationReport {
    let before = server.reloads.borrow().root_generation;
    let report = rotate(&mesh.path(), step, force).unwrap();
    assert!(report.changed);
    let expected = match step {
        RotationStep::Prepare => RotationPhase::Prepared,
        RotationStep::Switch => RotationPhase::Switched,
        _ => RotationPhase::Idle,
    };
    assert_eq!(report.phase, expected);
    server
        .reloaded(|status| status.root_generation == before + 1)
        .await;
    report
}

/// The certificate of the server is made a moment after the roots are taken.
async fn serves_chain_of(mesh: &Mesh, server: &Running) {
    let roots = read(&mesh.root());
    let newest = &roots[roots.rfind("-----BEGIN").unwrap()..];
    tokio::time::timeout(common::LIMIT, async {
        while connects(newest, server).await.is_err() {}
    })
    .await
    .expect("the server's certificate is not of the new root");
}

async fn connects(roots: &str, server: &Running) -> Result<Ask, tonic::transport::Error> {
    Ask::trusting(roots, server, NAME).await
}

/// The leaf and the roots of an answer.
async fn issued(
    ask: &Ask,
    token: &str,
    identity: &str,
) -> (CertificateDer<'static>, Vec<CertificateDer<'static>>) {
    let chain = ask.send(token, identity).await.unwrap();
    let [leaf, roots] = &chain[..] else {
        panic!("{} elements", chain.len())
    };
    let leaf = CertificateDer::from_pem_slice(leaf.as_bytes()).unwrap();
    let roots = CertificateDer::pem_slice_iter(roots.as_bytes());
    (leaf, roots.map(Result::unwrap).collect())
}

fn is_signed(leaf: &CertificateDer<'_>, by: &CertificateDer<'_>) -> bool {
    let leaf = X509Certificate::from_der(leaf).unwrap().1;
    let by = X509Certificate::from_der(by).unwrap().1;
    let signed = leaf.verify_signature(Some(by.public_key())).is_ok();
    // Path building goes by name.
    signed && leaf.issuer() == by.subject()
}
