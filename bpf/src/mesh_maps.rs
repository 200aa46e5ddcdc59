//! Maps that the node's programs and the guard of each pod both use; pinned like the
//! shared ones.

use aya_ebpf::{bindings::BPF_F_NO_PREALLOC, macros::map, maps::HashMap};
use ringfence_bpf_common::{Addr, Flow, Service, ServiceKey, Workload};

#[map]
pub static SERVICES: HashMap<ServiceKey, Service> = HashMap::pinned(65_536, BPF_F_NO_PREALLOC);

#[map]
pub static WORKLOADS: HashMap<Addr, Workload> = HashMap::pinned(262_144, BPF_F_NO_PREALLOC);

/// Connections from the wire that were admitted in plaintext → cookie of the
/// application's socket. Written when the connection is established, before the
/// application can accept it, removed when it ends.
#[map]
pub static PLAINTEXT: HashMap<Flow, u64> = HashMap::pinned(262_144, BPF_F_NO_PREALLOC);
