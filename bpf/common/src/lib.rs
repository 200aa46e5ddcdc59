//! What the eBPF programs and userspace must agree on: map keys and values
//! (`#[repr(C)]`, no implicit padding), and the authorization decision itself.
//!
//! Addresses are 16 bytes in network byte order; IPv4 is written as the
//! IPv4-mapped IPv6 address (`::ffff:a.b.c.d`), so that one map serves both
//! families. Ports are in host byte order.
#![no_std]

pub mod authorize;
pub mod judge;
pub mod maps;
pub mod policy;

pub use authorize::{PolicyTables, Query, Reason, Verdict, authorize};
pub use judge::*;
pub use maps::*;
pub use policy::*;

/// Version of everything in this crate that is stored in pinned maps. A change
/// of any layout raises it: the pin directory carries it in its name.
pub const LAYOUT_VERSION: u32 = 3;
