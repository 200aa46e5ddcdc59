//! Comparisons that the verifier gets through quickly.

use ringfence_bpf_common::Addr;

/// Equality in one branch: `==` would call `memcmp`, whose early exits cost the
/// verifier a state per byte.
#[inline(always)]
pub fn same(left: &Addr, right: &Addr) -> bool {
    let [a, b, c, d] = left.words();
    let [w, x, y, z] = right.words();
    ((a ^ w) | (b ^ x) | (c ^ y) | (d ^ z)) == 0
}
