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
//! The other way round on either side a write is lost: a bit that is set first can be taken while the entry is still
//! protected, and the exchange, which looks at the entry alone, makes it writable after that.
//!
//! Source: Linux `mark_page_dirty_in_slot`, `kvm_get_dirty_log_protect`.

use alloc::boxed::Box;
use core::fmt;

use crate::addr::GfnRange;
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
    /// Everything was: nothing is protected before its bit is cleared for the first time.
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
        let (word, bit) = (&self.words[(frame / WORD_FRAMES) as usize], 1 << (frame % WORD_FRAMES));
        // An exchange, also where the bit is set: a look could see it as it was before a collector took it, and the
        // collector its entry as it was before the exchange that made it writable. Release: a collector that takes the
        // bit sees that exchange.
        word.fetch_or(bit, Ordering::Release);
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
    fn runs_are_the_bits() {
        let slot = Memslot::new(SlotId(0), Gfn::new(1000), 200, Hva::new(0));
        let found: Vec<_> =
            runs(&slot, 1, 1 << 63 | 0b1_0110).map(|run| (run.start.as_u64(), run.end.as_u64())).collect();
        assert_eq!(found, [(1065, 1067), (1068, 1069), (1127, 1128)]);
        let all: Vec<_> = runs(&slot, 0, u64::MAX).map(GfnRange::len).collect();
        assert_eq!(all, [64]);
    }
}
