//! The policy maps in memory: what the eBPF programs would look up, without the kernel.

use std::collections::HashMap;
use std::num::NonZeroU32;

use ringfence_bpf_common::{
    Block, IDENTITY_NONE, IdentityKey, Mask, PolicySet, PolicyTables, PortKey, SourceKey,
    SourceMatch,
};

use crate::{BlockStore, CompiledSet, Layout, Peer};

/// Compiled sets under the keys of the BPF maps. [`ringfence_bpf_common::authorize`] over
/// it answers as the kernel does over the same entries.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    sets: HashMap<u32, PolicySet>,
    identities: HashMap<IdentityKey, Mask>,
    sources: HashMap<SourceKey, SourceMatch>,
    ports: HashMap<PortKey, Mask>,
    layouts: HashMap<u32, Layout>,
    blocks: Blocks,
}

impl Tables {
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a set under `id` in place of what was there. Plaintext is prepared; each
    /// peer needs [`Tables::insert_identity`]. Says `false`, and leaves nothing under
    /// `id`, which denies, when there is no room.
    pub fn insert(&mut self, id: NonZeroU32, compiled: &CompiledSet) -> bool {
        self.remove(id);
        let mut layout = Layout::default();
        let Some(entries) = compiled.lay_out(&mut layout, &mut self.blocks) else {
            self.blocks.free(&layout);
            return false;
        };
        let set = id.get();
        self.layouts.insert(set, layout);
        for (prefix, found) in entries.sources {
            self.sources.insert(prefix.key(set), found);
        }
        for (port, mask) in entries.ports {
            self.ports.insert(PortKey { set, port, pad: 0 }, mask);
        }
        self.sets.insert(set, entries.set);
        self.bind(set, compiled, IDENTITY_NONE, None)
    }

    /// Prepares a peer, interned as `identity`, for the set `id`, which must have been
    /// compiled from `compiled`. Says `false`, and leaves the peer unknown, which denies,
    /// when there is no room.
    pub fn insert_identity(
        &mut self,
        id: NonZeroU32,
        compiled: &CompiledSet,
        identity: NonZeroU32,
        peer: &Peer,
    ) -> bool {
        self.bind(id.get(), compiled, identity.get(), Some(peer))
    }

    /// Removes a set with all that belongs to it.
    pub fn remove(&mut self, id: NonZeroU32) {
        let id = id.get();
        if self.sets.remove(&id).is_none() {
            return;
        }
        self.identities.retain(|key, _| key.set != id);
        self.sources.retain(|key, _| key.set != id);
        self.ports.retain(|key, _| key.set != id);
        if let Some(layout) = self.layouts.remove(&id) {
            self.blocks.free(&layout);
        }
    }

    fn bind(&mut self, set: u32, compiled: &CompiledSet, number: u32, peer: Option<&Peer>) -> bool {
        let key = IdentityKey {
            set,
            identity: number,
        };
        self.identities.remove(&key);
        let mask = self
            .layouts
            .get_mut(&set)
            .and_then(|layout| layout.mask(&compiled.identity_mask(peer), &mut self.blocks));
        match mask {
            Some(mask) => {
                self.identities.insert(key, mask);
                true
            }
            None => false,
        }
    }
}

impl PolicyTables for Tables {
    fn set(&self, id: u32) -> Option<&PolicySet> {
        self.sets.get(&id)
    }

    fn identity(&self, set: u32, identity: u32) -> Option<&Mask> {
        self.identities.get(&IdentityKey { set, identity })
    }

    fn source(&self, key: &SourceKey) -> Option<&SourceMatch> {
        self.sources.get(key)
    }

    fn port(&self, set: u32, port: u16) -> Option<&Mask> {
        self.ports.get(&PortKey { set, port, pad: 0 })
    }

    fn block(&self, index: u32) -> Option<&Block> {
        self.blocks.stored.get(&index)
    }
}

/// Indices are not given twice, so that a mask whose set is gone finds nothing.
#[derive(Clone, Debug, Default)]
struct Blocks {
    stored: HashMap<u32, Block>,
    next: u32,
}

impl Blocks {
    fn free(&mut self, layout: &Layout) {
        for (first, length) in layout.runs() {
            for index in first..first.saturating_add(length) {
                self.stored.remove(&index);
            }
        }
    }
}

impl BlockStore for Blocks {
    fn store(&mut self, blocks: &[Block]) -> Option<u32> {
        let first = self.next;
        self.next = first.checked_add(u32::try_from(blocks.len()).ok()?)?;
        self.stored.extend((first..).zip(blocks.iter().copied()));
        Some(first)
    }
}
