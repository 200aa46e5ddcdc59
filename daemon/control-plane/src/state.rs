//! What is served: one checked mesh file and all that follows from it, replaced
//! as a whole.

use std::collections::HashSet;
use std::time::Duration;

use tonic::metadata::MetadataMap;

use crate::auth::{AuthError, Caller, TokenHasher, Tokens};
use crate::config::MeshConfig;
use crate::snapshot::Snapshot;

#[derive(Debug)]
pub(crate) struct MeshState {
    config: MeshConfig,
    tokens: Tokens,
    snapshot: Snapshot,
    /// Node, SPIFFE ID of a mesh workload on it.
    identities: HashSet<(String, String)>,
}

impl MeshState {
    pub(crate) fn new(config: MeshConfig, hasher: &TokenHasher) -> Self {
        let identities = config
            .workloads
            .iter()
            .filter(|workload| workload.mesh)
            .map(|workload| {
                let (namespace, account) = (&workload.namespace, &workload.service_account);
                (
                    workload.node.clone(),
                    format!(
                        "spiffe://{}/ns/{namespace}/sa/{account}",
                        config.trust_domain
                    ),
                )
            });
        let identities = identities.collect();
        let (tokens, snapshot) = (hasher.tokens(&config.nodes), Snapshot::render(&config));
        Self {
            config,
            tokens,
            snapshot,
            identities,
        }
    }

    pub(crate) fn config(&self) -> &MeshConfig {
        &self.config
    }

    pub(crate) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    pub(crate) fn svid_ttl(&self) -> Duration {
        self.config.svid_ttl
    }

    /// Token, and cluster when the mesh file names one.
    pub(crate) fn authenticate(&self, metadata: &MetadataMap) -> Result<Caller, AuthError> {
        if self.config.cluster_id_required
            && let Some(cluster) = metadata.get("clusterid")
            && cluster.as_bytes() != self.config.cluster_id.as_bytes()
        {
            return Err(AuthError::OtherCluster);
        }
        self.tokens.authenticate(metadata)
    }

    pub(crate) fn admits(&self, caller: &Caller) -> bool {
        self.tokens.admits(caller)
    }

    pub(crate) fn identity_is_on_node(&self, identity: &str, node: &str) -> bool {
        self.identities
            .contains(&(node.to_owned(), identity.to_owned()))
    }
}
