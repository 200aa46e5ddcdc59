//! The system calls that no crate of ours wraps safely; all `unsafe` of this crate.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sched::CloneFlags;

/// The child ends up in the network namespace `netns`. Unlike `ip netns exec`, this keeps
/// the mount namespace, and with it `/sys/fs/bpf` and the cgroup hierarchy.
pub fn enter_before_exec(command: &mut Command, netns: File) {
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; `setns` is a
    // plain system call on a descriptor that the closure owns, and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            nix::sched::setns(&netns, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
        });
    }
}

/// The child outlives our terminal: it leads a session of its own.
pub fn new_session_before_exec(command: &mut Command) {
    // SAFETY: `setsid` is async-signal-safe and takes no arguments.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(|_| ()).map_err(io::Error::from));
    }
}

/// The kernel ends the child when the thread that starts it ends.
pub fn die_with_parent_before_exec(command: &mut Command) {
    // SAFETY: `prctl` is async-signal-safe and touches no memory of ours.
    unsafe {
        command.pre_exec(|| {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
                .map_err(io::Error::from)
        });
    }
}

/// A descriptor that becomes readable when the process ends (pidfd_open(2), Linux 5.3).
pub fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two integers; a non-negative result is a descriptor that
    // nobody else owns.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        let fd = i32::try_from(fd).map_err(|_| io::Error::other("descriptor out of range"))?;
        if fd < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }
}

/// SIGKILL to the process behind the descriptor, and to no other that has its number by now.
pub fn kill_by_pidfd(pidfd: &OwnedFd) -> io::Result<()> {
    let info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: the call takes integers and a pointer that may be null.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            info,
            0,
        )
    };
    let error = io::Error::last_os_error();
    // Already gone is what was wanted.
    if sent == 0 || error.raw_os_error() == Some(libc::ESRCH) {
        Ok(())
    } else {
        Err(error)
    }
}

/// Binds a packet socket to one interface and all protocols (packet(7)).
pub fn bind_packet_socket(socket: &OwnedFd, interface: u32) -> io::Result<()> {
    let index = i32::try_from(interface).map_err(io::Error::other)?;
    // SAFETY: `sockaddr_ll` consists of integers, for which zero is a value; the kernel
    // reads exactly the length that is passed.
    let bound = unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index;
        libc::bind(
            socket.as_raw_fd(),
            std::ptr::from_ref(&address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if bound == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Packets that a packet socket had no room for since the last call (`PACKET_STATISTICS`).
pub fn packets_dropped(socket: &OwnedFd) -> io::Result<u32> {
    // SAFETY: `tpacket_stats` consists of integers; the kernel writes at most `length`
    // bytes, which is its size.
    unsafe {
        let mut stats: libc::tpacket_stats = std::mem::zeroed();
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        let done = libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            std::ptr::from_mut(&mut stats).cast(),
            &mut length,
        );
        if done == 0 {
            Ok(stats.tp_drops)
        } else {
            Err(io::Error::last_os_error())
        }
    }
}
