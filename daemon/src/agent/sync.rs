//! From what the control plane said to what the kernel decides by: computes what the
//! maps should hold and applies the difference.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use ringfence_bpf_common::{
    Addr, Backend, Endpoint, ServiceKey, WORKLOAD_MESH, WORKLOAD_REFUSE, Workload as KernelWorkload,
};
use ringfence_datapath::{Datapath, DatapathError};

use super::mesh::{Mesh, Reach, Service, Workload};

/// The tables of workloads and services as they were last written.
#[derive(Debug)]
pub struct Tables {
    /// Our network: an address of another one means nothing here.
    network: String,
    workloads: HashMap<Addr, KernelWorkload>,
    services: HashMap<ServiceKey, Vec<Backend>>,
    /// What an earlier agent left has not been looked through yet.
    inherited: bool,
}

impl Tables {
    /// Takes over what an earlier agent left in the pinned maps, so that the first
    /// [`Tables::apply`] removes what is stale.
    pub fn read(network: &str, datapath: &Datapath) -> Result<Self, DatapathError> {
        Ok(Tables {
            network: network.into(),
            workloads: datapath.workloads()?.into_iter().collect(),
            // Backends are compared by content: an empty list differs from whatever is wanted.
            services: datapath
                .services()?
                .into_iter()
                .map(|key| (key, Vec::new()))
                .collect(),
            inherited: true,
        })
    }

    /// Whether what an earlier agent left is still to be looked through; true once.
    pub fn take_inherited(&mut self) -> bool {
        std::mem::take(&mut self.inherited)
    }

    /// Makes the kernel's tables those of `mesh`. New and changed entries come first, then
    /// the stale ones go, so that nothing is missing in between.
    pub fn apply(&mut self, mesh: &Mesh, datapath: &Datapath) -> Result<(), DatapathError> {
        let workloads = wanted_workloads(mesh, &self.network);
        let services = wanted_services(mesh, &self.network);

        for (addr, workload) in &workloads {
            if self.workloads.get(addr) != Some(workload) {
                datapath.put_workload(*addr, *workload)?;
                self.workloads.insert(*addr, *workload);
            }
        }
        for (key, backends) in &services {
            let same = self.services.get(key) == Some(backends) && !backends.is_empty();
            if !same {
                datapath.put_service(*key, backends)?;
                self.services.insert(*key, backends.clone());
            }
        }
        let stale: Vec<_> = self
            .services
            .keys()
            .filter(|k| !services.contains_key(k))
            .copied()
            .collect();
        for key in stale {
            datapath.remove_service(&key)?;
            self.services.remove(&key);
        }
        let stale: Vec<_> = self
            .workloads
            .keys()
            .filter(|k| !workloads.contains_key(k))
            .copied()
            .collect();
        for addr in stale {
            datapath.remove_workload(&addr)?;
            self.workloads.remove(&addr);
        }
        Ok(())
    }
}

fn flags(workload: &Workload, network: &str) -> u32 {
    match workload.reach {
        _ if workload.network != network => WORKLOAD_REFUSE,
        Reach::Mesh => WORKLOAD_MESH,
        Reach::Direct => 0,
        Reach::Refused(_) => WORKLOAD_REFUSE,
    }
}

fn wanted_workloads(mesh: &Mesh, network: &str) -> HashMap<Addr, KernelWorkload> {
    mesh.addresses()
        // An address of another network is not that workload's here.
        .filter(|(_, workload)| workload.network == network)
        .map(|(address, workload)| {
            (
                Addr::from(address),
                KernelWorkload {
                    flags: flags(workload, network),
                },
            )
        })
        .collect()
}

fn wanted_services(mesh: &Mesh, network: &str) -> HashMap<ServiceKey, Vec<Backend>> {
    let mut members: HashMap<&str, Vec<&Arc<Workload>>> = HashMap::new();
    for workload in mesh.workloads.values() {
        for key in workload.services.keys() {
            members.entry(key).or_default().push(workload);
        }
    }
    let mut wanted = HashMap::new();
    for service in mesh.services.values().filter(|s| !s.passthrough) {
        let members = members
            .get(service.key.as_str())
            .map(Vec::as_slice)
            .unwrap_or_default();
        for (_, address) in service.addresses.iter().filter(|(n, _)| n == network) {
            for (port, target) in &service.ports {
                let key = Endpoint::new(Addr::from(*address), *port);
                let mut backends: Vec<Backend> = members
                    .iter()
                    .filter(|w| w.healthy || service.any_health)
                    .filter_map(|w| backend(service, w, *address, *port, *target, network))
                    .collect();
                // A stable order: equal content compares equal.
                backends.sort_by_key(|b| (b.endpoint.addr, b.endpoint.port));
                wanted.insert(key, backends);
            }
        }
    }
    wanted
}

/// Where `workload` serves a port of `service`, in the family of the virtual address.
fn backend(
    service: &Service,
    workload: &Workload,
    virtual_ip: IpAddr,
    port: u16,
    target: u16,
    network: &str,
) -> Option<Backend> {
    let own = workload.services.get(&service.key)?;
    let target = match own.iter().find(|(service_port, _)| *service_port == port) {
        Some((_, own_target)) if *own_target != 0 => *own_target,
        _ => target,
    };
    if target == 0 {
        return None;
    }
    let address = workload
        .addresses
        .iter()
        .find(|a| a.is_ipv4() == virtual_ip.is_ipv4())?;
    let flags = if service.waypoint {
        WORKLOAD_REFUSE
    } else {
        flags(workload, network)
    };
    Some(Backend {
        endpoint: Endpoint::new(Addr::from(*address), target),
        flags,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use ringfence_xds::proto::workload as wire;

    fn mesh(change: impl Fn(&mut wire::Workload, &mut wire::Service)) -> Mesh {
        let mut workload = wire::Workload {
            uid: "u".into(),
            name: "web".into(),
            namespace: "demo".into(),
            addresses: vec![
                vec![10, 0, 0, 1],
                "fd00::1"
                    .parse::<std::net::Ipv6Addr>()
                    .unwrap()
                    .octets()
                    .to_vec(),
            ],
            tunnel_protocol: wire::TunnelProtocol::Hbone as i32,
            ..Default::default()
        };
        let port = wire::Port {
            service_port: 8080,
            target_port: 80,
        };
        workload
            .services
            .insert("demo/web".into(), wire::PortList { ports: vec![port] });
        let mut service = wire::Service {
            name: "web".into(),
            namespace: "demo".into(),
            hostname: "web".into(),
            addresses: vec![wire::NetworkAddress {
                network: String::new(),
                address: vec![10, 96, 0, 1],
            }],
            ports: vec![port],
            ..Default::default()
        };
        change(&mut workload, &mut service);
        let mut mesh = Mesh::new("root");
        mesh.put_workload(Workload::from_wire(workload).unwrap());
        let service = Service::from_wire(service).unwrap();
        mesh.services.insert(service.key.clone(), Arc::new(service));
        mesh
    }

    fn only_backends(mesh: &Mesh) -> Vec<Backend> {
        wanted_services(mesh, "").into_values().next().unwrap()
    }

    #[test]
    fn backend_has_the_family_of_the_virtual_address() {
        let backends = only_backends(&mesh(|_, _| {}));
        assert_eq!(backends.len(), 1);
        assert_eq!(
            backends[0].endpoint,
            Endpoint::new(Addr::v4([10, 0, 0, 1]), 80)
        );
        assert_eq!(backends[0].flags, WORKLOAD_MESH);
    }

    #[test]
    fn unhealthy_workload_is_no_backend() {
        let backends = only_backends(&mesh(|w, _| {
            w.status = wire::WorkloadStatus::Unhealthy as i32
        }));
        assert!(backends.is_empty());
    }

    #[test]
    fn service_with_a_waypoint_is_refused_and_not_bypassed() {
        let backends = only_backends(&mesh(|_, s| {
            s.waypoint = Some(wire::GatewayAddress::default())
        }));
        assert_eq!(backends[0].flags, WORKLOAD_REFUSE);
    }

    #[test]
    fn workload_of_another_network_is_refused() {
        let mesh = mesh(|w, _| w.network = "other".into());
        assert_eq!(only_backends(&mesh)[0].flags, WORKLOAD_REFUSE);
        assert!(wanted_workloads(&mesh, "").is_empty());
    }
}
