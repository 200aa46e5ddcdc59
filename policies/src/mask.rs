//! Sets of terms, and how they are laid out in `POLICY_BLOCKS`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use ringfence_bpf_common::{BLOCK_TERMS, Block, MAX_TERMS, Mask};

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

/// Stores a mask in the form that [`ringfence_bpf_common::authorize`] reads; `None` when
/// the store has no room. An empty mask takes none.
pub fn lay_out(mask: &TermMask, store: &mut impl BlockStore) -> Option<Mask> {
    if mask.is_empty() {
        return Some(Mask::NONE);
    }
    let blocks: Vec<Block> = mask.blocks().map(|(_, block)| *block).collect();
    let summary = mask.summary();
    Some(Mask {
        summary: [summary as u32, (summary >> 32) as u32],
        first: store.store(&blocks)?,
    })
}

/// The masks of one set as they are laid out: equal ones once.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    known: HashMap<TermMask, Mask>,
}

impl Layout {
    /// [`lay_out`], unless an equal mask is there already.
    pub fn mask(&mut self, mask: &TermMask, store: &mut impl BlockStore) -> Option<Mask> {
        if let Some(known) = self.known.get(mask) {
            return Some(*known);
        }
        let laid_out = lay_out(mask, store)?;
        self.known.insert(mask.clone(), laid_out);
        Some(laid_out)
    }

    /// The runs of blocks that were stored: first index and length.
    pub fn runs(&self) -> impl Iterator<Item = (u32, u32)> {
        self.known
            .values()
            .map(|mask| (mask.first, mask.blocks().count_ones()))
            .filter(|(_, length)| *length > 0)
    }
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
                .into_iter()
                .chain((run.0..run.0.saturating_add(run.1)).filter(|t| usize::from(*t) < MAX_TERMS))
                .collect();
            let mask = mask(all.iter().copied());
            prop_assert!(all.iter().copied().eq(terms(&mask)));

            let mut store = Room(vec![Block([u64::MAX; 4]); before], usize::MAX);
            let laid_out = lay_out(&mask, &mut store).unwrap();
            prop_assert_eq!(laid_out.blocks(), mask.summary());
            let mut found = Vec::new();
            for number in (0..64).filter(|n| laid_out.blocks() & 1 << n != 0) {
                let block = store.0[laid_out.index(number) as usize];
                prop_assert!(block.first().is_some(), "an empty block takes room");
                found.extend((0..256u16).filter(|t| block.0[usize::from(t / 64)] & 1 << (t % 64) != 0)
                    .map(|t| number as u16 * 256 + t));
            }
            prop_assert!(all.iter().eq(&found));
            prop_assert_eq!(store.0.len(), before + laid_out.blocks().count_ones() as usize);
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
