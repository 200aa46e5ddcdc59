//! Who is at the other end of a Unix socket: the kernel's word, not the caller's.

use std::fs::{File, read_to_string};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

/// The network namespace of the process that connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Caller {
    /// Device and inode of the namespace: equal to those of the pod's namespace file.
    pub device: u64,
    /// See `device`.
    pub inode: u64,
}

/// Why a caller cannot be identified; it gets nothing.
#[derive(Debug, thiserror::Error)]
pub enum CallerError {
    /// Linux before 6.5 has no `SO_PEERPIDFD`: a process id alone may have been reused.
    #[error(
        "this kernel cannot say which process connected (SO_PEERPIDFD: Linux 6.5 or later): {0}"
    )]
    NoPidfd(io::Error),
    /// The process ended, or is of another PID namespace than the agent sees.
    #[error("the process that connected is gone or not visible")]
    Gone,
    /// `/proc` could not be read.
    #[error("the namespace of process {pid} cannot be read: {source}")]
    Proc {
        /// Process id in the agent's PID namespace.
        pid: i32,
        /// Why.
        source: io::Error,
    },
}

impl Caller {
    /// Identifies the process that connected `socket`.
    pub fn of(socket: impl AsFd) -> Result<Self, CallerError> {
        let pidfd = peer_pidfd(socket).map_err(CallerError::NoPidfd)?;
        let pid = pid_of(&pidfd).ok_or(CallerError::Gone)?;
        let namespace = File::open(format!("/proc/{pid}/ns/net"))
            .and_then(|file| file.metadata())
            .map_err(|source| CallerError::Proc { pid, source })?;
        // The number was not reused before the file was opened if the process that it stood
        // for still lives now.
        if pid_of(&pidfd) != Some(pid) {
            return Err(CallerError::Gone);
        }
        Ok(Caller {
            device: namespace.dev(),
            inode: namespace.ino(),
        })
    }
}

/// `SO_PEERPIDFD` (net/core/sock.c): a descriptor of the process that connected, fixed at
/// connect time.
fn peer_pidfd(socket: impl AsFd) -> io::Result<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut pidfd: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `pidfd` and `length` are live, and `length` is the size of `pidfd`: the kernel
    // writes at most that much.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut pidfd).cast(),
            &raw mut length,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has installed a new descriptor for us, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// The process id behind a pidfd (`Pid:` in its fdinfo; -1 once the process has ended).
fn pid_of(pidfd: &OwnedFd) -> Option<i32> {
    let info = read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    line.trim().parse().ok().filter(|pid| *pid > 0)
}
