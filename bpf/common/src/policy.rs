//! Keys and values of the policy maps.
//!
//! The policies of a workload are flattened to *terms*, each a conjunction of one
//! condition per dimension (source identity, source address, destination port, destination
//! address). DENY terms have the low numbers, ALLOW terms the rest. A look-up in each
//! dimension gives the mask of the terms whose condition holds there; the lowest term in
//! the intersection of the four decides.
//!
//! A mask is stored without its empty parts, so that what a verdict costs depends on how
//! many terms come near to matching and not on how many there are.

use crate::Addr;

/// The identity of plaintext.
pub const IDENTITY_NONE: u32 = 0;

/// 64-bit words in a [`Block`].
pub const BLOCK_WORDS: usize = 4;
/// Terms in a [`Block`].
pub const BLOCK_TERMS: usize = BLOCK_WORDS * 64;
/// Blocks in a mask: one bit each in [`Mask::summary`].
pub const MASK_BLOCKS: usize = 64;
/// Terms that one policy set can hold.
pub const MAX_TERMS: usize = MASK_BLOCKS * BLOCK_TERMS;

/// A set of terms: which of its blocks have any, and where those are.
///
/// Words of 32 bits: the trie stores its value right behind 20 bytes of key data.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Mask {
    /// Bit `i` (lower half first): block `i`, the terms `256 i .. 256 (i + 1)`, is not
    /// empty.
    pub summary: [u32; 2],
    /// Index into `POLICY_BLOCKS` of the first block that is not empty; the others follow
    /// it in order.
    pub first: u32,
}

impl Mask {
    /// No term.
    pub const NONE: Mask = Mask {
        summary: [0; 2],
        first: 0,
    };

    /// [`Mask::summary`] as one word.
    #[inline(always)]
    pub const fn blocks(&self) -> u64 {
        self.summary[0] as u64 | (self.summary[1] as u64) << 32
    }

    /// Index into `POLICY_BLOCKS` of block `number`, which must not be empty.
    #[inline(always)]
    pub const fn index(&self, number: u32) -> u32 {
        let below = (1u64 << (number & 63)) - 1;
        self.first.wrapping_add(ones(self.blocks() & below))
    }
}

/// One element of `POLICY_BLOCKS`: 256 terms of a mask. Never changed while a mask in the
/// kernel refers to it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Block(pub [u64; BLOCK_WORDS]);

impl Block {
    /// The terms in both.
    #[inline(always)]
    pub fn and(&self, other: &Block) -> Block {
        let mut out = [0; BLOCK_WORDS];
        let mut i = 0;
        while i < BLOCK_WORDS {
            out[i] = self.0[i] & other.0[i];
            i += 1;
        }
        Block(out)
    }

    /// The lowest term, counted within the block.
    #[inline(always)]
    pub fn first(&self) -> Option<u32> {
        let mut i = 0;
        while i < BLOCK_WORDS {
            if self.0[i] != 0 {
                return Some(i as u32 * 64 + lowest_bit(self.0[i]));
            }
            i += 1;
        }
        None
    }
}

/// The number of ones, counted in parallel: the BPF instruction set cannot count them,
/// and a loop would multiply what the verifier walks.
#[inline(always)]
pub(crate) const fn ones(word: u64) -> u32 {
    let pairs = word - ((word >> 1) & 0x5555_5555_5555_5555);
    let fours = (pairs & 0x3333_3333_3333_3333) + ((pairs >> 2) & 0x3333_3333_3333_3333);
    let bytes = (fours + (fours >> 4)) & 0x0f0f_0f0f_0f0f_0f0f;
    (bytes.wrapping_mul(0x0101_0101_0101_0101) >> 56) as u32
}

/// Index of the lowest set bit: the number of ones below it.
#[inline(always)]
pub(crate) const fn lowest_bit(word: u64) -> u32 {
    ones(!word & word.wrapping_sub(1))
}

/// `POLICY_SETS`: the compiled policies of a workload, or of several with the same.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PolicySet {
    /// Bits of `SET_*`.
    pub flags: u32,
    /// Terms below this number are those of DENY policies, the others of ALLOW policies.
    pub deny_terms: u32,
    /// Terms whose source condition holds for an address that `POLICY_SOURCES` lacks.
    pub other_sources: Mask,
    /// Terms whose port condition holds for a port that `POLICY_PORTS` lacks.
    pub other_ports: Mask,
    /// Terms whose destination condition holds for the pod's IPv4 address.
    pub destination4: Mask,
    /// Terms whose destination condition holds for the pod's IPv6 address.
    pub destination6: Mask,
}

/// Plaintext is refused (PeerAuthentication STRICT).
pub const SET_STRICT: u32 = 1;
/// There is at least one ALLOW policy: what no term allows is denied.
pub const SET_HAS_ALLOW: u32 = 2;
/// The policies cannot be represented: everything is denied.
pub const SET_UNREPRESENTABLE: u32 = 4;
/// A policy that the workload names has not arrived: everything is denied.
pub const SET_POLICY_NOT_RECEIVED: u32 = 8;
/// `POLICY_SOURCES` has entries of the set: without them the trie, which grows slower with
/// the number of all entries, is not asked.
pub const SET_HAS_SOURCES: u32 = 16;
/// `POLICY_PORTS` has entries of the set.
pub const SET_HAS_PORTS: u32 = 32;

/// `POLICY_IDENTITIES` key → [`Mask`] of the terms whose source identity condition holds.
/// An identity without an entry is denied.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct IdentityKey {
    pub set: u32,
    pub identity: u32,
}

/// `POLICY_PORTS` key → [`Mask`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PortKey {
    pub set: u32,
    pub port: u16,
    pub pad: u16,
}

/// `POLICY_SOURCES` key data (LPM trie) → [`Mask`]: the answer for every address whose
/// longest match this prefix is. The prefix length counts the 32 bits of `set` too.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SourceKey {
    /// Big endian, so that the trie compares it as a prefix.
    pub set: [u8; 4],
    pub addr: Addr,
}

const _: () = {
    assert!(size_of::<Mask>() == 12 && align_of::<Mask>() == 4);
    assert!(size_of::<Block>() == 32);
    assert!(size_of::<PolicySet>() == 8 + 4 * 12);
    assert!(size_of::<SourceKey>() == 20);
    // `Verdict::term` is 16 bits wide, and its highest value means none.
    assert!(MAX_TERMS < u16::MAX as usize);
};

#[cfg(feature = "aya")]
mod pod {
    use super::*;
    macro_rules! pod {
        ($($t:ty),*) => {$(
            // SAFETY: `#[repr(C)]`, made of integers and arrays of them, without
            // implicit padding (asserted above), so any bytes are a valid value.
            unsafe impl aya::Pod for $t {}
        )*};
    }
    pod!(Mask, Block, PolicySet, IdentityKey, PortKey, SourceKey);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_term_of_a_block_is_found_wherever_it_is() {
        assert_eq!(Block::default().first(), None);
        for term in 0..BLOCK_TERMS {
            let mut block = Block::default();
            block.0[term / 64] |= 1 << (term % 64);
            assert_eq!(block.first(), Some(term as u32));
            // Higher ones do not matter.
            for higher in term + 1..BLOCK_TERMS {
                block.0[higher / 64] |= 1 << (higher % 64);
            }
            assert_eq!(block.first(), Some(term as u32));
        }
    }

    #[test]
    fn blocks_are_counted_from_the_first_that_is_not_empty() {
        let blocks = 1u64 << 3 | 1 << 31 | 1 << 32 | 1 << 63;
        let mask = Mask {
            summary: [blocks as u32, (blocks >> 32) as u32],
            first: 100,
        };
        assert_eq!(mask.blocks(), blocks);
        for (number, index) in [(3, 100), (31, 101), (32, 102), (63, 103)] {
            assert_eq!(mask.index(number), index);
        }
    }

    #[test]
    fn ones_are_counted_as_the_processor_counts_them() {
        for word in [0, 1, u64::MAX, 0x8000_0000_0000_0001, 0x0123_4567_89ab_cdef] {
            assert_eq!(ones(word), word.count_ones());
        }
        for bit in 0..64 {
            assert_eq!(lowest_bit(1 << bit), bit);
            assert_eq!(lowest_bit(u64::MAX << bit), bit);
        }
    }
}
