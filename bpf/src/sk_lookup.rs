//! Plaintext from the wire: judged where the kernel looks for a listener, before the
//! application's socket is found. Established connections never come here; a stray
//! segment without a connection does, and is judged like a first one.

use core::mem::offset_of;

use aya_ebpf::{Global, bindings::bpf_sk_lookup, macros::sk_lookup, programs::SkLookupContext};
use ringfence_bpf_common::{
    Addr, Counter, Endpoint, Flow, HOOK_SK_LOOKUP, IDENTITY_NONE, POD_READY, Pod, Query, Reason,
    Verdict,
};

use crate::{
    authorize::judge,
    context::{load_addr, load_u16, load_u32},
    maps::{LAST_HOPS, PODS},
    predicate::same,
    report::{Judged, count, event},
};

/// The namespace that this instance is attached to, set by the loader: the program
/// type has no helper to ask for it.
#[unsafe(no_mangle)]
static NETNS_COOKIE: Global<u64> = Global::new(0);

/// The sender is told: a SYN is answered with RST.
const DROP: u32 = 0;
const PASS: u32 = 1;

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;
/// The loopback device has this index in every namespace.
const LOOPBACK_IFINDEX: u32 = 1;

#[sk_lookup]
#[inline(always)]
pub fn ringfence_wire(ctx: SkLookupContext) -> u32 {
    // SAFETY: readable fields of the context.
    let (protocol, ifindex) = unsafe {
        (
            load_u32!(ctx.lookup, offset_of!(bpf_sk_lookup, protocol)),
            load_u32!(ctx.lookup, offset_of!(bpf_sk_lookup, ingress_ifindex)),
        )
    };
    if protocol != IPPROTO_TCP {
        return PASS;
    }
    // A port-forward, a pod that talks to its loopback address.
    if ifindex == LOOPBACK_IFINDEX || ifindex == 0 {
        return PASS;
    }
    let netns = NETNS_COOKIE.load();
    let (source, destination) = ends(&ctx);
    // SAFETY: read-only, inside the RCU read section that the program runs in.
    let pod = unsafe { PODS.get(netns) };
    if let Some(pod) = pod
        && is_local(netns, pod, &source, &destination)
    {
        return PASS;
    }
    let verdict = match pod {
        Some(pod) if destination.port == pod.inbound_port => return PASS,
        Some(pod) if destination.port == pod.outbound_port => {
            count(Counter::AgentPort);
            return DROP;
        }
        Some(pod) if pod.flags & POD_READY != 0 => judge(&Query {
            set: pod.policy_set,
            identity: IDENTITY_NONE,
            source: source.addr,
            port: destination.port,
            destination_v4: destination.addr.is_v4(),
        }),
        _ => Verdict {
            reason: Reason::NoPolicySet,
            term: Verdict::NO_TERM,
        },
    };
    event(&Judged {
        netns,
        hook: HOOK_SK_LOOKUP,
        source: &source,
        destination: &destination,
        identity: IDENTITY_NONE,
        set: pod.map_or(0, |pod| pod.policy_set),
        verdict,
    });
    if verdict.allows() {
        count(Counter::PlaintextAllowed);
        PASS
    } else {
        count(Counter::PlaintextDenied);
        DROP
    }
}

/// Whether the connection comes from inside although it names another device than
/// loopback: the kernel says "the device that has the address" of a packet to an own
/// address.
///
/// From the wire, a segment with an own address as its source is dropped as a martian
/// (IPv4), or its answer stays inside, so that no connection comes about (IPv6).
#[inline(always)]
fn is_local(netns: u64, pod: &Pod, source: &Endpoint, destination: &Endpoint) -> bool {
    if source.addr.is_loopback() || same(&source.addr, &pod.addr4) || same(&source.addr, &pod.addr6)
    {
        return true;
    }
    let flow = Flow {
        netns,
        source: *source,
        listener: *destination,
    };
    LAST_HOPS.get_ptr(flow).is_some()
}

/// The sender and the local end.
#[inline(always)]
fn ends(ctx: &SkLookupContext) -> (Endpoint, Endpoint) {
    // SAFETY: readable fields of the context.
    unsafe {
        let remote_port = load_u16!(ctx.lookup, offset_of!(bpf_sk_lookup, remote_port));
        let local_port = load_u32!(ctx.lookup, offset_of!(bpf_sk_lookup, local_port));
        let family = load_u32!(ctx.lookup, offset_of!(bpf_sk_lookup, family));
        let (remote, local) = if family == AF_INET {
            let remote = load_u32!(ctx.lookup, offset_of!(bpf_sk_lookup, remote_ip4));
            let local = load_u32!(ctx.lookup, offset_of!(bpf_sk_lookup, local_ip4));
            (
                Addr::v4(remote.to_ne_bytes()),
                Addr::v4(local.to_ne_bytes()),
            )
        } else {
            (
                load_addr!(ctx.lookup, offset_of!(bpf_sk_lookup, remote_ip6)),
                load_addr!(ctx.lookup, offset_of!(bpf_sk_lookup, local_ip6)),
            )
        };
        // The remote port is in network byte order, the local one is not.
        (
            Endpoint::new(remote, u16::from_be(remote_port)),
            Endpoint::new(local, local_port as u16),
        )
    }
}
