//! How far into a packet one must look to know whether it is TCP, and between whom.
//!
//! `bpf_skb_load_bytes` copies what it is asked for wherever it lies, so that neither
//! paged nor segmentation-offloaded packets are special. An offset never passes 400.

use aya_ebpf::programs::TcContext;
use ringfence_bpf_common::{Addr, Endpoint};

/// What a packet is to the guard.
pub enum Packet {
    /// No TCP, which is not policed.
    Other,
    /// A whole TCP segment, or several that the device is to cut.
    Tcp(Segment),
    /// A part of one, the first or a later one.
    Fragment { source: Addr, destination: Addr },
    /// Headers that end too early, go on for too long, or name another destination than
    /// the one in the IP header (source routes).
    Unreadable { source: Addr, destination: Addr },
}

pub struct Segment {
    pub source: Endpoint,
    pub destination: Endpoint,
    flags: u8,
    payload: bool,
}

impl Segment {
    /// A SYN that opens a connection.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }

    /// Neither opens a connection nor carries a byte of one.
    #[inline(always)]
    pub fn is_bare(&self) -> bool {
        !self.payload && !self.opens()
    }
}

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

const ETHERNET: usize = 14;
const ETHERTYPE_AT: usize = 12;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const SERVICE_VLAN: u16 = 0x88a8;
/// Tags in the packet; the kernel has taken one more off it.
const MOST_TAGS: usize = 2;

const TCP: u8 = 6;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;

/// IPv6 extension headers; Linux sends at most five.
const MOST_HEADERS: usize = 8;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// Reads a packet at the Ethernet level, as the host side of a veth has it.
#[inline(always)]
pub fn read(ctx: &TcContext) -> Packet {
    const UNREADABLE: Packet = Packet::Unreadable {
        source: Addr::NONE,
        destination: Addr::NONE,
    };
    let mut at = ETHERTYPE_AT;
    let mut tags = 0;
    loop {
        let Ok(ethertype) = ctx.load::<[u8; 2]>(at) else {
            return UNREADABLE;
        };
        at += 2;
        match u16::from_be_bytes(ethertype) {
            IPV4 => return ipv4(ctx, at),
            IPV6 => return ipv6(ctx, at),
            VLAN | SERVICE_VLAN if tags < MOST_TAGS => {
                tags += 1;
                at += 2;
            }
            VLAN | SERVICE_VLAN => return UNREADABLE,
            _ => return Packet::Other,
        }
    }
}

#[inline(always)]
fn ipv4(ctx: &TcContext, start: usize) -> Packet {
    const UNREADABLE: Packet = Packet::Unreadable {
        source: Addr::NONE,
        destination: Addr::NONE,
    };
    let Ok(header) = ctx.load::<[u8; IPV4_HEADER]>(start) else {
        return UNREADABLE;
    };
    let length = usize::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || length < IPV4_HEADER {
        return UNREADABLE;
    }
    if header[9] != TCP {
        return Packet::Other;
    }
    let source = Addr::v4([header[12], header[13], header[14], header[15]]);
    let destination = Addr::v4([header[16], header[17], header[18], header[19]]);
    // "More fragments", or an offset.
    if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
        return Packet::Fragment {
            source,
            destination,
        };
    }
    if length > IPV4_HEADER && is_source_routed(ctx, start, length) {
        return Packet::Unreadable {
            source,
            destination,
        };
    }
    tcp(ctx, start + length, source, destination)
}

/// Whether the options name another destination than the header, or cannot be walked.
#[inline(always)]
fn is_source_routed(ctx: &TcContext, start: usize, length: usize) -> bool {
    const END: u8 = 0;
    const NOTHING: u8 = 1;
    const LOOSE_ROUTE: u8 = 131;
    const STRICT_ROUTE: u8 = 137;
    let mut at = IPV4_HEADER;
    let mut round = 0;
    // 40 bytes of options at most.
    while at < length && round < 40 {
        round += 1;
        // The TCP header follows, so there is a byte behind the last option.
        let Ok([kind, size]) = ctx.load::<[u8; 2]>(start + (at & 0x3f)) else {
            return true;
        };
        match kind {
            END => return false,
            NOTHING => at += 1,
            LOOSE_ROUTE | STRICT_ROUTE => return true,
            _ if size < 2 => return true,
            _ => at += usize::from(size),
        }
    }
    false
}

#[inline(always)]
fn ipv6(ctx: &TcContext, start: usize) -> Packet {
    let Ok(header) = ctx.load::<[[u8; 4]; IPV6_HEADER / 4]>(start) else {
        return Packet::Unreadable {
            source: Addr::NONE,
            destination: Addr::NONE,
        };
    };
    let addr = |first: usize| {
        Addr::from_words([
            u32::from_ne_bytes(header[first]),
            u32::from_ne_bytes(header[first + 1]),
            u32::from_ne_bytes(header[first + 2]),
            u32::from_ne_bytes(header[first + 3]),
        ])
    };
    let (source, destination) = (addr(2), addr(6));
    let unreadable = Packet::Unreadable {
        source,
        destination,
    };
    if header[0][0] >> 4 != 6 {
        return unreadable;
    }
    let mut next = header[1][2];
    let mut at = start + IPV6_HEADER;
    let mut fragment = false;
    let mut round = 0;
    while round < MOST_HEADERS {
        round += 1;
        match next {
            TCP if fragment => {
                return Packet::Fragment {
                    source,
                    destination,
                };
            }
            TCP => return tcp(ctx, at, source, destination),
            HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS => {}
            _ => return Packet::Other,
        }
        let Ok([following, length, third, fourth]) = ctx.load::<[u8; 4]>(at & 0xfff) else {
            return unreadable;
        };
        match next {
            FRAGMENT => {
                fragment = true;
                // A later part begins in the middle. The first one says what the whole is:
                // it passes or not, and without it the others come to nothing.
                if u16::from_be_bytes([third, fourth]) & 0xfff8 != 0 {
                    return if following == TCP {
                        Packet::Fragment {
                            source,
                            destination,
                        }
                    } else {
                        Packet::Other
                    };
                }
                at += 8;
            }
            // Segments left: the header's destination is not the last one.
            ROUTING if fourth != 0 => return unreadable,
            AUTHENTICATION => at += (usize::from(length) + 2) * 4,
            _ => at += (usize::from(length) + 1) * 8,
        }
        next = following;
    }
    unreadable
}

#[inline(always)]
fn tcp(ctx: &TcContext, start: usize, source: Addr, destination: Addr) -> Packet {
    let Ok(header) = ctx.load::<[u8; 14]>(start & 0xffff) else {
        return Packet::Unreadable {
            source,
            destination,
        };
    };
    let length = usize::from(header[12] >> 4) * 4;
    if length < 20 {
        return Packet::Unreadable {
            source,
            destination,
        };
    }
    Packet::Tcp(Segment {
        source: Endpoint::new(source, u16::from_be_bytes([header[0], header[1]])),
        destination: Endpoint::new(destination, u16::from_be_bytes([header[2], header[3]])),
        flags: header[13],
        // By what is there, not by what the IP header says is there: large segments that
        // the device is to cut say nothing.
        payload: (ctx.len() as usize) > start + length,
    })
}

const _: () = assert!(ETHERTYPE_AT + 2 == ETHERNET);
