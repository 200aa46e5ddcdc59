//! Control messages of `ringfence/1`: the pure codec.
//!
//! A control message is the whole plaintext of one TLS 1.3 record whose inner
//! content type is [`CONTENT_TYPE`]. The layout is specified byte by byte in
//! `docs/protocol.md`; this module is its only implementation.
//!
//! [`decode`] takes bytes and returns a message or a typed error: no I/O, no
//! state, no allocation, so it can be fuzzed as it stands. The per-direction
//! counter is checked by [`Receiver`], which is plain data: a restarted agent can
//! rebuild it from two integers.
//!
//! It does *not* decide whether a message is allowed at this point of a stream:
//! that is the job of `tunnel` and `relay`.

mod counter;
mod error;
mod reason;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub use self::counter::{MAX_DUPLICATES, Receiver, Sender};
pub use self::error::ProtocolError;
pub use self::reason::{RefuseReason, ResetReason};
use crate::pool::random_bytes;

/// The ALPN protocol name of this version of the protocol.
pub const ALPN: &[u8] = b"ringfence/1";

/// Inner TLS content type of a control record. Unassigned by IANA (TLS
/// ContentType registry: 64-255 are left to DTLS demultiplexing rules, which do
/// not apply on TCP; 90 is in no use).
pub const CONTENT_TYPE: u8 = 0x5a;

/// Longest control message, header included, in bytes.
pub const MAX_MESSAGE: usize = 4096;

/// Length of the fixed header: type 1, zero 1, body length 2, counter 8.
pub const HEADER: usize = 12;

/// Sixteen random bytes that name a stream in logs on both nodes. Not a secret.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct StreamId([u8; 16]);

impl StreamId {
    /// A fresh id from the system's random source.
    pub fn random() -> Result<Self, RandomUnavailable> {
        let mut id = [0; 16];
        random_bytes(&mut id)?;
        Ok(Self(id))
    }

    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The operating system gave no random bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the operating system gave no random bytes; no stream id can be made")]
pub struct RandomUnavailable;

/// What the client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    pub stream: StreamId,
    /// Where the stream shall end: an address of a workload behind the server.
    pub destination: SocketAddr,
    /// The address the client application spoke from.
    pub source: SocketAddr,
    /// Reserved; zero in this version. A receiver ignores bits it does not know.
    pub flags: u32,
}

impl Open {
    /// An `OPEN` with a fresh stream id and no flags.
    pub fn new(destination: SocketAddr, source: SocketAddr) -> Result<Self, RandomUnavailable> {
        Ok(Self {
            stream: StreamId::random()?,
            destination,
            source,
            flags: 0,
        })
    }
}

/// One control message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// Server: keys are installed, application bytes may come.
    Ready,
    Open(Open),
    Opened {
        stream: StreamId,
    },
    Refused {
        stream: StreamId,
        reason: RefuseReason,
    },
    /// The sender's direction of the stream is complete (FIN).
    End {
        stream: StreamId,
    },
    /// Both directions of the stream are void (RST).
    Reset {
        stream: StreamId,
        reason: ResetReason,
    },
}

impl Message {
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Ready => Kind::Ready,
            Self::Open(_) => Kind::Open,
            Self::Opened { .. } => Kind::Opened,
            Self::Refused { .. } => Kind::Refused,
            Self::End { .. } => Kind::End,
            Self::Reset { .. } => Kind::Reset,
        }
    }
}

/// Message types, with the numbers reserved for migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Ready = 1,
    Open = 2,
    Opened = 3,
    Refused = 4,
    End = 5,
    Reset = 6,
    /// Reserved: last record of a direction on the old tunnel.
    Move = 7,
    /// Reserved: opens a moved direction on the new tunnel.
    Attach = 8,
    /// Reserved: answer to `Attach`.
    Attached = 9,
    /// Reserved: the server asks the client to migrate.
    Reauth = 10,
}

impl Kind {
    const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Ready,
            2 => Self::Open,
            3 => Self::Opened,
            4 => Self::Refused,
            5 => Self::End,
            6 => Self::Reset,
            7 => Self::Move,
            8 => Self::Attach,
            9 => Self::Attached,
            10 => Self::Reauth,
            _ => return None,
        })
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "READY",
            Self::Open => "OPEN",
            Self::Opened => "OPENED",
            Self::Refused => "REFUSED",
            Self::End => "END",
            Self::Reset => "RESET",
            Self::Move => "MOVE",
            Self::Attach => "ATTACH",
            Self::Attached => "ATTACHED",
            Self::Reauth => "REAUTH",
        }
    }
}

/// Longest message this version sends: header and every field of `OPEN`.
pub const MAX_SENT: usize = HEADER + (4 + 16) + (4 + 18) + (4 + 18) + (4 + 4);

/// An encoded message. Lives on the stack: sending a control record allocates
/// nothing.
#[derive(Clone, Copy)]
pub struct Encoded {
    bytes: [u8; MAX_SENT],
    len: usize,
}

impl fmt::Debug for Encoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Encoded").field(&self.as_bytes()).finish()
    }
}

impl Encoded {
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }

    fn put(&mut self, part: &[u8]) {
        // Every message fits: MAX_SENT is the sum of all fields we have.
        if let Some(room) = self.bytes.get_mut(self.len..self.len + part.len()) {
            room.copy_from_slice(part);
            self.len += part.len();
        }
    }

    fn field(&mut self, field: u16, value: &[u8]) {
        self.put(&field.to_be_bytes());
        self.put(&(value.len() as u16).to_be_bytes());
        self.put(value);
    }

    fn address(&mut self, field: u16, addr: SocketAddr) {
        let mut value = [0u8; 18];
        let (value, port) = match addr.ip().to_canonical() {
            IpAddr::V4(ip) => {
                value[..4].copy_from_slice(&ip.octets());
                value[..6].split_at_mut(4)
            }
            IpAddr::V6(ip) => {
                value[..16].copy_from_slice(&ip.octets());
                value.split_at_mut(16)
            }
        };
        port.copy_from_slice(&addr.port().to_be_bytes());
        self.put(&field.to_be_bytes());
        self.put(&((value.len() + port.len()) as u16).to_be_bytes());
        self.put(value);
        self.put(port);
    }
}

/// Encodes `message` as number `counter` of its direction.
///
/// IPv4-mapped IPv6 addresses are written as IPv4: there is one encoding of each
/// address.
pub fn encode(message: &Message, counter: u64) -> Encoded {
    let mut out = Encoded {
        bytes: [0; MAX_SENT],
        len: 0,
    };
    out.put(&[message.kind() as u8, 0, 0, 0]);
    out.put(&counter.to_be_bytes());
    match *message {
        Message::Ready => {}
        Message::Open(open) => {
            out.field(F_STREAM, open.stream.as_bytes());
            out.address(F_DESTINATION, open.destination);
            out.address(F_SOURCE, open.source);
            out.field(F_FLAGS, &open.flags.to_be_bytes());
        }
        Message::Opened { stream } | Message::End { stream } => {
            out.field(F_STREAM, stream.as_bytes());
        }
        Message::Refused { stream, reason } => {
            out.field(F_STREAM, stream.as_bytes());
            out.field(F_REASON, &reason.code().to_be_bytes());
        }
        Message::Reset { stream, reason } => {
            out.field(F_STREAM, stream.as_bytes());
            out.field(F_REASON, &reason.code().to_be_bytes());
        }
    }
    let body = (out.len - HEADER) as u16;
    out.bytes[2..4].copy_from_slice(&body.to_be_bytes());
    out
}

/// Decodes the whole plaintext of one control record: the message and its counter.
///
/// Pure and total: any input gives a message or a [`ProtocolError`].
pub fn decode(record: &[u8]) -> Result<(Message, u64), ProtocolError> {
    if record.len() > MAX_MESSAGE {
        return Err(ProtocolError::TooLong);
    }
    let Some((header, body)) = record.split_first_chunk::<HEADER>() else {
        return Err(ProtocolError::Truncated { len: record.len() });
    };
    let [kind, zero, len_hi, len_lo, counter @ ..] = *header;
    let kind = Kind::from_code(kind).ok_or(ProtocolError::UnknownType(kind))?;
    if zero != 0 {
        return Err(ProtocolError::HeaderNotZero(zero));
    }
    let announced = usize::from(u16::from_be_bytes([len_hi, len_lo]));
    if announced != body.len() {
        return Err(ProtocolError::LengthMismatch {
            announced,
            actual: body.len(),
        });
    }
    let allowed: &[u16] = match kind {
        Kind::Ready => &[],
        Kind::Open => &[F_STREAM, F_DESTINATION, F_SOURCE, F_FLAGS],
        Kind::Opened | Kind::End => &[F_STREAM],
        Kind::Refused | Kind::Reset => &[F_STREAM, F_REASON],
        Kind::Move | Kind::Attach | Kind::Attached | Kind::Reauth => {
            return Err(ProtocolError::Reserved(kind.as_str()));
        }
    };
    let f = Fields::parse(body, allowed)?;
    let message = match kind {
        Kind::Ready => Message::Ready,
        Kind::Open => {
            let open = Open {
                stream: f.stream()?,
                destination: f
                    .destination
                    .ok_or(ProtocolError::MissingField(F_DESTINATION))?,
                source: f.source.ok_or(ProtocolError::MissingField(F_SOURCE))?,
                flags: f.flags.unwrap_or(0),
            };
            if open.destination.is_ipv4() != open.source.is_ipv4() {
                return Err(ProtocolError::BadAddress(
                    "destination and source are of different IP versions",
                ));
            }
            Message::Open(open)
        }
        Kind::Opened => Message::Opened {
            stream: f.stream()?,
        },
        Kind::End => Message::End {
            stream: f.stream()?,
        },
        Kind::Refused => Message::Refused {
            stream: f.stream()?,
            reason: RefuseReason::from_code(f.reason()?),
        },
        Kind::Reset => Message::Reset {
            stream: f.stream()?,
            reason: ResetReason::from_code(f.reason()?),
        },
        Kind::Move | Kind::Attach | Kind::Attached | Kind::Reauth => {
            return Err(ProtocolError::Reserved(kind.as_str()));
        }
    };
    Ok((message, u64::from_be_bytes(counter)))
}

const F_STREAM: u16 = 1;
const F_DESTINATION: u16 = 2;
const F_SOURCE: u16 = 3;
const F_FLAGS: u16 = 4;
const F_REASON: u16 = 5;
/// Set in the number of a field that a receiver may skip if it does not know it.
const NON_CRITICAL: u16 = 0x8000;

#[derive(Default)]
struct Fields {
    stream: Option<StreamId>,
    destination: Option<SocketAddr>,
    source: Option<SocketAddr>,
    flags: Option<u32>,
    reason: Option<u16>,
}

impl Fields {
    fn parse(mut body: &[u8], allowed: &[u16]) -> Result<Self, ProtocolError> {
        let mut fields = Self::default();
        let mut last = None;
        while !body.is_empty() {
            let (&[f_hi, f_lo, l_hi, l_lo], rest) = body
                .split_first_chunk::<4>()
                .ok_or(ProtocolError::FieldOverrun)?;
            let field = u16::from_be_bytes([f_hi, f_lo]);
            let len = usize::from(u16::from_be_bytes([l_hi, l_lo]));
            let (value, rest) = rest
                .split_at_checked(len)
                .ok_or(ProtocolError::FieldOverrun)?;
            body = rest;
            // Strictly ascending numbers: no duplicates and one encoding.
            if last.is_some_and(|last| field <= last) {
                return Err(ProtocolError::FieldOrder(field));
            }
            last = Some(field);
            if !allowed.contains(&field) {
                if field & NON_CRITICAL != 0 {
                    continue;
                }
                return Err(ProtocolError::UnknownField(field));
            }
            fields.set(field, value)?;
        }
        Ok(fields)
    }

    fn set(&mut self, field: u16, value: &[u8]) -> Result<(), ProtocolError> {
        let wrong = || ProtocolError::FieldLength {
            field,
            len: value.len(),
        };
        match field {
            F_STREAM => self.stream = Some(StreamId(value.try_into().map_err(|_| wrong())?)),
            F_DESTINATION => self.destination = Some(address(value).ok_or_else(wrong)??),
            F_SOURCE => self.source = Some(address(value).ok_or_else(wrong)??),
            F_FLAGS => {
                self.flags = Some(u32::from_be_bytes(value.try_into().map_err(|_| wrong())?))
            }
            F_REASON => {
                self.reason = Some(u16::from_be_bytes(value.try_into().map_err(|_| wrong())?))
            }
            other => return Err(ProtocolError::UnknownField(other)),
        }
        Ok(())
    }

    fn stream(&self) -> Result<StreamId, ProtocolError> {
        self.stream.ok_or(ProtocolError::MissingField(F_STREAM))
    }

    fn reason(&self) -> Result<u16, ProtocolError> {
        self.reason.ok_or(ProtocolError::MissingField(F_REASON))
    }
}

/// An address field: 4 or 16 address bytes and a port. `None`: wrong length.
fn address(value: &[u8]) -> Option<Result<SocketAddr, ProtocolError>> {
    let (ip, port) = value.split_last_chunk::<2>()?;
    let ip = match ip.len() {
        4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(ip).ok()?)),
        16 => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(ip).ok()?)),
        _ => return None,
    };
    let port = u16::from_be_bytes(*port);
    Some(if port == 0 {
        Err(ProtocolError::BadAddress("port 0"))
    } else if ip.is_unspecified() {
        Err(ProtocolError::BadAddress("unspecified address"))
    } else if ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST) {
        Err(ProtocolError::BadAddress("not a unicast address"))
    } else if ip.to_canonical() != ip {
        Err(ProtocolError::BadAddress(
            "IPv4-mapped IPv6 address (must be written as IPv4)",
        ))
    } else {
        Ok(SocketAddr::new(ip, port))
    })
}

#[cfg(test)]
mod tests;
