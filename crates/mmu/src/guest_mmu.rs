//! One virtual machine's secondary MMU: what faults, invalidations and memslot updates share.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use crate::active::ActiveEvents;
use crate::addr::{Gfn, GfnRange};
use crate::block::Block;
use crate::dirty_ring::DirtyRing;
use crate::host::{Blocking, SecondaryMmu};
use crate::intent::Barrier;
use crate::invalidation::{Invalidations, SequenceScope};
use crate::mmu_lock::{MmuLock, MmuWriteGuard};
use crate::mutation::{self, Mutation};
use crate::platform::Platform;
use crate::ranges::Coverage;
use crate::slots::{Memslot, SlotError, SlotFlags, SlotId, SlotSet, SlotState, SpaceId};
use crate::stats::{FaultStats, InvalidationCounters, InvalidationStats};
use crate::sync::{AtomicPtr, AtomicU32, CachePadded, Ordering, ParkWord, Shared};
use crate::turns::Turns;
use crate::vcpu_words::{Requests, VcpuWords};
use crate::zap::ZapWalk;

bitflags::bitflags! {
    /// Where a fault looks, without the lock, whether it is doomed. Empty: as before Linux d02c357e5bfa.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Precheck: u8 {
        /// Before the page is faulted in.
        const BEFORE_FAULT_IN = 1;
        /// After the page was faulted in, before `mmu_lock` is taken.
        const AFTER_FAULT_IN = 2;
    }
}

/// When a zap gives up `mmu_lock` between two entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum YieldPolicy {
    /// When someone waits for the lock, or the scheduler wants the CPU: Linux with full preemption.
    OnContention,
    /// When the scheduler wants the CPU: Linux with voluntary preemption, since c793a62823d1.
    OnResched,
    /// Never.
    Never,
}

/// What keeps a verdict true until the install is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WitnessKind {
    /// `mmu_lock`, held for read: KVM's way. One slow install anywhere holds up every invalidation everywhere.
    Lock,
    /// An announced [`Intent`](crate::Intent): a fault takes no lock and writes no shared cache line, and holds up invalidations of its
    /// own frames only.
    Intent,
}

/// What can be chosen for a virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The lock-free checks.
    pub precheck: Precheck,
    /// Yielding of zaps.
    pub yielding: YieldPolicy,
    /// Whose end makes a fault under way retry.
    pub scope: SequenceScope,
    /// Which frames an active invalidation holds back.
    pub coverage: Coverage,
    /// When a fault that is retried goes before the next invalidation that may block; `None`: never, KVM's way.
    pub turns: Option<Turns>,
    /// What a fault holds while it verifies and installs.
    pub witness: WitnessKind,
    /// Who pays for the order between a fault's announcements and those who look at them.
    pub barrier: Barrier,
}

impl Default for Policy {
    /// Both checks, yielding on contention, one sequence, one hull, no turns, the lock: what a Linux with full preemption does today.
    fn default() -> Self {
        Self {
            precheck: Precheck::all(),
            yielding: YieldPolicy::OnContention,
            scope: SequenceScope::Global,
            coverage: Coverage::Hull,
            turns: None,
            witness: WitnessKind::Lock,
            barrier: Barrier::Symmetric,
        }
    }
}

/// The fault path and the invalidations of one virtual machine, over the tables `S`.
///
/// Faults come in through a [`Vcpu`](crate::Vcpu), invalidations through [`GuestMmu::invalidate`].
///
/// Lock order: memslot updates, then active events (a count, not a lock), then `mmu_lock`. A notifier never takes the
/// first; a fault waits for neither of the first two.
pub struct GuestMmu<S: SecondaryMmu> {
    pub(crate) lock: MmuLock<S::Platform>,
    pub(crate) vcpus: VcpuWords<S::Platform>,
    /// On lines of their own, these two: invalidators write them, and faults read what is around them.
    pub(crate) active: CachePadded<ActiveEvents<S::Platform>>,
    pub(crate) counters: CachePadded<InvalidationCounters>,
    secondary: S,
    pub(crate) policy: Policy,
    slots: CachePadded<AtomicPtr<SlotSet>>,
    /// The set that is to be published next, for those who start an event meanwhile; else the one that is.
    coming: AtomicPtr<SlotSet>,
    pub(crate) updates: Shared<S::Platform, ()>,
    /// Bumped by every end, for those who wait for one. Bit 0: someone does.
    ended: CachePadded<ParkWord>,
    released: AtomicU32,
    /// Requests that a walk owed the vCPUs when it ended in a panic. Under `mmu_lock`, so not the engine's own atomics: no part of any
    /// protocol.
    owed: core::sync::atomic::AtomicU32,
    /// The rings of the vCPUs that have one.
    pub(crate) rings: Shared<S::Platform, Vec<Arc<DirtyRing>>>,
    /// Counts of vCPUs that are gone.
    pub(crate) retired: Shared<S::Platform, FaultStats>,
}

const WAITERS: u32 = 1;

impl<S: SecondaryMmu> fmt::Debug for GuestMmu<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMmu")
            .field("policy", &self.policy)
            .field("lock", &self.lock)
            .field("vcpus", &self.vcpus)
            .finish_non_exhaustive()
    }
}

impl<S: SecondaryMmu> GuestMmu<S> {
    /// A secondary MMU without memslots.
    pub fn new(mut secondary: S, policy: Policy) -> Self {
        let lock = MmuLock::with(policy.scope, policy.coverage);
        secondary.attach(lock.invalidations().machine());
        let slots = Box::into_raw(SlotSet::empty());
        Self {
            lock,
            vcpus: VcpuWords::new(policy.barrier),
            active: CachePadded(ActiveEvents::new()),
            counters: CachePadded(InvalidationCounters::new()),
            secondary,
            policy,
            slots: CachePadded(AtomicPtr::new(slots)),
            coming: AtomicPtr::new(slots),
            updates: Shared::new(()),
            ended: CachePadded(ParkWord::new(0)),
            released: AtomicU32::new(0),
            owed: core::sync::atomic::AtomicU32::new(0),
            rings: Shared::new(Vec::new()),
            retired: Shared::new(FaultStats::default()),
        }
    }

    /// The tables.
    pub fn secondary(&self) -> &S {
        &self.secondary
    }

    /// What was chosen at the start.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// The invalidation words, for looking.
    pub fn invalidations(&self) -> &Invalidations {
        self.lock.invalidations()
    }

    /// Faults so far, all vCPUs together, gone ones too.
    pub fn fault_stats(&self) -> FaultStats {
        // Held until the living are counted: a vCPU that goes away meanwhile is counted here or there, not nowhere.
        let retired = self.retired.read();
        let mut total = *retired;
        self.vcpus.for_each(|vcpu| vcpu.counters.add_to(&mut total));
        total
    }

    /// Invalidations so far.
    pub fn invalidation_stats(&self) -> InvalidationStats {
        self.counters.get()
    }

    /// Parks until no active invalidation covers a frame of `range`; returns at once if none does.
    ///
    /// A [`Retry`](crate::Retry) because the slot is changing has nothing to do with invalidations: this returns at once then,
    /// and the caller had better give the CPU away before it tries again.
    ///
    /// With [`Policy::turns`] it also returns when an invalidation has ended whose end counts for the frames (see
    /// [`SequenceScope`]), though another covers them by then: in a stream of invalidations the fault comes back, is counted
    /// as retried once more, and has its turn in the end.
    ///
    /// Costs no CPU, and no lock: an invalidation that is ending is either seen here as over, or sees the waiter.
    pub fn wait(&self, range: GfnRange) {
        let since = self.lock.invalidations().snapshot(Block::around(range));
        loop {
            let marked = if mutation::active(Mutation::WaitWithoutMark) {
                self.ended.load(Ordering::Acquire)
            } else {
                self.ended.fetch_or(WAITERS, Ordering::AcqRel) | WAITERS
            };
            let comes_back = self.policy.turns.is_some() && since.has_moved();
            if comes_back || !self.lock.invalidations().covers(range) {
                return;
            }
            S::Platform::wait(&self.ended, marked);
        }
    }

    /// An invalidation's count was dropped: wakes who waits for that.
    pub(crate) fn announce_end(&self) {
        let mut seen = self.ended.load(Ordering::Relaxed);
        loop {
            let next = (seen & !WAITERS).wrapping_add(2);
            match self.ended.compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => seen = now,
            }
        }
        if seen & WAITERS != 0 && !mutation::active(Mutation::EndWithoutWake) {
            S::Platform::wake_all(&self.ended);
        }
        self.secondary.invalidation_ended();
    }

    /// Whether anyone holds `mmu_lock` or waits for it. For assertions (KVM: `lockdep_assert_held`): the answer may be
    /// old when it arrives.
    pub fn is_locked(&self) -> bool {
        self.lock.is_locked()
    }

    /// Whether anyone holds a witness: `mmu_lock`, or an intent. For assertions, like [`is_locked`](Self::is_locked).
    pub fn is_witnessed(&self) -> bool {
        self.is_locked() || self.vcpus.is_announced()
    }

    /// Takes `mmu_lock` for write and counts the wait, if there was one.
    pub(crate) fn write_timed(&self) -> MmuWriteGuard<'_, S::Platform> {
        if let Some(guard) = self.lock.try_write() {
            return guard;
        }
        let started = S::Platform::now_ns();
        let guard = self.lock.write();
        let waited = S::Platform::now_ns().saturating_sub(started);
        self.counters.lock_wait_ns.fetch_add(waited, Ordering::Relaxed);
        guard
    }

    /// What is owed since a walk ended in a panic. The caller holds `mmu_lock` for write, and pays.
    #[inline]
    pub(crate) fn take_over_debt(&self) -> Requests {
        let owed = self.owed.load(core::sync::atomic::Ordering::Relaxed);
        if owed == 0 || mutation::active(Mutation::PanicForgetsDebt) {
            return Requests::empty();
        }
        self.owed.store(0, core::sync::atomic::Ordering::Relaxed);
        Requests::from_bits_retain(owed)
    }

    /// Leaves a debt to whoever holds `mmu_lock` for write next. The caller holds it.
    #[cold]
    pub(crate) fn leave_debt(&self, requests: Requests) {
        let owed = self.owed.load(core::sync::atomic::Ordering::Relaxed);
        self.owed.store(owed | requests.bits(), core::sync::atomic::Ordering::Relaxed);
    }

    /// The address space is gone: drops every translation and refuses all further faults, those that are under way too.
    ///
    /// A fault looks again with its witness in its hand: it installs before the zap, which waits for it, or sees the release.
    pub fn release(&self) {
        self.released.store(1, Ordering::Release);
        self.vcpus.drain(GfnRange::ALL, |_| true);
        let _update = self.updates.write();
        let set = self.slot_set();
        for slot in set.iter() {
            self.zap_slot(slot);
        }
    }

    /// Whether [`release`](Self::release) was called.
    pub fn is_released(&self) -> bool {
        self.released.load(Ordering::Acquire) != 0
    }
}

/// Memslots. Updates run one at a time; each returns when no fault can still see the previous slots.
impl<S: SecondaryMmu> GuestMmu<S> {
    /// Adds a slot.
    pub fn create_slot(&self, slot: Memslot) -> Result<(), SlotError> {
        if slot.flags.contains(SlotFlags::LOG_DIRTY) && !S::LOGS_WRITES {
            return Err(SlotError::NoWriteLog(slot.id));
        }
        let _update = self.updates.write();
        let slot = Memslot { state: SlotState::Valid, ..slot };
        let next = self.slot_set().created(slot)?;
        self.secondary.check_slot(&slot)?;
        self.replace(next);
        Ok(())
    }

    /// Removes a slot; its frames are MMIO from then on. While it goes, accesses retry.
    pub fn delete_slot(&self, space: SpaceId, id: SlotId) -> Result<(), SlotError> {
        let _update = self.updates.write();
        self.invalidate_slot(space, id)?;
        self.replace(self.slot_set().deleted(space, id)?);
        Ok(())
    }

    /// Moves a slot to another guest frame; its memory stays. While it moves, accesses retry.
    pub fn move_slot(&self, space: SpaceId, id: SlotId, base: Gfn) -> Result<(), SlotError> {
        let _update = self.updates.write();
        // Refuse before anything is invalidated, so that there is nothing to put back.
        let moved = self.slot_set().changed(space, id, |slot| slot.base = base)?;
        self.secondary.check_slot(&moved.get(space, id)?)?;
        drop(moved);
        self.invalidate_slot(space, id)?;
        self.replace(self.slot_set().changed(space, id, |slot| {
            slot.base = base;
            slot.state = SlotState::Valid;
        })?);
        Ok(())
    }

    /// The invalid phase: when it returns, no fault can install for the slot and nothing maps it.
    fn invalidate_slot(&self, space: SpaceId, id: SlotId) -> Result<(), SlotError> {
        let invalid = self.slot_set().changed(space, id, |slot| slot.state = SlotState::Invalid)?;
        if !mutation::active(Mutation::UpdateWithoutInvalidPhase) {
            self.replace(invalid);
        }
        let slot = self.slot_set().get(space, id)?;
        self.zap_slot(&slot);
        Ok(())
    }

    fn zap_slot(&self, slot: &Memslot) {
        let mut walk = ZapWalk::start(self, Blocking::Allowed);
        self.secondary.zap_slot(slot, &mut walk);
        walk.finish();
    }
}

// UNSAFETY: the slot set is shared through a pointer that an update swaps and frees.
#[expect(unsafe_code)]
mod published {
    use super::{AtomicPtr, Box, GuestMmu, Mutation, Ordering, SecondaryMmu, SlotSet, mutation};
    use crate::intent::IntentWord;
    use core::marker::PhantomData;

    /// A read section: the slot set stays while it lasts.
    pub(crate) struct Section<'a, S: SecondaryMmu> {
        word: &'a IntentWord,
        set: &'a SlotSet,
        tables: PhantomData<fn() -> S>,
    }

    impl<S: SecondaryMmu> Section<'_, S> {
        #[inline]
        pub(crate) fn slots(&self) -> &SlotSet {
            self.set
        }
    }

    impl<S: SecondaryMmu> Drop for Section<'_, S> {
        #[inline]
        fn drop(&mut self) {
            self.word.clear::<S::Platform>();
        }
    }

    impl<S: SecondaryMmu> GuestMmu<S> {
        /// Enters a read section on `word`, which belongs to a vCPU of this virtual machine.
        #[inline]
        pub(crate) fn enter<'a>(&'a self, word: &'a IntentWord) -> Section<'a, S> {
            word.enter();
            // SAFETY: (1) the pointer came from `Box::into_raw`; (2) it is freed only after `wait_for_readers`,
            // which waits for this section if it was entered before the pointer was swapped out.
            let set = unsafe { &*self.slots.load(Ordering::Acquire) };
            Section { word, set, tables: PhantomData }
        }

        /// The slot set, for a caller that keeps it from going: the holder of `updates`, or of an active event.
        pub(crate) fn slot_set(&self) -> &SlotSet {
            // SAFETY: (1) as above; (2) only the holder of `updates` frees a set, when every event has ended that could
            // have found it; both kinds of caller use the reference no longer than they keep the set in place.
            unsafe { &*self.slots.load(Ordering::Acquire) }
        }

        /// The set that is to come, if there is one, for the holder of an active event.
        ///
        /// Read before [`slot_set`](Self::slot_set): what is published meanwhile, an event knows that started meanwhile.
        pub(crate) fn coming_set(&self) -> Option<&SlotSet> {
            let coming = self.coming.load(Ordering::Acquire);
            if coming == self.slots.load(Ordering::Acquire) || mutation::active(Mutation::ComingSlotsMissed) {
                return None;
            }
            // SAFETY: (1) the pointer came from `Box::into_raw`; (2) it is freed by the update after the one that it was
            // announced by, which waits for this event, as for `slot_set`.
            Some(unsafe { &*coming })
        }

        /// Publishes `next`. The caller holds `updates`. Returns when no fault and no event can see the previous set.
        pub(crate) fn replace(&self, next: Box<SlotSet>) {
            let next = Box::into_raw(next);
            self.coming.store(next, Ordering::Release);
            let old = self.active.swapped(|| swap(&self.slots, next));
            self.vcpus.wait_for_readers();
            // SAFETY: `next` came from `Box::into_raw` and is freed by a later `replace`, which needs `updates`.
            unsafe { &*next }.settle();
            let early = [Mutation::SwapWithoutReaders, Mutation::SlotsFreedUnderEvents];
            if cfg!(not(loom)) && early.into_iter().any(mutation::active) {
                // Somebody may use it still. The late install is what a test is to notice, not the crash.
                return;
            }
            // SAFETY: (1) `old` came from `Box::into_raw`; (2) it is published no more; (3) every section that could
            // have loaded it has been left; (4) every event has ended that started before the swap, and later ones load
            // `next`.
            drop(unsafe { Box::from_raw(old) });
        }
    }

    impl<S: SecondaryMmu> Drop for GuestMmu<S> {
        fn drop(&mut self) {
            // SAFETY: nobody else has access any more, and the pointer came from `Box::into_raw`.
            drop(unsafe { Box::from_raw(self.slots.load(Ordering::Acquire)) });
        }
    }

    fn swap(slots: &AtomicPtr<SlotSet>, next: *mut SlotSet) -> *mut SlotSet {
        slots.swap(next, Ordering::AcqRel)
    }
}
