//! The embedded control plane: Istio's certificate service and delta ADS,
//! served from one YAML file.
//!
//! It is what a laptop, a fleet of VMs and the tests use in place of Istiod.
//! Its root can be replaced while it runs, see [`rotate`](mod@rotate).
//! What it does not do: watch a Kubernetes cluster, run in several replicas
//! (the state directory is locked), revoke certificates, or distribute L7 policy.

mod ads;
mod auth;
mod ca;
mod ca_service;
mod config;
mod reload;
pub mod rotate;
mod server;
mod snapshot;
mod state;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::auth::TokenHasher;
use crate::ca::Ca;
use crate::config::MeshConfig;
use crate::reload::Reloader;
use crate::server::ServerCertificate;
use crate::state::MeshState;

pub use ca::CaError;
pub use config::{ConfigError, Diagnostic};
pub use reload::ReloadStatus;
pub use rotate::{RotationError, RotationReport, RotationStep, rotate};

/// Why the control plane does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error(transparent)]
    Rotation(#[from] RotationError),
    #[error("cannot listen on {address}: {source}")]
    Listen {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("cannot watch {} for changes (see sysctl fs.inotify): {source}", path.display())]
    Watch {
        path: PathBuf,
        source: notify::Error,
    },
    #[error("the server failed: {0}")]
    Serve(tonic::transport::Error),
}

/// What `--check` says about a mesh file without errors.
#[derive(Debug)]
#[non_exhaustive]
pub struct Validated {
    /// Odd, but not wrong.
    pub warnings: Vec<Diagnostic>,
    pub nodes: usize,
    pub workloads: usize,
    pub services: usize,
    /// Its own and those of its manifests.
    pub policies: usize,
}

/// Checks a mesh file, and the token files and manifests it names; touches nothing else.
pub fn validate(path: &Path) -> Result<Validated, ConfigError> {
    let config::Loaded { config, warnings } = MeshConfig::load(path)?;
    Ok(Validated {
        warnings,
        nodes: config.nodes.len(),
        workloads: config.workloads.len(),
        services: config.services.len(),
        policies: config.policies.len() + config.converted.policies().count(),
    })
}

/// Runs the control plane until `shutdown`.
pub async fn run(config_path: &Path, shutdown: CancellationToken) -> Result<(), Error> {
    ControlPlane::bind(config_path)?.serve(shutdown).await
}

/// A control plane that has its CA and its sockets, and does not serve yet.
#[derive(Debug)]
pub struct ControlPlane {
    path: PathBuf,
    hasher: TokenHasher,
    ca: Arc<Ca>,
    certificate: Arc<ServerCertificate>,
    listeners: Vec<TcpListener>,
    addresses: Vec<SocketAddr>,
    state: watch::Sender<Arc<MeshState>>,
    status: watch::Sender<ReloadStatus>,
}

impl ControlPlane {
    /// Reads the mesh file, opens or makes the CA, binds the sockets. Needs a Tokio runtime.
    pub fn bind(config_path: &Path) -> Result<Self, Error> {
        let config::Loaded { config, warnings } = MeshConfig::load(config_path)?;
        for warning in &warnings {
            tracing::warn!("{warning}");
        }
        let ca = Arc::new(Ca::open(&config.state_dir, &config.trust_domain)?);
        if let Err(error) = ca.record_served(config.svid_ttl) {
            tracing::error!(%error, "cannot record what is served: rotations of the root will be refused");
        }
        let certificate = ServerCertificate::new(ca.clone(), &config)?;
        let listeners = server::bind(&config.listen)?;
        let addresses = server::addresses(&listeners).map_err(|source| Error::Listen {
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
            source,
        })?;
        let hasher = TokenHasher::new();
        let state = watch::Sender::new(Arc::new(MeshState::new(config, &hasher)));
        let status = ReloadStatus {
            generation: 1,
            loaded: SystemTime::now(),
            rejected: None,
            root_generation: 1,
            roots_rejected: None,
        };
        let status = watch::Sender::new(status);
        Ok(Self {
            path: config_path.to_owned(),
            hasher,
            ca,
            certificate,
            listeners,
            addresses,
            state,
            status,
        })
    }

    /// Where it listens, in the order of the mesh file; ports given as 0 are resolved.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// PEM of the roots that its certificates chain to, its own included: one, or two
    /// during a rotation.
    pub fn root_certificates(&self) -> String {
        self.ca.roots().bundle_pem().to_owned()
    }

    /// Changes whenever a changed mesh file or changed roots were taken or not taken.
    pub fn reloads(&self) -> watch::Receiver<ReloadStatus> {
        self.status.subscribe()
    }

    /// Serves until `shutdown`; open streams are closed then.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), Error> {
        let Self {
            path,
            hasher,
            ca,
            certificate,
            listeners,
            addresses,
            state,
            status,
        } = self;
        tracing::info!(?addresses, path = %path.display(), "control plane listening");
        let receiver = state.subscribe();
        let reloader = Reloader::new(path.clone(), hasher, ca, state, status)
            .map_err(|source| Error::Watch { path, source })?;
        // However this ends, the tasks end with it.
        let stop = shutdown.child_token();
        let _stop = stop.clone().drop_guard();
        let reload = stop.clone().run_until_cancelled_owned(reloader.run());
        let fresh = certificate.clone();
        let fresh_state = receiver.clone();
        let keep_fresh = async move { fresh.keep_fresh(fresh_state, SystemTime::now).await };
        let keep_fresh = stop.clone().run_until_cancelled_owned(keep_fresh);
        let (reload, keep_fresh) = (tokio::spawn(reload), tokio::spawn(keep_fresh));
        let served = server::serve(listeners, certificate, receiver, stop.clone()).await;
        stop.cancel();
        let _ = tokio::join!(reload, keep_fresh);
        served
    }
}
