//! Certificates over real TLS gRPC: each refusal beside the request that is granted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::ask::{Ask, CLIENT, LEGACY, WEB, bearer, request};
use common::{Mesh, TOKEN_A, TOKEN_B, read};
use ringfence_identity::ca_proto::IstioCertificateRequest;
use tonic::{Code, Request};

#[tokio::test]
async fn node_gets_certificates_for_its_own_workloads_only() {
    let mesh = Mesh::new();
    let server = mesh.start();
    let ask = Ask::new(&mesh, &server).await;
    assert_eq!(ask.send(TOKEN_A, CLIENT).await.unwrap().len(), 2);
    assert_eq!(ask.send(TOKEN_B, WEB).await.unwrap().len(), 2);

    assert_eq!(ask.code(TOKEN_A, WEB).await, Code::Unauthenticated);
    assert_eq!(ask.code(TOKEN_B, CLIENT).await, Code::Unauthenticated);
    // On the node, but not in the mesh.
    assert_eq!(ask.code(TOKEN_B, LEGACY).await, Code::Unauthenticated);
    for stranger in [
        "spiffe://other/ns/demo/sa/client",
        "spiffe://cluster.local/ns/demo/sa/nobody",
        "client",
        "",
    ] {
        assert_eq!(
            ask.code(TOKEN_A, stranger).await,
            Code::Unauthenticated,
            "{stranger}"
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn answer_is_leaf_then_root_and_expires_as_asked() {
    let mesh = Mesh::with("127.0.0.1:0", "svid_ttl: 10m");
    let server = mesh.start();
    let ask = Ask::new(&mesh, &server).await;
    for (asked, expected) in [(60, 60), (0, 600), (-5, 600), (i64::MAX, 600)] {
        let mut request = request(CLIENT, CLIENT);
        request.validity_duration = asked;
        let chain = ask.request(bearer(TOKEN_A, request)).await.unwrap();
        assert_eq!(chain[1], read(&mesh.root()));
        let pem = x509_parser::pem::parse_x509_pem(chain[0].as_bytes())
            .unwrap()
            .1;
        let left = pem
            .parse_x509()
            .unwrap()
            .validity()
            .time_to_expiration()
            .unwrap()
            .whole_seconds();
        assert!(
            (expected - 20..=expected).contains(&left),
            "asked {asked}, got {left}"
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn caller_without_a_nodes_token_is_refused_and_told_nothing() {
    let mesh = Mesh::new();
    let server = mesh.start();
    let ask = Ask::new(&mesh, &server).await;
    let no_token = ask
        .request(Request::new(request(CLIENT, CLIENT)))
        .await
        .unwrap_err();
    let bad_token = ask.send("wrong", CLIENT).await.unwrap_err();
    let other_node = ask.send(TOKEN_B, CLIENT).await.unwrap_err();
    for status in [&no_token, &bad_token, &other_node] {
        assert_eq!(
            (status.code(), status.message()),
            (Code::Unauthenticated, "request not authenticated")
        );
    }
    ask.send(TOKEN_A, CLIENT).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn csr_for_another_identity_than_asked_for_is_refused() {
    let mesh = Mesh::new();
    let server = mesh.start();
    let ask = Ask::new(&mesh, &server).await;
    let code = async |request| {
        ask.request(bearer(TOKEN_A, request))
            .await
            .map_err(|status| status.code())
    };
    code(request(CLIENT, CLIENT)).await.unwrap();
    assert_eq!(code(request(WEB, CLIENT)).await, Err(Code::InvalidArgument));
    let garbage = IstioCertificateRequest {
        csr: "garbage".into(),
        ..request(CLIENT, CLIENT)
    };
    assert_eq!(code(garbage).await, Err(Code::InvalidArgument));
    let no_identity = IstioCertificateRequest {
        metadata: None,
        ..request(CLIENT, CLIENT)
    };
    assert_eq!(code(no_identity).await, Err(Code::InvalidArgument));
    server.stop().await;
}

#[tokio::test]
async fn other_cluster_is_refused_when_the_mesh_file_names_one() {
    let clusters = async |extra: &str| {
        let mesh = Mesh::with("127.0.0.1:0", extra);
        let server = mesh.start();
        let ask = Ask::new(&mesh, &server).await;
        let mut codes = Vec::new();
        for cluster in ["here", "there"] {
            let mut request = bearer(TOKEN_A, request(CLIENT, CLIENT));
            request
                .metadata_mut()
                .insert("clusterid", cluster.parse().unwrap());
            codes.push(ask.request(request).await.err().map(|status| status.code()));
        }
        server.stop().await;
        codes
    };
    assert_eq!(
        clusters("cluster_id: here").await,
        [None, Some(Code::Unauthenticated)]
    );
    assert_eq!(clusters("").await, [None, None]);
}

#[tokio::test]
async fn ipv6_listener_has_a_certificate_for_its_address() {
    let mesh = Mesh::with("[::1]:0", "");
    let server = mesh.start();
    let ask = Ask::new(&mesh, &server).await;
    ask.send(TOKEN_A, CLIENT).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn server_certificate_has_the_extra_names_and_no_others() {
    let mesh = Mesh::with("127.0.0.1:0", "server_names: [ringfence.internal]");
    let server = mesh.start();
    Ask::with_name(&mesh, &server, "ringfence.internal")
        .await
        .unwrap();
    Ask::with_name(&mesh, &server, "other.internal")
        .await
        .unwrap_err();
    server.stop().await;
}

#[tokio::test]
async fn workload_added_by_a_reload_gets_its_certificate() {
    let mesh = Mesh::new();
    let mut server = mesh.start();
    let ask = Ask::new(&mesh, &server).await;
    let id = "spiffe://cluster.local/ns/demo/sa/late";
    assert_eq!(ask.code(TOKEN_A, id).await, Code::Unauthenticated);
    mesh.write("workloads: [{name: late, namespace: demo, service_account: late, node: node-a, addresses: [10.77.1.9]}]");
    server.reloaded(|status| status.generation == 2).await;
    ask.send(TOKEN_A, id).await.unwrap();
    assert_eq!(ask.code(TOKEN_A, CLIENT).await, Code::Unauthenticated);
    server.stop().await;
}

#[tokio::test]
async fn replaced_token_file_is_noticed() {
    let mesh = Mesh::new();
    let mut server = mesh.start();
    let ask = Ask::new(&mesh, &server).await;
    ask.send(TOKEN_A, CLIENT).await.unwrap();
    std::fs::write(mesh.token_file("a"), "another-token-of-node-a").unwrap();
    server.reloaded(|status| status.generation == 2).await;
    assert_eq!(ask.code(TOKEN_A, CLIENT).await, Code::Unauthenticated);
    ask.send("another-token-of-node-a", CLIENT).await.unwrap();
    server.stop().await;
}
