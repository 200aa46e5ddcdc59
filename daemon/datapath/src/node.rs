//! The handle on everything that is loaded.

use std::{
    fmt, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    maps::{Map, MapData, PerCpuArray, SkStorage},
};
use ringfence_bpf_common::{
    Addr, AgentSocket, AppSocket, Backend, BackendKey, Block, Counter, Flow, Handshake,
    IdentityKey, Mask, OriginalDst, Pod, PolicySet, PortKey, Service, ServiceKey, SourceKey,
    SourceMatch, Workload,
};

use crate::{
    DatapathError, Events, attach,
    guard::Guarded,
    judge::Judge,
    pins::Pins,
    policies::Policies,
    services::Services,
    table::{Table, table_error},
};

/// Where things are.
#[derive(Debug, Clone)]
pub struct Options {
    /// A folder on a BPF file system, for example `/sys/fs/bpf/ringfence`; made if it is
    /// missing. Its name must not contain a dot: the kernel reserves them.
    pub pin_dir: PathBuf,
    /// The cgroup v2 whose processes are intercepted; the root of the hierarchy when
    /// `None`.
    pub cgroup: Option<PathBuf>,
}

/// The loaded data path. Dropping it detaches nothing: see [`crate::remove`].
pub struct Datapath {
    pub(crate) pins: Pins,
    pub(crate) pods: Table<u64, Pod>,
    pub(crate) workloads: Table<Addr, Workload>,
    pub(crate) agent_sockets: Table<u64, AgentSocket>,
    pub(crate) original_destinations: Table<Handshake, OriginalDst>,
    pub(crate) accepted: SkStorage<MapData, OriginalDst>,
    pub(crate) last_hops: Table<Flow, u64>,
    pub(crate) plaintext: Table<Flow, u64>,
    pub(crate) guarded: Guarded,
    pub(crate) services: Services,
    pub(crate) policies: Policies,
    pub(crate) judge: Judge,
    counters: PerCpuArray<MapData, u64>,
}

impl Datapath {
    /// Loads the programs and attaches them, taking over what an earlier agent left
    /// pinned.
    pub fn load(options: Options) -> Result<Self, DatapathError> {
        require_capabilities()?;
        let pins = Pins::prepare(&options.pin_dir)?;
        let cgroup = match options.cgroup {
            Some(path) => path,
            None => cgroup_root()?,
        };
        let mut ebpf = attach::load_node(&pins)?;
        require_sizes(&pins)?;
        let datapath = Datapath {
            judge: Judge::default(),
            pods: Table::new("PODS", take(&mut ebpf, "PODS")?)?,
            workloads: Table::new("WORKLOADS", take(&mut ebpf, "WORKLOADS")?)?,
            agent_sockets: Table::new("AGENT_SOCKS", take(&mut ebpf, "AGENT_SOCKS")?)?,
            original_destinations: Table::new("ORIGINAL_DST", take(&mut ebpf, "ORIGINAL_DST")?)?,
            accepted: SkStorage::try_from(take(&mut ebpf, "ACCEPTED")?)
                .map_err(|e| table_error("open", "ACCEPTED", e))?,
            last_hops: Table::new("LAST_HOPS", take(&mut ebpf, "LAST_HOPS")?)?,
            plaintext: Table::new("PLAINTEXT", take(&mut ebpf, "PLAINTEXT")?)?,
            guarded: Guarded::default(),
            services: Services::new(take(&mut ebpf, "SERVICES")?, take(&mut ebpf, "BACKENDS")?)?,
            policies: Policies::new(
                take(&mut ebpf, "POLICY_SETS")?,
                take(&mut ebpf, "POLICY_IDENTITIES")?,
                take(&mut ebpf, "POLICY_PORTS")?,
                take(&mut ebpf, "POLICY_SOURCES")?,
                take(&mut ebpf, "POLICY_BLOCKS")?,
            )?,
            counters: PerCpuArray::try_from(take(&mut ebpf, "COUNTERS")?)
                .map_err(|e| table_error("open", "COUNTERS", e))?,
            pins,
        };
        // What a killed agent was just dialling with.
        for cookie in datapath.agent_sockets.keys()? {
            datapath.agent_sockets.remove(&cookie)?;
        }
        attach::attach_node(&mut ebpf, &datapath.pins, &cgroup)?;
        datapath.judge.keep(ebpf);
        datapath.collect_dead_pods()?;
        Ok(datapath)
    }

    /// The events of the `connect` and `sk_lookup` programs. One reader at a time: two
    /// would share one position in the ring.
    pub fn events(&self) -> Result<Events, DatapathError> {
        Events::open(&self.pins.map("EVENTS"))
    }

    /// The counters since the maps were made, each summed over the CPUs.
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>, DatapathError> {
        Counter::ALL
            .into_iter()
            .map(|counter| Ok((counter.as_str(), self.counter(counter)?)))
            .collect()
    }

    /// One counter.
    pub fn counter(&self, counter: Counter) -> Result<u64, DatapathError> {
        let per_cpu = self
            .counters
            .get(&(counter as u32), 0)
            .map_err(|e| table_error("read", "COUNTERS", e))?;
        Ok(per_cpu
            .iter()
            .fold(0, |sum, count| sum.wrapping_add(*count)))
    }
}

impl fmt::Debug for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Datapath")
            .field("pins", &self.pins)
            .finish_non_exhaustive()
    }
}

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, DatapathError> {
    ebpf.take_map(name).ok_or(DatapathError::Missing { name })
}

/// A pinned map is taken over by its name. Entries of another size would be read and
/// written past the end of ours.
fn require_sizes(pins: &Pins) -> Result<(), DatapathError> {
    const fn of<K, V>(name: &'static str) -> (&'static str, usize, usize) {
        (name, size_of::<K>(), size_of::<V>())
    }
    let sizes = [
        of::<u64, Pod>("PODS"),
        of::<Addr, Workload>("WORKLOADS"),
        of::<u64, AgentSocket>("AGENT_SOCKS"),
        of::<Handshake, OriginalDst>("ORIGINAL_DST"),
        of::<i32, OriginalDst>("ACCEPTED"),
        of::<i32, AppSocket>("SOCKS"),
        of::<Flow, u64>("LAST_HOPS"),
        of::<Flow, u64>("PLAINTEXT"),
        of::<ServiceKey, Service>("SERVICES"),
        of::<BackendKey, Backend>("BACKENDS"),
        of::<u32, PolicySet>("POLICY_SETS"),
        of::<IdentityKey, Mask>("POLICY_IDENTITIES"),
        of::<PortKey, Mask>("POLICY_PORTS"),
        of::<SourceKey, SourceMatch>("POLICY_SOURCES"),
        of::<u32, Block>("POLICY_BLOCKS"),
        of::<u32, u64>("COUNTERS"),
    ];
    for (name, key, value) in sizes {
        let path = pins.map(name);
        let info = MapData::from_pin(&path)
            .and_then(|map| map.info())
            .map_err(|e| table_error("inspect", name, e))?;
        if (info.key_size() as usize, info.value_size() as usize) != (key, value) {
            return Err(DatapathError::OtherLayout { path });
        }
    }
    Ok(())
}

/// Says beforehand what the kernel would only answer with "operation not permitted".
fn require_capabilities() -> Result<(), DatapathError> {
    const NEEDED: [(u32, &str); 3] = [(12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
    const CAP_SYS_ADMIN: u32 = 21;
    let path = Path::new("/proc/self/status");
    let status =
        fs::read_to_string(path).map_err(|source| crate::pins::path_error("read", path, source))?;
    let Some(effective) = effective_capabilities(&status) else {
        // The kernel will say.
        return Ok(());
    };
    let has = |bit: u32| effective & (1 << bit) != 0;
    match NEEDED.into_iter().find(|(bit, _)| !has(*bit)) {
        Some((bit, missing)) if bit == 12 || !has(CAP_SYS_ADMIN) => {
            Err(DatapathError::NotPermitted { missing })
        }
        _ => Ok(()),
    }
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// Where the root of the cgroup v2 hierarchy is mounted: `/sys/fs/cgroup`, or elsewhere
/// on a host that still has version 1 too.
fn cgroup_root() -> Result<PathBuf, DatapathError> {
    let path = Path::new("/proc/self/mountinfo");
    let mounts =
        fs::read_to_string(path).map_err(|source| crate::pins::path_error("read", path, source))?;
    cgroup2_mounts(&mounts)
        .find(|mount| {
            // The root of the hierarchy is the inode 1 of its file system; a container's
            // own part of it is another one.
            fs::metadata(mount).is_ok_and(|metadata| metadata.ino() == 1)
        })
        .ok_or(DatapathError::NoCgroup)
}

/// Mount points of cgroup v2 in `proc_pid_mountinfo(5)`'s format.
fn cgroup2_mounts(mountinfo: &str) -> impl Iterator<Item = PathBuf> + '_ {
    mountinfo.lines().filter_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        if filesystem.split(' ').next() != Some("cgroup2") {
            return None;
        }
        mount.split(' ').nth(4).map(unescape)
    })
}

/// Blanks and backslashes are written as three octal digits.
fn unescape(field: &str) -> PathBuf {
    let unescaped = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(field.to_owned(), |text, (code, character)| {
        text.replace(code, character)
    });
    PathBuf::from(unescaped)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn cgroup_v2_is_found_on_a_hybrid_host() {
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw shared:9 master:2 - cgroup2 cgroup2 rw\n\
                      42 31 0:38 / /mnt/a\\040b rw - cgroup2 none rw\n";
        let found: Vec<_> = cgroup2_mounts(mounts).collect();
        assert_eq!(
            found,
            [Path::new("/sys/fs/cgroup/unified"), Path::new("/mnt/a b")]
        );
    }

    #[test]
    fn no_cgroup_v2_is_no_mount() {
        let mounts = "32 31 0:29 / /cgroup2 rw - cgroup cgroup2 rw,cpu\nnonsense\n";
        assert_eq!(cgroup2_mounts(mounts).count(), 0);
    }

    #[test]
    fn capabilities_are_read() {
        assert_eq!(
            effective_capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n"),
            Some(0x1ff_ffff_ffff)
        );
        assert_eq!(effective_capabilities("CapEff:\tx\n"), None);
        assert_eq!(effective_capabilities(""), None);
    }
}
