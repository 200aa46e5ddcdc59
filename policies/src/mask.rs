//! Sets of terms, and how they are laid out in `POLICY_BLOCKS`.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use ringfence_bpf_common::{BLOCK_TERMS, Block, MAX_BASE, MAX_TERMS, Mask};

/// A set of terms (numbers below [`MAX_TERMS`]). Only blocks that have a term take room,
/// and clones share them until one is changed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct TermMask {
    /// By number, none of them empty.
    blocks: Arc<Vec<(u8, Block)>>,
}

impl TermMask {
    /// Puts a term in. Says `false`, and does nothing, for a number that no mask can hold.
    #[must_use]
    pub fn set(&mut self, term: u16) -> bool {
        let (number, word, bit) = place(term);
        if usize::from(term) >= MAX_TERMS {
            return false;
        }
        let blocks = Arc::make_mut(&mut self.blocks);
        let at = match blocks.binary_search_by_key(&number, |(n, _)| *n) {
            Ok(at) => at,
            Err(at) => {
                blocks.insert(at, (number, Block::default()));
                at
            }
        };
        match blocks.get_mut(at).and_then(|(_, b)| b.0.get_mut(word)) {
            Some(word) => *word |= bit,
            None => return false,
        }
        true
    }

    /// Whether the term is in it.
    pub fn contains(&self, term: u16) -> bool {
        let (number, word, bit) = place(term);
        self.blocks
            .binary_search_by_key(&number, |(n, _)| *n)
            .ok()
            .and_then(|at| self.blocks.get(at)?.1.0.get(word))
            .is_some_and(|word| word & bit != 0)
    }

    /// The blocks that are not empty, by number.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = (u32, &Block)> {
        self.blocks
            .iter()
            .map(|(number, block)| (u32::from(*number), block))
    }

    /// Bit `i`: block `i` is not empty.
    pub fn summary(&self) -> u64 {
        self.blocks
            .iter()
            .fold(0, |summary, (number, _)| summary | 1 << (number & 63))
    }

    /// Whether no term is in it.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Puts all terms of `other` in.
    pub(crate) fn add(&mut self, other: &TermMask) {
        let mine = Arc::make_mut(&mut self.blocks);
        for (number, block) in other.blocks.iter() {
            match mine.binary_search_by_key(number, |(n, _)| *n) {
                Ok(at) => {
                    if let Some((_, mine)) = mine.get_mut(at) {
                        for (word, more) in mine.0.iter_mut().zip(block.0) {
                            *word |= more;
                        }
                    }
                }
                Err(at) => mine.insert(at, (*number, *block)),
            }
        }
    }

    /// Takes all terms of `other` out.
    pub(crate) fn remove(&mut self, other: &TermMask) {
        let mine = Arc::make_mut(&mut self.blocks);
        for (number, block) in other.blocks.iter() {
            if let Ok(at) = mine.binary_search_by_key(number, |(n, _)| *n)
                && let Some((_, left)) = mine.get_mut(at)
            {
                for (word, less) in left.0.iter_mut().zip(block.0) {
                    *word &= !less;
                }
                if left.0 == [0; _] {
                    mine.remove(at);
                }
            }
        }
    }

    /// The terms below `limit`.
    pub(crate) fn below(&self, limit: u32) -> TermMask {
        let cut = |(number, block): &(u8, Block)| {
            let mut block = *block;
            let mut first = u32::from(*number) * BLOCK_TERMS as u32;
            for word in &mut block.0 {
                let kept = limit.saturating_sub(first).min(64);
                *word &= 1u64.checked_shl(kept).map_or(u64::MAX, |bit| bit - 1);
                first += 64;
            }
            (block.0 != [0; _]).then_some((*number, block))
        };
        TermMask {
            blocks: Arc::new(self.blocks.iter().filter_map(cut).collect()),
        }
    }
}

/// Where blocks of masks are kept: in memory ([`Tables`](crate::Tables)), or in the
/// kernel's `POLICY_BLOCKS`.
pub trait BlockStore {
    /// Puts `blocks` (1 to 64 of them) under consecutive indices, and gives the first
    /// one; `None` when there is no room.
    fn store(&mut self, blocks: &[Block]) -> Option<u32>;
}

/// The masks of one set as they are laid out: equal ones once. Of those that differ from an
/// earlier one in few blocks these blocks alone are stored; the earlier one is their *base*.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    known: HashMap<TermMask, Mask>,
    /// The latest masks that resembled none before.
    bases: VecDeque<Base>,
    runs: Vec<(u32, u32)>,
}

#[derive(Clone, Debug)]
struct Base {
    /// By number, the empty ones included.
    blocks: Vec<Block>,
    /// As [`Mask::base`] has it, once it is stored in this form.
    place: Option<u32>,
}

/// Masks of fewer blocks have nothing to gain from a base.
const BLOCKS_WORTH_SHARING: usize = 4;
/// Bases that a mask is compared with.
const MOST_BASES: usize = 8;

impl Layout {
    /// Stores a mask in the form that [`ringfence_bpf_common::authorize`] reads, unless an
    /// equal one is there already; `None` when the store has no room. An empty mask takes
    /// none.
    pub fn mask(&mut self, mask: &TermMask, store: &mut impl BlockStore) -> Option<Mask> {
        if let Some(known) = self.known.get(mask) {
            return Some(*known);
        }
        let laid_out = self.lay_out(mask, store)?;
        self.known.insert(mask.clone(), laid_out);
        Some(laid_out)
    }

    /// The runs of blocks that were stored, each once: first index and length.
    pub fn runs(&self) -> impl Iterator<Item = (u32, u32)> {
        self.runs.iter().copied()
    }

    fn lay_out(&mut self, mask: &TermMask, store: &mut impl BlockStore) -> Option<Mask> {
        let summary = mask.summary();
        let (own, base) = self.base(mask, store).unwrap_or((summary, 0));
        let blocks: Vec<Block> = mask
            .blocks()
            .filter(|(number, _)| own & 1 << number != 0)
            .map(|(_, block)| *block)
            .collect();
        Some(Mask {
            summary,
            own,
            first: self.store(&blocks, store)?,
            base,
        })
    }

    /// Which blocks of the mask a base has not, and the place of the base; `None` when no
    /// base has at least half of them: then the mask may be the base of later ones.
    fn base(&mut self, mask: &TermMask, store: &mut impl BlockStore) -> Option<(u64, u32)> {
        if mask.blocks.len() < BLOCKS_WORTH_SHARING {
            return None;
        }
        let lacking = self.bases.iter().map(|base| base.lacks(mask)).enumerate();
        let nearest = lacking.min_by_key(|(_, lacks)| lacks.count_ones());
        let Some((at, lacks)) =
            nearest.filter(|(_, lacks)| lacks.count_ones() as usize * 2 <= mask.blocks.len())
        else {
            if self.bases.len() == MOST_BASES {
                self.bases.pop_front();
            }
            self.bases.push_back(Base::of(mask));
            return None;
        };
        let base = self.bases.get(at)?;
        if let Some(place) = base.place {
            return Some((lacks, place));
        }
        let blocks = base.blocks.clone();
        let first = self.store(&blocks, store)?;
        if first > MAX_BASE {
            return None;
        }
        let place = first | (blocks.len() as u32) << 24;
        self.bases.get_mut(at)?.place = Some(place);
        Some((lacks, place))
    }

    fn store(&mut self, blocks: &[Block], store: &mut impl BlockStore) -> Option<u32> {
        if blocks.is_empty() {
            return Some(0);
        }
        let first = store.store(blocks)?;
        self.runs.push((first, blocks.len() as u32));
        Some(first)
    }
}

impl Base {
    fn of(mask: &TermMask) -> Self {
        let length = mask.blocks().last().map_or(0, |(number, _)| number + 1);
        let mut blocks = vec![Block::default(); length as usize];
        for (number, block) in mask.blocks() {
            if let Some(place) = blocks.get_mut(number as usize) {
                *place = *block;
            }
        }
        Base {
            blocks,
            place: None,
        }
    }

    /// Bit `i`: block `i` of the mask is not empty, and another one here.
    fn lacks(&self, mask: &TermMask) -> u64 {
        mask.blocks()
            .filter(|(number, block)| self.blocks.get(*number as usize) != Some(block))
            .fold(0, |lacks, (number, _)| lacks | 1 << (number & 63))
    }
}

/// The runs of `POLICY_BLOCKS` that a mask of the kernel refers to, as first index and
/// length: its own blocks, and those of its base, which other masks of its set refer to too.
pub fn runs_of(mask: &Mask) -> impl Iterator<Item = (u32, u32)> {
    let own = (mask.first, mask.own.count_ones());
    let base = (mask.base & MAX_BASE, mask.base >> 24);
    [own, base].into_iter().filter(|(_, length)| *length > 0)
}

/// Equal masks share their blocks.
#[derive(Default)]
pub(crate) struct Interner(HashSet<TermMask>);

impl Interner {
    pub(crate) fn intern(&mut self, mask: TermMask) -> TermMask {
        if let Some(known) = self.0.get(&mask) {
            return known.clone();
        }
        self.0.insert(mask.clone());
        mask
    }
}

/// Block number, word in the block and bit in the word.
fn place(term: u16) -> (u8, usize, u64) {
    let within = usize::from(term) % BLOCK_TERMS;
    let [number, _] = term.to_be_bytes();
    (number, within / 64, 1 << (within % 64))
}

const _: () = assert!(BLOCK_TERMS == 256, "`place` takes the upper byte");

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use proptest::prelude::*;

    use super::*;

    fn mask(terms: impl IntoIterator<Item = u16>) -> TermMask {
        let mut mask = TermMask::default();
        for term in terms {
            assert!(mask.set(term));
        }
        mask
    }

    fn terms(mask: &TermMask) -> Vec<u16> {
        (0..MAX_TERMS as u16)
            .filter(|t| mask.contains(*t))
            .collect()
    }

    /// A store with room for some blocks.
    struct Room(Vec<Block>, usize);

    impl BlockStore for Room {
        fn store(&mut self, blocks: &[Block]) -> Option<u32> {
            let first = self.0.len();
            if first + blocks.len() > self.1 {
                return None;
            }
            self.0.extend_from_slice(blocks);
            Some(first as u32)
        }
    }

    /// The terms that the kernel finds in a mask.
    fn stored(mask: &Mask, store: &Room) -> Vec<u16> {
        let mut found = Vec::new();
        for number in (0..64).filter(|n| mask.summary & 1 << n != 0) {
            let block = store.0[mask.index(number) as usize];
            assert!(block.first().is_some(), "block {number} is empty");
            found.extend(
                (0..256u16)
                    .filter(|t| block.0[usize::from(t / 64)] & 1 << (t % 64) != 0)
                    .map(|t| number as u16 * 256 + t),
            );
        }
        found
    }

    #[test]
    fn masks_that_differ_in_few_blocks_share_the_others() {
        let all = mask(0..MAX_TERMS as u16);
        let mut store = Room(Vec::new(), usize::MAX);
        let mut layout = Layout::default();
        let first = layout.mask(&all, &mut store).unwrap();
        assert_eq!((first.own, first.base, store.0.len()), (u64::MAX, 0, 64));
        for term in 0..1000 {
            let mut one_less = all.clone();
            one_less.remove(&mask([term]));
            let laid_out = layout.mask(&one_less, &mut store).unwrap();
            assert_eq!(laid_out.own.count_ones(), 1);
            assert_eq!(runs_of(&laid_out).collect::<Vec<_>>()[1], (64, 64));
        }
        assert_eq!(store.0.len(), 64 + 64 + 1000);
        // One that shares too little is stored for itself, and is the base of the next.
        let even = mask((0..MAX_TERMS as u16).filter(|t| t % 2 == 0));
        let laid_out = layout.mask(&even, &mut store).unwrap();
        assert_eq!((laid_out.own, laid_out.base), (u64::MAX, 0));
        let mut near = even.clone();
        near.remove(&mask([0]));
        let near = layout.mask(&near, &mut store).unwrap();
        assert_eq!((near.own, near.base), (1, (128 + 1000 + 64) | 64 << 24));
        // A part of it has no block of its own.
        let laid_out = layout.mask(&even.below(2048), &mut store).unwrap();
        assert_eq!((laid_out.own, laid_out.base), (0, near.base));
        // Few blocks are stored as they are.
        let small = layout.mask(&even.below(512), &mut store).unwrap();
        assert_eq!((small.own, small.base), (3, 0));
    }

    #[test]
    fn term_past_the_limit_is_not_put_in() {
        let mut at_limit = TermMask::default();
        assert!(at_limit.set(MAX_TERMS as u16 - 1));
        assert_eq!(at_limit.summary(), 1 << 63);
        for past in [MAX_TERMS as u16, u16::MAX] {
            let mut mask = TermMask::default();
            assert!(!mask.set(past));
            assert!(mask.is_empty() && !mask.contains(past));
        }
    }

    #[test]
    fn clone_is_not_changed_with_its_original() {
        let mut original = mask([1, 300]);
        let copy = original.clone();
        original.remove(&mask([300]));
        assert_eq!(terms(&original), [1]);
        assert_eq!(original.summary(), 1, "a block that became empty is gone");
        assert_eq!(terms(&copy), [1, 300]);
    }

    #[test]
    fn equal_masks_are_stored_once_and_a_full_store_says_so() {
        let mut store = Room(Vec::new(), 3);
        let mut layout = Layout::default();
        let two = mask([0, 256]);
        let first = layout.mask(&two, &mut store).unwrap();
        assert_eq!(layout.mask(&mask([256, 0]), &mut store), Some(first));
        assert_eq!(store.0.len(), 2);
        assert_eq!(layout.mask(&mask([0, 512]), &mut store), None);
        assert_eq!(
            layout.mask(&TermMask::default(), &mut store),
            Some(Mask::NONE)
        );
        assert_eq!(layout.runs().collect::<Vec<_>>(), [(0, 2)]);
    }

    proptest! {
        #[test]
        fn layout_has_the_terms_that_were_put_in_and_no_others(
            few in prop::collection::btree_set(0..MAX_TERMS as u16, 0..40),
            run in (0..MAX_TERMS as u16, 0..2000u16),
            before in 0..5usize,
        ) {
            let all: std::collections::BTreeSet<u16> = few
                .iter()
                .copied()
                .chain((run.0..run.0.saturating_add(run.1)).filter(|t| usize::from(*t) < MAX_TERMS))
                .collect();
            let mask = mask(all.iter().copied());
            prop_assert!(all.iter().copied().eq(terms(&mask)));

            let mut store = Room(vec![Block([u64::MAX; 4]); before], usize::MAX);
            let mut layout = Layout::default();
            let laid_out = layout.mask(&mask, &mut store).unwrap();
            prop_assert_eq!(laid_out.summary, mask.summary());
            prop_assert!(all.iter().copied().eq(stored(&laid_out, &store)));
            // Others that share its blocks: they do not change it, and have their own terms.
            for one in few.into_iter().take(3) {
                let mut near = mask.clone();
                near.remove(&self::mask([one]));
                let laid_out = layout.mask(&near, &mut store).unwrap();
                prop_assert!(terms(&near).into_iter().eq(stored(&laid_out, &store)));
            }
            prop_assert!(all.iter().copied().eq(stored(&laid_out, &store)));
            let runs: u32 = layout.runs().map(|(_, length)| length).sum();
            prop_assert_eq!(store.0.len(), before + runs as usize);
        }

        #[test]
        fn operations_are_those_of_sets(
            a in prop::collection::btree_set(0..2000u16, 0..60),
            b in prop::collection::btree_set(0..2000u16, 0..60),
            limit in 0..2100u16,
        ) {
            let mut both = mask(a.iter().copied());
            both.add(&mask(b.iter().copied()));
            prop_assert!(a.union(&b).eq(&terms(&both)));
            let mut without = mask(a.iter().copied());
            without.remove(&mask(b.iter().copied()));
            prop_assert!(a.difference(&b).eq(&terms(&without)));
            prop_assert_eq!(&without, &mask(terms(&without)));
            let below = mask(a.iter().copied()).below(limit.into());
            prop_assert!(a.range(..limit).eq(&terms(&below)));
            prop_assert_eq!(&below, &mask(a.range(..limit).copied()));
        }
    }
}
