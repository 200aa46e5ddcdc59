//! No MPTCP sockets for enrolled pods.
//!
//! The kernel shows `connect` each subflow and never the socket that the application
//! holds: `getpeername` could not name what was asked for, and further subflows would go
//! to addresses that a peer advertises. A program that asks for MPTCP is told that there
//! is none here, and takes TCP.

use core::mem::offset_of;

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock,
    helpers::{bpf_get_netns_cookie, bpf_set_retval},
    macros::cgroup_sock,
    programs::SockContext,
};
use ringfence_bpf_common::Counter;

use crate::{context::load_u32, maps::PODS, report::count};

const REFUSE: i32 = 0;
const PASS: i32 = 1;

const IPPROTO_MPTCP: u32 = 262;
const EPROTONOSUPPORT: i32 = 93;

#[cgroup_sock(sock_create)]
#[inline(always)]
pub fn ringfence_create(ctx: SockContext) -> i32 {
    // SAFETY: a readable field of the context.
    let protocol = unsafe { load_u32!(ctx.sock, offset_of!(bpf_sock, protocol)) };
    if protocol != IPPROTO_MPTCP {
        return PASS;
    }
    // SAFETY: the helper takes this context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    if PODS.get_ptr(netns).is_none() {
        return PASS;
    }
    count(Counter::Mptcp);
    // SAFETY: the helper has no precondition. Should it fail, the error is EPERM.
    unsafe { bpf_set_retval(-EPROTONOSUPPORT) };
    REFUSE
}
