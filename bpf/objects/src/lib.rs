//! The compiled eBPF programs, embedded. Sources: `bpf/src`.
//!
//! The objects are ELF files for `bpfel-unknown-none` with BTF; the loader wants
//! their first byte aligned, which a plain `include_bytes!` does not promise.
#![no_std]

/// The programs of the node: `connect`, `getpeername` and TCP callbacks, attached to
/// the root of the cgroup v2 hierarchy.
pub static NODE: &[u8] = &NODE_OBJECT.bytes;

/// The program of one enrolled network namespace: `sk_lookup`, one instance each.
pub static POD: &[u8] = &POD_OBJECT.bytes;

/// The programs at the host side of one enrolled pod's devices: one instance each.
pub static GUARD: &[u8] = &GUARD_OBJECT.bytes;

#[repr(C, align(8))]
struct Aligned<T: ?Sized> {
    bytes: T,
}

static NODE_OBJECT: &Aligned<[u8]> = &Aligned {
    bytes: *include_bytes!(concat!(env!("OUT_DIR"), "/node.o")),
};
static POD_OBJECT: &Aligned<[u8]> = &Aligned {
    bytes: *include_bytes!(concat!(env!("OUT_DIR"), "/pod.o")),
};
static GUARD_OBJECT: &Aligned<[u8]> = &Aligned {
    bytes: *include_bytes!(concat!(env!("OUT_DIR"), "/guard.o")),
};

#[cfg(test)]
mod tests {
    use super::{GUARD, NODE, POD};

    #[test]
    fn objects_are_aligned_elf_files() {
        for object in [NODE, POD, GUARD] {
            assert!(object.starts_with(b"\x7fELF"));
            assert_eq!(object.as_ptr().align_offset(8), 0);
        }
    }
}
