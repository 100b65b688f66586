//! Regions of guest memory, so that who touches one need not look at words that are written for another.
//!
//! A region is 2 MiB. There are fewer words than regions: regions that lie a multiple of the
//! number of words apart share one. Blocks that are larger have a word of their own, behind those.

use crate::addr::GfnRange;
use crate::block::Block;

/// Frames in a region, as a power of two.
#[cfg(not(loom))]
const ORDER: u32 = 9;
/// Small under loom: two frames.
#[cfg(loom)]
const ORDER: u32 = 1;

/// The word of what is said about `block`: one of `words`, or the one behind them if its order is `too_large`.
#[inline]
pub(crate) fn word_of(block: Block, words: usize, too_large: u32) -> usize {
    if block.order() >= too_large { words } else { (block.first() >> ORDER) as usize % words }
}

/// The lowest order of blocks that no one region holds.
pub(crate) const TOO_LARGE: u32 = ORDER + 1;

/// Each word that a block of one region which overlaps `range` may have.
pub(crate) fn words_of(range: GfnRange, words: usize) -> impl Iterator<Item = usize> + Clone {
    let first = range.start.as_u64() >> ORDER;
    let count = match range.is_empty() {
        true => 0,
        false => ((range.end.as_u64() - 1) >> ORDER) - first + 1,
    };
    (0..count.min(words as u64)).map(move |nth| (first as usize).wrapping_add(nth as usize) % words)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::addr::{Gfn, PageSize};
    use alloc::vec::Vec;

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
            frames(0, 1 << 40),
            frames(u64::MAX - 1, u64::MAX),
        ];
        for said in ranges {
            for asked in ranges.into_iter().filter(|asked| asked.overlaps(said)) {
                let word = word_of(Block::around(said), 16, TOO_LARGE);
                assert!(word == 16 || words_of(asked, 16).any(|met| met == word), "{said} {asked}");
            }
        }
    }

    #[test]
    fn each_word_is_met_once() {
        assert_eq!(words_of(frames(600, 1025), 16).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(words_of(frames(15 * 512, 17 * 512), 16).collect::<Vec<_>>(), [15, 0]);
        let mut all: Vec<_> = words_of(frames(7 * 512, 1 << 40), 16).collect();
        all.sort_unstable();
        assert_eq!(all, (0..16).collect::<Vec<_>>());
        assert_eq!(words_of(frames(5, 5), 16).count(), 0);
        assert_eq!(word_of(Block::of(Gfn::new(17 * 512), PageSize::Size2M), 16, TOO_LARGE), 1);
        assert_eq!(word_of(Block::of(Gfn::new(17 * 512), PageSize::Size1G), 16, TOO_LARGE), 16);
    }
}
