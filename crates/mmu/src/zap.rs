//! A zap in progress: flushes before it yields, yields when the policy says so, and never without progress.
//!
//! # Rules
//!
//! * F1: no return from the start of an invalidation with a flush pending.
//! * F2: `mmu_lock` is not given up, by yielding either, with a flush pending for what was zapped. The next holder
//!   takes an absent entry for "nothing cached"; a second invalidation would then skip its flush, and the page would be
//!   freed under a live TLB entry.
//! * F3: a table page that was unlinked is freed only after a flush (the CPUs' paging-structure caches are no walkers that
//!   announce themselves), and after everyone has moved on who walked when it was linked. That wait is without the lock.
//! * Between two yields at least one entry is dealt with.
//! * After a yield nothing that was looked up before may be used: the walk says [`Walk::Restart`].
//!
//! Source: Linux `tdp_mmu_iter_cond_resched`, `kvm_tdp_mmu_unmap_gfn_range`.

use core::marker::PhantomData;
use core::{fmt, mem};

use crate::addr::{GfnRange, Pfn};
use crate::dirty_bitmap::SlotLog;
use crate::flush::Flush;
use crate::guest_mmu::{GuestMmu, YieldPolicy};
use crate::host::{Blocking, SecondaryMmu};
use crate::intent::Walking;
use crate::mmu_lock::{MmuWriteGuard, Witness};
use crate::mutation::{self, Mutation};
use crate::platform::Platform;
use crate::slots::{Memslot, SlotFlags};
use crate::sync::Ordering;
use crate::vcpu_words::Requests;

/// What one step of a zap did, in frames of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zapped {
    /// Nothing was there.
    Nothing,
    /// Translations of this many frames went, and CPUs may still hold them.
    Unflushed(u64),
    /// Translations of this many frames went, and no CPU holds them: the step flushed by itself.
    Flushed(u64),
    /// Translations of this many frames went, and no CPU holds them: they lay below a root that was replaced.
    Unused(u64),
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

/// Who a walk gives way to.
#[derive(Clone, Copy, Debug)]
enum Reason {
    /// Somebody waits for the lock.
    Waiters,
    /// The scheduler wants the CPU.
    Scheduler,
    /// Nobody: the walk has something to do without the lock.
    Own,
}

/// Tables that one walk keeps until they can be freed: nothing allocates under the lock.
const RETIRED: usize = 64;

/// A table that was unlinked, or a root that was replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetiredTable {
    /// Its first frame.
    pub first: Pfn,
    /// Its length: one page, or those of a wide root.
    pub pages: usize,
}

/// Tables that a zap of `S` has unlinked and that nobody can reach any more.
pub struct Retired<S> {
    tables: [RetiredTable; RETIRED],
    count: usize,
    /// Of these tables and no others: only their own zap could retire a page.
    of: PhantomData<fn() -> S>,
}

impl<S> fmt::Debug for Retired<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Retired").field(&self.tables()).finish()
    }
}

impl<S> Retired<S> {
    fn none() -> Self {
        let none = RetiredTable { first: Pfn::new(0), pages: 0 };
        Self { tables: [none; RETIRED], count: 0, of: PhantomData }
    }

    /// Where they lie.
    pub fn tables(&self) -> &[RetiredTable] {
        &self.tables[..self.count]
    }
}

/// `mmu_lock`, held for write, and what a zap still owes.
pub struct ZapWalk<'m, S: SecondaryMmu> {
    mmu: &'m GuestMmu<S>,
    guard: MmuWriteGuard<'m, S::Platform>,
    blocking: Blocking,
    yielding: YieldPolicy,
    unflushed: Flush,
    /// Roots were replaced, and not every vCPU has been asked to reload.
    owes_reload: bool,
    /// Frames whose translations went, and that the shared counter lacks: to add there costs as much as the zap of an entry.
    uncounted: u64,
    retired: Retired<S>,
    reason: Reason,
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
        Self::with(mmu, mmu.write_timed(), blocking)
    }

    /// Goes on with `mmu_lock` held for write.
    pub(crate) fn with(
        mmu: &'m GuestMmu<S>,
        guard: MmuWriteGuard<'m, S::Platform>,
        blocking: Blocking,
    ) -> Self {
        let yielding = match blocking {
            Blocking::Allowed => mmu.policy().yielding,
            Blocking::Forbidden if mutation::active(Mutation::NonBlockableYields) => mmu.policy().yielding,
            Blocking::Forbidden => YieldPolicy::Never,
        };
        let debt = mmu.take_over_debt();
        let unflushed = if debt.is_empty() { Flush::NOTHING } else { Flush::EVERYTHING };
        let owes_reload = debt.contains(Requests::RELOAD_ROOTS);
        let (retired, reason) = (Retired::none(), Reason::Own);
        let mut walk =
            Self { mmu, guard, blocking, yielding, unflushed, owes_reload, uncounted: 0, retired, reason };
        if owes_reload {
            walk.reload();
        }
        walk
    }

    /// The right to follow links, since the lock is held, and what the steps of the walk are reported to meanwhile.
    pub fn parts(&mut self) -> (Walking<'_>, Steps<'_, 'm, S>) {
        let Self { mmu, guard, blocking, yielding, unflushed, uncounted, retired, reason, .. } = self;
        let guard = &*guard;
        let (blocking, yielding) = (*blocking, *yielding);
        let steps = Steps { mmu, guard, blocking, yielding, unflushed, uncounted, retired, reason };
        (guard.walking(), steps)
    }

    /// One entry, or one batch that the host handles as one, is dealt with: the frames `done`. May flush, and give the lock up for a
    /// while: then it says so.
    pub fn step(&mut self, done: GfnRange, zapped: Zapped) -> Walk {
        match self.parts().1.step(done, zapped) {
            Turn::GoOn => Walk::GoOn,
            Turn::GiveWay => {
                self.give_way();
                Walk::Restart
            }
        }
    }

    /// Gives the lock up for a moment, when a step said [`Turn::GiveWay`]. What was looked up before is void.
    pub fn give_way(&mut self) {
        self.give_way_for(S::Platform::reschedule);
    }

    /// The same, with something to do while the lock is not held.
    pub fn give_way_for(&mut self, meanwhile: impl FnOnce()) {
        let reason = mem::replace(&mut self.reason, Reason::Own);
        let counters = &self.mmu.counters;
        if !mutation::active(Mutation::YieldWithoutFlush) && self.parts().1.flush() {
            match reason {
                Reason::Waiters => counters.flushes_for_waiters.fetch_add(1, Ordering::Relaxed),
                Reason::Scheduler => counters.flushes_for_scheduler.fetch_add(1, Ordering::Relaxed),
                Reason::Own => 0,
            };
        }
        self.count();
        let (mmu, retired) = (self.mmu, mem::replace(&mut self.retired, Retired::none()));
        let mut wanted_ns = 0;
        self.guard.bump_with(|| {
            free(mmu, retired);
            meanwhile();
            wanted_ns = S::Platform::now_ns();
        });
        counters.yields.fetch_add(1, Ordering::Relaxed);
        if let Reason::Waiters = reason {
            counters.yields_to_waiters.fetch_add(1, Ordering::Relaxed);
        }
        counters.lock_wait_ns.fetch_add(S::Platform::now_ns().saturating_sub(wanted_ns), Ordering::Relaxed);
    }

    /// Runs `replace`, which puts new roots in the place of the old, and returns when no vCPU uses those, nor anything that it
    /// has cached: each has been asked to reload before it enters the guest again. What is zapped below the old ones needs no flush
    /// ([`Zapped::Unused`]).
    ///
    /// Source: Linux `kvm_mmu_zap_all_fast`.
    pub fn replace_roots(&mut self, replace: impl FnOnce()) {
        let early = mutation::active(Mutation::ReloadBeforeSwap);
        if early {
            self.reload();
        }
        self.owes_reload = true;
        replace();
        if !early {
            self.reload();
        }
        self.mmu.counters.reloads.fetch_add(1, Ordering::Relaxed);
    }

    fn reload(&mut self) {
        let mmu = self.mmu;
        if !mutation::active(Mutation::ReloadLeftOut) {
            mmu.vcpus.request_and_wait(Requests::RELOAD_ROOTS, |vcpu| mmu.secondary().kick(vcpu));
            self.unflushed = Flush::NOTHING;
        }
        self.owes_reload = false;
    }

    /// Flushes (rule F1), gives up the lock, and frees what was unlinked.
    pub(crate) fn finish(mut self) {
        if mutation::active(Mutation::BeginWithoutFlush) {
            self.unflushed = Flush::NOTHING;
        }
        self.parts().1.flush();
        self.count();
        let (mmu, retired) = (self.mmu, mem::replace(&mut self.retired, Retired::none()));
        drop(self);
        free(mmu, retired);
    }

    fn count(&mut self) {
        let frames = mem::take(&mut self.uncounted);
        if frames > 0 {
            self.mmu.counters.zapped_frames.fetch_add(frames, Ordering::Relaxed);
        }
    }
}

impl<S: SecondaryMmu> Drop for ZapWalk<'_, S> {
    /// A host's function that panics leaves a debt: whoever holds the lock next pays.
    fn drop(&mut self) {
        let mut debt = Requests::empty();
        debt.set(Requests::FLUSH_TLB, !self.unflushed.is_nothing());
        debt.set(Requests::RELOAD_ROOTS, self.owes_reload);
        if !debt.is_empty() {
            self.mmu.leave_debt(debt);
        }
    }
}

/// Whether a walk may keep what it looked up.
#[must_use = "a walk that does not give way holds up who waits for the lock"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It goes on from where it is.
    GoOn,
    /// It is to call [`ZapWalk::give_way`] and to begin again behind the last step.
    GiveWay,
}

/// What the steps of a zap did, and what is owed for them. See [`ZapWalk::parts`].
pub struct Steps<'w, 'm, S: SecondaryMmu> {
    mmu: &'m GuestMmu<S>,
    guard: &'w MmuWriteGuard<'m, S::Platform>,
    blocking: Blocking,
    yielding: YieldPolicy,
    unflushed: &'w mut Flush,
    uncounted: &'w mut u64,
    retired: &'w mut Retired<S>,
    reason: &'w mut Reason,
}

impl<S: SecondaryMmu> fmt::Debug for Steps<'_, '_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steps").field("unflushed", &self.unflushed).finish_non_exhaustive()
    }
}

impl<'w, S: SecondaryMmu> Steps<'w, '_, S> {
    /// One entry is dealt with: the frames `done`.
    #[inline]
    pub fn step(&mut self, done: GfnRange, zapped: Zapped) -> Turn {
        match zapped {
            Zapped::Nothing => {}
            Zapped::Unflushed(frames) => {
                *self.uncounted += frames;
                self.unflushed.add(done);
            }
            Zapped::Flushed(frames) => {
                *self.uncounted += frames;
                self.mmu.counters.flushes.fetch_add(1, Ordering::Relaxed);
            }
            Zapped::Unused(frames) => *self.uncounted += frames,
        }
        let is_full = self.retired.count == RETIRED;
        let wanted = if done.is_empty() { None } else { self.who_wants_a_break() };
        match wanted.or(is_full.then_some(Reason::Own)) {
            Some(reason) => {
                *self.reason = reason;
                Turn::GiveWay
            }
            None => Turn::GoOn,
        }
    }

    #[inline]
    fn who_wants_a_break(&self) -> Option<Reason> {
        if self.yielding == YieldPolicy::OnContention && self.guard.is_contended() {
            return Some(Reason::Waiters);
        }
        let is_wanted = self.yielding != YieldPolicy::Never && S::Platform::resched_wanted();
        is_wanted.then_some(Reason::Scheduler)
    }

    /// Where this walk is to say what the guest has written of `slot`.
    pub fn log(&self, slot: &Memslot) -> SlotLog<'w> {
        let is_logged = slot.flags.contains(SlotFlags::LOG_DIRTY);
        // An active event, or the lock of memslot updates, keeps the set from going while a walk lasts.
        SlotLog::new(slot, if is_logged { self.mmu.slot_set().log_of(slot) } else { None })
    }

    /// Whether an invalidation is active that covers a frame of `gfns`: then nothing may be mapped there that is not
    /// mapped already. The answer holds as long as the lock is not given up.
    pub fn is_covered(&self, gfns: GfnRange) -> bool {
        self.mmu.invalidations().covers(gfns)
    }

    /// Tables that [`retire`](Self::retire) still takes before the next step. An invalidation that may not block
    /// cannot wait for walkers, and takes none.
    pub fn room(&self) -> usize {
        match self.blocking {
            Blocking::Allowed => RETIRED - self.retired.count,
            Blocking::Forbidden => 0,
        }
    }

    /// Takes a table that was unlinked, and of which CPUs may still hold what `cached` says. It is freed
    /// ([`SecondaryMmu::free_tables`]) after a flush of that, when everyone has moved on who could still walk it.
    ///
    /// # Panics
    /// If there is no [`room`](Self::room).
    pub fn retire(&mut self, table: RetiredTable, cached: Flush) {
        assert!(self.room() > 0, "more tables were retired than there is room for");
        self.retired.tables[self.retired.count] = table;
        self.retired.count += 1;
        let keeps = mutation::active(Mutation::FlushKeepsTables);
        self.owe(if keeps { Flush::of(cached.translations) } else { cached });
    }

    fn owe(&mut self, flush: Flush) {
        *self.unflushed = self.unflushed.and(flush);
    }

    /// Makes every CPU forget what `flush` says now, and waits for those in the guest: where an entry must be broken before it is made,
    /// there is no putting it off. The lock is held all the while.
    pub fn flush_now(&mut self, flush: Flush) {
        self.owe(flush);
        self.flush();
    }

    /// Pays what is owed, and says whether anything was. The lock is still held.
    fn flush(&mut self) -> bool {
        if self.unflushed.is_nothing() {
            return false;
        }
        self.mmu.counters.flushes.fetch_add(1, Ordering::Relaxed);
        self.mmu.secondary().flush(*self.unflushed, &self.mmu.vcpus);
        *self.unflushed = Flush::NOTHING;
        true
    }
}

/// Frees tables that were unlinked and flushed (rule F3). The lock is not held: those who are waited for may want it.
fn free<S: SecondaryMmu>(mmu: &GuestMmu<S>, retired: Retired<S>) {
    if retired.count > 0 {
        mmu.vcpus.quiesce();
        mmu.secondary().free_tables(retired);
    }
}
