//! Whole roots that are replaced, and what becomes of the old ones.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use afterimage_mmu::{
    Access, Age, Blocking, FaultOutcome, Found, Gfn, GfnRange, GuestMmu, Initially, LogBy, Memslot, PageSize,
    Pfn, Policy, Requests, SlotId, SpaceId, WitnessKind, Young, Zap,
};
use afterimage_stage2::{Entry, Format, HeapMemory, LargePages, Stage2, TableMemory, Translation};

use crate::scenarios::faults::run;
use crate::support::platform::until_it_waits;
use crate::support::*;

const BOTH: [WitnessKind; 2] = [WitnessKind::Lock, WitnessKind::Intent];

pub(crate) fn host(block: PageSize) -> Tests {
    Tests { block, mixed: GfnRange::new(Gfn::new(0), Gfn::new(0)) }
}

fn with_witness<F: Format>(frames: u64, block: PageSize, witness: WitnessKind) -> (Mmu<F>, HeapMemory) {
    machine_with::<F>(frames, host(block), LargePages::up_to(block), witness)
}

/// Nothing is mapped below the new root until it is touched; the old tables, large pages and wide roots too, are freed.
pub(crate) fn nothing_is_left<F: Format>() {
    for witness in BOTH {
        let (mmu, memory) = with_witness::<F>(3 * 512, PageSize::Size2M, witness);
        let ram = Ram::in_blocks(3 * 512, 0, PageSize::Size2M);
        let roots = memory.pages();
        let mut vcpu = mmu.vcpu();
        for gfn in [512, 1024, 1536] {
            assert_eq!(fault(&mut vcpu, &ram, gfn, Access::WRITE), FaultOutcome::Fixed);
        }
        mmu.split_large_pages(SpaceId(0), SlotId(0)).expect("the heap has room");
        let (root, used) = (mmu.secondary().root(SpaceId(0)), memory.pages());
        mmu.zap_all();
        assert_ne!(mmu.secondary().root(SpaceId(0)), root);
        for gfn in [512, 1024 + 7, 1536 + 511] {
            assert_eq!(leaf_of(&mmu, gfn), None);
        }
        assert_eq!(mmu.invalidation_stats().reloads, 1);
        assert!(memory.pages() <= used - 3, "the tables of three blocks");
        assert_eq!(fault(&mut vcpu, &ram, 1024 + 7, Access::READ), FaultOutcome::Fixed);
        assert_eq!(translate(&mmu, 1024 + 7, Access::READ), Translation::Frame(Pfn::new(512 + 7)));
        mmu.zap_all();
        drop(vcpu);
        assert_eq!(memory.pages(), roots, "only the roots are left");
    }
}

/// More tables go than one walk can keep: the lock is given up in between, and all of them are freed.
pub(crate) fn a_large_root_goes_in_steps<F: Format>() {
    const BLOCKS: u64 = 200;
    let (mmu, memory) = machine::<F>(BLOCKS * 512, PageSize::Size4K);
    let ram = Ram::new(BLOCKS * 512, 0);
    let roots = memory.pages();
    let mut vcpu = mmu.vcpu();
    for block in 0..BLOCKS {
        assert_eq!(fault(&mut vcpu, &ram, 512 + block * 512, Access::READ), FaultOutcome::Fixed);
    }
    let yields = mmu.invalidation_stats().yields;
    mmu.zap_all();
    assert!(mmu.invalidation_stats().yields - yields >= BLOCKS / 64);
    drop(vcpu);
    assert_eq!(memory.pages(), roots);
}

/// A vCPU in the guest has the old root loaded: it is kicked, and nothing is freed before it has left.
pub(crate) fn who_is_in_the_guest_reloads_first<F: Format>() {
    for witness in BOTH {
        let (mmu, memory) = with_witness::<F>(1024, PageSize::Size4K, witness);
        let ram = Ram::new(1024, 0);
        let mut vcpu = mmu.vcpu();
        for gfn in [512, 1024] {
            assert_eq!(fault(&mut vcpu, &ram, gfn, Access::READ), FaultOutcome::Fixed);
        }
        let pages = memory.pages();
        assert_eq!(vcpu.enter_guest(), Err(Requests::RELOAD_ROOTS), "it has no root yet");
        vcpu.enter_guest().expect("nothing else was requested");
        let (left, kicked, during) = std::thread::scope(|scope| {
            let zapping = scope.spawn(|| mmu.zap_all());
            while !vcpu.is_kicked() && !zapping.is_finished() {
                std::thread::yield_now();
            }
            // What is asserted waits until nobody waits for this vCPU any more.
            let seen = (vcpu.is_kicked(), memory.pages());
            let left = vcpu.leave_guest();
            zapping.join().expect("it does not panic");
            (left, seen.0, seen.1)
        });
        assert!(kicked, "it was asked to come out");
        assert!(during >= pages, "it may walk the old tables");
        assert_eq!(
            left,
            Requests::RELOAD_ROOTS,
            "that is all: nothing is flushed for tables that nobody uses"
        );
        assert!(memory.pages() < pages);
    }
}

/// Who walks without a lock may have found the old root: its tables stay until the walk has ended.
pub(crate) fn old_roots_outlive_walks<F: Format>() {
    for witness in BOTH {
        let (mmu, memory) = with_witness::<F>(1024, PageSize::Size4K, witness);
        let ram = Ram::new(1024, 0);
        let mut vcpu = mmu.vcpu();
        assert_eq!(fault(&mut vcpu, &ram, 512, Access::READ), FaultOutcome::Fixed);
        let pages = memory.pages();
        let mut walker = vcpu.walker();
        let section = walker.walk();
        std::thread::scope(|scope| {
            let zapping = until_it_waits(scope, || mmu.zap_all());
            let tables = mmu.secondary().tables(SpaceId(0), section.walking()).expect("there are two spaces");
            assert_eq!(tables.walk(Gfn::new(512)).entry, Entry::Absent, "below the new root");
            let held = memory.pages();
            drop(section);
            zapping.join().expect("it does not panic");
            assert!(held >= pages, "somebody may be in them");
        });
        assert!(memory.pages() < pages);
    }
}

/// A frame that was written is in the log, and one that was used is told of, though the entries that say so are gone.
pub(crate) fn marks_outlive_roots<F: Format>() {
    let (mmu, _) = machine::<F>(16, PageSize::Size4K);
    let ram = Ram::new(16, 0);
    let mut vcpu = mmu.vcpu();
    for gfn in 512..520 {
        assert_eq!(fault(&mut vcpu, &ram, gfn, Access::WRITE), FaultOutcome::Fixed);
    }
    if F::HAS_DIRTY {
        mmu.start_dirty_log(SpaceId(0), SlotId(0), LogBy::Marks, Initially::Clean).expect("there are marks");
        for gfn in 512..520 {
            let _ = forbidden(&mut vcpu, &ram, gfn, Access::WRITE);
        }
        let first = mmu.take_dirty_log(SpaceId(0), SlotId(0)).expect("it is logged");
        assert_eq!(first, [0xff]);
    }
    assert_eq!(mmu.age(hvas(0, 16), Age::Clear), Young::Yes);
    for gfn in [514, 517] {
        if translate(&mmu, gfn, Access::WRITE) == Translation::Fault(Found::Absent) {
            assert_eq!(fault(&mut vcpu, &ram, gfn, Access::WRITE), FaultOutcome::FixedFast);
        }
    }
    USED.take();
    mmu.zap_all();
    let used: Vec<_> = USED.take().iter().map(|gfns| (gfns.start.as_u64(), gfns.len())).collect();
    assert_eq!(used, [(514, 1), (517, 1)]);
    if F::HAS_DIRTY {
        let written = mmu.take_dirty_log(SpaceId(0), SlotId(0)).expect("it is logged");
        assert_eq!(written, [1 << 2 | 1 << 5]);
    }
}

/// Where there is no memory for other roots, the translations go all the same.
pub(crate) fn without_memory_roots_stay<F: Format>() {
    let memory = HeapMemory::with_limit(2 * F::ROOT_PAGES + 4);
    let large = LargePages::up_to(PageSize::Size4K);
    let stage2 = Stage2::<F, Tests>::new(host(PageSize::Size4K), memory.clone(), 2, large).expect("room");
    let mmu = GuestMmu::new(stage2, Policy::default());
    mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(512), 16, BASE)).expect("there is no other slot");
    let ram = Ram::new(16, 0);
    let mut vcpu = mmu.vcpu();
    assert_eq!(fault(&mut vcpu, &ram, 515, Access::READ), FaultOutcome::Fixed);
    let root = mmu.secondary().root(SpaceId(0));
    while memory.pages() < 2 * F::ROOT_PAGES + 4 {
        memory.allocate(1).expect("there is room");
    }
    mmu.zap_all();
    assert_eq!((mmu.secondary().root(SpaceId(0)), leaf_of(&mmu, 515)), (root, None));
    assert_eq!(mmu.invalidation_stats().reloads, 0);
}

/// Guests never reach a page that has moved, whichever root they find it below.
pub(crate) fn replaced_under_fire<F: Format>() {
    const PAGES: u64 = 24;
    const MOVES: u64 = 200;
    for witness in BOTH {
        let (mmu, memory) = with_witness::<F>(PAGES, PageSize::Size4K, witness);
        let roots = memory.pages();
        let ram = Ram::new(PAGES, MOVES);
        let race = Race::default();
        std::thread::scope(|scope| {
            for seed in [1, 2] {
                let (mmu, ram, race) = (&mmu, &ram, &race);
                scope.spawn(move || run(mmu, ram, PAGES, seed, race));
            }
            let _stop = Stop(&race);
            for turn in 0..MOVES {
                let page = turn * 7 % PAGES;
                let invalidation = mmu.invalidate(hvas(page, page + 1), Zap::Unmap, Blocking::Allowed);
                assert_eq!(leaf_of(&mmu, 512 + page), None);
                ram.migrate(page);
                match turn % 8 {
                    // Within the invalidation, and after it.
                    1 => mmu.zap_all(),
                    5 => {
                        drop(invalidation);
                        mmu.zap_all();
                        race.let_them_run();
                    }
                    _ => {}
                }
            }
        });
        mmu.zap_all();
        assert_eq!((memory.pages(), ram.held.load(Ordering::Relaxed)), (roots, 0), "nothing is left behind");
    }
}

/// The host's function panics before every vCPU has been asked: who takes the lock next asks, and waits.
pub(crate) fn a_panic_leaves_the_reload_owed<F: Format>() {
    let (mmu, _memory) = machine::<F>(1024, PageSize::Size4K);
    let ram = Ram::new(1024, 0);
    let [mut first, second] = [(); 2].map(|()| mmu.vcpu());
    assert_eq!(fault(&mut first, &ram, 512, Access::READ), FaultOutcome::Fixed);
    for vcpu in [&first, &second] {
        let _ = vcpu.leave_guest();
        vcpu.enter_guest().expect("nothing is requested any more");
    }
    KICK.set(Some(Box::new(|| panic!("deliberately, in a kick"))));
    catch_unwind(AssertUnwindSafe(|| mmu.zap_all())).expect_err("it panicked");
    assert!(!mmu.is_locked());
    let _ = first.leave_guest();
    std::thread::scope(|scope| {
        let next = scope.spawn(|| drop(mmu.invalidate(hvas(0, 1), Zap::Unmap, Blocking::Allowed)));
        while !second.is_kicked() && !next.is_finished() {
            std::thread::yield_now();
        }
        let kicked = second.is_kicked();
        let left = second.leave_guest();
        next.join().expect("it does not panic");
        assert!(kicked && left.contains(Requests::RELOAD_ROOTS), "it still has the old root: {left:?}");
    });
}
