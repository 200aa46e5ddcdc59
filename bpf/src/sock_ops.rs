//! What becomes of a TCP connection after `connect`: where a redirected one was going, by
//! the time the agent can accept it; the last hops that were admitted, which `sk_lookup`
//! lets in; and the connections that were admitted in plaintext, before the application
//! can accept them.

use core::{
    ffi::c_void,
    mem::offset_of,
    ptr::{addr_of, null_mut},
};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_ANY, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, bpf_sock_ops,
    },
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_storage_get},
    macros::sock_ops,
    programs::SockOpsContext,
};
use ringfence_bpf_common::{
    Addr, AppSocket, Counter, Endpoint, Flow, Handshake, OriginalDst, SOCKET_LAST_HOP,
    SOCKET_REDIRECTED,
};

use crate::{
    context::{load_addr, load_pointer, load_u32},
    maps::{LAST_HOPS, PODS},
    mesh_maps::PLAINTEXT,
    node_maps::{ACCEPTED, ORIGINAL_DST, SOCKS},
    predicate::same,
    report::count,
};

const AF_INET: u32 = 2;

#[sock_ops]
#[inline(always)]
pub fn ringfence_tcp(ctx: SockOpsContext) -> u32 {
    match field(&ctx, Field::Op) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => connected(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(&ctx),
        BPF_SOCK_OPS_STATE_CB => closing(&ctx),
        _ => {}
    }
    1
}

/// The 4-tuple of a last hop is known, and its SYN has not left yet.
#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let Some(state) = state(ctx) else {
        return;
    };
    if state.kind != SOCKET_LAST_HOP {
        return;
    }
    if LAST_HOPS
        .insert(flow(ctx, state.netns), state.cookie, u64::from(BPF_ANY))
        .is_err()
    {
        // It will be judged as plaintext.
        count(Counter::NoRoom);
    }
    tell_the_end(ctx);
}

/// An application's end of a redirected connection is established, and its ACK has not
/// left yet: without that there is no agent's end.
#[inline(always)]
fn connected(ctx: &SockOpsContext) {
    let Some(state) = state(ctx) else {
        return;
    };
    if state.kind != SOCKET_REDIRECTED {
        return;
    }
    // What the SYN carried (TCP fast open) is not counted: the agent's listener takes none.
    state.source_seq = field(ctx, Field::Acknowledged);
    state.listener_seq = field(ctx, Field::NextReceived);
    let record = OriginalDst {
        asked: state.asked,
        backend: state.backend,
        cookie: state.cookie,
    };
    if ORIGINAL_DST
        .insert(handshake(ctx, state), record, u64::from(BPF_NOEXIST))
        .is_err()
    {
        // Without a record the agent resets the connection.
        count(Counter::NoRoom);
        return;
    }
    tell_the_end(ctx);
}

/// Lets [`closing`] be called: the records go away with the connection.
#[inline(always)]
fn tell_the_end(ctx: &SockOpsContext) {
    let flags = field(ctx, Field::CallbackFlags) | BPF_SOCK_OPS_STATE_CB_FLAG;
    let _ = ctx.set_cb_flags(flags as i32);
}

/// A connection to a listener is established: in plaintext from the wire, unless it is a
/// tunnel, a last hop or the pod's own.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    // SAFETY: the helper takes this context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: read-only, inside the RCU read section that the program runs in.
    let Some(pod) = (unsafe { PODS.get(netns) }) else {
        return;
    };
    let Flow {
        source: local,
        listener: remote,
        ..
    } = flow(ctx, netns);
    if local.port == pod.outbound_port {
        return hand_over(
            ctx,
            Flow {
                netns,
                source: remote,
                listener: local,
            },
        );
    }
    if local.port == pod.inbound_port
        || remote.addr.is_loopback()
        || same(&remote.addr, &pod.addr4)
        || same(&remote.addr, &pod.addr6)
    {
        return;
    }
    let flow = Flow {
        netns,
        source: remote,
        listener: local,
    };
    if LAST_HOPS.get_ptr(flow).is_some() {
        return;
    }
    // SAFETY: the helper takes this context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if PLAINTEXT.insert(flow, cookie, u64::from(BPF_ANY)).is_err() {
        // The agent still finds it among the namespace's sockets.
        count(Counter::NoRoom);
        return;
    }
    tell_the_end(ctx);
}

/// The agent's end of a connection from `flow.source` is established: it gets the record
/// that the application's end left under the same handshake. One that nobody redirected
/// finds none.
#[inline(always)]
fn hand_over(ctx: &SockOpsContext, flow: Flow) {
    let key = Handshake {
        flow,
        source_seq: field(ctx, Field::NextReceived),
        listener_seq: field(ctx, Field::NextSent),
    };
    // SAFETY: copied before it is removed; see below.
    let Some(mut record) = (unsafe { ORIGINAL_DST.get(&key) }).copied() else {
        return;
    };
    // The kernel gives the memory of a removed record to the next one at once. No key comes
    // twice: whoever removes the record has read it and no other.
    if ORIGINAL_DST.remove(&key).is_err() {
        return;
    }
    let sk = socket(ctx);
    if sk.is_null() {
        return;
    }
    // SAFETY: a socket that is not null, a map of socket storage and a value of its type.
    let slot = unsafe {
        bpf_sk_storage_get(
            addr_of!(ACCEPTED).cast_mut().cast(),
            sk,
            (&raw mut record).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
    };
    if slot.is_null() {
        count(Counter::NoRoom);
    }
}

/// Removes the entry of a last hop or of a plaintext connection that ended, and the record
/// of a redirected one that ended without an end of the agent's.
#[inline(always)]
fn closing(ctx: &SockOpsContext) {
    if field(ctx, Field::To) != BPF_TCP_CLOSE {
        return;
    }
    let Some(state) = state(ctx) else {
        return forget_accepted(ctx);
    };
    match state.kind {
        SOCKET_LAST_HOP => {
            let _ = LAST_HOPS.remove(flow(ctx, state.netns));
        }
        SOCKET_REDIRECTED => {
            let _ = ORIGINAL_DST.remove(handshake(ctx, state));
        }
        _ => {}
    }
}

/// The handshake of the application's end, as it was when that was established.
#[inline(always)]
fn handshake(ctx: &SockOpsContext, state: &AppSocket) -> Handshake {
    Handshake {
        flow: flow(ctx, state.netns),
        source_seq: state.source_seq,
        listener_seq: state.listener_seq,
    }
}

#[inline(always)]
fn forget_accepted(ctx: &SockOpsContext) {
    // SAFETY: the helpers take this context.
    let (netns, cookie) = unsafe {
        (
            bpf_get_netns_cookie(ctx.as_ptr()),
            bpf_get_socket_cookie(ctx.as_ptr()),
        )
    };
    let Flow {
        source, listener, ..
    } = flow(ctx, netns);
    let flow = Flow {
        netns,
        source: listener,
        listener: source,
    };
    // SAFETY: read-only, inside the RCU read section that the program runs in.
    if unsafe { PLAINTEXT.get(flow) } == Some(&cookie) {
        let _ = PLAINTEXT.remove(flow);
    }
}

/// What `connect` remembered of the socket.
#[inline(always)]
fn state(ctx: &SockOpsContext) -> Option<&mut AppSocket> {
    let sk = socket(ctx);
    if sk.is_null() {
        return None;
    }
    // SAFETY: a socket that is not null and a map of socket storage; nothing is created.
    let state = unsafe { bpf_sk_storage_get(addr_of!(SOCKS).cast_mut().cast(), sk, null_mut(), 0) }
        .cast::<AppSocket>();
    // SAFETY: null or storage that lives as long as the socket of this call, which holds
    // the socket's lock.
    unsafe { state.as_mut() }
}

#[inline(always)]
fn socket(ctx: &SockOpsContext) -> *mut c_void {
    // SAFETY: a readable field of the context.
    unsafe { load_pointer!(ctx.ops, offset_of!(bpf_sock_ops, __bindgen_anon_2)) }
}

/// The connection as the agent's end of it sees it. An `AF_INET6` socket with an
/// IPv4-mapped destination has mapped addresses here, so all forms give one key.
#[inline(always)]
fn flow(ctx: &SockOpsContext, netns: u64) -> Flow {
    // SAFETY: readable fields of the context.
    unsafe {
        let local_port = load_u32!(ctx.ops, offset_of!(bpf_sock_ops, local_port));
        let remote_port = load_u32!(ctx.ops, offset_of!(bpf_sock_ops, remote_port));
        let (local, remote) = if field(ctx, Field::Family) == AF_INET {
            let local = load_u32!(ctx.ops, offset_of!(bpf_sock_ops, local_ip4));
            let remote = load_u32!(ctx.ops, offset_of!(bpf_sock_ops, remote_ip4));
            (
                Addr::v4(local.to_ne_bytes()),
                Addr::v4(remote.to_ne_bytes()),
            )
        } else {
            (
                load_addr!(ctx.ops, offset_of!(bpf_sock_ops, local_ip6)),
                load_addr!(ctx.ops, offset_of!(bpf_sock_ops, remote_ip6)),
            )
        };
        Flow {
            netns,
            // Host byte order, unlike the remote port, whose two bytes are in network
            // order in the upper half.
            source: Endpoint::new(local, local_port as u16),
            listener: Endpoint::new(remote, u32::from_be(remote_port) as u16),
        }
    }
}

enum Field {
    Op,
    Family,
    CallbackFlags,
    /// State callback: the state that comes.
    To,
    /// The number of the first byte that the other end has not acknowledged (`snd_una`).
    Acknowledged,
    /// The number of the next byte to be sent (`snd_nxt`).
    NextSent,
    /// The number of the next byte that is expected (`rcv_nxt`).
    NextReceived,
}

#[inline(always)]
fn field(ctx: &SockOpsContext, field: Field) -> u32 {
    // The arguments are the first member of the union behind `op`.
    const ARGS: usize = offset_of!(bpf_sock_ops, __bindgen_anon_1);
    // SAFETY: readable fields of the context.
    unsafe {
        match field {
            Field::Op => load_u32!(ctx.ops, offset_of!(bpf_sock_ops, op)),
            Field::Family => load_u32!(ctx.ops, offset_of!(bpf_sock_ops, family)),
            Field::CallbackFlags => {
                load_u32!(ctx.ops, offset_of!(bpf_sock_ops, bpf_sock_ops_cb_flags))
            }
            Field::To => load_u32!(ctx.ops, ARGS + 4),
            Field::Acknowledged => load_u32!(ctx.ops, offset_of!(bpf_sock_ops, snd_una)),
            Field::NextSent => load_u32!(ctx.ops, offset_of!(bpf_sock_ops, snd_nxt)),
            Field::NextReceived => load_u32!(ctx.ops, offset_of!(bpf_sock_ops, rcv_nxt)),
        }
    }
}
