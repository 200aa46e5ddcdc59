//! System calls that no crate here wraps: the only `unsafe` of this crate.
#![allow(unsafe_code)]

use std::{
    ffi::CString,
    io,
    mem::size_of,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use aya::{
    Pod,
    maps::{MapData, RingBuf},
};
use tokio::io::{Interest, unix::AsyncFd};

/// The cookie of the network namespace that `socket` was made in (`SO_NETNS_COOKIE`,
/// Linux 5.14): the key of enrolment.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    socket_option(socket, libc::SO_NETNS_COOKIE)
}

/// The cookie of `socket` (`SO_COOKIE`), unique since boot.
pub fn socket_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    socket_option(socket, libc::SO_COOKIE)
}

fn socket_option(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<u64> {
    let mut value = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the kernel writes at most `length` bytes into
    // `value`, which has that many.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Waits until every eBPF program that runs now has ended (an RCU grace period).
pub(crate) fn wait_for_programs() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: the call takes numbers only; it is `synchronize_rcu` inside
    // (kernel/sched/membarrier.c).
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Waits for a ring buffer on the current tokio runtime.
pub(crate) fn watch(ring: RingBuf<MapData>) -> io::Result<AsyncFd<RingBuf<MapData>>> {
    // Without a runtime the registration would panic.
    tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
    // SAFETY: the ring buffer owns its descriptor, which stays open and the same until
    // it is dropped, and the `AsyncFd` owns the ring buffer.
    let watched = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
    Ok(watched?)
}

const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;
const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;
const BPF_MAP_DELETE_BATCH: libc::c_int = 27;

/// Writes entries of a map in one call (hash and array since Linux 5.6). Which of them
/// were written is not known after an error.
pub(crate) fn update_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> io::Result<()> {
    if keys.len() != values.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    batch(BPF_MAP_UPDATE_BATCH, map, keys, values.as_ptr() as u64)
}

/// Removes entries of a map in one call; a missing one ends it with an error.
pub(crate) fn delete_batch<K: Pod>(map: BorrowedFd<'_>, keys: &[K]) -> io::Result<()> {
    batch(BPF_MAP_DELETE_BATCH, map, keys, 0)
}

/// A key of a hash map with keys of this size, or nothing if it is empty.
pub(crate) fn first_key<K: Pod>(map: BorrowedFd<'_>) -> io::Result<Option<K>> {
    /// `union bpf_attr` of `BPF_MAP_GET_NEXT_KEY`.
    #[repr(C)]
    struct Attr {
        map_fd: u32,
        pad: u32,
        key: u64,
        next_key: u64,
    }
    let mut next = std::mem::MaybeUninit::<K>::zeroed();
    let mut attr = Attr {
        map_fd: map.as_raw_fd().cast_unsigned(),
        pad: 0,
        key: 0,
        next_key: next.as_mut_ptr() as u64,
    };
    // SAFETY: `Attr` has the layout of this command's part of the union. Without a key the
    // kernel only writes one, of the size that the caller vouches for, into `next`.
    match unsafe { bpf(BPF_MAP_GET_NEXT_KEY, &mut attr) } {
        // SAFETY: the kernel wrote it, and any bytes are a `Pod`.
        Ok(_) => Ok(Some(unsafe { next.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn batch<K: Pod>(
    command: libc::c_int,
    map: BorrowedFd<'_>,
    keys: &[K],
    values: u64,
) -> io::Result<()> {
    /// `union bpf_attr` of the `BPF_MAP_*_BATCH` commands.
    #[repr(C)]
    struct Attr {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map_fd: u32,
        elem_flags: u64,
        flags: u64,
    }
    let mut attr = Attr {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values,
        count: u32::try_from(keys.len()).map_err(io::Error::other)?,
        map_fd: map.as_raw_fd().cast_unsigned(),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: `Attr` has the layout of these commands' part of the union. The kernel reads
    // `count` keys, and as many values when it writes the map; both slices have as many,
    // of the map's sizes (`require_sizes` compared them), and live until the call returns.
    unsafe { bpf(command, &mut attr) }.map(drop)
}

const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

/// Opens a pinned link or map.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    /// `union bpf_attr` of `BPF_OBJ_GET`.
    #[repr(C)]
    struct Attr {
        pathname: u64,
        bpf_fd: u32,
        file_flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Attr {
        pathname: path.as_ptr() as u64,
        bpf_fd: 0,
        file_flags: 0,
    };
    // SAFETY: `Attr` has the layout of this command's part of the union, and the path
    // lives until the call returns.
    let fd = unsafe { bpf(BPF_OBJ_GET, &mut attr) }?;
    // SAFETY: the kernel just made the descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Exchanges the program of a link in one step.
pub(crate) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    /// `union bpf_attr` of `BPF_LINK_UPDATE`.
    #[repr(C)]
    struct Attr {
        link_fd: u32,
        new_prog_fd: u32,
        flags: u32,
        old_prog_fd: u32,
    }
    let mut attr = Attr {
        link_fd: link.as_raw_fd().cast_unsigned(),
        new_prog_fd: program.as_raw_fd().cast_unsigned(),
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: `Attr` has the layout of this command's part of the union; both
    // descriptors are open.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// Detaches a link at once: closing its last reference leaves that to a kernel thread.
pub(crate) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    /// `union bpf_attr` of `BPF_LINK_DETACH`.
    #[repr(C)]
    struct Attr {
        link_fd: u32,
    }
    let mut attr = Attr {
        link_fd: link.as_raw_fd().cast_unsigned(),
    };
    // SAFETY: `Attr` has the layout of this command's part of the union; the descriptor
    // is open.
    unsafe { bpf(BPF_LINK_DETACH, &mut attr) }.map(drop)
}

/// Whether the network namespace of a `sk_lookup` link still exists: the kernel
/// detaches the link when it ends, and reports inode 0 then.
pub(crate) fn netns_link_is_alive(link: BorrowedFd<'_>) -> io::Result<bool> {
    /// `struct bpf_link_info` up to the member for network namespaces.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        prog_id: u32,
        pad: u32,
        netns_ino: u32,
        attach_type: u32,
        rest: [u64; 2],
    }
    /// `union bpf_attr` of `BPF_OBJ_GET_INFO_BY_FD`.
    #[repr(C)]
    struct Attr {
        bpf_fd: u32,
        info_len: u32,
        info: u64,
    }
    let mut info = Info::default();
    let mut attr = Attr {
        bpf_fd: link.as_raw_fd().cast_unsigned(),
        info_len: size_of::<Info>() as u32,
        info: (&raw mut info) as u64,
    };
    // SAFETY: `Attr` has the layout of this command's part of the union, and the kernel
    // writes at most `info_len` bytes into `info`, which lives until the call returns.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info.netns_ino != 0)
}

/// # Safety
///
/// `attr` has the layout that `command` wants, and what it points to is valid for it.
unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the size tells the kernel how much of the union there is; the rest is the
    // caller's contract.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as libc::c_int)
    }
}
