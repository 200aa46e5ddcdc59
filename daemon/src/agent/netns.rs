//! Work inside a pod's network namespace: sockets that live there, and the routing that
//! lets the last hop carry the client's own address.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::OnceLock;

use nix::sched::{CloneFlags, setns};
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::{RouteScope, RouteType};
use rtnetlink::packet_route::rule::RuleAction;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::sys;

/// Mark of last-hop segments: it routes them, and the application's replies to them, to
/// the loopback device. It grants nothing: `connect` and `sk_lookup` never look at it.
/// The number keeps away from those of Istio (0x111, 0x539) and Cilium (0x0f00, 0x0a00).
const LAST_HOP_MARK: u32 = 0x5246_0111;
/// Routing table (in the pod) that delivers marked segments locally.
const LAST_HOP_TABLE: u32 = 15_008;
/// Before `main` (32766); 0 is `local`.
const RULE_PRIORITY: u32 = 15_008;
/// `lo` is the first device of every network namespace.
const LOOPBACK_IFINDEX: u32 = 1;

/// A pod's network namespace, kept open.
#[derive(Debug, Clone)]
pub struct Netns {
    file: Arc<File>,
    cookie: u64,
}

impl Netns {
    /// Opens a namespace by its path (`/run/netns/x`, `/proc/PID/ns/net`).
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = Arc::new(File::open(path)?);
        let probe = enter(file.as_fd(), || {
            Socket::new(Domain::IPV4, Type::DGRAM, None)
        })??;
        let cookie = ringfence_datapath::netns_cookie(probe.as_fd())?;
        Ok(Netns { file, cookie })
    }

    /// The kernel's number for this namespace, unique for the life of the machine.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// The open namespace.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether `path` still leads to this namespace. Our own descriptors keep a namespace
    /// alive that its owner has deleted, so its end shows only here.
    pub fn is_at(&self, path: &Path) -> bool {
        let same =
            |a: std::fs::Metadata, b: std::fs::Metadata| a.ino() == b.ino() && a.dev() == b.dev();
        match (std::fs::metadata(path), self.file.metadata()) {
            (Ok(there), Ok(ours)) => same(there, ours),
            _ => false,
        }
    }

    /// Whether this is the namespace with that device and inode number.
    pub fn is(&self, device: u64, inode: u64) -> bool {
        let ours = self.file.metadata();
        ours.is_ok_and(|m| m.dev() == device && m.ino() == inode)
    }

    /// Runs `work` on this thread with the namespace entered.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        enter(self.file.as_fd(), work)
    }

    /// Whether `addr` is one of the namespace's own addresses.
    pub fn owns(&self, addr: IpAddr) -> io::Result<bool> {
        self.enter(|| {
            let socket = Socket::new(Domain::for_address((addr, 0).into()), Type::DGRAM, None)?;
            match socket.bind(&SocketAddr::from((addr, 0)).into()) {
                Ok(()) => Ok(true),
                Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable => Ok(false),
                Err(e) => Err(e),
            }
        })?
    }

    /// A listener on all addresses of one family.
    pub fn listen(&self, any: IpAddr, port: u16) -> io::Result<tokio::net::TcpListener> {
        let socket = self.enter(|| -> io::Result<Socket> {
            let socket = tcp_socket(any)?;
            if any.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            socket.set_reuse_address(true)?;
            socket.bind(&SockAddr::from(SocketAddr::from((any, port))))?;
            socket.listen(4096)?;
            // What a SYN carries comes before its sender has shown that it is there, and
            // before the kernel has noted where the connection was going.
            sys::set_no_fast_open(&socket)?;
            Ok(socket)
        })??;
        tokio::net::TcpListener::from_std(socket.into())
    }

    /// A socket that can be connected from inside the namespace.
    pub fn dial_socket(&self, family: IpAddr) -> io::Result<Socket> {
        self.enter(|| tcp_socket(family))?
    }

    /// A socket for the last hop to the application, bound to the client's own address.
    pub fn last_hop_socket(&self, client: IpAddr) -> io::Result<Socket> {
        let socket = self.dial_socket(client)?;
        match client {
            IpAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
            IpAddr::V6(_) => sys::set_ipv6_transparent(&socket)?,
        }
        socket.set_mark(LAST_HOP_MARK)?;
        sys::set_bind_address_no_port(&socket)?;
        socket.bind(&SockAddr::from(SocketAddr::from((client, 0))))?;
        Ok(socket)
    }

    /// Sets what the last hop needs: marked segments and the replies to them stay inside.
    pub async fn prepare(&self) -> io::Result<()> {
        self.enter(|| {
            for (name, value) in [
                // The accepted socket inherits the mark of the SYN, and with it the route back.
                ("ipv4/tcp_fwmark_accept", "1"),
                // A closed port answers with a RST that needs the same route.
                ("ipv4/fwmark_reflect", "1"),
                ("ipv6/fwmark_reflect", "1"),
                // Many short connections from one client address would run out of ports.
                ("ipv4/tcp_tw_reuse", "1"),
            ] {
                let path = format!("/proc/sys/net/{name}");
                match std::fs::write(&path, value) {
                    // A kernel without IPv6.
                    Err(e) if e.kind() == io::ErrorKind::NotFound && name.starts_with("ipv6") => {}
                    other => other.map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")))?,
                }
            }
            Ok::<_, io::Error>(())
        })??;

        let (connection, handle, _) = self.enter(rtnetlink::new_connection)??;
        let driver = tokio::spawn(connection);
        let result = add_last_hop_routes(&handle).await;
        driver.abort();
        result
    }
}

async fn add_last_hop_routes(handle: &rtnetlink::Handle) -> io::Result<()> {
    let rule = || {
        handle
            .rule()
            .add()
            .fw_mark(LAST_HOP_MARK)
            .table_id(LAST_HOP_TABLE)
            .priority(RULE_PRIORITY)
            .action(RuleAction::ToTable)
    };
    ignore_existing(rule().v4().execute().await)?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .output_interface(LOOPBACK_IFINDEX)
        .table_id(LAST_HOP_TABLE)
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .build();
    ignore_existing(handle.route().add(route).execute().await)?;

    if !ipv6_enabled() {
        return Ok(());
    }
    ignore_existing(rule().v6().execute().await)?;
    let route = RouteMessageBuilder::<Ipv6Addr>::new()
        .output_interface(LOOPBACK_IFINDEX)
        .table_id(LAST_HOP_TABLE)
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .build();
    ignore_existing(handle.route().add(route).execute().await)
}

/// What is already there was made by an earlier agent.
fn ignore_existing(result: Result<(), rtnetlink::Error>) -> io::Result<()> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) => {
            let error = message.to_io();
            if error.raw_os_error() == Some(libc::EEXIST) {
                Ok(())
            } else {
                Err(error)
            }
        }
        other => other.map_err(io::Error::other),
    }
}

/// Whether this kernel has IPv6 at all.
pub fn ipv6_enabled() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

fn tcp_socket(family: IpAddr) -> io::Result<Socket> {
    let domain = Domain::for_address((family, 0).into());
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Enters `netns`, runs `work`, and comes back.
fn enter<T>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T) -> io::Result<T> {
    static HOME: OnceLock<File> = OnceLock::new();
    let home = match HOME.get() {
        Some(home) => home,
        None => {
            let file = File::open("/proc/thread-self/ns/net")?;
            HOME.get_or_init(|| file)
        }
    };
    setns(netns, CloneFlags::CLONE_NEWNET)?;
    let _back = Return(home);
    Ok(work())
}

/// Goes back on drop, so also when `work` unwinds. A thread that cannot come back would
/// run other tasks in the wrong namespace, so the process ends there and then.
struct Return<'a>(&'a File);

impl Drop for Return<'_> {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET) {
            tracing::error!(%error, "cannot leave a pod's network namespace: the agent ends");
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use nix::sched::unshare;
    use std::os::fd::AsRawFd;
    use std::process::Command;

    /// Connections that were accepted with their SYN so far.
    fn fast_opened() -> u64 {
        let text = std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap();
        let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let mut names = names.split(' ');
        let at = names.position(|name| name == "TCPFastOpenPassive");
        values.split(' ').nth(at.unwrap()).unwrap().parse().unwrap()
    }

    #[tokio::test]
    async fn listener_takes_no_data_in_a_syn_though_the_pod_has_all_listeners_do_so() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs root (network namespaces)");
            return;
        }
        const MSG_FASTOPEN: i32 = 0x2000_0000;
        let file = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let up = Command::new("ip")
                .args(["link", "set", "lo", "up"])
                .status();
            assert!(up.unwrap().success());
            // Both ends, without a cookie, without an option of the listener's.
            std::fs::write("/proc/sys/net/ipv4/tcp_fastopen", "1543").unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        })
        .join()
        .unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let netns = Netns::open(Path::new(&path)).unwrap();
        let any = IpAddr::from([127, 0, 0, 1]);
        let send = |to: SocketAddr| {
            let socket = netns.dial_socket(any).unwrap();
            socket.set_nonblocking(false).unwrap();
            let sent = socket.send_to_with_flags(b"early", &to.into(), MSG_FASTOPEN);
            assert_eq!(sent.unwrap(), 5);
            netns.enter(fast_opened).unwrap()
        };
        let ours = netns.listen(any, 15_001).unwrap();
        assert_eq!(send(ours.local_addr().unwrap()), 0);
        let ordinary = netns
            .enter(|| std::net::TcpListener::bind((any, 0)))
            .unwrap();
        assert_eq!(send(ordinary.unwrap().local_addr().unwrap()), 1, "the twin");
    }
}
