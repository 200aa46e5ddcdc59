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
//! ```
//!
//! # Not guaranteed here
//!
//! Only TCP connects are seen. A connect that was made before its namespace was enrolled
//! goes on untouched. Two agents must not share one pin folder.

mod attach;
mod error;
mod events;
mod node;
mod pins;
mod pods;
mod policies;
mod services;
mod sockets;
mod sys;
mod table;

pub use error::DatapathError;
pub use events::Events;
pub use node::{Datapath, Options};
pub use pins::remove;
pub use policies::SourcePrefix;
pub use sockets::RegisteredSocket;
pub use sys::{netns_cookie, socket_cookie};

#[doc(no_inline)]
pub use ringfence_bpf_common as common;
