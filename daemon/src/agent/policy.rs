//! The compiled policies of a pod in the kernel, and the identities prepared for them.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use prometheus_client::metrics::histogram::Histogram;
use ringfence_bpf_common::{
    Addr, IDENTITY_NONE, PolicyTables, Query, SET_POLICY_NOT_RECEIVED, authorize,
};
use ringfence_datapath::{Datapath, DatapathError};
use ringfence_identity::{SpiffeId, TrustDomainAliases};
use ringfence_policies::{
    CompiledSet, Peer, PeerError, Problem, Tables, WorkloadAddresses, WorkloadPolicies, compile,
};
use tokio::time::Instant;

/// Numbers for identities, as the kernel knows them. A number is never given twice.
#[derive(Debug, Default)]
pub struct Identities(Mutex<Interned>);

#[derive(Debug, Default)]
struct Interned {
    numbers: HashMap<SpiffeId, u32>,
    peers: Vec<Arc<Peer>>,
}

impl Identities {
    /// The number of a verified identity. Policies mean it by whichever name of its trust
    /// domain they were written with.
    pub fn number(&self, id: &SpiffeId, aliases: &TrustDomainAliases) -> Result<u32, PeerError> {
        let id = aliases.canonical(id);
        let mut interned = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = interned.numbers.get(&id) {
            return Ok(*number);
        }
        let names = aliases.group(&id.trust_domain());
        let peer = id
            .to_string()
            .parse::<Peer>()?
            .with_aliases(names.map(|domain| domain.as_str().to_owned()))?;
        interned.peers.push(Arc::new(peer));
        // 0 is IDENTITY_NONE: numbers begin at 1. Four billion identities do not fit in
        // memory, and a saturated number is one that no policy set is prepared for.
        let number = u32::try_from(interned.peers.len()).unwrap_or(u32::MAX);
        interned.numbers.insert(id, number);
        Ok(number)
    }

    /// The identity of a number.
    pub fn peer(&self, number: u32) -> Option<Arc<Peer>> {
        let interned = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index = usize::try_from(number).ok()?.checked_sub(1)?;
        interned.peers.get(index).cloned()
    }
}

/// The policy sets in the kernel. Pods with the same policies share one.
#[derive(Debug)]
pub struct Sets {
    /// The highest number given; unique over the life of the pinned maps.
    last: AtomicU32,
    shared: Mutex<Vec<Shared>>,
    /// The last that were removed: a verdict of theirs may still be on its way to the log.
    removed: Mutex<VecDeque<Arc<InstalledSet>>>,
    compile_seconds: Histogram,
    /// See [`InstalledSet::enough_bound`].
    enough_bound: usize,
}

/// Removed sets that are remembered.
const REMEMBERED: usize = 4;

#[derive(Debug)]
struct Shared {
    set: Arc<InstalledSet>,
    /// The addresses that it was compiled for, when they matter.
    addresses: Option<WorkloadAddresses>,
    /// Pods that have it.
    users: usize,
}

impl Sets {
    /// Goes on after the highest number in use. Each compilation is observed.
    pub fn after(highest: u32, compile_seconds: Histogram) -> Self {
        Sets {
            last: AtomicU32::new(highest),
            shared: Mutex::default(),
            removed: Mutex::default(),
            compile_seconds,
            enough_bound: ENOUGH_BOUND,
        }
    }

    /// The set of these policies: one that is there, or a new one, which decides about
    /// nobody yet. To be given back by [`Sets::release`].
    pub fn acquire(
        &self,
        policies: WorkloadPolicies,
        addresses: WorkloadAddresses,
        datapath: &Datapath,
    ) -> Result<Arc<InstalledSet>, DatapathError> {
        let mut shared = self.lock();
        let found = shared.iter_mut().find(|one| {
            one.addresses.is_none_or(|of| of == addresses) && one.set.policies.same(&policies)
        });
        if let Some(one) = found {
            one.users += 1;
            return Ok(one.set.clone());
        }
        let begin = Instant::now();
        let compiled = compile(&policies, addresses);
        self.compile_seconds.observe(begin.elapsed().as_secs_f64());
        let number = self.next();
        let plaintext = (IDENTITY_NONE, compiled.identity_mask(None));
        datapath.install_set(number.get(), &compiled, &[plaintext])?;
        let own = compiled.depends_on_destination().then_some(addresses);
        let set = Arc::new(InstalledSet {
            number,
            policies,
            compiled,
            bound: Mutex::default(),
            enough_bound: self.enough_bound,
            mirror: Mutex::default(),
        });
        shared.push(Shared {
            set: set.clone(),
            addresses: own,
            users: 1,
        });
        Ok(set)
    }

    /// A pod has no use for the set any more; without any, it is removed.
    pub fn release(&self, set: &InstalledSet, datapath: &Datapath) -> Result<(), DatapathError> {
        let mut shared = self.lock();
        let Some(at) = shared.iter().position(|one| one.set.number == set.number) else {
            return Ok(());
        };
        if let Some(one) = shared.get_mut(at) {
            one.users = one.users.saturating_sub(1);
            if one.users > 0 {
                return Ok(());
            }
        }
        let gone = shared.swap_remove(at);
        let mut removed = self.removed.lock().unwrap_or_else(PoisonError::into_inner);
        removed.truncate(REMEMBERED - 1);
        removed.push_front(gone.set);
        datapath.remove_set(set.number.get())
    }

    /// The set with this number, in use or removed lately.
    pub fn find(&self, number: u32) -> Option<Arc<InstalledSet>> {
        let is = |set: &&Arc<InstalledSet>| set.number.get() == number;
        let removed = self.removed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(set) = removed.iter().find(is) {
            return Some(set.clone());
        }
        drop(removed);
        self.lock().iter().map(|one| &one.set).find(is).cloned()
    }

    fn next(&self) -> NonZeroU32 {
        // 0 means "no set"; it comes round after four billion policy changes.
        let number = self.last.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Shared>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A set that has so many identities in the kernel takes back idle ones for each new one.
const ENOUGH_BOUND: usize = 1 << 17;
/// An identity that was not used for so long can be taken back: whoever prepared it has
/// long connected.
const IDLE: Duration = Duration::from_secs(60);

/// A policy set in the kernel. Its content never changes, but for identities that are
/// prepared when they first connect.
#[derive(Debug)]
pub struct InstalledSet {
    number: NonZeroU32,
    policies: WorkloadPolicies,
    compiled: CompiledSet,
    /// Identities that are prepared, and when they were last used.
    bound: Mutex<HashMap<u32, Instant>>,
    /// With so many of them, idle ones make room. No limit: the kernel's table is.
    enough_bound: usize,
    /// The kernel's tables in memory, made when a live stream is first judged by them. A
    /// policy that is missing does not close them: that is decided before they are asked.
    mirror: Mutex<Option<Tables>>,
}

impl InstalledSet {
    /// Its key in the kernel.
    pub fn number(&self) -> u32 {
        self.number.get()
    }

    /// Why it denies everything, if it does.
    pub fn problems(&self) -> &[Problem] {
        &self.compiled.problems
    }

    /// What it was made of.
    pub fn policies(&self) -> &WorkloadPolicies {
        &self.policies
    }

    /// What it was compiled to.
    pub fn compiled(&self) -> &CompiledSet {
        &self.compiled
    }

    /// Has the kernel know what the set says of an identity: without that it is denied.
    pub fn prepare(
        &self,
        identity: u32,
        peer: &Peer,
        datapath: &Datapath,
    ) -> Result<(), DatapathError> {
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if let Some(used) = bound.get_mut(&identity) {
            *used = now;
            return Ok(());
        }
        if bound.len() >= self.enough_bound {
            self.evict(&mut bound, now, datapath)?;
        }
        let mask = self.compiled.identity_mask(Some(peer));
        let bind = || datapath.bind_identity(self.number.get(), identity, &mask);
        match bind() {
            Err(DatapathError::Full { .. }) => {
                self.evict(&mut bound, now, datapath)?;
                bind()?;
            }
            other => other?,
        }
        bound.insert(identity, now);
        Ok(())
    }

    fn evict(
        &self,
        bound: &mut HashMap<u32, Instant>,
        now: Instant,
        datapath: &Datapath,
    ) -> Result<(), DatapathError> {
        let idle = |used: &Instant| now.duration_since(*used) >= IDLE;
        let evicted = bound.iter().filter(|(_, used)| idle(used));
        let evicted: Vec<u32> = evicted.map(|(identity, _)| *identity).collect();
        bound.retain(|_, used| !idle(used));
        datapath.unbind_identities(self.number.get(), &evicted)
    }

    fn admits(&self, identities: &Identities, stream: &Judged, waiting: bool) -> bool {
        if !waiting && self.compiled.flags & SET_POLICY_NOT_RECEIVED != 0 {
            return false;
        }
        let mut mirror = self.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        let tables = mirror.get_or_insert_with(|| {
            let mut tables = Tables::default();
            let mut known = self.compiled.clone();
            known.flags &= !SET_POLICY_NOT_RECEIVED;
            // Without room nothing is there, which denies.
            let _ = tables.insert(self.number, &known);
            tables
        });
        let set = self.number.get();
        if tables.identity(set, stream.identity).is_none()
            && let Some(number) = NonZeroU32::new(stream.identity)
            && let Some(peer) = identities.peer(stream.identity)
        {
            let _ = tables.insert_identity(self.number, &self.compiled, number, &peer);
        }
        let query = Query {
            set,
            identity: stream.identity,
            source: Addr::from(stream.source),
            port: stream.destination.port(),
            destination_v4: stream.destination.is_ipv4(),
        };
        authorize(tables, &query).allows()
    }
}

/// What decides for one pod: the set in force, or none, which denies.
#[derive(Debug, Default)]
pub struct PodPolicy(RwLock<Option<Arc<InstalledSet>>>);

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
    /// The number of the set that decides now; 0 is none.
    pub fn set(&self) -> u32 {
        self.read().as_ref().map_or(0, |set| set.number.get())
    }

    /// Whether a policy that has not arrived closes the pod.
    pub fn lacks_policy(&self) -> bool {
        let missing = |set: &Arc<InstalledSet>| !set.policies.missing.is_empty();
        self.read().as_ref().is_some_and(missing)
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
        if let Some(set) = installed.as_ref()
            && let Some(peer) = identities.peer(identity)
        {
            set.prepare(identity, &peer, datapath)?;
        }
        let number = installed.as_ref().map_or(0, |set| set.number.get());
        Ok((number, connect()))
    }

    /// Asks about the set that decides, which cannot be exchanged meanwhile.
    pub fn ask<T>(&self, ask: impl FnOnce(Option<&Arc<InstalledSet>>) -> T) -> T {
        ask(self.read().as_ref())
    }

    /// The set that decides now.
    pub fn installed(&self) -> Option<Arc<InstalledSet>> {
        self.read().clone()
    }

    /// Judges a live stream by the policies that decide now.
    ///
    /// `waiting`: a policy that is missing is waited for. New connections wait too, and live
    /// ones are judged by the policies that are known meanwhile: a policy and its name come
    /// and go in two subscriptions, and in between must not end what neither concerns.
    pub fn admits(&self, identities: &Identities, stream: &Judged, waiting: bool) -> bool {
        let installed = self.read();
        installed
            .as_ref()
            .is_some_and(|set| set.admits(identities, stream, waiting))
    }

    /// Puts a set in place of the one in force, which it returns. `activate` points the
    /// pod at it: one map update, before which the old set decides alone and after which
    /// the new one does.
    pub fn replace(
        &self,
        set: Option<Arc<InstalledSet>>,
        activate: impl FnOnce(u32) -> Result<(), DatapathError>,
    ) -> Result<Option<Arc<InstalledSet>>, DatapathError> {
        let mut installed = self.0.write().unwrap_or_else(PoisonError::into_inner);
        activate(set.as_ref().map_or(0, |set| set.number.get()))?;
        Ok(std::mem::replace(&mut *installed, set))
    }

    fn read(&self) -> RwLockReadGuard<'_, Option<Arc<InstalledSet>>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
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

#[cfg(test)]
mod tests;
