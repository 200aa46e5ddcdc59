//! The shared decision over the policy maps.

use ringfence_bpf_common::{
    Block, IdentityKey, Mask, PolicySet, PolicyTables, PortKey, Query, SourceKey, SourceMatch,
    Verdict,
};

use crate::maps::{POLICY_BLOCKS, POLICY_IDENTITIES, POLICY_PORTS, POLICY_SETS, POLICY_SOURCES};

#[inline(always)]
pub fn judge(query: &Query) -> Verdict {
    ringfence_bpf_common::authorize(&Tables, query)
}

struct Tables;

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
    fn source(&self, key: &SourceKey) -> Option<&SourceMatch> {
        // SAFETY: as in `set`.
        unsafe { POLICY_SOURCES.get(key) }
    }

    #[inline(always)]
    fn port(&self, set: u32, port: u16) -> Option<&Mask> {
        let key = PortKey { set, port, pad: 0 };
        // SAFETY: as in `set`.
        unsafe { POLICY_PORTS.get(key) }
    }

    #[inline(always)]
    fn block(&self, index: u32) -> Option<&Block> {
        POLICY_BLOCKS.get(index)
    }
}
