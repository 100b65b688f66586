//! Which frames of a memslot were written: a bit each.
//!
//! # Who comes first
//!
//! A vCPU makes an entry writable by its exchange and *then* sets the bit, before it enters the guest. A collector takes
//! the bits and *then* protects the frames whose bits it took. So a write is in the round that takes its bit, or in the
//! next:
//!
//! * the bit was set before it was taken: the frame is protected after that, and the next write faults;
//! * it was set after that: the frame was not protected, and the bit is there for the next round.
//!
//! One that is zapped in between, by whoever gets `mmu_lock` while the collector gives way, is in both rounds.
//!
//! The other way round on either side a write is lost: a bit that is set first can be taken while the entry is still
//! protected, and the exchange, which looks at the entry alone, makes it writable after that.
//!
//! A walk that takes written entries away, or their marks, sets the bits of frames in a row at once ([`SlotLog`]): a zap does
//! before it gives up `mmu_lock`, which every collector takes first. So no round misses a frame whose entry is gone.
//!
//! Source: Linux `mark_page_dirty_in_slot`, `kvm_get_dirty_log_protect`.

use alloc::boxed::Box;
use core::fmt;

use crate::addr::GfnRange;
use crate::mutation::{self, Mutation};
use crate::slots::Memslot;
use crate::sync::{AtomicU64, Ordering};

/// Frames that one word of a bitmap counts.
pub(crate) const WORD_FRAMES: u64 = 64;

/// What a bitmap says at first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Initially {
    /// Nothing was written; everything is write-protected at once.
    #[default]
    Clean,
    /// Everything was: nothing is protected before its bit is cleared for the first time (KVM: `KVM_DIRTY_LOG_INITIALLY_SET`).
    AllSet,
}

/// A bit for each frame of a slot.
pub(crate) struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    frames: u64,
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBitmap").field("frames", &self.frames).finish_non_exhaustive()
    }
}

impl DirtyBitmap {
    pub(crate) fn new(frames: u64, initially: Initially) -> Self {
        let word = |index: u64| match initially {
            Initially::Clean => 0,
            Initially::AllSet => valid(frames, index),
        };
        Self { words: (0..frames.div_ceil(WORD_FRAMES)).map(word).map(AtomicU64::new).collect(), frames }
    }

    /// Words that hold all bits; those behind the last frame are clear.
    pub(crate) fn len(&self) -> usize {
        self.words.len()
    }

    /// Frame number `frame` of the slot was made writable, by an exchange that came before.
    #[inline]
    pub(crate) fn set(&self, frame: u64) {
        debug_assert!(frame < self.frames);
        self.set_in(frame / WORD_FRAMES, 1 << (frame % WORD_FRAMES));
    }

    /// Those of `written` that lie in `slot`, whose bitmap it is, were written through entries that are no more.
    #[inline(never)]
    fn set_run(&self, slot: GfnRange, written: GfnRange) {
        let part = written.intersection(slot);
        let (mut at, mut left) = (part.start - slot.start, part.len());
        while left > 0 {
            let bit = at % WORD_FRAMES;
            let here = left.min(WORD_FRAMES - bit);
            self.set_in(at / WORD_FRAMES, u64::MAX >> (WORD_FRAMES - here) << bit);
            (at, left) = (at + here, left - here);
        }
    }

    #[inline]
    fn set_in(&self, index: u64, bits: u64) {
        // An exchange, also where the bits are set: a look could see them as they were before a collector took them, and the
        // collector an entry as it was before the exchange that made it writable. Release: a collector that takes a
        // bit sees that exchange.
        self.words[index as usize].fetch_or(bits, Ordering::Release);
    }

    /// The word `index`, as it is.
    pub(crate) fn peek(&self, index: usize) -> u64 {
        self.words[index].load(Ordering::Acquire)
    }

    /// Takes the bits of `mask` out of word `index`; those that were set. The caller protects their frames next.
    pub(crate) fn take(&self, index: usize, mask: u64) -> u64 {
        if self.peek(index) & mask == 0 {
            return 0;
        }
        self.words[index].fetch_and(!mask, Ordering::AcqRel) & mask
    }
}

/// The dirty log of a slot, for a walk that comes by what the guest has written; nothing where writes are not logged.
///
/// Frames in a row are logged together: when the next is not behind them, and at the latest when this is dropped. What
/// [`Steps::log`](crate::Steps::log) gives borrows the walk, so that is before the lock can be given up.
#[derive(Debug)]
pub struct SlotLog<'w> {
    bitmap: Option<&'w DirtyBitmap>,
    slot: GfnRange,
    /// Written, and not logged yet.
    run: GfnRange,
}

impl<'w> SlotLog<'w> {
    /// `bitmap` is the slot's.
    pub(crate) fn new(slot: &Memslot, bitmap: Option<&'w DirtyBitmap>) -> Self {
        let slot = slot.gfns();
        Self { bitmap, slot, run: GfnRange { start: slot.start, end: slot.start } }
    }

    /// The guest wrote to frames of `gfns` through a translation that went, or may be written no more. Those of other slots are
    /// left out.
    #[inline]
    pub fn written(&mut self, gfns: GfnRange) {
        if gfns.is_empty() {
            return;
        }
        if self.run.end != gfns.start {
            self.set();
            self.run.start = gfns.start;
        }
        self.run.end = gfns.end;
    }

    #[inline]
    fn set(&self) {
        if let Some(bitmap) = self.bitmap {
            bitmap.set_run(self.slot, self.run);
        }
    }
}

impl Drop for SlotLog<'_> {
    #[inline]
    fn drop(&mut self) {
        if !mutation::active(Mutation::WrittenForgotten) {
            self.set();
        }
    }
}

/// The bits of word `index` that stand for frames.
fn valid(frames: u64, index: u64) -> u64 {
    match frames - index * WORD_FRAMES {
        left if left >= WORD_FRAMES => u64::MAX,
        left => (1 << left) - 1,
    }
}

/// The guest frames of the bits of word `index`, run by run.
pub(crate) fn runs(slot: &Memslot, index: usize, bits: u64) -> impl Iterator<Item = GfnRange> {
    let first = slot.base + index as u64 * WORD_FRAMES;
    let mut left = bits;
    let mut at = 0;
    core::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let skipped = left.trailing_zeros();
        left >>= skipped;
        let count = left.trailing_ones();
        left = left.checked_shr(count).unwrap_or(0);
        let start = first + u64::from(at + skipped);
        at += skipped + count;
        GfnRange::from_len(start, u64::from(count))
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::addr::{Gfn, Hva};
    use crate::slots::SlotId;
    use alloc::vec::Vec;

    #[test]
    fn a_bitmap_has_no_bits_behind_its_last_frame() {
        for (frames, words) in [(1, 1), (63, 1), (64, 1), (65, 2), (130, 3)] {
            let all = DirtyBitmap::new(frames, Initially::AllSet);
            assert_eq!(all.len(), words);
            let set: u32 = (0..words).map(|word| all.peek(word).count_ones()).sum();
            assert_eq!(u64::from(set), frames);
            let none = DirtyBitmap::new(frames, Initially::Clean);
            none.set(frames - 1);
            let taken: Vec<_> = (0..words).map(|word| none.take(word, u64::MAX)).collect();
            assert_eq!(taken.last(), Some(&(1 << ((frames - 1) % 64))));
            assert!((0..words).all(|word| none.peek(word) == 0));
        }
    }

    #[test]
    fn bits_are_taken_by_mask() {
        let bitmap = DirtyBitmap::new(64, Initially::AllSet);
        assert_eq!(bitmap.take(0, 0xf0), 0xf0);
        assert_eq!(bitmap.take(0, 0xff), 0x0f);
        assert_eq!(bitmap.peek(0), !0xff);
    }

    #[test]
    fn frames_in_a_row_are_logged_in_every_word_that_they_touch() {
        let slot = Memslot::new(SlotId(0), Gfn::new(1000), 200, Hva::new(0));
        let gfns = |start, end| GfnRange { start: Gfn::new(start), end: Gfn::new(end) };
        let bitmap = DirtyBitmap::new(200, Initially::Clean);
        let words = || [0, 1, 2, 3].map(|word| bitmap.take(word, u64::MAX));
        let mut log = SlotLog::new(&slot, Some(&bitmap));
        for gfn in [1000, 1001, 1063, 1064, 1065] {
            log.written(GfnRange::frame(Gfn::new(gfn)));
        }
        assert_eq!(words(), [0b11, 0, 0, 0], "the second run may go on");
        drop(log);
        assert_eq!(words(), [1 << 63, 0b11, 0, 0]);
        // What lies in other slots is theirs.
        let mut log = SlotLog::new(&slot, Some(&bitmap));
        log.written(gfns(512, 1002));
        log.written(gfns(1024, 1536));
        drop(log);
        assert_eq!(words(), [u64::MAX << 24 | 0b11, u64::MAX, u64::MAX, 0xff]);
        // What is empty takes nothing away.
        let mut log = SlotLog::new(&slot, Some(&bitmap));
        log.written(gfns(1000, 1001));
        log.written(gfns(1001, 900));
        drop(log);
        assert_eq!(words(), [1, 0, 0, 0]);
        SlotLog::new(&slot, Some(&bitmap)).written(gfns(0, 512));
        SlotLog::new(&slot, Some(&bitmap)).written(gfns(2000, 2001));
        SlotLog::new(&slot, None).written(gfns(1000, 1200));
        assert_eq!(words(), [0; 4]);
    }

    #[test]
    fn runs_are_the_bits() {
        let slot = Memslot::new(SlotId(0), Gfn::new(1000), 200, Hva::new(0));
        let found: Vec<_> =
            runs(&slot, 1, 1 << 63 | 0b1_0110).map(|run| (run.start.as_u64(), run.end.as_u64())).collect();
        assert_eq!(found, [(1065, 1067), (1068, 1069), (1127, 1128)]);
        let all: Vec<_> = runs(&slot, 0, u64::MAX).map(GfnRange::len).collect();
        assert_eq!(all, [64]);
    }
}
