//! Maps that both objects use. They are pinned by name: the node's programs, every
//! pod's program and the agent see the same ones, and they outlive each of them.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{HashMap, LpmTrie, PerCpuArray, RingBuf},
};
use ringfence_bpf_common::{
    COUNTERS as COUNTER_COUNT, Flow, IdentityKey, MASK_WORDS, Mask, Pod, PolicySet, PortKey,
    SourceKey,
};

/// Network namespace cookie → the enrolled pod.
#[map]
pub static PODS: HashMap<u64, Pod> = HashMap::pinned(4096, BPF_F_NO_PREALLOC);

#[map]
pub static POLICY_SETS: HashMap<u32, PolicySet> = HashMap::pinned(4096, BPF_F_NO_PREALLOC);

#[map]
pub static POLICY_IDENTITIES: HashMap<IdentityKey, Mask> =
    HashMap::pinned(262_144, BPF_F_NO_PREALLOC);

/// The words of a [`Mask`]: the trie stores its value right behind the 20 bytes of key
/// data, where a 64-bit word would not be aligned.
pub type SourceMask = [u32; 2 * MASK_WORDS];

#[map]
pub static POLICY_SOURCES: LpmTrie<SourceKey, SourceMask> =
    LpmTrie::pinned(65_536, BPF_F_NO_PREALLOC);

#[map]
pub static POLICY_PORTS: HashMap<PortKey, Mask> = HashMap::pinned(65_536, BPF_F_NO_PREALLOC);

/// Last hops that were admitted → cookie of the agent's socket. Written before the SYN
/// leaves, removed when the connection ends.
#[map]
pub static LAST_HOPS: HashMap<Flow, u64> = HashMap::pinned(65_536, BPF_F_NO_PREALLOC);

/// Carries `ringfence_bpf_common::Event`.
#[map]
pub static EVENTS: RingBuf = RingBuf::pinned(256 * 1024, 0);

#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(COUNTER_COUNT, 0);
