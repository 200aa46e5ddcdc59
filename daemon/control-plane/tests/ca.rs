//! Certificates over real TLS gRPC: each refusal beside the request that is granted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Mesh, Running, TOKEN_A, TOKEN_B, read};
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rcgen::{CertificateParams, KeyPair, SanType};
use ringfence_identity::ca_proto::IstioCertificateRequest;
use ringfence_identity::ca_proto::istio_certificate_service_client::IstioCertificateServiceClient;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status};

const CLIENT: &str = "spiffe://cluster.local/ns/demo/sa/client";
const WEB: &str = "spiffe://cluster.local/ns/demo/sa/web";
const LEGACY: &str = "spiffe://cluster.local/ns/demo/sa/legacy";

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

#[derive(Debug)]
struct Ask(Channel);

impl Ask {
    async fn new(mesh: &Mesh, server: &Running) -> Self {
        Self::with_name(mesh, server, &server.address.ip().to_string())
            .await
            .unwrap()
    }

    async fn with_name(
        mesh: &Mesh,
        server: &Running,
        name: &str,
    ) -> Result<Self, tonic::transport::Error> {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(read(&mesh.root())))
            .domain_name(name);
        let endpoint = Endpoint::from_shared(format!("https://{}", server.address))
            .unwrap()
            .tls_config(tls)
            .unwrap();
        Ok(Self(endpoint.connect().await?))
    }

    async fn send(&self, token: &str, identity: &str) -> Result<Vec<String>, Status> {
        // A CSR needs some URI, also where the identity asked for is none.
        let csr_identity = if identity.contains(':') {
            identity
        } else {
            CLIENT
        };
        self.request(bearer(token, request(csr_identity, identity)))
            .await
    }

    async fn code(&self, token: &str, identity: &str) -> Code {
        self.send(token, identity)
            .await
            .expect_err("must be refused")
            .code()
    }

    async fn request(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Vec<String>, Status> {
        let mut client = IstioCertificateServiceClient::new(self.0.clone());
        Ok(client
            .create_certificate(request)
            .await?
            .into_inner()
            .cert_chain)
    }
}

fn bearer(token: &str, request: IstioCertificateRequest) -> Request<IstioCertificateRequest> {
    let mut request = Request::new(request);
    request
        .metadata_mut()
        .insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

fn request(csr_identity: &str, identity: &str) -> IstioCertificateRequest {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(csr_identity.try_into().unwrap())];
    let csr = params
        .serialize_request(&KeyPair::generate().unwrap())
        .unwrap()
        .pem()
        .unwrap();
    let identity = Value {
        kind: Some(Kind::StringValue(identity.into())),
    };
    let fields = [("ImpersonatedIdentity".to_owned(), identity)].into();
    IstioCertificateRequest {
        csr,
        validity_duration: 3600,
        metadata: Some(Struct { fields }),
    }
}
