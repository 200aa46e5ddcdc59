//! The context of `connect` and `getpeername`: the address in the caller's buffer, and
//! the storage of the socket.

use core::mem::offset_of;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    programs::SockAddrContext,
};
use ringfence_bpf_common::{Addr, AppSocket, Endpoint};

use crate::{
    context::{load_addr, load_pointer, load_u32, store_u32},
    node_maps::SOCKS,
};

/// How one address family lays out the address in the context.
pub trait Family {
    /// The address in the buffer; IPv4 in its mapped form.
    fn read(ctx: &SockAddrContext) -> Endpoint;
    /// Replaces it. False when the family cannot express it.
    fn write(ctx: &SockAddrContext, endpoint: &Endpoint) -> bool;
}

/// `AF_INET`.
pub struct Inet;
/// `AF_INET6`, also with IPv4-mapped addresses.
pub struct Inet6;

impl Family for Inet {
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> Endpoint {
        // SAFETY: a readable field of the context.
        let ip = unsafe { load_u32!(ctx.sock_addr, offset_of!(bpf_sock_addr, user_ip4)) };
        Endpoint::new(Addr::v4(ip.to_ne_bytes()), port(ctx))
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, endpoint: &Endpoint) -> bool {
        if !endpoint.addr.is_v4() {
            return false;
        }
        let [_, _, _, ip] = endpoint.addr.words();
        // SAFETY: these hooks may write the field.
        unsafe { store_u32!(ctx.sock_addr, offset_of!(bpf_sock_addr, user_ip4), ip) };
        set_port(ctx, endpoint.port);
        true
    }
}

impl Family for Inet6 {
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> Endpoint {
        // SAFETY: a readable field of the context.
        let addr = unsafe { load_addr!(ctx.sock_addr, offset_of!(bpf_sock_addr, user_ip6)) };
        Endpoint::new(addr, port(ctx))
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, endpoint: &Endpoint) -> bool {
        let [a, b, c, d] = endpoint.addr.words();
        // SAFETY: these hooks may write the field.
        unsafe {
            store_u32!(ctx.sock_addr, offset_of!(bpf_sock_addr, user_ip6), a);
            store_u32!(ctx.sock_addr, offset_of!(bpf_sock_addr, user_ip6) + 4, b);
            store_u32!(ctx.sock_addr, offset_of!(bpf_sock_addr, user_ip6) + 8, c);
            store_u32!(ctx.sock_addr, offset_of!(bpf_sock_addr, user_ip6) + 12, d);
        }
        set_port(ctx, endpoint.port);
        true
    }
}

/// What `SO_PROTOCOL` says of the socket.
#[inline(always)]
pub fn protocol(ctx: &SockAddrContext) -> u32 {
    // SAFETY: a readable field of the context.
    unsafe { load_u32!(ctx.sock_addr, offset_of!(bpf_sock_addr, protocol)) }
}

/// What `SO_TYPE` says of the socket.
#[inline(always)]
pub fn kind(ctx: &SockAddrContext) -> u32 {
    // SAFETY: a readable field of the context.
    unsafe { load_u32!(ctx.sock_addr, offset_of!(bpf_sock_addr, type_)) }
}

/// Whether the socket is bound to a device (`SO_BINDTODEVICE`).
#[inline(always)]
pub fn bound_to_device(ctx: &SockAddrContext) -> bool {
    // SAFETY: a readable field of a socket that is never null in these hooks.
    unsafe { load_u32!(sk(ctx), offset_of!(bpf_sock, bound_dev_if)) != 0 }
}

/// The cookie of the network namespace, as `SO_NETNS_COOKIE` tells it.
#[inline(always)]
pub fn netns(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the helper takes this context.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// The cookie of the socket, as `SO_COOKIE` tells it.
#[inline(always)]
pub fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the helper takes this context.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// What is remembered of the socket.
#[inline(always)]
pub fn recall(ctx: &SockAddrContext) -> Option<Endpoint> {
    // SAFETY: the wrapper passes the socket of the context.
    let state = unsafe { SOCKS.get_ptr_mut(ctx) };
    if state.is_null() {
        return None;
    }
    // SAFETY: just checked; the storage lives as long as the socket of this call.
    Some(unsafe { (*state).asked })
}

/// Remembers `state` with the socket. False when the kernel has no memory for it.
#[inline(always)]
pub fn remember(ctx: &SockAddrContext, mut state: AppSocket) -> bool {
    // SAFETY: the wrapper passes the socket of the context.
    let slot = unsafe { SOCKS.get_or_insert_ptr_mut(ctx, Some(&mut state)) };
    if slot.is_null() {
        return false;
    }
    // Storage that existed already keeps its old value.
    // SAFETY: just checked; the storage is not the stack, and `connect` holds the
    // socket's lock. An assignment would call `memmove`.
    unsafe { core::ptr::copy_nonoverlapping(&raw const state, slot, 1) };
    true
}

/// Forgets what an earlier `connect` of the socket left.
#[inline(always)]
pub fn forget(ctx: &SockAddrContext) {
    // SAFETY: the socket of the call. That it had nothing to forget is no error here.
    let _ = unsafe { SOCKS.delete(sk(ctx)) };
}

/// The socket of the call; never null in these hooks.
#[inline(always)]
fn sk(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: a readable field of the context.
    unsafe { load_pointer!(ctx.sock_addr, offset_of!(bpf_sock_addr, __bindgen_anon_1)) }
}

#[inline(always)]
fn port(ctx: &SockAddrContext) -> u16 {
    // SAFETY: a readable field of the context.
    let raw = unsafe { load_u32!(ctx.sock_addr, offset_of!(bpf_sock_addr, user_port)) };
    u16::from_be(raw as u16)
}

#[inline(always)]
fn set_port(ctx: &SockAddrContext, port: u16) {
    // SAFETY: these hooks may write the field.
    unsafe {
        store_u32!(
            ctx.sock_addr,
            offset_of!(bpf_sock_addr, user_port),
            port.to_be()
        )
    };
}
