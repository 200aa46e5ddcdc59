//! Compiled policy sets.
//!
//! A set is never changed in place, but for identities that are added to it. A pod is
//! pointed at a new set in one step, and the old set's entries and blocks are given back
//! only after every program that may have begun with it has ended: a program that misses
//! half of a set would decide wrongly.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aya::maps::Map;
use ringfence_bpf_common::{Block, IdentityKey, Mask, PolicySet, PortKey, SourceKey, SourceMatch};
use ringfence_policies::{CompiledSet, Layout, TermMask, runs_of};

use crate::{
    Datapath, DatapathError,
    blocks::{Blocks, Run, Staged},
    sys,
    table::{Elements, Table, room},
};

impl Datapath {
    /// Writes a policy set under an id that is not in use (what is there is removed first:
    /// nothing decides in between, which denies), with the identities that are
    /// known beforehand; plaintext is one of them (`IDENTITY_NONE`), and denied when it is
    /// left out. No connection is judged by it before a pod is pointed at it
    /// ([`Datapath::update_pod`]). An error leaves nothing of it.
    pub fn install_set(
        &self,
        id: u32,
        compiled: &CompiledSet,
        identities: &[(u32, TermMask)],
    ) -> Result<(), DatapathError> {
        self.policies.install(id, compiled, identities)
    }

    /// Prepares an identity for a set: without it the identity is denied.
    pub fn bind_identity(
        &self,
        set: u32,
        identity: u32,
        mask: &TermMask,
    ) -> Result<(), DatapathError> {
        self.policies.bind(set, identity, mask)
    }

    /// Takes identities back: they are denied from here on.
    pub fn unbind_identities(&self, set: u32, identities: &[u32]) -> Result<(), DatapathError> {
        self.policies.unbind(set, identities)
    }

    /// Removes a set that no pod points at any more. Its entries stay until programs that
    /// may still read them have ended: see [`Datapath::collect_sets`].
    pub fn remove_set(&self, id: u32) -> Result<(), DatapathError> {
        self.policies.retire(id)
    }

    /// Gives back what was removed a while ago. Waits for the programs that run, which
    /// may take some ten milliseconds; to be called every few seconds.
    pub fn collect_sets(&self) -> Result<(), DatapathError> {
        self.policies.collect(&mut self.policies.known(), false)
    }

    /// The ids of all sets in the kernel, also those that an earlier agent wrote.
    pub fn policy_sets(&self) -> Result<Vec<u32>, DatapathError> {
        self.policies.sets.keys()
    }

    /// How much of the tables is in use; what was removed and not given back yet counts.
    pub fn policy_usage(&self) -> PolicyUsage {
        self.policies.usage()
    }

    /// How much the tables hold at most.
    pub fn policy_room(&self) -> PolicyUsage {
        self.policies.room
    }
}

/// Entries, in use or at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PolicyUsage {
    pub sets: usize,
    pub identities: usize,
    pub ports: usize,
    /// Source prefixes, and the markers that lead to them.
    pub sources: usize,
    /// Elements of `POLICY_BLOCKS`, 32 bytes each.
    pub blocks: u32,
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
    sources: Table<SourceKey, SourceMatch>,
    blocks: Elements<Block>,
    room: PolicyUsage,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    blocks: Blocks,
    sets: HashMap<u32, Entries>,
    retired: Vec<(u32, Instant)>,
}

/// What belongs to one set.
#[derive(Debug, Default)]
struct Entries {
    identities: HashSet<u32>,
    ports: Vec<u16>,
    sources: Vec<SourceKey>,
    runs: HashSet<Run>,
    /// Masks that are written already.
    layout: Layout,
}

impl Policies {
    /// Takes over what is pinned. What has no set (an agent was killed in the middle of
    /// a change) is removed.
    pub(crate) fn new(
        sets: Map,
        identities: Map,
        ports: Map,
        sources: Map,
        blocks: Map,
    ) -> Result<Self, DatapathError> {
        let blocks = Elements::new("POLICY_BLOCKS", blocks)?;
        let room = PolicyUsage {
            sets: room("POLICY_SETS", &sets)?,
            identities: room("POLICY_IDENTITIES", &identities)?,
            ports: room("POLICY_PORTS", &ports)?,
            sources: room("POLICY_SOURCES", &sources)?,
            blocks: blocks.len(),
        };
        let known = Known {
            blocks: Blocks::new(blocks.len()),
            sets: HashMap::new(),
            retired: Vec::new(),
        };
        let policies = Policies {
            sets: Table::new("POLICY_SETS", sets)?,
            identities: Table::new("POLICY_IDENTITIES", identities)?,
            ports: Table::new("POLICY_PORTS", ports)?,
            sources: Table::new("POLICY_SOURCES", sources)?,
            blocks,
            room,
            known: Mutex::new(known),
        };
        policies.take_over(&mut policies.known())?;
        Ok(policies)
    }

    fn take_over(&self, known: &mut Known) -> Result<(), DatapathError> {
        let mut found: HashMap<u32, Entries> = HashMap::new();
        for (key, mask) in self.identities.entries()? {
            let entries = found.entry(key.set).or_default();
            entries.identities.insert(key.identity);
            entries.runs.extend(runs(&mask));
        }
        for (key, mask) in self.ports.entries()? {
            let entries = found.entry(key.set).or_default();
            entries.ports.push(key.port);
            entries.runs.extend(runs(&mask));
        }
        for (key, answer) in self.sources.entries()? {
            let entries = found.entry(key.set).or_default();
            entries.sources.push(key);
            entries.runs.extend(runs(&answer.mask));
        }
        for (id, set) in self.sets.entries()? {
            let mut entries = found.remove(&id).unwrap_or_default();
            let masks = [
                set.sources4.mask,
                set.sources6.mask,
                set.other_ports,
                set.destination4,
                set.destination6,
            ];
            entries.runs.extend(masks.iter().flat_map(runs));
            // Nothing else owns these: a set's masks are its own.
            entries.runs.retain(|run| known.blocks.take_at(*run));
            known.sets.insert(id, entries);
        }
        for (id, halves) in found {
            self.remove(id, &halves)?;
        }
        Ok(())
    }

    fn install(
        &self,
        id: u32,
        compiled: &CompiledSet,
        identities: &[(u32, TermMask)],
    ) -> Result<(), DatapathError> {
        if id == 0 {
            return Err(DatapathError::ReservedSet);
        }
        if let Some((prefix, _)) = compiled.sources.iter().find(|(p, _)| p.length > 128) {
            return Err(DatapathError::PrefixTooLong {
                length: prefix.length,
            });
        }
        let known = &mut *self.known();
        if known.sets.contains_key(&id) {
            known.retired.push((id, Instant::now()));
            self.collect(known, true)?;
        }
        let Some(written) = self.attempt(known, id, compiled, identities)? else {
            // What waits to be given back may make room.
            self.collect(known, true)?;
            return match self.attempt(known, id, compiled, identities)? {
                Some(written) => written,
                None => Err(self.blocks.full()),
            };
        };
        written
    }

    /// `None`: no room for the blocks, and nothing was done.
    fn attempt(
        &self,
        known: &mut Known,
        id: u32,
        compiled: &CompiledSet,
        identities: &[(u32, TermMask)],
    ) -> Result<Option<Result<(), DatapathError>>, DatapathError> {
        let mut layout = Layout::default();
        let mut staged = Staged::new(&mut known.blocks);
        let lay_out = |layout: &mut Layout, staged: &mut Staged<'_>| {
            let entries = compiled.lay_out(layout, staged)?;
            let bound = identities.iter().map(|(identity, mask)| {
                let key = IdentityKey {
                    set: id,
                    identity: *identity,
                };
                Some((key, layout.mask(mask, staged)?))
            });
            Some((entries, bound.collect::<Option<Vec<_>>>()?))
        };
        let laid_out = lay_out(&mut layout, &mut staged);
        let Staged {
            runs,
            indices,
            values,
            ..
        } = staged;
        let mut entries = Entries {
            identities: identities.iter().map(|(identity, _)| *identity).collect(),
            ports: compiled.ports.iter().map(|(port, _)| *port).collect(),
            sources: Vec::new(),
            runs: runs.into_iter().collect(),
            layout,
        };
        let Some((laid_out, bound)) = laid_out else {
            known.give_back(&entries);
            return Ok(None);
        };
        let sources = laid_out.sources.into_iter();
        let (source_keys, answers): (Vec<_>, Vec<_>) = sources
            .map(|(prefix, answer)| (prefix.key(id), answer))
            .unzip();
        entries.sources = source_keys;
        // The set itself last: an id without one denies.
        let write = || {
            self.blocks.put_all(&indices, &values)?;
            let (keys, masks): (Vec<_>, Vec<_>) = bound.into_iter().unzip();
            self.identities.put_all(&keys, &masks)?;
            let ports = laid_out.ports.into_iter();
            let (keys, masks): (Vec<_>, Vec<_>) = ports.map(|(p, m)| (port_key(id, p), m)).unzip();
            self.ports.put_all(&keys, &masks)?;
            self.sources.put_all(&entries.sources, &answers)?;
            self.sets.put(&id, &laid_out.set)
        };
        let written = write();
        match &written {
            Ok(()) => {
                known.sets.insert(id, entries);
            }
            // Nothing points at the set yet.
            Err(_) => {
                self.remove(id, &entries)?;
                known.give_back(&entries);
            }
        }
        Ok(Some(written))
    }

    fn bind(&self, set: u32, identity: u32, mask: &TermMask) -> Result<(), DatapathError> {
        let known = &mut *self.known();
        let entries = known.sets.entry(set).or_default();
        let mut staged = Staged::new(&mut known.blocks);
        let mask = entries.layout.mask(mask, &mut staged);
        let Staged {
            runs,
            indices,
            values,
            ..
        } = staged;
        entries.runs.extend(runs);
        let mask = mask.ok_or_else(|| self.blocks.full())?;
        if let Err(error) = self.blocks.put_all(&indices, &values) {
            // It has places for blocks that were not written.
            entries.layout = Layout::default();
            return Err(error);
        }
        self.identities.put(&IdentityKey { set, identity }, &mask)?;
        entries.identities.insert(identity);
        Ok(())
    }

    /// The blocks stay with the set: other identities have the same masks.
    fn unbind(&self, set: u32, identities: &[u32]) -> Result<(), DatapathError> {
        let mut known = self.known();
        let keys = identities.iter().map(|identity| IdentityKey {
            set,
            identity: *identity,
        });
        self.identities.remove_all(&keys.collect::<Vec<_>>())?;
        if let Some(entries) = known.sets.get_mut(&set) {
            for identity in identities {
                entries.identities.remove(identity);
            }
        }
        Ok(())
    }

    fn retire(&self, id: u32) -> Result<(), DatapathError> {
        let mut known = self.known();
        known.retired.push((id, Instant::now()));
        let crowded = known.retired.len() > MOST_RETIRED;
        if crowded {
            self.collect(&mut known, true)?;
        }
        Ok(())
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
            if let Some(entries) = known.sets.remove(&id) {
                self.remove(id, &entries)?;
                known.give_back(&entries);
            }
        }
        Ok(())
    }

    /// The set itself first: an id without one denies.
    fn remove(&self, id: u32, entries: &Entries) -> Result<(), DatapathError> {
        self.sets.remove(&id)?;
        let identities = entries.identities.iter().map(|identity| IdentityKey {
            set: id,
            identity: *identity,
        });
        self.identities
            .remove_all(&identities.collect::<Vec<_>>())?;
        let ports = entries.ports.iter().map(|port| port_key(id, *port));
        self.ports.remove_all(&ports.collect::<Vec<_>>())?;
        self.sources.remove_all(&entries.sources)
    }

    fn usage(&self) -> PolicyUsage {
        let known = self.known();
        let count = |of: fn(&Entries) -> usize| known.sets.values().map(of).sum();
        PolicyUsage {
            sets: known.sets.len(),
            identities: count(|e| e.identities.len()),
            ports: count(|e| e.ports.len()),
            sources: count(|e| e.sources.len()),
            blocks: self.blocks.len() - known.blocks.free(),
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn give_back(&mut self, entries: &Entries) {
        for run in &entries.runs {
            self.blocks.give(*run);
        }
    }
}

fn runs(mask: &Mask) -> impl Iterator<Item = Run> {
    runs_of(mask).map(|(first, length)| Run { first, length })
}

fn port_key(set: u32, port: u16) -> PortKey {
    PortKey { set, port, pad: 0 }
}
