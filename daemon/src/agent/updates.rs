//! Takes what the control plane sends into the [`Mesh`](super::mesh::Mesh).

use std::sync::Arc;

use ringfence_policies::PolicyChange;
use ringfence_xds::proto::security::Authorization;
use ringfence_xds::proto::workload::{Address, address};
use ringfence_xds::{Delta, Handler, Named, Rejection, Update};

use super::mesh::{BadResource, Mesh, Service, Workload};
use super::{Agent, convert};

/// The agent's side of the xDS stream.
#[derive(Debug)]
pub struct Updates(pub Arc<Agent>);

impl Handler for Updates {
    fn apply(&mut self, update: Update) -> Vec<Rejection> {
        let agent = &self.0;
        let rejections = {
            let mut mesh = agent.mesh_mut();
            match update {
                Update::Addresses(delta) => {
                    if delta.complete {
                        agent.sync.addresses();
                    }
                    addresses(&mut mesh, delta)
                }
                Update::Authorizations(delta) => {
                    if delta.complete {
                        agent.sync.policies();
                    }
                    // Under the lock, so that it is the change that is timed.
                    agent.metrics.policy.pushed();
                    authorizations(&mut mesh, delta)
                }
            }
        };
        agent
            .metrics
            .rejected_resources
            .inc_by(rejections.len() as u64);
        agent.changed.notify_one();
        rejections
    }
}

fn addresses(mesh: &mut Mesh, delta: Delta<Address>) -> Vec<Rejection> {
    for name in &delta.removed {
        // A uid and a service's key are never equal: the one has no such resource.
        mesh.remove_workload(name);
        mesh.remove_service(name);
    }
    let mut rejections = Vec::new();
    for Named { name, value } in delta.upserted {
        let result = match value.r#type {
            Some(address::Type::Workload(wire)) => {
                Workload::from_wire(wire).map(|w| mesh.put_workload(w))
            }
            Some(address::Type::Service(wire)) => {
                Service::from_wire(wire).map(|s| mesh.put_service(s))
            }
            None => Err(BadResource {
                resource: name.clone(),
                field: "type",
                problem: "is neither a workload nor a service".into(),
            }),
        };
        // What was valid before stays in use.
        if let Err(error) = result {
            rejections.push(Rejection {
                name,
                reason: error.to_string(),
            });
        }
    }
    rejections
}

fn authorizations(mesh: &mut Mesh, delta: Delta<Authorization>) -> Vec<Rejection> {
    let removed = delta.removed.iter().filter_map(|name| name.parse().ok());
    let mut changes: Vec<_> = removed.map(PolicyChange::Remove).collect();
    let mut rejections = Vec::new();
    for Named { name, value } in delta.upserted {
        match convert::policy(&value) {
            Ok(policy) => changes.push(PolicyChange::Put(policy)),
            Err(rejected) => {
                let reason = rejected.error.to_string();
                // It closes the workloads it applies to; an old version would too often
                // admit what the new one was written to refuse.
                changes.push(PolicyChange::Reject(*rejected));
                rejections.push(Rejection { name, reason });
            }
        }
    }
    mesh.change_policies(changes);
    rejections
}
