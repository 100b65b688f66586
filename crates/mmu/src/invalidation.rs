//! Invalidations: the sequence, the count and the range that a fault is checked against.
//!
//! # State
//!
//! | word | changed by | meaning |
//! |---|---|---|
//! | `in_progress` | `begin` +1, `end` −1, with `mmu_lock` held for write | invalidations between begin and end |
//! | `ended[0]` | `end` +1, likewise | the sequence: invalidations that ended |
//! | `ended[1..]` | `end` +1, likewise, with [`SequenceScope::Region`] | those of them that touched a region of 2 MiB |
//! | hull and entries (module `ranges`) | `add_range`, likewise | which frames |
//!
//! `begin` raises the count and, when it was 0, empties the hull to a sentinel; `add_range` widens the hull;
//! `end` bumps the sequence and *then* drops the count. The hull stays behind: only the count gives it meaning.
//! It never shrinks while any invalidation is active, so with overlapping invalidations a gfn between two ranges
//! is refused until the last one ends: a false positive, accepted, unless [`Coverage::Exact`] is chosen.
//!
//! # What a verdict is worth
//!
//! Three words that are written one after the other can be seen torn without the lock. So there are two checks:
//!
//! * [`Invalidations::hint`] takes no lock. It may miss an invalidation and may see one that is over. It gives
//!   only a reason to retry, never a right to install.
//! * [`Invalidations::verify`] needs a [`Witness`](crate::Witness), and gives [`Fresh`], the right to install, which cannot
//!   outlive the witness. `mmu_lock` keeps the words still. An announced [`Intent`](crate::Intent) does not, so the order of the
//!   loads matters: the count, then the ranges, then the sequence, each Acquire. An end bumps the sequence before it drops the
//!   count, and the hull is emptied only by a later first begin: who reads a dropped count or an emptied hull reads the bumped
//!   sequence after it. Bounds of a half-finished `add_range` belong to an invalidation that has not looked at the
//!   announcements yet: it will wait for this one.
//!
//! A fault that overlaps the invalidation is caught by count and hull; one that sampled the sequence before the
//! end and verifies after it is caught by the sequence. Hence the sequence moves at the end only.
//!
//! # Whose end matters
//!
//! KVM has one sequence: an end anywhere fails every fault that is under way, and unrelated invalidations can hold a
//! fault back without bound. With [`SequenceScope::Region`] each end also bumps one word for every region of 2 MiB that its
//! ranges touch (regions share words, so a range bumps at most all of them), and a snapshot for frames of one region
//! is compared with that region's word only. The argument stays: an invalidation that covers the fault's frames
//! touches their region, so its end moves the word that the fault looks at. The sequence of all is bumped as well,
//! for snapshots that name no frames or span regions.
//!
//! Source: Linux `kvm_mmu_invalidate_begin`, `kvm_mmu_invalidate_range_add`, `kvm_mmu_invalidate_end`,
//! `mmu_invalidate_retry_gfn` and `mmu_invalidate_retry_gfn_unsafe`.

use core::marker::PhantomData;
use core::num::NonZeroU64;

use crate::addr::GfnRange;
use crate::intent::Walking;
use crate::mmu_lock::Witness;
use crate::mutation::{self, Mutation};
use crate::ranges::{Coverage, Overlap, Ranges, Tracks};
use crate::sync::{AtomicU64, Ordering};

/// Frames in a region that has a sequence of its own, as a power of two: 2 MiB, so that no smaller page spans two.
#[cfg(not(loom))]
const REGION_SHIFT: u32 = 9;
/// Words for regions. More regions than words share them.
#[cfg(not(loom))]
const REGIONS: usize = 128;
/// Small under loom: two regions of two frames.
#[cfg(loom)]
const REGION_SHIFT: u32 = 1;
/// Small under loom: two regions of two frames.
#[cfg(loom)]
const REGIONS: usize = 2;

/// Index of the word that every end bumps.
const ALL: usize = 0;

/// Which ends make a fault under way retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceScope {
    /// All: KVM's way.
    Global,
    /// Those of invalidations that touched the same region of 2 MiB, or one that shares its word.
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
#[derive(Debug)]
pub struct Invalidations {
    machine: MachineId,
    in_progress: AtomicU64,
    ranges: Ranges,
    scope: SequenceScope,
    ended: [AtomicU64; 1 + REGIONS],
}

/// The sequence as it was before the page was looked up.
///
/// Whoever resolves a page asks for one, so that it cannot be taken too late.
#[must_use = "a snapshot that nothing is verified against protects nothing"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    sequence: u64,
    /// Index of the word that was read.
    word: usize,
}

/// The right to install translations for a range of frames, as long as the witness `'w` lives.
///
/// Only [`Invalidations::verify`] makes one.
#[must_use = "verified for nothing: install, or do not verify"]
#[derive(Debug)]
pub struct Fresh<'w> {
    range: GfnRange,
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
        self.range
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

/// A caller of the bare words broke the pairing rules. Not reachable through
/// [`GuestMmu::invalidate`](crate::GuestMmu::invalidate).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidationError {
    /// `add_range` while no invalidation is active.
    #[error("the range {0} was added while no invalidation is active: call begin first")]
    AddWithoutBegin(GfnRange),
    /// `add_range` with nothing in it.
    #[error("the empty range {0} was added to an invalidation")]
    EmptyRange(GfnRange),
    /// `end` without `begin`; the count is left at 0.
    #[error("an invalidation was ended that never began")]
    EndWithoutBegin,
    /// `begin` and `end` with no range in between: harmless, and surely not what was meant. The end took place.
    #[error("an invalidation ended without a range: faults were never held back")]
    EndWithoutRange,
}

impl Invalidations {
    pub(crate) fn new(scope: SequenceScope, coverage: Coverage) -> Self {
        Self {
            machine: MachineId::next(),
            in_progress: AtomicU64::new(0),
            ranges: Ranges::new(coverage),
            scope,
            ended: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Whose words these are.
    #[inline]
    pub fn machine(&self) -> MachineId {
        self.machine
    }

    /// Samples the sequence of all ends. Everything that can go stale (attributes, the page) is looked up after this.
    #[inline]
    pub fn snapshot(&self) -> Snapshot {
        self.sample(ALL)
    }

    /// Samples the sequence that counts for `range`, likewise.
    #[inline]
    pub fn snapshot_of(&self, range: GfnRange) -> Snapshot {
        self.sample(self.word_of(range))
    }

    #[inline]
    fn sample(&self, word: usize) -> Snapshot {
        Snapshot { sequence: self.ended[word].load(Ordering::Acquire), word }
    }

    /// The word that every invalidation which touches a frame of `range` bumps at its end.
    #[inline]
    fn word_of(&self, range: GfnRange) -> usize {
        if self.scope == SequenceScope::Global {
            return ALL;
        }
        // An empty range has no last frame, and nothing can be installed for it: any word will do.
        let (first, last) = (range.start.as_u64(), range.end.as_u64().saturating_sub(1));
        let (first, last) = (first >> REGION_SHIFT, last >> REGION_SHIFT);
        if first == last { 1 + first as usize % REGIONS } else { ALL }
    }

    /// The lock-free check: whether the fault looks doomed. `None` promises nothing.
    #[inline]
    pub fn hint(&self, since: Snapshot, range: GfnRange) -> Option<Stale> {
        if self.in_progress.load(Ordering::Relaxed) != 0 {
            return self.hint_while_active(since, range);
        }
        self.moved(since).then_some(Stale::SequenceMoved)
    }

    /// Out of line: few faults are under way while an invalidation is active.
    #[cold]
    fn hint_while_active(&self, since: Snapshot, range: GfnRange) -> Option<Stale> {
        if self.ranges.overlap(range, Ordering::Relaxed) == Overlap::Yes {
            return Some(Stale::Covered);
        }
        self.moved(since).then_some(Stale::SequenceMoved)
    }

    /// Whether an end that counts came since.
    #[inline]
    fn moved(&self, since: Snapshot) -> bool {
        self.ended[since.word].load(Ordering::Relaxed) != since.sequence
    }

    /// The check that counts.
    ///
    /// # Panics
    /// If `witness` belongs to another lock than these words: it would keep nothing still.
    #[inline]
    pub fn verify<'w, W: Witness>(
        &self,
        witness: &'w W,
        since: Snapshot,
        range: GfnRange,
    ) -> Result<Fresh<'w>, Stale> {
        assert!(core::ptr::eq(witness.invalidations(), self), "a witness of another virtual machine");
        let fresh = Fresh { range, machine: self.machine, witness: PhantomData };
        if mutation::active(Mutation::VerifyAlwaysFresh) {
            return Ok(fresh);
        }
        // Acquire, all three and in this order: see the module documentation.
        let ordering = mutation::unless(Mutation::VerifyRelaxed, Ordering::Acquire);
        let active = self.in_progress.load(ordering) != 0 && !mutation::active(Mutation::VerifyIgnoresRange);
        if active && self.may_cover::<W>(range, ordering) {
            return Err(Stale::Covered);
        }
        // A snapshot for other frames says nothing about these.
        let foreign = since.word != ALL && since.word != self.word_of(range);
        let moved = self.moved(since);
        if (foreign || moved) && !mutation::active(Mutation::VerifyIgnoresSequence) {
            return Err(Stale::SequenceMoved);
        }
        Ok(fresh)
    }

    /// Whether the invalidation that was found active covers a frame of `range`, for all that can be told. Out of line, as above.
    #[cold]
    fn may_cover<W: Witness>(&self, range: GfnRange, ordering: Ordering) -> bool {
        let overlap = self.ranges.overlap(range, ordering);
        // Between begin and the first range. With the lock held that is seen only if it was given up there.
        let torn = overlap == Overlap::Torn;
        debug_assert!(!(torn && W::HOLDS_LOCK), "mmu_lock was given up between begin and add_range");
        overlap != Overlap::No
    }

    /// Whether an active invalidation covers a frame of `range`, as far as can be told without the lock.
    ///
    /// Acquire: who reads "over" here and samples the sequence next reads it bumped.
    #[inline]
    pub fn covers(&self, range: GfnRange) -> bool {
        self.in_progress.load(Ordering::Acquire) != 0
            && self.ranges.overlap(range, Ordering::Acquire) == Overlap::Yes
    }

    /// How many invalidations are active.
    #[inline]
    pub fn in_progress(&self) -> u64 {
        self.in_progress.load(Ordering::Acquire)
    }

    /// Publishes all ranges of an invalidation, and then raises the count. `mmu_lock` is held for write. Nobody ever sees it
    /// active without its ranges. What was noted of them is for [`end`](Self::end).
    pub(crate) fn begin_with(&self, ranges: impl Iterator<Item = GfnRange> + Clone) -> Tracks {
        let active = self.in_progress.load(Ordering::Relaxed);
        let tracks = self.ranges.begin_with(active == 0, ranges);
        let ordering = mutation::unless(Mutation::BeginRelaxed, Ordering::Release);
        self.in_progress.store(active + 1, ordering);
        tracks
    }

    /// Raises the count. `mmu_lock` is held for write.
    pub(crate) fn begin(&self) {
        let active = self.in_progress.load(Ordering::Relaxed);
        self.ranges.begin(active == 0);
        // Release: who reads this count reads what the ends before it bumped.
        let ordering = mutation::unless(Mutation::BeginRelaxed, Ordering::Release);
        self.in_progress.store(active + 1, ordering);
    }

    /// Widens the hull. `mmu_lock` is held for write.
    pub(crate) fn add_range(&self, range: GfnRange) -> Result<(), InvalidationError> {
        if self.in_progress.load(Ordering::Relaxed) == 0 {
            return Err(InvalidationError::AddWithoutBegin(range));
        }
        if range.is_empty() {
            return Err(InvalidationError::EmptyRange(range));
        }
        self.ranges.add(range);
        Ok(())
    }

    /// Bumps the sequence, then drops the count. `mmu_lock` is held for write. `range` holds every range that this
    /// invalidation added; `None`: not known. `tracks` is what [`begin_with`](Self::begin_with) said.
    pub(crate) fn end(&self, range: Option<GfnRange>, tracks: Tracks) -> Result<(), InvalidationError> {
        let active = self.in_progress.load(Ordering::Relaxed);
        if active == 0 {
            return Err(InvalidationError::EndWithoutBegin);
        }
        if mutation::active(Mutation::EndCountFirst) {
            self.in_progress.store(active - 1, Ordering::Release);
            self.bump_sequences(range);
            self.ranges.end(tracks);
        } else if mutation::active(Mutation::EndRangesFirst) {
            self.ranges.end(tracks);
            self.bump_sequences(range);
            self.in_progress.store(active - 1, Ordering::Release);
        } else {
            self.bump_sequences(range);
            self.ranges.end(tracks);
            self.in_progress.store(active - 1, Ordering::Release);
        }
        if !self.ranges.has_any() {
            return Err(InvalidationError::EndWithoutRange);
        }
        Ok(())
    }

    fn bump_sequences(&self, range: Option<GfnRange>) {
        self.bump(ALL);
        if self.scope == SequenceScope::Global {
            return;
        }
        let (first, count) = match range {
            Some(range) if !range.is_empty() => {
                let first = range.start.as_u64() >> REGION_SHIFT;
                let last = (range.end.as_u64() - 1) >> REGION_SHIFT;
                (first as usize, ((last - first) as usize).saturating_add(1).min(REGIONS))
            }
            _ => (0, REGIONS),
        };
        let count = if mutation::active(Mutation::EndForgetsLastRegion) { count - 1 } else { count };
        for region in 0..count {
            self.bump(1 + (first + region) % REGIONS);
        }
    }

    fn bump(&self, word: usize) {
        if !mutation::active(Mutation::EndKeepsSequence) {
            // Release: who samples the new number sees what the primary MMU did before this end.
            let ordering = mutation::unless(Mutation::BumpRelaxed, Ordering::Release);
            let word = &self.ended[word];
            word.store(word.load(Ordering::Relaxed).wrapping_add(1), ordering);
        }
    }
}
