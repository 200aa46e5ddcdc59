//! `getpeername` of an `AF_INET` socket: the destination that the application named.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::socket::{self, Family as _, Inet};

#[cgroup_sock_addr(getpeername4)]
#[inline(always)]
pub fn ringfence_peer4(ctx: SockAddrContext) -> i32 {
    if let Some(asked) = socket::recall(&ctx) {
        Inet::write(&ctx, &asked);
    }
    1
}
