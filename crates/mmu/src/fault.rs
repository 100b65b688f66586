//! The fault path: one guest page fault, from the memslot to the installed translation.
//!
//! | step | what | ends in |
//! |---|---|---|
//! | 1 | read section: memslots stay in place | |
//! | 2 | reserved-bit fault: cached MMIO entry of this generation? | `Emulate`, `Retry(LostRace)` |
//! | 3 | find the slot | |
//! | 4 | write-tracked frame | `WriteProtected` |
//! | 5 | fast path, if it is private or shared as asked: permissions of a present entry, by compare-exchange; then the dirty log | `FixedFast`, `Spurious`, `DirtyRingFull` |
//! | 6 | top up the vCPU's cache: nothing allocates under the lock | `NoMemory` |
//! | 7 | **snapshot** the sequence, before anything that can go stale | |
//! | 8 | private or shared, as asked? | `WrongPrivacy` |
//! | 9 | no slot | `Emulate` |
//! | 10 | slot being deleted or moved | `Retry(SlotChanging)`, for a prefetch `SlotChanging` |
//! | 11 | **hint**: doomed? No page, no lock | `Retry(BeforeFaultIn)` |
//! | 12 | fault the page in, first without, then with waiting | errors, `Emulate` |
//! | 13 | **hint** again; the page goes back unused | `Retry(AfterFaultIn)` |
//! | 14 | witness: `mmu_lock` for read, or an announced intent | |
//! | 15 | **verify**, root still valid, not released | `Retry(UnderLock)`, `Released` |
//! | 16 | map; then the dirty log | `Fixed`, `Spurious`, `Retry(LostRace)` |
//! | 16a | a larger page is in the way that must be broken first: page back, unlock, split it with the lock held for write | `Retry(LostRace)` |
//! | 17 | page goes back, used or unused, witness still held; then unlock | |
//!
//! A fault without a slot skips 11, 13 and 15: it uses no page, and is guarded by the memslot generation. Whoever gets
//! a `Retry` holds nothing: no page, no lock, no read section. Let the guest fault again, or
//! [`wait`](crate::GuestMmu::wait) first.
//!
//! Left out: asynchronous page faults (they need a guest that cooperates) and the APIC access page (a device of
//! one architecture).
//!
//! Source: Linux `kvm_tdp_page_fault`, `direct_page_fault`, `kvm_mmu_faultin_pfn`, `is_page_fault_stale`,
//! `kvm_tdp_mmu_map`.

use crate::block::Block;
use crate::dirty_ring::{DirtyFrame, DirtyRing};
use crate::guest_mmu::{GuestMmu, Precheck, WitnessKind};
use crate::host::{
    CachedMmio, FastFault, Fault, FaultInError, FaultKind, Found, Mapped, PageRef, PageUse, Patience,
    PrimaryMmu, Privacy, SecondaryMmu,
};
use crate::intent::{Intent, Walker};
use crate::invalidation::Invalidations;
use crate::mmu_lock::{MmuReadGuard, Witness, sealed};
use crate::mutation::{self, Mutation};
use crate::outcome::{Emulate, FaultError, FaultOutcome, FaultResult, RetryPoint, retry};
use crate::platform::Platform;
use crate::slots::{Memslot, SlotFlags, SlotSet, SlotState};
use crate::snapshot::Snapshot;
use crate::vcpu_words::VcpuShared;

/// The page of a fault: goes back unused unless told otherwise.
struct HeldPage<R: PageRef>(Option<R>);

impl<R: PageRef> HeldPage<R> {
    fn page(&self) -> &R {
        self.0.as_ref().expect("the page is there until it is given back")
    }

    fn give_back(&mut self, used: PageUse) {
        if let Some(page) = self.0.take() {
            page.release(used);
        }
    }
}

impl<R: PageRef> Drop for HeldPage<R> {
    fn drop(&mut self) {
        self.give_back(PageUse::Unused);
    }
}

/// The witness that the policy asks for.
enum Held<'a, P: Platform> {
    Lock(MmuReadGuard<'a, P>),
    Intent(Intent<'a, P>),
}

impl<P: Platform> sealed::Sealed for Held<'_, P> {}

impl<P: Platform> Witness for Held<'_, P> {
    #[inline]
    fn invalidations(&self) -> &Invalidations {
        match self {
            Self::Lock(guard) => guard.invalidations(),
            Self::Intent(intent) => intent.invalidations(),
        }
    }

    #[inline]
    fn protects(&self, block: Block) -> bool {
        match self {
            Self::Lock(guard) => guard.protects(block),
            Self::Intent(intent) => intent.protects(block),
        }
    }
}

/// The page and the witness of an install. Fields drop in this order: the page goes back under the witness, on any way out.
struct Install<'a, S: SecondaryMmu> {
    page: HeldPage<S::Page>,
    witness: Held<'a, S::Platform>,
}

/// One fault on its way.
pub(crate) struct Path<'a, S: SecondaryMmu> {
    pub(crate) mmu: &'a GuestMmu<S>,
    pub(crate) shared: &'a VcpuShared,
    pub(crate) fault: &'a Fault,
    /// Where its writes are logged, if not in the slot's bitmap.
    pub(crate) ring: Option<&'a DirtyRing>,
    /// It was retried so often that it claims a turn.
    pub(crate) is_starved: bool,
}

impl<'a, S: SecondaryMmu> Path<'a, S> {
    /// From the slot to the installed translation.
    pub(crate) fn walk<M>(
        &self,
        primary: &M,
        slots: &SlotSet,
        near: &mut usize,
        cache: &mut S::Cache,
    ) -> FaultResult<S, M>
    where
        M: PrimaryMmu<Page = S::Page>,
    {
        let Self { mmu, fault, .. } = self;
        let gfn = fault.gfn;
        let secondary = mmu.secondary();
        if mmu.is_released() {
            return Err(FaultError::Released(gfn));
        }
        if fault.found == Found::Reserved {
            match secondary.cached_mmio(fault.space, gfn, &mut self.walker()) {
                CachedMmio::Gone => return Ok(retry(RetryPoint::LostRace, Block::frame(gfn))),
                CachedMmio::Generation(cached) if slots.generation() == Some(cached) => {
                    return Ok(FaultOutcome::Emulate(Emulate::Mmio));
                }
                CachedMmio::Generation(_) => {}
            }
        }
        let slot = slots.find(fault.space, gfn, near);
        if fault.is_write() && secondary.is_write_tracked(gfn) {
            return Ok(FaultOutcome::WriteProtected);
        }
        if let Some(slot) = slot
            && slot.state == SlotState::Valid
        {
            if self.is_logged(slot) && self.ring.is_some_and(DirtyRing::is_soft_full) {
                return Err(FaultError::DirtyRingFull(gfn));
            }
            if mutation::active(Mutation::MarkBeforeInstall) {
                self.log(slots, slot);
            }
            match self.fast_fault(primary, slot) {
                FastFault::Fixed => {
                    let unlogged = mutation::active(Mutation::FastFaultUnlogged);
                    if !unlogged && !mutation::active(Mutation::MarkBeforeInstall) {
                        self.log(slots, slot);
                    }
                    return Ok(FaultOutcome::FixedFast);
                }
                FastFault::Spurious => return Ok(FaultOutcome::Spurious),
                FastFault::NotApplicable => {}
            }
        }
        if !secondary.top_up(cache) {
            return Err(FaultError::NoMemory(gfn));
        }

        let block = slot.map_or(Block::frame(gfn), |slot| secondary.block(slot, gfn));
        if self.is_starved {
            self.shared.claim.claim(block);
        }
        let since = mmu.invalidations().snapshot(block);
        if primary.privacy(gfn) != fault.privacy {
            return Err(FaultError::WrongPrivacy { gfn, accessed: fault.privacy });
        }
        let Some(slot) = slot else {
            return self.no_slot::<M>(slots, since, cache);
        };
        if slot.state == SlotState::Invalid {
            return match fault.kind {
                FaultKind::Prefetch => Err(FaultError::SlotChanging(gfn)),
                FaultKind::Demand => Ok(retry(RetryPoint::SlotChanging, Block::frame(gfn))),
            };
        }
        if self.looks_doomed(Precheck::BEFORE_FAULT_IN, since) {
            return Ok(retry(RetryPoint::BeforeFaultIn, block));
        }
        if fault.is_write() && slot.flags.contains(SlotFlags::READ_ONLY) {
            return Ok(FaultOutcome::Emulate(Emulate::ReadOnly));
        }

        let page = match self.fault_in(primary, slot, &since) {
            Ok(page) => HeldPage(Some(page)),
            Err(FaultInError::WouldWait | FaultInError::Interrupted) => {
                return Err(FaultError::Interrupted(gfn));
            }
            Err(FaultInError::ReadOnly) => return Ok(FaultOutcome::Emulate(Emulate::ReadOnly)),
            Err(FaultInError::NoMemory) => return Err(FaultError::NoMemory(gfn)),
            Err(FaultInError::Failed(cause)) => return Err(FaultError::NoPage { gfn, cause }),
            Err(FaultInError::Poisoned(cause)) => return self.poison::<M>(slot, since, cause),
        };
        let since = if mutation::active(Mutation::SnapshotAfterFaultIn) {
            mmu.invalidations().snapshot(block)
        } else {
            since
        };
        if self.looks_doomed(Precheck::AFTER_FAULT_IN, since) {
            self.shared.counters.fault_in_wasted();
            if mutation::active(Mutation::LeakPageAfterFaultIn) {
                core::mem::forget(page);
            }
            return Ok(retry(RetryPoint::AfterFaultIn, block));
        }

        let install = Install::<S> { page, witness: self.witness(block) };
        self.install::<M>(install, slots, slot, since, cache)
    }

    /// Not for what is to be refused: a translation of shared memory is no answer to a private access. A glance is enough: a
    /// conversion takes the translation away.
    #[inline]
    fn fast_fault<M>(&self, primary: &M, slot: &Memslot) -> FastFault
    where
        M: PrimaryMmu<Page = S::Page>,
    {
        let ignored = mutation::active(Mutation::FastFaultIgnoresPrivacy);
        if !ignored && primary.privacy(self.fault.gfn) != self.fault.privacy {
            return FastFault::NotApplicable;
        }
        self.mmu.secondary().fast_fault(slot, self.fault, &mut self.walker())
    }

    fn is_logged(&self, slot: &Memslot) -> bool {
        self.fault.is_write() && slot.flags.contains(SlotFlags::LOG_DIRTY)
    }

    /// The entry was made writable: only now is that recorded, and before the guest is entered. See `dirty_bitmap`.
    fn log(&self, slots: &SlotSet, slot: &Memslot) {
        if !self.is_logged(slot) {
            return;
        }
        let gfn = self.fault.gfn;
        match self.ring {
            Some(ring) => ring.push(DirtyFrame { space: slot.space, slot: slot.id, gfn }),
            None => {
                if let Some(bitmap) = slots.log_of(slot) {
                    bitmap.set(gfn - slot.base);
                }
            }
        }
    }

    #[inline]
    fn looks_doomed(&self, check: Precheck, since: Snapshot) -> bool {
        self.mmu.policy.precheck.contains(check)
            && !mutation::active(Mutation::InvertedSlotTest)
            && since.hint().is_some()
    }

    /// First without waiting; if the page needs I/O, once more with patience.
    fn fault_in<M>(
        &self,
        primary: &M,
        slot: &Memslot,
        since: &Snapshot<'_>,
    ) -> Result<S::Page, FaultInError<M::Error>>
    where
        M: PrimaryMmu<Page = S::Page>,
    {
        match primary.fault_in(slot, self.fault, since, Patience::NoWait) {
            Err(FaultInError::WouldWait) => {
                // A turn is for who can be served at once.
                self.shared.claim.give_back::<S::Platform>();
                primary.fault_in(slot, self.fault, since, Patience::Interruptible)
            }
            other => other,
        }
    }

    fn walker(&self) -> Walker<'a, S::Platform> {
        self.mmu.walker(self.shared)
    }

    /// What the verdict on `block` will rest on.
    #[inline]
    fn witness(&self, block: Block) -> Held<'a, S::Platform> {
        match self.mmu.policy.witness {
            WitnessKind::Lock => Held::Lock(self.read_lock()),
            WitnessKind::Intent => Held::Intent(self.mmu.announce(self.shared, block)),
        }
    }

    #[inline]
    fn read_lock(&self) -> MmuReadGuard<'a, S::Platform> {
        let mmu = self.mmu;
        if let Some(guard) = mmu.lock.try_read() {
            return guard;
        }
        let started = S::Platform::now_ns();
        let guard = mmu.lock.read();
        self.shared.counters.waited_for_lock(S::Platform::now_ns().saturating_sub(started));
        guard
    }

    #[inline]
    fn install<M>(
        &self,
        mut install: Install<'a, S>,
        slots: &SlotSet,
        slot: &Memslot,
        since: Snapshot<'_>,
        cache: &mut S::Cache,
    ) -> FaultResult<S, M>
    where
        M: PrimaryMmu<Page = S::Page>,
    {
        let (secondary, block) = (self.mmu.secondary(), since.block());
        self.still_there::<M>()?;
        if secondary.is_root_stale(cache) {
            self.shared.counters.fault_in_wasted();
            return Ok(retry(RetryPoint::UnderLock, block));
        }
        let Ok(fresh) = install.witness.verify(since) else {
            self.shared.counters.fault_in_wasted();
            return Ok(retry(RetryPoint::UnderLock, block));
        };
        let writable = install.page.page().is_writable() && !slot.flags.contains(SlotFlags::READ_ONLY);
        let mapped = secondary.map(fresh, slot, self.fault, install.page.page(), cache);
        if let Ok(Mapped::Fixed) = mapped {
            self.log(slots, slot);
        }
        if mutation::active(Mutation::ReleaseAfterUnlock) {
            let Install { mut page, witness } = install;
            drop(witness);
            page.give_back(PageUse::Dirty);
            return Ok(FaultOutcome::Fixed);
        }
        match mapped {
            Ok(mapped @ (Mapped::Fixed | Mapped::Spurious)) => {
                install.page.give_back(if writable { PageUse::Dirty } else { PageUse::Clean });
                Ok(if mapped == Mapped::Fixed { FaultOutcome::Fixed } else { FaultOutcome::Spurious })
            }
            Ok(Mapped::LostRace) => {
                self.shared.counters.fault_in_wasted();
                Ok(retry(RetryPoint::LostRace, block))
            }
            Ok(Mapped::LargerLeaf) => {
                // Page and witness go first: who splits waits for the lock, and for every vCPU in the guest.
                drop(install);
                self.shared.counters.fault_in_wasted();
                match self.mmu.split_around(slot, self.fault.gfn, cache) {
                    Ok(()) => Ok(retry(RetryPoint::LostRace, block)),
                    Err(cause) => Err(FaultError::CannotMap { gfn: self.fault.gfn, cause }),
                }
            }
            Err(cause) => Err(FaultError::CannotMap { gfn: self.fault.gfn, cause }),
        }
    }

    /// Under the witness: a release zaps after it has said so, and what is installed behind its back stays for ever.
    fn still_there<M>(&self) -> Result<(), FaultError<M::Error, S::Error>>
    where
        M: PrimaryMmu<Page = S::Page>,
    {
        if self.mmu.is_released() && !mutation::active(Mutation::InstallAfterRelease) {
            return Err(FaultError::Released(self.fault.gfn));
        }
        Ok(())
    }

    /// The page's content is lost. Poison is an install like any other, and checked like any other.
    fn poison<M>(&self, slot: &Memslot, since: Snapshot<'_>, cause: M::Error) -> FaultResult<S, M>
    where
        M: PrimaryMmu<Page = S::Page>,
    {
        let (gfn, block) = (self.fault.gfn, since.block());
        let witness = self.witness(block);
        self.still_there::<M>()?;
        let Ok(fresh) = witness.verify(since) else {
            return Ok(retry(RetryPoint::UnderLock, block));
        };
        match self.mmu.secondary().poison(fresh, slot, gfn) {
            Ok(Mapped::Fixed | Mapped::Spurious) => {
                self.shared.counters.poison_installed();
                Err(FaultError::Poisoned { gfn, cause })
            }
            Ok(Mapped::LostRace | Mapped::LargerLeaf) => Ok(retry(RetryPoint::LostRace, block)),
            Err(cause) => Err(FaultError::CannotMap { gfn, cause }),
        }
    }

    fn no_slot<M>(&self, slots: &SlotSet, since: Snapshot<'_>, cache: &mut S::Cache) -> FaultResult<S, M>
    where
        M: PrimaryMmu<Page = S::Page>,
    {
        let gfn = self.fault.gfn;
        if self.fault.privacy == Privacy::Private {
            return Err(FaultError::WrongPrivacy { gfn, accessed: Privacy::Private });
        }
        let frame = Block::frame(gfn);
        if mutation::active(Mutation::InvertedSlotTest) && since.hint().is_some() {
            return Ok(retry(RetryPoint::BeforeFaultIn, frame));
        }
        if let Some(generation) = slots.generation() {
            let witness = self.witness(frame);
            let space = self.fault.space;
            self.mmu.secondary().cache_mmio(space, gfn, generation, cache, witness.walking());
        }
        Ok(FaultOutcome::Emulate(Emulate::Mmio))
    }
}
