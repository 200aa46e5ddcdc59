//! The system calls that no crate wraps: the only module of this crate with `unsafe`.
//!
//! Kernel TLS follows `include/uapi/linux/tls.h` and `net/tls/` of Linux. Every
//! function here is one call (or a fixed sequence of calls) on a borrowed
//! descriptor, non-blocking if the descriptor is.
//!
//! A splice into a closed socket raises SIGPIPE if the process has not set it to be
//! ignored; Rust's runtime does so before `main`.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use ktls::CryptoInfo;
use rustls::{ConnectionTrafficSecrets, SupportedCipherSuite};
use zeroize::Zeroize;

const TCP_ULP: libc::c_int = 31;
const SOL_TLS: libc::c_int = 282;
const TLS_SET_RECORD_TYPE: libc::c_int = 1;
const TLS_GET_RECORD_TYPE: libc::c_int = 2;

/// Bytes a data pipe holds. 256 KiB is 64 slots, room for a send window on
/// loopback; a kernel that refuses leaves the pipe at its default of 64 KiB.
const PIPE_BYTES: libc::c_int = 256 * 1024;

/// Largest `struct tls12_crypto_info_*` (AES-256-GCM, ChaCha20-Poly1305).
const CRYPTO_INFO_MAX: usize = 56;

/// Which key of a kTLS socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Tx = 1,
    Rx = 2,
}

/// Keys that a kernel record layer was not able to take.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyError {
    #[error("kTLS has no form for cipher suite {0:?}")]
    Unsupported(rustls::CipherSuite),
    #[error("setting the key failed")]
    Os(#[source] io::Error),
}

/// `setsockopt(TCP_ULP, "tls")`. `ENOENT`: the kernel has no TLS. Needs an
/// established socket (`ENOTCONN` otherwise).
pub(crate) fn set_ulp_tls(fd: BorrowedFd<'_>) -> io::Result<()> {
    let name = b"tls";
    // SAFETY: setsockopt(2) reads `optlen` bytes at `optval`; `name` lives that long.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_ULP,
            name.as_ptr().cast(),
            name.len() as libc::socklen_t,
        )
    })
    .map(drop)
}

/// Gives the kernel the key of one direction. Our copy is wiped.
pub(crate) fn set_tls_key(
    fd: BorrowedFd<'_>,
    direction: Direction,
    suite: SupportedCipherSuite,
    secrets: (u64, ConnectionTrafficSecrets),
) -> Result<(), KeyError> {
    let mut info = CryptoInfo::from_rustls(suite, secrets)
        .map_err(|_| KeyError::Unsupported(suite.suite()))?;
    // SAFETY: `as_ptr`/`size` describe the one C struct inside `info`, which outlives
    // the call; setsockopt(2) only reads it.
    let result = check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            SOL_TLS,
            direction as libc::c_int,
            info.as_ptr(),
            info.size() as libc::socklen_t,
        )
    });
    wipe_crypto_info(&mut info);
    result.map(drop).map_err(KeyError::Os)
}

fn wipe_crypto_info(info: &mut CryptoInfo) {
    match info {
        CryptoInfo::AesGcm128(i) => {
            i.key.zeroize();
            i.iv.zeroize();
            i.salt.zeroize();
        }
        CryptoInfo::AesGcm256(i) => {
            i.key.zeroize();
            i.iv.zeroize();
            i.salt.zeroize();
        }
        CryptoInfo::Chacha20Poly1305(i) => {
            i.key.zeroize();
            i.iv.zeroize();
        }
        // `from_rustls` makes no other variant.
        CryptoInfo::AesCcm128(_) | CryptoInfo::Sm4Gcm(_) | CryptoInfo::Sm4Ccm(_) => {}
    }
}

/// Random bytes that [`set_probe_key`] needs.
pub(crate) const PROBE_KEY: usize = CRYPTO_INFO_MAX - 4 - 8;

/// Sets a key made of `material` with sequence number 0: for the probe, which has no
/// handshake to take secrets from.
///
/// Layout of `struct tls12_crypto_info_*`: version, cipher (both u16, native order), then
/// IV, key and salt, then the sequence number.
pub(crate) fn set_probe_key(
    fd: BorrowedFd<'_>,
    direction: Direction,
    suite: rustls::CipherSuite,
    material: &[u8; PROBE_KEY],
) -> Result<(), KeyError> {
    use rustls::CipherSuite as Suite;
    let (cipher, size): (u16, usize) = match suite {
        Suite::TLS13_AES_128_GCM_SHA256 => (51, 40),
        Suite::TLS13_AES_256_GCM_SHA384 => (52, 56),
        Suite::TLS13_CHACHA20_POLY1305_SHA256 => (54, 56),
        other => return Err(KeyError::Unsupported(other)),
    };
    let mut info = [0u8; CRYPTO_INFO_MAX];
    info[..2].copy_from_slice(&0x0304u16.to_ne_bytes());
    info[2..4].copy_from_slice(&cipher.to_ne_bytes());
    let secret = size - 4 - 8;
    info[4..4 + secret].copy_from_slice(&material[..secret]);
    // SAFETY: setsockopt(2) reads `size` <= info.len() bytes at `info`.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            SOL_TLS,
            direction as libc::c_int,
            info.as_ptr().cast(),
            size as libc::socklen_t,
        )
    })
    .map(drop)
    .map_err(KeyError::Os)
}

/// Blocks until `fd` is readable; `TimedOut` if it is not in time.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, limit: std::time::Duration) -> io::Result<()> {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let millis = libc::c_int::try_from(limit.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: poll(2) reads and writes the one pollfd it is given.
    match check(unsafe { libc::poll(&mut poll, 1, millis) })? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// The sequence number of the next record in `direction`, read from the kernel.
///
/// `getsockopt(TLS_TX)` returns the whole crypto info, key included: it is wiped here.
/// The sequence number is the last 8 bytes of each of the structs.
pub(crate) fn record_sequence(fd: BorrowedFd<'_>, direction: Direction) -> io::Result<u64> {
    let mut last = io::Error::from_raw_os_error(libc::EINVAL);
    // The kernel wants the exact size of the cipher's struct, and 40 and 56 are all there are.
    for size in [40usize, CRYPTO_INFO_MAX] {
        let mut info = [0u8; CRYPTO_INFO_MAX];
        let mut len = size as libc::socklen_t;
        // SAFETY: getsockopt(2) writes at most `len` <= info.len() bytes at `info`.
        let result = check(unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                SOL_TLS,
                direction as libc::c_int,
                info.as_mut_ptr().cast(),
                &mut len,
            )
        });
        let sequence = info
            .get(size - 8..size)
            .and_then(|tail| <[u8; 8]>::try_from(tail).ok())
            .map(u64::from_be_bytes);
        info.zeroize();
        match (result, sequence) {
            (Ok(_), Some(sequence)) => return Ok(sequence),
            (Err(e), _) => last = e,
            (Ok(_), None) => {}
        }
    }
    Err(last)
}

/// A control buffer for one record-type message, aligned as `cmsghdr` wants.
#[repr(C, align(8))]
struct RecordTypeCmsg {
    header: libc::cmsghdr,
    record_type: u8,
    padding: [u8; 7],
}

/// `CMSG_LEN(1)`: a header (16 bytes on 64-bit Linux) and one byte, not padded.
const CMSG_LEN_1: usize = mem::size_of::<libc::cmsghdr>() + 1;

/// Sends `payload` as one TLS record of type `record_type` (kTLS sockets only).
/// The kernel first closes a record that a splice has left open.
///
/// A small record is queued whole or not at all.
pub(crate) fn send_record(
    fd: BorrowedFd<'_>,
    record_type: u8,
    payload: &[u8],
) -> io::Result<usize> {
    let mut control = RecordTypeCmsg {
        header: libc::cmsghdr {
            cmsg_len: CMSG_LEN_1 as _,
            cmsg_level: SOL_TLS,
            cmsg_type: TLS_SET_RECORD_TYPE,
        },
        record_type,
        padding: [0; 7],
    };
    let mut iov = libc::iovec {
        iov_base: payload.as_ptr().cast_mut().cast(),
        iov_len: payload.len(),
    };
    // SAFETY: msghdr is a C struct of integers and pointers; all-zero is valid.
    let mut msg: libc::msghdr = unsafe { mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = ptr::from_mut(&mut control).cast();
    msg.msg_controllen = mem::size_of::<RecordTypeCmsg>() as _;
    // SAFETY: sendmsg(2) reads iov and control, both alive; it never writes through
    // `iov_base`, so the cast from `*const` is sound.
    check_len(unsafe {
        libc::sendmsg(
            fd.as_raw_fd(),
            &msg,
            libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
        )
    })
}

/// What one `recvmsg` on a kTLS socket gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) len: usize,
    /// `None`: the kernel named no type: end of file if `len` is 0.
    pub(crate) record_type: Option<u8>,
    /// `MSG_EOR`: the buffer holds the record to its end (control records).
    pub(crate) end_of_record: bool,
}

/// Receives (part of) one record with its type. Data records may come several at once.
pub(crate) fn recv_record(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<Received> {
    let mut control = RecordTypeCmsg {
        header: libc::cmsghdr {
            cmsg_len: 0,
            cmsg_level: 0,
            cmsg_type: 0,
        },
        record_type: 0,
        padding: [0; 7],
    };
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: as in `send_record`.
    let mut msg: libc::msghdr = unsafe { mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = ptr::from_mut(&mut control).cast();
    msg.msg_controllen = mem::size_of::<RecordTypeCmsg>() as _;
    // SAFETY: recvmsg(2) writes at most iov_len bytes at iov_base and msg_controllen
    // bytes at msg_control; both are exclusively ours and alive.
    let len = check_len(unsafe { libc::recvmsg(fd.as_raw_fd(), &mut msg, libc::MSG_DONTWAIT) })?;
    // The kernel wrote one whole cmsg iff at least CMSG_LEN(1) bytes are announced.
    let typed = msg.msg_controllen as usize >= CMSG_LEN_1
        && control.header.cmsg_level == SOL_TLS
        && control.header.cmsg_type == TLS_GET_RECORD_TYPE
        && msg.msg_flags & libc::MSG_CTRUNC == 0;
    let _ = control.padding;
    Ok(Received {
        len,
        record_type: typed.then_some(control.record_type),
        end_of_record: msg.msg_flags & libc::MSG_EOR != 0,
    })
}

/// Is anything (a byte, a record, an end, an error) waiting? Takes nothing.
pub(crate) fn is_quiet(fd: BorrowedFd<'_>) -> bool {
    let mut byte = 0u8;
    // SAFETY: recv(2) writes at most one byte at `byte`.
    let result = check_len(unsafe {
        libc::recv(
            fd.as_raw_fd(),
            ptr::from_mut(&mut byte).cast(),
            1,
            libc::MSG_PEEK | libc::MSG_DONTWAIT,
        )
    });
    matches!(result, Err(e) if e.kind() == io::ErrorKind::WouldBlock)
}

/// A non-blocking, close-on-exec pipe.
#[derive(Debug)]
pub(crate) struct Pipe {
    pub(crate) read: OwnedFd,
    pub(crate) write: OwnedFd,
}

impl Pipe {
    pub(crate) fn new() -> io::Result<Self> {
        let mut fds = [0; 2];
        // SAFETY: pipe2(2) writes two descriptors at `fds`.
        check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC) })?;
        let [read, write] = fds;
        // SAFETY: both were just opened by pipe2 and belong to nobody else.
        let pipe = unsafe {
            Self {
                read: OwnedFd::from_raw_fd(read),
                write: OwnedFd::from_raw_fd(write),
            }
        };
        // A refusal (the user's pipe quota) costs speed and nothing else.
        // SAFETY: fcntl(F_SETPIPE_SZ) takes an int.
        let _ = unsafe { libc::fcntl(pipe.write.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_BYTES) };
        Ok(pipe)
    }
}

/// Bytes to ask of a socket in one splice.
pub(crate) const SPLICE_MAX: usize = PIPE_BYTES as usize;

/// `splice(2)` between a pipe and a socket, never waiting, never with `SPLICE_F_MORE`
/// (it would hold a TLS record open).
pub(crate) fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
    // SAFETY: null offsets are allowed for pipes and sockets; nothing is borrowed.
    check_len(unsafe {
        libc::splice(
            from.as_raw_fd(),
            ptr::null_mut(),
            to.as_raw_fd(),
            ptr::null_mut(),
            len,
            libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE,
        )
    })
}

/// `readv(2)` into at most `IOV_MAX` (1024) buffers.
pub(crate) fn readv(fd: BorrowedFd<'_>, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    let count = libc::c_int::try_from(buffers.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: `IoSliceMut` has the layout of `struct iovec` (documented in std), and each one
    // is valid for writes of its length while `buffers` is borrowed.
    check_len(unsafe { libc::readv(fd.as_raw_fd(), buffers.as_mut_ptr().cast(), count) })
}

/// TCP states of `include/net/tcp_states.h` that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TcpState {
    /// A FIN was received and nothing was reset: CLOSE_WAIT, LAST_ACK, CLOSING, TIME_WAIT.
    FinReceived,
    /// No connection any more: reset, or both FINs acknowledged.
    Closed,
    Other,
}

/// The state of a TCP socket, from `TCP_INFO` (its first byte).
pub(crate) fn tcp_state(fd: BorrowedFd<'_>) -> io::Result<TcpState> {
    // SAFETY: tcp_info is a C struct of integers; all-zero is valid.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    let mut len = mem::size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: getsockopt(2) writes at most `len` bytes at `info`.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            ptr::from_mut(&mut info).cast(),
            &mut len,
        )
    })?;
    Ok(match info.tcpi_state {
        6 | 8 | 9 | 11 => TcpState::FinReceived,
        7 => TcpState::Closed,
        _ => TcpState::Other,
    })
}

/// Bytes sent and not yet acknowledged (`SIOCOUTQ`).
pub(crate) fn unacknowledged(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: ioctl(SIOCOUTQ), the same number as TIOCOUTQ, writes one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &mut bytes) })?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// `shutdown(SHUT_WR)`: FIN behind what was sent.
pub(crate) fn shutdown_write(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: shutdown(2) takes integers.
    check(unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_WR) }).map(drop)
}

/// With `on`, closing the last descriptor sends RST instead of FIN, in whatever way it is
/// closed.
pub(crate) fn set_reset_on_close(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let linger = libc::linger {
        l_onoff: on.into(),
        l_linger: 0,
    };
    set_option(fd, libc::SOL_SOCKET, libc::SO_LINGER, &linger)
}

/// The socket's send buffer limit in bytes of kernel memory (twice what was asked for).
pub(crate) fn send_buffer(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    let mut len = mem::size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: getsockopt(2) writes at most `len` bytes at `bytes`.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_SNDBUF,
            ptr::from_mut(&mut bytes).cast(),
            &mut len,
        )
    })?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

pub(crate) fn set_send_buffer(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, &bytes)
}

fn set_option<T: Copy>(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: setsockopt(2) reads size_of::<T>() bytes at `value`, a live plain C value.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            ptr::from_ref(value).cast(),
            mem::size_of::<T>() as libc::socklen_t,
        )
    })
    .map(drop)
}

/// A value of a foreign type whose memory is overwritten when it is dropped.
///
/// For types without a destructor of their own (checked at compile time). Copies that
/// moves have left on the stack before the value got here are out of reach.
pub(crate) struct Wiped<T>(Box<MaybeUninit<T>>);

impl<T> Wiped<T> {
    const NO_DESTRUCTOR: () = assert!(!mem::needs_drop::<T>());

    pub(crate) fn new(value: T) -> Self {
        let () = Self::NO_DESTRUCTOR;
        Self(Box::new(MaybeUninit::new(value)))
    }

    pub(crate) fn get(&self) -> &T {
        // SAFETY: initialised in `new`, overwritten only in `drop`.
        unsafe { self.0.assume_init_ref() }
    }
}

impl<T> Drop for Wiped<T> {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl<T> fmt::Debug for Wiped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wiped(..)")
    }
}

/// Shorthand for `as_fd` on anything that has a descriptor.
pub(crate) fn fd<F: AsFd>(f: &F) -> BorrowedFd<'_> {
    f.as_fd()
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn check_len(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
