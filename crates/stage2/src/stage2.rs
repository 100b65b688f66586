//! The tables as the engine's secondary MMU: what a fault installs, what an invalidation takes away.
//!
//! # What protects what
//!
//! The engine calls `map` with a verdict that its witness keeps true, what zaps, splits and recovers with `mmu_lock` held
//! for write, `fast_fault` and `age` with nothing but a section that keeps tables from being freed. The tables take all
//! of them at once; what the witness adds is that no install can slip behind a zap.
//!
//! | from the engine | on the entries |
//! |---|---|
//! | `map` | absent to leaf, or more permission for the same frame; a large leaf is split if only a part gains, by `split_around` where it must be broken first |
//! | `fast_fault` | more permission for a present leaf: loses to any zap, so needs no verdict |
//! | `zap` | leaf to absent; or write-protected, see `stage2/zap.rs` |
//! | `zap_slot` | the same, and tables that are within the slot are unlinked and freed |
//! | `replace_roots` | another root; what is below the old one goes, see `stage2/roots.rs` |
//! | `split_large`, `split_around`, `recover_large` | a large leaf to a table, and back |
//! | `recover_nx_huge_pages` | tables of blocks that were fetched from are unlinked and freed: see `stage2/nx.rs` |
//! | `age` | the mark away |
//!
//! A frame whose content is lost stays absent: every access of it faults, and the primary MMU says so again each time. A
//! vCPU whose hardware caches translations that forbid (Arm, RISC-V) forgets its own for the address when a fault on a
//! present entry is fixed, by anyone; on RISC-V on an absent one, too, since hardware without Svvptc may cache that nothing is there.

mod large;
mod nx;
mod roots;
mod size;
mod zap;

use self::nx::NxBlocks;
use self::zap::{Faults, Of};

use alloc::boxed::Box;
use core::fmt;
use core::num::NonZeroU32;

use afterimage_mmu::{
    Access, Age, Block, CachedMmio, FastFault, Fault, FaultKind, Found, Fresh, Gfn, GfnRange, MachineId,
    Mapped, Memslot, PageRef, PageSize, Pfn, Platform, Retired, SecondaryMmu, SlotError, SlotFlags, SlotSet,
    SpaceId, Walker, Walking, Young, Zap, ZapWalk,
};

use crate::format::{Execute, Format, Leaf, MemoryType, Writable};
use crate::memory::{TableCache, TableMemory};
use crate::mutation::{self, Mutation};
use crate::tables::{MapError, Tables};

/// What the tables run on.
pub trait Host: Send + Sync {
    /// Where the tables lie.
    type Memory: TableMemory;
    /// The services of the machine.
    type Platform: Platform;
    /// The primary MMU's pages.
    type Page: PageRef;

    /// Makes vCPU number `vcpu`, seen in guest mode, leave the guest. A vCPU in software looks for itself.
    fn kick(&self, _vcpu: usize) {}

    /// An invalidation has ended.
    fn invalidation_ended(&self) {}

    /// What [`PageRef::block`] says of the page at `pfn`, which is mapped: asked with `mmu_lock` held, while no invalidation
    /// of the frame is active, when frames that are mapped singly could be mapped by a larger page.
    fn block(&self, _pfn: Pfn) -> PageSize {
        PageSize::Size4K
    }

    /// A translation of `gfns` goes with its root, whose mark says that they were used since it was taken away. The pages stay.
    fn note_used(&self, _space: SpaceId, _gfns: GfnRange) {}

    /// Whether some frames of `gfns` are private and some shared, so that no one leaf may map them all. Asked under the
    /// witness: whoever changes an attribute does so within an invalidation of every block around it.
    fn is_mixed(&self, _space: SpaceId, _gfns: GfnRange) -> bool {
        false
    }
}

/// Whether a large page may be fetched from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LargeExecute {
    /// It may.
    #[default]
    Allowed,
    /// Never: a fetch maps its frame singly (for CPUs that a guest could stop otherwise; KVM: NX huge pages).
    Never,
}

/// What large pages are used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LargePages {
    /// The largest that is mapped as one, where slot and page allow it.
    pub largest: PageSize,
    /// Fetching from them.
    pub execute: LargeExecute,
}

impl LargePages {
    /// Up to `largest`, executable.
    pub const fn up_to(largest: PageSize) -> Self {
        Self { largest, execute: LargeExecute::Allowed }
    }
}

impl From<PageSize> for LargePages {
    fn from(largest: PageSize) -> Self {
        Self::up_to(largest)
    }
}

/// One virtual machine's stage-2 tables, in format `F`: for a [`GuestMmu`](afterimage_mmu::GuestMmu).
pub struct Stage2<F: Format, H: Host> {
    spaces: Box<[Tables<F, H::Memory>]>,
    machine: Option<MachineId>,
    large: LargePages,
    nx: NxBlocks,
    host: H,
}

impl<F: Format, H: Host> fmt::Debug for Stage2<F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage2")
            .field("spaces", &self.spaces)
            .field("large", &self.large)
            .finish_non_exhaustive()
    }
}

impl<F: Format, H: Host> Stage2<F, H> {
    /// Empty tables for `spaces` address spaces; `None` if there is no memory for their roots.
    pub fn new(host: H, memory: H::Memory, spaces: u16, large: impl Into<LargePages>) -> Option<Self> {
        let spaces = (0..spaces).map(|_| Tables::new(memory.clone())).collect::<Option<_>>()?;
        let large = large.into();
        let large = LargePages { largest: large.largest.min(F::LARGEST_LEAF), ..large };
        Some(Self { spaces, machine: None, large, nx: NxBlocks::new(large.execute), host })
    }

    /// The tables of address space `space`, as long as `walking` keeps what is linked in them from being freed.
    ///
    /// # Panics
    /// If `walking` belongs to another virtual machine.
    #[inline]
    pub fn tables<'w>(&'w self, space: SpaceId, walking: Walking<'w>) -> Option<&'w Tables<F, H::Memory>> {
        assert!(self.machine == Some(walking.machine()), "the right to walk another machine's tables");
        self.spaces.get(usize::from(space.0))
    }

    /// The first frame of the root of address space `space`, for the register that hardware walks from. To be asked when a
    /// vCPU's request to reload is served, of which each has one before it first enters the guest: any other time may be too early.
    pub fn root(&self, space: SpaceId) -> Option<Pfn> {
        self.spaces.get(usize::from(space.0)).map(Tables::root)
    }

    /// The host.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// Whether `fault` is a fetch for which no large page may be mapped.
    fn is_fetched_singly(&self, fault: &Fault) -> bool {
        self.large.execute == LargeExecute::Never && fault.access.contains(Access::EXEC)
    }

    /// What a large leaf allows of fetching, at most, unless the rule is switched off.
    fn most_executable(&self, rule: Mutation) -> Execute {
        match self.large.execute {
            LargeExecute::Never if !mutation::active(rule) => Execute::Never,
            LargeExecute::Never | LargeExecute::Allowed => Execute::Always,
        }
    }

    /// The leaf of `size` that answers `fault` with `page`.
    #[inline]
    fn leaf(&self, slot: &Memslot, fault: &Fault, page: &H::Page, size: PageSize) -> Leaf {
        Leaf {
            pfn: Pfn::new(page.pfn().as_u64() & !(size.frames() - 1)),
            size,
            writable: writable(slot, fault, page),
            execute: match size {
                PageSize::Size4K => Execute::Always,
                PageSize::Size2M | PageSize::Size1G => self.most_executable(Mutation::LargeExecutable),
            },
            memory: MemoryType::WriteBack,
            accessed: fault.kind == FaultKind::Demand,
        }
    }
}

/// What the fault asks of a leaf, and the page allows.
#[inline]
fn writable<R: PageRef>(slot: &Memslot, fault: &Fault, page: &R) -> Writable {
    if !page.is_writable() {
        Writable::Never
    } else if slot.flags.contains(SlotFlags::READ_ONLY) {
        Writable::HostOnly
    } else if fault.is_write() {
        Writable::Dirty
    } else if slot.flags.contains(SlotFlags::LOG_DIRTY) && !slot.flags.contains(SlotFlags::LOG_BY_MARKS) {
        Writable::Protected
    } else {
        Writable::Clean
    }
}

impl<F: Format, H: Host> SecondaryMmu for Stage2<F, H> {
    type Platform = H::Platform;
    type Page = H::Page;
    type Cache = TableCache<H::Memory>;
    type Error = MapError;

    const HAS_DIRTY_MARKS: bool = F::HAS_DIRTY;

    fn attach(&mut self, machine: MachineId) {
        self.machine = Some(machine);
    }

    fn check_slot(&self, slot: &Memslot) -> Result<(), SlotError> {
        let Memslot { id, space, .. } = *slot;
        let tables = self.spaces.get(usize::from(space.0)).ok_or(SlotError::NoTables { id, space })?;
        let gfns = slot.gfns();
        if tables.reach().covers(gfns) {
            Ok(())
        } else {
            Err(SlotError::BeyondTables { id, gfns, bits: F::GPA_BITS })
        }
    }

    #[inline]
    fn block(&self, slot: &Memslot, gfn: Gfn) -> Block {
        self.largest_block(slot, gfn)
    }

    fn fast_fault(&self, slot: &Memslot, fault: &Fault, walker: &mut Walker<'_, H::Platform>) -> FastFault {
        // Nothing to upgrade where nothing is; but a page that is hidden looks like that, too.
        if fault.kind == FaultKind::Prefetch || fault.found == Found::Absent && !F::HIDES_UNUSED {
            return FastFault::NotApplicable;
        }
        let section = walker.walk();
        let Some(tables) = self.tables(slot.space, section.walking()) else {
            return FastFault::NotApplicable;
        };
        let logs = slot.flags.contains(SlotFlags::LOG_DIRTY);
        let upgraded = tables.upgrade_present(fault.gfn, |leaf| {
            let writable = match leaf.writable {
                now if !fault.is_write() => now,
                // To be mapped singly first.
                _ if logs && leaf.size > PageSize::Size4K => return None,
                // The engine records it in the log.
                Writable::Clean | Writable::Dirty | Writable::Protected => Writable::Dirty,
                Writable::Never | Writable::HostOnly => return None,
            };
            if fault.access.contains(Access::EXEC) && leaf.execute != Execute::Always {
                return None;
            }
            Some(Leaf { writable, accessed: true, ..leaf })
        });
        match upgraded {
            Some(Mapped::Fixed) => FastFault::Fixed,
            Some(Mapped::Spurious) => FastFault::Spurious,
            Some(Mapped::LostRace | Mapped::LargerLeaf) | None => FastFault::NotApplicable,
        }
    }

    #[inline]
    fn top_up(&self, cache: &mut Self::Cache) -> bool {
        // Memory and depth are the same for every space.
        cache.len() >= Tables::<F, H::Memory>::MOST_LINKED
            || self.spaces.first().is_none_or(|tables| tables.top_up(cache))
    }

    #[inline]
    fn map(
        &self,
        fresh: Fresh<'_>,
        slot: &Memslot,
        fault: &Fault,
        page: &Self::Page,
        cache: &mut Self::Cache,
    ) -> Result<Mapped, MapError> {
        let tables = self.tables(slot.space, fresh.walking()).ok_or(MapError::NoSuchSpace(slot.space.0))?;
        let size = self.size(slot, fault, page, &fresh);
        if size > PageSize::Size4K && self.is_fetched_singly(fault) {
            let mapped = tables.map(fault.gfn, self.leaf(slot, fault, page, PageSize::Size4K), cache);
            if mapped == Ok(Mapped::Fixed) {
                self.nx.note(slot.space, fault.gfn, size);
            }
            return mapped;
        }
        tables.map(fault.gfn, self.leaf(slot, fault, page, size), cache)
    }

    fn poison(&self, _fresh: Fresh<'_>, slot: &Memslot, _gfn: Gfn) -> Result<Mapped, MapError> {
        // Absent is poisoned: see the module documentation.
        match self.root(slot.space) {
            Some(_) => Ok(Mapped::Fixed),
            None => Err(MapError::NoSuchSpace(slot.space.0)),
        }
    }

    fn zap(&self, slot: &Memslot, gfns: GfnRange, zap: Zap, walk: &mut ZapWalk<'_, Self>) {
        self.zap_leaves(slot, gfns, zap, walk);
    }

    fn zap_slot(&self, slot: &Memslot, walk: &mut ZapWalk<'_, Self>) {
        if slot.flags.contains(SlotFlags::LOG_DIRTY) {
            // A slot that moves takes its log with it.
            self.zap_leaves(slot, slot.gfns(), Zap::Unmap, walk);
        }
        let of = Of::Space(slot.space);
        self.zap_tables(&of, slot.gfns(), F::ROOT_LEVEL, Faults::Excluded, walk);
        // Leaves in tables that reach beyond the slot.
        self.zap_leaves(slot, slot.gfns(), Zap::Unmap, walk);
    }

    fn replace_roots(&self, slots: &SlotSet, walk: &mut ZapWalk<'_, Self>) -> bool {
        self.replace_each(slots, walk)
    }

    fn clean(
        &self,
        slot: &Memslot,
        gfns: GfnRange,
        walk: &mut ZapWalk<'_, Self>,
        written: &mut dyn FnMut(GfnRange),
    ) {
        self.clean_leaves(slot, gfns, walk, written);
    }

    fn split_large(&self, slot: &Memslot, gfns: GfnRange, walk: &mut ZapWalk<'_, Self>) -> bool {
        self.split_each(slot, gfns, walk)
    }

    fn split_around(
        &self,
        slot: &Memslot,
        gfn: Gfn,
        cache: &mut Self::Cache,
        walk: &mut ZapWalk<'_, Self>,
    ) -> Result<(), MapError> {
        self.split_down_to(slot, gfn, cache, walk)
    }

    fn recover_large(&self, slot: &Memslot, gfns: GfnRange, walk: &mut ZapWalk<'_, Self>) {
        self.collapse_each(slot, gfns, walk);
    }

    fn recover_nx_huge_pages<'s>(
        &self,
        ratio: NonZeroU32,
        slot_of: &dyn Fn(SpaceId, Gfn) -> Option<&'s Memslot>,
        walk: &mut ZapWalk<'_, Self>,
    ) -> u64 {
        self.recover_nx_blocks(ratio, slot_of, walk)
    }

    fn free_tables(&self, tables: Retired<Self>) {
        self.free_retired(&tables);
    }

    fn kick(&self, vcpu: usize) {
        self.host.kick(vcpu);
    }

    fn age(&self, slot: &Memslot, gfns: GfnRange, age: Age, walking: Walking<'_>) -> Young {
        match self.tables(slot.space, walking) {
            Some(tables) if tables.age(gfns, age) => Young::Yes,
            Some(_) => Young::No,
            None => Young::Unknown,
        }
    }

    fn cached_mmio(&self, space: SpaceId, gfn: Gfn, walker: &mut Walker<'_, H::Platform>) -> CachedMmio {
        let section = walker.walk();
        self.tables(space, section.walking()).map_or(CachedMmio::Gone, |tables| tables.cached_mmio(gfn))
    }

    fn cache_mmio(
        &self,
        space: SpaceId,
        gfn: Gfn,
        generation: u64,
        cache: &mut Self::Cache,
        walking: Walking<'_>,
    ) {
        if let Some(tables) = self.tables(space, walking) {
            // What cannot be cached is looked up each time.
            let _ = tables.cache_mmio(gfn, generation, cache);
        }
    }

    fn invalidation_ended(&self) {
        self.host.invalidation_ended();
    }
}
