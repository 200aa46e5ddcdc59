//! Asks for certificates as an agent does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rcgen::{CertificateParams, KeyPair, SanType};
use ringfence_identity::ca_proto::IstioCertificateRequest;
use ringfence_identity::ca_proto::istio_certificate_service_client::IstioCertificateServiceClient;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status};

use super::{Mesh, Running, read};

pub const CLIENT: &str = "spiffe://cluster.local/ns/demo/sa/client";
pub const WEB: &str = "spiffe://cluster.local/ns/demo/sa/web";
pub const LEGACY: &str = "spiffe://cluster.local/ns/demo/sa/legacy";

#[derive(Debug)]
pub struct Ask(Channel);

impl Ask {
    pub async fn new(mesh: &Mesh, server: &Running) -> Self {
        Self::with_name(mesh, server, &server.address.ip().to_string())
            .await
            .unwrap()
    }

    pub async fn with_name(
        mesh: &Mesh,
        server: &Running,
        name: &str,
    ) -> Result<Self, tonic::transport::Error> {
        Self::trusting(&read(&mesh.root()), server, name).await
    }

    /// `roots`: PEM.
    pub async fn trusting(
        roots: &str,
        server: &Running,
        name: &str,
    ) -> Result<Self, tonic::transport::Error> {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(roots))
            .domain_name(name);
        let endpoint = Endpoint::from_shared(format!("https://{}", server.address))
            .unwrap()
            .tls_config(tls)
            .unwrap();
        Ok(Self(endpoint.connect().await?))
    }

    pub async fn send(&self, token: &str, identity: &str) -> Result<Vec<String>, Status> {
        // A CSR needs some URI, also where the identity asked for is none.
        let csr_identity = if identity.contains(':') {
            identity
        } else {
            CLIENT
        };
        self.request(bearer(token, request(csr_identity, identity)))
            .await
    }

    pub async fn code(&self, token: &str, identity: &str) -> Code {
        self.send(token, identity)
            .await
            .expect_err("must be refused")
            .code()
    }

    pub async fn request(
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

pub fn bearer(token: &str, request: IstioCertificateRequest) -> Request<IstioCertificateRequest> {
    let mut request = Request::new(request);
    request
        .metadata_mut()
        .insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

pub fn request(csr_identity: &str, identity: &str) -> IstioCertificateRequest {
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
