//! What the SPIFFE Workload API needs to know of the agent.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use ringfence_identity::{CaClient, TrustChange, TrustDomain, WorkloadIdentity};
use ringfence_workload_api::{Caller, Exported, ExportedKey, IssueFuture, Workloads};

use super::Agent;

/// The agent's pods, as callers of the API.
pub struct Callers {
    pub agent: Arc<Agent>,
    /// Makes keys that may leave the process.
    pub ca: CaClient,
}

impl Workloads for Callers {
    fn identify(&self, caller: Caller) -> Option<WorkloadIdentity> {
        let pods = self.agent.pods.list();
        let pod = pods
            .iter()
            .find(|pod| pod.netns.is(caller.device, caller.inode))?;
        Some(pod.workload()?.identity.clone())
    }

    fn issue<'a>(&'a self, identity: &'a WorkloadIdentity) -> IssueFuture<'a> {
        Box::pin(async move {
            let ttl = self.agent.config.control_plane.svid_ttl();
            let issued = self.ca.fetch_exportable(identity, ttl).await;
            let (issued, key) = issued.map_err(|error| error.to_string())?;
            Ok(Exported {
                svid: issued.svid,
                key: ExportedKey(key),
            })
        })
    }

    fn bundles(&self) -> Vec<(TrustDomain, Vec<Vec<u8>>)> {
        let bundles = self.agent.trust.bundles();
        let roots =
            |domain: &TrustDomain| bundles.roots(domain).iter().map(|r| r.to_vec()).collect();
        bundles
            .trust_domains()
            .into_iter()
            .map(|d| (d.clone(), roots(&d)))
            .collect()
    }

    fn bundles_changed(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        // Subscribed here and now: no change after this call is missed.
        let mut changes = self.agent.trust.changes();
        Box::pin(async move { while changes.changed().await != TrustChange::Bundles {} })
    }
}
