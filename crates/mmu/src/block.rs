//! Blocks of guest frames in one word: what a fault installs at once, announces, and is checked against.

use core::fmt;

use crate::addr::{Gfn, GfnRange, PageSize};

/// Bits of the word, from below: the order, the first frame.
const ORDER_BITS: u32 = 6;
/// Frames that 57-bit guest-physical addresses reach.
const GFN_BITS: u32 = 45;

/// Two to the power of some order guest frames, naturally aligned.
///
/// Frames that no guest-physical address of 57 bits reaches lie in the block of everything.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Block(u64);

impl Block {
    /// Every frame.
    pub const ALL: Self = Self(GFN_BITS as u64);

    /// The one frame `gfn`.
    #[inline]
    pub const fn frame(gfn: Gfn) -> Self {
        Self::aligned(gfn.as_u64(), 0)
    }

    /// The block of `size` that `gfn` lies in.
    #[inline]
    pub const fn of(gfn: Gfn, size: PageSize) -> Self {
        let frames = size.frames();
        Self::aligned(gfn.as_u64() & !(frames - 1), frames.trailing_zeros())
    }

    /// The smallest block around `range`. One frame, if it is empty.
    pub const fn around(range: GfnRange) -> Self {
        let first = range.start.as_u64();
        let end = range.end.as_u64();
        let last = if end > first { end - 1 } else { first };
        let order = u64::BITS - (first ^ last).leading_zeros();
        if last >> GFN_BITS != 0 { Self::ALL } else { Self::aligned(first >> order << order, order) }
    }

    #[inline]
    const fn aligned(first: u64, order: u32) -> Self {
        if first >> GFN_BITS == 0 { Self(first << ORDER_BITS | order as u64) } else { Self::everything() }
    }

    /// Apart, so that what is nearly always so is a way of its own.
    #[cold]
    const fn everything() -> Self {
        Self::ALL
    }

    /// Its frames are two to the power of this.
    #[inline]
    pub(crate) const fn order(self) -> u32 {
        (self.0 & ((1 << ORDER_BITS) - 1)) as u32
    }

    /// Its first frame.
    #[inline]
    pub(crate) const fn first(self) -> u64 {
        self.0 >> ORDER_BITS
    }

    /// Its frames.
    #[inline]
    pub const fn range(self) -> GfnRange {
        if self.0 == Self::ALL.0 {
            return GfnRange::ALL;
        }
        GfnRange::new(Gfn::new(self.first()), Gfn::new(self.first() + (1 << self.order())))
    }

    /// How many bits [`bits`](Self::bits) has at most.
    pub(crate) const BITS: u32 = ORDER_BITS + GFN_BITS;

    /// As a part of a larger word.
    #[inline]
    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    /// What was [`bits`](Self::bits).
    #[inline]
    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.range(), f)
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.range(), f)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn frames(start: u64, end: u64) -> GfnRange {
        GfnRange::new(Gfn::new(start), Gfn::new(end))
    }

    #[test]
    fn blocks_are_named_exactly_and_other_ranges_by_the_block_around_them() {
        for (range, block) in [
            (frames(5, 6), frames(5, 6)),
            (frames(512, 1024), frames(512, 1024)),
            (frames(1 << 18, 2 << 18), frames(1 << 18, 2 << 18)),
            (frames(3, 5), frames(0, 8)),
            (frames((1 << 45) - 1, 1 << 45), frames((1 << 45) - 1, 1 << 45)),
            (frames(7, 7), frames(7, 8)),
            (frames(0, 0), frames(0, 1)),
        ] {
            assert_eq!(Block::around(range).range(), block, "{range}");
            assert_eq!(Block::from_bits(Block::around(range).bits()).range(), block, "{range}");
            assert_eq!(Block::around(range).bits() >> Block::BITS, 0, "{range}");
        }
        for size in [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G] {
            let gfn = Gfn::new(0x12_3456_789a);
            assert_eq!(Block::of(gfn, size).range(), gfn.block(size));
        }
        assert_eq!(Block::frame(Gfn::new(9)).range(), frames(9, 10));
    }

    #[test]
    fn frames_out_of_reach_are_in_the_block_of_everything() {
        for range in [frames(1 << 45, (1 << 45) + 1), frames(5, u64::MAX), frames(1 << 60, 1 << 61)] {
            assert_eq!(Block::around(range).range(), GfnRange::ALL, "{range}");
        }
        assert_eq!(Block::frame(Gfn::new(1 << 45)), Block::ALL);
        assert_eq!(Block::of(Gfn::new(u64::MAX), PageSize::Size1G), Block::ALL);
    }
}
