//! Blocks that are mapped singly because they were fetched from, and could be one large page otherwise.
//!
//! Where large pages are never executable ([`LargeExecute::Never`](super::LargeExecute)), a fetch maps its frame alone, and the
//! block stays mapped singly. Such blocks are counted here, and taken away a few at a time: the next access maps a large page
//! again, and the next fetch splits it again. So a block that was code once is large in the end.
//!
//! # The account
//!
//! A word for each block, found by a hash of its address: 32 KiB for 4096 blocks, and nothing where large pages may be
//! fetched from. Only a fetch writes to it, and only the first of a block, on a line that blocks share by their hash alone. It
//! is a list of what to look at, no more: a block that is in it and is not mapped singly any more costs a look; one that
//! found no room stays as it is until its next fetch is served.
//!
//! A fault notes its block after its install, a recovery forgets it before it takes the table away. So a block whose
//! table stays, or is linked anew, is noted.
//!
//! # A recovery
//!
//! It holds `mmu_lock` for write, and unlinks tables as the removal of a slot does, but with faults going on: those do not hold
//! the lock where they announce intents. No page is taken away, so whatever a fault installs meanwhile is right, and nothing
//! need be verified. Where a large page must not take the place of a table before CPUs have forgotten that, the entry stays frozen
//! until the flush. What is written is not lost: a block whose writes are logged is left alone, also because it would be mapped singly
//! again. It stays in the account, for when that is over.
//!
//! Source: Linux `kvm_recover_nx_huge_pages`, `track_possible_nx_huge_page`. There the list is in order of age; here a hand goes
//! round the account, as fast as `ratio` says.

use alloc::boxed::Box;
use core::num::NonZeroU32;

use afterimage_mmu::{Gfn, GfnRange, Memslot, PageSize, SlotFlags, SpaceId, ZapWalk};

use super::zap::{Faults, Of};
use super::{Host, LargeExecute, Stage2};
use crate::format::Format;
use crate::mutation::{self, Mutation};
use crate::sync::{Ordering, Word};

/// Log2 of the lines of the account.
const LINES_LOG: u32 = 9;
/// Blocks on a line.
const WAYS: usize = 8;

/// A word that stands for no block.
const FREE: u64 = 0;
const TAKEN: u64 = 1 << 63;
const SPACE_SHIFT: u32 = 46;
const IS_1G: u64 = 1 << 45;

/// The blocks whose hash is the same.
#[derive(Debug)]
#[repr(align(64))]
struct Line([Word; WAYS]);

/// The account. See the module documentation.
#[derive(Debug)]
pub(super) struct NxBlocks {
    lines: Box<[Line]>,
    /// The word at which the next recovery begins. Held by who holds `mmu_lock` for write.
    hand: Word,
}

/// A block of the account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    space: SpaceId,
    start: Gfn,
    size: PageSize,
}

impl Block {
    fn gfns(self) -> GfnRange {
        self.start.block(self.size)
    }

    fn key(self) -> u64 {
        let is_1g = if self.size == PageSize::Size1G { IS_1G } else { 0 };
        TAKEN
            | u64::from(self.space.0) << SPACE_SHIFT
            | is_1g
            | (self.start.as_u64() / PageSize::Size2M.frames())
    }

    fn of(key: u64) -> Option<Self> {
        let size = if key & IS_1G == 0 { PageSize::Size2M } else { PageSize::Size1G };
        let start = Gfn::new((key & (IS_1G - 1)) * PageSize::Size2M.frames());
        (key != FREE).then_some(Self { space: SpaceId((key >> SPACE_SHIFT) as u16), start, size })
    }
}

impl NxBlocks {
    pub(super) fn new(execute: LargeExecute) -> Self {
        let lines = match execute {
            LargeExecute::Allowed => 0,
            LargeExecute::Never => 1 << LINES_LOG,
        };
        let line = |_| Line(core::array::from_fn(|_| Word::new(FREE)));
        Self { lines: (0..lines).map(line).collect(), hand: Word::new(0) }
    }

    /// A fetch has mapped a frame of the block around `gfn` singly. Where the block is known, only a look.
    pub(super) fn note(&self, space: SpaceId, gfn: Gfn, size: PageSize) {
        let key = Block { space, start: gfn.block(size).start, size }.key();
        // Fibonacci hashing: neighbours lie apart, and fill all lines evenly.
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - LINES_LOG);
        let Some(Line(words)) = self.lines.get(hash as usize) else { return };
        if words.iter().all(|word| word.load(Ordering::Relaxed) != key) {
            // Two who note the same block at the same time may both find room: one look in vain.
            let _ = words
                .iter()
                .any(|word| word.compare_exchange(FREE, key, Ordering::Relaxed, Ordering::Relaxed).is_ok());
        }
    }

    fn words(&self) -> impl Iterator<Item = &Word> + Clone {
        self.lines.iter().flat_map(|Line(words)| words)
    }

    /// Blocks that are noted.
    pub(super) fn len(&self) -> u64 {
        self.words().filter(|word| word.load(Ordering::Relaxed) != FREE).count() as u64
    }
}

impl<F: Format, H: Host> Stage2<F, H> {
    /// Blocks that are mapped singly because they were fetched from, as far as is known (KVM: `nx_lpage_splits`).
    pub fn nx_blocks(&self) -> u64 {
        self.nx.len()
    }

    /// One in `ratio` blocks, rounded up.
    pub(super) fn recover_nx_blocks<'s>(
        &self,
        ratio: NonZeroU32,
        slot_of: &dyn Fn(SpaceId, Gfn) -> Option<&'s Memslot>,
        walk: &mut ZapWalk<'_, Self>,
    ) -> u64 {
        let wanted = self.nx.len().div_ceil(ratio.get().into());
        let count = self.nx.words().count();
        let hand = self.nx.hand.load(Ordering::Relaxed);
        let mut recovered = 0;
        for (at, word) in (hand..).zip(self.nx.words().cycle().skip(hand as usize)).take(count) {
            self.nx.hand.store(at % count as u64, Ordering::Relaxed);
            if recovered == wanted {
                break;
            }
            let Some(block) = Block::of(word.load(Ordering::Relaxed)) else { continue };
            let slot = slot_of(block.space, block.start);
            let is_logged = |slot: &Memslot| slot.flags.contains(SlotFlags::LOG_DIRTY);
            if slot.is_some_and(is_logged) && !mutation::active(Mutation::RecoverLogged) {
                continue;
            }
            word.store(FREE, Ordering::Relaxed);
            if let Some(slot) = slot
                && (self.may_recover(slot, block.start, block.size, block.size)
                    || mutation::active(Mutation::RecoverLogged))
            {
                let of = Of::Space(block.space);
                self.zap_tables(&of, block.gfns(), block.size.level(), Faults::GoOn, walk);
                recovered += 1;
            }
        }
        recovered
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use alloc::vec::Vec;

    const TWO: PageSize = PageSize::Size2M;

    #[test]
    fn a_block_comes_back_from_its_key() {
        for (space, start, size) in
            [(0, 0, TWO), (7, 5 << 9, TWO), (1, 3 << 18, PageSize::Size1G), (0, 1 << 44, TWO)]
        {
            let block = Block { space: SpaceId(space), start: Gfn::new(start), size };
            assert_eq!(Block::of(block.key()), Some(block));
        }
        assert_eq!(Block::of(FREE), None);
    }

    #[test]
    fn the_account_is_bounded_and_holds_neighbours() {
        let none = NxBlocks::new(LargeExecute::Allowed);
        none.note(SpaceId(0), Gfn::new(7), TWO);
        assert_eq!((none.len(), none.lines.len()), (0, 0));
        let some = NxBlocks::new(LargeExecute::Never);
        assert_eq!(size_of_val(&*some.lines), 32 << 10);
        for block in 0..2048 {
            for gfn in [block << 9, block << 9 | 5] {
                some.note(SpaceId(0), Gfn::new(gfn), TWO);
            }
        }
        assert_eq!(some.len(), 2048, "4 GiB of code in a row find room");
        for block in 2048..1 << 16 {
            some.note(SpaceId(0), Gfn::new(block << 9), TWO);
        }
        assert_eq!(some.len(), 4096);
        let distinct: BTreeSet<_> = some.words().map(|word| word.load(Ordering::Relaxed)).collect();
        assert_eq!(distinct.len(), 4096);
        let blocks: Vec<_> = distinct.into_iter().filter_map(Block::of).collect();
        assert!(blocks.iter().all(|block| block.size == TWO));
    }
}
