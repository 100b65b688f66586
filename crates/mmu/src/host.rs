//! The two seams: what the engine asks of the primary MMU, and of the tables it installs into.

use core::fmt;
use core::num::NonZeroU32;

use crate::addr::{Gfn, GfnRange, HvaRange, PageSize, Pfn};
use crate::block::Block;
use crate::flush::Flush;
use crate::intent::{Walker, Walking};
use crate::invalidation::MachineId;
use crate::platform::Platform;
use crate::slots::{Memslot, SlotError, SlotSet, SpaceId};
use crate::snapshot::{Fresh, Snapshot};
use crate::vcpu_words::VcpuWords;
use crate::zap::{Retired, ZapWalk};

bitflags::bitflags! {
    /// What the guest wanted of the page.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Access: u8 {
        /// Load. Always meant, also when absent.
        const READ = 1;
        /// Store.
        const WRITE = 2;
        /// Instruction fetch.
        const EXEC = 4;
    }
}

/// Who asks for the page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FaultKind {
    /// The guest: it waits.
    #[default]
    Demand,
    /// Someone who expects the guest to want it soon.
    Prefetch,
}

/// Which of its two memories a guest addresses, where it has two (confidential guests).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Privacy {
    /// Memory that the host can see: the ordinary kind.
    #[default]
    Shared,
    /// Memory of the guest alone.
    Private,
}

/// The translation that the guest ran into, as far as the machine tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    #[default]
    Absent,
    /// A translation that forbids the access.
    Present,
    /// An entry with reserved bits: a cached MMIO entry.
    Reserved,
}

/// One guest page fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// The address space.
    pub space: SpaceId,
    /// The frame that was touched.
    pub gfn: Gfn,
    /// What for.
    pub access: Access,
    /// By whom.
    pub kind: FaultKind,
    /// What was in the way.
    pub found: Found,
    /// Which memory was meant.
    pub privacy: Privacy,
}

impl Fault {
    /// A demand fault of address space 0 on an absent translation.
    pub fn new(gfn: Gfn, access: Access) -> Self {
        Self { gfn, access, ..Self::default() }
    }

    /// Whether the access was a store.
    #[inline]
    pub fn is_write(&self) -> bool {
        self.access.contains(Access::WRITE)
    }
}

/// How a page reference was used when it is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageUse {
    /// Not at all: the fault is retried.
    Unused,
    /// It was mapped, and cannot be written through the mapping.
    Clean,
    /// It was mapped writable: count it as dirty.
    Dirty,
}

/// A reference to a resident page of the primary MMU.
///
/// The engine gives each one back exactly once, and after an install while the witness is still held: a page that
/// is marked dirty later could have been cleaned and freed in between.
pub trait PageRef {
    /// The frame that will be mapped for the faulting gfn.
    fn pfn(&self) -> Pfn;

    /// Whether the guest may write it.
    fn is_writable(&self) -> bool;

    /// The largest aligned block around it that is contiguous, as writable as it is, and only ever invalidated as a whole.
    fn block(&self) -> PageSize {
        PageSize::Size4K
    }

    /// Gives the reference back.
    fn release(self, used: PageUse);
}

/// How long [`PrimaryMmu::fault_in`] may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Do not wait for I/O: answer [`FaultInError::WouldWait`] instead.
    NoWait,
    /// Wait as long as it takes; a signal may end it with [`FaultInError::Interrupted`].
    Interruptible,
}

/// Why the primary MMU gives no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultInError<E> {
    /// It needs I/O and was asked not to wait. The engine asks again, with patience.
    WouldWait,
    /// A signal came first.
    Interrupted,
    /// The host mapping forbids the guest's write: the access is emulated.
    ReadOnly,
    /// No memory for it.
    NoMemory,
    /// The page's content is lost. The engine installs poison in its place; the guest never gets other bytes.
    Poisoned(E),
    /// There is no such page, or it cannot be had for another reason.
    Failed(E),
}

/// Whoever owns the real pages (in KVM: the host's memory management).
///
/// # Contract
///
/// 1. Every change of a page's backing lies within an invalidation of every secondary MMU that maps it, of the
///    page's whole block where pages are larger than a frame.
/// 2. `fault_in` called after an invalidation's end gives the page as it is after the change.
/// 3. `fault_in` called during an invalidation may give the page as it was or fail; it must not wait for that
///    invalidation to end (it runs without `mmu_lock`, but an invalidator may wait for it to finish).
pub trait PrimaryMmu {
    /// A reference to a resident page.
    type Page: PageRef;
    /// What can go wrong with a page.
    type Error: fmt::Debug + fmt::Display;

    /// Makes the page behind `fault.gfn` of `slot` resident. May sleep within `patience`, may itself invalidate. Neither lock nor
    /// intent is held.
    ///
    /// `since` was sampled before this call; it is asked for so that a page cannot be looked up too early.
    ///
    /// Source: Linux `kvm_mmu_faultin_pfn`.
    ///
    /// # Errors
    /// Each of [`FaultInError`] says what the engine makes of it.
    fn fault_in(
        &self,
        slot: &Memslot,
        fault: &Fault,
        since: &Snapshot,
        patience: Patience,
    ) -> Result<Self::Page, FaultInError<Self::Error>>;

    /// Which memory `gfn` currently is (KVM's memory attributes). Read after the snapshot; and before, for
    /// the fast path, without a lock.
    fn privacy(&self, _gfn: Gfn) -> Privacy {
        Privacy::Shared
    }
}

/// The answer of the path that needs neither lock nor sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FastFault {
    /// Permissions of a present entry were upgraded.
    Fixed,
    /// The access is allowed already.
    Spurious,
    /// This fault needs the whole path.
    NotApplicable,
}

/// What became of an install.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// The translation was installed or its permissions upgraded.
    Fixed,
    /// Someone had installed it already.
    Spurious,
    /// Someone else changed the entry at the same time: retry, never loop here.
    LostRace,
    /// A larger page maps the frame, forbids the access, and must be broken before smaller ones can take its place. The
    /// engine has it [split](SecondaryMmu::split_around), and the fault is retried.
    LargerLeaf,
}

/// What a zap leaves of a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zap {
    /// Nothing: the next access faults.
    Unmap,
    /// Reading: the next write faults, and asks the primary MMU. A secondary MMU may unmap instead.
    WriteProtect,
    /// Reading, for the dirty log: the next write is to be recorded, and then allowed again without asking anyone.
    /// A secondary MMU may treat it as `WriteProtect`.
    TrackDirty,
}

/// What to do with the mark of a past access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// Look at it.
    Test,
    /// Look at it and take it away.
    Clear,
}

/// Whether a page was used since its mark was last taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Young {
    /// It was.
    Yes,
    /// It was not.
    No,
    /// This secondary MMU learns it only when the page is faulted in again.
    Unknown,
}

/// A cached MMIO entry, as found on a reserved-bit fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CachedMmio {
    /// No such entry any more.
    Gone,
    /// Installed under this generation of the memslots.
    Generation(u64),
}

/// The tables that the guest's accesses go through: in memory, or the kernel's behind userfaultfd.
///
/// # Contract
///
/// * `map` installs only what `fresh` covers, and never replaces a present translation by one to another page.
/// * `zap` leaves no translation of the range, reports each step to the walk, and restarts when the walk says so.
/// * `flush` returns when no CPU can use a translation that was zapped before the call, or a table that was unlinked.
/// * Tables that others may walk are freed by `free_tables` alone (or with the whole structure).
pub trait SecondaryMmu: Sized + Send + Sync {
    /// What it runs on.
    type Platform: Platform;
    /// The pages it maps.
    type Page: PageRef;
    /// Objects a vCPU keeps so that nothing allocates under the lock.
    type Cache: Default + Send;
    /// Why an install can fail for good.
    type Error: fmt::Debug + fmt::Display;

    /// Whether an entry tells a page that was written from one that may be, so that [`clean`](Self::clean) finds out.
    const HAS_DIRTY_MARKS: bool = false;

    /// Whether it maps a page of a slot that logs writes ([`SlotFlags::LOG_DIRTY`](crate::SlotFlags::LOG_DIRTY)) read-only, and
    /// singly, until the first of them. Where it does not, such slots are refused.
    const LOGS_WRITES: bool = true;

    /// The virtual machine that it is part of, once, before anything else: what its [`Walking`] tokens will say.
    fn attach(&mut self, _machine: MachineId) {}

    /// Whether it can have `slot`: asked when the slot is to be created, or moved to these frames.
    ///
    /// # Errors
    /// It cannot: [`SlotError::NoTables`], [`SlotError::BeyondTables`] or [`SlotError::NotOfMapping`] says why.
    fn check_slot(&self, _slot: &Memslot) -> Result<(), SlotError> {
        Ok(())
    }

    /// The frames that an install for `gfn` covers: a whole huge page, or just the frame. Faults are checked
    /// against invalidations of any of them. Must be told from the slot alone: it is asked before the sequence is sampled.
    fn block(&self, _slot: &Memslot, gfn: Gfn) -> Block {
        Block::frame(gfn)
    }

    /// Whether writes to `gfn` are tracked and so never mapped (shadowed tables; KVM: `kvm_gfn_is_write_tracked`).
    fn is_write_tracked(&self, _gfn: Gfn) -> bool {
        false
    }

    /// Upgrades the permissions of a present entry by one compare-exchange, if that is all that is needed. Who follows
    /// links for that opens a section of `walker` (KVM: `fast_page_fault`).
    fn fast_fault(
        &self,
        _slot: &Memslot,
        _fault: &Fault,
        _walker: &mut Walker<'_, Self::Platform>,
    ) -> FastFault {
        FastFault::NotApplicable
    }

    /// Refills a vCPU's cache before the lock is taken (KVM: `mmu_topup_memory_caches`); `false` if there is no memory: the fault ends in
    /// [`FaultError::NoMemory`](crate::FaultError::NoMemory).
    fn top_up(&self, _cache: &mut Self::Cache) -> bool {
        true
    }

    /// Whether the vCPU's root was invalidated, so that an install would go into dead tables. Called under the witness.
    fn is_root_stale(&self, _cache: &Self::Cache) -> bool {
        false
    }

    /// Installs the translation to `page` for `fault`: of frames in `fresh.range()` and in the slot, no others. Invalidations of
    /// these frames wait for it (KVM: `kvm_tdp_mmu_map`).
    ///
    /// # Errors
    /// It can never be installed: the fault ends in [`FaultError::CannotMap`](crate::FaultError::CannotMap).
    fn map(
        &self,
        fresh: Fresh<'_>,
        slot: &Memslot,
        fault: &Fault,
        page: &Self::Page,
        cache: &mut Self::Cache,
    ) -> Result<Mapped, Self::Error>;

    /// Installs poison for the page around `gfn`, likewise: the next access ends in a memory error.
    ///
    /// # Errors
    /// As for [`map`](Self::map).
    fn poison(&self, fresh: Fresh<'_>, slot: &Memslot, gfn: Gfn) -> Result<Mapped, Self::Error>;

    /// Removes (or write-protects) every translation of `gfns` of `slot`, entry by entry, reporting to `walk` (KVM:
    /// `kvm_unmap_gfn_range`). What entries with marks of writes say was written goes to the slot's log
    /// ([`Steps::log`](crate::Steps::log)).
    fn zap(&self, slot: &Memslot, gfns: GfnRange, zap: Zap, walk: &mut ZapWalk<'_, Self>);

    /// Removes every translation of `slot`, which goes or moves: tables that were there for it alone may go, too.
    fn zap_slot(&self, slot: &Memslot, walk: &mut ZapWalk<'_, Self>) {
        self.zap(slot, slot.gfns(), Zap::Unmap, walk);
    }

    /// Puts new roots in the place of the old ([`ZapWalk::replace_roots`]), and removes what those lead to. All `slots` that there
    /// are lie below them. `false`: nothing was done; there are no roots, or there is no memory for new ones.
    fn replace_roots(&self, _slots: &SlotSet, _walk: &mut ZapWalk<'_, Self>) -> bool {
        false
    }

    /// Takes the marks of past writes away from the translations of `gfns` of `slot`, and tells `written` of each. Only where
    /// [`HAS_DIRTY_MARKS`](Self::HAS_DIRTY_MARKS).
    fn clean(
        &self,
        _slot: &Memslot,
        _gfns: GfnRange,
        _walk: &mut ZapWalk<'_, Self>,
        _written: &mut dyn FnMut(GfnRange),
    ) {
    }

    /// Maps every frame of `gfns` of `slot` singly that a larger page maps, without anyone noticing. `false`: there is no
    /// memory for the tables, and some are left.
    fn split_large(&self, _slot: &Memslot, _gfns: GfnRange, _walk: &mut ZapWalk<'_, Self>) -> bool {
        true
    }

    /// Maps `gfn` of `slot` singly if a larger page maps it, without anyone noticing and with nothing but `cache`: for a fault that
    /// [`map`](Self::map) answered with [`Mapped::LargerLeaf`].
    ///
    /// # Errors
    /// It cannot be split: the fault ends in [`FaultError::CannotMap`](crate::FaultError::CannotMap).
    fn split_around(
        &self,
        _slot: &Memslot,
        _gfn: Gfn,
        _cache: &mut Self::Cache,
        _walk: &mut ZapWalk<'_, Self>,
    ) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Maps frames of `gfns` of `slot` by larger pages again that are mapped singly and could be, without anyone
    /// noticing.
    fn recover_large(&self, _slot: &Memslot, _gfns: GfnRange, _walk: &mut ZapWalk<'_, Self>) {}

    /// Unmaps blocks that are mapped singly because they were fetched from, where large pages never are: one in `ratio` of them,
    /// rounded up. The next access maps a large page again. Blocks of slots whose writes are logged stay. How many it was.
    fn recover_nx_huge_pages<'s>(
        &self,
        _ratio: NonZeroU32,
        _slot_of: &dyn Fn(SpaceId, Gfn) -> Option<&'s Memslot>,
        _walk: &mut ZapWalk<'_, Self>,
    ) -> u64 {
        0
    }

    /// Frees tables that a zap unlinked and gave to [`Steps::retire`](crate::Steps::retire): nobody can reach them any more.
    fn free_tables(&self, _tables: Retired<Self>) {}

    /// Makes every CPU forget what `flush` says, or more. The default asks all vCPUs and waits for those in the guest.
    fn flush(&self, flush: Flush, vcpus: &VcpuWords<Self::Platform>) {
        vcpus.flush_and_wait(flush, |vcpu| self.kick(vcpu));
    }

    /// Makes vCPU number `vcpu`, seen in guest mode, leave the guest, and does not wait for it: `mmu_lock` is held for write. Without it a vCPU
    /// is waited for until it leaves by itself (KVM: `kvm_vcpu_kick`).
    fn kick(&self, _vcpu: usize) {}

    /// Whether a page of `gfns` was used, by the marks of past accesses, which `Age::Clear` takes away. No flush. Advisory: a wrong
    /// answer costs speed only (KVM: `kvm_age_gfn`, `kvm_test_age_gfn`).
    fn age(&self, _slot: &Memslot, _gfns: GfnRange, _age: Age, _walking: Walking<'_>) -> Young {
        Young::Unknown
    }

    /// The cached MMIO entry of `gfn`.
    fn cached_mmio(
        &self,
        _space: SpaceId,
        _gfn: Gfn,
        _walker: &mut Walker<'_, Self::Platform>,
    ) -> CachedMmio {
        CachedMmio::Gone
    }

    /// Caches that `gfn` is MMIO under this generation of the memslots.
    fn cache_mmio(
        &self,
        _space: SpaceId,
        _gfn: Gfn,
        _generation: u64,
        _cache: &mut Self::Cache,
        _walking: Walking<'_>,
    ) {
    }

    /// An invalidation has ended (after the count was dropped): faults parked on it may be tried again.
    fn invalidation_ended(&self) {}
}

/// Whether an invalidation may sleep and yield.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocking {
    /// It may.
    Allowed,
    /// It may not (KVM: the OOM reaper): the whole range in one critical section.
    Forbidden,
}

/// How the primary MMU reaches a secondary MMU that maps its memory, whatever kind that is.
///
/// Implemented by [`GuestMmu`](crate::GuestMmu); a trait so that a memory object can hold several.
pub trait Notifier: Send + Sync {
    /// Runs `change` inside an invalidation of `hvas`: when `change` runs, nothing maps the range, and nothing will
    /// until it has returned.
    fn invalidating(&self, hvas: HvaRange, zap: Zap, blocking: Blocking, change: &mut dyn FnMut());

    /// Looks at, or takes away, the marks of past accesses.
    fn age(&self, hvas: HvaRange, age: Age) -> Young;
}
