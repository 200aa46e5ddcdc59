//! SVIDs from Istio's certificate service: Istiod's CA and Ringfence's own.
//!
//! One `CreateCertificate` per SVID, over TLS to a server that proves itself
//! against the root file. The node's token says who asks, the metadata
//! `ImpersonatedIdentity` for whom.

mod answer;
mod request;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, TrustAnchor};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use zeroize::Zeroizing;

#[cfg(any(test, feature = "testing"))]
pub(crate) use self::answer::check as check_answer;
use self::request::{Asked, KeyUse};
use crate::ca_proto::istio_certificate_service_client::IstioCertificateServiceClient;
use crate::leaf::printable;
use crate::source::{FetchError, FetchFuture, FetchProblem, Issued, SvidSource};
use crate::spiffe_id::WorkloadIdentity;

/// Where the CA is and how we prove who we are. Files are paths, not contents:
/// they are read again for every request, as Kubernetes rotates both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaClientConfig {
    /// `https://HOST:PORT`.
    pub address: String,
    /// The DNS name or IP address in the server's certificate, where it is not
    /// the host of `address`.
    pub server_name: Option<String>,
    /// PEM roots that the server's certificate must chain to.
    pub root_file: PathBuf,
    /// The node's bearer token.
    pub token_file: PathBuf,
    /// Sent as `clusterid`; must be one that the CA knows.
    pub cluster_id: String,
    /// For one request, connecting included.
    pub timeout: Duration,
}

/// A client of one CA. Cheap to share; keeps one HTTP/2 connection.
pub struct CaClient {
    name: String,
    config: CaClientConfig,
    endpoint: Endpoint,
    cluster_id: MetadataValue<Ascii>,
    connection: Mutex<Option<Connection>>,
}

impl CaClient {
    /// Checks the configuration. Connects to nothing and reads no file yet.
    pub fn new(config: CaClientConfig) -> Result<Self, CaConfigError> {
        let endpoint = Endpoint::from_shared(config.address.clone())
            .map_err(|error| CaConfigError::Address(config.address.clone(), error.to_string()))?;
        let uri = endpoint.uri();
        if uri.scheme_str() != Some("https") || uri.host().is_none_or(str::is_empty) {
            return Err(CaConfigError::Address(
                config.address.clone(),
                "expected https://HOST:PORT".to_owned(),
            ));
        }
        let cluster_id = config
            .cluster_id
            .parse()
            .map_err(|_| CaConfigError::ClusterId(config.cluster_id.clone()))?;
        Ok(Self {
            name: format!("CA {}", config.address),
            endpoint: endpoint
                .connect_timeout(config.timeout)
                .http2_keep_alive_interval(KEEP_ALIVE)
                .keep_alive_timeout(KEEP_ALIVE),
            cluster_id,
            config,
            connection: Mutex::new(None),
        })
    }

    /// Asks for an SVID of `identity` that lives for `ttl` (whole seconds).
    pub async fn fetch(
        &self,
        identity: &WorkloadIdentity,
        ttl: Duration,
    ) -> Result<Issued, FetchError> {
        let (issued, _) = self.fetch_for(identity, ttl, KeyUse::Ours).await?;
        Ok(issued)
    }

    /// Like [`fetch`](Self::fetch), for an application that is to have its own key: the
    /// key is new, and comes back as PKCS#8 DER too.
    pub async fn fetch_exportable(
        &self,
        identity: &WorkloadIdentity,
        ttl: Duration,
    ) -> Result<(Issued, Zeroizing<Vec<u8>>), FetchError> {
        let (issued, key) = self.fetch_for(identity, ttl, KeyUse::Exported).await?;
        match key {
            Some(key) => Ok((issued, key)),
            None => {
                Err(FetchProblem::Internal("the key was not kept".to_owned())
                    .of(identity, &self.name))
            }
        }
    }

    async fn fetch_for(
        &self,
        identity: &WorkloadIdentity,
        ttl: Duration,
        use_of_key: KeyUse,
    ) -> Result<(Issued, Option<Zeroizing<Vec<u8>>>), FetchError> {
        let fetched = self.try_fetch(identity, ttl, use_of_key);
        let problem = match tokio::time::timeout(self.config.timeout, fetched).await {
            Ok(Ok(issued)) => return Ok(issued),
            Ok(Err(problem)) => problem,
            Err(_) => {
                // The connection may be a black hole: make another next time.
                *self.connection() = None;
                FetchProblem::TimedOut(self.config.timeout)
            }
        };
        Err(problem.of(identity, &self.name))
    }

    async fn try_fetch(
        &self,
        identity: &WorkloadIdentity,
        ttl: Duration,
        use_of_key: KeyUse,
    ) -> Result<(Issued, Option<Zeroizing<Vec<u8>>>), FetchProblem> {
        let token = self.token().await?;
        let channel = self.channel().await?;
        let asked = Asked::new(identity, ttl, use_of_key)?;

        let mut request = tonic::Request::new(asked.message);
        request.metadata_mut().insert("authorization", token);
        request
            .metadata_mut()
            .insert("clusterid", self.cluster_id.clone());
        let answer = IstioCertificateServiceClient::new(channel)
            .max_decoding_message_size(answer::MAX_ANSWER_BYTES)
            .create_certificate(request)
            .await
            .map_err(|status| rejected(&status))?
            .into_inner();
        let issued = answer::check(&answer.cert_chain, identity, asked.key, SystemTime::now())?;
        Ok((issued, asked.exported))
    }

    async fn token(&self) -> Result<MetadataValue<Ascii>, FetchProblem> {
        let path = &self.config.token_file;
        let problem = |problem: String| FetchProblem::File {
            what: "token file",
            path: path.display().to_string(),
            problem,
        };
        let bytes = tokio::fs::read(path)
            .await
            .map(Zeroizing::new)
            .map_err(|error| problem(error.to_string()))?;
        if bytes.len() > MAX_TOKEN_BYTES {
            return Err(problem("is larger than 64 KiB: not a token".to_owned()));
        }
        let token = std::str::from_utf8(&bytes)
            .map_err(|_| problem("is not text".to_owned()))?
            .trim();
        if token.is_empty() {
            return Err(problem("is empty".to_owned()));
        }
        let header = Zeroizing::new(format!("Bearer {token}"));
        let mut value = header
            .parse::<MetadataValue<Ascii>>()
            .map_err(|_| problem("holds characters that a token cannot have".to_owned()))?;
        value.set_sensitive(true);
        Ok(value)
    }

    /// The connection in use, or a new one when the root file has changed.
    async fn channel(&self) -> Result<Channel, FetchProblem> {
        let path = &self.config.root_file;
        let problem = |problem: String| FetchProblem::File {
            what: "root file",
            path: path.display().to_string(),
            problem,
        };
        let roots = tokio::fs::read(path)
            .await
            .map_err(|error| problem(error.to_string()))?;
        if let Some(connection) = &*self.connection()
            && connection.roots == roots
        {
            return Ok(connection.channel.clone());
        }
        let anchors = read_anchors(&roots).map_err(problem)?;
        let mut tls = ClientTlsConfig::new().trust_anchors(anchors);
        if let Some(name) = &self.config.server_name {
            tls = tls.domain_name(name);
        }
        let channel = self
            .endpoint
            .clone()
            .tls_config(tls)
            .map_err(|error| FetchProblem::Internal(with_causes(&error)))?
            .connect_lazy();
        *self.connection() = Some(Connection {
            roots,
            channel: channel.clone(),
        });
        Ok(channel)
    }

    fn connection(&self) -> MutexGuard<'_, Option<Connection>> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl SvidSource for CaClient {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch<'a>(&'a self, identity: &'a WorkloadIdentity, ttl: Duration) -> FetchFuture<'a> {
        Box::pin(self.fetch(identity, ttl))
    }
}

impl std::fmt::Debug for CaClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CaClient")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// A configuration that cannot work. The operator is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CaConfigError {
    /// Not a URL, or not an https one.
    #[error("CA address {0:?}: {1}")]
    Address(String, String),
    /// Cannot be sent in a header.
    #[error("cluster id {0:?} holds characters that a header cannot carry")]
    ClusterId(String),
}

struct Connection {
    /// The root file's bytes when this connection was configured.
    roots: Vec<u8>,
    channel: Channel,
}

fn read_anchors(pem: &[u8]) -> Result<Vec<TrustAnchor<'static>>, String> {
    let mut anchors = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| format!("is not PEM: {error}"))?;
        let anchor = webpki::anchor_from_trusted_cert(&certificate)
            .map_err(|error| format!("holds a certificate that is no root: {error}"))?;
        anchors.push(anchor.to_owned());
    }
    if anchors.is_empty() {
        return Err("holds no certificate".to_owned());
    }
    Ok(anchors)
}

/// A status that tonic made up because it had no connection, or one that the
/// CA sent.
fn rejected(status: &tonic::Status) -> FetchProblem {
    use std::error::Error as _;
    match status.source() {
        Some(cause) => FetchProblem::Unreachable(with_causes(cause)),
        None => FetchProblem::Refused {
            code: format!("{:?}", status.code()),
            message: printable(status.message()),
        },
    }
}

fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

const KEEP_ALIVE: Duration = Duration::from_secs(20);
const MAX_TOKEN_BYTES: usize = 64 * 1024;
