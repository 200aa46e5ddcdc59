//! What an agent says of itself: the JSON of `ringfence status --json`, as far as the lab
//! reads it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    pub version: String,
    pub node: String,
    pub ready: bool,
    pub control_plane: ControlPlane,
    pub record_layer: RecordLayerStatus,
    pub pods: Vec<PodStatus>,
    pub svids: Vec<Svid>,
    pub revocation_lists: Vec<RevocationList>,
    pub streams: Vec<Stream>,
    pub handshakes: Vec<Handshake>,
    pub policies: Vec<PolicyStatus>,
    pub counters: BTreeMap<String, u64>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct ControlPlane {
    pub state: String,
    #[serde(default)]
    pub error: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct RecordLayerStatus {
    /// `kernel` or `software`.
    pub mode: String,
    pub reason: String,
}

#[derive(Clone, Debug, Deserialize)]
pub struct PodStatus {
    pub namespace: String,
    pub name: String,
    pub ready: bool,
    #[serde(default)]
    pub reason: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Svid {
    pub id: String,
    pub valid: bool,
    pub state: String,
    pub serial: String,
    pub issuer: String,
    /// Seconds since the epoch.
    pub not_after: u64,
    #[serde(default)]
    pub error: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct RevocationList {
    pub trust_domain: String,
    pub state: String,
    pub revoked: usize,
    #[serde(default)]
    pub error: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Stream {
    pub id: String,
    pub direction: String,
    pub peer: String,
    pub tx: u64,
    pub rx: u64,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Handshake {
    pub direction: String,
    pub peer: String,
    pub issuer: String,
    pub serial: String,
    /// Seconds since the epoch.
    pub not_after: u64,
    pub cipher: String,
    pub key_exchange: String,
    pub record_layer: String,
}

#[derive(Clone, Debug, Deserialize)]
pub struct PolicyStatus {
    pub name: String,
}

impl Status {
    /// Asks the agent by the command that a person would use.
    pub fn of(binary: &Path, socket: &Path) -> Result<Self> {
        let output = Command::new(binary)
            .args(["status", "--json", "--socket"])
            .arg(socket)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("starting {}", binary.display()))?;
        ensure!(
            output.status.success(),
            "`ringfence status --socket {}` ended with {}: {}",
            socket.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        serde_json::from_slice(&output.stdout).context("reading the JSON of `ringfence status`")
    }

    /// The value of a counter; one that has never moved may be missing.
    pub fn counter(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or_default()
    }

    /// The certificate of an identity, given as SPIFFE ID.
    pub fn svid(&self, id: &str) -> Result<&Svid> {
        let known = || self.svids.iter().map(|svid| svid.id.as_str());
        self.svids
            .iter()
            .find(|svid| svid.id == id)
            .with_context(|| format!("no {id} among {:?}", known().collect::<Vec<_>>()))
    }

    /// Why the agent is not ready, in one line.
    pub fn why_not_ready(&self) -> String {
        let mut reasons = vec![format!("control plane {}", self.control_plane.state)];
        reasons.extend(self.control_plane.error.clone());
        for pod in self.pods.iter().filter(|pod| !pod.ready) {
            let reason = pod.reason.as_deref().unwrap_or("no reason given");
            reasons.push(format!("pod {} is not ready: {reason}", pod.name));
        }
        reasons.join("; ")
    }
}
