//! An install with everything around it: snapshot, hint, witness, verdict, and the walker's protection.

use std::hint::black_box;

use afterimage_mmu::{
    Access, Barrier, FRAME_BYTES, Fault, FaultKind, Found, Gfn, GfnRange, GuestMmu, Hva, Memslot, MmuLock,
    PageRef, PageSize, PageUse, Pfn, Policy, Privacy, SecondaryMmu, SlotId, SpaceId, WitnessKind,
};
use afterimage_stage2::{HeapMemory, Host, Npt4, Stage2, TableCache, Tables};
use afterimage_uffd::Linux;

use crate::{FRAMES, leaf, until_fixed};

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
    type Memory = HeapMemory;
    type Platform = Linux;
    type Page = Number;
}

/// A machine with intents.
pub(crate) struct Whole {
    mmu: GuestMmu<Stage2<Npt4, Bench>>,
    slot: Memslot,
}

impl Whole {
    pub(crate) fn new(barrier: Barrier) -> Self {
        let stage2 =
            Stage2::new(Bench, HeapMemory::default(), 1, PageSize::Size4K).expect("the heap has room");
        let policy = Policy { witness: WitnessKind::Intent, barrier, ..Policy::default() };
        let mmu = GuestMmu::new(stage2, policy);
        let slot = Memslot::new(SlotId(0), Gfn::new(0), FRAMES, Hva::new(FRAME_BYTES));
        mmu.create_slot(slot).expect("there is no other");
        Self { mmu, slot }
    }

    /// One vCPU's way to map.
    pub(crate) fn mapper(&self) -> impl FnMut(u64, u64) {
        let Self { mmu, slot } = self;
        let mut vcpu = mmu.vcpu();
        let mut cache = TableCache::default();
        let tables = mmu.secondary();
        move |gfn, pfn| {
            let gfn = black_box(Gfn::new(gfn));
            let fault = Fault {
                space: SpaceId(0),
                gfn,
                access: Access::WRITE,
                kind: FaultKind::Demand,
                found: Found::Absent,
                privacy: Privacy::Shared,
            };
            until_fixed(|| {
                assert!(tables.top_up(&mut cache));
                let block = tables.block(slot, gfn);
                let since = mmu.invalidations().snapshot_of(block);
                assert!(mmu.hint(since, block).is_none());
                let page = Number(Pfn::new(pfn));
                let intent = vcpu.announce(block);
                let fresh = mmu.invalidations().verify(&intent, since, block).expect("nobody invalidates");
                tables.map(fresh, slot, &fault, &page, &mut cache)
            });
        }
    }
}

/// The same with `mmu_lock` for a witness.
pub(crate) struct Locked {
    lock: MmuLock<Linux>,
    tables: Tables<Npt4, HeapMemory>,
}

impl Locked {
    pub(crate) fn new() -> Self {
        Self { lock: MmuLock::new(), tables: Tables::new(HeapMemory::default()).expect("the heap has room") }
    }

    pub(crate) fn mapper(&self) -> impl FnMut(u64, u64) {
        let Self { lock, tables } = self;
        let words = lock.invalidations();
        let mut cache = TableCache::default();
        move |gfn, pfn| {
            let gfn = black_box(Gfn::new(gfn));
            until_fixed(|| {
                assert!(tables.top_up(&mut cache));
                let block = GfnRange::frame(gfn);
                let since = words.snapshot_of(block);
                assert!(words.hint(since, block).is_none());
                let witness = lock.read();
                let fresh = words.verify(&witness, since, block).expect("nobody invalidates");
                let mapped = tables.map(gfn, leaf(pfn), &mut cache);
                drop(fresh);
                mapped
            });
        }
    }
}
