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
/// Most masks of a set differ from one another in few blocks. So the blocks come from two
/// places: a *base* that many masks share, which has one for every number, and a run of the
/// mask's own, which has those that differ.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Mask {
    /// Bit `i`: block `i`, the terms `256 i .. 256 (i + 1)`, is not empty.
    pub summary: u64,
    /// Bit `i`: block `i` is one of the mask's own. No bit that `summary` lacks.
    pub own: u64,
    /// Index into `POLICY_BLOCKS` of the first of its own; the others follow it in order.
    pub first: u32,
    /// Lower 24 bits: index into `POLICY_BLOCKS` of the base's block 0. Upper 8 bits: how
    /// many blocks the base has, 0 when there is none; only userspace asks.
    pub base: u32,
}

impl Mask {
    /// No term.
    pub const NONE: Mask = Mask {
        summary: 0,
        own: 0,
        first: 0,
        base: 0,
    };

    /// Index into `POLICY_BLOCKS` of block `number`, which must not be empty.
    #[inline(always)]
    pub const fn index(&self, number: u32) -> u32 {
        let bit = 1u64 << (number & 63);
        if self.own & bit != 0 {
            self.first.wrapping_add(ones(self.own & (bit - 1)))
        } else {
            (self.base & MAX_BASE).wrapping_add(number)
        }
    }
}

/// Highest index into `POLICY_BLOCKS` of a base's first block.
pub const MAX_BASE: u32 = (1 << 24) - 1;

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
    /// Where the search for an IPv4 source begins: the answer for addresses in no prefix.
    pub sources4: SourceMatch,
    /// The same for an IPv6 source.
    pub sources6: SourceMatch,
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
/// `POLICY_PORTS` has entries of the set.
pub const SET_HAS_PORTS: u32 = 16;

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

/// `POLICY_SOURCES` key → [`SourceMatch`]: a prefix, its bits behind `length` zero.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SourceKey {
    pub set: u32,
    /// 1 to 128 bits of the address; IPv4 prefixes (mapped) have 97 or more.
    pub length: u32,
    /// The first 64 bits of the address as a number.
    pub upper: u64,
    /// The last 64 bits.
    pub lower: u64,
}

impl SourceKey {
    /// The prefix of an address; a `length` above 128 counts as 128.
    #[inline(always)]
    pub const fn new(set: u32, length: u32, upper: u64, lower: u64) -> Self {
        let length = if length < 128 { length } else { 128 };
        let (in_upper, in_lower) = if length <= 64 {
            (length, 0)
        } else {
            (64, length - 64)
        };
        SourceKey {
            set,
            length,
            upper: upper & leading(in_upper),
            lower: lower & leading(in_lower),
        }
    }
}

/// What is known of a source address after a prefix of it was found: an element of a binary
/// search on prefix lengths (Waldvogel, Varghese, Turner and Plattner, SIGCOMM 1997).
///
/// `POLICY_SOURCES` has the prefixes that policies name, and *markers*: shorter prefixes of
/// those, at lengths where the search comes by. Finding one means that only longer ones can
/// say more, missing it that only shorter ones can. Either halves the lengths that are left
/// below the last hit, so a source is judged by at most [`SOURCE_PROBES`] look-ups however
/// many prefixes there are: 6 for IPv4, and 1 where all prefixes have the same length.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SourceMatch {
    /// Terms whose source condition holds for addresses of which nothing longer is found:
    /// the answer of the longest prefix, among those that policies name, that covers this one.
    pub mask: Mask,
    /// The lengths to ask for next, each one byte, lowest byte first: the next one when one
    /// is missed, and those of what was found when it is found. 0 ends the search.
    pub lengths: u64,
}

/// Look-ups in `POLICY_SOURCES` of one verdict: 128 lengths, halved each time.
pub const SOURCE_PROBES: u32 = 8;

/// A number whose `count` (at most 64) highest bits are ones.
#[inline(always)]
const fn leading(count: u32) -> u64 {
    // In two steps, because none may shift by 64.
    let half = count / 2;
    !((u64::MAX >> half) >> (count - half))
}

const _: () = {
    assert!(size_of::<Mask>() == 24 && size_of::<Block>() == 32);
    assert!(size_of::<SourceKey>() == 24 && size_of::<SourceMatch>() == 32);
    assert!(size_of::<PolicySet>() == 8 + 2 * 32 + 3 * 24);
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
    pod!(Mask, Block, PolicySet, IdentityKey, PortKey);
    pod!(SourceKey, SourceMatch);
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
    fn own_blocks_are_counted_and_the_others_are_those_of_the_base() {
        let own = 1u64 << 3 | 1 << 31 | 1 << 63;
        let mask = Mask {
            summary: own | 1 << 4 | 1 << 32,
            own,
            first: 100,
            base: 64 << 24 | 1000,
        };
        for (number, index) in [(3, 100), (4, 1004), (31, 101), (32, 1032), (63, 102)] {
            assert_eq!(mask.index(number), index);
        }
    }

    #[test]
    fn key_has_the_bits_of_its_length_and_no_others() {
        let address = 0x2001_0db8_ffff_ffff_f0f0_ffff_ffff_ffffu128;
        for length in 0..=130u32 {
            let key = SourceKey::new(7, length, (address >> 64) as u64, address as u64);
            let length = length.min(128);
            let expected = address & u128::MAX.checked_shl(128 - length).unwrap_or(0);
            assert_eq!((key.set, key.length), (7, length));
            assert_eq!((key.upper as u128) << 64 | key.lower as u128, expected);
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
