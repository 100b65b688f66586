//! What CPUs are made to forget: the translations of a range, pointers to the tables of a range, or all of both.
//!
//! A zap collects what it owes as two hulls of frames, and pays it with one request to every vCPU. A vCPU has a word for each
//! of the two, which says what it has not forgotten yet. A requester widens the words and then sets the request bit; the vCPU
//! takes the bit and then the words:
//!
//! * It finds what came with the bit: the bit was set with Release, after the words.
//! * It may find more, of a request whose bit is not set yet. It forgets that too, and finds nothing when the bit comes. What
//!   was zapped before the words were widened it cannot cache again: they are widened with Release, and taken with Acquire.
//!
//! A word holds one range as a whole, so that none is ever torn: two that meet there become their hull, and what is wider than
//! [`Flush::MAX_FRAMES`] becomes everything. A vCPU that forgets everything each time need not take the words at all.
//!
//! Source: Linux `kvm_flush_remote_tlbs_range`.

use crate::addr::{Gfn, GfnRange};
use crate::mutation::{self, Mutation};
use crate::sync::{AtomicU64, Ordering};

/// What CPUs must forget, in every address space.
#[must_use = "what is not forgotten is used"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flush {
    /// Translations that overlap these frames, of whatever page size.
    pub translations: GfnRange,
    /// Pointers to tables, of every level, that translate any of these frames (paging-structure caches).
    pub tables: GfnRange,
}

const NONE: GfnRange = GfnRange { start: Gfn::new(0), end: Gfn::new(0) };
const ALL: GfnRange = GfnRange { start: Gfn::new(0), end: Gfn::new(u64::MAX) };

impl Flush {
    /// Nothing.
    pub const NOTHING: Self = Self { translations: NONE, tables: NONE };
    /// Everything that is cached.
    pub const EVERYTHING: Self = Self { translations: ALL, tables: ALL };
    /// The longest range that is told from everything: 1 GiB.
    pub const MAX_FRAMES: u64 = 1 << 18;

    /// The translations of `gfns`, whose tables stay.
    pub const fn of(gfns: GfnRange) -> Self {
        Self { translations: gfns, tables: NONE }
    }

    /// The translations of `gfns`, and pointers to the tables there, of which one was unlinked.
    pub const fn with_tables(gfns: GfnRange) -> Self {
        Self { translations: gfns, tables: gfns }
    }

    /// Whether there is nothing to forget.
    pub fn is_nothing(&self) -> bool {
        self.translations.is_empty() && self.tables.is_empty()
    }

    /// Adds the translations of `gfns`: in a walk, most often of those behind the last.
    #[inline]
    pub(crate) fn add(&mut self, gfns: GfnRange) {
        let before = &mut self.translations;
        if before.end == gfns.start && !before.is_empty() && !gfns.is_empty() {
            before.end = gfns.end;
        } else {
            *before = before.hull(gfns);
        }
    }

    /// What covers both.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            translations: self.translations.hull(other.translations),
            tables: self.tables.hull(other.tables),
        }
    }
}

/// What a vCPU has not forgotten yet.
#[derive(Debug)]
pub(crate) struct FlushWords {
    translations: RangeWord,
    tables: RangeWord,
}

impl FlushWords {
    pub(crate) fn new() -> Self {
        Self { translations: RangeWord::new(), tables: RangeWord::new() }
    }

    /// Before the request bit is set.
    pub(crate) fn widen(&self, flush: Flush) {
        self.translations.widen(flush.translations);
        self.tables.widen(flush.tables);
    }

    /// After the request bit was taken.
    pub(crate) fn take(&self) -> Flush {
        Flush { translations: self.translations.take(), tables: self.tables.take() }
    }
}

/// A range of frames in one word: the number of frames, and above it the first.
#[derive(Debug)]
struct RangeWord(AtomicU64);

const COUNT_BITS: u32 = 24;
const EVERYTHING: u64 = u64::MAX;
const _: () = assert!(Flush::MAX_FRAMES >> COUNT_BITS == 0);

fn encode(gfns: GfnRange) -> u64 {
    let (start, count) = (gfns.start.as_u64(), gfns.len());
    if gfns.is_empty() {
        0
    } else if count > Flush::MAX_FRAMES || start >> (u64::BITS - COUNT_BITS) != 0 {
        EVERYTHING
    } else {
        start << COUNT_BITS | count
    }
}

fn decode(word: u64) -> GfnRange {
    let (start, count) = (word >> COUNT_BITS, word & ((1 << COUNT_BITS) - 1));
    match word {
        0 => NONE,
        EVERYTHING => ALL,
        _ => GfnRange::new(Gfn::new(start), Gfn::new(start + count)),
    }
}

impl RangeWord {
    fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    fn widen(&self, gfns: GfnRange) {
        if gfns.is_empty() {
            return;
        }
        let mut more = gfns;
        if mutation::active(Mutation::FlushForgetsLastFrame) {
            more.end = more.start + (more.len() - 1);
        }
        // Release: who takes it sees the tables as they are since the zap. Requesters may meet here.
        let release = mutation::unless(Mutation::FlushWidenedRelaxed, Ordering::Release);
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            let wide = encode(decode(seen).hull(more));
            match self.0.compare_exchange_weak(seen, wide, release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    fn take(&self) -> GfnRange {
        decode(self.0.swap(0, Ordering::Acquire))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn gfns(start: u64, end: u64) -> GfnRange {
        GfnRange::new(Gfn::new(start), Gfn::new(end))
    }

    #[test]
    fn a_range_is_taken_as_it_was_told_and_once() {
        let words = FlushWords::new();
        assert!(words.take().is_nothing());
        for range in
            [gfns(0, 1), gfns(511, 513), gfns(7, 7 + Flush::MAX_FRAMES), gfns((1 << 40) - 1, 1 << 40)]
        {
            words.widen(Flush::of(range));
            assert_eq!(words.take(), Flush::of(range));
            words.widen(Flush::with_tables(range));
            assert_eq!(words.take(), Flush::with_tables(range));
            assert!(words.take().is_nothing());
        }
        words.widen(Flush::NOTHING);
        assert!(words.take().is_nothing());
    }

    #[test]
    fn what_is_added_is_covered_with_all_before() {
        let backwards = |start, end| GfnRange { start: Gfn::new(start), end: Gfn::new(end) };
        let of = |added: &[GfnRange]| {
            let mut flush = Flush::NOTHING;
            added.iter().for_each(|gfns| flush.add(*gfns));
            flush.translations
        };
        assert_eq!(of(&[gfns(0, 1), gfns(1, 512)]), gfns(0, 512));
        assert_eq!(of(&[gfns(7, 9), gfns(20, 21), gfns(3, 4)]), gfns(3, 21));
        // What is empty takes nothing away, wherever it ends.
        assert_eq!(of(&[gfns(2, 9), backwards(9, 3)]), gfns(2, 9));
        assert_eq!(of(&[backwards(9, 3), gfns(3, 4)]), gfns(3, 4));
    }

    #[test]
    fn ranges_that_meet_become_their_hull_or_everything() {
        let words = FlushWords::new();
        words.widen(Flush::of(gfns(100, 101)));
        words.widen(Flush::with_tables(gfns(512, 1024)));
        words.widen(Flush::of(gfns(90, 91)));
        assert_eq!(words.take(), Flush { translations: gfns(90, 1024), tables: gfns(512, 1024) });
        words.widen(Flush::of(gfns(0, 1)));
        words.widen(Flush::with_tables(gfns(Flush::MAX_FRAMES, Flush::MAX_FRAMES + 1)));
        let wide = Flush { tables: gfns(Flush::MAX_FRAMES, Flush::MAX_FRAMES + 1), ..Flush::EVERYTHING };
        assert_eq!(words.take(), wide);
        words.widen(Flush::EVERYTHING);
        words.widen(Flush::of(gfns(3, 4)));
        assert_eq!(words.take(), Flush::EVERYTHING);
        words.widen(Flush::of(gfns(1 << 40, (1 << 40) + 1)));
        assert_eq!(words.take(), Flush { tables: NONE, ..Flush::EVERYTHING }, "beyond what a word can say");
    }
}
