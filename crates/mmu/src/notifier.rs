//! Notifier entry points: how the primary MMU announces that it takes memory away.
//!
//! [`GuestMmu::invalidate`] returns when nothing maps the range any more, and nothing will until the guard is dropped. So
//! the primary MMU changes the pages while it holds the guard, and a start without an end cannot be written down.
//!
//! # Order inside a start
//!
//! 1. Count the event: the memslots that it finds stay to its end, and none are published that it does not find. It finds those
//!    that are, and those that an update has announced.
//! 2. Where faults that were retried too often have a turn: let those on these frames go first (module `turns`).
//! 3. If a slot lies over the range, in any address space: take `mmu_lock`, publish the ranges of all such slots, and then the
//!    count: KVM's `begin` and `add_range` in one.
//! 4. Where faults announce intents instead of taking the lock: give up the lock, wait until nobody holds an intent for
//!    frames of these ranges, take the lock again. Nobody else waits meanwhile.
//! 5. Zap the ranges. The zap may give up the lock between two entries.
//! 6. Flush, then give up the lock.
//!
//! A range that touches no slot takes no lock at all.
//!
//! Source: Linux `kvm_mmu_notifier_invalidate_range_start`, `kvm_mmu_notifier_invalidate_range_end`.

use core::fmt;

use crate::active::Event;
use crate::addr::{GfnRange, HvaRange};
use crate::guest_mmu::{GuestMmu, WitnessKind};
use crate::host::{Age, Blocking, Notifier, SecondaryMmu, Young, Zap};
use crate::intent::{Waited, Walker, Walking};
use crate::invalidation::Begun;
use crate::mmu_lock::Witness;
use crate::mutation::{self, Mutation};
use crate::platform::Platform;
use crate::slots::{Memslot, SlotFlags, SlotSet};
use crate::sync::Ordering;
use crate::zap::ZapWalk;

/// An active invalidation. The primary MMU may change the pages; dropping it ends the invalidation.
#[must_use = "the invalidation ends at once"]
pub struct Invalidation<'m, S: SecondaryMmu> {
    mmu: &'m GuestMmu<S>,
    /// `None` if the range touched no slot.
    begun: Option<Begun>,
    started_ns: u64,
    /// Ends last: whoever sees no active event sees the sequence bumped.
    _event: Event<'m, S::Platform>,
}

impl<S: SecondaryMmu> fmt::Debug for Invalidation<'_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invalidation").field("begun", &self.begun).finish_non_exhaustive()
    }
}

impl<S: SecondaryMmu> GuestMmu<S> {
    /// Starts an invalidation of `hvas` (widened to whole frames). When it returns nothing maps them, every vCPU has left the
    /// guest or flushed, and until the guard is dropped no fault installs them: the primary MMU changes its pages meanwhile.
    ///
    /// Overlapping and nested invalidations are legal, from any threads. One of frames without a memslot takes no lock.
    /// With [`Blocking::Allowed`] it may wait for faults that install these frames, for the turns of starved ones, and give
    /// `mmu_lock` up between two entries.
    ///
    /// Source: Linux `kvm_mmu_notifier_invalidate_range_start`; the drop is `kvm_mmu_notifier_invalidate_range_end`.
    pub fn invalidate(&self, hvas: HvaRange, zap: Zap, blocking: Blocking) -> Invalidation<'_, S> {
        let started_ns = S::Platform::now_ns();
        self.counters.events.fetch_add(1, Ordering::Relaxed);
        // Whole from here on: it ends what it began also if a host's function panics.
        let mut invalidation =
            Invalidation { mmu: self, begun: None, started_ns, _event: self.active.start() };
        let slots = if mutation::active(Mutation::FirstSlotOnly) { 1 } else { usize::MAX };
        let sets = self.event_sets();
        let ranges = || sets.into_iter().flatten().flat_map(|set| set.touching(hvas)).take(slots);
        let takes = |block| ranges().any(|(_, gfns)| gfns.overlaps(block));
        if let Some(hull) = ranges().map(|(_, gfns)| gfns).reduce(GfnRange::hull) {
            if self.policy().turns.is_some() && blocking == Blocking::Allowed {
                self.give_turns(takes);
            }
            let mut guard = self.write_timed();
            let begun = guard.begin(ranges().map(|(_, gfns)| gfns)).expect("events are fewer than that");
            invalidation.begun = Some(begun);
            if self.policy().witness == WitnessKind::Intent {
                drop(guard);
                self.drain(hull, takes);
                guard = self.write_timed();
            }
            let mut walk = ZapWalk::with(self, guard, blocking);
            for (slot, mut gfns) in ranges() {
                if mutation::active(Mutation::ZapForgetsLastFrame) {
                    gfns.end = gfns.start + (gfns.len() - 1);
                }
                self.secondary().zap(slot, gfns, kept_in_log(slot, zap), &mut walk);
            }
            walk.finish();
        }
        invalidation
    }

    /// Lets those go first who starve on frames that `taken` names, unless an active invalidation holds them back anyway.
    fn give_turns(&self, taken: impl Fn(GfnRange) -> bool) {
        if mutation::active(Mutation::NoTurns) {
            return;
        }
        let turns = self.vcpus.give_turns(|block| taken(block) && !self.invalidations().covers(block));
        self.counters.turns.fetch_add(turns, Ordering::Relaxed);
    }

    /// Waits for the intents that `covers` names, all of them in `frames`, and counts the wait, if there was one.
    fn drain(&self, frames: GfnRange, covers: impl Fn(GfnRange) -> bool) {
        let started = S::Platform::now_ns();
        if self.vcpus.drain(frames, covers) == Waited::Yes {
            let waited = S::Platform::now_ns().saturating_sub(started);
            self.counters.drains.fetch_add(1, Ordering::Relaxed);
            self.counters.drain_wait_ns.fetch_add(waited, Ordering::Relaxed);
        }
    }

    /// Looks at, or takes away, the marks of past accesses of `hvas`. Advisory.
    pub fn age(&self, hvas: HvaRange, age: Age) -> Young {
        let _event = self.active.start();
        match self.vcpus.visit() {
            Some(visit) => {
                let machine = self.invalidations().machine();
                let mut walker = Walker::<S::Platform>::new(visit.word(), machine);
                let section = walker.walk();
                self.age_with(hvas, age, section.walking())
            }
            // As many age at the same time as there are words for: the lock does as well.
            None => self.age_with(hvas, age, self.lock.read().walking()),
        }
    }

    fn age_with(&self, hvas: HvaRange, age: Age, walking: Walking<'_>) -> Young {
        let mut young = Young::No;
        for (slot, gfns) in self.event_sets().into_iter().flatten().flat_map(|set| set.touching(hvas)) {
            match self.secondary().age(slot, gfns, age, walking) {
                Young::Yes => young = Young::Yes,
                Young::Unknown if young == Young::No => young = Young::Unknown,
                Young::Unknown | Young::No => {}
            }
        }
        young
    }

    /// The memslots that an event must look at: those to come, read first, and those that are.
    fn event_sets(&self) -> [Option<&SlotSet>; 2] {
        [self.coming_set(), Some(self.slot_set())]
    }
}

/// What is protected for the log is taken for logged. Where writes are noticed by marks, the marks must be looked at, as they are
/// when the page is asked for again.
fn kept_in_log(slot: &Memslot, zap: Zap) -> Zap {
    match zap {
        Zap::TrackDirty
            if slot.flags.contains(SlotFlags::LOG_BY_MARKS)
                && !mutation::active(Mutation::TrackingForgetsMarks) =>
        {
            Zap::WriteProtect
        }
        other => other,
    }
}

impl<S: SecondaryMmu> Drop for Invalidation<'_, S> {
    fn drop(&mut self) {
        if let Some(begun) = self.begun.take() {
            self.mmu.write_timed().end(begun);
            self.mmu.announce_end();
            let ns = S::Platform::now_ns().saturating_sub(self.started_ns);
            self.mmu.counters.finished(ns);
        }
    }
}

impl<S: SecondaryMmu> Notifier for GuestMmu<S> {
    fn invalidating(&self, hvas: HvaRange, zap: Zap, blocking: Blocking, change: &mut dyn FnMut()) {
        let _invalidation = self.invalidate(hvas, zap, blocking);
        change();
    }

    fn age(&self, hvas: HvaRange, age: Age) -> Young {
        GuestMmu::age(self, hvas, age)
    }
}
