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

/// Words for small regions in rows, one for each so-manieth wide region, and columns, one for each so-manieth small one: a
/// range looks at one word, or at those of the rows that it lies in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    /// Rows, as a power of two.
    pub(crate) rows: u32,
    /// Columns, as a power of two.
    pub(crate) columns: u32,
}

/// Small regions in a wide one, as a power of two.
const SMALL_IN_WIDE: u32 = WIDE - SMALL;

impl Grid {
    /// How many words. At most 32.
    pub(crate) const fn words(self) -> usize {
        1 << (self.rows + self.columns)
    }

    /// The word of the small region that `block` lies in.
    #[inline]
    pub(crate) const fn word_of(self, block: Block) -> usize {
        self.word(block.first() >> SMALL) as usize
    }

    /// Each word of a small region that `range` touches.
    pub(crate) const fn words_of(self, range: GfnRange) -> WordSet {
        let mut set = WordSet(0);
        if range.is_empty() {
            return set;
        }
        let last = (range.end.as_u64() - 1) >> SMALL;
        let mut region = range.start.as_u64() >> SMALL;
        let mut rows = 0;
        // The first so many regions of each row have all of its words, and the first so many rows all there are.
        while region <= last && rows <= 1 << self.rows {
            let behind = ((region >> SMALL_IN_WIDE) + 1) << SMALL_IN_WIDE;
            let mut columns = 0;
            while region + columns <= last && region + columns < behind && columns < 1 << self.columns {
                set.0 |= 1 << self.word(region + columns);
                columns += 1;
            }
            region = behind;
            rows += 1;
        }
        set
    }

    /// The word of the last small region that `range`, which is not empty, touches.
    pub(crate) const fn last_of(self, range: GfnRange) -> usize {
        self.word((range.end.as_u64() - 1) >> SMALL) as usize
    }

    const fn word(self, region: u64) -> u64 {
        let row = region >> SMALL_IN_WIDE & ((1 << self.rows) - 1);
        row << self.columns | region & ((1 << self.columns) - 1)
    }
}

/// Some words of a [`Grid`], each once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WordSet(u32);

impl WordSet {
    /// All but `word`.
    pub(crate) const fn but(self, word: usize) -> Self {
        Self(self.0 & !(1 << word))
    }
}

impl Iterator for WordSet {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let next = self.0.trailing_zeros() as usize;
        let is_one = self.0 != 0;
        self.0 &= self.0.wrapping_sub(1);
        is_one.then_some(next)
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
        let overlapping = |order: u32| {
            let said = ranges.map(Block::around).into_iter().filter(move |said| said.order() <= order);
            said.flat_map(|said| ranges.map(|asked| (said, asked)))
                .filter(|(said, asked)| asked.overlaps(said.range()))
        };
        for regions in [FEW, BEHIND] {
            for (said, asked) in overlapping(regions.order) {
                let word = regions.word_of(said);
                assert!(regions.words_of(asked).any(|met| met == word), "{said} {asked}");
            }
        }
        for (said, asked) in overlapping(SMALL) {
            let word = GRID.word_of(said);
            assert!(GRID.words_of(asked).any(|met| met == word), "{said} {asked}");
        }
    }

    const GRID: Grid = Grid { rows: 3, columns: 2 };

    #[test]
    fn a_range_looks_at_the_rows_that_it_lies_in() {
        let of = |start, end| GRID.words_of(frames(start, end)).collect::<Vec<_>>();
        let wide = 1 << WIDE;
        assert_eq!(GRID.words(), 32);
        assert_eq!(of(5, 5), []);
        assert_eq!(of(600, 601), [1]);
        assert_eq!(of(3 * 512, 5 * 512), [0, 3]);
        assert_eq!(of(wide - 1, wide + 1), [3, 4]);
        assert_eq!(of(0, wide), [0, 1, 2, 3]);
        assert_eq!(of(wide - 512, 4 * wide), [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(of(7 * wide, 9 * wide), [0, 1, 2, 3, 28, 29, 30, 31]);
        // Around all rows, and once more into the first.
        assert_eq!(of(wide - 512, 9 * wide), (0..32).collect::<Vec<_>>());
        assert_eq!(of(0, u64::MAX), (0..32).collect::<Vec<_>>());
        assert_eq!(GRID.last_of(frames(0, wide + 1)), 4);
        assert_eq!(GRID.words_of(frames(0, wide)).but(3).collect::<Vec<_>>(), [0, 1, 2]);
    }

    /// Every small region of a range, for all small ranges.
    #[test]
    fn no_region_of_a_range_is_left_out() {
        for first in 0..70 {
            for last in first..300 {
                let range = frames(first * 512 + 7, last * 512 + 8);
                let met: Vec<_> = GRID.words_of(range).collect();
                let touched = first..=last;
                let expected =
                    |word: &usize| touched.clone().any(|region| GRID.word(region) as usize == *word);
                assert_eq!(met, (0..32).filter(expected).collect::<Vec<_>>(), "{range}");
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
