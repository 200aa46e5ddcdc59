//! The packet guard at the host side of each pod's devices, where the pod cannot reach
//! it: found from both ends, put there, looked after.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringfence_datapath::{Datapath, Device, GuardHook, devices, netns_number};

use super::Agent;
use super::netns::Netns;
use super::pods::Pod;
use crate::config::PacketGuard;

/// Whether a pod's packets are guarded.
#[derive(Debug)]
pub struct Guard {
    state: Mutex<State>,
    /// It changed, and what follows from that has not been done yet.
    news: AtomicBool,
}

/// What the last look found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Each device that leads out of the pod is guarded at its host side.
    On,
    /// Something is not.
    Off(String),
}

impl Guard {
    /// Begins with what was found at enrolment.
    pub fn new(state: State) -> Self {
        Guard {
            state: Mutex::new(state),
            news: AtomicBool::new(false),
        }
    }

    pub fn state(&self) -> State {
        self.lock().clone()
    }

    /// Whether it changed since this was last asked.
    pub fn take_news(&self) -> bool {
        self.news.swap(false, Ordering::AcqRel)
    }

    /// Why the pod must be held: it is not guarded, and has to be.
    pub fn refuses(&self, choice: PacketGuard) -> Option<String> {
        match (choice, self.state()) {
            (PacketGuard::Require, State::Off(why)) => Some(format!("packet guard: {why}")),
            _ => None,
        }
    }

    /// True when it was another state.
    fn set(&self, state: State) -> bool {
        let news = std::mem::replace(&mut *self.lock(), state.clone()) != state;
        self.news.fetch_or(news, Ordering::AcqRel);
        news
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// For the status page.
    pub fn describe(&self) -> String {
        match self {
            State::On => "on".into(),
            State::Off(why) => format!("OFF: {why}"),
        }
    }
}

/// Guards the pods, and the devices that came since the last time.
pub fn tend(agent: &Agent, pods: &[Arc<Pod>]) {
    for pod in pods {
        let state = attach(&agent.datapath, &pod.netns);
        if !pod.guard.set(state.clone()) {
            continue;
        }
        match state {
            State::Off(why) => tracing::warn!(
                pod = pod.config.name,
                why,
                "packets of this pod are not guarded; its connects are"
            ),
            State::On => tracing::info!(pod = pod.config.name, "packets are guarded"),
        }
        // Where the guard is required the pod is held without it.
        agent.changed.notify_one();
    }
}

/// Guards every device that leads out of a pod's namespace.
pub fn attach(datapath: &Datapath, netns: &Netns) -> State {
    match unguarded(datapath, netns) {
        Ok(missing) if missing.is_empty() => State::On,
        Ok(missing) => State::Off(missing.join("; ")),
        Err(why) => State::Off(why),
    }
}

/// The devices that cannot be guarded, each with the reason.
fn unguarded(datapath: &Datapath, netns: &Netns) -> Result<Vec<String>, String> {
    let inside = match netns.enter(devices) {
        Ok(Ok(inside)) => inside,
        Ok(Err(error)) | Err(error) => {
            return Err(format!("the pod's devices cannot be listed: {error}"));
        }
    };
    // Listing them is what numbers the namespaces at their other ends.
    let outside = devices().map_err(|e| format!("the host's devices cannot be listed: {e}"))?;
    let number = number_of(netns.as_fd())?;
    let mut missing = Vec::new();
    for device in inside.iter().filter(|device| leads_out(device)) {
        let Some(host_side) = outside.iter().find(|d| is_other_end(d, device, number)) else {
            let kind = device.kind.as_deref().unwrap_or("physical");
            missing.push(format!("{} ({kind}) has no host side here", device.name));
            continue;
        };
        let hook = GuardHook::of_this_kernel();
        if let Err(error) = datapath.guard(netns.cookie(), host_side, hook) {
            missing.push(format!("{}: {error}", device.name));
        }
    }
    Ok(missing)
}

fn number_of(netns: BorrowedFd<'_>) -> Result<Option<u32>, String> {
    netns_number(netns).map_err(|e| format!("the pod's namespace has no number: {e}"))
}

/// Whether packets can leave the pod through a device directly: what has its other end, or
/// the device it rides on, elsewhere, and hardware. Others ride on one of these.
fn leads_out(device: &Device) -> bool {
    !device.loopback && (device.peer_netns.is_some() || device.kind.is_none())
}

/// Whether a device of the host is the other end of one in the namespace with this number.
fn is_other_end(host: &Device, inside: &Device, number: Option<u32>) -> bool {
    host.kind.as_deref() == Some("veth")
        && host.peer == Some(inside.index)
        && number.is_some()
        && host.peer_netns == number
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(kind: Option<&str>, index: u32, peer: Option<u32>, netns: Option<u32>) -> Device {
        Device {
            index,
            name: "eth0".into(),
            kind: kind.map(Into::into),
            loopback: false,
            peer,
            peer_netns: netns,
        }
    }

    #[test]
    fn devices_that_lead_out_are_known() {
        assert!(leads_out(&device(Some("veth"), 2, Some(17), Some(0))));
        assert!(leads_out(&device(Some("macvlan"), 2, Some(3), Some(0))));
        assert!(leads_out(&device(None, 2, None, None)), "hardware");
        assert!(!leads_out(&device(Some("dummy"), 3, None, None)));
        assert!(!leads_out(&device(Some("vlan"), 4, Some(2), None)));
        assert!(
            !leads_out(&device(Some("veth"), 5, Some(6), None)),
            "both ends inside"
        );
        let loopback = Device {
            loopback: true,
            ..device(None, 1, None, None)
        };
        assert!(!leads_out(&loopback));
    }

    #[test]
    fn pod_is_held_where_the_guard_is_required_and_off() {
        let guard = Guard::new(State::On);
        assert!(!guard.set(State::On) && !guard.take_news());
        assert_eq!(guard.refuses(PacketGuard::Require), None);
        assert!(guard.set(State::Off("net1 (macvlan) has no host side here".into())));
        assert!(guard.take_news() && !guard.take_news());
        assert_eq!(guard.refuses(PacketGuard::Auto), None);
        let why = guard.refuses(PacketGuard::Require);
        assert!(why.is_some_and(|why| why.contains("net1")));
    }

    #[test]
    fn other_end_is_told_by_index_and_namespace() {
        let inside = device(Some("veth"), 2, Some(17), Some(0));
        let host = |peer, netns| device(Some("veth"), 17, Some(peer), netns);
        assert!(is_other_end(&host(2, Some(5)), &inside, Some(5)));
        assert!(
            !is_other_end(&host(2, Some(6)), &inside, Some(5)),
            "another pod"
        );
        assert!(!is_other_end(&host(3, Some(5)), &inside, Some(5)));
        assert!(
            !is_other_end(&host(2, None), &inside, None),
            "no number is no match"
        );
        let bridge = device(Some("macvlan"), 17, Some(2), Some(5));
        assert!(!is_other_end(&bridge, &inside, Some(5)));
    }
}
