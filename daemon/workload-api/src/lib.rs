//! The SPIFFE Workload API for enrolled pods: an application that wants an SVID of its own
//! connects to a Unix socket and gets the one of its pod's service account, with a key that
//! is made for it alone and never shared with the agent's tunnels.
//!
//! The caller proves nothing by what it says. The kernel says which process connected, and
//! the process's network namespace says which pod it is ([`Caller`]). A caller that is not in
//! an enrolled pod gets `PermissionDenied` and learns nothing else.
//!
//! Not offered: JWT-SVIDs (`Unimplemented`). A process that passes its connection on gives its
//! identity away; so does one that hands out its key.

mod caller;
mod server;

pub use caller::{Caller, CallerError};
pub use server::{Exported, ExportedKey, IssueFuture, Workloads, bind, serve};
