//! Records under the 4-tuple, which is known here and the SYN has not left yet: the
//! original destination of a redirected connection, which the agent looks up at
//! `accept`, and the last hops that were admitted, which `sk_lookup` lets in. And the
//! connections that were admitted in plaintext, once they are established: before the
//! application can accept them.

use core::{
    ffi::c_void,
    mem::offset_of,
    ptr::{addr_of, null_mut},
};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_ANY, BPF_EXIST, BPF_NOEXIST, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_TCP_CLOSE, BPF_TCP_ESTABLISHED, BPF_TCP_FIN_WAIT1, BPF_TCP_SYN_SENT, bpf_sock_ops,
    },
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_storage_get},
    macros::sock_ops,
    programs::SockOpsContext,
};
use ringfence_bpf_common::{
    Addr, AppSocket, Counter, Endpoint, Flow, OriginalDst, SOCKET_LAST_HOP, SOCKET_REDIRECTED,
};

use crate::{
    context::{load_addr, load_pointer, load_u32},
    maps::{LAST_HOPS, PODS},
    mesh_maps::PLAINTEXT,
    node_maps::{ORIGINAL_DST, SOCKS},
    predicate::same,
    report::count,
};

const AF_INET: u32 = 2;
const EEXIST: i32 = 17;

#[sock_ops]
#[inline(always)]
pub fn ringfence_tcp(ctx: SockOpsContext) -> u32 {
    match field(&ctx, Field::Op) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(&ctx),
        BPF_SOCK_OPS_STATE_CB => closing(&ctx),
        _ => {}
    }
    1
}

#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let Some(state) = state(ctx) else {
        return;
    };
    let flow = flow(ctx, state.netns);
    match state.kind {
        SOCKET_REDIRECTED => record_original(flow, state),
        SOCKET_LAST_HOP => {
            if LAST_HOPS
                .insert(flow, state.cookie, u64::from(BPF_ANY))
                .is_err()
            {
                // It will be judged as plaintext.
                count(Counter::NoRoom);
            }
        }
        _ => return,
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
    if local.port == pod.inbound_port
        || local.port == pod.outbound_port
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

#[inline(always)]
fn record_original(flow: Flow, app: &AppSocket) {
    let record = OriginalDst {
        asked: app.asked,
        backend: app.backend,
        cookie: app.cookie,
    };
    match ORIGINAL_DST.insert(flow, record, u64::from(BPF_NOEXIST)) {
        Ok(()) => {}
        Err(error) if error == -EEXIST => {
            // An earlier connection from this port has ended and still waits in the
            // agent's backlog. Its bytes must not go to this one's destination.
            count(Counter::NoRoom);
            let claimed_twice = OriginalDst {
                cookie: 0,
                ..record
            };
            let _ = ORIGINAL_DST.insert(flow, claimed_twice, u64::from(BPF_ANY));
        }
        // Without a record the agent resets the connection.
        Err(_) => count(Counter::NoRoom),
    }
}

/// Removes the record of a connection that was refused, spoils that of one which was
/// aborted before the agent accepted it (an orderly close keeps it: what was sent still
/// waits to be accepted), and removes the entry of a last hop or of a plaintext connection
/// that ended.
#[inline(always)]
fn closing(ctx: &SockOpsContext) {
    if field(ctx, Field::To) != BPF_TCP_CLOSE {
        return;
    }
    let Some(state) = state(ctx) else {
        return forget_accepted(ctx);
    };
    let from = field(ctx, Field::From);
    let flow = flow(ctx, state.netns);
    if state.kind == SOCKET_LAST_HOP {
        let _ = LAST_HOPS.remove(flow);
    } else if state.kind == SOCKET_REDIRECTED {
        match from {
            // The agent's end has not come about.
            BPF_TCP_SYN_SENT => {
                let _ = ORIGINAL_DST.remove(flow);
            }
            // It may wait in the agent's backlog, with bytes that can still be read. Were
            // there no record, the next connection's from this port would be taken for its own.
            BPF_TCP_ESTABLISHED | BPF_TCP_FIN_WAIT1 => {
                let nobodys = OriginalDst {
                    asked: state.asked,
                    backend: state.backend,
                    cookie: 0,
                };
                let _ = ORIGINAL_DST.insert(flow, nobodys, u64::from(BPF_EXIST));
            }
            _ => {}
        }
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
fn state(ctx: &SockOpsContext) -> Option<&AppSocket> {
    // SAFETY: a readable field of the context.
    let sk: *mut c_void =
        unsafe { load_pointer!(ctx.ops, offset_of!(bpf_sock_ops, __bindgen_anon_2)) };
    if sk.is_null() {
        return None;
    }
    // SAFETY: a socket that is not null and a map of socket storage; nothing is created.
    let state = unsafe { bpf_sk_storage_get(addr_of!(SOCKS).cast_mut().cast(), sk, null_mut(), 0) }
        .cast::<AppSocket>();
    // SAFETY: null or storage that lives as long as the socket of this call.
    unsafe { state.as_ref() }
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
    /// State callback: the state that is left.
    From,
    /// State callback: the state that comes.
    To,
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
            Field::From => load_u32!(ctx.ops, ARGS),
            Field::To => load_u32!(ctx.ops, ARGS + 4),
        }
    }
}
