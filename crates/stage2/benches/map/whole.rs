//! An install with everything around it: snapshot, hint, witness, verdict, and the walker's protection.

use afterimage_mmu::{
    Access, Barrier, Block, FRAME_BYTES, Fault, FaultKind, Found, Gfn, GuestMmu, Hva, Mapped, Memslot,
    MmuLock, PageRef, PageSize, PageUse, Pfn, Policy, Privacy, SecondaryMmu, SlotId, SpaceId, Vcpu,
    Witness as _, WitnessKind,
};
use afterimage_stage2::{Host, MapError, Npt4, Stage2, TableCache, Tables};
use afterimage_uffd::Linux;

use crate::pool::Pool;
use crate::{FRAMES, Install, Map, leaf};

/// A page without a count.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Number(Pfn);

impl PageRef for Number {
    fn pfn(&self) -> Pfn {
        self.0
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn release(self, _used: PageUse) {}
}

#[derive(Debug)]
pub(crate) struct Bench;

impl Host for Bench {
    type Memory = Pool;
    type Platform = Linux;
    type Page = Number;
}

/// A machine with intents.
pub(crate) struct Whole {
    mmu: GuestMmu<Machine>,
    slot: Memslot,
}

impl Whole {
    pub(crate) fn new(barrier: Barrier) -> Self {
        let stage2 = Stage2::new(Bench, Pool::new(), 1, PageSize::Size4K).expect("the pool was just made");
        let policy = Policy { witness: WitnessKind::Intent, barrier, ..Policy::default() };
        let mmu = GuestMmu::new(stage2, policy);
        let slot = Memslot::new(SlotId(0), Gfn::new(0), FRAMES, Hva::new(FRAME_BYTES));
        mmu.create_slot(slot).expect("there is no other");
        Self { mmu, slot }
    }

    /// One vCPU's way to map.
    pub(crate) fn mapper(&self) -> impl Map {
        Mapper { slot: &self.slot, vcpu: self.mmu.vcpu(), cache: TableCache::default() }
    }
}

type Machine = Stage2<Npt4, Bench>;

struct Mapper<'w> {
    slot: &'w Memslot,
    vcpu: Vcpu<'w, Machine>,
    cache: TableCache<Pool>,
}

impl Install for Mapper<'_> {
    #[inline]
    fn install(&mut self, gfn: Gfn, pfn: Pfn) -> Result<Mapped, MapError> {
        let Self { slot, vcpu, cache } = self;
        let mmu = vcpu.mmu();
        let fault = Fault {
            space: SpaceId(0),
            gfn,
            access: Access::WRITE,
            kind: FaultKind::Demand,
            found: Found::Absent,
            privacy: Privacy::Shared,
        };
        let tables = mmu.secondary();
        assert!(tables.top_up(cache));
        let block = tables.block(slot, gfn);
        let since = mmu.invalidations().snapshot(block);
        assert!(since.hint().is_none());
        let intent = vcpu.announce(block);
        let fresh = intent.verify(since).expect("nobody invalidates");
        tables.map(fresh, slot, &fault, &Number(pfn), cache)
    }
}

/// The same with `mmu_lock` for a witness.
pub(crate) struct Locked {
    lock: MmuLock<Linux>,
    tables: Tables<Npt4, Pool>,
}

impl Locked {
    pub(crate) fn new() -> Self {
        Self { lock: MmuLock::new(), tables: Tables::new(Pool::new()).expect("the pool was just made") }
    }

    pub(crate) fn mapper(&self) -> impl Map {
        LockedMapper { locked: self, cache: TableCache::default() }
    }
}

struct LockedMapper<'l> {
    locked: &'l Locked,
    cache: TableCache<Pool>,
}

impl Install for LockedMapper<'_> {
    #[inline]
    fn install(&mut self, gfn: Gfn, pfn: Pfn) -> Result<Mapped, MapError> {
        let Self { locked: Locked { lock, tables }, cache } = self;
        let words = lock.invalidations();
        assert!(tables.top_up(cache));
        let block = Block::frame(gfn);
        let since = words.snapshot(block);
        assert!(since.hint().is_none());
        let witness = lock.read();
        let fresh = witness.verify(since).expect("nobody invalidates");
        let mapped = tables.map(gfn, leaf(pfn), cache);
        drop(fresh);
        mapped
    }
}
