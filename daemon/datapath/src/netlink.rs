//! Netlink (RFC 3549), as far as devices, packet classifiers and `sock_diag` need it:
//! requests, dumps, attributes. Numbers are in the machine's byte order.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
        sockopt,
    },
    time::{TimeVal, TimeValLike},
};

/// `NLM_F_CREATE`, `NLM_F_EXCL`: make what is missing; refuse what is there.
pub(crate) const CREATE: u16 = 0x400;
pub(crate) const EXCLUSIVE: u16 = 0x200;

/// A netlink socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Netlink {
    fd: OwnedFd,
    sequence: u32,
}

/// An answer: its type and what follows the header.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) kind: u16,
    pub(crate) payload: Vec<u8>,
}

impl Netlink {
    pub(crate) fn open(protocol: SockProtocol) -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )?;
        // The kernel answers inside the call; a wait without an end would be a kernel's bug.
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(10))?;
        Ok(Netlink { fd, sequence: 0 })
    }

    /// One request, and the answers to it.
    pub(crate) fn request(
        &mut self,
        kind: u16,
        flags: u16,
        payload: &[u8],
    ) -> io::Result<Vec<Message>> {
        const ACKNOWLEDGE: u16 = 4;
        self.exchange(kind, flags | ACKNOWLEDGE, payload)
    }

    /// Everything that matches.
    pub(crate) fn dump(&mut self, kind: u16, payload: &[u8]) -> io::Result<Vec<Message>> {
        const DUMP: u16 = 0x300;
        /// Something changed meanwhile: what was listed is no state that ever was.
        const ATTEMPTS: usize = 10;
        for _ in 0..ATTEMPTS {
            match self.exchange(kind, DUMP, payload) {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                other => return other,
            }
        }
        Err(io::Error::from_raw_os_error(libc::EINTR))
    }

    fn exchange(&mut self, kind: u16, flags: u16, payload: &[u8]) -> io::Result<Vec<Message>> {
        const REQUEST: u16 = 1;
        self.sequence = self.sequence.wrapping_add(1);
        let length = u32::try_from(HEADER + payload.len()).map_err(io::Error::other)?;
        let mut request = Vec::with_capacity(HEADER + payload.len());
        request.extend(length.to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend((flags | REQUEST).to_ne_bytes());
        request.extend(self.sequence.to_ne_bytes());
        request.extend(0u32.to_ne_bytes());
        request.extend(payload);
        send(self.fd.as_raw_fd(), &request, MsgFlags::empty())?;

        let mut answers = Vec::new();
        let mut interrupted = false;
        // The kernel's dumps fill at most 32 KiB at a time.
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let length = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC)?;
            let Some(received) = buffer.get(..length) else {
                return Err(malformed("an answer is longer than the buffer"));
            };
            for answer in Answers(received) {
                let Answer {
                    sequence,
                    flags,
                    message,
                } = answer?;
                // The rest of an exchange that failed.
                if sequence != self.sequence {
                    continue;
                }
                interrupted |= flags & INTERRUPTED != 0;
                match message.kind {
                    DONE | ERROR => {
                        let code = number(&message.payload).unwrap_or_default();
                        return match code.cast_signed() {
                            0 if interrupted => Err(io::Error::from_raw_os_error(libc::EINTR)),
                            0 => Ok(answers),
                            code => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
                        };
                    }
                    _ => answers.push(message),
                }
            }
        }
    }
}

/// The attributes in `bytes`: type and value. Ends at one that is malformed.
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    /// The two highest bits are flags.
    const TYPE: u16 = 0x3fff;
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
        let value = rest.get(4..length)?;
        rest = rest.get(aligned(length)..).unwrap_or_default();
        Some((kind & TYPE, value))
    })
}

/// The value of one attribute.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes)
        .find(|(k, _)| *k == kind)
        .map(|(_, value)| value)
}

/// Appends an attribute. Its value is one of ours and short.
pub(crate) fn push(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = 4 + value.len();
    bytes.extend((length as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len() + aligned(length) - length, 0);
}

/// The 32-bit number at the beginning.
pub(crate) fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.first_chunk()?))
}

/// `struct nlmsghdr`.
const HEADER: usize = 16;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const INTERRUPTED: u16 = 0x10;

struct Answer {
    sequence: u32,
    flags: u16,
    message: Message,
}

/// The messages of one datagram.
struct Answers<'a>(&'a [u8]);

impl Iterator for Answers<'_> {
    type Item = io::Result<Answer>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let answer = self.parse();
        if answer.is_none() {
            self.0 = &[];
        }
        Some(answer.ok_or_else(|| malformed("an answer ends in the middle")))
    }
}

impl Answers<'_> {
    fn parse(&mut self) -> Option<Answer> {
        let length = usize::try_from(number(self.0)?).ok()?;
        let answer = Answer {
            sequence: number(self.0.get(8..)?)?,
            flags: u16::from_ne_bytes(*self.0.get(6..)?.first_chunk()?),
            message: Message {
                kind: u16::from_ne_bytes(*self.0.get(4..)?.first_chunk()?),
                payload: self.0.get(HEADER..length)?.to_vec(),
            },
        };
        self.0 = self.0.get(aligned(length)..).unwrap_or_default();
        Some(answer)
    }
}

/// Messages and attributes begin at multiples of four.
fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn attributes_are_read_as_they_were_written() {
        let mut bytes = Vec::new();
        push(&mut bytes, 3, b"eth0\0");
        push(&mut bytes, 5 | 0x8000, &7u32.to_ne_bytes());
        assert_eq!(bytes.len(), 12 + 8);
        let read: Vec<_> = attributes(&bytes).collect();
        assert_eq!(read, [(3, &b"eth0\0"[..]), (5, &7u32.to_ne_bytes())]);
        assert_eq!(attribute(&bytes, 5).and_then(number), Some(7));
        assert_eq!(attribute(&bytes, 4), None);
    }

    #[test]
    fn malformed_attributes_end_the_list() {
        for bytes in [
            &[0u8; 3][..],
            &[0; 4],
            &[3, 0, 1, 0],
            &[9, 0, 1, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
    }

    #[test]
    fn malformed_answers_are_errors_and_end() {
        for bytes in [
            &[0u8; 15][..],
            &[0; 16],
            &[17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            let read: Vec<_> = Answers(bytes).collect();
            assert_eq!(read.len(), 1, "{bytes:?}");
            assert!(read.iter().all(Result::is_err));
        }
    }

    #[test]
    fn own_devices_are_listed_and_an_unknown_request_is_an_error() {
        let mut netlink = Netlink::open(SockProtocol::NetlinkRoute).unwrap();
        // RTM_GETLINK
        assert!(!netlink.dump(18, &[0; 16]).unwrap().is_empty());
        let error = netlink.request(0x7fff, 0, &[0; 16]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
        // The socket is usable afterwards.
        assert!(!netlink.dump(18, &[0; 16]).unwrap().is_empty());
    }
}
