//! Keeping private keys out of core dumps.

use std::io;

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};

/// Makes sure that no core dump of this process holds a key. Call it before the
/// first key is there.
///
/// Keys are in the memory of aws-lc, which cannot be told where to allocate, so
/// the whole process is kept out, three times over: it is not dumpable
/// (`PR_SET_DUMPABLE`: no core file or pipe, and neither `ptrace` nor
/// `/proc/PID/mem` for others of the same user), its core files have no size
/// (`RLIMIT_CORE`, soft and hard), and whoever dumps it all the same (`gcore`, or
/// the kernel after an `execve` made it dumpable again) leaves its memory out
/// (`/proc/self/coredump_filter`, which gdb honours, too). Child processes
/// inherit the last two, and the first until they `execve`.
///
/// No protection from root, who reads memory as it is, nor from swap.
///
/// All three are tried, whatever becomes of the others; the error is that of the
/// first that failed.
pub fn keep_out_of_dumps() -> Result<(), DumpError> {
    // First: the file belongs to root once the process is not dumpable.
    let filter = leave_memory_out();
    let size = no_size();
    not_dumpable().and(size).and(filter)
}

fn not_dumpable() -> Result<(), DumpError> {
    prctl::set_dumpable(false).map_err(|error| DumpError::new("PR_SET_DUMPABLE", error))
}

fn no_size() -> Result<(), DumpError> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(|error| DumpError::new("RLIMIT_CORE", error))
}

fn leave_memory_out() -> Result<(), DumpError> {
    std::fs::write(FILTER, "0").map_err(|error| DumpError::new(FILTER, error))
}

/// The kernel did not do as told: a core dump may hold keys.
#[derive(Debug, thiserror::Error)]
#[error("a core dump of this process may hold private keys: {what}: {source}")]
pub struct DumpError {
    what: &'static str,
    source: io::Error,
}

impl DumpError {
    fn new(what: &'static str, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        Self { what, source }
    }
}

/// proc(5): a bit for each kind of mapping that a dump includes.
const FILTER: &str = "/proc/self/coredump_filter";

/// Real core dumps of a child process that holds a key, searched for it.
#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::io::{Read as _, Write as _};
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Command, Stdio};
    use std::time::SystemTime;

    use rcgen::KeyPair;
    use rustls_pki_types::PrivateKeyDer;
    use zeroize::Zeroizing;

    use nix::sys::resource::getrlimit;

    use super::*;
    use crate::svid::Svid;
    use crate::testing::{LeafParams, TestCa, workload};

    const CHILD: &str = "RINGFENCE_TEST_DUMP";

    /// Runs in the child only: holds a key, as an agent does, and dies.
    #[test]
    fn child() {
        let Ok(protection) = std::env::var(CHILD) else {
            return;
        };
        let (_, hard) = getrlimit(Resource::RLIMIT_CORE).unwrap();
        setrlimit(Resource::RLIMIT_CORE, hard, hard).unwrap();
        match protection.as_str() {
            "none" => {}
            "all" => keep_out_of_dumps().unwrap(),
            "not dumpable" => not_dumpable().unwrap(),
            "no size" => no_size().unwrap(),
            "memory left out" => leave_memory_out().unwrap(),
            other => panic!("{other}"),
        }
        let mut der = Zeroizing::new(Vec::with_capacity(4096));
        let mut stdin = std::fs::File::open("/dev/stdin").unwrap();
        stdin.read_to_end(&mut der).unwrap();
        let identity = workload("td", "a", "b");
        let pair = KeyPair::try_from(der.as_slice()).unwrap();
        let chain = TestCa::new("td").chain_for(&LeafParams::good(&identity), &pair);
        drop(pair);
        let key = PrivateKeyDer::Pkcs8(der.as_slice().into());
        let svid = Svid::from_der(identity.spiffe_id(), chain, &key, SystemTime::now());
        drop(key);
        drop(der);
        assert!(svid.is_ok());
        std::process::abort();
    }

    /// The core of a child, and whether the key is in it.
    fn dump(protection: &str) -> Option<bool> {
        let pair = KeyPair::generate().unwrap();
        let der = pair.serialize_der();
        // PKCS#8 of a P-256 key: the 32 bytes behind OCTET STRING, length 32.
        let at = der.windows(2).position(|w| w == [4, 32]).unwrap() + 2;
        let scalar = der[at..at + 32].to_vec();
        // aws-lc has it in words, the least significant first.
        let reversed: Vec<u8> = scalar.iter().rev().copied().collect();

        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "dumps::tests::child", "--nocapture"])
            .env(CHILD, protection)
            .current_dir(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&der).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(6), "{protection}: {status}");
        let core = std::fs::read_dir(&folder).unwrap().next()?.unwrap();
        assert!(status.core_dumped());
        let core = std::fs::read(core.path()).unwrap();
        assert!(core.starts_with(b"\x7fELF"));
        let holds = |needle: &[u8]| core.windows(needle.len()).any(|w| w == needle);
        Some(holds(&scalar) || holds(&reversed))
    }

    /// Whether the kernel writes cores where a test can find them.
    fn cores_are_files() -> bool {
        let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
        let relative = !pattern.starts_with(['|', '/', '@']) && !pattern.trim().is_empty();
        let (_, most) = getrlimit(Resource::RLIMIT_CORE).unwrap();
        let possible = relative && most > 1 << 30;
        if !possible {
            eprintln!("SKIPPED: core_pattern is {pattern:?}, cores may have {most} bytes");
        }
        possible
    }

    #[test]
    fn no_dump_of_a_protected_process_has_a_key() {
        if !cores_are_files() {
            return;
        }
        assert_eq!(dump("none"), Some(true), "the search finds nothing");
        assert_eq!(dump("all"), None);
        // Each by itself is enough.
        assert_eq!(dump("not dumpable"), None);
        assert_eq!(dump("no size"), None);
        assert_eq!(dump("memory left out"), Some(false));
    }
}
