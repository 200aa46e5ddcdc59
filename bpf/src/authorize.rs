//! The shared decision over the policy maps.

use core::{cell::UnsafeCell, mem::MaybeUninit};

use aya_ebpf::maps::lpm_trie::Key;
use ringfence_bpf_common::{
    Addr, IdentityKey, MASK_WORDS, Mask, PolicySet, PolicyTables, PortKey, Query, SourceKey,
    Verdict,
};

use crate::maps::{POLICY_IDENTITIES, POLICY_PORTS, POLICY_SETS, POLICY_SOURCES};

#[inline(always)]
pub fn judge(query: &Query) -> Verdict {
    ringfence_bpf_common::authorize(
        &Tables {
            source: UnsafeCell::new(MaybeUninit::uninit()),
        },
        query,
    )
}

struct Tables {
    /// The aligned copy of what `POLICY_SOURCES` said.
    source: UnsafeCell<MaybeUninit<Mask>>,
}

impl PolicyTables for Tables {
    #[inline(always)]
    fn set(&self, id: u32) -> Option<&PolicySet> {
        // SAFETY: a program runs inside an RCU read section, and the agent waits for
        // such sections to end before it removes the entries of a set; a set is
        // never changed in place.
        unsafe { POLICY_SETS.get(id) }
    }

    #[inline(always)]
    fn identity(&self, set: u32, identity: u32) -> Option<&Mask> {
        let key = IdentityKey { set, identity };
        // SAFETY: as in `set`.
        unsafe { POLICY_IDENTITIES.get(key) }
    }

    #[inline(always)]
    fn source(&self, set: u32, source: &Addr) -> Option<&Mask> {
        let data = SourceKey {
            set: set.to_be_bytes(),
            addr: *source,
        };
        let halves = POLICY_SOURCES.get(Key::new(32 + 128, data))?;
        let mut words = [0; MASK_WORDS];
        let mut i = 0;
        while i < MASK_WORDS {
            // The target is little endian.
            words[i] = u64::from(halves[2 * i]) | u64::from(halves[2 * i + 1]) << 32;
            i += 1;
        }
        // SAFETY: `authorize` asks for the source once, so no reference to the copy
        // exists yet, and the program has one thread.
        unsafe { Some((*self.source.get()).write(Mask(words))) }
    }

    #[inline(always)]
    fn port(&self, set: u32, port: u16) -> Option<&Mask> {
        let key = PortKey { set, port, pad: 0 };
        // SAFETY: as in `set`.
        unsafe { POLICY_PORTS.get(key) }
    }
}
