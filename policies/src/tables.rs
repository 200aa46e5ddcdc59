//! The policy maps in memory: what the eBPF programs would look up, without the kernel.

use std::collections::HashMap;
use std::num::NonZeroU32;

use ringfence_bpf_common::{
    Addr, IDENTITY_NONE, IdentityKey, Mask, PolicySet, PolicyTables, PortKey, SourceKey,
};

use crate::{CompiledSet, Peer};

/// Compiled sets under the keys of the BPF maps. [`ringfence_bpf_common::authorize`] over
/// it answers as the kernel does over the same entries, longest-prefix match included.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    sets: HashMap<u32, PolicySet>,
    identities: HashMap<IdentityKey, Mask>,
    /// By prefix length in bits (those of the set id included) and masked key.
    sources: HashMap<(u32, SourceKey), Mask>,
    ports: HashMap<PortKey, Mask>,
}

impl Tables {
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a set under `id` in place of what was there. Plaintext is prepared; each
    /// peer needs [`Tables::insert_identity`].
    pub fn insert(&mut self, id: NonZeroU32, compiled: &CompiledSet) {
        self.remove(id);
        let set = id.get();
        self.sets.insert(set, compiled.set);
        let none = IdentityKey {
            set,
            identity: IDENTITY_NONE,
        };
        self.identities.insert(none, compiled.identity_mask(None));
        for (prefix, mask) in &compiled.sources {
            self.sources.insert(prefix.key(set), *mask);
        }
        for (port, mask) in &compiled.ports {
            self.ports.insert(
                PortKey {
                    set,
                    port: *port,
                    pad: 0,
                },
                *mask,
            );
        }
    }

    /// Prepares a peer, interned as `identity`, for the set `id`, which must have been
    /// compiled from `compiled`.
    pub fn insert_identity(
        &mut self,
        id: NonZeroU32,
        compiled: &CompiledSet,
        identity: NonZeroU32,
        peer: &Peer,
    ) {
        let key = IdentityKey {
            set: id.get(),
            identity: identity.get(),
        };
        self.identities
            .insert(key, compiled.identity_mask(Some(peer)));
    }

    /// Removes a set with all that belongs to it.
    pub fn remove(&mut self, id: NonZeroU32) {
        let id = id.get();
        self.sets.remove(&id);
        self.identities.retain(|key, _| key.set != id);
        self.sources
            .retain(|(_, key), _| key.set != id.to_be_bytes());
        self.ports.retain(|key, _| key.set != id);
    }
}

impl PolicyTables for Tables {
    fn set(&self, id: u32) -> Option<&PolicySet> {
        self.sets.get(&id)
    }

    fn identity(&self, set: u32, identity: u32) -> Option<&Mask> {
        self.identities.get(&IdentityKey { set, identity })
    }

    fn source(&self, set: u32, source: &Addr) -> Option<&Mask> {
        // Longest first, as a trie finds it; the key is cut bit by bit and not through
        // the prefix type that filled the table.
        (0..=128u32).rev().find_map(|length| {
            let key = SourceKey {
                set: set.to_be_bytes(),
                addr: cut(source, length),
            };
            self.sources.get(&(u32::BITS + length, key))
        })
    }

    fn port(&self, set: u32, port: u16) -> Option<&Mask> {
        self.ports.get(&PortKey { set, port, pad: 0 })
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
