//! A control plane on loopback and clients of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

pub mod agent;
pub mod ask;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ringfence_control_plane::{ControlPlane, ReloadStatus};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub const TOKEN_A: &str = "token-of-node-a-0123456789";
pub const TOKEN_B: &str = "token-of-node-b-0123456789";

/// Nothing here takes nearly as long; a test that hangs fails instead.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Two nodes: `client` on node-a, `web` on node-b, `legacy` outside the mesh on node-b.
pub const WORKLOADS: &str = r#"
workloads:
  - {name: client, namespace: demo, service_account: client, node: node-a, addresses: [10.77.1.2]}
  - {name: web, namespace: demo, service_account: web, node: node-b, addresses: [10.77.2.2], labels: {app: web}}
  - {name: legacy, namespace: demo, service_account: legacy, node: node-b, addresses: [10.77.2.3], mesh: false}
services:
  - {name: web, namespace: demo, addresses: [10.96.0.10], ports: [{port: 8080, target_port: 80}], selector: {app: web}}
"#;

pub struct Mesh {
    pub folder: TempDir,
    listen: String,
    extra: String,
}

pub struct Running {
    pub address: SocketAddr,
    pub reloads: watch::Receiver<ReloadStatus>,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), ringfence_control_plane::Error>>,
}

impl Mesh {
    pub fn new() -> Self {
        Self::with("127.0.0.1:0", "")
    }

    /// `extra`: more top-level lines of the mesh file.
    pub fn with(listen: &str, extra: &str) -> Self {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("a.token"), TOKEN_A).unwrap();
        fs::write(folder.path().join("b.token"), TOKEN_B).unwrap();
        let mesh = Self {
            folder,
            listen: listen.to_owned(),
            extra: extra.to_owned(),
        };
        mesh.write(WORKLOADS);
        mesh
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("mesh.yaml")
    }

    /// Replaces the mesh file as an editor does: by renaming another file over it.
    pub fn write(&self, rest: &str) {
        let (listen, extra) = (&self.listen, &self.extra);
        let text = format!(
            "listen: [\"{listen}\"]\nstate_dir: state\n{extra}\nnodes:\n  - {{name: node-a, token_file: a.token}}\n  - {{name: node-b, token_file: b.token}}\n{rest}"
        );
        let fresh = self.folder.path().join("mesh.yaml.new");
        fs::write(&fresh, text).unwrap();
        fs::rename(fresh, self.path()).unwrap();
    }

    pub fn start(&self) -> Running {
        let control_plane = ControlPlane::bind(&self.path()).unwrap();
        let (address, reloads) = (control_plane.addresses()[0], control_plane.reloads());
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(control_plane.serve(shutdown.clone()));
        Running {
            address,
            reloads,
            shutdown,
            task,
        }
    }

    /// Starts again later on the same address.
    pub fn keep_address(&mut self, address: SocketAddr) {
        self.listen = address.to_string();
        self.write(WORKLOADS);
    }

    pub fn root(&self) -> PathBuf {
        self.folder.path().join("state/root-cert.pem")
    }

    pub fn token_file(&self, node: &str) -> PathBuf {
        self.folder.path().join(format!("{node}.token"))
    }
}

impl Running {
    pub async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(LIMIT, self.task)
            .await
            .expect("did not stop")
            .unwrap()
            .unwrap();
    }

    pub async fn reloaded(
        &mut self,
        mut condition: impl FnMut(&ReloadStatus) -> bool,
    ) -> ReloadStatus {
        tokio::time::timeout(LIMIT, self.reloads.wait_for(|s| condition(s)))
            .await
            .expect("no reload")
            .unwrap()
            .clone()
    }
}

pub fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}
