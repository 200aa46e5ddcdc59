//! What becomes of a TCP connect from an enrolled network namespace.
//!
//! Refused, passed as it is, given a service's backend, or redirected to the agent.
//! Nothing that belongs into a tunnel ever leaves as plaintext because something went
//! wrong here: each failure on that way refuses.

use aya_ebpf::{
    helpers::{bpf_get_prandom_u32, bpf_set_retval},
    programs::SockAddrContext,
};
use ringfence_bpf_common::{
    AGENT_DIAL, AGENT_LAST_HOP, Addr, AgentSocket, AppSocket, Backend, BackendKey, Counter,
    Endpoint, HOOK_CONNECT, IDENTITY_NONE, POD_READY, POD_REGISTRY_ONLY, Pod, Query, Reason,
    SOCKET_DIRECT, SOCKET_LAST_HOP, SOCKET_REDIRECTED, Service, Verdict, WORKLOAD_MESH,
    WORKLOAD_REFUSE,
};

use crate::{
    authorize::judge,
    maps::PODS,
    mesh_maps::{SERVICES, WORKLOADS},
    node_maps::{AGENT_SOCKS, BACKENDS},
    predicate::same,
    report::{Judged, count, event},
    socket::{self, Family},
};

/// `connect` fails with `EPERM`, or with what `bpf_set_retval` said.
const REFUSE: i32 = 0;
const PASS: i32 = 1;

const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;
const ECONNREFUSED: i32 = 111;

#[inline(always)]
pub fn decide<F: Family>(ctx: &SockAddrContext) -> i32 {
    if socket::kind(ctx) != SOCK_STREAM || socket::protocol(ctx) != IPPROTO_TCP {
        return PASS;
    }
    let netns = socket::netns(ctx);
    // SAFETY: read-only, inside the RCU read section that the program runs in.
    let Some(pod) = (unsafe { PODS.get(netns) }) else {
        return PASS;
    };
    let call = Call {
        netns,
        cookie: socket::cookie(ctx),
        pod,
        asked: F::read(ctx),
    };
    // SAFETY: as above.
    match unsafe { AGENT_SOCKS.get(call.cookie) } {
        Some(agent) => agent_connect(ctx, agent, &call),
        None => app_connect::<F>(ctx, &call),
    }
}

/// Who connects to what.
struct Call<'a> {
    netns: u64,
    cookie: u64,
    pod: &'a Pod,
    asked: Endpoint,
}

impl Call<'_> {
    /// What is to be remembered with the socket.
    #[inline(always)]
    fn state(&self, backend: &Endpoint, kind: u32) -> AppSocket {
        AppSocket {
            asked: self.asked,
            backend: *backend,
            netns: self.netns,
            cookie: self.cookie,
            kind,
            source_seq: 0,
            listener_seq: 0,
            pad: 0,
        }
    }
}

/// A connect of the agent's own.
#[inline(always)]
fn agent_connect(ctx: &SockAddrContext, agent: &AgentSocket, call: &Call<'_>) -> i32 {
    if agent.role == AGENT_DIAL {
        return PASS;
    }
    let (pod, asked) = (call.pod, &call.asked);
    let verdict = if agent.role != AGENT_LAST_HOP || agent.identity == IDENTITY_NONE {
        Verdict {
            reason: Reason::UnknownIdentity,
            term: Verdict::NO_TERM,
        }
    } else if !is_pods_own(pod, &asked.addr) {
        Verdict {
            reason: Reason::NotThisPod,
            term: Verdict::NO_TERM,
        }
    } else if is_agent_port(pod, asked.port) {
        Verdict {
            reason: Reason::AgentPort,
            term: Verdict::NO_TERM,
        }
    } else {
        judge(&Query {
            set: pod.policy_set,
            identity: agent.identity,
            source: agent.source,
            port: asked.port,
            destination_v4: asked.addr.is_v4(),
        })
    };
    event(&Judged {
        netns: call.netns,
        hook: HOOK_CONNECT,
        source: &Endpoint::new(agent.source, 0),
        destination: asked,
        identity: agent.identity,
        set: pod.policy_set,
        verdict,
    });
    if !verdict.allows() {
        count(Counter::LastHopDenied);
        return REFUSE;
    }
    // Without it the SYN would be judged as plaintext from the wire.
    if !socket::remember(ctx, call.state(asked, SOCKET_LAST_HOP)) {
        count(Counter::NoRoom);
        return REFUSE;
    }
    count(Counter::LastHopAllowed);
    PASS
}

/// A connect of an application.
#[inline(always)]
fn app_connect<F: Family>(ctx: &SockAddrContext, call: &Call<'_>) -> i32 {
    socket::forget(ctx);
    let (pod, asked) = (call.pod, &call.asked);
    if asked.addr.is_loopback() || asked.addr.is_unspecified() || is_pods_own(pod, &asked.addr) {
        if is_agent_port(pod, asked.port) {
            count(Counter::AgentPort);
            return REFUSE;
        }
        return PASS;
    }
    if pod.flags & POD_READY == 0 {
        count(Counter::Held);
        return REFUSE;
    }

    // SAFETY: read-only, inside the RCU read section that the program runs in.
    let service = unsafe { SERVICES.get(asked) };
    let Some(service) = service else {
        // SAFETY: as above.
        let flags = match unsafe { WORKLOADS.get(asked.addr) } {
            Some(workload) => workload.flags,
            None if pod.flags & POD_REGISTRY_ONLY != 0 => return egress_refused(call),
            None => 0,
        };
        return route::<F>(ctx, call, asked, flags, false);
    };
    let backend = match pick(service) {
        Some(backend) => backend,
        // The service may have been replaced between the two look-ups.
        // SAFETY: as above.
        None => match unsafe { SERVICES.get(asked) }.and_then(pick) {
            Some(backend) => backend,
            None => return no_endpoint(),
        },
    };
    route::<F>(ctx, call, &backend.endpoint, backend.flags, true)
}

/// Sends the connect towards `target`.
#[inline(always)]
fn route<F: Family>(
    ctx: &SockAddrContext,
    call: &Call<'_>,
    target: &Endpoint,
    flags: u32,
    chosen: bool,
) -> i32 {
    if flags & WORKLOAD_REFUSE != 0 {
        count(Counter::Refused);
        return REFUSE;
    }
    let own = is_pods_own(call.pod, &target.addr);
    if (own || flags & WORKLOAD_MESH != 0) && is_agent_port(call.pod, target.port) {
        count(Counter::AgentPort);
        return REFUSE;
    }
    if flags & WORKLOAD_MESH == 0 || own {
        if chosen {
            if !F::write(ctx, target) {
                // An IPv6 backend of an IPv4 service address.
                return no_endpoint();
            }
            // Without storage `getpeername` names the backend: harmless.
            socket::remember(ctx, call.state(target, SOCKET_DIRECT));
        }
        count(Counter::Direct);
        return PASS;
    }

    // A socket bound to a device would not reach a local address through it.
    if socket::bound_to_device(ctx) {
        count(Counter::Refused);
        return REFUSE;
    }
    if !socket::remember(ctx, call.state(target, SOCKET_REDIRECTED)) {
        count(Counter::NoRoom);
        return REFUSE;
    }
    // The pod's own address rather than loopback: the kernel then chooses it as the
    // source too, and `getsockname` says what it would have said without us.
    let listener = if call.asked.addr.is_v4() {
        or_loopback(call.pod.addr4, Addr::v4([127, 0, 0, 1]))
    } else {
        or_loopback(call.pod.addr6, LOOPBACK6)
    };
    F::write(ctx, &Endpoint::new(listener, call.pod.outbound_port));
    count(Counter::Redirected);
    PASS
}

/// A random backend of the service.
#[inline(always)]
fn pick(service: &Service) -> Option<&'static Backend> {
    let backends = service.backends;
    if backends == 0 {
        return None;
    }
    // SAFETY: the helper has no precondition.
    let random = u64::from(unsafe { bpf_get_prandom_u32() });
    // The upper half of the product is uniform in 0..backends, without a division.
    let index = ((random * u64::from(backends)) >> 32) as u32;
    let key = BackendKey {
        service: service.id,
        index,
    };
    // SAFETY: read-only, inside the RCU read section that the program runs in; the
    // reference does not outlive the program.
    unsafe { BACKENDS.get(key) }
}

#[inline(always)]
fn no_endpoint() -> i32 {
    count(Counter::NoEndpoint);
    // SAFETY: the helper has no precondition. Should it fail, the error is EPERM.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    REFUSE
}

/// A registry-only pod asked for what the registry does not know.
#[inline(always)]
fn egress_refused(call: &Call<'_>) -> i32 {
    count(Counter::EgressRefused);
    let own = if call.asked.addr.is_v4() {
        call.pod.addr4
    } else {
        call.pod.addr6
    };
    event(&Judged {
        netns: call.netns,
        hook: HOOK_CONNECT,
        source: &Endpoint::new(own, 0),
        destination: &call.asked,
        identity: IDENTITY_NONE,
        set: 0,
        verdict: Verdict {
            reason: Reason::EgressRefused,
            term: Verdict::NO_TERM,
        },
    });
    REFUSE
}

#[inline(always)]
fn is_agent_port(pod: &Pod, port: u16) -> bool {
    port == pod.inbound_port || port == pod.outbound_port
}

/// `Addr::NONE` in the pod never matches: it is no address to connect to.
#[inline(always)]
fn is_pods_own(pod: &Pod, addr: &Addr) -> bool {
    same(addr, &pod.addr4) || same(addr, &pod.addr6)
}

#[inline(always)]
fn or_loopback(addr: Addr, loopback: Addr) -> Addr {
    if same(&addr, &Addr::NONE) {
        loopback
    } else {
        addr
    }
}

const LOOPBACK6: Addr = Addr([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
