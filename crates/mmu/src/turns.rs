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
//! covers the claimed frames, no turn is of use, and nobody waits. The claim is given back when the access was made: a
//! vCPU that enters the guest gives it back when it leaves it for the first time after the fault was served, one that never
//! does (who serves others' faults) at once.
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
//! starts invalidations, two of them may claim what the other takes away, and invalidations nest. So a turn is bounded: after
//! a millisecond the invalidation takes the claim away and begins. A claim is also withdrawn before a page is read from afar, and an
//! invalidation that may not block never looks. Nothing rests on it: turns are fairness, never safety.

use crate::addr::Gfn;
use crate::intent::IntentWord;
use crate::platform::Platform;
use crate::slots::SpaceId;

/// When a fault goes before the next invalidation of its frames, and how long its vCPU may keep that off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turns {
    /// Retries of a frame after which a turn is claimed for its fault.
    pub after: u32,
    /// Time for which a vCPU keeps its turn at most, in nanoseconds; 0: for the one access. More than a millisecond is
    /// never waited for.
    pub at_most_ns: u64,
}

/// How long a claim is waited for before it is taken away: some times what it takes to wake a thread. Where vCPUs have to wait for a
/// CPU longer than that, the invalidation would only take it from them.
const PATIENCE_NS: u64 = 1_000_000;
/// Looks at a claim before it is taken away, where there is no clock.
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

/// Lets the vCPU that claims `seen` go first, for a while. Whether it did.
pub(crate) fn let_go_first<P: Platform>(claim: &IntentWord, seen: u64) -> bool {
    let started_ns = P::now_ns();
    let mut looks: u32 = 0;
    loop {
        if claim.announced() != Some(seen) {
            return true;
        }
        looks = looks.wrapping_add(1);
        if !looks.is_multiple_of(RESCHEDULE_EVERY) {
            P::relax();
            continue;
        }
        let is_over = match P::now_ns() {
            0 => looks >= PATIENCE,
            now_ns => now_ns - started_ns >= PATIENCE_NS,
        };
        if is_over {
            claim.take_away(seen);
            return false;
        }
        P::reschedule();
    }
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
