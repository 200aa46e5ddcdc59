//! Can this kernel protect TLS records? Found out by doing it.
//!
//! The probe opens a TCP connection to itself on loopback, attaches kernel TLS to both
//! ends, and for each cipher suite sends one control record through. "No", "not allowed"
//! and "could not find out" are three answers.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use rustls::CipherSuite;

use crate::pool::random_bytes;
use crate::protocol::CONTENT_TYPE;
use crate::sys::{self, Direction, KeyError, fd};

/// The TLS 1.3 suites that the kernel can carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct KernelSuites {
    pub aes_128_gcm: bool,
    pub aes_256_gcm: bool,
    pub chacha20_poly1305: bool,
}

impl KernelSuites {
    pub const fn contains(self, suite: CipherSuite) -> bool {
        match suite {
            CipherSuite::TLS13_AES_128_GCM_SHA256 => self.aes_128_gcm,
            CipherSuite::TLS13_AES_256_GCM_SHA384 => self.aes_256_gcm,
            CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => self.chacha20_poly1305,
            _ => false,
        }
    }

    const fn any(self) -> bool {
        self.aes_128_gcm || self.aes_256_gcm || self.chacha20_poly1305
    }
}

/// Which record layer is in use, and if not the kernel's, why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RecordLayer {
    Kernel(KernelSuites),
    Software(SoftwareReason),
}

impl RecordLayer {
    /// `kernel` or `software`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kernel(_) => "kernel",
            Self::Software(_) => "software",
        }
    }

    /// Why records are not in the kernel; `None` if they are.
    pub const fn reason(self) -> Option<SoftwareReason> {
        match self {
            Self::Kernel(_) => None,
            Self::Software(reason) => Some(reason),
        }
    }
}

impl fmt::Display for RecordLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(_) => f.write_str("kernel"),
            Self::Software(reason) => write!(f, "software ({reason})"),
        }
    }
}

/// Why records are protected in software.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum SoftwareReason {
    /// `ENOENT`: built without `CONFIG_TLS`, or its module is not there.
    #[error("this kernel has no TLS (CONFIG_TLS is off, or the module `tls` cannot be loaded)")]
    UlpMissing,
    /// A security module, seccomp filter or missing capability.
    #[error("kernel TLS is not permitted here (errno {0})")]
    Forbidden(i32),
    /// The kernel has TLS and none of our suites.
    #[error("the kernel supports none of our cipher suites")]
    NoSuite,
    /// This connection negotiated a suite the kernel does not have.
    #[error("the kernel does not support the cipher suite of this connection")]
    SuiteUnsupported,
    /// The probe itself failed; the kernel may or may not have TLS.
    #[error("could not find out whether this kernel has TLS (errno {0})")]
    Unknown(i32),
    /// A record went in and did not come out as it should.
    #[error("kernel TLS is present and did not pass a control record correctly")]
    Defective,
    /// The configuration asks for software.
    #[error("the configuration asks for software records")]
    Configured,
}

impl SoftwareReason {
    /// Stable name for logs, metrics and status.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UlpMissing => "ulp-missing",
            Self::Forbidden(_) => "forbidden",
            Self::NoSuite => "no-suite",
            Self::SuiteUnsupported => "suite-unsupported",
            Self::Unknown(_) => "unknown",
            Self::Defective => "defective",
            Self::Configured => "configured",
        }
    }
}

/// Asks the kernel. Blocks for less than a millisecond as a rule, three seconds at most;
/// call it once. Needs the loopback interface up in the current network namespace.
pub fn probe() -> RecordLayer {
    let mut found = KernelSuites::default();
    let mut worst = SoftwareReason::NoSuite;
    for (suite, supported) in [
        (
            CipherSuite::TLS13_AES_128_GCM_SHA256,
            &mut found.aes_128_gcm,
        ),
        (
            CipherSuite::TLS13_AES_256_GCM_SHA384,
            &mut found.aes_256_gcm,
        ),
        (
            CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
            &mut found.chacha20_poly1305,
        ),
    ] {
        match try_suite(suite) {
            Ok(()) => *supported = true,
            // The kernel knows TLS and not this suite.
            Err(Failure::Key(KeyError::Unsupported(_))) => {}
            Err(Failure::Key(KeyError::Os(e)))
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ENOENT | libc::EINVAL | libc::ENOPROTOOPT | libc::EOPNOTSUPP)
                ) => {}
            Err(Failure::Ulp(e)) if e.raw_os_error() == Some(libc::ENOENT) => {
                return RecordLayer::Software(SoftwareReason::UlpMissing);
            }
            Err(Failure::Ulp(e) | Failure::Key(KeyError::Os(e)) | Failure::Setup(e)) => {
                worst = classify(&e);
            }
            Err(Failure::WrongRecord) => worst = SoftwareReason::Defective,
        }
    }
    if found.any() {
        RecordLayer::Kernel(found)
    } else {
        RecordLayer::Software(worst)
    }
}

fn classify(e: &io::Error) -> SoftwareReason {
    let errno = e.raw_os_error().unwrap_or(0);
    match errno {
        libc::EPERM | libc::EACCES => SoftwareReason::Forbidden(errno),
        libc::ENOPROTOOPT => SoftwareReason::UlpMissing,
        _ => SoftwareReason::Unknown(errno),
    }
}

enum Failure {
    Setup(io::Error),
    Ulp(io::Error),
    Key(KeyError),
    WrongRecord,
}

/// One connection, one suite, one control record each way.
fn try_suite(suite: CipherSuite) -> Result<(), Failure> {
    let (a, b) = socket_pair().map_err(Failure::Setup)?;
    for end in [&a, &b] {
        sys::set_ulp_tls(fd(end)).map_err(Failure::Ulp)?;
    }
    let mut material = [0u8; sys::PROBE_KEY];
    random_bytes(&mut material)
        .map_err(|_| Failure::Setup(io::Error::from_raw_os_error(libc::EAGAIN)))?;
    for end in [&a, &b] {
        for direction in [Direction::Tx, Direction::Rx] {
            sys::set_probe_key(fd(end), direction, suite, &material).map_err(Failure::Key)?;
        }
    }
    pass_record(&a, &b)?;
    pass_record(&b, &a)
}

fn pass_record(from: &TcpStream, to: &TcpStream) -> Result<(), Failure> {
    let payload = b"ringfence probe";
    sys::send_record(fd(from), CONTENT_TYPE, payload).map_err(Failure::Setup)?;
    sys::wait_readable(fd(to), Duration::from_secs(1)).map_err(Failure::Setup)?;
    let mut buf = [0u8; 64];
    let got = sys::recv_record(fd(to), &mut buf).map_err(Failure::Setup)?;
    let whole = got.record_type == Some(CONTENT_TYPE) && got.end_of_record;
    if !whole || buf.get(..got.len) != Some(payload.as_slice()) {
        return Err(Failure::WrongRecord);
    }
    Ok(())
}

fn socket_pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let a = TcpStream::connect(listener.local_addr()?)?;
    let (b, from) = listener.accept()?;
    if from != a.local_addr()? {
        // Somebody else on this host was faster; its bytes must not decide.
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    Ok((a, b))
}
