//! A pod and the wire it hangs on: two network namespaces that exist as descriptors
//! only, so that nothing is left of them however a test ends.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, setns, unshare};
use ringfence_bpf_common::{Addr, Endpoint, OriginalDst, POD_READY, Pod, WORKLOAD_MESH, Workload};
use ringfence_datapath::{Datapath, Options, netns_cookie};
use ringfence_policies::{CompiledSet, TermMask};
use socket2::{Domain, Protocol, Socket, Type};

pub const POD4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));
pub const POD6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2));
/// A peer on the wire that is in the mesh.
pub const MESH4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 3));
pub const MESH6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 3));
/// A peer on the wire that is not.
pub const PLAIN4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
pub const PLAIN6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1));
/// Addresses of services, which nobody has.
pub const VIP4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));
pub const VIP6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1));

pub const OUTBOUND: u16 = 15001;
pub const INBOUND: u16 = 15008;

pub const SET: u32 = 1;

/// False, with a visible line, where the test cannot run.
pub fn can_run(test: &str) -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    eprintln!("SKIPPED {test}: needs root (network namespaces and eBPF)");
    false
}

/// A network namespace.
pub struct Netns {
    file: File,
}

impl Netns {
    pub fn new() -> Netns {
        let file = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        })
        .join()
        .unwrap();
        let netns = Netns { file };
        netns.ip("link set lo up");
        netns
    }

    /// Runs `work` on a thread inside the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            match inside.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    pub fn ip(&self, arguments: &str) {
        self.run(|| {
            let output = Command::new("ip")
                .args(arguments.split(' '))
                .output()
                .unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "ip {arguments}: {error}");
        });
    }

    pub fn cookie(&self) -> u64 {
        self.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
            netns_cookie(socket.as_fd()).unwrap()
        })
    }

    pub fn listen(&self, addr: SocketAddr) -> TcpListener {
        self.run(|| TcpListener::bind(addr).unwrap_or_else(|e| panic!("listen on {addr}: {e}")))
    }

    /// Connects from inside, as an application does.
    pub fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(3)))
    }

    /// A socket made inside, not yet connected.
    pub fn socket(&self, domain: Domain) -> Socket {
        self.run(|| Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).unwrap())
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }
}

/// A data path of its own, a pod, and the wire.
pub struct Lab {
    pub datapath: Datapath,
    pub pod: Netns,
    pub wire: Netns,
    pub cookie: u64,
    pin_dir: PathBuf,
}

impl Lab {
    /// The pod is not enrolled yet.
    pub fn bare() -> Lab {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let pin_dir = PathBuf::from(format!(
            "/sys/fs/bpf/ringfence-test-{}-{number}",
            std::process::id()
        ));
        let datapath = load(&pin_dir);
        let (pod, wire) = (Netns::new(), Netns::new());
        pod.ip(&format!(
            "link add eth0 type veth peer name eth0 netns {}",
            wire.path()
        ));
        for (netns, addresses) in [
            (&pod, &[POD4, POD6][..]),
            (&wire, &[PLAIN4, PLAIN6, MESH4, MESH6][..]),
        ] {
            netns.ip("link set eth0 up");
            for address in addresses {
                match address {
                    IpAddr::V4(_) => netns.ip(&format!("addr add {address}/24 dev eth0")),
                    IpAddr::V6(_) => netns.ip(&format!("addr add {address}/64 dev eth0 nodad")),
                }
            }
        }
        let cookie = pod.cookie();
        Lab {
            datapath,
            pod,
            wire,
            cookie,
            pin_dir,
        }
    }

    /// An enrolled pod that everybody may talk to, and a peer that is in the mesh.
    pub fn new() -> Lab {
        let lab = Lab::bare();
        for address in [MESH4, MESH6] {
            let workload = Workload {
                flags: WORKLOAD_MESH,
            };
            lab.datapath.put_workload(address.into(), workload).unwrap();
        }
        lab.install(0, &[(0, terms(&[]))]);
        lab.enrol();
        lab
    }

    pub fn enrol(&self) {
        self.datapath
            .enrol(self.pod.file.as_fd(), self.cookie, &self.entry())
            .unwrap();
    }

    pub fn entry(&self) -> Pod {
        Pod {
            policy_set: SET,
            flags: POD_READY,
            addr4: POD4.into(),
            addr6: POD6.into(),
            outbound_port: OUTBOUND,
            inbound_port: INBOUND,
            pad: 0,
        }
    }

    /// A set of ALLOW terms without conditions on sources and ports.
    pub fn install(&self, flags: u32, identities: &[(u32, TermMask)]) {
        self.datapath
            .install_set(SET, &any_connection(flags), identities)
            .unwrap();
    }

    /// What an agent that is started anew does.
    pub fn restart(&mut self) {
        self.datapath = load(&self.pin_dir);
    }

    pub fn pin_dir(&self) -> &PathBuf {
        &self.pin_dir
    }

    /// Routes answers to the last hop's clients back into the pod, as the agent does.
    pub fn route_last_hops(&self) {
        self.pod.run(|| {
            for (name, value) in [
                ("ipv4/tcp_fwmark_accept", "1"),
                ("ipv4/fwmark_reflect", "1"),
                ("ipv6/fwmark_reflect", "1"),
            ] {
                std::fs::write(format!("/proc/sys/net/{name}"), value).unwrap();
            }
        });
        for family in ["-4", "-6"] {
            self.pod
                .ip(&format!("{family} rule add fwmark 0x111/0xfff lookup 100"));
        }
        self.pod.ip("-4 route add local 0.0.0.0/0 dev lo table 100");
        self.pod.ip("-6 route add local ::/0 dev lo table 100");
    }

    /// The agent's listener for redirected connections.
    pub fn agent(&self, address: IpAddr) -> TcpListener {
        self.pod.listen(SocketAddr::new(address, OUTBOUND))
    }

    /// Where the connection of a socket that the agent accepted was going.
    pub fn original(&self, accepted: &impl AsFd) -> Option<OriginalDst> {
        self.datapath.original_destination(accepted.as_fd())
    }

    pub fn counter(&self, name: &str) -> u64 {
        let counters = self.datapath.counters().unwrap();
        counters
            .iter()
            .find(|(counter, _)| *counter == name)
            .unwrap()
            .1
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = ringfence_datapath::remove(&self.pin_dir) {
            eprintln!("{}: {error}", self.pin_dir.display());
        }
    }
}

fn load(pin_dir: &std::path::Path) -> Datapath {
    let options = Options {
        pin_dir: pin_dir.into(),
        cgroup: None,
    };
    Datapath::load(options).unwrap_or_else(|error| panic!("{error}"))
}

pub fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

pub fn endpoint(address: IpAddr, port: u16) -> Endpoint {
    Endpoint::new(Addr::from(address), port)
}

/// Asks until it is so, for what the kernel does on a queue of its own.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    // A SYN that is sent again may be 16 s late; an emulated guest is slow as well.
    for _ in 0..6000 {
        if is_so() {
            return;
        }
        thread::park_timeout(Duration::from_millis(10));
    }
    panic!("not after a minute: {what}");
}

/// `::ffff:a.b.c.d`
pub fn mapped(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
        v6 => v6,
    }
}

/// The terms with these numbers.
pub fn terms(numbers: &[u16]) -> TermMask {
    let mut mask = TermMask::default();
    assert!(numbers.iter().all(|number| mask.set(*number)));
    mask
}

/// A set whose terms hold wherever their identity condition does; none is a DENY term.
pub fn any_connection(flags: u32) -> CompiledSet {
    let all = terms(&(0..256).collect::<Vec<_>>());
    let mut set = CompiledSet::default();
    set.flags = flags;
    set.other_sources = all.clone();
    set.other_ports = all.clone();
    set.destination4 = all.clone();
    set.destination6 = all;
    set
}

pub fn errno<T>(result: io::Result<T>) -> i32 {
    match result {
        Ok(_) => panic!("the connect succeeded"),
        Err(error) => error.raw_os_error().unwrap_or_else(|| panic!("{error}")),
    }
}
