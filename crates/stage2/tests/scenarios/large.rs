//! Large pages: which are mapped, split and recovered, and the tables that come and go with them.

use afterimage_mmu::{
    Access, Blocking, FaultOutcome, Flush, Found, Gfn, GfnRange, PageSize, Pfn, PfnRange, Requests, SlotId,
    SpaceId, Vcpu, WitnessKind, Zap,
};
use afterimage_stage2::{
    Entry, Execute, Format, HeapMemory, LargeExecute, LargePages, Translation, Writable,
};

use crate::support::platform::until_it_waits;
use crate::support::*;

pub(crate) fn huge_pages<F: Format>() {
    let (mmu, _) = machine::<F>(1024 + 8, PageSize::Size2M);
    let ram = Ram::in_blocks(1024 + 8, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    assert_eq!(fault(&mut vcpu, &ram, 700, Access::READ), FaultOutcome::Fixed);
    assert_eq!(leaf_of(&mmu, 1023).map(|leaf| (leaf.pfn, leaf.size)), Some((Pfn::new(0), PageSize::Size2M)));
    // The slot ends within the third block.
    assert_eq!(fault(&mut vcpu, &ram, 1537, Access::READ), FaultOutcome::Fixed);
    assert_eq!(leaf_of(&mmu, 1537).map(|leaf| leaf.size), Some(PageSize::Size4K));
    assert_eq!(leaf_of(&mmu, 1538), None);

    // One frame of a block goes, and the block with it.
    drop(mmu.invalidate(hvas(100, 101), Zap::Unmap, Blocking::Allowed));
    assert_eq!(leaf_of(&mmu, 1023), None);
    assert_eq!(fault(&mut vcpu, &ram, 700, Access::WRITE), FaultOutcome::Fixed);
    assert_eq!(leaf_of(&mmu, 700).map(|leaf| leaf.size), Some(PageSize::Size2M));

    // Dirty logging: each first write faults, and is for its frame alone.
    mmu.set_dirty_logging(SpaceId(0), SlotId(0), true).expect("the slot exists");
    let logged = leaf_of(&mmu, 700).map(|leaf| (leaf.size, leaf.writable));
    assert_eq!(logged, Some((PageSize::Size2M, Writable::Protected)));
    let written = split_and_fault(&mut vcpu, &ram, 700, Access::WRITE);
    // What was split first is there, and needs the permission alone.
    assert_eq!(written, if F::BREAK_BEFORE_MAKE { FaultOutcome::FixedFast } else { FaultOutcome::Fixed });
    assert_eq!(translate(&mmu, 700, Access::WRITE), Translation::Frame(Pfn::new(188)));
    assert!(matches!(
        fault(&mut vcpu, &ram, 701, Access::READ),
        FaultOutcome::Fixed | FaultOutcome::Spurious
    ));
    let protected = leaf_of(&mmu, 701).map(|leaf| (leaf.size, leaf.writable));
    assert_eq!(protected, Some((PageSize::Size4K, Writable::Protected)));
    assert_eq!(translate(&mmu, 701, Access::WRITE), Translation::Fault(Found::Present));
    assert_eq!(forbidden(&mut vcpu, &ram, 701, Access::WRITE), FaultOutcome::FixedFast);
    assert_eq!(leaf_of(&mmu, 701).map(|leaf| leaf.writable), Some(Writable::Dirty));
    let _ = fault(&mut vcpu, &ram, 702, Access::READ);

    // Logging is over; where frames are mapped singly they stay so, and gain their permission without the lock.
    mmu.set_dirty_logging(SpaceId(0), SlotId(0), false).expect("the slot exists");
    assert_eq!(forbidden(&mut vcpu, &ram, 702, Access::WRITE), FaultOutcome::FixedFast);
    let single = leaf_of(&mmu, 702).map(|leaf| (leaf.pfn, leaf.size));
    assert_eq!(single, Some((Pfn::new(190), PageSize::Size4K)));
}

/// What everyone sees of the frames `[512, 512 + frames)` of space 0: the frame behind each, and whether it may be written.
pub(crate) fn seen<F: Format>(mmu: &Mmu<F>, frames: u64) -> Vec<Option<(Pfn, bool)>> {
    look(mmu, &mut mmu.vcpu(), |tables| {
        let see = |gfn| match tables.walk(Gfn::new(gfn)).entry {
            Entry::Leaf(leaf) => Some((leaf.pfn_of(Gfn::new(gfn)), leaf.writable.is_allowed())),
            _ => None,
        };
        (512..512 + frames).map(see).collect()
    })
}

/// Pages are split ahead of time, and recovered, without anyone noticing; the tables come and go.
pub(crate) fn split_and_recover<F: Format>() {
    const FRAMES: u64 = 4 * 512;
    let (mmu, memory) = machine::<F>(FRAMES, PageSize::Size2M);
    let ram = Ram::in_blocks(FRAMES, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    for (block, access) in [(0, Access::WRITE), (1, Access::READ), (2, Access::WRITE)] {
        assert_eq!(fault(&mut vcpu, &ram, 512 + block * 512 + 7, access), FaultOutcome::Fixed);
    }
    let (before, pages) = (seen(&mmu, FRAMES), memory.pages());
    let flushes = mmu.invalidation_stats().flushes;
    mmu.split_large_pages(SpaceId(0), SlotId(0)).expect("the heap has room");
    assert_eq!(seen(&mmu, FRAMES), before);
    assert_eq!(leaf_of(&mmu, 512 + 700).map(|leaf| leaf.size), Some(PageSize::Size4K));
    assert_eq!(memory.pages(), pages + 3, "one table for each");
    let needed = if F::BREAK_BEFORE_MAKE { 3 } else { 0 };
    assert_eq!(mmu.invalidation_stats().flushes - flushes, needed, "the guest goes on as it was");

    // A block of which one frame may be written no more keeps its table; so does one that an invalidation is at, which
    // may yet announce that the block is one no longer.
    let sizes = |sizes: [PageSize; 3]| {
        let found = [0, 1, 2].map(|block| leaf_of(&mmu, 512 + block * 512 + 9).map(|leaf| leaf.size));
        assert_eq!(found, sizes.map(Some));
    };
    drop(mmu.invalidate(hvas(512 + 3, 512 + 4), Zap::WriteProtect, Blocking::Allowed));
    let invalidation = mmu.invalidate(hvas(1024, 1536), Zap::WriteProtect, Blocking::Allowed);
    let before = seen(&mmu, FRAMES);
    CHANGING.set(Some(PfnRange::new(Pfn::new(1024), Pfn::new(1536))));
    mmu.recover_large_pages(SpaceId(0), SlotId(0)).expect("the slot exists");
    CHANGING.set(None);
    sizes([PageSize::Size2M, PageSize::Size4K, PageSize::Size4K]);
    drop(invalidation);
    mmu.recover_large_pages(SpaceId(0), SlotId(0)).expect("the slot exists");
    sizes([PageSize::Size2M, PageSize::Size4K, PageSize::Size2M]);
    assert_eq!(seen(&mmu, FRAMES), before);
    assert_eq!(
        leaf_of(&mmu, 512).map(|leaf| leaf.writable),
        Some(Writable::Dirty),
        "written, and known to be"
    );
    assert_eq!(memory.pages(), pages + 1, "two tables came back");

    mmu.delete_slot(SpaceId(0), SlotId(0)).expect("the slot exists");
    assert_eq!(seen(&mmu, FRAMES), vec![None; FRAMES as usize]);
    assert_eq!(memory.pages(), pages, "what was in the slot alone is freed");
}

/// A block of which some frames are private and some shared is mapped frame by frame.
pub(crate) fn mixed_blocks<F: Format>() {
    let mixed = GfnRange::new(Gfn::new(1030), Gfn::new(1031));
    let host = Tests { block: PageSize::Size2M, mixed };
    let large = LargePages::up_to(PageSize::Size2M);
    let (mmu, _) = machine_with::<F>(3 * 512, host, large, WitnessKind::Lock);
    let ram = Ram::in_blocks(3 * 512, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    for gfn in [600, 1100, 1600] {
        assert_eq!(fault(&mut vcpu, &ram, gfn, Access::READ), FaultOutcome::Fixed);
    }
    let sizes = [600, 1100, 1600].map(|gfn| leaf_of(&mmu, gfn).map(|leaf| leaf.size));
    assert_eq!(sizes, [PageSize::Size2M, PageSize::Size4K, PageSize::Size2M].map(Some));
    // Filled frame by frame it stays so, however alike they are.
    for gfn in 1024..1536 {
        let _ = fault(&mut vcpu, &ram, gfn, Access::READ);
    }
    mmu.recover_large_pages(SpaceId(0), SlotId(0)).expect("the slot exists");
    assert_eq!(leaf_of(&mmu, 1100).map(|leaf| leaf.size), Some(PageSize::Size4K));
}

/// Where large pages are never executable, a fetch maps its frame alone, and only that may be fetched.
pub(crate) fn never_executable<F: Format>() {
    let host = Tests { block: PageSize::Size2M, mixed: GfnRange::new(Gfn::new(0), Gfn::new(0)) };
    let large = LargePages { largest: PageSize::Size2M, execute: LargeExecute::Never };
    let (mmu, _) = machine_with::<F>(1024, host, large, WitnessKind::Intent);
    let ram = Ram::in_blocks(1024, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    assert_eq!(fault(&mut vcpu, &ram, 600, Access::READ), FaultOutcome::Fixed);
    let large = leaf_of(&mmu, 600).map(|leaf| (leaf.size, leaf.execute));
    assert_eq!(large, Some((PageSize::Size2M, Execute::Never)));
    assert_eq!(translate(&mmu, 601, Access::EXEC), Translation::Fault(Found::Present));
    // Fetched from a block that nothing maps yet.
    assert_eq!(fault(&mut vcpu, &ram, 1100, Access::EXEC), FaultOutcome::Fixed);
    let single = leaf_of(&mmu, 1100).map(|leaf| (leaf.size, leaf.execute));
    assert_eq!(single, Some((PageSize::Size4K, Execute::Always)));
    assert_eq!(split_and_fault(&mut vcpu, &ram, 601, Access::EXEC), FaultOutcome::Fixed);
    assert_eq!(translate(&mmu, 601, Access::EXEC), Translation::Frame(Pfn::new(89)));
    assert_eq!(translate(&mmu, 602, Access::EXEC), Translation::Fault(Found::Present));
    assert_eq!(translate(&mmu, 602, Access::READ), Translation::Frame(Pfn::new(90)));
}

/// What was fetched from frame by frame, and is recovered, must be fetched from frame by frame again.
pub(crate) fn recovered_never_executable<F: Format>() {
    let host = Tests { block: PageSize::Size2M, mixed: GfnRange::new(Gfn::new(0), Gfn::new(0)) };
    let large = LargePages { largest: PageSize::Size2M, execute: LargeExecute::Never };
    let (mmu, _) = machine_with::<F>(512, host, large, WitnessKind::Lock);
    let ram = Ram::in_blocks(512, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    for gfn in 512..1024 {
        assert_eq!(fault(&mut vcpu, &ram, gfn, Access::EXEC), FaultOutcome::Fixed);
    }
    mmu.recover_large_pages(SpaceId(0), SlotId(0)).expect("the slot exists");
    let large = leaf_of(&mmu, 600).map(|leaf| (leaf.size, leaf.execute));
    assert_eq!(large, Some((PageSize::Size2M, Execute::Never)));
    assert_eq!(translate(&mmu, 600, Access::EXEC), Translation::Fault(Found::Present));
    assert_eq!(translate(&mmu, 600, Access::READ), Translation::Frame(Pfn::new(88)));
}

/// An invalidation of one frame holds back a large page over it, whichever of its frames is touched.
pub(crate) fn neighbours_are_verified<F: Format>() {
    let (mmu, _) = machine::<F>(1024, PageSize::Size2M);
    let ram = Ram::in_blocks(1024, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    let invalidation = mmu.invalidate(hvas(100, 101), Zap::Unmap, Blocking::Allowed);
    let outcome = fault(&mut vcpu, &ram, 512 + 7, Access::READ);
    assert_eq!(leaf_of(&mmu, 512 + 100), None, "nothing maps it until the invalidation has ended");
    assert!(matches!(outcome, FaultOutcome::Retry(_)), "{outcome:?}");
    drop(invalidation);
    assert_eq!(fault(&mut vcpu, &ram, 512 + 7, Access::READ), FaultOutcome::Fixed);
    assert_eq!(leaf_of(&mmu, 512 + 100).map(|leaf| leaf.size), Some(PageSize::Size2M));
}

/// A part that was written makes the whole written, and a whole that was written each part.
pub(crate) fn marks_are_kept<F: Format>() {
    let (mmu, _) = machine::<F>(512, PageSize::Size2M);
    let ram = Ram::in_blocks(512, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    assert_eq!(fault(&mut vcpu, &ram, 512, Access::READ), FaultOutcome::Fixed);
    mmu.split_large_pages(SpaceId(0), SlotId(0)).expect("the heap has room");
    assert_eq!(translate(&mmu, 512 + 7, Access::WRITE), Translation::Frame(Pfn::new(7)));
    mmu.recover_large_pages(SpaceId(0), SlotId(0)).expect("the slot exists");
    let whole = leaf_of(&mmu, 512).map(|leaf| (leaf.size, leaf.writable));
    assert_eq!(whole, Some((PageSize::Size2M, Writable::Dirty)));
    mmu.split_large_pages(SpaceId(0), SlotId(0)).expect("the heap has room");
    for gfn in 512..1024 {
        assert_eq!(leaf_of(&mmu, gfn).map(|leaf| leaf.writable), Some(Writable::Dirty));
    }
}

/// Pointers to tables are to be forgotten where tables went, and translations where they went.
pub(crate) fn flushes_say_what_went<F: Format>() {
    let (mmu, _) = machine::<F>(1024, PageSize::Size2M);
    let ram = Ram::in_blocks(1024, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    assert_eq!(vcpu.leave_guest(), Requests::RELOAD_ROOTS, "it has no root yet");
    for gfn in [512, 1024] {
        assert_eq!(fault(&mut vcpu, &ram, gfn, Access::READ), FaultOutcome::Fixed);
    }
    let blocks = [512, 1024].map(|start| GfnRange::new(Gfn::new(start), Gfn::new(start + 512)));
    let flushed = |vcpu: &Vcpu<'_, _>| {
        assert_eq!(vcpu.leave_guest(), Requests::FLUSH_TLB);
        vcpu.take_flush()
    };
    // One frame goes, and with it the large page that maps it.
    drop(mmu.invalidate(hvas(3, 4), Zap::Unmap, Blocking::Allowed));
    assert_eq!(flushed(&vcpu), Flush::of(blocks[0]));
    // A part of what was split goes alone.
    mmu.split_large_pages(SpaceId(0), SlotId(0)).expect("the heap has room");
    let breaks = if F::BREAK_BEFORE_MAKE { Flush::of(blocks[1]) } else { Flush::NOTHING };
    assert_eq!(vcpu.take_flush(), breaks);
    let _ = vcpu.leave_guest();
    drop(mmu.invalidate(hvas(512 + 7, 512 + 9), Zap::WriteProtect, Blocking::Allowed));
    let parts = GfnRange::new(Gfn::new(1024 + 7), Gfn::new(1024 + 9));
    assert_eq!(flushed(&vcpu), Flush::of(parts));
    // A table that a large page takes the place of, and tables that go with their slot.
    let _ = fault(&mut vcpu, &ram, 512, Access::READ);
    mmu.split_large_pages(SpaceId(0), SlotId(0)).expect("the heap has room");
    let _ = (vcpu.leave_guest(), vcpu.take_flush());
    mmu.recover_large_pages(SpaceId(0), SlotId(0)).expect("the slot exists");
    assert_eq!(flushed(&vcpu), Flush::with_tables(blocks[0]));
    mmu.delete_slot(SpaceId(0), SlotId(0)).expect("the slot exists");
    let all = GfnRange::new(blocks[0].start, blocks[1].end);
    assert_eq!(flushed(&vcpu), Flush { translations: all, tables: blocks[1] });
}

/// A table that goes with its slot is freed when the last walk has ended that could have found it.
pub(crate) fn tables_outlive_walks<F: Format>() {
    let (mmu, memory) = machine::<F>(1024, PageSize::Size4K);
    let ram = Ram::new(1024, 0);
    let mut vcpu = mmu.vcpu();
    for gfn in [512, 1024] {
        assert_eq!(fault(&mut vcpu, &ram, gfn, Access::READ), FaultOutcome::Fixed);
    }
    let pages = memory.pages();
    let mut walker = vcpu.walker();
    let section = walker.walk();
    std::thread::scope(|scope| {
        let deleting = until_it_waits(scope, || mmu.delete_slot(SpaceId(0), SlotId(0)));
        let tables = mmu.secondary().tables(SpaceId(0), section.walking()).expect("there are two spaces");
        assert_eq!(tables.walk(Gfn::new(512)).entry, Entry::Absent);
        let held = memory.pages();
        drop(section);
        deleting.join().expect("it does not panic").expect("the slot exists");
        assert_eq!(held, pages, "somebody may be in them");
    });
    assert_eq!(memory.pages(), pages - 2);
}

/// A fault that needs a page of its own in the middle of a larger one gets it, by either witness: the others stay as they
/// are, marks included, and the table comes from what was at hand before.
pub(crate) fn faults_split<F: Format>() {
    for witness in [WitnessKind::Lock, WitnessKind::Intent] {
        let host = Tests { block: PageSize::Size2M, mixed: GfnRange::new(Gfn::new(0), Gfn::new(0)) };
        let large = LargePages { largest: PageSize::Size2M, execute: LargeExecute::Never };
        // The roots, what is at hand when the second fault begins, and the tables that the first has linked by then.
        let depth = usize::from(F::ROOT_LEVEL.number());
        let memory = HeapMemory::with_limit(2 * F::ROOT_PAGES + (depth - 1) + (depth - 2));
        let mmu = machine_in::<F>(memory, 512, host, large, witness);
        let ram = Ram::in_blocks(512, 0, PageSize::Size2M);
        let mut vcpu = mmu.vcpu();
        assert_eq!(fault(&mut vcpu, &ram, 512, Access::WRITE), FaultOutcome::Fixed);
        let before = seen(&mmu, 512);
        let flushes = mmu.invalidation_stats().flushes;
        let outcome = forbidden(&mut vcpu, &ram, 700, Access::EXEC);
        assert_eq!(seen(&mmu, 512), before);
        if F::BREAK_BEFORE_MAKE {
            assert!(matches!(outcome, FaultOutcome::Retry(_)), "{outcome:?}");
        } else {
            assert_eq!(outcome, FaultOutcome::Fixed);
            assert_eq!(translate(&mmu, 700, Access::EXEC), Translation::Frame(Pfn::new(188)));
        }
        for gfn in (512..1024).filter(|gfn| *gfn != 700) {
            let part = leaf_of(&mmu, gfn).map(|leaf| (leaf.size, leaf.execute, leaf.writable));
            assert_eq!(part, Some((PageSize::Size4K, Execute::Never, Writable::Dirty)), "{gfn}");
        }
        let needed = u64::from(F::BREAK_BEFORE_MAKE);
        assert_eq!(mmu.invalidation_stats().flushes - flushes, needed);
        assert_eq!(ram.held.load(core::sync::atomic::Ordering::Relaxed), 0, "every page went back");
    }
}
