//! Puts captured frames together to the byte streams of their TCP connections.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Direction {
    pub from: SocketAddr,
    pub to: SocketAddr,
}

impl Direction {
    pub fn reverse(self) -> Self {
        Direction {
            from: self.to,
            to: self.from,
        }
    }
}

/// The payload of one direction, in order from the first byte after the SYN.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stream {
    pub bytes: Vec<u8>,
    /// Payload bytes that were seen and could not be placed: before the SYN, or behind a gap.
    pub unplaced: usize,
}

/// The streams of the connections whose SYN is among the frames.
pub fn streams(frames: &[Vec<u8>]) -> BTreeMap<Direction, Stream> {
    let mut assembled: BTreeMap<Direction, Assembly> = BTreeMap::new();
    for segment in frames.iter().filter_map(|frame| parse(frame)) {
        assembled
            .entry(segment.direction)
            .or_default()
            .add(&segment);
    }
    assembled
        .into_iter()
        .map(|(direction, assembly)| (direction, assembly.finish()))
        .collect()
}

/// The sequence number that follows the last byte seen in a direction: what a sender would
/// use next. `None` when the direction does not occur.
pub fn next_sequence(frames: &[Vec<u8>], direction: Direction) -> Option<u32> {
    frames
        .iter()
        .filter_map(|frame| parse(frame))
        .filter(|segment| segment.direction == direction)
        .map(|segment| {
            let length = segment.payload.len() as u32 + u32::from(segment.syn);
            segment.sequence.wrapping_add(length)
        })
        // Sequence numbers wrap: the later one is less than half the circle ahead.
        .reduce(|last, next| {
            if next.wrapping_sub(last) < 1 << 31 {
                next
            } else {
                last
            }
        })
}

#[derive(Debug, PartialEq, Eq)]
struct Segment<'a> {
    direction: Direction,
    sequence: u32,
    syn: bool,
    payload: &'a [u8],
}

/// Pieces by their distance from the first payload byte.
#[derive(Default)]
struct Assembly {
    first: Option<u32>,
    pieces: BTreeMap<u32, Vec<u8>>,
    unplaced: usize,
}

impl Assembly {
    fn add(&mut self, segment: &Segment<'_>) {
        if segment.syn {
            self.first = Some(segment.sequence.wrapping_add(1));
        }
        if segment.payload.is_empty() {
            return;
        }
        let Some(first) = self.first else {
            self.unplaced += segment.payload.len();
            return;
        };
        let start = segment.sequence.wrapping_add(u32::from(segment.syn));
        let offset = start.wrapping_sub(first);
        // A retransmission may be longer than what was sent first.
        let piece = self.pieces.entry(offset).or_default();
        if piece.len() < segment.payload.len() {
            *piece = segment.payload.to_vec();
        }
    }

    fn finish(self) -> Stream {
        let mut stream = Stream {
            bytes: Vec::new(),
            unplaced: self.unplaced,
        };
        for (offset, piece) in self.pieces {
            let Some(known) = stream.bytes.len().checked_sub(offset as usize) else {
                stream.unplaced += piece.len();
                continue;
            };
            stream
                .bytes
                .extend_from_slice(piece.get(known..).unwrap_or_default());
        }
        stream
    }
}

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const PROTOCOL_TCP: u8 = 6;
const FLAG_SYN: u8 = 0x02;

/// The TCP segment of an Ethernet frame, or nothing. Fragments and IPv6 extension headers
/// do not occur in the lab.
fn parse(frame: &[u8]) -> Option<Segment<'_>> {
    let packet = frame.get(14..)?;
    let (source, destination, segment): (IpAddr, IpAddr, &[u8]) = match word(frame, 12)? {
        ETHERTYPE_IPV4 => {
            let header = usize::from(packet.first()? & 0x0f) * 4;
            let total = usize::from(word(packet, 2)?);
            if *packet.get(9)? != PROTOCOL_TCP {
                return None;
            }
            let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            let destination: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            // 0 is a packet of 64 KiB or more; the frame then ends where it does.
            let end = if total == 0 { packet.len() } else { total };
            (
                Ipv4Addr::from(source).into(),
                Ipv4Addr::from(destination).into(),
                packet.get(header..end)?,
            )
        }
        ETHERTYPE_IPV6 => {
            let length = usize::from(word(packet, 4)?);
            if *packet.get(6)? != PROTOCOL_TCP {
                return None;
            }
            let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            let destination: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            let end = if length == 0 {
                packet.len()
            } else {
                40 + length
            };
            (
                Ipv6Addr::from(source).into(),
                Ipv6Addr::from(destination).into(),
                packet.get(40..end)?,
            )
        }
        _ => return None,
    };
    let header = usize::from(segment.get(12)? >> 4) * 4;
    Some(Segment {
        direction: Direction {
            from: SocketAddr::new(source, word(segment, 0)?),
            to: SocketAddr::new(destination, word(segment, 2)?),
        },
        sequence: u32::from_be_bytes(segment.get(4..8)?.try_into().ok()?),
        syn: segment.get(13)? & FLAG_SYN != 0,
        payload: segment.get(header..)?,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// An Ethernet frame from 10.0.0.1:1000 to 10.0.0.2:15008.
    pub(crate) fn frame(sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0u8; 12];
        frame.extend(ETHERTYPE_IPV4.to_be_bytes());
        let total = u16::try_from(40 + payload.len()).unwrap();
        frame.extend([0x45, 0]);
        frame.extend(total.to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, PROTOCOL_TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend(1000u16.to_be_bytes());
        frame.extend(15008u16.to_be_bytes());
        frame.extend(sequence.to_be_bytes());
        frame.extend([0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    fn only_stream(frames: &[Vec<u8>]) -> Stream {
        let mut streams = streams(frames);
        assert_eq!(streams.len(), 1);
        streams.pop_first().unwrap().1
    }

    #[test]
    fn segments_out_of_order_and_repeated_give_the_stream() {
        let stream = only_stream(&[
            frame(u32::MAX - 1, FLAG_SYN, b""),
            frame(2, 0, b"lo"),
            frame(u32::MAX, 0, b"hel"),
            frame(u32::MAX, 0, b"hel"),
        ]);
        assert_eq!(
            stream,
            Stream {
                bytes: b"hello".to_vec(),
                unplaced: 0
            }
        );
    }

    #[test]
    fn bytes_behind_a_gap_are_counted_and_not_joined() {
        let stream = only_stream(&[
            frame(0, FLAG_SYN, b""),
            frame(1, 0, b"a"),
            frame(9, 0, b"zz"),
        ]);
        assert_eq!(
            stream,
            Stream {
                bytes: b"a".to_vec(),
                unplaced: 2
            }
        );
    }

    #[test]
    fn a_connection_without_its_syn_has_no_stream() {
        let stream = only_stream(&[frame(5, 0, b"abc")]);
        assert_eq!(
            stream,
            Stream {
                bytes: Vec::new(),
                unplaced: 3
            }
        );
    }

    #[test]
    fn the_next_sequence_number_follows_the_last_byte_also_where_it_wraps() {
        let frames = [
            frame(u32::MAX - 1, FLAG_SYN, b""),
            frame(2, 0, b"lo"),
            frame(u32::MAX, 0, b"hel"),
        ];
        let direction = Direction {
            from: "10.0.0.1:1000".parse().unwrap(),
            to: "10.0.0.2:15008".parse().unwrap(),
        };
        assert_eq!(next_sequence(&frames, direction), Some(4));
        assert_eq!(next_sequence(&frames, direction.reverse()), None);
    }

    #[test]
    fn ethernet_padding_is_no_payload() {
        let mut padded = frame(1, 0, b"a");
        padded.extend([0; 6]);
        let stream = only_stream(&[frame(0, FLAG_SYN, b""), padded]);
        assert_eq!(stream.bytes, b"a");
    }

    #[test]
    fn frames_cut_short_are_ignored() {
        let whole = frame(1, 0, b"abc");
        for length in 0..whole.len() {
            parse(whole.get(..length).unwrap());
        }
    }
}
