//! The agent's own sockets: each is registered under its cookie before it connects, so
//! that the `connect` program knows what it is for.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use ringfence_bpf_common::{AGENT_DIAL, AGENT_LAST_HOP, Addr, AgentSocket};
use ringfence_datapath::{Datapath, DatapathError, socket_cookie};
use socket2::{SockRef, Socket};
use tokio::net::TcpStream;

use super::netns::Netns;

/// How long a TCP connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a connection did not come about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The `connect` program said no (EPERM).
    #[error("refused by policy")]
    Denied,
    /// Nobody listens there.
    #[error("connection refused")]
    Refused,
    /// No answer in time.
    #[error("no answer within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout,
    /// Anything else that the kernel said.
    #[error("{0}")]
    Io(io::Error),
    /// The socket could not be registered.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
}

impl From<io::Error> for ConnectError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::PermissionDenied => ConnectError::Denied,
            io::ErrorKind::ConnectionRefused => ConnectError::Refused,
            io::ErrorKind::TimedOut => ConnectError::Timeout,
            _ => ConnectError::Io(error),
        }
    }
}

/// Dials a peer's tunnel port from inside the pod, from the address the application used.
pub async fn dial(
    datapath: &Datapath,
    netns: &Netns,
    source: IpAddr,
    peer: SocketAddr,
) -> Result<TcpStream, ConnectError> {
    let socket = netns.dial_socket(peer.ip())?;
    if !source.is_unspecified() && source.is_ipv4() == peer.is_ipv4() {
        crate::sys::set_bind_address_no_port(&socket)?;
        socket.bind(&SocketAddr::from((source, 0)).into())?;
    }
    let entry = AgentSocket {
        role: AGENT_DIAL,
        identity: 0,
        source: Addr::NONE,
    };
    start(datapath, &socket, entry, peer)?;
    finish(socket).await
}

/// Begins the last hop to the application, with the client's own address. The kernel
/// judges the peer inside this call; what is left is to wait for the application.
pub fn start_last_hop(
    datapath: &Datapath,
    netns: &Netns,
    identity: u32,
    client: IpAddr,
    application: SocketAddr,
) -> Result<Socket, ConnectError> {
    let socket = netns.last_hop_socket(client)?;
    let entry = AgentSocket {
        role: AGENT_LAST_HOP,
        identity,
        source: Addr::from(client),
    };
    start(datapath, &socket, entry, application)?;
    Ok(socket)
}

fn start(
    datapath: &Datapath,
    socket: &Socket,
    entry: AgentSocket,
    to: SocketAddr,
) -> Result<(), ConnectError> {
    // The program runs inside connect(2): the entry has served when it returns.
    let _registered = datapath.register_socket(socket_cookie(socket.as_fd())?, entry)?;
    match socket.connect(&to.into()) {
        Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => Err(e.into()),
        _ => Ok(()),
    }
}

/// Waits for a connect that was begun.
pub async fn finish(socket: Socket) -> Result<TcpStream, ConnectError> {
    let stream = TcpStream::from_std(socket.into())?;
    match tokio::time::timeout(CONNECT_TIMEOUT, stream.writable()).await {
        Ok(ready) => ready?,
        Err(_) => return Err(ConnectError::Timeout),
    }
    if let Some(error) = stream.take_error()? {
        return Err(error.into());
    }
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Closes with RST: what the application sees of a connection that cannot be served.
pub fn reset(stream: TcpStream) {
    reset_on_close(&stream);
}

/// From now on whatever closes the socket, the death of the agent included, shows as RST
/// and not as a clean end.
pub fn reset_on_close(stream: &TcpStream) {
    if let Err(error) = SockRef::from(stream).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "cannot reset a connection; it is closed instead");
    }
}
