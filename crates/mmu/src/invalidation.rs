//! Invalidations: the sequence, the count and the range that a fault is checked against.
//!
//! # State
//!
//! | word | changed with `mmu_lock` held for write | meaning |
//! |---|---|---|
//! | `words[ALL]` | `begin`: count +1. `end`: count −1 and sequence +1, in one store | invalidations between begin and end, and those that ended |
//! | `words[1..]` | likewise, for each region of 2 MiB that the ranges touch, with [`SequenceScope::Region`] | those of them that touched the region |
//! | hull and entries (module `ranges`) | `begin` and `end` | which frames |
//!
//! `begin` writes the ranges and *then* raises the counts; `end` drops a count and bumps its sequence at once, and only then
//! empties what was noted of the ranges. The hull stays behind: only the count gives it meaning.
//! It never shrinks while any invalidation is active, so with overlapping invalidations a gfn between two ranges
//! is refused until the last one ends: a false positive, accepted, unless [`Coverage::Exact`] is chosen.
//!
//! # What a verdict is worth
//!
//! Words that are written one after the other can be seen torn without the lock. So there are two checks:
//!
//! * [`Invalidations::hint`] takes no lock. It may miss an invalidation and may see one that is over. It gives
//!   only a reason to retry, never a right to install.
//! * [`Invalidations::verify`] needs a [`Witness`](crate::Witness), and gives [`Fresh`], the right to install, which cannot
//!   outlive the witness. `mmu_lock` keeps the words still. An announced [`Intent`](crate::Intent) does not, and so:
//!
//! A verdict reads its word once. If that says "none active" and "none has ended since", both in one comparison, it is fresh: an invalidation of these
//! frames that raised the word before would show in it, as active or as ended; one that raises it later looks at the announcements
//! later still, and waits for this one. If it says "active", the ranges are read, and then the word again, each Acquire: ranges
//! that were emptied or reused after an end lead to the sequence that this end bumped. Ranges
//! that are half written belong to an invalidation that has not looked at the announcements yet.
//!
//! A fault that overlaps the invalidation is caught by count and ranges; one that sampled the sequence before the
//! end and verifies after it is caught by the sequence. Hence the sequence moves at the end only.
//!
//! # Whose end matters
//!
//! KVM has one sequence and one count: an end anywhere fails every fault that is under way, unrelated invalidations can hold a
//! fault back without bound, and each of them takes the line that all faults read. With [`SequenceScope::Region`] an invalidation
//! changes, besides the word of all, the word of every region that its ranges touch, and a fault whose
//! frames lie in one region looks at that region's word alone, on a cache line of its own. The argument stays: an invalidation
//! that covers the fault's frames touches their region, so it changes the word that the fault looks at. Frames that span regions
//! are checked against the word of all.
//!
//! Source: Linux `kvm_mmu_invalidate_begin`, `kvm_mmu_invalidate_range_add`, `kvm_mmu_invalidate_end`,
//! `mmu_invalidate_retry_gfn` and `mmu_invalidate_retry_gfn_unsafe`.

use core::fmt;
use core::marker::PhantomData;
use core::num::NonZeroU64;

use crate::addr::GfnRange;
use crate::block::Block;
use crate::intent::Walking;
use crate::mmu_lock::Witness;
use crate::mutation::{self, Mutation};
use crate::ranges::{Coverage, Ranges, Tracks};
use crate::regions;
use crate::sync::{AtomicU64, CachePadded, Ordering};

/// Words for regions.
#[cfg(not(loom))]
const REGIONS: usize = 128;
/// Few under loom.
#[cfg(loom)]
const REGIONS: usize = 2;
/// Index of the word that every invalidation changes.
const ALL: usize = REGIONS;

/// Bits of a word, from below: the count of active invalidations, the sequence of those that ended. The highest is never set.
const COUNT_BITS: u32 = 16;
const COUNT: u64 = (1 << COUNT_BITS) - 1;
const ONE_ENDED: u64 = 1 << COUNT_BITS;
const WORD: u64 = u64::MAX >> 1;

/// Which invalidations make a fault under way retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceScope {
    /// An end anywhere: KVM's way.
    Global,
    /// Those that touch the same region of 2 MiB, or one that shares its word.
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
    words: [CachePadded<AtomicU64>; 1 + REGIONS],
}

impl fmt::Debug for Invalidations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invalidations")
            .field("in_progress", &self.in_progress())
            .field("ranges", &self.ranges.0)
            .finish_non_exhaustive()
    }
}

/// The invalidations of some frames as they were before their pages were looked up.
///
/// Whoever resolves a page asks for one, so that it cannot be taken too late; and a verdict can be about no other frames.
#[must_use = "a snapshot that nothing is verified against protects nothing"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// From below: the index of the block's word, the block. Two words in all, so that a snapshot stays in registers.
    at: u64,
    /// What the word said; with the highest bit, if any were active: then it says something else the next time.
    said: u64,
}

const WORD_BITS: u32 = 8;
const _: () = assert!(ALL < 1 << WORD_BITS && Block::BITS + WORD_BITS <= u64::BITS);

impl Snapshot {
    #[inline]
    fn new(block: Block, word: usize, said: u64) -> Self {
        let said = if active(said) == 0 { said } else { said | !WORD };
        Self { at: block.bits() << WORD_BITS | word as u64, said }
    }

    /// The frames that it is of.
    #[inline]
    pub fn block(self) -> Block {
        Block::from_bits(self.at >> WORD_BITS)
    }

    #[inline]
    fn word(self) -> usize {
        (self.at & ((1 << WORD_BITS) - 1)) as usize
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

/// The right to install translations for a range of frames, as long as the witness `'w` lives.
///
/// Only [`Invalidations::verify`] makes one.
#[must_use = "verified for nothing: install, or do not verify"]
#[derive(Debug)]
pub struct Fresh<'w> {
    block: Block,
    machine: MachineId,
    witness: PhantomData<&'w ()>,
}

impl<'w> Fresh<'w> {
    /// The right to follow links between tables, as long as the witness lives.
    #[inline]
    pub fn walking(&self) -> Walking<'w> {
        Walking::new(self.machine)
    }

    /// The frames that may be installed.
    #[inline]
    pub fn range(&self) -> GfnRange {
        self.block.range()
    }
}

/// Why a fault must be retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stale {
    /// An invalidation whose hull covers the frames is active (or seems to be, for a hint).
    Covered,
    /// An invalidation that the snapshot's [`SequenceScope`] counts has ended since.
    SequenceMoved,
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
    #[error("65535 invalidations are active: end some before another begins")]
    TooMany,
}

/// How many are active, by what a word says.
#[inline]
fn active(said: u64) -> u64 {
    said & COUNT
}

/// The sequence, by what a word says.
fn ended(said: u64) -> u64 {
    (said & WORD) >> COUNT_BITS
}

impl Invalidations {
    pub(crate) fn new(scope: SequenceScope, coverage: Coverage) -> Self {
        Self {
            machine: MachineId::next(),
            scope,
            too_large: if scope == SequenceScope::Region { regions::TOO_LARGE } else { 0 },
            ranges: CachePadded(Ranges::new(coverage)),
            words: core::array::from_fn(|_| CachePadded(AtomicU64::new(0))),
        }
    }

    /// Whose words these are.
    #[inline]
    pub fn machine(&self) -> MachineId {
        self.machine
    }

    /// Samples what counts for `block`. Everything that can go stale (attributes, the page) is looked up after this.
    #[inline]
    pub fn snapshot(&self, block: Block) -> Snapshot {
        let word = regions::word_of(block, REGIONS, self.too_large);
        // Acquire: who sees the new number sees what the primary MMU did before that end.
        let said = self.words[word].load(Ordering::Acquire);
        Snapshot::new(block, word, said)
    }

    /// The lock-free check: whether the fault looks doomed. `None` promises nothing.
    // Always: it is shorter than a call that keeps what the caller has in registers.
    #[inline(always)]
    pub fn hint(&self, since: Snapshot) -> Option<Stale> {
        let now = self.words[since.word()].load(Ordering::Relaxed);
        if now == since.said { None } else { self.look(since, now, Ordering::Relaxed).err() }
    }

    /// The check that counts.
    ///
    /// # Panics
    /// If `witness` belongs to another lock than these words, or was announced for other frames: it would keep nothing true.
    #[inline]
    pub fn verify<'w, W: Witness>(&self, witness: &'w W, since: Snapshot) -> Result<Fresh<'w>, Stale> {
        assert!(core::ptr::eq(witness.invalidations(), self), "a witness of another virtual machine");
        let block = since.block();
        assert!(witness.protects(block), "an intent of other frames");
        let fresh = Fresh { block, machine: self.machine, witness: PhantomData };
        // Acquire: see the module documentation.
        let ordering = mutation::unless(Mutation::VerifyRelaxed, Ordering::Acquire);
        let now = self.words[since.word()].load(ordering);
        if now == since.said || mutation::active(Mutation::VerifyAlwaysFresh) {
            return Ok(fresh);
        }
        self.look(since, now, ordering).map(|()| fresh)
    }

    /// A closer look at a word that says `now`: few faults are under way while an invalidation of their region is.
    #[cold]
    fn look(&self, since: Snapshot, now: u64, ordering: Ordering) -> Result<(), Stale> {
        let is_active = active(now) != 0 && !mutation::active(Mutation::VerifyIgnoresRange);
        if is_active && self.ranges.overlap(since.block().range(), ordering) {
            return Err(Stale::Covered);
        }
        // Again, behind the ranges: they may be those of a later invalidation.
        let now = match mutation::active(Mutation::VerifyLooksOnce) {
            true => now,
            false => self.words[since.word()].load(Ordering::Relaxed),
        };
        let moved = ended(now) != ended(since.said);
        if moved && !mutation::active(Mutation::VerifyIgnoresSequence) {
            return Err(Stale::SequenceMoved);
        }
        Ok(())
    }

    /// Whether an invalidation that counts has ended since.
    pub(crate) fn has_moved(&self, since: Snapshot) -> bool {
        ended(self.words[since.word()].load(Ordering::Acquire)) != ended(since.said)
    }

    /// Whether an active invalidation covers a frame of `range`, as far as can be told without the lock.
    ///
    /// Acquire: who reads "over" here and samples the sequence next reads it bumped.
    pub fn covers(&self, range: GfnRange) -> bool {
        let said = self.snapshot(Block::around(range)).said;
        active(said) != 0 && self.ranges.overlap(range, Ordering::Acquire)
    }

    /// How many invalidations are active.
    #[inline]
    pub fn in_progress(&self) -> u64 {
        active(self.words[ALL].load(Ordering::Acquire))
    }

    /// The words that an invalidation of `frames` changes.
    fn words_of(&self, frames: GfnRange) -> impl Iterator<Item = &AtomicU64> {
        let regions = regions::words_of(frames, REGIONS);
        let touched = match self.scope {
            SequenceScope::Global => 0,
            SequenceScope::Region => regions.clone().count(),
        };
        let forgotten = usize::from(mutation::active(Mutation::LastRegionForgotten));
        let regions = regions.take(touched.saturating_sub(forgotten));
        core::iter::once(ALL).chain(regions).map(|word| &self.words[word].0)
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
            COUNT => return Err(InvalidationError::TooMany),
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
        word.store((before - 1).wrapping_add(bumped) & WORD, ordering);
    }
}
