//! Connections that are already there: the TCP sockets of a pod by `sock_diag(7)`, and
//! the end of those that are admitted no more (`SOCK_DESTROY`, which needs a kernel with
//! `CONFIG_INET_DIAG_DESTROY`).

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, SocketAddr, TcpListener},
};

use nix::sys::socket::SockProtocol;
use ringfence_bpf_common::{
    Addr, Endpoint, Flow, POD_READY, POD_REGISTRY_ONLY, Pod, WORKLOAD_MESH, WORKLOAD_REFUSE,
};

use crate::{
    Datapath, DatapathError,
    netlink::{Message, Netlink, number},
    sys,
};

/// How many plaintext connections were ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ended {
    /// Towards the pod: its policy admits them no more.
    pub inbound: usize,
    /// From the pod: their destination is in the mesh now, or the registry does not
    /// know it.
    pub outbound: usize,
}

impl Datapath {
    /// Waits until no program decides by what was in the tables when this was called:
    /// whoever was admitted by it is among the namespace's sockets afterwards.
    pub fn settle(&self) -> Result<(), DatapathError> {
        sys::wait_for_programs().map_err(|source| DatapathError::Settle { source })
    }

    /// Ends the pod's plaintext connections that would be refused if they were made now.
    /// `admits` says what policy says of plaintext from a source to a destination. To be
    /// called after a change of the tables and [`Datapath::settle`].
    ///
    /// A connection that is older than the enrolment is taken for an inbound one when
    /// the pod has a listener on its port. Not touched: what stays inside the pod, last
    /// hops, tunnels.
    pub fn end_refused(
        &self,
        sockets: &mut SocketDiag,
        cookie: u64,
        admits: impl Fn(SocketAddr, SocketAddr) -> bool,
    ) -> Result<Ended, DatapathError> {
        let mut ended = Ended::default();
        let Some(pod) = self.pods.get(&cookie)? else {
            return Ok(ended);
        };
        let registered: Vec<(Flow, u64)> = {
            let all = self.plaintext.entries()?;
            all.into_iter().filter(|(f, _)| f.netns == cookie).collect()
        };
        let sockets_now = sockets.tcp()?;
        let listening: HashSet<u16> = sockets_now
            .iter()
            .filter(|s| s.state == LISTEN)
            .map(|s| s.local.port)
            .collect();
        let passive: HashSet<u64> = registered.iter().map(|(_, cookie)| *cookie).collect();
        let mut alive = HashSet::new();
        for socket in sockets_now.iter().filter(|s| s.state != LISTEN) {
            alive.insert(socket.cookie);
            if socket.remote.addr.is_loopback() || is_own(&pod, &socket.remote.addr) {
                continue;
            }
            let inbound = passive.contains(&socket.cookie)
                || socket.state == SYN_RECEIVED
                || listening.contains(&socket.local.port);
            if inbound {
                let flow = Flow {
                    netns: cookie,
                    source: socket.remote,
                    listener: socket.local,
                };
                if is_agent_port(&pod, socket.local.port) || self.last_hops.get(&flow)?.is_some() {
                    continue;
                }
                let admitted = pod.flags & POD_READY != 0
                    && admits(address(&socket.remote), address(&socket.local));
                if !admitted {
                    ended.inbound += usize::from(sockets.destroy(socket)?);
                } else if !passive.contains(&socket.cookie) && socket.state != SYN_RECEIVED {
                    // So that the guard lets its answers out.
                    self.plaintext.put(&flow, &socket.cookie)?;
                }
            } else if self.refuses(&pod, &socket.remote)? {
                ended.outbound += usize::from(sockets.destroy(socket)?);
            }
        }
        // The kernel removes what it registered; what is registered here it does not know.
        for (flow, socket) in registered {
            if !alive.contains(&socket) && self.plaintext.get(&flow)? == Some(socket) {
                self.plaintext.remove(&flow)?;
            }
        }
        Ok(ended)
    }

    /// The pod's plaintext connections from the wire that were admitted and are still
    /// registered: client and application.
    pub fn plaintext_connections(
        &self,
        cookie: u64,
    ) -> Result<Vec<(SocketAddr, SocketAddr)>, DatapathError> {
        let flows = self.plaintext.keys()?.into_iter();
        let own = flows.filter(|flow| flow.netns == cookie);
        Ok(own
            .map(|flow| (address(&flow.source), address(&flow.listener)))
            .collect())
    }

    /// Whether the pod may not be connected to `remote` in plaintext.
    fn refuses(&self, pod: &Pod, remote: &Endpoint) -> Result<bool, DatapathError> {
        Ok(match self.workloads.get(&remote.addr)? {
            Some(workload) => {
                workload.flags & (WORKLOAD_MESH | WORKLOAD_REFUSE) != 0
                    && remote.port != pod.inbound_port
            }
            // Made before `connect` chose backends: nobody knows to which one it goes.
            None if self.services.contains(remote) => true,
            None => {
                pod.flags & (POD_REGISTRY_ONLY | POD_READY) == POD_REGISTRY_ONLY | POD_READY
                    && remote.port != pod.inbound_port
            }
        })
    }
}

/// The sockets of one network namespace: that of the thread that opened this.
#[derive(Debug)]
pub struct SocketDiag {
    netlink: Netlink,
}

impl SocketDiag {
    /// Opens it in the calling thread's network namespace.
    pub fn open() -> Result<Self, DatapathError> {
        let netlink = Netlink::open(SockProtocol::NetlinkSockDiag).map_err(failed("open"))?;
        Ok(SocketDiag { netlink })
    }

    /// Whether this kernel can end connections. Tried on a listener made for it.
    pub fn probe() -> Result<(), DatapathError> {
        let listener =
            TcpListener::bind((IpAddr::from([127, 0, 0, 1]), 0)).map_err(failed("try"))?;
        let own = listener.local_addr().map_err(failed("try"))?;
        let mut sockets = SocketDiag::open()?;
        let own = sockets
            .tcp()?
            .into_iter()
            .find(|s| s.state == LISTEN && address(&s.local) == own);
        match own {
            Some(own) if sockets.destroy(&own)? => Ok(()),
            _ => Err(failed("try")(io::ErrorKind::NotFound.into())),
        }
    }

    /// All TCP sockets but those that only wait for stray segments.
    fn tcp(&mut self) -> Result<Vec<TcpSocket>, DatapathError> {
        /// All states but TIME_WAIT and CLOSE.
        const STATES: u32 = 0x1fff & !(1 << 6) & !(1 << 7) & !1;
        let mut sockets = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let request = request(family as u8, STATES, &[0; ID]);
            let answers = self.netlink.dump(BY_FAMILY, &request);
            // A kernel without IPv6.
            let answers = match answers {
                Err(error)
                    if family == libc::AF_INET6 && error.raw_os_error() == Some(libc::ENOENT) =>
                {
                    continue;
                }
                other => other.map_err(failed("list"))?,
            };
            sockets.extend(answers.iter().filter_map(TcpSocket::parse));
        }
        Ok(sockets)
    }

    /// Ends a connection: its application gets ECONNABORTED, the other end a reset. False
    /// when it has ended already.
    fn destroy(&mut self, socket: &TcpSocket) -> Result<bool, DatapathError> {
        let request = request(socket.family, u32::MAX, &socket.id);
        match self.netlink.request(DESTROY, 0, &request) {
            Ok(_) => Ok(true),
            // Gone, or another socket has its addresses now.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => {
                Ok(false)
            }
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Err(DatapathError::CannotDestroy)
            }
            Err(error) => Err(failed("end")(error)),
        }
    }
}

const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
const LISTEN: u8 = 10;
const SYN_RECEIVED: u8 = 3;
/// Bytes of `struct inet_diag_sockid`.
const ID: usize = 48;

/// One line of the answer (`struct inet_diag_msg`).
#[derive(Debug, PartialEq, Eq)]
struct TcpSocket {
    family: u8,
    state: u8,
    local: Endpoint,
    remote: Endpoint,
    /// `SO_COOKIE`
    cookie: u64,
    /// Names the socket in a request.
    id: [u8; ID],
}

impl TcpSocket {
    fn parse(message: &Message) -> Option<Self> {
        if message.kind != BY_FAMILY {
            return None;
        }
        let (head, rest) = message.payload.split_first_chunk::<4>()?;
        let id: [u8; ID] = *rest.first_chunk()?;
        let [family, state, _, _] = *head;
        let addr = |at: usize| {
            let bytes = id.get(at..)?;
            if i32::from(family) == libc::AF_INET {
                Some(Addr::v4(*bytes.first_chunk()?))
            } else {
                Some(Addr(*bytes.first_chunk()?))
            }
        };
        let port = |at: usize| Some(u16::from_be_bytes(*id.get(at..)?.first_chunk()?));
        Some(TcpSocket {
            family,
            state,
            local: Endpoint::new(addr(4)?, port(0)?),
            remote: Endpoint::new(addr(20)?, port(2)?),
            cookie: u64::from(number(id.get(40..)?)?) | u64::from(number(id.get(44..)?)?) << 32,
            id,
        })
    }
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let mut request = vec![family, libc::IPPROTO_TCP as u8, 0, 0];
    request.extend(states.to_ne_bytes());
    request.extend(id);
    request
}

fn is_own(pod: &Pod, addr: &Addr) -> bool {
    *addr == pod.addr4 || *addr == pod.addr6
}

fn is_agent_port(pod: &Pod, port: u16) -> bool {
    port == pod.inbound_port || port == pod.outbound_port
}

fn address(endpoint: &Endpoint) -> SocketAddr {
    SocketAddr::new(IpAddr::from(endpoint.addr), endpoint.port)
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> DatapathError {
    move |source| DatapathError::SocketDiag { action, source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn socket_is_read_in_its_layout() {
        let mut payload = vec![libc::AF_INET as u8, 1, 0, 0];
        payload.extend(8080u16.to_be_bytes());
        payload.extend(40000u16.to_be_bytes());
        payload.extend([10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        payload.extend([10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        payload.extend(0u32.to_ne_bytes());
        payload.extend(7u32.to_ne_bytes());
        payload.extend(1u32.to_ne_bytes());
        payload.extend([0; 20]);
        let mut message = Message {
            kind: BY_FAMILY,
            payload,
        };
        let socket = TcpSocket::parse(&message).unwrap();
        assert_eq!(address(&socket.local), "10.0.0.1:8080".parse().unwrap());
        assert_eq!(address(&socket.remote), "10.0.0.2:40000".parse().unwrap());
        assert_eq!((socket.state, socket.cookie), (1, 7 | 1 << 32));
        assert_eq!(request(2, 0, &socket.id).len(), 56);
        message.payload.truncate(51);
        assert_eq!(TcpSocket::parse(&message), None);
    }

    #[test]
    fn kernel_that_can_end_connections_says_so() {
        if nix::unistd::geteuid().is_root() {
            SocketDiag::probe().unwrap();
        }
    }
}
