//! Loading the objects, and links that outlive us.

use std::{fs, io, os::fd::AsFd, path::Path};

use aya::{
    Ebpf, EbpfLoader,
    programs::{
        CgroupAttachMode, CgroupSock, CgroupSockAddr, Program, ProgramError, SchedClassifier,
        SkLookup, SockOps, links::FdLink,
    },
};
use ringfence_bpf_objects::{GUARD, NODE, POD};

use crate::{
    DatapathError,
    filter::Side,
    pins::{Pins, path_error},
    sys,
};

/// The node's programs: name in the object, name of the pin.
const HOOKS: [(&str, &str); 6] = [
    // The record of original destinations stands before anything is redirected.
    ("ringfence_tcp", "sock_ops"),
    ("ringfence_peer4", "getpeername4"),
    ("ringfence_peer6", "getpeername6"),
    ("ringfence_conn4", "connect4"),
    ("ringfence_conn6", "connect6"),
    ("ringfence_create", "sock_create"),
];
/// A link takes no flags, and always shares the hook with other programs.
const LINK_MODE: CgroupAttachMode = CgroupAttachMode::Single;
const WIRE: &str = "ringfence_wire";

/// Loads the node's object; its maps are pinned, or taken over where they are.
pub(crate) fn load_node(pins: &Pins) -> Result<Ebpf, DatapathError> {
    EbpfLoader::new()
        .default_map_pin_directory(pins.maps())
        .map_pin_path("SOCKS", pins.map("SOCKS"))
        .map_pin_path("ACCEPTED", pins.map("ACCEPTED"))
        .load(NODE)
        .map_err(|source| DatapathError::Load {
            object: "node",
            source: Box::new(source),
        })
}

/// Attaches the node's programs to the cgroup, or puts them into the links that are
/// pinned already.
pub(crate) fn attach_node(
    ebpf: &mut Ebpf,
    pins: &Pins,
    cgroup: &Path,
) -> Result<(), DatapathError> {
    let cgroup = fs::File::open(cgroup).map_err(|source| path_error("open", cgroup, source))?;
    // All are verified before the first one is attached.
    for (name, _) in HOOKS {
        match program(ebpf, name)? {
            Program::CgroupSockAddr(program) => program.load(),
            Program::CgroupSock(program) => program.load(),
            Program::SockOps(program) => program.load(),
            _ => return Err(DatapathError::Missing { name }),
        }
        .map_err(|source| program_error(name, source))?;
    }
    for (name, hook) in HOOKS {
        let pin = pins.link(hook);
        match program(ebpf, name)? {
            Program::CgroupSockAddr(program) => {
                let fd = program
                    .fd()
                    .map_err(|source| program_error(name, source))?
                    .as_fd();
                if !take_over(&pin, fd, |_| Ok(true))? {
                    let link = attach_sock_addr(program, &cgroup)
                        .map_err(|source| program_error(name, source))?;
                    pin_link(link, &pin)?;
                }
            }
            Program::CgroupSock(program) => {
                let fd = program
                    .fd()
                    .map_err(|source| program_error(name, source))?
                    .as_fd();
                if !take_over(&pin, fd, |_| Ok(true))? {
                    let link = attach_sock(program, &cgroup)
                        .map_err(|source| program_error(name, source))?;
                    pin_link(link, &pin)?;
                }
            }
            Program::SockOps(program) => {
                let fd = program
                    .fd()
                    .map_err(|source| program_error(name, source))?
                    .as_fd();
                if !take_over(&pin, fd, |_| Ok(true))? {
                    let link = attach_sock_ops(program, &cgroup)
                        .map_err(|source| program_error(name, source))?;
                    pin_link(link, &pin)?;
                }
            }
            _ => return Err(DatapathError::Missing { name }),
        }
    }
    Ok(())
}

/// Loads an instance of the pod's program for this namespace and attaches it, or puts
/// it into the link that is pinned already.
pub(crate) fn attach_pod(pins: &Pins, netns: impl AsFd, cookie: u64) -> Result<(), DatapathError> {
    let mut ebpf = EbpfLoader::new()
        .default_map_pin_directory(pins.maps())
        .override_global("NETNS_COOKIE", &cookie, true)
        .load(POD)
        .map_err(|source| DatapathError::Load {
            object: "pod",
            source: Box::new(source),
        })?;
    let Program::SkLookup(program) = program(&mut ebpf, WIRE)? else {
        return Err(DatapathError::Missing { name: WIRE });
    };
    program
        .load()
        .map_err(|source| program_error(WIRE, source))?;
    let pin = pins.pod(cookie);
    let fd = program
        .fd()
        .map_err(|source| program_error(WIRE, source))?
        .as_fd();
    if take_over(&pin, fd, sys::netns_link_is_alive)? {
        return Ok(());
    }
    let link = attach_sk_lookup(program, netns).map_err(|source| program_error(WIRE, source))?;
    pin_link(link, &pin)
}

/// Loads the guard's programs for this namespace, verified and not attached.
pub(crate) fn load_guard(pins: &Pins, cookie: u64) -> Result<Ebpf, DatapathError> {
    let mut ebpf = EbpfLoader::new()
        .default_map_pin_directory(pins.maps())
        .override_global("NETNS_COOKIE", &cookie, true)
        .load(GUARD)
        .map_err(|source| DatapathError::Load {
            object: "guard",
            source: Box::new(source),
        })?;
    for side in Side::BOTH {
        let name = side.program();
        classifier(&mut ebpf, name)?
            .load()
            .map_err(|source| program_error(name, source))?;
    }
    Ok(ebpf)
}

/// A program of the guard.
pub(crate) fn classifier<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, DatapathError> {
    match program(ebpf, name)? {
        Program::SchedClassifier(program) => Ok(program),
        _ => Err(DatapathError::Missing { name }),
    }
}

fn attach_sock(program: &mut CgroupSock, cgroup: impl AsFd) -> Result<FdLink, ProgramError> {
    let id = program.attach(cgroup, LINK_MODE)?;
    // Before Linux 5.7 it would be no link that can be pinned.
    program
        .take_link(id)?
        .try_into()
        .map_err(|_| ProgramError::NotAttached)
}

fn attach_sock_addr(
    program: &mut CgroupSockAddr,
    cgroup: impl AsFd,
) -> Result<FdLink, ProgramError> {
    let id = program.attach(cgroup, LINK_MODE)?;
    // Before Linux 5.7 it would be no link that can be pinned.
    program
        .take_link(id)?
        .try_into()
        .map_err(|_| ProgramError::NotAttached)
}

fn attach_sock_ops(program: &mut SockOps, cgroup: impl AsFd) -> Result<FdLink, ProgramError> {
    let id = program.attach(cgroup, LINK_MODE)?;
    // Before Linux 5.7 it would be no link that can be pinned.
    program
        .take_link(id)?
        .try_into()
        .map_err(|_| ProgramError::NotAttached)
}

fn attach_sk_lookup(program: &mut SkLookup, netns: impl AsFd) -> Result<FdLink, ProgramError> {
    let id = program.attach(netns)?;
    Ok(program.take_link(id)?.into())
}

/// Exchanges the program of a pinned link. False when there is none, or a dead one,
/// which is removed.
pub(crate) fn take_over(
    pin: &Path,
    program: impl AsFd,
    alive: impl Fn(std::os::fd::BorrowedFd<'_>) -> io::Result<bool>,
) -> Result<bool, DatapathError> {
    let link = match sys::open_pin(pin) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(path_error("open the pinned link", pin, source)),
    };
    let alive = alive(link.as_fd()).map_err(|source| link_error("inspect", pin, source))?;
    let outcome = if alive {
        sys::update_link(link.as_fd(), program.as_fd())
    } else {
        Err(io::Error::from_raw_os_error(libc::ENOLINK))
    };
    match outcome {
        Ok(()) => Ok(true),
        // What it was attached to is gone.
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {
            fs::remove_file(pin).map_err(|source| path_error("remove", pin, source))?;
            Ok(false)
        }
        Err(source) => Err(link_error("replace the program in", pin, source)),
    }
}

pub(crate) fn pin_link(link: FdLink, pin: &Path) -> Result<(), DatapathError> {
    match link.pin(pin) {
        Ok(_pinned) => Ok(()),
        Err(error) => Err(link_error("pin", pin, io::Error::other(error))),
    }
}

pub(crate) fn link_error(action: &'static str, pin: &Path, source: io::Error) -> DatapathError {
    let program = pin
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    DatapathError::Link {
        action,
        program,
        source,
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Program, DatapathError> {
    ebpf.program_mut(name)
        .ok_or(DatapathError::Missing { name })
}

pub(crate) fn program_error(program: &'static str, source: ProgramError) -> DatapathError {
    DatapathError::Program {
        program,
        source: Box::new(source),
    }
}
