//! The programs of the node, attached to the root of the cgroup v2 hierarchy: they
//! see every TCP connect of the machine and act on those of enrolled network
//! namespaces alone.
#![no_std]
#![no_main]
// Assembly for this target is not stable yet; `aya-ebpf` needs it too.
#![feature(asm_experimental_arch)]

mod authorize;
mod connect;
mod connect4;
mod connect6;
mod context;
mod getpeername4;
mod getpeername6;
mod judge;
mod maps;
mod mesh_maps;
mod node_maps;
mod predicate;
mod report;
mod runtime;
mod sock_create;
mod sock_ops;
mod socket;
