//! Frames to and from a guarded pod, one after the other, and what becomes of each.

use std::net::IpAddr;

use ringfence_datapath::{Device, GuardHook, devices};

use super::{UDP, Wiretap, ethernet, holds, ip, set_hardware_addresses, udp};
use crate::support::*;

/// The counters of the guard.
pub const DROPS: [&str; 8] = [
    "guard_plaintext_to_mesh",
    "guard_egress_refused",
    "guard_held",
    "guard_tcp_fragment",
    "guard_unreadable",
    "guard_injected_segment",
    "guard_own_address",
    "guard_waiting_for_policy",
];

/// The hooks that this kernel has: before Linux 6.6 there are filters alone.
pub fn hooks() -> &'static [GuardHook] {
    match GuardHook::of_this_kernel() {
        GuardHook::Tcx => &[GuardHook::Tcx, GuardHook::Clsact],
        GuardHook::Clsact => &[GuardHook::Clsact],
    }
}

/// The other end of the pod's device.
pub fn host_side(lab: &Lab) -> Device {
    let devices = lab.wire.run(devices).unwrap();
    devices.into_iter().find(|d| d.name == "eth0").unwrap()
}

/// Guards the pod as the agent does.
pub fn guard(lab: &Lab, hook: GuardHook) {
    let device = host_side(lab);
    lab.wire
        .run(|| lab.datapath.guard(lab.cookie, &device, hook))
        .unwrap();
}

/// A lab whose pod is enrolled, with known hardware addresses.
pub fn known_lab() -> Lab {
    let lab = Lab::new();
    set_hardware_addresses(&lab.pod, &lab.wire);
    lab
}

/// Sends a frame and says which counter of the guard told of it.
pub struct Bench<'a> {
    lab: &'a Lab,
    to_pod: bool,
    sender: Wiretap,
    receiver: Wiretap,
    number: u32,
}

impl Bench<'_> {
    pub fn new(lab: &Lab, to_pod: bool) -> Bench<'_> {
        let (from, to) = if to_pod {
            (&lab.wire, &lab.pod)
        } else {
            (&lab.pod, &lab.wire)
        };
        Bench {
            lab,
            to_pod,
            sender: Wiretap::new(from, Some("eth0")),
            receiver: Wiretap::new(to, Some("eth0")),
            number: 0,
        }
    }

    /// The counter, or `passes`.
    pub fn verdict(&mut self, frame: &[u8]) -> &'static str {
        let before = DROPS.map(|name| self.lab.counter(name));
        self.sender.send(frame);
        // A veth keeps the order: when this has arrived, the frame has been judged.
        self.number += 1;
        let marker = format!("marker {:08}", self.number);
        let packet = ip(PLAIN4, POD4, UDP, &[], 0, &udp(marker.as_bytes()));
        self.sender
            .send(&ethernet(self.to_pod, &[], false, &packet));
        self.receiver
            .wait_for("the marker", |frame| holds(frame, marker.as_bytes()));
        let after = DROPS.map(|name| self.lab.counter(name));
        let dropped: Vec<_> = (0..DROPS.len())
            .filter(|i| after[*i] != before[*i])
            .map(|i| DROPS[i])
            .collect();
        match dropped[..] {
            [] => "passes",
            [name] => name,
            _ => panic!("one frame, several counters: {dropped:?}"),
        }
    }
}

/// Pod, mesh, outside, service.
pub fn families() -> [(IpAddr, IpAddr, IpAddr, IpAddr); 2] {
    [(POD4, MESH4, PLAIN4, VIP4), (POD6, MESH6, PLAIN6, VIP6)]
}
