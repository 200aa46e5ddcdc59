//! Maps of the node's programs alone; pinned like the shared ones.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::HashMap,
};
use ringfence_bpf_common::{AgentSocket, AppSocket, Backend, BackendKey, Handshake, OriginalDst};

#[map]
pub static BACKENDS: HashMap<BackendKey, Backend> = HashMap::pinned(262_144, BPF_F_NO_PREALLOC);

#[map]
pub static AGENT_SOCKS: HashMap<u64, AgentSocket> = HashMap::pinned(65_536, BPF_F_NO_PREALLOC);

/// Redirected connections whose application's end is established and whose agent's end is
/// not yet: for as long as an ACK is under way, or the agent's backlog is full. A plain
/// hash map: an LRU would drop the record of one that waits.
#[map]
pub static ORIGINAL_DST: HashMap<Handshake, OriginalDst> =
    HashMap::pinned(65_536, BPF_F_NO_PREALLOC);

/// Where the connection of a socket that the agent accepts was going. It cannot leak, it
/// cannot be full, and nobody else's socket has it. Pinned by the loader.
#[btf_map]
pub static ACCEPTED: SkStorage<OriginalDst> = SkStorage::new();

/// What each socket of an application asked for and got. Socket storage dies with
/// its socket, so it cannot leak. Pinned by the loader.
#[btf_map]
pub static SOCKS: SkStorage<AppSocket> = SkStorage::new();
