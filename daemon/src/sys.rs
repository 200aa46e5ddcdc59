//! System calls that no crate wraps. The only `unsafe` of this crate.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Lets an IPv6 socket bind an address that is not local (`IPV6_TRANSPARENT`, which
/// `socket2` has for IPv4 alone). Needs `CAP_NET_ADMIN` or `CAP_NET_RAW`.
pub fn set_ipv6_transparent(socket: impl AsFd) -> io::Result<()> {
    const IPV6_TRANSPARENT: libc::c_int = 75;
    set_int(socket, libc::SOL_IPV6, IPV6_TRANSPARENT, 1)
}

/// Leaves the choice of the source port to `connect`, where the whole 4-tuple is known
/// (`IP_BIND_ADDRESS_NO_PORT`; the option is of the IP level for both families).
pub fn set_bind_address_no_port(socket: impl AsFd) -> io::Result<()> {
    set_int(socket, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// Has a listener ignore data in a SYN (`TCP_FASTOPEN`), whatever the namespace's
/// `tcp_fastopen` says of listeners in general. After `listen`, which asks for that.
pub fn set_no_fast_open(listener: impl AsFd) -> io::Result<()> {
    set_int(listener, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 0)
}

fn set_int(
    socket: impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the descriptor is open for the duration of the borrow, and the kernel reads
    // exactly `size_of::<c_int>()` bytes from a live `c_int`.
    let rc = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
