//! A turn for the starved: a fault that was retried too often goes before the next invalidation of its frames.
//!
//! # Why
//!
//! A vCPU inside a stream of invalidations may find its frame covered each time that it comes back: each end is followed by
//! the next begin before the vCPU is there. KVM has no remedy (its specification: forward progress, point 4).
//!
//! # How
//!
//! A vCPU counts the retries of the frames that it faulted on last. When one has been retried
//! [`Turns::after`] times, the vCPU claims the next turn in a word of its own, before it goes to wait for the end. An invalidation that may
//! block looks for claims on its frames before it begins, and lets each go first, if it can: if an active invalidation
//! covers the claimed frames, no turn is of use, and nobody waits. It parks, since the vCPU may need this very CPU, and is woken when
//! the claim is given back:
//!
//! * when the access was made: a vCPU that enters the guest gives its claim back when it leaves it for the first time after the fault was
//!   served, one that never does (who serves others' faults) at once;
//! * when a stay in the guest after the claim ended in no fault, or in one on another frame: somebody else has installed what it
//!   waited for;
//! * before a page is read from afar, and when the vCPU has to wait for anything else.
//!
//! # How long
//!
//! One access for each invalidation is hardly more than standing still: its next one faults again, and waits out the next
//! invalidation. With [`Turns::at_most_ns`] a vCPU that enters the guest keeps its turn for as long as its fault was held up, and no longer than
//! that: the stream and the vCPU share the time. It is over early when a fault of the vCPU has to wait for anything.
//!
//! # What it must not do
//!
//! Hang. Who claims may need something that the invalidator holds: a primary MMU that makes room while it faults a page in
//! starts invalidations, two of them may claim what the other takes away, and invalidations nest. So the patience of an invalidation
//! is bounded, for all claims together: after ten milliseconds it takes the claim away that it waits for, and begins. An
//! invalidation that may not block never looks. Nothing rests on it: turns are fairness, never safety.

use crate::addr::{Gfn, GfnRange};
use crate::block::Block;
use crate::intent::{ACTIVE, BLOCK_SHIFT, GENERATION, ONE_GENERATION, names};
use crate::mutation::{self, Mutation};
use crate::platform::Platform;
use crate::slots::SpaceId;
use crate::sync::{AtomicU64, Ordering, ParkWord, fence};

/// When a fault goes before the next invalidation of its frames, and how long its vCPU may keep that off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turns {
    /// Retries of a frame after which a turn is claimed for its fault.
    pub after: u32,
    /// Time for which a vCPU keeps its turn at most, in nanoseconds; 0: for the one access. More than ten milliseconds are
    /// never waited for.
    pub at_most_ns: u64,
}

/// How long an invalidation waits for claims: a few slices of a scheduler, so that a vCPU which waits for nothing but a CPU has had one.
const PATIENCE_NS: u64 = 10_000_000;
/// Looks at claims, where there is no clock.
#[cfg(not(loom))]
const PATIENCE: u32 = 1 << 14;
/// One look is enough to show that nothing rests on it.
#[cfg(loom)]
const PATIENCE: u32 = 1;
/// Looks after which the CPU is given away, in case the vCPU needs this one.
#[cfg(not(loom))]
const RESCHEDULE_EVERY: u32 = 64;
#[cfg(loom)]
const RESCHEDULE_EVERY: u32 = 1;

/// Frames whose retries a vCPU counts at a time.
const REMEMBERED: usize = 4;

/// How often the frames that a vCPU faulted on last had to be retried.
#[derive(Debug, Default)]
pub(crate) struct Retries {
    frames: [Option<Retried>; REMEMBERED],
    oldest: usize,
}

#[derive(Clone, Copy, Debug)]
struct Retried {
    space: SpaceId,
    gfn: Gfn,
    times: u32,
    /// The first time.
    since_ns: u64,
}

impl Retries {
    fn find(&mut self, space: SpaceId, gfn: Gfn) -> Option<&mut Option<Retried>> {
        let same = |frame: &Option<Retried>| frame.is_some_and(|it| it.space == space && it.gfn == gfn);
        self.frames.iter_mut().find(|frame| same(frame))
    }

    /// How often this frame was retried in a row.
    pub(crate) fn of(&mut self, space: SpaceId, gfn: Gfn) -> u32 {
        self.find(space, gfn).and_then(|frame| *frame).map_or(0, |frame| frame.times)
    }

    /// It was retried once more, now; how often by now.
    pub(crate) fn retried(&mut self, space: SpaceId, gfn: Gfn, now_ns: u64) -> u32 {
        let before = self.find(space, gfn).and_then(|frame| *frame);
        let times = before.map_or(0, |frame| frame.times).saturating_add(1);
        let since_ns = before.map_or(now_ns, |frame| frame.since_ns);
        let place = match self.find(space, gfn) {
            Some(place) => place,
            None => {
                let place = self.oldest;
                self.oldest = (place + 1) % REMEMBERED;
                &mut self.frames[place]
            }
        };
        *place = Some(Retried { space, gfn, times, since_ns });
        times
    }

    /// It was served, or given up. If it had been retried: since when.
    pub(crate) fn done(&mut self, space: SpaceId, gfn: Gfn) -> Option<u64> {
        self.find(space, gfn)?.take().map(|frame| frame.since_ns)
    }
}

/// The word in which a vCPU claims the next turn.
#[derive(Debug)]
pub(crate) struct Claim {
    /// As an intent's: whether, which frames, and a generation.
    word: AtomicU64,
    /// Odd: an invalidation waits, or did.
    waiters: ParkWord,
}

impl Claim {
    pub(crate) fn new() -> Self {
        Self { word: AtomicU64::new(0), waiters: ParkWord::new(0) }
    }

    /// Claims a turn for `block`, unless one is claimed already. No barrier: nothing rests on it.
    pub(crate) fn claim(&self, block: Block) {
        let word = self.word.load(Ordering::Relaxed);
        if word & ACTIVE == 0 {
            // Only its owner makes a quiet word active.
            let generation = (word & GENERATION).wrapping_add(ONE_GENERATION);
            self.word.store(generation | block.bits() << BLOCK_SHIFT | ACTIVE, Ordering::Relaxed);
        }
    }

    /// Gives a claim back, and wakes who lets it go first.
    pub(crate) fn give_back<P: Platform>(&self) {
        let Some(seen) = self.claimed() else { return };
        self.take_away(seen);
        if P::PARKS {
            if !mutation::active(Mutation::GiveBackWithoutFence) {
                fence(Ordering::SeqCst);
            }
            let is_awaited = self.waiters.load(Ordering::Relaxed) & 1 != 0;
            if is_awaited && !mutation::active(Mutation::GiveBackWithoutWake) {
                // Even again: whoever marks it next parks on a new value.
                self.waiters.fetch_add(1, Ordering::Relaxed);
                P::wake_all(&self.waiters);
            }
        }
    }

    /// Takes a claim away, if it is still the same.
    fn take_away(&self, seen: u64) {
        let _ = self.word.compare_exchange(seen, seen & GENERATION, Ordering::Release, Ordering::Relaxed);
    }

    /// What is claimed now, if anything.
    pub(crate) fn claimed(&self) -> Option<u64> {
        let seen = self.word.load(Ordering::Acquire);
        (seen & ACTIVE != 0).then_some(seen)
    }

    /// What is claimed now, if it names a frame that `covers` says yes to.
    pub(crate) fn named(&self, covers: impl FnOnce(GfnRange) -> bool) -> Option<u64> {
        self.claimed().filter(|seen| names(*seen, covers))
    }

    /// Lets the vCPU go first that claims `seen`, as long as there is `patience`. Whether it did.
    pub(crate) fn let_go_first<P: Platform>(&self, seen: u64, patience: &mut Patience) -> bool {
        let mut looks = 0;
        while self.claimed() == Some(seen) {
            match patience.left::<P>() {
                // Of those that were not waited for, the next invalidation will be more patient.
                Left::Nothing if looks == 0 => return false,
                Left::Nothing => {
                    self.take_away(seen);
                    return false;
                }
                Left::Ns(ns) if looks >= P::SPINS => self.park::<P>(seen, ns),
                Left::Looks if looks.is_multiple_of(RESCHEDULE_EVERY) => P::reschedule(),
                Left::Ns(_) | Left::Looks => P::relax(),
            }
            looks = looks.saturating_add(1);
        }
        true
    }

    /// Sleeps until the claim is given back, or for `ns`. The vCPU may need this CPU.
    fn park<P: Platform>(&self, seen: u64, ns: u64) {
        let marked = self.waiters.fetch_or(1, Ordering::Relaxed) | 1;
        fence(Ordering::SeqCst);
        if self.claimed() == Some(seen) {
            P::wait_for(&self.waiters, marked, ns);
        }
    }
}

/// What an invalidation has of patience, for all claims together: who claim at the same time are waited for at the same time.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    /// When it is over; 0 before the first claim, and where there is no clock.
    until_ns: u64,
    looks: u32,
}

/// What is left of it.
enum Left {
    Ns(u64),
    /// Some looks: there is no clock.
    Looks,
    Nothing,
}

impl Patience {
    /// What is left. Called once for each look at a claim.
    fn left<P: Platform>(&mut self) -> Left {
        self.looks = self.looks.saturating_add(1);
        match (P::now_ns(), self.until_ns) {
            (0, _) if self.looks <= PATIENCE => Left::Looks,
            (0, _) => Left::Nothing,
            (now_ns, 0) => {
                self.until_ns = now_ns + PATIENCE_NS;
                Left::Ns(PATIENCE_NS)
            }
            (now_ns, until_ns) if now_ns < until_ns => Left::Ns(until_ns - now_ns),
            _ => Left::Nothing,
        }
    }
}

/// How far the turn of a vCPU has got that enters the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It has none.
    #[default]
    None,
    /// It claims one for a fault on this frame.
    Claimed(SpaceId, Gfn),
    /// The same, and it has been in the guest since. If it was not for another fault that it left, its access was made: through what
    /// another vCPU has installed.
    Tried(SpaceId, Gfn),
    /// The fault was served: the access is made in its next stay in the guest. Kept until this time, if it is not 0.
    Served(u64),
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn retries_are_counted_for_the_last_few_frames() {
        let mut retries = Retries::default();
        let space = SpaceId(0);
        for now_ns in 7..10 {
            for gfn in 0..4 {
                retries.retried(space, Gfn::new(gfn), now_ns);
            }
        }
        assert_eq!([0, 1, 2, 3].map(|gfn| retries.of(space, Gfn::new(gfn))), [3; 4]);
        assert_eq!(retries.of(SpaceId(1), Gfn::new(0)), 0, "another frame");
        assert_eq!(retries.done(space, Gfn::new(2)), Some(7), "since the first of them");
        assert_eq!(retries.done(space, Gfn::new(2)), None);
        assert_eq!(retries.of(space, Gfn::new(2)), 0);
        retries.retried(space, Gfn::new(9), 10);
        assert_eq!(retries.of(space, Gfn::new(9)), 1, "in the place of the oldest");
    }
}
