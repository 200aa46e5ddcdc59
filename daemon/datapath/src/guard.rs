//! The packet guard of an enrolled pod: a program in each direction at the host side of
//! the pod's devices.
//!
//! From Linux 6.6 on they hang on links, which are pinned and take a new program in one
//! step. Before, they are filters of the device's `clsact` queueing discipline: a filter
//! is known by a number, one message puts it there or exchanges its program in one step,
//! and it stays until it is removed; a pinned program remembers which devices have one.

use std::{
    collections::HashSet,
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use aya::{
    programs::{LinkOrder, SchedClassifier, TcAttachType, links::FdLink, tc::TcAttachOptions},
    util::KernelVersion,
};

use crate::{
    Datapath, DatapathError, Device,
    attach::{link_error, load_guard, pin_link, program_error, take_over},
    filter::{self, Side},
    pins::{Pins, path_error, remove_link},
};

/// How the guard hangs on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuardHook {
    /// Links of the device (Linux 6.6).
    Tcx,
    /// Filters of its `clsact` queueing discipline.
    Clsact,
}

impl GuardHook {
    /// The best that this kernel has.
    pub fn of_this_kernel() -> Self {
        if KernelVersion::current().is_ok_and(|kernel| kernel >= KernelVersion::new(6, 6, 0)) {
            GuardHook::Tcx
        } else {
            GuardHook::Clsact
        }
    }
}

/// Which devices have their guard, so that asking again costs nothing.
#[derive(Debug, Default)]
pub(crate) struct Guarded(Mutex<HashSet<(u64, u32)>>);

impl Datapath {
    /// Guards the pod with this cookie at `device`, the host side of one of its devices,
    /// in the calling thread's network namespace. What an earlier agent put there gets
    /// the program of this one, without a gap. Enrol the pod first: without an entry
    /// everything passes.
    pub fn guard(
        &self,
        cookie: u64,
        device: &Device,
        hook: GuardHook,
    ) -> Result<(), DatapathError> {
        let key = (cookie, device.index);
        if self.guarded.contains(key) {
            // A link stays while the device does; a filter anyone may have removed.
            if hook == GuardHook::Tcx || filter::are_there(device)? {
                return Ok(());
            }
        }
        let mut ebpf = load_guard(&self.pins, cookie)?;
        for side in Side::BOTH {
            let program = crate::attach::classifier(&mut ebpf, side.program())?;
            match hook {
                GuardHook::Tcx => {
                    self.pins.remove_filter(cookie, device, side)?;
                    attach_link(
                        program,
                        device,
                        side,
                        &self.pins.guard(cookie, device, side),
                    )?;
                }
                GuardHook::Clsact => {
                    attach_filter(
                        program,
                        device,
                        side,
                        &self.pins.filter(cookie, device, side),
                    )?;
                }
            }
        }
        self.guarded.insert(key);
        Ok(())
    }

    /// Takes the pod's guards away.
    pub(crate) fn unguard(&self, cookie: u64) -> Result<(), DatapathError> {
        self.guarded.forget(cookie);
        let prefix = format!("{cookie}-");
        for path in pinned(&self.pins.guards())? {
            if file_name(&path).starts_with(&prefix) {
                remove_link(&path)?;
            }
        }
        for path in pinned(&self.pins.filters())? {
            if file_name(&path).starts_with(&prefix) {
                remove_filter(&path)?;
            }
        }
        Ok(())
    }
}

impl Guarded {
    fn contains(&self, key: (u64, u32)) -> bool {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&key)
    }

    fn insert(&self, key: (u64, u32)) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key);
    }

    fn forget(&self, cookie: u64) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|(pod, _)| *pod != cookie);
    }
}

impl Pins {
    fn guard(&self, cookie: u64, device: &Device, side: Side) -> PathBuf {
        self.guards().join(name(cookie, device, side))
    }

    fn filter(&self, cookie: u64, device: &Device, side: Side) -> PathBuf {
        self.filters().join(name(cookie, device, side))
    }

    /// Of an agent that had no links.
    fn remove_filter(&self, cookie: u64, device: &Device, side: Side) -> Result<(), DatapathError> {
        let pin = self.filter(cookie, device, side);
        if pin.exists() {
            remove_filter(&pin)
        } else {
            Ok(())
        }
    }
}

/// Removes every filter that is remembered in a folder. A missing folder is no error.
pub(crate) fn remove_filters(folder: &Path) -> Result<(), DatapathError> {
    pinned(folder)?
        .iter()
        .try_for_each(|pin| remove_filter(pin))
}

fn attach_link(
    program: &mut SchedClassifier,
    device: &Device,
    side: Side,
    pin: &Path,
) -> Result<(), DatapathError> {
    let failed = |source| program_error(side.program(), source);
    let fd = program.fd().map_err(failed)?.as_fd();
    if take_over(pin, fd, |_| Ok(true))? {
        return Ok(());
    }
    let kind = match side {
        Side::From => TcAttachType::Ingress,
        Side::To => TcAttachType::Egress,
    };
    // First: another program may send the packet somewhere else.
    let order = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program
        .attach_with_options(&device.name, kind, order)
        .map_err(failed)?;
    let link = program.take_link(id).map_err(failed)?;
    let link: FdLink = link
        .try_into()
        .map_err(|source| link_error("keep", pin, io::Error::other(source)))?;
    pin_link(link, pin)
}

fn attach_filter(
    program: &mut SchedClassifier,
    device: &Device,
    side: Side,
    pin: &Path,
) -> Result<(), DatapathError> {
    let failed = |source| program_error(side.program(), source);
    let fd = program.fd().map_err(failed)?.as_fd();
    filter::put(device, side, fd)?;
    match fs::remove_file(pin) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(path_error("remove", pin, source));
        }
        _ => {}
    }
    program
        .pin(pin)
        .map_err(|source| link_error("pin", pin, io::Error::other(source)))
}

/// Removes a filter and what remembers it.
fn remove_filter(pin: &Path) -> Result<(), DatapathError> {
    if let Some((index, side)) = read_name(&file_name(pin)) {
        filter::remove(index, side)?;
    }
    fs::remove_file(pin).map_err(|source| path_error("remove", pin, source))
}

/// `<cookie>-<index>-<side>`: a name in the BPF file system has no dots.
fn name(cookie: u64, device: &Device, side: Side) -> String {
    format!("{cookie}-{}-{}", device.index, side.as_str())
}

fn read_name(name: &str) -> Option<(u32, Side)> {
    let mut parts = name.split('-').skip(1);
    let index = parts.next()?.parse().ok()?;
    let side = parts.next()?;
    let side = Side::BOTH.into_iter().find(|s| s.as_str() == side)?;
    Some((index, side))
}

fn pinned(folder: &Path) -> Result<Vec<PathBuf>, DatapathError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(path_error("read", folder, source)),
    };
    entries
        .map(|entry| Ok(entry.map_err(|e| path_error("read", folder, e))?.path()))
        .collect()
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn names_of_pins_tell_the_device_and_the_side() {
        let device = Device {
            index: 17,
            name: "veth-a".into(),
            kind: Some("veth".into()),
            loopback: false,
            peer: Some(2),
            peer_netns: Some(0),
        };
        for side in Side::BOTH {
            let read = read_name(&name(4096, &device, side)).unwrap();
            assert_eq!(read, (17, side));
        }
        for name in ["", "4096", "4096-x-from", "4096-17-", "4096-17-in"] {
            assert_eq!(read_name(name), None, "{name}");
        }
    }
}
