//! Ethernet frames made by hand, sent and seen through packet sockets.
#![allow(
    dead_code,
    unused_imports,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

mod bench;

pub use bench::*;

use std::{
    io::{ErrorKind, Read},
    net::IpAddr,
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::support::Netns;

pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const PSH: u8 = 0x08;
pub const ACK: u8 = 0x10;
pub const FIN: u8 = 0x01;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

const ETH_P_ALL: u16 = 3;

/// The hardware addresses of both ends of the veth, which the lab gives itself.
pub const POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub const WIRE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

pub fn set_hardware_addresses(pod: &Netns, wire: &Netns) {
    pod.ip("link set eth0 address 02:00:00:00:00:02");
    wire.ip("link set eth0 address 02:00:00:00:00:01");
}

/// A packet socket.
pub struct Wiretap {
    socket: Socket,
}

impl Wiretap {
    /// On the device with this name, or on all.
    pub fn new(netns: &Netns, device: Option<&str>) -> Wiretap {
        let socket = netns.run(|| {
            let protocol = Protocol::from(i32::from(ETH_P_ALL.to_be()));
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol)).unwrap();
            if let Some(name) = device {
                let devices = ringfence_datapath::devices().unwrap();
                let index = devices.iter().find(|d| d.name == name).unwrap().index;
                socket.bind(&link_layer(index)).unwrap();
            }
            socket
        });
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        Wiretap { socket }
    }

    /// A program that drops it on the way out shows here as a full queue.
    pub fn send(&self, frame: &[u8]) {
        match self.socket.send(frame) {
            Ok(length) => assert_eq!(length, frame.len()),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS)),
        }
    }

    /// The next frame that `wanted` accepts.
    pub fn wait_for(&mut self, what: &str, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut buffer = [0; 65536];
        while Instant::now() < deadline {
            match self.socket.read(&mut buffer) {
                Ok(length) if wanted(&buffer[..length]) => return buffer[..length].to_vec(),
                Ok(_) => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => panic!("{error}"),
            }
        }
        panic!("not within ten seconds: {what}");
    }
}

/// `struct sockaddr_ll` of a device.
fn link_layer(index: u32) -> SockAddr {
    // SAFETY: the storage is zeroed and large enough for a `sockaddr_ll`, which is what is
    // written and what the length says.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let address = storage.cast::<libc::sockaddr_ll>();
            (*address).sll_family = libc::AF_PACKET as u16;
            (*address).sll_protocol = ETH_P_ALL.to_be();
            (*address).sll_ifindex = index.cast_signed();
            *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
    }
    .unwrap();
    address
}

/// A TCP segment.
#[derive(Clone)]
pub struct Segment {
    pub source: (IpAddr, u16),
    pub destination: (IpAddr, u16),
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
    pub payload: Vec<u8>,
}

impl Segment {
    pub fn new(source: (IpAddr, u16), destination: (IpAddr, u16), flags: u8) -> Segment {
        Segment {
            source,
            destination,
            sequence: 0,
            acknowledged: 0,
            flags,
            payload: Vec::new(),
        }
    }

    pub fn with(mut self, payload: &[u8]) -> Segment {
        self.payload = payload.to_vec();
        self
    }

    /// Header and payload, with the checksum.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.source.1.to_be_bytes());
        bytes.extend(self.destination.1.to_be_bytes());
        bytes.extend(self.sequence.to_be_bytes());
        bytes.extend(self.acknowledged.to_be_bytes());
        bytes.extend([5 << 4, self.flags]);
        bytes.extend(0xffff_u16.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&self.payload);
        let mut pseudo = Vec::new();
        pseudo.extend(octets(self.source.0));
        pseudo.extend(octets(self.destination.0));
        pseudo.extend([0, TCP]);
        pseudo.extend((bytes.len() as u16).to_be_bytes());
        pseudo.extend(&bytes);
        let sum = checksum(&pseudo);
        bytes[16..18].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// The whole frame, without anything unusual.
    pub fn frame(&self, to_pod: bool) -> Vec<u8> {
        let (source, destination) = (self.source.0, self.destination.0);
        let packet = ip(source, destination, TCP, &[], 0, &self.bytes());
        ethernet(to_pod, &[], destination.is_ipv6(), &packet)
    }
}

/// An IPv4 packet (`options` are IPv4 options, `fragment` the flags and offset), or an IPv6
/// packet (`options` are extension headers, of which `protocol` is the first).
pub fn ip(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    options: &[u8],
    fragment: u16,
    payload: &[u8],
) -> Vec<u8> {
    let mut packet = Vec::new();
    match destination {
        IpAddr::V4(_) => {
            let length = 20 + options.len();
            packet.extend([0x40 | (length / 4) as u8, 0]);
            packet.extend(((length + payload.len()) as u16).to_be_bytes());
            packet.extend(7u16.to_be_bytes());
            packet.extend(fragment.to_be_bytes());
            packet.extend([64, protocol, 0, 0]);
            packet.extend(octets(source));
            packet.extend(octets(destination));
            packet.extend(options);
            let sum = checksum(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        IpAddr::V6(_) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(((options.len() + payload.len()) as u16).to_be_bytes());
            packet.extend([protocol, 64]);
            packet.extend(octets(source));
            packet.extend(octets(destination));
            packet.extend(options);
        }
    }
    packet.extend(payload);
    packet
}

/// A frame with VLAN tags of these types.
pub fn ethernet(to_pod: bool, tags: &[u16], ipv6: bool, packet: &[u8]) -> Vec<u8> {
    let (to, from) = if to_pod {
        (POD_MAC, WIRE_MAC)
    } else {
        (WIRE_MAC, POD_MAC)
    };
    let mut frame = [to, from].concat();
    for tag in tags {
        frame.extend(tag.to_be_bytes());
        frame.extend(5u16.to_be_bytes());
    }
    frame.extend(if ipv6 { [0x86, 0xdd] } else { [0x08, 0x00] });
    frame.extend(packet);
    frame
}

/// A datagram (its checksum is "none", which IPv6 drops at the receiver).
pub fn udp(payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 9, 0, 9];
    bytes.extend((8 + payload.len() as u16).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(payload);
    bytes
}

/// Whether a captured frame holds these bytes.
pub fn holds(frame: &[u8], bytes: &[u8]) -> bool {
    frame.windows(bytes.len()).any(|window| window == bytes)
}

/// Ports, sequence number, acknowledgement and flags of a captured segment without
/// options of the IP header.
pub fn tcp_header(frame: &[u8]) -> Option<(u16, u16, u32, u32, u8)> {
    let start = match frame.get(12..14)? {
        [0x08, 0x00] if frame.get(23) == Some(&TCP) => 34,
        [0x86, 0xdd] if frame.get(20) == Some(&TCP) => 54,
        _ => return None,
    };
    let tcp = frame.get(start..start + 14)?;
    Some((
        u16::from_be_bytes([tcp[0], tcp[1]]),
        u16::from_be_bytes([tcp[2], tcp[3]]),
        u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]),
        u32::from_be_bytes([tcp[8], tcp[9], tcp[10], tcp[11]]),
        tcp[13],
    ))
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
