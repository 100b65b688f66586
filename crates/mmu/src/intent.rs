//! Announcements: what a vCPU is about to install, and that it walks tables, without a lock.
//!
//! # States
//!
//! Each vCPU owns words on cache lines of their own: one for walks, one for blocks that span regions of guest memory, and some
//! for blocks of one region. So an invalidation takes no line that a fault elsewhere writes.
//!
//! ```text
//! quiet ──announce the block that will be installed──► intent ──clear──► quiet
//!   └─────announce that tables are walked────────────► walk ────clear──► quiet
//! ```
//!
//! Every announcement has a generation of its own, so that two for the same frames are told apart.
//!
//! # An intent is a witness
//!
//! A fault announces its block and only then verifies; it clears the word when the install is done. An invalidation
//! publishes its range and its count, and only then looks at every word: it waits until each that named a frame of the
//! range says something else, and zaps after that. With a full barrier on both sides between the store and the look:
//!
//! * the invalidation sees the announcement: it waits, and the zap finds whatever was installed; or
//! * the vCPU sees count and range, and retries.
//!
//! So no install of the range comes behind the zap. An announcement that is made after the look can only be followed by a
//! verdict "covered", until the end; and after the end the sequence has moved. See the module `invalidation`
//! for the order in which a verdict reads the words while they change.
//!
//! Only invalidations of the announced frames wait, as long as the install takes. They hold no lock meanwhile, and park
//! after a short spin: a vCPU that loses its CPU between announce and clear delays nobody else.
//!
//! # A walk protects tables
//!
//! Who follows links between tables has announced something, holds `mmu_lock`, or is in the guest. Who unlinks a table
//! holds `mmu_lock` for write, flushes, and before the table is freed waits until every word that was not quiet says
//! something else ([`VcpuWords::quiesce`](crate::VcpuWords)). It is KVM's RCU, by the same word.
//!
//! # Two barriers
//!
//! The vCPU's side is the hot one. With [`Barrier::Heavy`] it is free of fences: the other side makes every CPU execute
//! one ([`Platform::HEAVY_BARRIER`]). With [`Barrier::Symmetric`] each side has its own. To be woken, a waiter that
//! is about to park sets a mark and has a look of its own, by the heavy barrier wherever there is one.
//!
//! Source: the architecture of hazard pointers and of `membarrier(2)`; Linux has no counterpart in KVM.

use core::fmt;
use core::marker::PhantomData;

use crate::addr::GfnRange;
use crate::block::Block;
use crate::guest_mmu::GuestMmu;
use crate::host::SecondaryMmu;
use crate::invalidation::{Invalidations, MachineId};
use crate::mmu_lock::{Witness, sealed};
use crate::mutation::{self, Mutation};
use crate::platform::Platform;
use crate::regions::{self, Grid};
use crate::sync::{AtomicU64, CachePadded, Ordering, ParkWord, compiler_fence, fence};
use crate::vcpu_words::VcpuShared;

/// How an announcement is ordered before the look that follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Barrier {
    /// Both sides execute a fence. Where faults are dear, or invalidations many.
    Symmetric,
    /// The vCPU executes none, the other side one for all CPUs: [`Platform::HEAVY_BARRIER`]. Where faults are many.
    /// A platform that has none gets `Symmetric` instead.
    Heavy,
}

impl Barrier {
    /// The vCPU's side.
    #[inline]
    pub(crate) fn light(self) {
        compiler_fence(Ordering::SeqCst);
        if self == Self::Symmetric {
            fence(Ordering::SeqCst);
        }
    }

    /// The other side.
    pub(crate) fn heavy<P: Platform>(self) {
        match self {
            Self::Symmetric => fence(Ordering::SeqCst),
            Self::Heavy => P::HEAVY_BARRIER.expect("it was chosen because it is there").everywhere(),
        }
    }
}

/// The barriers of one virtual machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Barriers {
    /// Between an announcement (or a read section's start) and the look that follows.
    pub(crate) announce: Barrier,
    /// Between a clear and the look for someone who waits.
    park: Barrier,
}

impl Barriers {
    /// What `P` has of what is `wanted`.
    pub(crate) fn of<P: Platform>(wanted: Barrier) -> Self {
        let best = match P::HEAVY_BARRIER {
            Some(heavy) if heavy.is_ready() => Barrier::Heavy,
            _ => Barrier::Symmetric,
        };
        Self { announce: if wanted == best { wanted } else { Barrier::Symmetric }, park: best }
    }
}

/// Bits of a word, from below: active, the block, generation.
pub(crate) const ACTIVE: u64 = 1;
pub(crate) const BLOCK_SHIFT: u32 = 1;
const GENERATION_SHIFT: u32 = BLOCK_SHIFT + Block::BITS;
pub(crate) const GENERATION: u64 = u64::MAX << GENERATION_SHIFT;
pub(crate) const ONE_GENERATION: u64 = 1 << GENERATION_SHIFT;
/// In the place of a block: an announcement that names no frame, a walk.
const NOTHING: u64 = (1 << Block::BITS) - 1;

/// Whether an announcement that is made names a frame that `covers` says yes to.
pub(crate) fn names(word: u64, covers: impl FnOnce(GfnRange) -> bool) -> bool {
    match word >> BLOCK_SHIFT & NOTHING {
        NOTHING => false,
        bits => covers(Block::from_bits(bits).range()),
    }
}

/// One word of a vCPU, and where those park who wait for it to change.
#[derive(Debug)]
pub(crate) struct IntentWord {
    word: AtomicU64,
    /// The generation of the last announcement: its owner's alone. What it says next so depends on no load of the word, whose
    /// last store may wait behind an install for its turn. Not the engine's own atomics: no part of any protocol.
    generation: core::sync::atomic::AtomicU64,
    /// Odd: someone waits, or did.
    waiters: ParkWord,
    barriers: Barriers,
}

impl IntentWord {
    pub(crate) fn new(barriers: Barriers) -> Self {
        let generation = core::sync::atomic::AtomicU64::new(0);
        Self { word: AtomicU64::new(0), generation, waiters: ParkWord::new(0), barriers }
    }

    #[inline]
    fn next_generation(&self) -> u64 {
        let next = self.generation.load(core::sync::atomic::Ordering::Relaxed).wrapping_add(ONE_GENERATION);
        self.generation.store(next, core::sync::atomic::Ordering::Relaxed);
        next
    }

    /// Announces a block's bits, or [`NOTHING`].
    #[inline]
    fn announce(&self, what: u64) {
        debug_assert_eq!(
            self.word.load(Ordering::Relaxed) & ACTIVE,
            0,
            "a vCPU announces one thing at a time"
        );
        // Release: who waits for the last announcement may find this one. What was done then comes before all the same.
        let ordering = mutation::unless(Mutation::AnnounceRelaxed, Ordering::Release);
        self.word.store(self.next_generation() | what << BLOCK_SHIFT | ACTIVE, ordering);
        if !mutation::active(Mutation::AnnounceWithoutFence) {
            self.barriers.announce.light();
        }
    }

    /// Announces that something is looked at which who takes it away waits for: no frame.
    #[inline]
    pub(crate) fn enter(&self) {
        self.announce(NOTHING);
    }

    /// Says that what was announced is done.
    #[inline]
    pub(crate) fn clear<P: Platform>(&self) {
        let ordering = mutation::unless(Mutation::ClearRelaxed, Ordering::Release);
        self.word.store(self.generation.load(core::sync::atomic::Ordering::Relaxed), ordering);
        if P::PARKS {
            if !mutation::active(Mutation::ClearWithoutFence) {
                self.barriers.park.light();
            }
            if self.waiters.load(Ordering::Relaxed) & 1 != 0 {
                self.wake::<P>();
            }
        }
    }

    #[cold]
    fn wake<P: Platform>(&self) {
        // Even again: whoever marks it next parks on a new value.
        self.waiters.fetch_add(1, Ordering::Relaxed);
        P::wake_all(&self.waiters);
    }

    /// Waits until the word is no longer `seen`.
    pub(crate) fn wait_out<P: Platform>(&self, seen: u64) {
        for _ in 0..P::SPINS {
            if self.word.load(Ordering::Acquire) != seen {
                return;
            }
            P::relax();
        }
        loop {
            let marked = self.waiters.fetch_or(1, Ordering::Relaxed) | 1;
            self.barriers.park.heavy::<P>();
            if self.word.load(Ordering::Acquire) != seen {
                return;
            }
            P::wait(&self.waiters, marked);
        }
    }

    /// The announcement that is made now, if any.
    pub(crate) fn announced(&self) -> Option<u64> {
        // Acquire, also of a quiet word: what was done before it was cleared is seen by who looks.
        let seen = self.word.load(Ordering::Acquire);
        (seen & ACTIVE != 0).then_some(seen)
    }

    /// The announcement that is made now, if it names a frame that `covers` says yes to.
    pub(crate) fn named(&self, covers: impl FnOnce(GfnRange) -> bool) -> Option<u64> {
        self.announced().filter(|seen| names(*seen, covers))
    }
}

/// Words for blocks of one region.
#[cfg(not(loom))]
const REGIONS: Grid = Grid { rows: 3, columns: 2 };
/// Few under loom.
#[cfg(loom)]
const REGIONS: Grid = Grid { rows: 0, columns: 1 };

/// Index of the word for blocks that span regions.
const SPANNING: usize = REGIONS.words();
/// Index of the word for walks.
const WALKS: usize = SPANNING + 1;

/// All words of one vCPU. It announces one thing at a time: at most one of them is not quiet.
#[derive(Debug)]
pub(crate) struct IntentWords([CachePadded<IntentWord>; 1 + WALKS]);

/// An announcement that was found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Announced {
    word: usize,
    said: u64,
}

impl IntentWords {
    pub(crate) fn new(barriers: Barriers) -> Self {
        Self(core::array::from_fn(|_| CachePadded(IntentWord::new(barriers))))
    }

    /// The word to announce `block` in.
    #[inline]
    pub(crate) fn of(&self, block: Block) -> &IntentWord {
        if block.order() >= regions::TOO_LARGE {
            return self.of_spanning();
        }
        &self.0[REGIONS.word_of(block)]
    }

    /// Apart: blocks that no region holds are rare.
    #[cold]
    fn of_spanning(&self) -> &IntentWord {
        &self.0[SPANNING]
    }

    /// The word to announce a walk in.
    #[inline]
    pub(crate) fn of_walks(&self) -> &IntentWord {
        &self.0[WALKS]
    }

    /// What is announced of the frames in `frames` that `covers` says yes to.
    ///
    /// One answer is enough: what was announced before it is done, and seen to be done; what is announced later is announced behind
    /// the caller's barrier.
    pub(crate) fn named(&self, frames: GfnRange, covers: impl Fn(GfnRange) -> bool) -> Option<Announced> {
        let mut touched = REGIONS.words_of(frames);
        if mutation::active(Mutation::DrainForgetsLastRegion) {
            touched = touched.but(REGIONS.last_of(frames));
        }
        core::iter::once(SPANNING)
            .chain(touched)
            .skip(usize::from(mutation::active(Mutation::DrainForgetsSpanning)))
            .find_map(|word| Some(Announced { word, said: self.0[word].named(&covers)? }))
    }

    /// Whatever is announced. One answer is enough, as above.
    pub(crate) fn announced(&self) -> Option<Announced> {
        (0..self.0.len()).find_map(|word| Some(Announced { word, said: self.0[word].announced()? }))
    }

    /// Waits until it is announced no more.
    pub(crate) fn wait_out<P: Platform>(&self, announced: Announced) {
        self.0[announced.word].wait_out::<P>(announced.said);
    }
}

/// Whether an announcement had to be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    No,
    Yes,
}

/// The announcement that a block of frames is about to be installed: a [`Witness`], without a lock.
///
/// Dropping it says that the install is done.
#[must_use = "an announcement that is dropped at once announces nothing"]
pub struct Intent<'v, P: Platform> {
    announced: Announcement<'v, P>,
    block: Block,
    invalidations: &'v Invalidations,
}

/// What is taken back when it is dropped. By itself, so that only this stays in memory on the way of a panic.
struct Announcement<'v, P: Platform> {
    word: &'v IntentWord,
    platform: PhantomData<fn() -> P>,
}

impl<P: Platform> fmt::Debug for Intent<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Intent").field("word", &self.announced.word.word).finish()
    }
}

impl<'v, P: Platform> Intent<'v, P> {
    #[inline]
    pub(crate) fn announce(word: &'v IntentWord, invalidations: &'v Invalidations, block: Block) -> Self {
        word.announce(block.bits());
        Self { announced: Announcement { word, platform: PhantomData }, block, invalidations }
    }
}

impl<P: Platform> Drop for Announcement<'_, P> {
    // Always: a call on the way of a panic would keep the intent in memory on every other way, too.
    #[inline(always)]
    fn drop(&mut self) {
        self.word.clear::<P>();
    }
}

impl<P: Platform> sealed::Sealed for Intent<'_, P> {}

impl<P: Platform> Witness for Intent<'_, P> {
    #[inline]
    fn invalidations(&self) -> &Invalidations {
        self.invalidations
    }

    #[inline]
    fn protects(&self, block: Block) -> bool {
        self.block == block
    }
}

impl<S: SecondaryMmu> GuestMmu<S> {
    /// A vCPU announces that it will install `block`.
    #[inline]
    pub(crate) fn announce<'a>(&'a self, vcpu: &'a VcpuShared, block: Block) -> Intent<'a, S::Platform> {
        Intent::announce(vcpu.intents.of(block), self.invalidations(), block)
    }

    /// The right of a vCPU to walk tables.
    pub(crate) fn walker<'a>(&'a self, vcpu: &'a VcpuShared) -> Walker<'a, S::Platform> {
        Walker::new(vcpu.intents.of_walks(), self.invalidations().machine())
    }
}

/// Who may walk tables without a lock and without an intent: a vCPU on the fast path, or a visitor.
#[derive(Debug)]
pub struct Walker<'v, P: Platform> {
    word: &'v IntentWord,
    machine: MachineId,
    platform: PhantomData<fn() -> P>,
}

impl<'v, P: Platform> Walker<'v, P> {
    pub(crate) fn new(word: &'v IntentWord, machine: MachineId) -> Self {
        Self { word, machine, platform: PhantomData }
    }

    /// Starts a walk: until the section is dropped no table is freed that could be reached in it.
    #[inline]
    pub fn walk(&mut self) -> WalkSection<'_, P> {
        self.word.enter();
        WalkSection { walker: self }
    }
}

/// A walk without a lock. See [`Walker::walk`].
#[must_use = "the walk ends at once"]
#[derive(Debug)]
pub struct WalkSection<'w, P: Platform> {
    walker: &'w Walker<'w, P>,
}

impl<P: Platform> WalkSection<'_, P> {
    /// The right to follow links.
    #[inline]
    pub fn walking(&self) -> Walking<'_> {
        Walking::new(self.walker.machine)
    }
}

impl<P: Platform> Drop for WalkSection<'_, P> {
    #[inline]
    fn drop(&mut self) {
        self.walker.word.clear::<P>();
    }
}

/// The right to follow links between the tables of one virtual machine: while `'w` lives, no table is freed that was
/// linked at some time since it began.
///
/// From a [`Witness`], a [`Fresh`](crate::Fresh) verdict or a [`WalkSection`].
#[derive(Clone, Copy, Debug)]
pub struct Walking<'w> {
    machine: MachineId,
    section: PhantomData<&'w ()>,
}

impl Walking<'_> {
    #[inline]
    pub(crate) fn new(machine: MachineId) -> Self {
        Self { machine, section: PhantomData }
    }

    /// Whose tables.
    #[inline]
    pub fn machine(&self) -> MachineId {
        self.machine
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::addr::{Gfn, PageSize};

    #[test]
    fn an_announcement_names_its_block() {
        for block in [Block::frame(Gfn::new(7)), Block::of(Gfn::new(1 << 44), PageSize::Size1G), Block::ALL] {
            let word = IntentWord::new(Barriers::of::<crate::Spin>(Barrier::Symmetric));
            for _ in 0..2 {
                word.announce(block.bits());
                let mut said = None;
                assert!(word.named(|frames| said.replace(frames).is_none()).is_some());
                assert_eq!(said, Some(block.range()));
                word.clear::<crate::Spin>();
            }
        }
    }

    #[test]
    fn a_walk_names_no_frame_and_a_quiet_word_nothing() {
        assert!(!names(NOTHING << BLOCK_SHIFT | ACTIVE, |_| true));
        let word = IntentWord::new(Barriers::of::<crate::Spin>(Barrier::Symmetric));
        assert_eq!(word.named(|_| true), None);
        word.announce(Block::frame(Gfn::new(1)).bits());
        assert!(word.named(|_| true).is_some());
        word.clear::<crate::Spin>();
        assert_eq!(word.announced(), None);
    }
}
