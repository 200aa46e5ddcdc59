//! The compiled policies of a pod in the kernel, and the identities prepared for them.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use ringfence_bpf_common::IDENTITY_NONE;
use ringfence_datapath::{Datapath, DatapathError, SourcePrefix};
use ringfence_identity::SpiffeId;
use ringfence_policies::{CompiledSet, Peer, PeerError, PolicyStore, WorkloadAddresses};

use crate::status;

/// Numbers for identities, as the kernel knows them. A number is never given twice.
#[derive(Debug, Default)]
pub struct Identities(Mutex<Interned>);

#[derive(Debug, Default)]
struct Interned {
    numbers: HashMap<SpiffeId, u32>,
    peers: Vec<Arc<Peer>>,
}

impl Identities {
    /// The number of a verified identity.
    pub fn number(&self, id: &SpiffeId) -> Result<u32, PeerError> {
        let mut interned = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = interned.numbers.get(id) {
            return Ok(*number);
        }
        interned.peers.push(Arc::new(id.to_string().parse()?));
        // 0 is IDENTITY_NONE: numbers begin at 1. Four billion identities do not fit in
        // memory, and a saturated number is one that no policy set is prepared for.
        let number = u32::try_from(interned.peers.len()).unwrap_or(u32::MAX);
        interned.numbers.insert(id.clone(), number);
        Ok(number)
    }

    /// The principal of a number, for the log.
    pub fn describe(&self, number: u32) -> String {
        self.peer(number)
            .map_or_else(|| "none".into(), |peer| peer.principal().to_owned())
    }

    fn peer(&self, number: u32) -> Option<Arc<Peer>> {
        let interned = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index = usize::try_from(number).ok()?.checked_sub(1)?;
        interned.peers.get(index).cloned()
    }
}

/// Numbers for policy sets, unique over the life of the pinned maps.
#[derive(Debug)]
pub struct SetNumbers(AtomicU32);

impl SetNumbers {
    /// Goes on after the highest number in use.
    pub fn after(highest: u32) -> Self {
        SetNumbers(AtomicU32::new(highest))
    }

    fn next(&self) -> u32 {
        // 0 means "no set"; it comes round after four billion policy changes.
        self.0
            .fetch_add(1, Ordering::Relaxed)
            .wrapping_add(1)
            .max(1)
    }
}

/// What decides for one pod.
#[derive(Debug, Default)]
pub struct PodPolicy(RwLock<Installed>);

#[derive(Debug, Default)]
struct Installed {
    set: u32,
    compiled: Option<Arc<CompiledSet>>,
    bound: Mutex<HashSet<u32>>,
}

impl PodPolicy {
    /// The set that decides now; 0 = none, which denies.
    pub fn set(&self) -> u32 {
        self.0.read().unwrap_or_else(PoisonError::into_inner).set
    }

    /// Runs `connect` (which enters the kernel's `authorize()`) while the identity is
    /// prepared for the set that decides: the set cannot be exchanged in between.
    pub fn with_identity<T>(
        &self,
        identities: &Identities,
        datapath: &Datapath,
        identity: u32,
        connect: impl FnOnce() -> T,
    ) -> Result<T, DatapathError> {
        let installed = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(compiled) = &installed.compiled {
            let mut bound = installed
                .bound
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if !bound.contains(&identity)
                && let Some(peer) = identities.peer(identity)
            {
                datapath.bind_identity(
                    installed.set,
                    identity,
                    &compiled.identity_mask(Some(&peer)),
                )?;
                bound.insert(identity);
            }
        }
        Ok(connect())
    }

    /// Puts a new set in place. `activate` points the pod at it: one map update, before
    /// which the old set decides alone and after which the new one does.
    pub fn replace(
        &self,
        compiled: CompiledSet,
        numbers: &SetNumbers,
        identities: &Identities,
        datapath: &Datapath,
        activate: impl FnOnce(u32) -> Result<(), DatapathError>,
    ) -> Result<(), DatapathError> {
        let mut installed = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if installed.compiled.as_deref() == Some(&compiled) {
            return activate(installed.set);
        }
        let old = installed.set;
        let set = numbers.next();
        let bound = std::mem::take(
            installed
                .bound
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let mut masks = vec![(IDENTITY_NONE, compiled.identity_mask(None))];
        for number in &bound {
            if let Some(peer) = identities.peer(*number) {
                masks.push((*number, compiled.identity_mask(Some(&peer))));
            }
        }
        let prefix = |p: &ringfence_policies::SourcePrefix| SourcePrefix {
            addr: p.addr,
            len: p.length,
        };
        let sources: Vec<_> = compiled
            .sources
            .iter()
            .map(|(p, mask)| (prefix(p), *mask))
            .collect();
        datapath.install_set(set, &compiled.set, &masks, &sources, &compiled.ports)?;
        activate(set)?;
        *installed = Installed {
            set,
            compiled: Some(Arc::new(compiled)),
            bound: Mutex::new(bound),
        };
        if old != 0 {
            datapath.remove_set(old)?;
        }
        Ok(())
    }
}

/// Addresses of a pod by family, as the compiler and the kernel want them.
pub fn by_family(addresses: &[IpAddr]) -> WorkloadAddresses {
    WorkloadAddresses {
        v4: addresses.iter().find_map(|a| {
            if let IpAddr::V4(v4) = a {
                Some(*v4)
            } else {
                None
            }
        }),
        v6: addresses.iter().find_map(|a| {
            if let IpAddr::V6(v6) = a {
                Some(*v6)
            } else {
                None
            }
        }),
    }
}

/// Policies for status: the usable ones and those that close workloads.
pub fn describe(store: &PolicyStore) -> Vec<status::Policy> {
    let usable = store.policies().map(|policy| {
        let summary = policy.summary();
        status::Policy {
            name: summary.name.to_string(),
            summary: summary.to_string(),
        }
    });
    let rejected = store.rejected().map(|policy| status::Policy {
        name: policy.name.to_string(),
        summary: format!("REJECTED, closes its workloads: {}", policy.error),
    });
    usable.chain(rejected).collect()
}
