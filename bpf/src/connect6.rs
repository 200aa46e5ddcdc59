//! `connect` of an `AF_INET6` socket, IPv4-mapped destinations included.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{connect, socket::Inet6};

#[cgroup_sock_addr(connect6)]
#[inline(always)]
pub fn ringfence_conn6(ctx: SockAddrContext) -> i32 {
    connect::decide::<Inet6>(&ctx)
}
