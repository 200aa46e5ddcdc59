//! The ADS client against the ADS server, over real TLS on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::agent::{Agent, names};
use common::{Mesh, WORKLOADS};
use ringfence_xds::ConnectionState;

const CLIENT: &str = "Kubernetes//Pod/demo/client";
const WEB: &str = "Kubernetes//Pod/demo/web";
const LEGACY: &str = "Kubernetes//Pod/demo/legacy";
const WEB_SERVICE: &str = "demo/web.demo.svc.cluster.local";
const POLICY: &str = "policies: [{name: p, namespace: demo, selector: {app: web}}]\n";

#[tokio::test]
async fn client_gets_everything_at_first() {
    let mesh = Mesh::new();
    mesh.write(&format!("{WORKLOADS}{POLICY}"));
    let server = mesh.start();
    let mut agent = Agent::start(&mesh, server.address, "a");
    let addresses = agent.addresses().await;
    assert!(addresses.complete);
    assert_eq!(names(&addresses), [CLIENT, LEGACY, WEB, WEB_SERVICE]);
    let policies = agent.policies().await;
    assert!(policies.complete);
    assert_eq!(names(&policies), ["demo/p"]);
    assert!(matches!(
        *agent.state.borrow(),
        ConnectionState::Connected { .. }
    ));
    server.stop().await;
}

#[tokio::test]
async fn changes_and_removals_are_pushed_and_nothing_else() {
    let mesh = Mesh::new();
    let server = mesh.start();
    let mut agents = [
        Agent::start(&mesh, server.address, "a"),
        Agent::start(&mesh, server.address, "b"),
    ];
    for agent in &mut agents {
        agent.addresses().await;
        assert!(agent.policies().await.upserted.is_empty());
    }
    // `web` names the policy, so it changes too; `legacy` goes.
    let without: String = WORKLOADS
        .lines()
        .filter(|line| !line.contains("legacy"))
        .map(|l| format!("{l}\n"))
        .collect();
    mesh.write(&format!("{without}{POLICY}"));
    for agent in &mut agents {
        let addresses = agent.addresses().await;
        assert_eq!(
            (names(&addresses), addresses.removed.as_slice()),
            (vec![WEB], &[LEGACY.to_owned()][..])
        );
        assert!(!addresses.complete);
        assert_eq!(names(&agent.policies().await), ["demo/p"]);
    }
    mesh.write(&without);
    for agent in &mut agents {
        assert_eq!(names(&agent.addresses().await), [WEB]);
        assert_eq!(agent.policies().await.removed, ["demo/p"]);
    }
    server.stop().await;
}

#[tokio::test]
async fn bad_mesh_file_keeps_the_state_in_force() {
    let mesh = Mesh::new();
    let mut server = mesh.start();
    let mut agent = Agent::start(&mesh, server.address, "a");
    agent.addresses().await;
    // A good change and a bad one: neither is applied.
    let changed = WORKLOADS.replace("10.77.1.2", "10.77.1.3");
    mesh.write(&changed.replace("10.96.0.10", "nonsense"));
    let status = server.reloaded(|status| status.rejected.is_some()).await;
    let reason = status.rejected.unwrap();
    assert!(
        reason.contains("mesh.yaml:13:46: services[0].addresses[0]")
            && reason.contains("`nonsense` is not an IP address"),
        "{reason}"
    );
    assert_eq!(status.generation, 1);

    mesh.write(&changed);
    let status = server.reloaded(|status| status.generation == 2).await;
    assert!(status.rejected.is_none());
    // The first thing that the agent hears of is the good file.
    assert_eq!(names(&agent.addresses().await), [CLIENT]);
    server.stop().await;
}

#[tokio::test]
async fn what_needs_a_restart_is_not_taken() {
    let mesh = Mesh::new();
    let mut server = mesh.start();
    mesh.write(&format!("trust_domain: other.example\n{WORKLOADS}"));
    let status = server.reloaded(|status| status.rejected.is_some()).await;
    assert!(
        status
            .rejected
            .unwrap()
            .contains("trust_domain: cannot be changed")
    );
    // Undone: no longer reported.
    mesh.write(WORKLOADS);
    assert_eq!(
        server
            .reloaded(|status| status.rejected.is_none())
            .await
            .generation,
        1
    );
    server.stop().await;
}

#[tokio::test]
async fn restarted_server_sends_only_what_changed_meanwhile() {
    let mut mesh = Mesh::new();
    let server = mesh.start();
    mesh.keep_address(server.address);
    let mut agent = Agent::start(&mesh, server.address, "a");
    agent.addresses().await;
    agent.policies().await;
    let address = server.address;
    server.stop().await;
    agent
        .until(|state| matches!(state, ConnectionState::Failed { .. }))
        .await;

    let without: String = WORKLOADS
        .lines()
        .filter(|line| !line.contains("legacy"))
        .map(|l| format!("{l}\n"))
        .collect();
    mesh.write(&without.replace("10.77.1.2", "10.77.1.3"));
    let server = mesh.start();
    assert_eq!(server.address, address);
    let addresses = agent.addresses().await;
    assert!(addresses.complete);
    assert_eq!(
        (names(&addresses), addresses.removed.as_slice()),
        (vec![CLIENT], &[LEGACY.to_owned()][..])
    );
    let policies = agent.policies().await;
    assert!(policies.complete && policies.upserted.is_empty() && policies.removed.is_empty());
    server.stop().await;
}

#[tokio::test]
async fn client_waits_for_a_server_that_is_down_at_start() {
    let mut mesh = Mesh::new();
    let first = mesh.start();
    let address = first.address;
    mesh.keep_address(address);
    first.stop().await;

    let mut agent = Agent::start(&mesh, address, "a");
    agent
        .until(|state| matches!(state, ConnectionState::Failed { .. }))
        .await;
    let server = mesh.start();
    assert_eq!(agent.addresses().await.upserted.len(), 4);
    server.stop().await;
}

#[tokio::test]
async fn rejected_resource_is_nacked_and_sent_again_at_the_next_connection() {
    let mut mesh = Mesh::new();
    let server = mesh.start();
    mesh.keep_address(server.address);
    server.stop().await;
    let server = mesh.start();
    let mut agent = Agent::rejecting(&mesh, server.address, "a", Some(WEB));
    // What is good in the same response is applied, and the stream goes on.
    assert_eq!(agent.addresses().await.upserted.len(), 4);
    mesh.write(&WORKLOADS.replace("10.77.1.2", "10.77.1.3"));
    assert_eq!(names(&agent.addresses().await), [CLIENT]);

    server.stop().await;
    let server = mesh.start();
    let again = agent.addresses().await;
    assert_eq!(names(&again), [WEB]);
    server.stop().await;
}

#[tokio::test]
async fn stranger_and_wrong_root_get_no_stream() {
    let mesh = Mesh::new();
    let server = mesh.start();
    std::fs::write(mesh.token_file("x"), "a-token-of-nobody").unwrap();
    let mut stranger = Agent::start(&mesh, server.address, "x");
    let state = stranger
        .until(|state| matches!(state, ConnectionState::Failed { .. }))
        .await;
    let ConnectionState::Failed { error, .. } = state else {
        panic!()
    };
    assert!(error.contains("request not authenticated"), "{error}");

    let other = Mesh::new();
    other.start().stop().await;
    let mut fooled = Agent::start(&other, server.address, "a");
    let state = fooled
        .until(|state| matches!(state, ConnectionState::Failed { .. }))
        .await;
    let ConnectionState::Failed { error, .. } = state else {
        panic!()
    };
    assert!(
        error.contains("cannot connect") && error.contains("certificate"),
        "{error}"
    );
    server.stop().await;
}

#[tokio::test]
async fn missing_token_file_is_named_and_its_appearance_noticed() {
    let mesh = Mesh::new();
    let server = mesh.start();
    let mut agent = Agent::start(&mesh, server.address, "late");
    let state = agent
        .until(|state| matches!(state, ConnectionState::Failed { .. }))
        .await;
    let ConnectionState::Failed { error, .. } = state else {
        panic!()
    };
    assert!(error.contains("late.token"), "{error}");
    std::fs::write(mesh.token_file("late"), common::TOKEN_A).unwrap();
    agent
        .until(|state| matches!(state, ConnectionState::Connected { .. }))
        .await;
    server.stop().await;
}

#[tokio::test]
async fn stream_ends_when_the_nodes_token_is_replaced() {
    let mesh = Mesh::new();
    let server = mesh.start();
    let mut agent = Agent::start(&mesh, server.address, "a");
    assert!(agent.addresses().await.complete);
    std::fs::write(mesh.token_file("a"), "another-token-of-node-a").unwrap();
    // A second complete response is one on a second stream, opened with the new token.
    assert!(agent.addresses().await.complete);
    server.stop().await;
}
