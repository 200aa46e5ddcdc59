//! Maps that both objects use. They are pinned by name: the node's programs, every
//! pod's program and the agent see the same ones, and they outlive each of them.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, PerCpuArray, RingBuf},
};
use ringfence_bpf_common::{
    Block, COUNTERS as COUNTER_COUNT, Flow, IdentityKey, Mask, Pod, PolicySet, PortKey, SourceKey,
    SourceMatch,
};

/// Network namespace cookie → the enrolled pod.
#[map]
pub static PODS: HashMap<u64, Pod> = HashMap::pinned(4096, BPF_F_NO_PREALLOC);

#[map]
pub static POLICY_SETS: HashMap<u32, PolicySet> = HashMap::pinned(4096, BPF_F_NO_PREALLOC);

#[map]
pub static POLICY_IDENTITIES: HashMap<IdentityKey, Mask> =
    HashMap::pinned(1 << 20, BPF_F_NO_PREALLOC);

/// Prefixes and the markers that lead to them. The buckets of a table take 16 bytes for each
/// entry that it could have: 8 MiB here.
#[map]
pub static POLICY_SOURCES: HashMap<SourceKey, SourceMatch> =
    HashMap::pinned(1 << 19, BPF_F_NO_PREALLOC);

#[map]
pub static POLICY_PORTS: HashMap<PortKey, Mask> = HashMap::pinned(1 << 18, BPF_F_NO_PREALLOC);

/// The blocks that masks refer to: 8 MiB, allocated at once.
#[map]
pub static POLICY_BLOCKS: Array<Block> = Array::pinned(1 << 18, 0);

/// Last hops that were admitted → cookie of the agent's socket. Written before the SYN
/// leaves, removed when the connection ends.
#[map]
pub static LAST_HOPS: HashMap<Flow, u64> = HashMap::pinned(65_536, BPF_F_NO_PREALLOC);

/// Carries `ringfence_bpf_common::Event`.
#[map]
pub static EVENTS: RingBuf = RingBuf::pinned(256 * 1024, 0);

#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(COUNTER_COUNT, 0);
