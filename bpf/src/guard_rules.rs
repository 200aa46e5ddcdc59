//! What may pass between an enrolled pod and the rest of the world.
//!
//! A segment without payload that does not open a connection always passes: it carries
//! nothing, and resets and closes arrive.

use aya_ebpf::{
    Global,
    helpers::bpf_ktime_get_ns,
    macros::{classifier, map},
    maps::PerCpuArray,
    programs::TcContext,
};
use ringfence_bpf_common::{
    Addr, Counter, Endpoint, Flow, HOOK_GUARD_FROM, HOOK_GUARD_TO, IDENTITY_NONE, POD_HOLD,
    POD_READY, POD_REGISTRY_ONLY, Pod, Reason, Verdict, WORKLOAD_MESH, WORKLOAD_REFUSE,
};

use crate::{
    guard_packet::{Packet, Segment, read},
    maps::{LAST_HOPS, PODS},
    mesh_maps::{PLAINTEXT, SERVICES, WORKLOADS},
    predicate::same,
    report::{Judged, count, event},
};

/// The pod's namespace, set by the loader: this program type has no helper to ask for it
/// before Linux 6.15, and runs in another one.
#[unsafe(no_mangle)]
static NETNS_COOKIE: Global<u64> = Global::new(0);

/// `TCX_NEXT` and `TC_ACT_UNSPEC`: whoever else is attached decides.
const PASS: i32 = -1;
/// `TCX_DROP` and `TC_ACT_SHOT`.
const DROP: i32 = 2;

/// When this CPU last reported a packet, in nanoseconds.
#[map]
static GUARD_REPORTED: PerCpuArray<u64> = PerCpuArray::pinned(1, 0);
/// Connections are reported each, packets not: a pod that sends the same one again and
/// again would push everybody else's events out of the ring.
const REPORT_EVERY: u64 = 10_000_000;

/// Ingress of the host side: what the pod sends.
#[classifier]
#[inline(always)]
pub fn ringfence_from(ctx: TcContext) -> i32 {
    let netns = NETNS_COOKIE.load();
    // SAFETY: read-only, inside the RCU read section that the program runs in.
    let Some(pod) = (unsafe { PODS.get(netns) }) else {
        return PASS;
    };
    let (reason, source, destination) = match read(&ctx) {
        Packet::Other => return PASS,
        Packet::Tcp(segment) if segment.is_bare() => return PASS,
        Packet::Tcp(segment) => match refuse_segment(netns, pod, &segment) {
            Some(reason) => (reason, segment.source, segment.destination),
            None => return PASS,
        },
        // Its ports are elsewhere, and behind us it may be put together and translated.
        Packet::Fragment {
            source,
            destination,
        } => (Reason::Fragment, portless(source), portless(destination)),
        Packet::Unreadable {
            source,
            destination,
        } => (
            Reason::UnreadablePacket,
            portless(source),
            portless(destination),
        ),
    };
    count(match reason {
        Reason::PlaintextToMesh => Counter::GuardToMesh,
        Reason::EgressRefused => Counter::GuardEgress,
        Reason::Held => Counter::GuardHeld,
        Reason::Fragment => Counter::GuardFragment,
        _ => Counter::GuardUnreadable,
    });
    report(netns, HOOK_GUARD_FROM, reason, &source, &destination);
    DROP
}

/// Egress of the host side: what is on its way to the pod.
#[classifier]
#[inline(always)]
pub fn ringfence_to(ctx: TcContext) -> i32 {
    let netns = NETNS_COOKIE.load();
    // SAFETY: read-only, inside the RCU read section that the program runs in.
    let Some(pod) = (unsafe { PODS.get(netns) }) else {
        return PASS;
    };
    let (counter, reason, source, destination) = match read(&ctx) {
        Packet::Other => return PASS,
        Packet::Tcp(segment) => match refuse_arrival(netns, pod, &segment) {
            Some((counter, reason)) => (counter, reason, segment.source, segment.destination),
            None => return PASS,
        },
        Packet::Fragment {
            source,
            destination,
        } => (
            Counter::GuardFragment,
            Reason::Fragment,
            portless(source),
            portless(destination),
        ),
        Packet::Unreadable {
            source,
            destination,
        } => (
            Counter::GuardUnreadable,
            Reason::UnreadablePacket,
            portless(source),
            portless(destination),
        ),
    };
    count(counter);
    report(netns, HOOK_GUARD_TO, reason, &source, &destination);
    DROP
}

/// Why a segment that opens a connection or carries data must not leave.
#[inline(always)]
fn refuse_segment(netns: u64, pod: &Pod, segment: &Segment) -> Option<Reason> {
    // What the pod's tunnel listener answers.
    if segment.source.port == pod.inbound_port && !segment.opens() {
        return None;
    }
    let reason = refuse_destination(pod, &segment.destination)?;
    if segment.destination.port == pod.inbound_port
        && (!segment.opens() || reason as u16 == Reason::PlaintextToMesh as u16)
    {
        // A tunnel: whoever sends anything else there speaks to a TLS server.
        return None;
    }
    // The answer on a connection that policy admitted in plaintext.
    let flow = Flow {
        netns,
        source: segment.destination,
        listener: segment.source,
    };
    if !segment.opens() && PLAINTEXT.get_ptr(flow).is_some() {
        return None;
    }
    Some(reason)
}

/// Why nothing may go there in plaintext.
#[inline(always)]
fn refuse_destination(pod: &Pod, destination: &Endpoint) -> Option<Reason> {
    // SAFETY: read-only, inside the RCU read section that the program runs in.
    match unsafe { WORKLOADS.get(destination.addr) } {
        Some(workload) if workload.flags & (WORKLOAD_MESH | WORKLOAD_REFUSE) != 0 => {
            return Some(Reason::PlaintextToMesh);
        }
        Some(_) => {}
        // `connect` replaces the address of a service by that of a workload: whatever still
        // bears it did not pass there, and would be translated to a workload behind us.
        None if SERVICES.get_ptr(destination).is_some() => return Some(Reason::PlaintextToMesh),
        None if pod.flags & POD_REGISTRY_ONLY != 0 => return Some(Reason::EgressRefused),
        None => {}
    }
    (pod.flags & POD_READY == 0).then_some(Reason::Held)
}

/// Why a segment must not reach the pod.
#[inline(always)]
fn refuse_arrival(netns: u64, pod: &Pod, segment: &Segment) -> Option<(Counter, Reason)> {
    // For IPv6 nothing in the kernel stops it, and both ends of what stays inside the
    // pod, redirected connections included, have this address.
    if same(&segment.source.addr, &pod.addr4) || same(&segment.source.addr, &pod.addr6) {
        return Some((Counter::GuardOwnAddress, Reason::OwnAddressFromWire));
    }
    if segment.destination.port == pod.inbound_port {
        return None;
    }
    if pod.flags & POD_HOLD != 0 && segment.opens() {
        return Some((Counter::GuardWaiting, Reason::PolicyNotReceived));
    }
    // The agent's end is inside: its segments come over loopback.
    let flow = Flow {
        netns,
        source: segment.source,
        listener: segment.destination,
    };
    LAST_HOPS
        .get_ptr(flow)
        .map(|_| (Counter::GuardInjected, Reason::InjectedSegment))
}

#[inline(always)]
fn portless(addr: Addr) -> Endpoint {
    Endpoint::new(addr, 0)
}

#[inline(always)]
fn report(netns: u64, hook: u32, reason: Reason, source: &Endpoint, destination: &Endpoint) {
    let Some(last) = GUARD_REPORTED.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: the helper has no precondition.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the slot belongs to this CPU and the map is never resized.
    unsafe {
        if now.wrapping_sub(*last) < REPORT_EVERY {
            return;
        }
        *last = now;
    }
    event(&Judged {
        netns,
        hook,
        source,
        destination,
        identity: IDENTITY_NONE,
        set: 0,
        verdict: Verdict {
            reason,
            term: Verdict::NO_TERM,
        },
    });
}
