//! Errors, sorted by whose fault they are.

use std::{error::Error, io, iter, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

/// Why the data path cannot do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    // The operator's.
    /// A capability is missing.
    #[error("loading eBPF programs needs {missing}: run as root, or grant the capability")]
    NotPermitted { missing: &'static str },
    /// The pin folder is on another kind of file system.
    #[error(
        "{path} is not on a BPF file system: mount one (mount -t bpf bpf /sys/fs/bpf) or choose a folder below it"
    )]
    NoBpfFs { path: PathBuf },
    /// No root of the cgroup v2 hierarchy is mounted here.
    #[error(
        "the root of the cgroup v2 hierarchy is not mounted in this mount namespace: mount it, or in a container map the host's into it and name it in the configuration"
    )]
    NoCgroup,
    /// Another version's programs and maps are pinned.
    #[error(
        "{path} holds the maps of another Ringfence version, which cannot be taken over: run `ringfence uninstall` first (pods are not protected in between)"
    )]
    OtherLayout { path: PathBuf },
    /// A path or a system call on it.
    #[error("cannot {action} {path}: {source}")]
    Path {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },

    /// The guard at the host side of a pod.
    #[error("cannot {action} the device {device}: {source}")]
    Device {
        action: &'static str,
        device: String,
        source: io::Error,
    },

    // The load's.
    /// A table has no room left.
    #[error("the kernel table {table} is full")]
    Full { table: &'static str },

    // The kernel's.
    /// The kernel refused an object: the verifier's words are in the source.
    #[error(
        "the kernel does not take the eBPF object `{object}` (Linux 6.1 or later is needed): {}",
        chain(source.as_ref())
    )]
    Load {
        object: &'static str,
        source: Box<EbpfError>,
    },
    /// The kernel refused a program or would not attach it.
    #[error(
        "the kernel does not take or attach the eBPF program `{program}` (Linux 6.1 or later is needed): {}",
        chain(source.as_ref())
    )]
    Program {
        program: &'static str,
        source: Box<ProgramError>,
    },
    /// A link would not be pinned or replaced.
    #[error("cannot {action} the link of `{program}`: {source}")]
    Link {
        action: &'static str,
        program: String,
        source: io::Error,
    },
    /// An operation on a map.
    #[error("cannot {action} the kernel table {table}: {}", chain(source.as_ref()))]
    Table {
        action: &'static str,
        table: &'static str,
        source: Box<MapError>,
    },

    /// A run of the program that answers questions left some without an answer.
    #[error("the kernel answered {answered} of {asked} questions about policy")]
    Unanswered { asked: usize, answered: usize },

    /// `sock_diag`, which lists and ends connections.
    #[error(
        "cannot {action} TCP sockets by sock_diag (CONFIG_INET_DIAG, the module tcp_diag): {source}"
    )]
    SocketDiag {
        action: &'static str,
        source: io::Error,
    },
    /// Connections cannot be ended from outside.
    #[error(
        "this kernel cannot end connections (it lacks CONFIG_INET_DIAG_DESTROY): plaintext connections that policy admits no more go on until they close"
    )]
    CannotDestroy,
    /// The programs that ran when the tables changed cannot be waited for.
    #[error("cannot wait for running eBPF programs (membarrier): {source}")]
    Settle { source: io::Error },

    // The caller's.
    /// A prefix longer than the address.
    #[error("a source prefix has {length} bits, an address 128")]
    PrefixTooLong { length: u8 },
    /// Set 0 stands for "no set".
    #[error("policy set 0 is reserved: it stands for a pod without a set")]
    ReservedSet,

    // Ours.
    /// The embedded object and this crate do not belong together.
    #[error("the embedded eBPF object lacks `{name}`: this is a build error")]
    Missing { name: &'static str },
}

/// aya's errors name the call; what the kernel answered is behind them.
fn chain(error: &dyn Error) -> String {
    let causes = iter::successors(error.source(), |error| (*error).source());
    causes.fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        // Some messages hold their source already.
        if text.contains(&cause) {
            text
        } else {
            format!("{text}: {cause}")
        }
    })
}
