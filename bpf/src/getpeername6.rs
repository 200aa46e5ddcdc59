//! `getpeername` of an `AF_INET6` socket: the destination that the application named.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::socket::{self, Family as _, Inet6};

#[cgroup_sock_addr(getpeername6)]
#[inline(always)]
pub fn ringfence_peer6(ctx: SockAddrContext) -> i32 {
    if let Some(asked) = socket::recall(&ctx) {
        Inet6::write(&ctx, &asked);
    }
    1
}
