//! The fault path: one guest page fault, from the memslot to the installed translation.
//!
//! | step | what | ends in |
//! |---|---|---|
//! | 1 | read section: memslots stay in place | |
//! | 2 | reserved-bit fault: cached MMIO entry of this generation? | `Emulate`, `Retry(LostRace)` |
//! | 3 | find the slot | |
//! | 4 | write-tracked frame | `WriteProtected` |
//! | 5 | fast path: permissions of a present entry, by compare-exchange | `FixedFast`, `Spurious` |
//! | 6 | top up the vCPU's cache: nothing allocates under the lock | `NoMemory` |
//! | 7 | **snapshot** the sequence, before anything that can go stale | |
//! | 8 | private or shared, as asked? | `WrongPrivacy` |
//! | 9 | no slot | `Emulate` |
//! | 10 | slot being deleted or moved | `Retry(SlotChanging)`, for a prefetch `SlotChanging` |
//! | 11 | **hint**: doomed? No page, no lock | `Retry(BeforeFaultIn)` |
//! | 12 | fault the page in, first without, then with waiting | errors, `Emulate` |
//! | 13 | **hint** again; the page goes back unused | `Retry(AfterFaultIn)` |
//! | 14 | witness: `mmu_lock` for read | |
//! | 15 | **verify**, root still valid, not released | `Retry(UnderLock)`, `Released` |
//! | 16 | map | `Fixed`, `Spurious`, `Retry(LostRace)` |
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

use alloc::sync::Arc;
use core::cell::Cell;
use core::fmt;

use crate::addr::{Gfn, GfnRange, Hva, HvaRange};
use crate::guest_mmu::{GuestMmu, Precheck, WitnessKind};
use crate::host::{
    CachedMmio, FastFault, Fault, FaultInError, FaultKind, Found, Mapped, PageRef, PageUse, Patience,
    PrimaryMmu, Privacy, SecondaryMmu,
};
use crate::intent::{Intent, Walker};
use crate::invalidation::{Invalidations, Snapshot};
use crate::mmu_lock::{MmuReadGuard, Witness, sealed};
use crate::mutation::{self, Mutation};
use crate::platform::Platform;
use crate::slots::{Memslot, SlotFlags, SlotSet, SlotState, SpaceId};
use crate::turns::Retries;
use crate::vcpu::{Requests, VcpuShared};

/// Where on the path a fault was found to be doomed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum RetryPoint {
    /// By the hint, before the page was faulted in: nothing was wasted.
    BeforeFaultIn = 0,
    /// By the hint, after the page was faulted in.
    AfterFaultIn,
    /// By the check that counts.
    UnderLock,
    /// Another thread changed the same entry at the same time.
    LostRace,
    /// The slot is being deleted or moved.
    SlotChanging,
}

impl RetryPoint {
    /// How many points there are.
    pub const COUNT: usize = 5;

    /// All points, in the order of the path.
    pub const ALL: [Self; Self::COUNT] =
        [Self::BeforeFaultIn, Self::AfterFaultIn, Self::UnderLock, Self::LostRace, Self::SlotChanging];
}

/// Nothing was installed: the guest touches the page again, or the caller waits first.
#[must_use = "the guest has not got its page"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Where it was found.
    pub point: RetryPoint,
    /// What would have been installed: what to [`wait`](crate::GuestMmu::wait) for.
    pub range: GfnRange,
}

/// Why an access is to be emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulate {
    /// No memslot: a device.
    Mmio,
    /// A write to read-only memory.
    ReadOnly,
}

/// What became of a fault.
#[must_use = "a retry must be retried, an emulation emulated"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOutcome {
    /// The translation is installed.
    Fixed,
    /// A present translation got the permission that was missing, without the lock.
    FixedFast,
    /// The translation was there already.
    Spurious,
    /// Nothing was installed.
    Retry(Retry),
    /// The access is for the emulator.
    Emulate(Emulate),
    /// The frame is write-tracked: unprotect and retry, or emulate.
    WriteProtected,
}

/// A fault that retrying does not help. `E` is the primary MMU's error, `M` the secondary's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError<E: fmt::Debug + fmt::Display, M: fmt::Debug + fmt::Display> {
    /// The virtual machine was released.
    #[error("guest frame {0} was touched after the virtual machine was released")]
    Released(Gfn),
    /// No memory for tables or for the page.
    #[error("there is no memory to map guest frame {0}")]
    NoMemory(Gfn),
    /// A signal came while the page was being resolved.
    #[error("a signal interrupted the fault of guest frame {0}")]
    Interrupted(Gfn),
    /// A prefetch met a slot that is being deleted or moved.
    #[error("the memslot of guest frame {0} is changing: prefetch it again later")]
    SlotChanging(Gfn),
    /// The access was to private memory that is shared, or the other way round, or to private memory of no slot.
    #[error("guest frame {gfn} was accessed as {accessed:?} memory, which it is not")]
    WrongPrivacy {
        /// The frame.
        gfn: Gfn,
        /// How it was accessed.
        accessed: Privacy,
    },
    /// The page's content is lost; poison is installed in its place.
    #[error("the content of guest frame {gfn} is lost and it is poisoned: {cause}")]
    Poisoned {
        /// The frame.
        gfn: Gfn,
        /// Why.
        cause: E,
    },
    /// The primary MMU has no such page.
    #[error("guest frame {gfn} has no page: {cause}")]
    NoPage {
        /// The frame.
        gfn: Gfn,
        /// Why.
        cause: E,
    },
    /// The translation cannot be installed.
    #[error("guest frame {gfn} cannot be mapped: {cause}")]
    CannotMap {
        /// The frame.
        gfn: Gfn,
        /// Why.
        cause: M,
    },
}

/// One who raises faults: a vCPU, or a thread that serves the faults of several. One fault at a time.
pub struct Vcpu<'m, S: SecondaryMmu> {
    mmu: &'m GuestMmu<S>,
    shared: Arc<VcpuShared>,
    cache: S::Cache,
    section: u32,
    near: usize,
    retries: Retries,
    /// Whether it ever enters the guest.
    enters: Cell<bool>,
    /// It claims a turn that it has had: the access is made in its next stay in the guest.
    served: Cell<bool>,
}

impl<S: SecondaryMmu> fmt::Debug for Vcpu<'_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu").field("id", &self.shared.id).finish_non_exhaustive()
    }
}

impl<S: SecondaryMmu> GuestMmu<S> {
    /// A new vCPU. Its number is the lowest that is free.
    pub fn vcpu(&self) -> Vcpu<'_, S> {
        Vcpu {
            mmu: self,
            shared: self.vcpus.register(),
            cache: S::Cache::default(),
            section: 0,
            near: 0,
            retries: Retries::default(),
            enters: Cell::new(false),
            served: Cell::new(false),
        }
    }
}

impl<S: SecondaryMmu> Drop for Vcpu<'_, S> {
    fn drop(&mut self) {
        self.shared.leave_guest::<S::Platform>();
        let mut retired = self.mmu.retired.write();
        self.mmu.vcpus.unregister(&self.shared);
        self.shared.counters.add_to(&mut retired);
    }
}

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
    // Of the two, what holds for both.
    const HOLDS_LOCK: bool = false;

    #[inline]
    fn invalidations(&self) -> &Invalidations {
        match self {
            Self::Lock(guard) => guard.invalidations(),
            Self::Intent(intent) => intent.invalidations(),
        }
    }
}

/// The page and the witness of an install. Fields drop in this order: the page goes back under the witness, on any way out.
struct Install<'a, S: SecondaryMmu> {
    page: HeldPage<S::Page>,
    witness: Held<'a, S::Platform>,
}

type FaultResult<S, M> =
    Result<FaultOutcome, FaultError<<M as PrimaryMmu>::Error, <S as SecondaryMmu>::Error>>;

impl<'m, S: SecondaryMmu> Vcpu<'m, S> {
    /// The virtual machine it belongs to.
    pub fn mmu(&self) -> &'m GuestMmu<S> {
        self.mmu
    }

    /// Its number, as [`SecondaryMmu::kick`] gets it.
    pub fn id(&self) -> usize {
        self.shared.id
    }

    /// The first guest frame, in any address space, that is backed at `hva`; `None` where no memslot is.
    pub fn gfn_at(&mut self, hva: Hva) -> Option<(SpaceId, Gfn)> {
        self.section = self.section.wrapping_add(1);
        let section = self.mmu.enter(&self.shared.reader, self.section);
        let byte = HvaRange::from_len(hva, 1)?;
        section.slots().touching(byte).map(|(slot, gfns)| (slot.space, gfns.start)).min()
    }

    /// Announces that `block` is about to be installed, where an install is not made by
    /// [`handle_fault`](Self::handle_fault): the witness to verify with. Only under a policy of
    /// [`WitnessKind::Intent`] do invalidations wait for it.
    ///
    /// # Panics
    /// If the policy says `mmu_lock`.
    #[inline]
    pub fn announce(&mut self, block: GfnRange) -> Intent<'_, S::Platform> {
        assert_eq!(self.mmu.policy().witness, WitnessKind::Intent, "invalidations would not wait for it");
        announce(self.mmu, &self.shared, block)
    }

    /// The right to walk tables without a lock.
    pub fn walker(&mut self) -> Walker<'_, S::Platform> {
        Walker::new(&self.shared.intent, self.mmu.invalidations().machine(), self.mmu.vcpus.barriers())
    }

    /// Enters guest mode. `Err`: requests wait and must be served first; the vCPU is outside.
    pub fn enter_guest(&self) -> Result<(), Requests> {
        self.enters.set(true);
        self.shared.enter_guest::<S::Platform>()
    }

    /// Whether someone wants this vCPU to leave the guest: for vCPUs in software, which nothing interrupts.
    pub fn is_kicked(&self) -> bool {
        self.shared.is_kicked()
    }

    /// Leaves guest mode and hands out what was requested meanwhile.
    pub fn leave_guest(&self) -> Requests {
        self.shared.leave_guest::<S::Platform>();
        if self.served.take() {
            self.shared.claim.give_back();
        }
        self.shared.take_requests()
    }

    /// Serves one fault, once. See the module documentation for what each outcome asks of the caller.
    pub fn handle_fault<M>(&mut self, primary: &M, fault: &Fault) -> FaultResult<S, M>
    where
        M: PrimaryMmu<Page = S::Page>,
    {
        self.section = self.section.wrapping_add(1);
        let section = self.mmu.enter(&self.shared.reader, self.section);
        let turn_after = self.mmu.policy().turn_after;
        let is_starved = turn_after.is_some_and(|times| self.retries.of(fault.space, fault.gfn) >= times);
        let path = Path { mmu: self.mmu, shared: &self.shared, fault, is_starved };
        let result = path.walk(primary, section.slots(), &mut self.near, &mut self.cache);
        drop(section);
        self.shared.counters.count(&result);
        if turn_after.is_some() {
            self.count_retries(fault, &result);
        }
        result
    }

    /// For a turn: how often this frame was held back, and whether its claim has done its service.
    fn count_retries<E>(&mut self, fault: &Fault, result: &Result<FaultOutcome, E>) {
        use RetryPoint::{AfterFaultIn, BeforeFaultIn, UnderLock};
        match result {
            Ok(FaultOutcome::Retry(Retry { point: BeforeFaultIn | AfterFaultIn | UnderLock, .. })) => {
                self.retries.retried(fault.space, fault.gfn);
            }
            _ => {
                let was_retried = self.retries.done(fault.space, fault.gfn);
                if was_retried && self.enters.get() {
                    self.served.set(true);
                } else if was_retried {
                    self.shared.claim.give_back();
                }
            }
        }
    }
}

/// One fault on its way.
struct Path<'a, S: SecondaryMmu> {
    mmu: &'a GuestMmu<S>,
    shared: &'a VcpuShared,
    fault: &'a Fault,
    /// It was retried so often that it claims a turn.
    is_starved: bool,
}

impl<'a, S: SecondaryMmu> Path<'a, S> {
    fn walk<M>(
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
                CachedMmio::Gone => return Ok(retry(RetryPoint::LostRace, GfnRange::frame(gfn))),
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
            match secondary.fast_fault(slot, fault, &mut self.walker()) {
                FastFault::Fixed => return Ok(FaultOutcome::FixedFast),
                FastFault::Spurious => return Ok(FaultOutcome::Spurious),
                FastFault::NotApplicable => {}
            }
        }
        if !secondary.top_up(cache) {
            return Err(FaultError::NoMemory(gfn));
        }

        let block = slot.map_or(GfnRange::frame(gfn), |slot| secondary.block(slot, gfn));
        if self.is_starved {
            self.shared.claim.claim(block);
        }
        let since = mmu.invalidations().snapshot_of(block);
        if primary.privacy(gfn) != fault.privacy {
            return Err(FaultError::WrongPrivacy { gfn, accessed: fault.privacy });
        }
        let Some(slot) = slot else {
            return self.no_slot::<M>(slots, since, cache);
        };
        if slot.state == SlotState::Invalid {
            return match fault.kind {
                FaultKind::Prefetch => Err(FaultError::SlotChanging(gfn)),
                FaultKind::Demand => Ok(retry(RetryPoint::SlotChanging, GfnRange::frame(gfn))),
            };
        }
        if self.looks_doomed(Precheck::BEFORE_FAULT_IN, since, block) {
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
            Err(FaultInError::Poisoned(cause)) => return self.poison::<M>(slot, since, block, cause),
        };
        let since = if mutation::active(Mutation::SnapshotAfterFaultIn) {
            mmu.invalidations().snapshot_of(block)
        } else {
            since
        };
        if self.looks_doomed(Precheck::AFTER_FAULT_IN, since, block) {
            self.shared.counters.fault_in_wasted();
            if mutation::active(Mutation::LeakPageAfterFaultIn) {
                core::mem::forget(page);
            }
            return Ok(retry(RetryPoint::AfterFaultIn, block));
        }

        let install = Install::<S> { page, witness: self.witness(block) };
        self.install::<M>(install, slot, since, block, cache)
    }

    fn looks_doomed(&self, check: Precheck, since: Snapshot, block: GfnRange) -> bool {
        self.mmu.policy().precheck.contains(check)
            && !mutation::active(Mutation::InvertedSlotTest)
            && self.mmu.hint(since, block).is_some()
    }

    /// First without waiting; if the page needs I/O, once more with patience.
    fn fault_in<M>(
        &self,
        primary: &M,
        slot: &Memslot,
        since: &Snapshot,
    ) -> Result<S::Page, FaultInError<M::Error>>
    where
        M: PrimaryMmu<Page = S::Page>,
    {
        match primary.fault_in(slot, self.fault, since, Patience::NoWait) {
            Err(FaultInError::WouldWait) => {
                if self.is_starved {
                    // A turn is for who can be served at once.
                    self.shared.claim.give_back();
                }
                primary.fault_in(slot, self.fault, since, Patience::Interruptible)
            }
            other => other,
        }
    }

    fn walker(&self) -> Walker<'a, S::Platform> {
        let machine = self.mmu.invalidations().machine();
        Walker::new(&self.shared.intent, machine, self.mmu.vcpus.barriers())
    }

    /// What the verdict on `block` will rest on.
    fn witness(&self, block: GfnRange) -> Held<'a, S::Platform> {
        match self.mmu.policy().witness {
            WitnessKind::Lock => Held::Lock(self.read_lock()),
            WitnessKind::Intent => Held::Intent(announce(self.mmu, self.shared, block)),
        }
    }

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

    fn install<M>(
        &self,
        mut install: Install<'a, S>,
        slot: &Memslot,
        since: Snapshot,
        block: GfnRange,
        cache: &mut S::Cache,
    ) -> FaultResult<S, M>
    where
        M: PrimaryMmu<Page = S::Page>,
    {
        let secondary = self.mmu.secondary();
        self.still_there::<M>()?;
        if secondary.is_root_stale(cache) {
            self.shared.counters.fault_in_wasted();
            return Ok(retry(RetryPoint::UnderLock, block));
        }
        let Ok(fresh) = self.mmu.invalidations().verify(&install.witness, since, block) else {
            self.shared.counters.fault_in_wasted();
            return Ok(retry(RetryPoint::UnderLock, block));
        };
        let writable = install.page.page().is_writable() && !slot.flags.contains(SlotFlags::READ_ONLY);
        let mapped = secondary.map(fresh, slot, self.fault, install.page.page(), cache);
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
    fn poison<M>(
        &self,
        slot: &Memslot,
        since: Snapshot,
        block: GfnRange,
        cause: M::Error,
    ) -> FaultResult<S, M>
    where
        M: PrimaryMmu<Page = S::Page>,
    {
        let gfn = self.fault.gfn;
        let witness = self.witness(block);
        self.still_there::<M>()?;
        let Ok(fresh) = self.mmu.invalidations().verify(&witness, since, block) else {
            return Ok(retry(RetryPoint::UnderLock, block));
        };
        match self.mmu.secondary().poison(fresh, slot) {
            Ok(Mapped::Fixed | Mapped::Spurious) => {
                self.shared.counters.poison_installed();
                Err(FaultError::Poisoned { gfn, cause })
            }
            Ok(Mapped::LostRace) => Ok(retry(RetryPoint::LostRace, block)),
            Err(cause) => Err(FaultError::CannotMap { gfn, cause }),
        }
    }

    fn no_slot<M>(&self, slots: &SlotSet, since: Snapshot, cache: &mut S::Cache) -> FaultResult<S, M>
    where
        M: PrimaryMmu<Page = S::Page>,
    {
        let gfn = self.fault.gfn;
        if self.fault.privacy == Privacy::Private {
            return Err(FaultError::WrongPrivacy { gfn, accessed: Privacy::Private });
        }
        let frame = GfnRange::frame(gfn);
        if mutation::active(Mutation::InvertedSlotTest) && self.mmu.hint(since, frame).is_some() {
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

#[inline]
fn announce<'a, S: SecondaryMmu>(
    mmu: &'a GuestMmu<S>,
    shared: &'a VcpuShared,
    block: GfnRange,
) -> Intent<'a, S::Platform> {
    Intent::announce(&shared.intent, mmu.invalidations(), mmu.vcpus.barriers(), block)
}

fn retry(point: RetryPoint, range: GfnRange) -> FaultOutcome {
    FaultOutcome::Retry(Retry { point, range })
}
