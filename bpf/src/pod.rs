//! The program of one enrolled network namespace: judges plaintext from the wire.
#![no_std]
#![no_main]
// Assembly for this target is not stable yet; `aya-ebpf` needs it too.
#![feature(asm_experimental_arch)]

mod authorize;
mod context;
mod maps;
mod predicate;
mod report;
mod runtime;
mod sk_lookup;
