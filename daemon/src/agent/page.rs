//! What operators are shown: the status page and the metrics.

use ktls_offload::{KernelSuites, RecordLayer};
use ringfence_identity::{SvidState, SvidStatus};
use ringfence_xds::ConnectionState;

use super::{Agent, applied, trust};
use crate::status;

impl Agent {
    /// The metrics, in OpenMetrics text.
    pub fn metrics_text(&self) -> String {
        let now = status::now().cast_signed();
        // A revoked certificate has no time left.
        let left = |svid: SvidStatus| {
            let left = match svid.state {
                SvidState::Revoked => 0,
                _ => svid.not_after? - now,
            };
            Some((svid.identity.spiffe_id().to_string(), left))
        };
        self.metrics
            .set_svids(self.svids.snapshot().into_iter().filter_map(left));
        let kernel = self.datapath.counters().unwrap_or_else(|error| {
            tracing::warn!(%error, "the kernel's counters cannot be read");
            Vec::new()
        });
        self.metrics
            .policy
            .set_kernel(&applied::tables(self), &kernel);
        self.metrics.encode()
    }

    /// The status page.
    pub fn status(&self) -> status::Status {
        let pods = self.pods.status();
        let mut counters = self.metrics.counters();
        match self.datapath.counters() {
            Ok(kernel) => counters.extend(
                kernel
                    .into_iter()
                    .map(|(name, n)| (format!("kernel.{name}"), n)),
            ),
            Err(error) => tracing::warn!(%error, "the kernel's counters cannot be read"),
        }
        let connection = self.control_plane.get().map(|state| state.borrow().clone());
        let (state, error) = match connection {
            None | Some(ConnectionState::Connecting) => ("connecting", None),
            Some(ConnectionState::Connected { .. }) => ("connected", None),
            Some(ConnectionState::Failed { error, .. }) => ("failed", Some(error.to_string())),
        };
        let svids: Vec<_> = self
            .svids
            .snapshot()
            .into_iter()
            .map(describe_svid)
            .collect();
        let mesh = self.mesh();
        status::Status {
            version: env!("CARGO_PKG_VERSION").into(),
            map_layout: ringfence_bpf_common::LAYOUT_VERSION,
            node: self.config.node.name.clone(),
            ready: self.synced() && pods.iter().all(|p| p.ready) && svids.iter().all(|s| s.valid),
            control_plane: status::ControlPlane {
                address: self.config.control_plane.address.clone(),
                state: state.into(),
                error,
                synced: self.synced(),
                workloads: mesh.workloads().len(),
                services: mesh.services().len(),
            },
            record_layer: status::RecordLayer {
                mode: self.tunnels.records.as_str().into(),
                reason: match self.tunnels.records {
                    RecordLayer::Kernel(suites) => name_suites(suites),
                    RecordLayer::Software(reason) => reason.to_string(),
                },
            },
            pods,
            svids,
            revocation_lists: trust::describe_lists(self),
            streams: self.activity.streams(),
            handshakes: self.activity.handshakes(),
            policies: self.in_force.describe(),
            counters,
            warnings: self
                .plaintext
                .unable()
                .map(Into::into)
                .into_iter()
                .collect(),
        }
    }
}

fn name_suites(suites: KernelSuites) -> String {
    let all = [
        (suites.aes_128_gcm, "AES-128-GCM"),
        (suites.aes_256_gcm, "AES-256-GCM"),
        (suites.chacha20_poly1305, "ChaCha20-Poly1305"),
    ];
    let names: Vec<_> = all
        .into_iter()
        .filter(|(has, _)| *has)
        .map(|(_, name)| name)
        .collect();
    format!("the kernel takes {}", names.join(", "))
}

fn describe_svid(svid: SvidStatus) -> status::Svid {
    status::Svid {
        id: svid.identity.spiffe_id().to_string(),
        valid: matches!(svid.state, SvidState::Ready | SvidState::RefreshFailing),
        state: svid.state.as_str().into(),
        serial: svid.serial.unwrap_or_default(),
        issuer: svid.issuer.unwrap_or_default(),
        not_before: svid.not_before.unwrap_or_default(),
        not_after: svid.not_after.unwrap_or_default(),
        error: svid.last_error,
    }
}
