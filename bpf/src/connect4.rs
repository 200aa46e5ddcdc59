//! `connect` of an `AF_INET` socket.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{connect, socket::Inet};

#[cgroup_sock_addr(connect4)]
#[inline(always)]
pub fn ringfence_conn4(ctx: SockAddrContext) -> i32 {
    connect::decide::<Inet>(&ctx)
}
