//! Connections and listeners of our own, in a pod: what a program there would see.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::netns::Netns;

/// How a connection attempt ended, as the application sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The server answered.
    Answered(Answered),
    /// `connect` failed.
    NotConnected(ErrorKind),
    /// `connect` succeeded, and then the connection ended without a byte of answer: by an
    /// error, or (`None`) by an end of file.
    Closed(Option<ErrorKind>),
    /// Neither an answer nor an end within the patience.
    Silent,
}

/// An answered connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    /// What `getpeername` said.
    pub peer: SocketAddr,
    /// What `getsockname` said.
    pub local: SocketAddr,
    pub answer: Vec<u8>,
}

impl Outcome {
    /// Refused in a way that an application notices at once.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Outcome::NotConnected(kind) if *kind != ErrorKind::TimedOut)
            || matches!(self, Outcome::Closed(_))
    }
}

/// Connects from `netns` to `address`, sends `request` and reads up to the end of the
/// answer or 64 KiB.
pub fn connect(
    netns: &Netns,
    address: SocketAddr,
    request: &[u8],
    patience: Duration,
) -> Result<Outcome> {
    netns.run(|| attempt(address, request, patience))
}

fn attempt(address: SocketAddr, request: &[u8], patience: Duration) -> Outcome {
    let mut stream = match TcpStream::connect_timeout(&address, patience) {
        Ok(stream) => stream,
        Err(error) => return Outcome::NotConnected(error.kind()),
    };
    // A refusal may arrive before the names are asked for; that is a close, too.
    let names = (stream.peer_addr(), stream.local_addr());
    let read = stream
        .set_read_timeout(Some(patience))
        .and_then(|()| stream.write_all(request))
        .and_then(|()| {
            let mut answer = vec![0u8; 65536];
            let count = stream.read(&mut answer)?;
            answer.truncate(count);
            Ok(answer)
        });
    match (read, names) {
        (Ok(answer), _) if answer.is_empty() => Outcome::Closed(None),
        (Ok(answer), (Ok(peer), Ok(local))) => Outcome::Answered(Answered {
            peer,
            local,
            answer,
        }),
        (Ok(_), _) => Outcome::Closed(Some(ErrorKind::NotConnected)),
        (Err(error), _) => match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Outcome::Silent,
            kind => Outcome::Closed(Some(kind)),
        },
    }
}

/// A listener in a pod on both families that answers the first line of every connection with
/// [`GREETING`] and remembers who it was.
#[derive(Debug)]
pub struct Acceptor {
    accepted: Receiver<SocketAddr>,
    seen: Vec<SocketAddr>,
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
}

pub const GREETING: &[u8] = b"accepted\n";

impl Acceptor {
    pub fn start(netns: &Netns, port: u16) -> Result<Self> {
        let any = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port);
        let listener = netns
            .run(|| TcpListener::bind(any))?
            .with_context(|| format!("listening on port {port} in {}", netns.name()))?;
        listener.set_nonblocking(true)?;
        let (stop, stopped) = UnixStream::pair()?;
        let (sender, accepted) = channel();
        let thread = std::thread::spawn(move || {
            loop {
                let mut ready = [
                    PollFd::new(listener.as_fd(), PollFlags::POLLIN),
                    PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
                ];
                let done = poll(&mut ready, PollTimeout::NONE).is_err();
                if done || ready.last().and_then(PollFd::any).unwrap_or(true) {
                    return;
                }
                while let Ok((stream, peer)) = listener.accept() {
                    let _ = sender.send(canonical(peer));
                    std::thread::spawn(move || greet(stream));
                }
            }
        });
        Ok(Acceptor {
            accepted,
            seen: Vec::new(),
            stop,
            thread: Some(thread),
        })
    }

    /// Peers of all connections accepted so far.
    pub fn accepted(&mut self) -> &[SocketAddr] {
        self.seen.extend(self.accepted.try_iter());
        &self.seen
    }

    /// The next connection that is accepted within `patience`.
    pub fn next(&mut self, patience: Duration) -> Option<SocketAddr> {
        let peer = self.accepted.recv_timeout(patience).ok()?;
        self.seen.push(peer);
        Some(peer)
    }
}

/// Answers a line with the greeting. Nothing is left unread, or the close would be a reset
/// that destroys the greeting. The peer may be gone at any time; it was accepted all the same.
fn greet(stream: TcpStream) {
    let answer = |mut stream: TcpStream| -> std::io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        BufReader::new(&stream).read_line(&mut String::new())?;
        stream.write_all(GREETING)
    };
    let _ = answer(stream);
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        let _ = self.stop.write_all(b"x");
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// IPv4-mapped addresses as IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
