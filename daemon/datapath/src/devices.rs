//! Network devices of a namespace, and which of them are two ends of one.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::sys::socket::SockProtocol;

use crate::netlink::{Message, Netlink, attribute, number, push};

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    pub index: u32,
    pub name: String,
    /// `veth`, `macvlan`, ...; physical devices and loopback have none.
    pub kind: Option<String>,
    pub loopback: bool,
    /// Index of the device that this one is the other end of, or rides on.
    pub peer: Option<u32>,
    /// Which namespace that one is in, by the number that *this* namespace knows it by;
    /// `None`: the same.
    pub peer_netns: Option<u32>,
}

/// The devices of the calling thread's network namespace.
pub fn devices() -> io::Result<Vec<Device>> {
    const GET_LINK: u16 = 18;
    /// `struct ifinfomsg`.
    const HEADER: usize = 16;
    let mut netlink = Netlink::open(SockProtocol::NetlinkRoute)?;
    let links = netlink.dump(GET_LINK, &[0; HEADER])?;
    Ok(links.iter().filter_map(parse).collect())
}

/// The number by which the calling thread's network namespace knows `netns`; `None` when
/// it has none: then nothing here leads there.
pub fn netns_number(netns: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    const GET_NSID: u16 = 90;
    const NSID: u16 = 1;
    const FD: u16 = 3;
    /// `struct rtgenmsg`, padded.
    const HEADER: usize = 4;
    let mut request = vec![0; HEADER];
    push(&mut request, FD, &netns.as_raw_fd().to_ne_bytes());
    let mut netlink = Netlink::open(SockProtocol::NetlinkRoute)?;
    let answers = netlink.request(GET_NSID, 0, &request)?;
    let number = answers.iter().find_map(|answer| {
        let attributes = answer.payload.get(HEADER..)?;
        number(attribute(attributes, NSID)?)
    });
    // -1: not assigned.
    Ok(number.filter(|number| *number != u32::MAX))
}

fn parse(message: &Message) -> Option<Device> {
    const NEW_LINK: u16 = 16;
    const HEADER: usize = 16;
    const NAME: u16 = 3;
    const LINK: u16 = 5;
    const LINK_INFO: u16 = 18;
    const INFO_KIND: u16 = 1;
    const LINK_NETNSID: u16 = 37;
    /// `IFF_LOOPBACK`
    const LOOPBACK: u32 = 8;
    if message.kind != NEW_LINK {
        return None;
    }
    let (header, attributes) = message.payload.split_at_checked(HEADER)?;
    let kind = attribute(attributes, LINK_INFO).and_then(|info| attribute(info, INFO_KIND));
    Some(Device {
        index: number(header.get(4..)?)?,
        name: text(attribute(attributes, NAME)?),
        kind: kind.map(text),
        loopback: number(header.get(8..)?)? & LOOPBACK != 0,
        peer: attribute(attributes, LINK)
            .and_then(number)
            .filter(|peer| *peer != 0),
        peer_netns: attribute(attributes, LINK_NETNSID).and_then(number),
    })
}

/// A string that ends with a zero.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .trim_end_matches('\0')
        .to_owned()
}
