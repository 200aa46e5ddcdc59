//! Which elements of `POLICY_BLOCKS` are in use: runs are taken first fit, and join their
//! neighbours when they come back.

use std::collections::BTreeMap;

use ringfence_bpf_common::Block;
use ringfence_policies::BlockStore;

/// Consecutive elements: the first one and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Run {
    pub(crate) first: u32,
    pub(crate) length: u32,
}

/// What is free of the array.
#[derive(Debug)]
pub(crate) struct Blocks {
    /// First element → length; no two touch.
    free: BTreeMap<u32, u32>,
}

impl Blocks {
    /// All of `size` elements are free.
    pub(crate) fn new(size: u32) -> Self {
        let free = (size > 0).then_some((0, size));
        Blocks {
            free: free.into_iter().collect(),
        }
    }

    /// The number of free elements.
    pub(crate) fn free(&self) -> u32 {
        self.free.values().sum()
    }

    /// Takes a run; `None` when no gap is long enough.
    pub(crate) fn take(&mut self, length: u32) -> Option<Run> {
        let (first, gap) = self
            .free
            .iter()
            .find(|(_, gap)| **gap >= length)
            .map(|(first, gap)| (*first, *gap))?;
        let run = Run { first, length };
        self.cut(first, gap, run);
        Some(run)
    }

    /// Takes this very run, which an earlier agent left in use. False when it is not free.
    pub(crate) fn take_at(&mut self, run: Run) -> bool {
        let gap = self.free.range(..=run.first).next_back();
        let Some((first, gap)) = gap.map(|(first, gap)| (*first, *gap)) else {
            return false;
        };
        let end = u64::from(run.first) + u64::from(run.length);
        if end > u64::from(first) + u64::from(gap) {
            return false;
        }
        self.cut(first, gap, run);
        true
    }

    /// Gives a run back that was taken.
    pub(crate) fn give(&mut self, run: Run) {
        let (mut first, mut length) = (run.first, run.length);
        if let Some((before, gap)) = self.free.range(..first).next_back()
            && before + gap == first
        {
            (first, length) = (*before, gap + length);
        }
        if let Some(gap) = self.free.remove(&(run.first + run.length)) {
            length += gap;
        }
        if length > 0 {
            self.free.insert(first, length);
        }
    }

    /// Takes `run` out of the gap that has it.
    fn cut(&mut self, first: u32, gap: u32, run: Run) {
        self.free.remove(&first);
        if run.first > first {
            self.free.insert(first, run.first - first);
        }
        let (end, end_of_gap) = (run.first + run.length, first + gap);
        if end_of_gap > end {
            self.free.insert(end, end_of_gap - end);
        }
    }
}

/// Blocks that have a place and are not written yet.
#[derive(Debug)]
pub(crate) struct Staged<'a> {
    blocks: &'a mut Blocks,
    pub(crate) runs: Vec<Run>,
    pub(crate) indices: Vec<u32>,
    pub(crate) values: Vec<Block>,
}

impl<'a> Staged<'a> {
    pub(crate) fn new(blocks: &'a mut Blocks) -> Self {
        Staged {
            blocks,
            runs: Vec::new(),
            indices: Vec::new(),
            values: Vec::new(),
        }
    }
}

impl BlockStore for Staged<'_> {
    fn store(&mut self, blocks: &[Block]) -> Option<u32> {
        let run = self.blocks.take(u32::try_from(blocks.len()).ok()?)?;
        self.runs.push(run);
        self.indices.extend(run.first..run.first + run.length);
        self.values.extend_from_slice(blocks);
        Some(run.first)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn run(first: u32, length: u32) -> Run {
        Run { first, length }
    }

    #[test]
    fn runs_that_come_back_join_their_neighbours() {
        let mut blocks = Blocks::new(10);
        let taken: Vec<Run> = (0..5).map(|_| blocks.take(2).unwrap()).collect();
        assert_eq!((blocks.free(), blocks.take(1)), (0, None));
        for order in [[0, 2, 4, 1, 3], [4, 3, 2, 1, 0], [1, 3, 0, 4, 2]] {
            for i in order {
                blocks.give(taken[i]);
            }
            assert_eq!(blocks.take(10), Some(run(0, 10)), "{order:?}");
            blocks.give(run(0, 10));
            for one in &taken {
                assert!(blocks.take_at(*one));
            }
        }
    }

    #[test]
    fn fragments_serve_what_fits_into_them() {
        let mut blocks = Blocks::new(8);
        for _ in 0..4 {
            blocks.take(2).unwrap();
        }
        blocks.give(run(0, 2));
        blocks.give(run(4, 2));
        assert_eq!(blocks.free(), 4);
        assert_eq!(blocks.take(3), None, "no gap is long enough");
        assert_eq!(blocks.take(1), Some(run(0, 1)));
        assert_eq!(blocks.take(2), Some(run(4, 2)));
        assert_eq!(blocks.take(1), Some(run(1, 1)));
        assert_eq!((blocks.free(), blocks.take(1)), (0, None));
    }

    #[test]
    fn run_in_use_is_not_taken_again() {
        let mut blocks = Blocks::new(100);
        assert!(blocks.take_at(run(10, 5)));
        for taken in [run(10, 5), run(12, 1), run(5, 6), run(14, 20), run(99, 2)] {
            assert!(!blocks.take_at(taken), "{taken:?}");
        }
        assert!(blocks.take_at(run(99, 1)) && blocks.take_at(run(15, 1)));
        assert_eq!(blocks.take(11), Some(run(16, 11)));
        assert_eq!(blocks.take(10), Some(run(0, 10)));
        assert!(!blocks.take_at(run(u32::MAX, u32::MAX)));
        assert_eq!(Blocks::new(0).take(1), None);
    }
}
