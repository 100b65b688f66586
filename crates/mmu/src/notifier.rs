//! Notifier entry points: how the primary MMU announces that it takes memory away.
//!
//! [`GuestMmu::invalidate`] returns when nothing maps the range any more, and nothing will until the guard is dropped. So
//! the primary MMU changes the pages while it holds the guard, and a start without an end cannot be written down.
//!
//! # Order inside a start
//!
//! 1. Count the event: memslots stay as they are from here to the end.
//! 2. For every slot over the range, in every address space: on the first, take `mmu_lock` and `begin`; for each,
//!    `add_range`, then zap. The zap may give up the lock between two entries. A fault on a later slot may then install:
//!    it is zapped when its turn comes.
//! 3. Flush, then give up the lock.
//!
//! A range that touches no slot takes no lock at all.
//!
//! Source: Linux `kvm_mmu_notifier_invalidate_range_start`, `kvm_mmu_notifier_invalidate_range_end`.

use core::fmt;

use crate::addr::{Gfn, GfnRange, HvaRange};
use crate::guest_mmu::GuestMmu;
use crate::host::{Age, Blocking, Notifier, SecondaryMmu, Young, Zap};
use crate::mutation::{self, Mutation};
use crate::platform::Platform;
use crate::sync::Ordering;
use crate::zap::ZapWalk;

/// An active invalidation. The primary MMU may change the pages; dropping it ends the invalidation.
#[must_use = "the invalidation ends at once"]
pub struct Invalidation<'m, S: SecondaryMmu> {
    mmu: &'m GuestMmu<S>,
    /// The hull of the frames that it took; empty if the range touched no slot.
    touched: GfnRange,
    started_ns: u64,
}

impl<S: SecondaryMmu> fmt::Debug for Invalidation<'_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invalidation").field("touched", &self.touched).finish_non_exhaustive()
    }
}

impl<S: SecondaryMmu> GuestMmu<S> {
    /// Starts an invalidation of `hvas` (widened to whole frames). See the module documentation.
    ///
    /// Overlapping and nested invalidations are legal, from any threads.
    pub fn invalidate(&self, hvas: HvaRange, zap: Zap, blocking: Blocking) -> Invalidation<'_, S> {
        let started_ns = S::Platform::now_ns();
        self.counters.events.fetch_add(1, Ordering::Relaxed);
        self.active.start();
        let mut walk: Option<ZapWalk<'_, S>> = None;
        let mut touched = GfnRange::new(Gfn::new(0), Gfn::new(0));
        for (slot, mut gfns) in self.slot_set().touching(hvas) {
            if walk.is_some() && mutation::active(Mutation::FirstSlotOnly) {
                break;
            }
            let walk = walk.get_or_insert_with(|| {
                let mut walk = ZapWalk::start(self, blocking);
                walk.guard.begin();
                walk
            });
            touched = touched.hull(gfns);
            walk.guard.add_range(gfns).expect("begin was called above, and the slots give no empty ranges");
            if mutation::active(Mutation::ZapForgetsLastFrame) {
                gfns.end = gfns.start + (gfns.len() - 1);
            }
            self.secondary().zap(slot, gfns, zap, walk);
        }
        if let Some(walk) = walk {
            walk.finish();
        }
        Invalidation { mmu: self, touched, started_ns }
    }

    /// Looks at, or takes away, the marks of past accesses of `hvas`. Advisory.
    pub fn age(&self, hvas: HvaRange, age: Age) -> Young {
        self.active.start();
        let mut young = Young::No;
        for (slot, gfns) in self.slot_set().touching(hvas) {
            match self.secondary().age(slot, gfns, age) {
                Young::Yes => young = Young::Yes,
                Young::Unknown if young == Young::No => young = Young::Unknown,
                Young::Unknown | Young::No => {}
            }
        }
        self.end_event();
        young
    }

    fn end_event(&self) {
        self.active.end();
    }
}

impl<S: SecondaryMmu> Drop for Invalidation<'_, S> {
    fn drop(&mut self) {
        if !self.touched.is_empty() {
            let mut guard = self.mmu.write_timed();
            guard.end_of(self.touched).expect("this guard began the invalidation and added a range");
            drop(guard);
            self.mmu.announce_end();
            let ns = S::Platform::now_ns().saturating_sub(self.started_ns);
            self.mmu.counters.finished(ns);
        }
        // Only now: whoever sees no active event sees the sequence bumped.
        self.mmu.end_event();
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
