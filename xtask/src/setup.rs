//! Installs what a command lacks, says so in one line each, and leaves alone what is there.
//!
//! Everything that is not a Debian package lives in [`cache_dir`], outside the source tree.

mod apt;
mod kernels;
mod tools;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use apt::{Program, ensure_programs};
pub use kernels::{GuestKernel, KERNELS, ensure_kernel};
pub use tools::{ensure_cargo_deny, ensure_ebpf_toolchain};

/// What the lab itself runs.
pub const LAB: &[Program] = &[
    Program::new("ip", "iproute2"),
    Program::new("ss", "iproute2"),
    Program::new("tc", "iproute2"),
    Program::new("nginx", "nginx-light"),
    Program::new("redis-server", "redis-server"),
    Program::new("redis-cli", "redis-tools"),
    Program::new("iperf3", "iperf3"),
    Program::new("curl", "curl"),
    Program::new("sha256sum", "coreutils"),
    Program::new("openssl", "openssl"),
];

/// What the guest needs on the host.
pub const GUEST: &[Program] = &[
    Program::new("qemu-system-x86_64", "qemu-system-x86"),
    Program::new("busybox", "busybox-static"),
    Program::new("kmod", "kmod"),
    Program::new("depmod", "kmod"),
    Program::new("xz", "xz-utils"),
    Program::new("ldd", "libc-bin"),
    Program::new("nsenter", "util-linux"),
];

/// The load generator of the benchmark.
pub const BENCH: &[Program] = &[Program::new("wrk", "wrk")];

/// `$RINGFENCE_CACHE`, else `$XDG_CACHE_HOME/ringfence`, else `~/.cache/ringfence`.
pub fn cache_dir() -> Result<PathBuf> {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let dir = set("RINGFENCE_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|d| d.join("ringfence")))
        .or_else(|| set("HOME").map(|d| d.join(".cache/ringfence")))
        .context("no place for the cache: set RINGFENCE_CACHE, XDG_CACHE_HOME or HOME")?;
    std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    dir.canonicalize()
        .with_context(|| format!("resolving {}", dir.display()))
}

/// Installs everything that any command could need.
pub fn everything() -> Result<()> {
    ensure_programs(&[LAB, GUEST, BENCH].concat())?;
    ensure_ebpf_toolchain()?;
    for kernel in KERNELS {
        ensure_kernel(kernel)?;
    }
    ensure_cargo_deny()?;
    Ok(())
}

/// The first executable file of that name in `$PATH` or the system folders, which `$PATH`
/// of an ordinary user lacks.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}
