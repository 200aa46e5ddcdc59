//! `IstioCertificateService/CreateCertificate`: who may have which certificate.

use std::sync::Arc;
use std::time::Duration;

use prost_types::value::Kind;
use ringfence_identity::ca_proto::istio_certificate_service_server::IstioCertificateService;
use ringfence_identity::ca_proto::{IstioCertificateRequest, IstioCertificateResponse};
use tokio::sync::watch;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::auth::AuthError;
use crate::ca::{Ca, CaError, Csr, CsrError};
use crate::state::MeshState;

#[derive(Debug)]
pub(crate) struct CaService {
    ca: Arc<Ca>,
    state: watch::Receiver<Arc<MeshState>>,
}

/// Why a certificate was not issued. This is for the log; see [`Refusal::status`].
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Unauthenticated(#[from] AuthError),
    #[error("node {node} has no mesh workload with identity {identity}")]
    NotOnNode { node: String, identity: String },
    #[error("the metadata has no ImpersonatedIdentity")]
    NoIdentity,
    #[error("the CSR is for {csr}, the request for {identity}")]
    OtherIdentity { csr: String, identity: String },
    #[error(transparent)]
    Csr(#[from] CsrError),
    #[error(transparent)]
    Ca(#[from] CaError),
}

impl CaService {
    pub(crate) fn new(ca: Arc<Ca>, state: watch::Receiver<Arc<MeshState>>) -> Self {
        Self { ca, state }
    }

    fn create(
        &self,
        metadata: &MetadataMap,
        request: &IstioCertificateRequest,
    ) -> Result<Vec<String>, Refusal> {
        let state = self.state.borrow().clone();
        let node = state.authenticate(metadata)?.node;
        let identity = impersonated_identity(request).ok_or(Refusal::NoIdentity)?;
        if !state.identity_is_on_node(identity, &node) {
            return Err(Refusal::NotOnNode {
                node,
                identity: identity.to_owned(),
            });
        }
        let csr = Csr::parse(&request.csr)?;
        if csr.uri != identity {
            return Err(Refusal::OtherIdentity {
                csr: csr.uri,
                identity: identity.to_owned(),
            });
        }
        // Zero or less: the caller leaves it to us.
        let validity = match u64::try_from(request.validity_duration) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds).min(state.svid_ttl()),
            _ => state.svid_ttl(),
        };
        // The leaf and the bundle are of the same moment of a rotation.
        let roots = self.ca.roots();
        let signed = roots.sign_svid(&csr, validity)?;
        let serial: String = signed
            .serial
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        tracing::info!(%node, %identity, %serial, not_after = %signed.not_after, "issued an SVID");
        Ok(vec![signed.leaf_pem, roots.bundle_pem().to_owned()])
    }
}

#[tonic::async_trait]
impl IstioCertificateService for CaService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer = request.remote_addr();
        match self.create(request.metadata(), request.get_ref()) {
            Ok(cert_chain) => Ok(Response::new(IstioCertificateResponse { cert_chain })),
            Err(refusal) => {
                tracing::warn!(?peer, reason = %refusal, "refused a certificate");
                Err(refusal.status())
            }
        }
    }
}

impl Refusal {
    /// What the caller is told: whose fault it is and no more.
    fn status(&self) -> Status {
        match self {
            Self::Unauthenticated(_) | Self::NotOnNode { .. } => {
                Status::unauthenticated("request not authenticated")
            }
            Self::NoIdentity | Self::OtherIdentity { .. } | Self::Csr(_) => {
                Status::invalid_argument("certificate request not valid")
            }
            Self::Ca(_) => Status::internal("certificate not issued"),
        }
    }
}

fn impersonated_identity(request: &IstioCertificateRequest) -> Option<&str> {
    match request
        .metadata
        .as_ref()?
        .fields
        .get("ImpersonatedIdentity")?
        .kind
        .as_ref()?
    {
        Kind::StringValue(identity) => Some(identity),
        _ => None,
    }
}
