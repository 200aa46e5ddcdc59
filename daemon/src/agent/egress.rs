//! Where pods may connect to outside the mesh: the outbound mode of each, as the kernel
//! knows it, and the addresses that the registry knows without a workload behind them.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ringfence_bpf_common::{POD_REGISTRY_ONLY, Pod as KernelPod};

use super::mesh::Service;
use crate::config::{Egress, OutboundMode, PodConfig};

/// The pod's entry with its outbound mode.
pub fn with_mode(egress: &Egress, pod: &PodConfig, entry: KernelPod) -> KernelPod {
    match egress.mode(&pod.namespace, &pod.name) {
        OutboundMode::AllowAny => entry,
        OutboundMode::RegistryOnly => KernelPod {
            flags: entry.flags | POD_REGISTRY_ONLY,
            ..entry
        },
    }
}

/// The addresses of services whose clients choose the endpoint themselves (Istio's
/// PASSTHROUGH, a ServiceEntry with `resolution: NONE`): known to the registry, and
/// connected to as they are, on any port.
#[derive(Debug, Default)]
pub struct Passthrough {
    by_address: BTreeSet<(IpAddr, String)>,
    by_service: HashMap<String, Vec<IpAddr>>,
}

impl Passthrough {
    /// Follows a service, `None` when it is gone. Returns the addresses that it had and
    /// those that it has.
    pub fn follow(&mut self, key: &str, service: Option<&Service>, network: &str) -> Vec<IpAddr> {
        let mut touched = self.by_service.remove(key).unwrap_or_default();
        for address in &touched {
            self.by_address.remove(&(*address, key.to_owned()));
        }
        let Some(service) = service.filter(|s| s.passthrough) else {
            return touched;
        };
        let own = service.addresses.iter().filter(|(n, _)| n == network);
        let addresses: Vec<IpAddr> = own.map(|(_, address)| *address).collect();
        for address in &addresses {
            self.by_address.insert((*address, key.to_owned()));
        }
        touched.extend(&addresses);
        self.by_service.insert(key.to_owned(), addresses);
        touched
    }

    /// Whether a service has this address.
    pub fn has(&self, address: IpAddr) -> bool {
        let mut from = self.by_address.range((address, String::new())..);
        from.next().is_some_and(|(first, _)| *first == address)
    }

    /// All that are followed.
    pub fn services(&self) -> impl Iterator<Item = &String> {
        self.by_service.keys()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(addresses: &[&str]) -> Service {
        let address = |a: &&str| Some((String::new(), a.parse::<IpAddr>().ok()?));
        Service {
            key: "demo/any".into(),
            addresses: addresses.iter().filter_map(address).collect(),
            ports: Vec::new(),
            subject_alt_names: Vec::new(),
            waypoint: false,
            passthrough: true,
            any_health: false,
        }
    }

    #[test]
    fn address_is_known_as_long_as_a_service_has_it() {
        let mut known = Passthrough::default();
        let [one, two] = [1, 2].map(|last| IpAddr::from([192, 0, 2, last]));
        assert!(!known.has(one));
        let both = service(&["192.0.2.1", "192.0.2.2"]);
        assert_eq!(known.follow("demo/any", Some(&both), ""), [one, two]);
        known.follow("demo/other", Some(&service(&["192.0.2.1"])), "");
        assert!(known.has(one) && known.has(two));
        assert_eq!(known.follow("demo/any", None, ""), [one, two]);
        assert!(
            known.has(one) && !known.has(two),
            "the other one still has it"
        );
        known.follow("demo/other", Some(&both), "elsewhere");
        assert!(!known.has(one), "another network");
    }
}
