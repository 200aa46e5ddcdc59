//! Listens on an interface of a namespace (packet(7)) and keeps every packet.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};

use crate::netns::Netns;
use crate::sys;

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    thread: JoinHandle<Result<Vec<Vec<u8>>>>,
    stop: UnixStream,
}

/// Everything up to the largest packet that segmentation offload makes on a veth.
const LARGEST_PACKET: usize = 256 * 1024;
const BUFFER: usize = 256 << 20;

impl Capture {
    /// Captures both directions on `interface` of `netns`; on return nothing is missed.
    pub fn start(netns: &Netns, interface: &str) -> Result<Self> {
        let name = interface.to_owned();
        let socket = netns
            .run(move || -> Result<OwnedFd> {
                let index = nix::net::if_::if_nametoindex(name.as_str())
                    .with_context(|| format!("there is no interface {name}"))?;
                let socket = socket(
                    AddressFamily::Packet,
                    SockType::Raw,
                    SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                    SockProtocol::EthAll,
                )?;
                setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
                sys::bind_packet_socket(&socket, index)?;
                // What other interfaces sent between `socket` and `bind` is not ours.
                let mut buffer = vec![0u8; LARGEST_PACKET];
                while recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).is_ok() {}
                sys::packets_dropped(&socket)?;
                Ok(socket)
            })?
            .context("opening a packet socket")?;
        let (stop, stopped) = UnixStream::pair()?;
        let thread = std::thread::spawn(move || receive(&socket, &stopped));
        Ok(Capture { thread, stop })
    }

    /// Ends the capture and returns the frames. A capture that lost one is an error: what
    /// it does not show proves nothing.
    pub fn stop(mut self) -> Result<Vec<Vec<u8>>> {
        self.stop.write_all(b"x")?;
        self.thread
            .join()
            .map_err(|_| anyhow!("the capture's thread panicked"))?
    }
}

fn receive(socket: &OwnedFd, stopped: &UnixStream) -> Result<Vec<Vec<u8>>> {
    let mut frames = Vec::new();
    let mut buffer = vec![0u8; LARGEST_PACKET];
    loop {
        let mut ready = [
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut ready, PollTimeout::NONE)?;
        // Read before draining: what was sent before the stop is in the socket by now.
        let last = ready.last().and_then(PollFd::any).unwrap_or(false);
        loop {
            match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC) {
                Ok(length) => {
                    let frame = buffer
                        .get(..length)
                        .context("a packet larger than the buffer")?;
                    frames.push(frame.to_vec());
                }
                Err(Errno::EAGAIN) => break,
                Err(error) => return Err(error).context("receiving from the packet socket"),
            }
        }
        if last {
            let dropped = sys::packets_dropped(socket)?;
            ensure!(dropped == 0, "the capture lost {dropped} packets");
            return Ok(frames);
        }
    }
}

/// Whether any frame holds `marker`.
pub fn frames_with(frames: &[Vec<u8>], marker: &[u8]) -> usize {
    frames
        .iter()
        .filter(|frame| contains(frame, marker))
        .count()
}

/// Whether `haystack` holds `needle`; the empty needle is in nothing.
pub fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    !needle.is_empty()
        && haystack
            .windows(needle.len())
            .any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::contains;

    #[test]
    fn a_marker_is_found_wherever_it_is() {
        assert!(contains(b"xxmarker", b"marker"));
        assert!(!contains(b"xxmarke", b"marker"));
        assert!(!contains(b"xx", b""));
    }
}
