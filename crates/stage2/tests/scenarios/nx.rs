//! Large pages that are never executable: what was fetched from is mapped singly, and large again after a recovery.

use core::num::NonZeroU32;

use afterimage_mmu::{
    Access, Blocking, FaultOutcome, Gfn, GfnRange, Initially, LogBy, Mapped, PageSize, Pfn, SlotId, SpaceId,
    WitnessKind, Zap,
};
use afterimage_stage2::{
    Entry, Execute, Format, HeapMemory, LargeExecute, LargePages, Leaf, MemoryType, TableCache, Tables,
    Translation, Writable,
};

use super::faults;
use crate::support::*;

const BLOCK: u64 = 512;
const HOME: SpaceId = SpaceId(0);
const SLOT: SlotId = SlotId(0);
const EVERY: NonZeroU32 = NonZeroU32::MIN;

/// A machine with `blocks` blocks from frame 512 on, of which no large page is executable.
fn never<F: Format>(blocks: u64, witness: WitnessKind) -> (Mmu<F>, HeapMemory) {
    let host = Tests { block: PageSize::Size2M, mixed: GfnRange::new(Gfn::new(0), Gfn::new(0)) };
    let large = LargePages { largest: PageSize::Size2M, execute: LargeExecute::Never };
    machine_with::<F>(blocks * BLOCK, host, large, witness)
}

fn size<F: Format>(mmu: &Mmu<F>, gfn: u64) -> Option<PageSize> {
    leaf_of(mmu, gfn).map(|leaf| leaf.size)
}

/// Reads a frame, for which a large page is mapped, and fetches from it.
#[track_caller]
fn split_by_fetch<F: Format>(vcpu: &mut Vcpu<'_, F>, ram: &std::sync::Arc<Ram>, gfn: u64) {
    assert_eq!(fault(vcpu, ram, gfn, Access::READ), FaultOutcome::Fixed);
    assert_eq!(size(vcpu.mmu(), gfn), Some(PageSize::Size2M));
    assert_eq!(split_and_fault(vcpu, ram, gfn, Access::EXEC), FaultOutcome::Fixed);
    assert_eq!(size(vcpu.mmu(), gfn), Some(PageSize::Size4K));
}

type Vcpu<'m, F> = afterimage_mmu::Vcpu<'m, afterimage_stage2::Stage2<F, Tests>>;

/// One in so many blocks goes, with its table, flushed; the next access maps a large page again.
pub(crate) fn recovered<F: Format>() {
    for witness in [WitnessKind::Lock, WitnessKind::Intent] {
        let (mmu, memory) = never::<F>(4, witness);
        let ram = Ram::in_blocks(4 * BLOCK, 0, PageSize::Size2M);
        let mut vcpu = mmu.vcpu();
        assert_eq!(fault(&mut vcpu, &ram, 4 * BLOCK + 1, Access::READ), FaultOutcome::Fixed);
        let pages = memory.pages();
        for block in 1..4 {
            split_by_fetch(&mut vcpu, &ram, block * BLOCK + 9);
            // Another one of the same block is no other block.
            assert_eq!(forbidden(&mut vcpu, &ram, block * BLOCK + 10, Access::EXEC), FaultOutcome::Fixed);
        }
        assert_eq!(mmu.secondary().nx_blocks(), 3);
        let two = NonZeroU32::new(2).expect("two is not zero");
        let flushes = mmu.invalidation_stats().flushes;
        assert_eq!(mmu.recover_nx_huge_pages(two), 2, "a half of three, rounded up");
        assert!(mmu.invalidation_stats().flushes > flushes, "CPUs forget what they may fetch from");
        assert_eq!([1, 2, 3].map(|block| size(&mmu, block * BLOCK + 9)).iter().flatten().count(), 1);
        assert_eq!(mmu.secondary().nx_blocks(), 1);
        assert_eq!([two, two].map(|ratio| mmu.recover_nx_huge_pages(ratio)), [1, 0]);
        assert_eq!(size(&mmu, 4 * BLOCK + 1), Some(PageSize::Size2M), "nobody fetched from it");
        drop(vcpu);
        assert!(memory.pages() <= pages, "three tables were freed");
        let mut vcpu = mmu.vcpu();
        for block in 1..4 {
            assert_eq!(fault(&mut vcpu, &ram, block * BLOCK + 9, Access::WRITE), FaultOutcome::Fixed);
            let leaf = leaf_of(&mmu, block * BLOCK).map(|leaf| (leaf.size, leaf.execute));
            assert_eq!(leaf, Some((PageSize::Size2M, Execute::Never)));
        }
    }
}

/// A block stays while its slot is logged: what was written is not lost, and it would be mapped singly again. It goes when
/// logging is over.
pub(crate) fn logged_blocks_stay<F: Format>() {
    let (mmu, _) = never::<F>(1, WitnessKind::Intent);
    let ram = Ram::in_blocks(BLOCK, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    split_by_fetch(&mut vcpu, &ram, BLOCK + 9);
    let by = if F::HAS_DIRTY { LogBy::Marks } else { LogBy::Protection };
    mmu.start_dirty_log(HOME, SLOT, by, Initially::Clean).expect("the slot exists");
    assert_eq!(forbidden(&mut vcpu, &ram, BLOCK + 9, Access::WRITE), FaultOutcome::FixedFast);
    assert_eq!(mmu.take_dirty_log(HOME, SLOT).expect("it is logged")[0], 1 << 9);
    // Hardware's mark, where there is one: known to the entry alone.
    if translate(&mmu, BLOCK + 9, Access::WRITE) != Translation::Frame(Pfn::new(9)) {
        assert_eq!(forbidden(&mut vcpu, &ram, BLOCK + 9, Access::WRITE), FaultOutcome::FixedFast);
    }
    let recovered = mmu.recover_nx_huge_pages(EVERY);
    assert_eq!(mmu.take_dirty_log(HOME, SLOT).expect("it is logged")[0], 1 << 9);
    assert_eq!((recovered, mmu.secondary().nx_blocks()), (0, 1));
    mmu.set_dirty_logging(HOME, SLOT, false).expect("the slot exists");
    assert_eq!((mmu.recover_nx_huge_pages(EVERY), size(&mmu, BLOCK + 9)), (1, None));
}

/// What is in no slot any more, or has become large by itself, is forgotten.
pub(crate) fn gone_blocks<F: Format>() {
    let (mmu, _) = never::<F>(1, WitnessKind::Lock);
    let ram = Ram::in_blocks(BLOCK, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    split_by_fetch(&mut vcpu, &ram, BLOCK + 9);
    for gfn in BLOCK..2 * BLOCK {
        assert!(matches!(
            fault(&mut vcpu, &ram, gfn, Access::EXEC),
            FaultOutcome::Fixed | FaultOutcome::Spurious
        ));
    }
    mmu.recover_large_pages(HOME, SLOT).expect("the slot exists");
    let large = leaf_of(&mmu, BLOCK);
    assert_eq!(large.map(|leaf| (leaf.size, leaf.execute)), Some((PageSize::Size2M, Execute::Never)));
    mmu.recover_nx_huge_pages(EVERY);
    assert_eq!((leaf_of(&mmu, BLOCK), mmu.secondary().nx_blocks()), (large, 0));
    assert_eq!(split_and_fault(&mut vcpu, &ram, BLOCK + 9, Access::EXEC), FaultOutcome::Fixed);
    mmu.delete_slot(HOME, SLOT).expect("the slot exists");
    assert_eq!((mmu.recover_nx_huge_pages(EVERY), mmu.secondary().nx_blocks()), (0, 0));
}

/// vCPUs read, write and fetch while blocks are recovered and invalidated, by either witness.
pub(crate) fn recovered_under_fire<F: Format>() {
    const BLOCKS: u64 = 2;
    const TURNS: u64 = 150;
    for witness in [WitnessKind::Lock, WitnessKind::Intent] {
        let (mmu, _) = never::<F>(BLOCKS, witness);
        let ram = Ram::in_blocks(BLOCKS * BLOCK, 0, PageSize::Size2M);
        let race = Race::default();
        let mut recovered = 0;
        std::thread::scope(|scope| {
            for seed in [1, 2] {
                let (mmu, ram, race) = (&mmu, &ram, &race);
                scope.spawn(move || faults::run(mmu, ram, BLOCKS * BLOCK, seed, race));
            }
            let _stop = Stop(&race);
            for turn in 0..TURNS {
                race.let_them_run();
                recovered += mmu.recover_nx_huge_pages(EVERY);
                if turn % 8 == 7 {
                    let page = turn * 7 % (BLOCKS * BLOCK);
                    drop(mmu.invalidate(hvas(page, page + 1), Zap::Unmap, Blocking::Allowed));
                }
            }
        });
        assert!(recovered > 0, "they fetch, too");
        let large = seen_leaves(&mmu, BLOCKS).filter(|leaf| leaf.size > PageSize::Size4K);
        assert!(large.into_iter().all(|leaf| leaf.execute == Execute::Never));
    }
}

fn seen_leaves<F: Format>(mmu: &Mmu<F>, blocks: u64) -> impl Iterator<Item = Leaf> {
    (BLOCK..(blocks + 1) * BLOCK).filter_map(|gfn| leaf_of(mmu, gfn))
}

/// While CPUs are made to forget a table's leaves, nobody installs a large page in its place.
pub(crate) fn a_removal_breaks_first<F: Format>() {
    let tables = Tables::<F, _>::new(HeapMemory::default()).expect("the heap has room");
    let [mut cache, mut others] = [(); 2].map(|()| TableCache::default());
    assert!(tables.top_up(&mut cache) && tables.top_up(&mut others));
    let (gfn, small) = (Gfn::new(5), PageSize::Size4K);
    let leaf = |pfn, size| Leaf {
        pfn: Pfn::new(pfn),
        size,
        writable: Writable::Dirty,
        execute: Execute::Never,
        memory: MemoryType::WriteBack,
        accessed: true,
    };
    assert_eq!(tables.map(gfn, leaf(0x205, small), &mut cache), Ok(Mapped::Fixed));
    let mut flushed = false;
    let removed = tables.unlink(gfn, small.level(), |gfns| {
        assert_eq!(gfns, gfn.block(PageSize::Size2M));
        assert_eq!(tables.map(gfn, leaf(0x200, PageSize::Size2M), &mut others), Ok(Mapped::LostRace));
        flushed = true;
    });
    assert!(flushed && removed.is_some_and(|removed| removed.table.is_some() && removed.frames == 1));
    assert_eq!(tables.walk(gfn).entry, Entry::Absent);
    assert_eq!(tables.map(gfn, leaf(0x200, PageSize::Size2M), &mut others), Ok(Mapped::Fixed));
}
