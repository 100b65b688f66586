//! The tables as the engine's secondary MMU: what a fault installs, what an invalidation takes away.
//!
//! # What protects what
//!
//! The engine calls `map` with a verdict that its witness keeps true, `zap` and `flush` with `mmu_lock` held for write,
//! `fast_fault` and `age` with nothing. The tables take all of them at once; what the witness adds is that no install
//! can slip behind a zap.
//!
//! | from the engine | on the entries |
//! |---|---|
//! | `map` | absent to leaf, or more permission for the same frame |
//! | `fast_fault` | more permission for a present leaf: loses to any zap, so needs no verdict |
//! | `zap`, unmap | leaf to absent; the engine flushes before it gives up the lock |
//! | `zap`, write-protect | a 4 KiB leaf to `Never`, so that the next write asks the primary MMU; a large leaf to absent, so that its frames come back singly where writes are logged |
//! | `age` | the mark away |
//!
//! A frame whose content is lost stays absent: every access of it faults, and the primary MMU says so again each time. A
//! vCPU whose hardware caches translations that forbid (Arm, RISC-V) forgets its own for the address when a fault on a
//! present entry is fixed, by anyone.

use alloc::boxed::Box;
use core::fmt;

use afterimage_mmu::{
    Access, Age, FRAME_BYTES, FastFault, Fault, FaultKind, Fresh, Gfn, GfnRange, Mapped, Memslot, PageRef,
    PageSize, Pfn, Platform, SecondaryMmu, SlotFlags, Walk, Walker, Walking, Young, Zap, ZapWalk, Zapped,
};

use crate::format::{Execute, Format, Leaf, MemoryType, Writable};
use crate::leaves::Step;
use crate::memory::{TableCache, TableMemory};
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
}

/// One virtual machine's stage-2 tables, in format `F`: for a [`GuestMmu`](afterimage_mmu::GuestMmu).
pub struct Stage2<F: Format, H: Host> {
    spaces: Box<[Tables<F, H::Memory>]>,
    backing: PageSize,
    host: H,
}

impl<F: Format, H: Host> fmt::Debug for Stage2<F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage2")
            .field("spaces", &self.spaces)
            .field("backing", &self.backing)
            .finish_non_exhaustive()
    }
}

impl<F: Format, H: Host> Stage2<F, H> {
    /// Empty tables for `spaces` address spaces; `None` if there is no memory for their roots.
    ///
    /// `backing` is a promise of the primary MMU: an aligned block of that size, where its frame is congruent to its
    /// address, is contiguous, as writable as its page that faulted, and invalidated as a whole. `Size4K` promises nothing.
    pub fn new(host: H, memory: H::Memory, spaces: u16, backing: PageSize) -> Option<Self> {
        let spaces = (0..spaces).map(|_| Tables::new(memory.clone())).collect::<Option<_>>()?;
        Some(Self { spaces, backing: backing.min(F::LARGEST_LEAF), host })
    }

    /// The tables of address space `space`.
    pub fn tables(&self, space: afterimage_mmu::SpaceId) -> Option<&Tables<F, H::Memory>> {
        self.spaces.get(usize::from(space.0))
    }

    /// The host.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// The size of an aligned block that a slot's frames have, from the largest that may be mapped at once.
    fn sizes(&self, slot: &Memslot) -> impl Iterator<Item = PageSize> + use<F, H> {
        let largest = if slot.flags.contains(SlotFlags::LOG_DIRTY) { PageSize::Size4K } else { self.backing };
        [PageSize::Size1G, PageSize::Size2M].into_iter().filter(move |size| *size <= largest)
    }
}

/// What the fault asks of a leaf, and the page allows.
fn writable<R: PageRef>(slot: &Memslot, fault: &Fault, page: &R) -> Writable {
    if !page.is_writable() {
        Writable::Never
    } else if slot.flags.contains(SlotFlags::READ_ONLY) {
        Writable::HostOnly
    } else if fault.is_write() {
        Writable::Dirty
    } else if slot.flags.contains(SlotFlags::LOG_DIRTY) {
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

    fn block(&self, slot: &Memslot, gfn: Gfn) -> GfnRange {
        self.sizes(slot)
            .map(|size| (size, gfn.block(size)))
            .find(|(size, block)| {
                slot.gfns().covers(*block)
                    && slot.hva_of(block.start).as_u64().is_multiple_of(size.frames() * FRAME_BYTES)
            })
            .map_or(GfnRange::frame(gfn), |(_, block)| block)
    }

    fn fast_fault(&self, slot: &Memslot, fault: &Fault, walker: &mut Walker<'_, H::Platform>) -> FastFault {
        let Some(tables) = self.tables(slot.space) else { return FastFault::NotApplicable };
        if fault.kind == FaultKind::Prefetch {
            return FastFault::NotApplicable;
        }
        let _section = walker.walk();
        let upgraded = tables.upgrade_present(fault.gfn, |leaf| {
            let writable = match leaf.writable {
                now if !fault.is_write() => now,
                Writable::Clean | Writable::Dirty => Writable::Dirty,
                // To be recorded in the log first.
                Writable::Protected if slot.flags.contains(SlotFlags::LOG_DIRTY) => return None,
                Writable::Protected => Writable::Dirty,
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
            Some(Mapped::LostRace) | None => FastFault::NotApplicable,
        }
    }

    #[inline]
    fn top_up(&self, cache: &mut Self::Cache) -> bool {
        // Memory and depth are the same for every space.
        self.spaces.first().is_none_or(|tables| tables.top_up(cache))
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
        let tables = self.tables(slot.space).ok_or(MapError::NoSuchSpace(slot.space.0))?;
        let gfn = fault.gfn;
        let size = self
            .sizes(slot)
            .find(|size| {
                fresh.range().covers(gfn.block(*size))
                    && (page.pfn().as_u64() ^ gfn.as_u64()) & (size.frames() - 1) == 0
            })
            .unwrap_or(PageSize::Size4K);
        let leaf = Leaf {
            pfn: Pfn::new(page.pfn().as_u64() & !(size.frames() - 1)),
            size,
            writable: writable(slot, fault, page),
            execute: Execute::Always,
            memory: MemoryType::WriteBack,
            accessed: fault.kind == FaultKind::Demand,
        };
        tables.map(gfn, leaf, cache)
    }

    fn poison(&self, _fresh: Fresh<'_>, slot: &Memslot) -> Result<Mapped, MapError> {
        // Absent is poisoned: see the module documentation.
        match self.tables(slot.space) {
            Some(_) => Ok(Mapped::Fixed),
            None => Err(MapError::NoSuchSpace(slot.space.0)),
        }
    }

    fn zap(&self, slot: &Memslot, gfns: GfnRange, zap: Zap, walk: &mut ZapWalk<'_, Self>) {
        let Some(tables) = self.tables(slot.space) else { return };
        let mut left = gfns;
        'again: loop {
            for step in tables.leaves(left) {
                let (done, zapped) = match step {
                    Step::Gap(gap) => (gap, Zapped::Nothing),
                    Step::Leaf(leaf) => {
                        let unmapped = zap == Zap::Unmap || leaf.gfns().len() > 1;
                        let before =
                            if unmapped { leaf.take_away() } else { leaf.write_protect(Writable::Never) };
                        // What could not be written before is as no CPU can write it: that was flushed under the lock.
                        let frames = before
                            .filter(|leaf| unmapped || leaf.writable.is_allowed())
                            .map(|leaf| leaf.size.frames());
                        (leaf.gfns(), frames.map_or(Zapped::Nothing, Zapped::Unflushed))
                    }
                };
                left.start = done.end;
                match walk.step(done, zapped) {
                    Walk::GoOn => {}
                    Walk::Restart => continue 'again,
                }
            }
            return;
        }
    }

    fn kick(&self, vcpu: usize) {
        self.host.kick(vcpu);
    }

    fn age(&self, slot: &Memslot, gfns: GfnRange, age: Age, _walking: Walking<'_>) -> Young {
        match self.tables(slot.space) {
            Some(tables) if tables.age(gfns, age) => Young::Yes,
            Some(_) => Young::No,
            None => Young::Unknown,
        }
    }

    fn invalidation_ended(&self) {
        self.host.invalidation_ended();
    }
}
