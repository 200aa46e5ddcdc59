//! Compiled policy sets.
//!
//! A set is never changed in place, but for identities that are added to it. A pod is
//! pointed at a new set in one step, and the old set's entries are removed only after
//! every program that may have begun with it has ended: a program that misses half of a
//! set would decide wrongly.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aya::maps::{
    Map, MapData,
    lpm_trie::{Key, LpmTrie},
};
use ringfence_bpf_common::{Addr, IdentityKey, Mask, PolicySet, PortKey, SourceKey};

use crate::{
    Datapath, DatapathError, sys,
    table::{MOST_KEYS, Table, is_missing, table_error},
};

/// A source prefix of a policy set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SourcePrefix {
    /// IPv4 in its mapped form.
    pub addr: Addr,
    /// Bits of `addr` that count, 0 to 128: an IPv4 prefix has 96 more than usual.
    pub len: u8,
}

impl Datapath {
    /// Writes a policy set under an id that is not in use. No connection is judged by it
    /// before a pod is pointed at it ([`Datapath::update_pod`]).
    pub fn install_set(
        &self,
        set_id: u32,
        set: &PolicySet,
        identities: &[(u32, Mask)],
        sources: &[(SourcePrefix, Mask)],
        ports: &[(u16, Mask)],
    ) -> Result<(), DatapathError> {
        self.policies
            .install(set_id, set, identities, sources, ports)
    }

    /// Prepares an identity for a set: without it the identity is denied.
    pub fn bind_identity(&self, set: u32, identity: u32, mask: &Mask) -> Result<(), DatapathError> {
        self.policies.bind(set, identity, mask)
    }

    /// Removes a set that no pod points at any more. Its entries may stay for a while,
    /// until programs that may still read them have ended.
    pub fn remove_set(&self, id: u32) -> Result<(), DatapathError> {
        self.policies.retire(id)
    }

    /// The ids of all sets in the kernel, also those that an earlier agent wrote.
    pub fn policy_sets(&self) -> Result<Vec<u32>, DatapathError> {
        self.policies.sets.keys()
    }
}

/// How long a retired set waits for company, so that one grace period serves many.
const RETIREMENT: Duration = Duration::from_secs(1);
/// Retired sets that wait no longer.
const MOST_RETIRED: usize = 64;

#[derive(Debug)]
pub(crate) struct Policies {
    sets: Table<u32, PolicySet>,
    identities: Table<IdentityKey, Mask>,
    ports: Table<PortKey, Mask>,
    sources: Mutex<LpmTrie<MapData, SourceKey, Mask>>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    entries: HashMap<u32, Entries>,
    retired: Vec<(u32, Instant)>,
}

/// The keys that belong to one set.
#[derive(Debug, Default)]
struct Entries {
    identities: Vec<u32>,
    ports: Vec<u16>,
    sources: Vec<SourcePrefix>,
}

const SOURCES: &str = "POLICY_SOURCES";
/// Bits of the set id in front of the address.
const SET_BITS: u32 = 32;

impl Policies {
    /// Takes over what is pinned.
    pub(crate) fn new(
        sets: Map,
        identities: Map,
        ports: Map,
        sources: Map,
    ) -> Result<Self, DatapathError> {
        let policies = Policies {
            sets: Table::new("POLICY_SETS", sets)?,
            identities: Table::new("POLICY_IDENTITIES", identities)?,
            ports: Table::new("POLICY_PORTS", ports)?,
            sources: Mutex::new(
                LpmTrie::try_from(sources).map_err(|e| table_error("open", SOURCES, e))?,
            ),
            known: Mutex::default(),
        };
        let mut known = Known::default();
        for set in policies.sets.keys()? {
            known.entries.entry(set).or_default();
        }
        for key in policies.identities.keys()? {
            known
                .entries
                .entry(key.set)
                .or_default()
                .identities
                .push(key.identity);
        }
        for key in policies.ports.keys()? {
            known
                .entries
                .entry(key.set)
                .or_default()
                .ports
                .push(key.port);
        }
        for key in policies.source_keys()? {
            let data = key.data();
            let len = u8::try_from(key.prefix_len().saturating_sub(SET_BITS)).unwrap_or(128);
            let set = known
                .entries
                .entry(u32::from_be_bytes(data.set))
                .or_default();
            set.sources.push(SourcePrefix {
                addr: data.addr,
                len,
            });
        }
        *policies.known() = known;
        Ok(policies)
    }

    fn install(
        &self,
        id: u32,
        set: &PolicySet,
        identities: &[(u32, Mask)],
        sources: &[(SourcePrefix, Mask)],
        ports: &[(u16, Mask)],
    ) -> Result<(), DatapathError> {
        if id == 0 {
            return Err(DatapathError::ReservedSet);
        }
        if let Some((prefix, _)) = sources.iter().find(|(prefix, _)| prefix.len > 128) {
            return Err(DatapathError::PrefixTooLong { length: prefix.len });
        }
        let mut known = self.known();
        self.collect(&mut known, false)?;
        // What a killed agent left half-written under this id.
        if let Some(stale) = known.entries.remove(&id) {
            self.remove(id, &stale)?;
        }
        let entries = Entries {
            identities: identities.iter().map(|(identity, _)| *identity).collect(),
            ports: ports.iter().map(|(port, _)| *port).collect(),
            sources: sources.iter().map(|(prefix, _)| *prefix).collect(),
        };
        let written = self.write(id, set, identities, sources, ports);
        match &written {
            Ok(()) => {
                known.entries.insert(id, entries);
            }
            // Nothing points at the set yet.
            Err(_) => self.remove(id, &entries)?,
        }
        written
    }

    /// The set itself last: an id without one denies.
    fn write(
        &self,
        id: u32,
        set: &PolicySet,
        identities: &[(u32, Mask)],
        sources: &[(SourcePrefix, Mask)],
        ports: &[(u16, Mask)],
    ) -> Result<(), DatapathError> {
        for (identity, mask) in identities {
            self.identities.put(
                &IdentityKey {
                    set: id,
                    identity: *identity,
                },
                mask,
            )?;
        }
        for (port, mask) in ports {
            self.ports.put(
                &PortKey {
                    set: id,
                    port: *port,
                    pad: 0,
                },
                mask,
            )?;
        }
        for (prefix, mask) in sources {
            self.sources()
                .insert(&source_key(id, prefix), mask, 0)
                .map_err(|e| table_error("write to", SOURCES, e))?;
        }
        self.sets.put(&id, set)
    }

    fn bind(&self, set: u32, identity: u32, mask: &Mask) -> Result<(), DatapathError> {
        let mut known = self.known();
        self.identities.put(&IdentityKey { set, identity }, mask)?;
        let identities = &mut known.entries.entry(set).or_default().identities;
        if !identities.contains(&identity) {
            identities.push(identity);
        }
        Ok(())
    }

    fn retire(&self, id: u32) -> Result<(), DatapathError> {
        let mut known = self.known();
        known.retired.push((id, Instant::now()));
        let crowded = known.retired.len() > MOST_RETIRED;
        self.collect(&mut known, crowded)
    }

    /// Removes the sets that were retired long enough ago, or all.
    fn collect(&self, known: &mut Known, all: bool) -> Result<(), DatapathError> {
        let is_due = |since: &Instant| all || since.elapsed() >= RETIREMENT;
        if !known.retired.iter().any(|(_, since)| is_due(since)) {
            return Ok(());
        }
        if let Err(error) = sys::wait_for_programs() {
            // Not on every kernel (nohz_full). The time that has passed must do then.
            tracing::debug!(%error, "no grace period to wait for");
        }
        let (due, waiting) = known
            .retired
            .drain(..)
            .partition(|(_, since)| is_due(since));
        known.retired = waiting;
        let due: Vec<(u32, Instant)> = due;
        for (id, _) in due {
            if let Some(entries) = known.entries.remove(&id) {
                self.remove(id, &entries)?;
            }
        }
        Ok(())
    }

    /// The set itself first: an id without one denies.
    fn remove(&self, id: u32, entries: &Entries) -> Result<(), DatapathError> {
        self.sets.remove(&id)?;
        for identity in &entries.identities {
            self.identities.remove(&IdentityKey {
                set: id,
                identity: *identity,
            })?;
        }
        for port in &entries.ports {
            self.ports.remove(&PortKey {
                set: id,
                port: *port,
                pad: 0,
            })?;
        }
        for prefix in &entries.sources {
            match self.sources().remove(&source_key(id, prefix)) {
                Err(error) if !is_missing(&error) => {
                    return Err(table_error("remove from", SOURCES, error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn source_keys(&self) -> Result<Vec<Key<SourceKey>>, DatapathError> {
        self.sources()
            .keys()
            .take(MOST_KEYS)
            .collect::<Result<_, _>>()
            .map_err(|e| table_error("list", SOURCES, e))
    }

    fn sources(&self) -> MutexGuard<'_, LpmTrie<MapData, SourceKey, Mask>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn source_key(set: u32, prefix: &SourcePrefix) -> Key<SourceKey> {
    let data = SourceKey {
        set: set.to_be_bytes(),
        addr: prefix.addr,
    };
    Key::new(SET_BITS + u32::from(prefix.len), data)
}
