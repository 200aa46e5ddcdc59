//! What the control plane said: workloads, services and policies, checked and indexed.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use ringfence_identity::{SpiffeId, TrustDomain, WorkloadIdentity};
use ringfence_policies::{Affected, PolicyChange, PolicyStore};
use ringfence_xds::proto::workload as wire;

/// A workload as the agent uses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub identity: WorkloadIdentity,
    pub addresses: Vec<IpAddr>,
    pub network: String,
    pub reach: Reach,
    pub healthy: bool,
    /// Key: `namespace/hostname`; value: (service port, target port).
    pub services: BTreeMap<String, Vec<(u16, u16)>>,
    /// Policies named for this workload, as `namespace/name`.
    pub policies: Vec<String>,
}

/// How connections to a workload travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Through a tunnel.
    Mesh,
    /// Directly: the workload is not in the mesh.
    Direct,
    /// Not at all: the reason is something this version cannot honour, and going around
    /// it would bypass a policy.
    Refused(&'static str),
}

/// A service as the agent uses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// `namespace/hostname`.
    pub key: String,
    /// (network, address): an address means something in its own network only.
    pub addresses: Vec<(String, IpAddr)>,
    /// (service port, target port).
    pub ports: Vec<(u16, u16)>,
    /// Identities that a backend may have besides its own.
    pub subject_alt_names: Vec<String>,
    /// Traffic must pass a waypoint: refused until this version can use one.
    pub waypoint: bool,
    /// Istio's PASSTHROUGH: the address is used as it is.
    pub passthrough: bool,
    /// Unhealthy endpoints serve too.
    pub any_health: bool,
}

/// A resource that cannot be used; the message goes to the control plane as a NACK.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{resource}: {field}: {problem}")]
pub struct BadResource {
    pub resource: String,
    pub field: &'static str,
    pub problem: String,
}

impl Workload {
    /// Checks and converts the wire form.
    pub fn from_wire(wire: wire::Workload) -> Result<Self, BadResource> {
        let bad = |field, problem: String| BadResource {
            resource: format!("workload {}", wire.uid),
            field,
            problem,
        };
        if wire.uid.is_empty() {
            return Err(bad("uid", "is empty".into()));
        }
        let mut addresses = Vec::with_capacity(wire.addresses.len());
        for bytes in &wire.addresses {
            addresses.push(ip(bytes).ok_or_else(|| bad("addresses", not_an_address(bytes)))?);
        }
        let trust_domain = TrustDomain::parse(or(&wire.trust_domain, "cluster.local"))
            .map_err(|e| bad("trust_domain", e.to_string()))?;
        let account = or(&wire.service_account, "default");
        let identity = WorkloadIdentity::new(trust_domain, &wire.namespace, account)
            .map_err(|e| bad("service_account", e.to_string()))?;
        let mut services = BTreeMap::new();
        for (key, ports) in &wire.services {
            let ports = port_list(&ports.ports).map_err(|p| bad("services", p))?;
            services.insert(key.clone(), ports);
        }
        let reach = if wire.waypoint.is_some() {
            Reach::Refused("waypoint-unsupported")
        } else if wire.network_gateway.is_some() {
            Reach::Refused("other-network")
        } else if wire.tunnel_protocol == wire::TunnelProtocol::Hbone as i32 {
            Reach::Mesh
        } else if wire.tunnel_protocol == wire::TunnelProtocol::None as i32 {
            Reach::Direct
        } else {
            Reach::Refused("tunnel-protocol-unsupported")
        };
        // A host-network workload shares the node's address with everything there.
        if wire.network_mode == wire::NetworkMode::HostNetwork as i32 {
            addresses.clear();
        }
        Ok(Workload {
            identity,
            addresses,
            reach,
            healthy: wire.status == wire::WorkloadStatus::Healthy as i32,
            services,
            uid: wire.uid,
            namespace: wire.namespace,
            name: wire.name,
            network: wire.network,
            policies: wire.authorization_policies,
        })
    }
}

impl Service {
    /// Checks and converts the wire form.
    pub fn from_wire(wire: wire::Service) -> Result<Self, BadResource> {
        let key = format!("{}/{}", wire.namespace, wire.hostname);
        let bad = |field, problem: String| BadResource {
            resource: format!("service {key}"),
            field,
            problem,
        };
        if wire.hostname.is_empty() {
            return Err(bad("hostname", "is empty".into()));
        }
        let mut addresses = Vec::with_capacity(wire.addresses.len());
        for network in wire.addresses {
            let bytes = &network.address;
            let address = ip(bytes).ok_or_else(|| bad("addresses", not_an_address(bytes)))?;
            addresses.push((network.network, address));
        }
        let ports = port_list(&wire.ports).map_err(|p| bad("ports", p))?;
        let balancing = wire.load_balancing.unwrap_or_default();
        Ok(Service {
            addresses,
            ports,
            subject_alt_names: wire.subject_alt_names,
            waypoint: wire.waypoint.is_some(),
            passthrough: balancing.mode == wire::load_balancing::Mode::Passthrough as i32,
            any_health: balancing.health_policy
                == wire::load_balancing::HealthPolicy::AllowAll as i32,
            key,
        })
    }
}

fn or<'a>(value: &'a str, default: &'a str) -> &'a str {
    if value.is_empty() { default } else { value }
}

/// An address of 4 or 16 bytes in network byte order.
pub fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(bytes)
        .ok()
        .map(|v6| IpAddr::from(v6).to_canonical())
}

fn not_an_address(bytes: &[u8]) -> String {
    format!("an address has {} bytes, expected 4 or 16", bytes.len())
}

fn port_list(ports: &[wire::Port]) -> Result<Vec<(u16, u16)>, String> {
    let port = |n: u32| match u16::try_from(n) {
        Ok(port) => Ok(port),
        Err(_) => Err(format!("{n} is not a port (0 to 65535)")),
    };
    // A target port of 0 is Istio's way to say that each workload names its own.
    ports
        .iter()
        .map(|p| Ok((port(p.service_port)?, port(p.target_port)?)))
        .collect()
}

/// Everything the control plane said that was usable.
#[derive(Debug)]
pub struct Mesh {
    workloads: HashMap<String, Arc<Workload>>,
    services: HashMap<String, Arc<Service>>,
    policies: PolicyStore,
    by_address: HashMap<IpAddr, Arc<Workload>>,
    /// By namespace and name: more than one while a pod takes another's place.
    by_name: HashMap<(String, String), BTreeSet<String>>,
    /// Uids of the workloads that say they serve a service.
    members: HashMap<String, BTreeSet<String>>,
    changes: Changes,
}

/// What changed, so that nothing else is looked at.
#[derive(Debug, Default)]
pub struct Changes {
    /// Everything may have.
    pub all: bool,
    /// Addresses whose workload did.
    pub addresses: HashSet<IpAddr>,
    /// Services that did, or a member of theirs.
    pub services: HashSet<String>,
    /// Workloads that did, by namespace and name.
    pub workloads: HashSet<(String, String)>,
    pub policies: Affected,
}

impl Changes {
    /// Adds what changed later.
    pub fn merge(&mut self, later: Changes) {
        self.all |= later.all;
        self.addresses.extend(later.addresses);
        self.services.extend(later.services);
        self.workloads.extend(later.workloads);
        self.policies.merge(later.policies);
    }
}

impl Mesh {
    /// Knows nothing yet.
    pub fn new(root_namespace: &str) -> Self {
        Mesh {
            workloads: HashMap::new(),
            services: HashMap::new(),
            policies: PolicyStore::new(root_namespace),
            by_address: HashMap::new(),
            by_name: HashMap::new(),
            members: HashMap::new(),
            changes: Changes {
                all: true,
                ..Changes::default()
            },
        }
    }

    /// What changed since the last call; everything, the first time.
    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    pub fn workloads(&self) -> &HashMap<String, Arc<Workload>> {
        &self.workloads
    }

    pub fn services(&self) -> &HashMap<String, Arc<Service>> {
        &self.services
    }

    pub fn policies(&self) -> &PolicyStore {
        &self.policies
    }

    /// Adds, replaces and removes policies.
    pub fn change_policies(&mut self, changes: impl IntoIterator<Item = PolicyChange>) {
        let affected = self.policies.apply(changes);
        self.changes.policies.merge(affected);
    }

    /// Adds or replaces a service.
    pub fn put_service(&mut self, service: Service) {
        if self
            .services
            .get(&service.key)
            .is_some_and(|old| **old == service)
        {
            return;
        }
        self.changes.services.insert(service.key.clone());
        self.services.insert(service.key.clone(), Arc::new(service));
    }

    /// Forgets a service.
    pub fn remove_service(&mut self, key: &str) {
        if self.services.remove(key).is_some() {
            self.changes.services.insert(key.to_owned());
        }
    }

    /// Adds or replaces a workload.
    pub fn put_workload(&mut self, workload: Workload) {
        if self
            .workloads
            .get(&workload.uid)
            .is_some_and(|old| **old == workload)
        {
            return;
        }
        self.remove_workload(&workload.uid.clone());
        let workload = Arc::new(workload);
        self.note(&workload);
        for address in &workload.addresses {
            self.by_address.insert(*address, workload.clone());
        }
        let uid = &workload.uid;
        let names = self.by_name.entry(name_of(&workload)).or_default();
        names.insert(uid.clone());
        for key in workload.services.keys() {
            let members = self.members.entry(key.clone()).or_default();
            members.insert(uid.clone());
        }
        self.workloads.insert(uid.clone(), workload);
    }

    /// Forgets a workload.
    pub fn remove_workload(&mut self, uid: &str) {
        let Some(old) = self.workloads.remove(uid) else {
            return;
        };
        self.note(&old);
        for address in &old.addresses {
            // A newer pod may have taken the address over.
            if self.by_address.get(address).is_some_and(|w| w.uid == uid) {
                self.by_address.remove(address);
            }
        }
        take_out(&mut self.by_name, &name_of(&old), uid);
        for key in old.services.keys() {
            take_out(&mut self.members, key, uid);
        }
    }

    fn note(&mut self, workload: &Workload) {
        self.changes.addresses.extend(&workload.addresses);
        self.changes
            .services
            .extend(workload.services.keys().cloned());
        self.changes.workloads.insert(name_of(workload));
    }

    /// The workloads that serve a service, by uid.
    pub fn members(&self, service: &str) -> impl Iterator<Item = &Arc<Workload>> {
        let uids = self.members.get(service).into_iter().flatten();
        uids.filter_map(|uid| self.workloads.get(uid))
    }

    /// The workload that has an address.
    pub fn by_address(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address)
    }

    /// Every address with its workload.
    pub fn addresses(&self) -> impl Iterator<Item = (IpAddr, &Arc<Workload>)> {
        self.by_address
            .iter()
            .map(|(address, workload)| (*address, workload))
    }

    /// The workload of a pod.
    pub fn by_name(&self, namespace: &str, name: &str) -> Option<&Arc<Workload>> {
        let uids = self.by_name.get(&(namespace.to_owned(), name.to_owned()))?;
        uids.iter().find_map(|uid| self.workloads.get(uid))
    }

    /// The identities that a peer at `address` may have.
    pub fn expected_identities(&self, workload: &Workload) -> BTreeSet<SpiffeId> {
        let mut ids = BTreeSet::from([workload.identity.spiffe_id().clone()]);
        for key in workload.services.keys() {
            let Some(service) = self.services.get(key) else {
                continue;
            };
            ids.extend(
                service
                    .subject_alt_names
                    .iter()
                    .filter_map(|san| SpiffeId::parse(san).ok()),
            );
        }
        ids
    }
}

fn name_of(workload: &Workload) -> (String, String) {
    (workload.namespace.clone(), workload.name.clone())
}

/// Takes a uid out of an index, and its entry when nothing is left in it.
fn take_out<K, Q>(index: &mut HashMap<K, BTreeSet<String>>, key: &Q, uid: &str)
where
    K: Borrow<Q> + Eq + Hash,
    Q: Eq + Hash + ?Sized,
{
    if let Some(uids) = index.get_mut(key) {
        uids.remove(uid);
        if uids.is_empty() {
            index.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn wire(uid: &str, address: &[u8]) -> wire::Workload {
        wire::Workload {
            uid: uid.into(),
            name: "web".into(),
            namespace: "demo".into(),
            addresses: vec![address.to_vec()],
            tunnel_protocol: wire::TunnelProtocol::Hbone as i32,
            ..Default::default()
        }
    }

    #[test]
    fn empty_fields_get_istios_defaults() {
        let workload = Workload::from_wire(wire("u", &[10, 0, 0, 1])).unwrap();
        assert_eq!(
            workload.identity.spiffe_id().to_string(),
            "spiffe://cluster.local/ns/demo/sa/default"
        );
        assert_eq!(workload.reach, Reach::Mesh);
    }

    #[test]
    fn address_of_five_bytes_is_refused_by_name() {
        let error = Workload::from_wire(wire("u", &[1, 2, 3, 4, 5]))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("workload u") && error.contains("5 bytes"),
            "{error}"
        );
    }

    #[test]
    fn waypoint_is_refused_and_never_bypassed() {
        let mut w = wire("u", &[10, 0, 0, 1]);
        w.waypoint = Some(wire::GatewayAddress::default());
        assert!(matches!(
            Workload::from_wire(w).unwrap().reach,
            Reach::Refused(_)
        ));
    }

    #[test]
    fn port_above_16_bits_is_refused_and_not_cut() {
        let service = wire::Service {
            hostname: "web".into(),
            ports: vec![wire::Port {
                service_port: 65616,
                target_port: 80,
            }],
            ..Default::default()
        };
        assert!(
            Service::from_wire(service)
                .unwrap_err()
                .to_string()
                .contains("65616")
        );
    }

    #[test]
    fn address_taken_over_by_a_newer_pod_stays_with_it() {
        let mut mesh = Mesh::new("root");
        let address: IpAddr = "10.0.0.1".parse().unwrap();
        mesh.put_workload(Workload::from_wire(wire("old", &[10, 0, 0, 1])).unwrap());
        mesh.put_workload(Workload::from_wire(wire("new", &[10, 0, 0, 1])).unwrap());
        mesh.remove_workload("old");
        assert_eq!(mesh.by_address(address).unwrap().uid, "new");
    }

    #[test]
    fn what_did_not_change_is_not_looked_at() {
        let mut mesh = Mesh::new("root");
        let put = |mesh: &mut Mesh, uid, last| {
            mesh.put_workload(Workload::from_wire(wire(uid, &[10, 0, 0, last])).unwrap());
        };
        put(&mut mesh, "one", 1);
        put(&mut mesh, "two", 2);
        assert!(mesh.take_changes().all, "nothing has been looked at yet");
        put(&mut mesh, "one", 1);
        mesh.remove_workload("unknown");
        mesh.remove_service("unknown");
        mesh.change_policies([]);
        let none = mesh.take_changes();
        assert!(!none.all && none.addresses.is_empty() && none.workloads.is_empty());
        assert!(none.services.is_empty() && none.policies.is_empty());
        // The old address is looked at too: nobody has it now.
        put(&mut mesh, "two", 3);
        let moved = mesh.take_changes();
        let addresses = [2, 3].map(|last| IpAddr::from([10, 0, 0, last]));
        assert_eq!(moved.addresses, HashSet::from(addresses));
        assert!(moved.workloads.contains(&("demo".into(), "web".into())));
    }

    #[test]
    fn workloads_are_found_by_name_and_by_service() {
        let mut mesh = Mesh::new("root");
        let mut web = wire("u", &[10, 0, 0, 1]);
        web.services
            .insert("demo/web".into(), wire::PortList::default());
        mesh.put_workload(Workload::from_wire(web).unwrap());
        assert_eq!(mesh.by_name("demo", "web").unwrap().uid, "u");
        assert!(mesh.by_name("demo", "other").is_none());
        assert_eq!(mesh.members("demo/web").count(), 1);
        // It leaves the service, then the mesh.
        mesh.put_workload(Workload::from_wire(wire("u", &[10, 0, 0, 1])).unwrap());
        assert_eq!(mesh.members("demo/web").count(), 0);
        mesh.remove_workload("u");
        assert!(mesh.by_name("demo", "web").is_none());
    }
}
