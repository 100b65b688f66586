//! Regions of guest memory, so that who touches one need not look at words that are written for another.
//!
//! There are fewer words than regions: regions that lie a multiple of the number of words apart share one.

use core::ops::Range;

use crate::addr::GfnRange;
use crate::block::Block;

/// Frames in a small region, as a power of two: 2 MiB.
#[cfg(not(loom))]
pub(crate) const SMALL: u32 = 9;
/// Two frames under loom.
#[cfg(loom)]
pub(crate) const SMALL: u32 = 1;

/// Frames in a wide region, as a power of two: 64 MiB.
#[cfg(not(loom))]
pub(crate) const WIDE: u32 = 14;
/// Four frames under loom.
#[cfg(loom)]
pub(crate) const WIDE: u32 = 2;

/// The lowest order of blocks that no small region holds.
pub(crate) const TOO_LARGE: u32 = SMALL + 1;

/// Regions of one size, and some words in a row, one for each so-manieth of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Regions {
    /// Frames in a region, as a power of two.
    pub(crate) order: u32,
    /// Index of the first word.
    pub(crate) first: usize,
    /// How many words: a power of two.
    pub(crate) words: usize,
}

impl Regions {
    /// The word of the region that `block` lies in.
    #[inline]
    pub(crate) const fn word_of(self, block: Block) -> usize {
        self.first + ((block.first() >> self.order) as usize & (self.words - 1))
    }

    /// How many regions `range` touches.
    pub(crate) const fn touched_by(self, range: GfnRange) -> u64 {
        if range.is_empty() { 0 } else { self.last(range) - self.start(range) + 1 }
    }

    /// Each word of a region that `range` touches.
    pub(crate) fn words_of(self, range: GfnRange) -> Words {
        let count = self.touched_by(range).min(self.words as u64);
        Words { regions: self, left: self.start(range)..self.start(range) + count }
    }

    const fn start(self, range: GfnRange) -> u64 {
        range.start.as_u64() >> self.order
    }

    const fn last(self, range: GfnRange) -> u64 {
        (range.end.as_u64() - 1) >> self.order
    }
}

/// See [`Regions::words_of`].
#[derive(Clone, Debug)]
pub(crate) struct Words {
    regions: Regions,
    left: Range<u64>,
}

impl Words {
    /// All but the last.
    pub(crate) fn but_last(mut self) -> Self {
        self.left.next_back();
        self
    }
}

impl Iterator for Words {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let region = self.left.next()?;
        Some(self.regions.first + (region as usize & (self.regions.words - 1)))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::addr::{Gfn, PageSize};
    use alloc::vec::Vec;

    const FEW: Regions = Regions { order: SMALL, first: 0, words: 16 };
    const BEHIND: Regions = Regions { order: WIDE, first: 16, words: 4 };

    fn frames(start: u64, end: u64) -> GfnRange {
        GfnRange::new(Gfn::new(start), Gfn::new(end))
    }

    #[test]
    fn whoever_overlaps_meets_in_a_word() {
        let ranges = [
            frames(0, 1),
            frames(511, 512),
            frames(511, 513),
            frames(512, 1024),
            frames(3 * 512, 9 * 512),
            frames(16 * 512 + 1, 16 * 512 + 2),
            frames((5 << WIDE) - 1, (5 << WIDE) + 1),
            frames(0, 1 << 40),
            frames(u64::MAX - 1, u64::MAX),
        ];
        for regions in [FEW, BEHIND] {
            for said in ranges.map(Block::around).into_iter().filter(|said| said.order() <= regions.order) {
                for asked in ranges.into_iter().filter(|asked| asked.overlaps(said.range())) {
                    let word = regions.word_of(said);
                    assert!(regions.words_of(asked).any(|met| met == word), "{said} {asked}");
                }
            }
        }
    }

    #[test]
    fn each_word_is_met_once() {
        let of = |regions: Regions, range| regions.words_of(range).collect::<Vec<_>>();
        assert_eq!(of(FEW, frames(600, 1025)), [1, 2]);
        assert_eq!(of(FEW, frames(15 * 512, 17 * 512)), [15, 0]);
        assert_eq!(of(BEHIND, frames(600, 1025)), [16]);
        assert_eq!(of(BEHIND, frames((3 << WIDE) - 1, 5 << WIDE)), [18, 19, 16]);
        assert_eq!(of(FEW, frames(5, 5)), []);
        let mut all = of(FEW, frames(7 * 512, 1 << 40));
        all.sort_unstable();
        assert_eq!(all, (0..16).collect::<Vec<_>>());
        assert_eq!(FEW.word_of(Block::of(Gfn::new(17 * 512), PageSize::Size2M)), 1);
        assert_eq!(FEW.touched_by(frames(511, 1025)), 3);
        assert_eq!(FEW.words_of(frames(511, 1025)).but_last().collect::<Vec<_>>(), [0, 1]);
    }
}
