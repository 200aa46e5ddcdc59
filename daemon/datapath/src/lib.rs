//! The userspace side of the eBPF data path: loads and pins the programs of `bpf/`,
//! attaches them, and keeps their maps.
//!
//! Everything is pinned below one folder of a BPF file system, so that interception,
//! routing and authorization go on while no agent runs. [`Datapath::load`] takes over
//! what an earlier agent left: maps are reused with their content, and a link gets its
//! new program in one atomic step, so that there is no instant without enforcement and
//! none with two programs in a row.
//!
//! ```text
//! <pin dir>/v<layout>/<MAP>          the maps
//! <pin dir>/v<layout>/links/<hook>   the node's links, at the cgroup v2 root
//! <pin dir>/v<layout>/pods/<cookie>  one sk_lookup link per enrolled namespace
//! <pin dir>/v<layout>/guards/...     one link per device of a pod and direction, at its
//!                                    host side (filters/ before Linux 6.6)
//! ```
//!
//! # Not guaranteed here
//!
//! Only TCP is policed. What a connect made before its namespace was enrolled goes on
//! until [`Datapath::end_refused`] is called. Two agents must not share one pin folder.

mod attach;
mod blocks;
mod devices;
mod diag;
mod error;
mod events;
mod filter;
mod guard;
mod judge;
mod netlink;
mod node;
mod pins;
mod pods;
mod policies;
mod services;
mod sockets;
mod sys;
mod table;

pub use devices::{Device, devices, netns_number};
pub use diag::{Ended, SocketDiag};
pub use error::DatapathError;
pub use events::Events;
pub use guard::GuardHook;
pub use node::{Datapath, Options};
pub use pins::remove;
pub use policies::PolicyUsage;
pub use sockets::RegisteredSocket;
pub use sys::{netns_cookie, socket_cookie};

#[doc(no_inline)]
pub use ringfence_bpf_common as common;
