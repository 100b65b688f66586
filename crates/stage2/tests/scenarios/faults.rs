//! Faults and invalidations, one by one and all at once.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use afterimage_mmu::{
    Access, Age, Blocking, Fault, FaultKind, FaultOutcome, Found, Gfn, GfnRange, Memslot, PageSize, Pfn,
    SlotError, SlotFlags, SlotId, SpaceId, Young, Zap,
};
use afterimage_stage2::{Format, Translation, Writable};

use crate::support::*;

pub(crate) fn one_by_one<F: Format>() {
    let (mmu, memory) = machine::<F>(16, PageSize::Size4K);
    let ram = Ram::new(16, 16);
    let mut vcpu = mmu.vcpu();
    let gfn = Gfn::new(515);
    assert_eq!(leaf_of(&mmu, 515), None);

    // Reading maps it; so does every other access, once.
    assert_eq!(fault(&mut vcpu, &ram, 515, Access::READ), FaultOutcome::Fixed);
    assert_eq!(translate(&mmu, 515, Access::READ), Translation::Frame(Pfn::new(3)));
    assert_eq!(fault(&mut vcpu, &ram, 515, Access::READ), FaultOutcome::Spurious);

    // Unmapped while the guard lives, and after: what comes back is the new frame.
    let invalidation = mmu.invalidate(hvas(3, 4), Zap::Unmap, Blocking::Allowed);
    assert_eq!(leaf_of(&mmu, 515), None);
    assert!(matches!(fault(&mut vcpu, &ram, 515, Access::READ), FaultOutcome::Retry(_)));
    ram.migrate(3);
    drop(invalidation);
    assert_eq!(leaf_of(&mmu, 515), None);
    assert_eq!(fault(&mut vcpu, &ram, 515, Access::WRITE), FaultOutcome::Fixed);
    assert_eq!(translate(&mmu, 515, Access::WRITE), Translation::Frame(Pfn::new(16)));

    // Write-protected by the primary MMU: the next write asks it again, and does not just take the permission back.
    drop(mmu.invalidate(hvas(3, 4), Zap::WriteProtect, Blocking::Allowed));
    assert_eq!(translate(&mmu, 515, Access::READ), Translation::Frame(Pfn::new(16)));
    assert_eq!(translate(&mmu, 515, Access::WRITE), Translation::Fault(Found::Present));
    ram.writable.store(false, Ordering::Relaxed);
    assert_eq!(fault(&mut vcpu, &ram, 515, Access::WRITE), FaultOutcome::Spurious);
    assert_eq!(leaf_of(&mmu, 515).map(|leaf| leaf.writable), Some(Writable::Never));
    ram.writable.store(true, Ordering::Relaxed);
    assert_eq!(fault(&mut vcpu, &ram, 515, Access::WRITE), FaultOutcome::Fixed);
    assert_eq!(translate(&mmu, 515, Access::WRITE), Translation::Frame(Pfn::new(16)));

    // Old after aging; the next use, or the fault that it takes, makes it young again.
    assert_eq!(mmu.age(hvas(0, 16), Age::Clear), Young::Yes);
    assert_eq!(mmu.age(hvas(0, 16), Age::Test), Young::No);
    if translate(&mmu, 515, Access::READ) == Translation::Fault(Found::Absent) {
        assert!(F::HIDES_UNUSED);
        assert_eq!(fault(&mut vcpu, &ram, 515, Access::READ), FaultOutcome::FixedFast);
    }
    assert_eq!(mmu.age(hvas(0, 16), Age::Test), Young::Yes);

    // Beside the slot there is nothing, and in another address space neither.
    assert!(matches!(fault(&mut vcpu, &ram, 511, Access::READ), FaultOutcome::Emulate(_)));
    let elsewhere = Fault { space: SpaceId(1), ..Fault::new(gfn, Access::READ) };
    let outcome = vcpu.handle_fault(&Primary(Arc::clone(&ram)), &elsewhere);
    assert!(matches!(outcome, Ok(FaultOutcome::Emulate(_))));

    // A prefetch maps, and does not count as a use.
    let prefetch = Fault { kind: FaultKind::Prefetch, ..Fault::new(Gfn::new(516), Access::READ) };
    let outcome = vcpu.handle_fault(&Primary(Arc::clone(&ram)), &prefetch);
    assert_eq!(outcome, Ok(FaultOutcome::Fixed));
    assert_eq!(leaf_of(&mmu, 516).map(|leaf| leaf.accessed), Some(false));

    mmu.delete_slot(SpaceId(0), SlotId(0)).expect("the slot exists");
    assert_eq!(leaf_of(&mmu, 515), None);
    assert_eq!(ram.held.load(Ordering::Relaxed), 0);
    drop(vcpu);
    drop(mmu);
    assert_eq!(memory.pages(), 0, "every table was freed");
}

/// A vCPU that touches the slot's frames in an order of its own until the race is over.
pub(crate) fn run<F: Format>(mmu: &Mmu<F>, ram: &Arc<Ram>, frames: u64, mut seed: u64, race: &Race) {
    // A failed assertion ends it for all.
    let _stop = Stop(race);
    let mut vcpu = mmu.vcpu();
    let mut tlb = Tlb::new();
    while !race.over.load(Ordering::Relaxed) {
        if let Err(requests) = vcpu.enter_guest() {
            obey(&vcpu, &mut tlb, requests);
            continue;
        }
        let mut met = None;
        for _ in 0..64 {
            if met.is_some() || vcpu.is_kicked() {
                break;
            }
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let gfn = 512 + (seed >> 33) % frames;
            let wanted = [Access::WRITE, Access::EXEC, Access::READ, Access::READ][(seed >> 62) as usize];
            match access(&mut vcpu, &mut tlb, ram, gfn, wanted) {
                Ok(_) => {
                    race.accesses.fetch_add(1, Ordering::Relaxed);
                }
                Err(found) => met = Some(Fault { found, ..Fault::new(Gfn::new(gfn), wanted) }),
            }
        }
        obey(&vcpu, &mut tlb, vcpu.leave_guest());
        if let Some(fault) = met {
            let outcome = vcpu.handle_fault(&Primary(Arc::clone(ram)), &fault).expect("the page is there");
            if let FaultOutcome::Retry(retry) = outcome {
                mmu.wait(retry.range);
            }
        }
    }
}

pub(crate) fn under_fire<F: Format>() {
    const PAGES: u64 = 24;
    const MOVES: u64 = 500;
    let (mmu, _) = machine::<F>(PAGES, PageSize::Size4K);
    let ram = Ram::new(PAGES, MOVES);
    let race = Race::default();
    std::thread::scope(|scope| {
        for seed in [1, 2] {
            let (mmu, ram, race) = (&mmu, &ram, &race);
            scope.spawn(move || run(mmu, ram, PAGES, seed, race));
        }
        // Also when an assertion fails here: the scope waits for the vCPUs.
        let _stop = Stop(&race);
        for turn in 0..MOVES {
            let page = turn * 7 % PAGES;
            // Now and then the neighbours go with it, and marks and permissions alone.
            let end = if turn % 16 == 0 { PAGES } else { page + 1 };
            let invalidation = mmu.invalidate(hvas(page, end), Zap::Unmap, Blocking::Allowed);
            for gone in page..end {
                assert_eq!(leaf_of(&mmu, 512 + gone), None);
            }
            ram.migrate(page);
            drop(invalidation);
            match turn % 8 {
                3 => drop(mmu.invalidate(hvas(0, PAGES), Zap::WriteProtect, Blocking::Forbidden)),
                5 => assert_ne!(mmu.age(hvas(0, PAGES), Age::Clear), Young::Unknown),
                7 => race.let_them_run(),
                _ => {}
            }
        }
    });
    assert_eq!(ram.held.load(Ordering::Relaxed), 0, "every page reference came back");
    let stats = mmu.invalidation_stats();
    assert!(stats.yields_to_waiters <= stats.yields, "{stats:?}");
    let read_only =
        Memslot { flags: SlotFlags::READ_ONLY, ..Memslot::new(SlotId(1), Gfn::new(4096), 4, BASE) };
    mmu.create_slot(read_only).expect("nothing is there");
    let mut vcpu = mmu.vcpu();
    assert_eq!(fault(&mut vcpu, &ram, 4096, Access::READ), FaultOutcome::Fixed);
    assert_eq!(leaf_of(&mmu, 4096).map(|leaf| leaf.writable), Some(Writable::HostOnly));
    assert!(matches!(fault(&mut vcpu, &ram, 4096, Access::WRITE), FaultOutcome::Emulate(_)));
}

/// Only memslots that the tables can translate, in address spaces that they have; and what is refused leaves things as they were.
pub(crate) fn slots_in_reach<F: Format>() {
    let (mmu, _memory) = machine::<F>(16, PageSize::Size4K);
    let ram = Ram::new(16, 16);
    let mut vcpu = mmu.vcpu();
    let end = 1 << (F::GPA_BITS - 12);
    let slot = |space: u16, base: u64, frames: u64| Memslot {
        space: SpaceId(space),
        ..Memslot::new(SlotId(7), Gfn::new(base), frames, BASE)
    };
    for (base, frames) in [(end - 15, 16), (end, 16), (end + 512, 16), (end - 1, end)] {
        let gfns = GfnRange::new(Gfn::new(base), Gfn::new(base + frames));
        let refused = SlotError::BeyondTables { id: SlotId(7), gfns, bits: F::GPA_BITS };
        assert_eq!(mmu.create_slot(slot(0, base, frames)), Err(refused));
    }
    assert_eq!(
        mmu.create_slot(slot(2, 0, 16)),
        Err(SlotError::NoTables { id: SlotId(7), space: SpaceId(2) })
    );

    // The last frame is in reach; what cannot be moved stays, and stays mapped.
    assert_eq!(mmu.create_slot(slot(0, end - 16, 16)), Ok(()));
    assert_eq!(fault(&mut vcpu, &ram, end - 1, Access::WRITE), FaultOutcome::Fixed);
    let refused = mmu.move_slot(SpaceId(0), SlotId(7), Gfn::new(end - 15));
    assert!(matches!(refused, Err(SlotError::BeyondTables { .. })), "{refused:?}");
    assert_eq!(translate(&mmu, end - 1, Access::WRITE), Translation::Frame(Pfn::new(15)));
    assert_eq!(mmu.move_slot(SpaceId(0), SlotId(7), Gfn::new(end - 32)), Ok(()));
    assert_eq!(translate(&mmu, end - 1, Access::WRITE), Translation::Fault(Found::Absent));
}
