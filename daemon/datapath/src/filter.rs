//! Filters of the `clsact` queueing discipline (`tc-bpf(8)`): where the guard hangs on
//! kernels without links for it.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::sys::socket::SockProtocol;

use crate::{
    DatapathError, Device,
    netlink::{CREATE, EXCLUSIVE, Netlink, push},
};

/// The direction, as the pod sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// From the pod: ingress of the host side.
    From,
    /// To the pod: egress of the host side.
    To,
}

impl Side {
    pub(crate) const BOTH: [Side; 2] = [Side::From, Side::To];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Side::From => "from",
            Side::To => "to",
        }
    }

    /// The program's name in the object.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Side::From => "ringfence_from",
            Side::To => "ringfence_to",
        }
    }

    /// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS or TC_H_MIN_EGRESS)`
    fn parent(self) -> u32 {
        match self {
            Side::From => 0xffff_fff2,
            Side::To => 0xffff_fff3,
        }
    }
}

/// Puts the program on the device, or in the place of the one that is there, in one step.
/// Makes the queueing discipline where it is missing.
pub(crate) fn put(
    device: &Device,
    side: Side,
    program: BorrowedFd<'_>,
) -> Result<(), DatapathError> {
    let failed = |source| DatapathError::Device {
        action: "put the guard on",
        device: device.name.clone(),
        source,
    };
    let mut netlink = Netlink::open(SockProtocol::NetlinkRoute).map_err(failed)?;
    match netlink.request(NEW_QDISC, CREATE | EXCLUSIVE, &clsact(device.index)) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(failed(error)),
        _ => {}
    }
    let mut options = Vec::new();
    push(&mut options, BPF_FD, &program.as_raw_fd().to_ne_bytes());
    push(
        &mut options,
        BPF_NAME,
        format!("{}\0", side.program()).as_bytes(),
    );
    push(&mut options, BPF_FLAGS, &DIRECT_ACTION.to_ne_bytes());
    let mut request = filter(device.index, side);
    push(&mut request, OPTIONS | NESTED, &options);
    netlink
        .request(NEW_FILTER, CREATE, &request)
        .map_err(failed)
        .map(drop)
}

/// Whether the device has both filters.
pub(crate) fn are_there(device: &Device) -> Result<bool, DatapathError> {
    let failed = |source| DatapathError::Device {
        action: "look for the guard on",
        device: device.name.clone(),
        source,
    };
    let mut netlink = Netlink::open(SockProtocol::NetlinkRoute).map_err(failed)?;
    for side in Side::BOTH {
        match netlink.request(GET_FILTER, 0, &filter(device.index, side)) {
            Ok(_) => {}
            Err(error) if is_absent(&error) => return Ok(false),
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(true)
}

/// Takes the filter off the device with this index. That it, or the device, is not there
/// is no error.
pub(crate) fn remove(index: u32, side: Side) -> Result<(), DatapathError> {
    let failed = |source| DatapathError::Device {
        action: "take the guard off",
        device: format!("number {index}"),
        source,
    };
    let mut netlink = Netlink::open(SockProtocol::NetlinkRoute).map_err(failed)?;
    match netlink.request(DELETE_FILTER, 0, &filter(index, side)) {
        Err(error) if !is_absent(&error) => Err(failed(error)),
        _ => Ok(()),
    }
}

/// No such device, no queueing discipline, no filter.
fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENODEV | libc::EINVAL | libc::ENOENT)
    )
}

const NEW_QDISC: u16 = 36;
const NEW_FILTER: u16 = 44;
const DELETE_FILTER: u16 = 45;
const GET_FILTER: u16 = 46;
/// `TCA_KIND`, `TCA_OPTIONS`, `NLA_F_NESTED`
const KIND: u16 = 1;
const OPTIONS: u16 = 2;
const NESTED: u16 = 0x8000;
/// `TCA_BPF_*`
const BPF_FD: u16 = 6;
const BPF_NAME: u16 = 7;
const BPF_FLAGS: u16 = 8;
/// The program's return value is the verdict (`TCA_BPF_FLAG_ACT_DIRECT`).
const DIRECT_ACTION: u32 = 1;
/// Before all others: one of them may send the packet somewhere else.
const PRIORITY: u32 = 1;
/// Tells our filter from others of the same priority.
const HANDLE: u32 = 0x5246_0001;

fn clsact(index: u32) -> Vec<u8> {
    let mut request = header(index, 0xffff_0000, 0xffff_fff1, 0);
    push(&mut request, KIND, b"clsact\0");
    request
}

fn filter(index: u32, side: Side) -> Vec<u8> {
    /// `ETH_P_ALL`, in network byte order.
    const ALL: u16 = 3u16.to_be();
    let info = PRIORITY << 16 | u32::from(ALL);
    let mut request = header(index, HANDLE, side.parent(), info);
    push(&mut request, KIND, b"bpf\0");
    request
}

/// `struct tcmsg`.
fn header(index: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    [0, index, handle, parent, info]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect()
}
