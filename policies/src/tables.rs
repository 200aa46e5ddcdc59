//! The policy maps in memory: what the eBPF programs would look up, without the kernel.

use std::collections::HashMap;
use std::num::NonZeroU32;

use ringfence_bpf_common::{
    Addr, Block, IDENTITY_NONE, IdentityKey, Mask, PolicySet, PolicyTables, PortKey, SourceKey,
};

use crate::{BlockStore, CompiledSet, Layout, Peer};

/// Compiled sets under the keys of the BPF maps. [`ringfence_bpf_common::authorize`] over
/// it answers as the kernel does over the same entries, longest-prefix match included.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    sets: HashMap<u32, PolicySet>,
    identities: HashMap<IdentityKey, Mask>,
    /// By prefix length in bits (those of the set id included) and masked key.
    sources: HashMap<(u32, SourceKey), Mask>,
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
        for (prefix, mask) in entries.sources {
            self.sources.insert(prefix.key(set), mask);
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
        self.sources
            .retain(|(_, key), _| key.set != id.to_be_bytes());
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

    fn identity(&self, set: u32, identity: u32) -> Option<Mask> {
        self.identities.get(&IdentityKey { set, identity }).copied()
    }

    fn source(&self, set: u32, source: &Addr) -> Option<Mask> {
        // Longest first, as a trie finds it; the key is cut bit by bit and not through
        // the prefix type that filled the table.
        (0..=128u32).rev().find_map(|length| {
            let key = SourceKey {
                set: set.to_be_bytes(),
                addr: cut(source, length),
            };
            self.sources.get(&(u32::BITS + length, key)).copied()
        })
    }

    fn port(&self, set: u32, port: u16) -> Option<Mask> {
        self.ports.get(&PortKey { set, port, pad: 0 }).copied()
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

/// The first `length` bits, the rest zero.
fn cut(addr: &Addr, length: u32) -> Addr {
    let mut bytes = addr.0;
    for (byte, first_bit) in bytes.iter_mut().zip((0u32..).step_by(8)) {
        *byte &= match length.saturating_sub(first_bit) {
            0 => 0,
            bits @ 1..8 => !(0xff >> bits),
            _ => 0xff,
        };
    }
    Addr(bytes)
}
