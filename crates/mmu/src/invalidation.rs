//! Invalidations: the sequence, the count and the range that a fault is checked against.
//!
//! # State
//!
//! | word | changed with `mmu_lock` held for write | meaning |
//! |---|---|---|
//! | `words[ALL]` | `begin`: count +1. `end`: count −1 and sequence +1, in one store | invalidations between begin and end, and those that ended |
//! | the others | likewise, for each region of 2 MiB that the hull of the ranges touches, or of 64 MiB if those are many, with [`SequenceScope::Region`] | those of them that touched the region |
//! | hull and entries (module `ranges`) | `begin` and `end` | which frames |
//!
//! `begin` writes the ranges and *then* raises the counts; `end` drops a count and bumps its sequence at once, and only
//! then empties what was noted of the ranges. The hull stays behind: only the count gives it meaning. It never shrinks
//! while any invalidation is active, so with overlapping invalidations a gfn between two ranges is refused until the
//! last one ends: a false positive, accepted, unless [`Coverage::Exact`] is chosen.
//!
//! # What a verdict is worth
//!
//! Words that are written one after the other can be seen torn without the lock. So there are two checks:
//!
//! * [`Snapshot::hint`] takes no lock. It may miss an invalidation and may see one that is over. It gives
//!   only a reason to retry, never a right to install.
//! * [`Witness::verify`](crate::Witness::verify) gives [`Fresh`](crate::Fresh), the right to install, which cannot
//!   outlive the witness. `mmu_lock` keeps the words still. An announced [`Intent`](crate::Intent) does not, and so:
//!
//! A verdict reads its two words once. If they say "none active" and "none has ended since", all in one comparison, it
//! is fresh: an invalidation of these frames that raised one of them before would show in it, as active or as ended;
//! one that raises it later looks at the announcements later still, and waits for this one. If they say "active", the
//! ranges are read, and then the words again, each Acquire: ranges that were emptied or reused after an end lead to the
//! sequence that this end bumped. Ranges that are half written belong to an invalidation that has not looked at the
//! announcements yet.
//!
//! A fault that overlaps the invalidation is caught by count and ranges; one that sampled the sequence before the end
//! and verifies after it is caught by the sequence. Hence the sequence moves at the end only.
//!
//! # Whose end matters
//!
//! KVM has one sequence and one count: an end anywhere fails every fault that is under way, unrelated invalidations can
//! hold a fault back without bound, and each of them takes the line that all faults read. With
//! [`SequenceScope::Region`] an invalidation changes, besides the word of all, the word of every region that the hull of
//! its ranges touches, and a fault whose frames lie in one region looks at two words: that of the region, and that of the 64 MiB
//! around it, each on a cache line of its own. Narrow invalidations change the former, wide ones (more than 64 regions)
//! the latter, so that 1 GiB is begun and ended by 17 stores and its neighbours see nothing of it. A word grows with
//! each change, so the sum of two is what it was only if both are, and is compared as if it were one word. The argument
//! stays: an invalidation that covers the fault's frames touches their region, so it changes one of the words that the
//! fault looks at. Frames that span regions are checked against the word of all, taken twice.
//!
//! Source: Linux `kvm_mmu_invalidate_begin`, `kvm_mmu_invalidate_range_add`, `kvm_mmu_invalidate_end`,
//! `mmu_invalidate_retry_gfn` and `mmu_invalidate_retry_gfn_unsafe`.

use alloc::boxed::Box;
use core::fmt;
use core::num::NonZeroU64;

use crate::addr::GfnRange;
use crate::block::Block;
use crate::mutation::{self, Mutation};
use crate::ranges::{Coverage, Ranges, Tracks};
use crate::regions::{self, Regions};
use crate::snapshot::Snapshot;
use crate::sync::{AtomicU64, CachePadded, Ordering};

/// Words for regions of 2 MiB.
#[cfg(not(loom))]
const SMALL: Regions = Regions { order: regions::SMALL, first: 0, words: 128 };
/// Few under loom.
#[cfg(loom)]
const SMALL: Regions = Regions { order: regions::SMALL, first: 0, words: 2 };
/// Words for regions of 64 MiB: for 4 GiB.
#[cfg(not(loom))]
const WIDE: Regions = Regions { order: regions::WIDE, first: SMALL.words, words: 64 };
/// Few under loom.
#[cfg(loom)]
const WIDE: Regions = Regions { order: regions::WIDE, first: SMALL.words, words: 2 };
/// Index of the word that every invalidation changes.
const ALL: usize = WIDE.first + WIDE.words;
/// An invalidation that touches more small regions changes the words of the wide ones.
const MANY: u64 = SMALL.words as u64 / 2;

/// Bits of a word, from below: the count of active invalidations, the sequence of those that ended.
const COUNT_BITS: u32 = 16;
const COUNT: u64 = (1 << COUNT_BITS) - 1;
const ONE_ENDED: u64 = 1 << COUNT_BITS;
/// Half of what can be counted: two words are added up.
pub(crate) const MOST_ACTIVE: u64 = COUNT >> 1;
/// Which invalidations make a fault under way retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceScope {
    /// An end anywhere: KVM's way.
    Global,
    /// Those that touch the same region of 2 MiB, or one that shares its word; of those that touch more than 64, the same 64 MiB.
    Region,
}

/// Tells virtual machines apart, so that what protects one's tables is not taken for another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MachineId(NonZeroU64);

impl MachineId {
    /// One that no machine has had.
    fn next() -> Self {
        // Not the engine's own atomics: this is no part of any protocol, and loom would forget it between two schedules.
        static NEXT: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(1);
        let next = NEXT.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
        Self(NonZeroU64::new(next).expect("nobody makes 2^64 machines"))
    }
}

/// The words of one virtual machine; changed only through a [`MmuWriteGuard`](crate::MmuWriteGuard).
pub struct Invalidations {
    machine: MachineId,
    scope: SequenceScope,
    /// The order of blocks that are too large for the words of regions, or all blocks.
    too_large: u32,
    /// On lines of their own: faults that find none active do not look at them.
    ranges: CachePadded<Ranges>,
    /// By themselves, so that a machine is small enough for the stack of who makes it.
    words: Box<[CachePadded<AtomicU64>; 1 + ALL]>,
}

impl fmt::Debug for Invalidations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invalidations")
            .field("in_progress", &self.in_progress())
            .field("ranges", &self.ranges.0)
            .finish_non_exhaustive()
    }
}

/// An invalidation between begin and end: what [`MmuWriteGuard::begin`](crate::MmuWriteGuard::begin) gives and `end` takes.
#[must_use = "faults are held back until it is ended"]
#[derive(Debug)]
pub struct Begun {
    machine: MachineId,
    /// The hull of its ranges.
    frames: GfnRange,
    tracks: Tracks,
}

/// Why an invalidation cannot begin. Nothing has changed. Not reachable through
/// [`GuestMmu::invalidate`](crate::GuestMmu::invalidate).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidationError {
    /// It has no frames.
    #[error("an invalidation of no frames was begun: it would hold no fault back")]
    NoFrames,
    /// As many are active as can be counted.
    #[error("32767 invalidations are active: end some before another begins")]
    TooMany,
}

/// What two words say: their sum. Each only grows, so the sum is the same again only if both are.
#[inline]
pub(crate) fn said([small, wide]: [&AtomicU64; 2], ordering: Ordering) -> u64 {
    small.load(ordering).wrapping_add(wide.load(ordering))
}

/// How many are active, by what is said.
#[inline]
pub(crate) fn active(said: u64) -> u64 {
    said & COUNT
}

/// The sequence, by what is said.
pub(crate) fn ended(said: u64) -> u64 {
    said >> COUNT_BITS
}

/// Of nothing that was ever active. Never on the stack.
fn words() -> Box<[CachePadded<AtomicU64>; 1 + ALL]> {
    let words: Box<[_]> = (0..=ALL).map(|_| CachePadded(AtomicU64::new(0))).collect();
    words.try_into().unwrap_or_else(|_| unreachable!("it has as many"))
}

impl Invalidations {
    pub(crate) fn new(scope: SequenceScope, coverage: Coverage) -> Self {
        Self {
            machine: MachineId::next(),
            scope,
            too_large: if scope == SequenceScope::Region { regions::TOO_LARGE } else { 0 },
            ranges: CachePadded(Ranges::new(coverage)),
            words: words(),
        }
    }

    /// Whose words these are.
    #[inline]
    pub fn machine(&self) -> MachineId {
        self.machine
    }

    /// Where something is said about `block`: the words of its small region and of its wide one.
    #[inline]
    pub(crate) fn words_for(&self, block: Block) -> [&AtomicU64; 2] {
        let [small, wide] = match block.order() >= self.too_large {
            true => [ALL, ALL],
            false => [SMALL.word_of(block), WIDE.word_of(block)],
        };
        let wide = if mutation::active(Mutation::WideUnread) { small } else { wide };
        [small, wide].map(|word| &self.words[word].0)
    }

    /// Samples what counts for `block`. Everything that can go stale (attributes, the page) is looked up after this.
    #[inline]
    pub fn snapshot(&self, block: Block) -> Snapshot<'_> {
        Snapshot::take(self, block)
    }

    /// Whether an active invalidation covers a frame of `range`, as far as can be told without the lock.
    ///
    /// Acquire: who reads "over" here and samples the sequence next reads it bumped.
    pub fn covers(&self, range: GfnRange) -> bool {
        let words = self.words_for(Block::around(range));
        active(said(words, Ordering::Acquire)) != 0 && self.ranges.overlap(range, Ordering::Acquire)
    }

    /// Whether the range of an active invalidation has a frame of `block`. The caller has found one active.
    pub(crate) fn overlap(&self, block: Block, ordering: Ordering) -> bool {
        self.ranges.overlap(block.range(), ordering)
    }

    /// How many invalidations are active.
    #[inline]
    pub fn in_progress(&self) -> u64 {
        active(self.words[ALL].load(Ordering::Acquire))
    }

    /// The words that an invalidation of `frames` changes. Depends on nothing else: the end changes those that the begin did.
    fn words_of(&self, frames: GfnRange) -> impl Iterator<Item = &AtomicU64> {
        let regions = match self.scope {
            SequenceScope::Global => None,
            SequenceScope::Region if SMALL.touched_by(frames) > MANY => Some(WIDE.words_of(frames)),
            SequenceScope::Region => Some(SMALL.words_of(frames)),
        };
        let forgotten = mutation::active(Mutation::LastRegionForgotten);
        let touched = regions.map(|words| if forgotten { words.but_last() } else { words });
        core::iter::once(ALL).chain(touched.into_iter().flatten()).map(|word| &self.words[word].0)
    }

    /// Publishes all ranges of an invalidation, and then raises the counts. `mmu_lock` is held for write. Nobody ever sees it
    /// active without its ranges.
    pub(crate) fn begin(
        &self,
        ranges: impl Iterator<Item = GfnRange> + Clone,
    ) -> Result<Begun, InvalidationError> {
        let ranges = ranges.filter(|range| !range.is_empty());
        let frames = ranges.clone().reduce(GfnRange::hull).ok_or(InvalidationError::NoFrames)?;
        let is_first = match self.in_progress() {
            0 => true,
            MOST_ACTIVE.. => return Err(InvalidationError::TooMany),
            _ => false,
        };
        let tracks = self.ranges.begin(is_first, frames, ranges);
        for word in self.words_of(frames) {
            // Release: who reads this count reads the ranges.
            let ordering = mutation::unless(Mutation::BeginRelaxed, Ordering::Release);
            word.store(word.load(Ordering::Relaxed) + 1, ordering);
        }
        Ok(Begun { machine: self.machine, frames, tracks })
    }

    /// Bumps the sequences and drops the counts. `mmu_lock` is held for write.
    pub(crate) fn end(&self, begun: Begun) {
        assert!(begun.machine == self.machine, "an invalidation of another virtual machine");
        if mutation::active(Mutation::EndRangesFirst) {
            self.ranges.end(begun.tracks);
        }
        for word in self.words_of(begun.frames) {
            Self::end_in(word);
        }
        if !mutation::active(Mutation::EndRangesFirst) {
            self.ranges.end(begun.tracks);
        }
    }

    fn end_in(word: &AtomicU64) {
        let before = word.load(Ordering::Relaxed);
        if mutation::active(Mutation::EndCountFirst) {
            word.store(before - 1, Ordering::Release);
        }
        let bumped = if mutation::active(Mutation::EndKeepsSequence) { 0 } else { ONE_ENDED };
        // Release: who samples the new number sees what the primary MMU did before this end.
        let ordering = mutation::unless(Mutation::BumpRelaxed, Ordering::Release);
        word.store((before - 1).wrapping_add(bumped), ordering);
    }
}
