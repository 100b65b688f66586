//! A zap in progress: flushes before it yields, yields when the policy says so, and never without progress.
//!
//! # Rules
//!
//! * F1: no return from the start of an invalidation with a flush pending.
//! * F2: `mmu_lock` is not given up, by yielding either, with a flush pending for what was zapped. The next holder
//!   takes an absent entry for "nothing cached"; a second invalidation would then skip its flush, and the page would be
//!   freed under a live TLB entry.
//! * Between two yields at least one entry is dealt with.
//! * After a yield nothing that was looked up before may be used: the walk says [`Walk::Restart`].
//!
//! Source: Linux `tdp_mmu_iter_cond_resched`, `kvm_tdp_mmu_unmap_gfn_range`.

use core::fmt;

use crate::addr::GfnRange;
use crate::guest_mmu::{GuestMmu, YieldPolicy};
use crate::host::{Blocking, SecondaryMmu};
use crate::mmu_lock::MmuWriteGuard;
use crate::mutation::{self, Mutation};
use crate::platform::Platform;
use crate::sync::Ordering;

/// What one step of a zap did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zapped {
    /// Nothing was there.
    Nothing,
    /// Translations of this many frames went, and CPUs may still hold them.
    Unflushed(u64),
    /// Translations of this many frames went, and no CPU holds them: the step flushed by itself.
    Flushed(u64),
}

/// How the walk goes on.
#[must_use = "after a yield the old position is void"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    /// From where it is.
    GoOn,
    /// From the root, at the frame behind the last step: the lock was given up.
    Restart,
}

/// `mmu_lock`, held for write, and what a zap still owes.
pub struct ZapWalk<'m, S: SecondaryMmu> {
    mmu: &'m GuestMmu<S>,
    pub(crate) guard: MmuWriteGuard<'m, S::Platform>,
    yielding: YieldPolicy,
    unflushed: Option<GfnRange>,
}

impl<S: SecondaryMmu> fmt::Debug for ZapWalk<'_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZapWalk")
            .field("yielding", &self.yielding)
            .field("unflushed", &self.unflushed)
            .finish_non_exhaustive()
    }
}

impl<'m, S: SecondaryMmu> ZapWalk<'m, S> {
    /// Takes `mmu_lock` for write.
    pub(crate) fn start(mmu: &'m GuestMmu<S>, blocking: Blocking) -> Self {
        let yielding = match blocking {
            Blocking::Allowed => mmu.policy().yielding,
            Blocking::Forbidden if mutation::active(Mutation::NonBlockableYields) => mmu.policy().yielding,
            Blocking::Forbidden => YieldPolicy::Never,
        };
        Self { mmu, guard: mmu.write_timed(), yielding, unflushed: None }
    }

    /// One entry, or one batch that the host handles as one, is dealt with: the frames `done`.
    pub fn step(&mut self, done: GfnRange, zapped: Zapped) -> Walk {
        let counters = &self.mmu.counters;
        match zapped {
            Zapped::Nothing => {}
            Zapped::Unflushed(frames) => {
                counters.zapped_frames.fetch_add(frames, Ordering::Relaxed);
                self.unflushed = Some(self.unflushed.map_or(done, |owed| owed.hull(done)));
            }
            Zapped::Flushed(frames) => {
                counters.zapped_frames.fetch_add(frames, Ordering::Relaxed);
                counters.flushes.fetch_add(1, Ordering::Relaxed);
            }
        }
        if done.is_empty() || !self.is_break_wanted() {
            return Walk::GoOn;
        }
        self.give_way();
        Walk::Restart
    }

    fn is_break_wanted(&self) -> bool {
        match self.yielding {
            YieldPolicy::OnContention => self.guard.is_contended() || S::Platform::resched_wanted(),
            YieldPolicy::OnResched => S::Platform::resched_wanted(),
            YieldPolicy::Never => false,
        }
    }

    fn give_way(&mut self) {
        if !mutation::active(Mutation::YieldWithoutFlush) {
            self.flush();
        }
        let started = S::Platform::now_ns();
        self.guard.bump_with(S::Platform::reschedule);
        let counters = &self.mmu.counters;
        counters.yields.fetch_add(1, Ordering::Relaxed);
        counters.lock_wait_ns.fetch_add(S::Platform::now_ns().saturating_sub(started), Ordering::Relaxed);
    }

    /// Pays what is owed. The lock is still held.
    pub(crate) fn flush(&mut self) {
        if let Some(owed) = self.unflushed.take() {
            self.mmu.counters.flushes.fetch_add(1, Ordering::Relaxed);
            self.mmu.secondary().flush(owed, &self.mmu.vcpus);
        }
    }

    /// Flushes (rule F1) and gives up the lock.
    pub(crate) fn finish(mut self) {
        if !mutation::active(Mutation::BeginWithoutFlush) {
            self.flush();
        }
    }
}
