//! An ADS client whose updates can be awaited.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use std::net::SocketAddr;

use ringfence_xds::proto::security::Authorization;
use ringfence_xds::proto::workload::Address;
use ringfence_xds::{
    AdsClient, ClientConfig, ConnectionState, Delta, Handler, NodeInfo, Rejection, Update,
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{LIMIT, Mesh};

pub struct Agent {
    addresses: mpsc::UnboundedReceiver<Delta<Address>>,
    policies: mpsc::UnboundedReceiver<Delta<Authorization>>,
    pub state: watch::Receiver<ConnectionState>,
    _stop: DropGuard,
}

struct Recorder {
    addresses: mpsc::UnboundedSender<Delta<Address>>,
    policies: mpsc::UnboundedSender<Delta<Authorization>>,
    reject: Option<&'static str>,
}

impl Handler for Recorder {
    fn apply(&mut self, update: Update) -> Vec<Rejection> {
        match update {
            Update::Addresses(delta) => {
                let rejected = delta
                    .upserted
                    .iter()
                    .filter(|named| self.reject == Some(named.name.as_str()));
                let rejected = rejected.map(|named| Rejection {
                    name: named.name.clone(),
                    reason: "no".into(),
                });
                let rejected = rejected.collect();
                let _ = self.addresses.send(delta);
                rejected
            }
            Update::Authorizations(delta) => {
                let _ = self.policies.send(delta);
                Vec::new()
            }
        }
    }
}

impl Agent {
    pub fn start(mesh: &Mesh, address: SocketAddr, node: &str) -> Self {
        Self::rejecting(mesh, address, node, None)
    }

    pub fn rejecting(
        mesh: &Mesh,
        address: SocketAddr,
        node: &str,
        reject: Option<&'static str>,
    ) -> Self {
        let config = ClientConfig {
            address: format!("https://{address}"),
            root_ca: mesh.root(),
            token_file: mesh.token_file(node),
            node: NodeInfo {
                name: "agent".into(),
                namespace: "ringfence-system".into(),
                address: address.ip(),
                node_name: format!("node-{node}"),
                cluster_id: "Kubernetes".into(),
            },
        };
        let (addresses_tx, addresses) = mpsc::unbounded_channel();
        let (policies_tx, policies) = mpsc::unbounded_channel();
        let recorder = Recorder {
            addresses: addresses_tx,
            policies: policies_tx,
            reject,
        };
        let (client, state) = AdsClient::new(config, recorder);
        let stop = CancellationToken::new();
        tokio::spawn(client.run(stop.clone()));
        Self {
            addresses,
            policies,
            state,
            _stop: stop.drop_guard(),
        }
    }

    pub async fn addresses(&mut self) -> Delta<Address> {
        tokio::time::timeout(LIMIT, self.addresses.recv())
            .await
            .expect("no addresses")
            .unwrap()
    }

    pub async fn policies(&mut self) -> Delta<Authorization> {
        tokio::time::timeout(LIMIT, self.policies.recv())
            .await
            .expect("no policies")
            .unwrap()
    }

    pub async fn until(
        &mut self,
        condition: impl FnMut(&ConnectionState) -> bool,
    ) -> ConnectionState {
        tokio::time::timeout(LIMIT, self.state.wait_for(condition))
            .await
            .expect("state not reached")
            .unwrap()
            .clone()
    }
}

pub fn names<T>(delta: &Delta<T>) -> Vec<&str> {
    let mut names: Vec<_> = delta
        .upserted
        .iter()
        .map(|named| named.name.as_str())
        .collect();
    names.sort_unstable();
    names
}
