//! Loads from and stores to the kernel's contexts.
//!
//! The verifier rewrites each access to a context and wants the field's own width at a
//! constant offset from the unchanged pointer. The optimizer promises neither: it merges
//! branches by computing the address first. Assembly keeps the access as it is written.
#![allow(
    unused_macros,
    unused_imports,
    reason = "each object needs some of them"
)]

/// Loads a 32-bit field: `load_u32!(context, offset of the field)`.
macro_rules! load_u32 {
    ($ctx:expr, $offset:expr) => {{
        let value: u64;
        core::arch::asm!(
            "{value} = *(u32 *)({ctx} + {offset})",
            value = out(reg) value,
            ctx = in(reg) $ctx,
            offset = const $offset,
            options(readonly, nostack, preserves_flags),
        );
        value as u32
    }};
}

/// Loads a 16-bit field.
macro_rules! load_u16 {
    ($ctx:expr, $offset:expr) => {{
        let value: u64;
        core::arch::asm!(
            "{value} = *(u16 *)({ctx} + {offset})",
            value = out(reg) value,
            ctx = in(reg) $ctx,
            offset = const $offset,
            options(readonly, nostack, preserves_flags),
        );
        value as u16
    }};
}

/// Loads a pointer.
macro_rules! load_pointer {
    ($ctx:expr, $offset:expr) => {{
        let value;
        core::arch::asm!(
            "{value} = *(u64 *)({ctx} + {offset})",
            value = out(reg) value,
            ctx = in(reg) $ctx,
            offset = const $offset,
            options(readonly, nostack, preserves_flags),
        );
        value
    }};
}

/// Stores a 32-bit field.
macro_rules! store_u32 {
    ($ctx:expr, $offset:expr, $value:expr) => {
        core::arch::asm!(
            "*(u32 *)({ctx} + {offset}) = {value}",
            ctx = in(reg) $ctx,
            value = in(reg) u64::from($value),
            offset = const $offset,
            options(nostack, preserves_flags),
        )
    };
}

/// Loads a field of four 32-bit words in network byte order.
macro_rules! load_addr {
    ($ctx:expr, $offset:expr) => {
        ringfence_bpf_common::Addr::from_words([
            $crate::context::load_u32!($ctx, $offset),
            $crate::context::load_u32!($ctx, $offset + 4),
            $crate::context::load_u32!($ctx, $offset + 8),
            $crate::context::load_u32!($ctx, $offset + 12),
        ])
    };
}

pub(crate) use {load_addr, load_u16, load_u32};
pub(crate) use {load_pointer, store_u32};
