//! The SPIRE clients against agents that speak the protocol over real Unix
//! sockets and misbehave on demand.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod agent;
mod delegated;
mod workload;

use std::sync::Arc;
use std::time::Duration;

use crate::manager::{ManagerConfig, SvidManager};
use crate::source::SvidSource;
use crate::spiffe_id::WorkloadIdentity;
use crate::svid::Svid;
use crate::testing;

fn cart() -> WorkloadIdentity {
    testing::workload("td", "shop", "cart")
}

/// For what happens on other threads and sockets.
async fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let found = tokio::time::timeout(Duration::from_secs(10), looking).await;
    found.unwrap_or_else(|_| panic!("never: {what}"))
}

/// A manager over the source, with an SVID of `cart`.
async fn managed(
    source: Arc<dyn SvidSource>,
    bundles: &Arc<crate::TrustBundles>,
) -> (SvidManager, Arc<Svid>) {
    let manager = SvidManager::start(source, Arc::clone(bundles), ManagerConfig::default());
    manager.want(&cart());
    let svid = manager.ready(&cart(), Duration::from_secs(10)).await;
    (manager, svid.unwrap())
}
