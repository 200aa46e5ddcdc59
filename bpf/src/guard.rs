//! The guard of one enrolled pod: two programs at the host side of its devices, where
//! the pod cannot reach them. Here nothing is decided that `connect` and `sk_lookup`
//! decide; what did not pass them is dropped.
#![no_std]
#![no_main]
// Assembly for this target is not stable yet; `aya-ebpf` needs it too.
#![feature(asm_experimental_arch)]

mod guard_packet;
mod guard_rules;
mod maps;
mod mesh_maps;
mod predicate;
mod report;
mod runtime;
