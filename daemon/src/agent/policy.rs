//! The compiled policies of a pod in the kernel, and the identities prepared for them.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use ringfence_bpf_common::{Addr, IDENTITY_NONE, Query, authorize};
use ringfence_datapath::{Datapath, DatapathError, SourcePrefix};
use ringfence_identity::SpiffeId;
use ringfence_policies::{CompiledSet, Peer, PeerError, PolicyStore, Tables, WorkloadAddresses};

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

    fn next(&self) -> NonZeroU32 {
        // 0 means "no set"; it comes round after four billion policy changes.
        let number = self.0.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN)
    }
}

/// What decides for one pod.
#[derive(Debug, Default)]
pub struct PodPolicy(RwLock<Installed>);

/// The set in force: `set` 0 is none, which denies.
#[derive(Debug, Default)]
struct Installed {
    set: u32,
    compiled: CompiledSet,
    /// What the kernel has of this set.
    mirror: Mutex<Mirror>,
}

/// The kernel's tables of one set, for judging live streams by them again.
#[derive(Debug, Default)]
struct Mirror {
    tables: Tables,
    /// Identities that are prepared.
    bound: HashSet<u32>,
}

/// What a live stream was admitted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Judged {
    /// The policy set that admitted it.
    pub set: u32,
    pub identity: u32,
    pub source: IpAddr,
    pub destination: SocketAddr,
}

impl PodPolicy {
    /// The set that decides now.
    pub fn set(&self) -> u32 {
        self.read().set
    }

    /// Runs `connect` (which enters the kernel's `authorize()`) while the identity is
    /// prepared for the set that decides: the set cannot be exchanged in between. Returns
    /// that set beside the result.
    pub fn with_identity<T>(
        &self,
        identities: &Identities,
        datapath: &Datapath,
        identity: u32,
        connect: impl FnOnce() -> T,
    ) -> Result<(u32, T), DatapathError> {
        let installed = self.read();
        let mut mirror = installed.lock_mirror();
        if let Some(set) = NonZeroU32::new(installed.set)
            && let Some(number) = NonZeroU32::new(identity)
            && let Some(peer) = identities.peer(identity)
            && mirror.bound.insert(identity)
        {
            let mask = installed.compiled.identity_mask(Some(&peer));
            if let Err(error) = datapath.bind_identity(set.get(), identity, &mask) {
                mirror.bound.remove(&identity);
                return Err(error);
            }
            mirror
                .tables
                .insert_identity(set, &installed.compiled, number, &peer);
        }
        drop(mirror);
        Ok((installed.set, connect()))
    }

    /// Judges a live stream by the policies that decide now.
    pub fn admits(&self, stream: &Judged) -> bool {
        let installed = self.read();
        let query = Query {
            set: installed.set,
            identity: stream.identity,
            source: Addr::from(stream.source),
            port: stream.destination.port(),
            destination_v4: stream.destination.is_ipv4(),
        };
        authorize(&installed.lock_mirror().tables, &query).allows()
    }

    /// Puts a new set in place. `activate` points the pod at it: one map update, before
    /// which the old set decides alone and after which the new one does. Says whether
    /// anything changed: then live streams are to be judged again.
    pub fn replace(
        &self,
        compiled: CompiledSet,
        numbers: &SetNumbers,
        identities: &Identities,
        datapath: &Datapath,
        activate: impl FnOnce(u32) -> Result<(), DatapathError>,
    ) -> Result<bool, DatapathError> {
        let mut installed = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let old = installed.set;
        if old != 0 && installed.compiled == compiled {
            activate(old)?;
            return Ok(false);
        }
        let set = numbers.next();
        let mut masks = vec![(IDENTITY_NONE, compiled.identity_mask(None))];
        let mut mirror = Mirror::default();
        mirror.tables.insert(set, &compiled);
        for number in &installed.lock_mirror().bound {
            if let (Some(peer), Some(nonzero)) =
                (identities.peer(*number), NonZeroU32::new(*number))
            {
                masks.push((*number, compiled.identity_mask(Some(&peer))));
                mirror
                    .tables
                    .insert_identity(set, &compiled, nonzero, &peer);
                mirror.bound.insert(*number);
            }
        }
        let sources = compiled.sources.iter().map(|(prefix, mask)| {
            let prefix = SourcePrefix {
                addr: prefix.addr,
                len: prefix.length,
            };
            (prefix, *mask)
        });
        let sources: Vec<_> = sources.collect();
        datapath.install_set(set.get(), &compiled.set, &masks, &sources, &compiled.ports)?;
        activate(set.get())?;
        *installed = Installed {
            set: set.get(),
            compiled,
            mirror: Mutex::new(mirror),
        };
        if old != 0 {
            datapath.remove_set(old)?;
        }
        Ok(true)
    }

    fn read(&self) -> RwLockReadGuard<'_, Installed> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Installed {
    fn lock_mirror(&self) -> MutexGuard<'_, Mirror> {
        self.mirror.lock().unwrap_or_else(PoisonError::into_inner)
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
