//! From what the control plane said to what the kernel decides by: computes what the
//! maps should hold and applies the difference.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ringfence_bpf_common::{
    Addr, Backend, Endpoint, ServiceKey, WORKLOAD_MESH, WORKLOAD_REFUSE, Workload as KernelWorkload,
};
use ringfence_datapath::{Datapath, DatapathError};

use super::egress::Passthrough;
use super::mesh::{Changes, Mesh, Reach, Service, Workload};

/// The tables of workloads and services as they were last written.
#[derive(Debug)]
pub struct Tables {
    /// Our network: an address of another one means nothing here.
    network: String,
    workloads: HashMap<Addr, KernelWorkload>,
    services: HashMap<ServiceKey, Vec<Backend>>,
    /// The entries of each service.
    entries: HashMap<String, BTreeSet<Listed>>,
    /// The services that claim an entry; the first one has it.
    claims: HashMap<ServiceKey, BTreeSet<String>>,
    passthrough: Passthrough,
    /// What an earlier agent left has not been looked through yet.
    inherited: bool,
}

/// An address and port of a service, in an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Listed(Addr, u16);

impl Listed {
    fn key(self) -> ServiceKey {
        Endpoint::new(self.0, self.1)
    }
}

impl Tables {
    /// Takes over what an earlier agent left in the pinned maps, so that the first
    /// [`Tables::apply`] removes what is stale.
    pub fn read(network: &str, datapath: &Datapath) -> Result<Self, DatapathError> {
        Ok(Tables {
            workloads: datapath.workloads()?.into_iter().collect(),
            // Backends are compared by content: an empty list differs from whatever is wanted.
            services: datapath
                .services()?
                .into_iter()
                .map(|key| (key, Vec::new()))
                .collect(),
            inherited: true,
            ..Tables::new(network)
        })
    }

    fn new(network: &str) -> Self {
        Tables {
            network: network.into(),
            workloads: HashMap::new(),
            services: HashMap::new(),
            entries: HashMap::new(),
            claims: HashMap::new(),
            passthrough: Passthrough::default(),
            inherited: false,
        }
    }

    /// Whether what an earlier agent left is still to be looked through; true once.
    pub fn take_inherited(&mut self) -> bool {
        std::mem::take(&mut self.inherited)
    }

    /// Makes the kernel's tables those of `mesh` where it changed. New and changed entries
    /// come first, then the stale ones go, so that nothing is missing in between.
    pub fn apply(
        &mut self,
        mesh: &Mesh,
        changes: &Changes,
        datapath: &Datapath,
    ) -> Result<(), DatapathError> {
        let workloads = self.changed_workloads(mesh, changes);
        let services = self.changed_services(mesh, changes);
        for (addr, workload) in &workloads {
            if let Some(workload) = workload
                && self.workloads.get(addr) != Some(workload)
            {
                datapath.put_workload(*addr, *workload)?;
                self.workloads.insert(*addr, *workload);
            }
        }
        for (key, backends) in &services {
            if let Some(backends) = backends
                && (backends.is_empty() || self.services.get(key) != Some(backends))
            {
                datapath.put_service(*key, backends)?;
                self.services.insert(*key, backends.clone());
            }
        }
        for (key, _) in services.iter().filter(|(_, wanted)| wanted.is_none()) {
            if self.services.contains_key(key) {
                datapath.remove_service(key)?;
                self.services.remove(key);
            }
        }
        for (addr, _) in workloads.iter().filter(|(_, wanted)| wanted.is_none()) {
            if self.workloads.contains_key(addr) {
                datapath.remove_workload(addr)?;
                self.workloads.remove(addr);
            }
        }
        Ok(())
    }

    /// What the changed addresses should have; `None`: no entry.
    fn changed_workloads(
        &mut self,
        mesh: &Mesh,
        changes: &Changes,
    ) -> HashMap<Addr, Option<KernelWorkload>> {
        let mut addresses = changes.addresses.clone();
        let mut services = changes.services.clone();
        if changes.all {
            services.extend(mesh.services().keys().cloned());
            services.extend(self.passthrough.services().cloned());
        }
        for name in services {
            let service = mesh.services().get(&name).map(AsRef::as_ref);
            addresses.extend(self.passthrough.follow(&name, service, &self.network));
        }
        let wanted = |address: IpAddr| {
            // An address of another network is not that workload's here.
            let workload = mesh.by_address(address);
            match workload.filter(|w| w.network == self.network) {
                Some(workload) => Some(KernelWorkload {
                    flags: flags(workload, &self.network),
                }),
                None => self
                    .passthrough
                    .has(address)
                    .then_some(KernelWorkload { flags: 0 }),
            }
        };
        if changes.all {
            addresses.extend(mesh.addresses().map(|(address, _)| address));
            addresses.extend(self.workloads.keys().map(|addr| IpAddr::from(*addr)));
        }
        let entry = |address| (Addr::from(address), wanted(address));
        addresses.into_iter().map(entry).collect()
    }

    /// What the entries of the changed services should have; `None`: no entry.
    fn changed_services(
        &mut self,
        mesh: &Mesh,
        changes: &Changes,
    ) -> HashMap<ServiceKey, Option<Vec<Backend>>> {
        let mut changed = changes.services.clone();
        let mut touched: HashSet<ServiceKey> = HashSet::new();
        if changes.all {
            changed.extend(mesh.services().keys().cloned());
            changed.extend(self.entries.keys().cloned());
            touched.extend(self.services.keys());
        }
        for name in changed {
            let now = mesh.services().get(&name);
            let now = now.map_or_else(BTreeSet::new, |s| self.entries_of(s));
            let before = self.entries.remove(&name).unwrap_or_default();
            for gone in before.difference(&now) {
                if let Some(claims) = self.claims.get_mut(&gone.key()) {
                    claims.remove(&name);
                    if claims.is_empty() {
                        self.claims.remove(&gone.key());
                    }
                }
            }
            for new in now.difference(&before) {
                let claims = self.claims.entry(new.key()).or_default();
                claims.insert(name.clone());
            }
            touched.extend(before.union(&now).map(|listed| listed.key()));
            if !now.is_empty() {
                self.entries.insert(name, now);
            }
        }
        let wanted = |key: &ServiceKey| {
            let owner = self.claims.get(key)?.first()?;
            Some(backends(
                mesh,
                mesh.services().get(owner)?,
                key,
                &self.network,
            ))
        };
        touched.into_iter().map(|key| (key, wanted(&key))).collect()
    }

    fn entries_of(&self, service: &Service) -> BTreeSet<Listed> {
        if service.passthrough {
            return BTreeSet::new();
        }
        let own = service.addresses.iter();
        let own = own.filter(|(network, _)| *network == self.network);
        own.flat_map(|(_, address)| {
            let ports = service.ports.iter();
            ports.map(|(port, _)| Listed(Addr::from(*address), *port))
        })
        .collect()
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

/// Where connections to an entry of the service go.
fn backends(mesh: &Mesh, service: &Service, entry: &ServiceKey, network: &str) -> Vec<Backend> {
    let Some((port, target)) = service.ports.iter().find(|(port, _)| *port == entry.port) else {
        return Vec::new();
    };
    let mut backends: Vec<Backend> = mesh
        .members(&service.key)
        .filter(|w| w.healthy || service.any_health)
        .filter_map(|w| backend(service, w, entry.addr.into(), *port, *target, network))
        .collect();
    // A stable order: equal content compares equal.
    backends.sort_by_key(|b| (b.endpoint.addr, b.endpoint.port));
    backends
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
        mesh.put_service(Service::from_wire(service).unwrap());
        mesh
    }

    fn everything() -> Changes {
        Changes {
            all: true,
            ..Changes::default()
        }
    }

    fn only_backends(mesh: &Mesh) -> Vec<Backend> {
        let services = Tables::new("").changed_services(mesh, &everything());
        services.into_values().next().unwrap().unwrap()
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
        let workloads = Tables::new("").changed_workloads(&mesh, &everything());
        assert!(workloads.values().all(Option::is_none));
    }

    #[test]
    fn address_of_a_passthrough_service_is_known_and_direct() {
        use wire::load_balancing::Mode;
        let mut mesh = mesh(|_, s| {
            s.load_balancing = Some(wire::LoadBalancing {
                mode: Mode::Passthrough as i32,
                ..Default::default()
            });
        });
        let own = Addr::v4([10, 96, 0, 1]);
        let mut tables = Tables::new("");
        let changes = mesh.take_changes();
        assert!(tables.changed_services(&mesh, &changes).is_empty());
        let workloads = tables.changed_workloads(&mesh, &changes);
        assert_eq!(
            workloads.get(&own),
            Some(&Some(KernelWorkload { flags: 0 }))
        );
        mesh.remove_service("demo/web");
        let changes = mesh.take_changes();
        let workloads = tables.changed_workloads(&mesh, &changes);
        assert_eq!(workloads.get(&own), Some(&None));
    }

    #[test]
    fn change_of_a_member_touches_its_services_alone() {
        let mut mesh = mesh(|_, _| {});
        let other = wire::Service {
            namespace: "demo".into(),
            hostname: "other".into(),
            addresses: vec![wire::NetworkAddress {
                network: String::new(),
                address: vec![10, 96, 0, 2],
            }],
            ports: vec![wire::Port {
                service_port: 1,
                target_port: 2,
            }],
            ..Default::default()
        };
        mesh.put_service(Service::from_wire(other).unwrap());
        let mut tables = Tables::new("");
        let first = mesh.take_changes();
        assert_eq!(tables.changed_services(&mesh, &first).len(), 2);
        let none = mesh.take_changes();
        assert!(tables.changed_services(&mesh, &none).is_empty());

        mesh.remove_workload("u");
        let changes = mesh.take_changes();
        let services = tables.changed_services(&mesh, &changes);
        let web = Endpoint::new(Addr::v4([10, 96, 0, 1]), 8080);
        assert_eq!(services, HashMap::from([(web, Some(Vec::new()))]));
        let workloads = tables.changed_workloads(&mesh, &changes);
        assert!(workloads.len() == 2 && workloads.values().all(Option::is_none));
        mesh.remove_service("demo/web");
        let changes = mesh.take_changes();
        let services = tables.changed_services(&mesh, &changes);
        assert_eq!(services, HashMap::from([(web, None)]));
    }

    #[test]
    fn entry_that_two_services_claim_goes_to_the_other_when_one_leaves() {
        let mut mesh = mesh(|_, _| {});
        let twin = |name: &str| wire::Service {
            namespace: "demo".into(),
            hostname: name.into(),
            addresses: vec![wire::NetworkAddress {
                network: String::new(),
                address: vec![10, 96, 0, 1],
            }],
            ports: vec![wire::Port {
                service_port: 8080,
                target_port: 80,
            }],
            ..Default::default()
        };
        mesh.put_service(Service::from_wire(twin("a")).unwrap());
        let mut tables = Tables::new("");
        let changes = mesh.take_changes();
        let services = tables.changed_services(&mesh, &changes);
        let entry = Endpoint::new(Addr::v4([10, 96, 0, 1]), 8080);
        assert_eq!(services.get(&entry), Some(&Some(Vec::new())), "`a` has it");
        mesh.remove_service("demo/a");
        let changes = mesh.take_changes();
        let services = tables.changed_services(&mesh, &changes);
        let left = services.get(&entry).unwrap().as_ref().unwrap();
        assert_eq!(left.len(), 1, "the backend of `web`");
    }
}
