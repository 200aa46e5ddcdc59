//! Maps of the node's programs alone; pinned like the shared ones.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::HashMap,
};
use ringfence_bpf_common::{AgentSocket, AppSocket, Backend, BackendKey, Flow, OriginalDst};

#[map]
pub static BACKENDS: HashMap<BackendKey, Backend> = HashMap::pinned(262_144, BPF_F_NO_PREALLOC);

#[map]
pub static AGENT_SOCKS: HashMap<u64, AgentSocket> = HashMap::pinned(65_536, BPF_F_NO_PREALLOC);

/// A plain hash map: an LRU would drop the record of a connection that waits in the
/// listener's backlog.
#[map]
pub static ORIGINAL_DST: HashMap<Flow, OriginalDst> = HashMap::pinned(65_536, BPF_F_NO_PREALLOC);

/// What each socket of an application asked for and got. Socket storage dies with
/// its socket, so it cannot leak. Pinned by the loader.
#[btf_map]
pub static SOCKS: SkStorage<AppSocket> = SkStorage::new();
