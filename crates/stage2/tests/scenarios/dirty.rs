//! Dirty logs: what is written is in the round that it was written in, or in the next.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use afterimage_mmu::{
    Access, Blocking, DirtyFrame, DirtyRing, Fault, FaultError, FaultOutcome, Gfn, GfnRange, Initially,
    LogBy, PageSize, SlotError, SlotId, SpaceId, Vcpu, WitnessKind, Zap,
};
use afterimage_stage2::{Format, LargePages, Stage2, Translation, Writable};

use crate::support::platform::rescheduled;
use crate::support::*;

const HOME: SpaceId = SpaceId(0);
const SLOT: SlotId = SlotId(0);
/// Not a multiple of 64.
const FRAMES: u64 = 100;
/// The slot's first frame.
const FIRST: u64 = 512;

/// Writes to a frame of the slot as a guest does; how often it faulted.
fn write<F: Format>(vcpu: &mut Vcpu<'_, Stage2<F, Tests>>, ram: &Arc<Ram>, frame: u64) -> u32 {
    let gfn = Gfn::new(FIRST + frame);
    for faults in 0.. {
        let mmu = vcpu.mmu();
        match look(mmu, vcpu, |tables| tables.translate(gfn, Access::WRITE)) {
            Translation::Frame(pfn) => {
                ram.words[pfn.as_u64() as usize].fetch_add(1, Ordering::Relaxed);
                return faults;
            }
            Translation::Fault(found) => {
                let fault = Fault { found, ..Fault::new(gfn, Access::WRITE) };
                let outcome = vcpu.handle_fault(&Primary(Arc::clone(ram)), &fault);
                assert!(matches!(outcome, Ok(FaultOutcome::Fixed | FaultOutcome::FixedFast)), "{outcome:?}");
            }
        }
    }
    unreachable!("a fault that is fixed is not met again for ever")
}

/// Reads every frame once, so that it is mapped.
fn read_all<F: Format>(vcpu: &mut Vcpu<'_, Stage2<F, Tests>>, ram: &Arc<Ram>) {
    for frame in 0..FRAMES {
        assert_eq!(fault(vcpu, ram, FIRST + frame, Access::READ), FaultOutcome::Fixed);
    }
}

/// The frames of a log's bits.
fn frames(log: &[u64]) -> Vec<u64> {
    let set = |frame: &u64| log[(frame / 64) as usize] >> (frame % 64) & 1 != 0;
    (0..log.len() as u64 * 64).filter(set).collect()
}

fn take<F: Format>(mmu: &Mmu<F>) -> Vec<u64> {
    frames(&mmu.take_dirty_log(HOME, SLOT).expect("the slot is logged"))
}

pub(crate) fn rounds<F: Format>() {
    let (mmu, _) = machine::<F>(FRAMES, PageSize::Size4K);
    let ram = Ram::new(FRAMES, 0);
    let mut vcpu = mmu.vcpu();
    read_all(&mut vcpu, &ram);
    let before = [0, 7].map(|frame| write(&mut vcpu, &ram, frame));
    assert_eq!(before, [0, 0], "what is read is mapped writable");
    assert_eq!(mmu.take_dirty_log(HOME, SLOT), Err(SlotError::NotLogged(SLOT)));
    mmu.set_dirty_logging(HOME, SLOT, true).expect("the slot exists");
    assert_eq!(take(&mmu), [], "it was written before");

    for frame in [3, 7, 64, 99, 3] {
        write(&mut vcpu, &ram, frame);
    }
    assert_eq!(take(&mmu), [3, 7, 64, 99]);
    assert_eq!(take(&mmu), []);
    // Each first write of a round faults, and is made good without a lock.
    assert_eq!([write(&mut vcpu, &ram, 3), write(&mut vcpu, &ram, 3)], [1, 0]);
    assert_eq!(leaf_of(&mmu, FIRST + 3).map(|leaf| leaf.writable), Some(Writable::Dirty));
    assert_eq!(leaf_of(&mmu, FIRST + 64).map(|leaf| leaf.writable), Some(Writable::Protected));
    assert_eq!(take(&mmu), [3]);

    // What the primary MMU protects asks it again, and is logged all the same.
    drop(mmu.invalidate(hvas(7, 8), Zap::WriteProtect, Blocking::Allowed));
    assert_eq!(leaf_of(&mmu, FIRST + 7).map(|leaf| leaf.writable), Some(Writable::Never));
    write(&mut vcpu, &ram, 7);
    assert_eq!(take(&mmu), [7]);

    mmu.set_dirty_logging(HOME, SLOT, false).expect("the slot exists");
    assert_eq!(mmu.take_dirty_log(HOME, SLOT), Err(SlotError::NotLogged(SLOT)));
    write(&mut vcpu, &ram, 3);
    mmu.set_dirty_logging(HOME, SLOT, true).expect("the slot exists");
    assert_eq!(take(&mmu), [], "a new log knows nothing of the one before");
}

/// A vCPU in the guest may write through its TLB until it is told: a round tells it.
pub(crate) fn rounds_flush<F: Format>() {
    let (mmu, _) = machine::<F>(FRAMES, PageSize::Size4K);
    let ram = Ram::new(FRAMES, 0);
    let mut vcpu = mmu.vcpu();
    mmu.set_dirty_logging(HOME, SLOT, true).expect("the slot exists");
    write(&mut vcpu, &ram, 3);
    let flushes = mmu.invalidation_stats().flushes;
    assert_eq!(take(&mmu), [3]);
    assert_eq!(mmu.invalidation_stats().flushes, flushes + 1);
    assert_eq!(take(&mmu), []);
    assert_eq!(mmu.invalidation_stats().flushes, flushes + 1, "nothing was written, nothing is flushed");
}

pub(crate) fn by_hand<F: Format>() {
    let (mmu, _) = machine::<F>(FRAMES, PageSize::Size4K);
    let ram = Ram::new(FRAMES, 0);
    let mut vcpu = mmu.vcpu();
    mmu.set_dirty_logging(HOME, SLOT, true).expect("the slot exists");
    for frame in [3, 64, 70] {
        write(&mut vcpu, &ram, frame);
    }
    let seen = || frames(&mmu.look_at_dirty_log(HOME, SLOT).expect("the slot is logged"));
    assert_eq!((seen(), seen()), (vec![3, 64, 70], vec![3, 64, 70]));
    assert_eq!(write(&mut vcpu, &ram, 3), 0, "looking protects nothing");
    // Frame 65 is not set, and stays as it is; frame 70 is not asked for.
    mmu.clear_dirty_log(HOME, SLOT, 64, &[0b11]).expect("it is a part of the log");
    assert_eq!(seen(), [3, 70]);
    assert_eq!([write(&mut vcpu, &ram, 70), write(&mut vcpu, &ram, 64)], [0, 1]);
    assert_eq!(seen(), [3, 64, 70]);
    for (first, words) in [(1, 1), (64, 2), (128, 1), (u64::MAX - 63, 1)] {
        let refused = mmu.clear_dirty_log(HOME, SLOT, first, &vec![u64::MAX; words]);
        assert_eq!(refused, Err(SlotError::NotInLog { id: SLOT, first, words }));
    }
    mmu.clear_dirty_log(HOME, SLOT, 0, &[u64::MAX; 2]).expect("it is the whole log");
    assert_eq!(seen(), []);
}

pub(crate) fn all_set<F: Format>() {
    let (mmu, _) = machine::<F>(FRAMES, PageSize::Size4K);
    let ram = Ram::new(FRAMES, 0);
    let mut vcpu = mmu.vcpu();
    for frame in 0..FRAMES {
        write(&mut vcpu, &ram, frame);
    }
    mmu.start_dirty_log(HOME, SLOT, LogBy::Protection, Initially::AllSet).expect("the slot exists");
    let log = mmu.look_at_dirty_log(HOME, SLOT).expect("the slot is logged");
    assert_eq!(frames(&log), (0..FRAMES).collect::<Vec<_>>());
    assert_eq!(write(&mut vcpu, &ram, 3), 0, "nothing was protected");
    mmu.clear_dirty_log(HOME, SLOT, 0, &[u64::MAX]).expect("it is a part of the log");
    assert_eq!([write(&mut vcpu, &ram, 3), write(&mut vcpu, &ram, 64)], [1, 0]);
    let expected: Vec<_> = core::iter::once(3).chain(64..FRAMES).collect();
    assert_eq!(take(&mmu), expected);
}

pub(crate) fn rings<F: Format>() {
    let (mmu, _) = machine::<F>(FRAMES, PageSize::Size4K);
    let ram = Ram::new(FRAMES, 0);
    let mut vcpu = mmu.vcpu();
    let ring = vcpu.log_in_ring(8);
    mmu.set_dirty_logging(HOME, SLOT, true).expect("the slot exists");
    for lap in 0..3 {
        for frame in 0..7 {
            assert_eq!(write(&mut vcpu, &ram, frame), 1, "lap {lap}");
            assert_eq!(write(&mut vcpu, &ram, frame), 0, "it is logged once");
        }
        // Full: a write that is to be logged waits; one to a frame that is, and reading, does not.
        let full = Fault::new(Gfn::new(FIRST + 50), Access::WRITE);
        let outcome = vcpu.handle_fault(&Primary(Arc::clone(&ram)), &full);
        assert_eq!(outcome, Err(FaultError::DirtyRingFull(Gfn::new(FIRST + 50))));
        assert_eq!(write(&mut vcpu, &ram, 3), 0);
        let reading = fault(&mut vcpu, &ram, FIRST + 60 + lap, Access::READ);
        assert_eq!(reading, FaultOutcome::Fixed);
        let mut seen = vec![];
        ring.collect(|frame| seen.push(frame));
        let frame = |frame| DirtyFrame { space: HOME, slot: SLOT, gfn: Gfn::new(FIRST + frame) };
        assert_eq!(seen, (0..7).map(frame).collect::<Vec<_>>());
        assert!(ring.is_soft_full());
        assert_eq!((mmu.reset_dirty_rings(), mmu.reset_dirty_rings()), (7, 0));
    }
    assert_eq!(take(&mmu), [], "what a vCPU writes is in its ring");
    drop(vcpu);
    assert_eq!(mmu.reset_dirty_rings(), 0);
}

/// A page that was written goes, and comes back at another place, before its round is taken.
pub(crate) fn written_and_gone<F: Format>() {
    let by_marks = if F::HAS_DIRTY { vec![LogBy::Protection, LogBy::Marks] } else { vec![LogBy::Protection] };
    for by in by_marks {
        let (mmu, _) = machine::<F>(FRAMES, PageSize::Size4K);
        let ram = Ram::new(FRAMES, 8);
        let mut vcpu = mmu.vcpu();
        mmu.start_dirty_log(HOME, SLOT, by, Initially::Clean).expect("the slot exists");
        read_all(&mut vcpu, &ram);
        write(&mut vcpu, &ram, 5);
        assert_eq!(take(&mmu), [5]);
        write(&mut vcpu, &ram, 5);
        let invalidation = mmu.invalidate(hvas(5, 7), Zap::Unmap, Blocking::Allowed);
        ram.migrate(5);
        drop(invalidation);
        assert_eq!(take(&mmu), [5], "{by:?}");
        write(&mut vcpu, &ram, 8);
        drop(mmu.invalidate(hvas(8, 9), Zap::WriteProtect, Blocking::Allowed));
        assert_eq!(take(&mmu), [8], "{by:?}");
    }
}

/// Who takes the log while a zap has given the lock up finds what is gone by then. Bits are the zap's: what a vCPU logs goes to its
/// ring.
pub(crate) fn zaps_log_before_they_give_way<F: Format>() {
    const WRITTEN: [u64; 4] = [3, 4, 63, 64];
    for zap in [Zap::Unmap, Zap::WriteProtect] {
        let mmu = Arc::new(machine::<F>(FRAMES, PageSize::Size4K).0);
        let ram = Ram::new(FRAMES, 0);
        let mut vcpu = mmu.vcpu();
        let ring = vcpu.log_in_ring(16);
        mmu.set_dirty_logging(HOME, SLOT, true).expect("the slot exists");
        let mut write_all = || {
            for frame in WRITTEN {
                write(&mut vcpu, &ram, frame);
            }
            ring.collect(|_| ());
            mmu.reset_dirty_rings();
            for frame in WRITTEN {
                write(&mut vcpu, &ram, frame);
            }
        };
        write_all();
        assert_eq!(take(&mmu), []);
        let seen = Rc::new(RefCell::new(vec![]));
        let (others, sees) = (Arc::clone(&mmu), Rc::clone(&seen));
        let collect = move || sees.borrow_mut().push(take(&others));
        drop(rescheduled(collect, || mmu.invalidate(hvas(0, FRAMES), zap, Blocking::Allowed)));
        let seen: Vec<_> = seen.take().into_iter().filter(|taken| !taken.is_empty()).collect();
        assert_eq!(seen, WRITTEN.map(|frame| [frame]), "{zap:?}");

        // In one go.
        write_all();
        assert_eq!(take(&mmu), []);
        drop(mmu.invalidate(hvas(0, FRAMES), zap, Blocking::Forbidden));
        assert_eq!(take(&mmu), WRITTEN, "{zap:?}");
    }
}

pub(crate) fn by_marks<F: Format>() {
    let (mmu, _) = machine::<F>(FRAMES, PageSize::Size4K);
    let ram = Ram::new(FRAMES, 0);
    let mut vcpu = mmu.vcpu();
    let started = mmu.start_dirty_log(HOME, SLOT, LogBy::Marks, Initially::Clean);
    if !F::HAS_DIRTY {
        assert_eq!(started, Err(SlotError::NoDirtyMarks(SLOT)));
        return;
    }
    started.expect("there are marks");
    read_all(&mut vcpu, &ram);
    assert_eq!([3, 99].map(|frame| write(&mut vcpu, &ram, frame)), [0, 0], "no write faults");
    assert_eq!(frames(&mmu.look_at_dirty_log(HOME, SLOT).expect("the slot is logged")), [3, 99]);
    assert_eq!(leaf_of(&mmu, FIRST + 3).map(|leaf| leaf.writable), Some(Writable::Clean));
    assert_eq!((take(&mmu), take(&mmu)), (vec![3, 99], vec![]));
    assert_eq!(write(&mut vcpu, &ram, 3), 0);
    assert_eq!(take(&mmu), [3]);
}

/// A large page has one mark for all its frames: only the first time it tells of all of them.
pub(crate) fn large_pages_by_marks<F: Format>() {
    if !F::HAS_DIRTY {
        return;
    }
    let (mmu, _) = machine::<F>(1024, PageSize::Size2M);
    let ram = Ram::in_blocks(1024, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    for block in [0, 512] {
        assert_eq!(fault(&mut vcpu, &ram, FIRST + block, Access::WRITE), FaultOutcome::Fixed);
    }
    mmu.start_dirty_log(HOME, SLOT, LogBy::Marks, Initially::AllSet).expect("there are marks");
    assert_eq!(take(&mmu).len(), 1024);
    let mut written = |frame| {
        let forbidden = split_and_fault(&mut vcpu, &ram, FIRST + frame, Access::WRITE);
        assert!(matches!(forbidden, FaultOutcome::Fixed | FaultOutcome::FixedFast), "{forbidden:?}");
    };
    written(7);
    assert_eq!(take(&mmu), [7], "and none of its neighbours");
    assert_eq!(take(&mmu), []);
    assert_eq!(
        leaf_of(&mmu, FIRST + 7).map(|leaf| leaf.writable),
        Some(Writable::Clean),
        "by its mark from now on"
    );
    assert_eq!(
        leaf_of(&mmu, FIRST + 512).map(|leaf| leaf.size),
        Some(PageSize::Size2M),
        "nobody wrote there"
    );
}

/// Whoever has writes tracked again asks for no less than what was written before.
pub(crate) fn marks_outlive_tracking<F: Format>() {
    if !F::HAS_DIRTY {
        return;
    }
    let (mmu, _) = machine::<F>(FRAMES, PageSize::Size4K);
    let ram = Ram::new(FRAMES, 0);
    let mut vcpu = mmu.vcpu();
    mmu.start_dirty_log(HOME, SLOT, LogBy::Marks, Initially::Clean).expect("there are marks");
    read_all(&mut vcpu, &ram);
    assert_eq!(write(&mut vcpu, &ram, 5), 0);
    drop(mmu.invalidate(hvas(0, FRAMES), Zap::TrackDirty, Blocking::Allowed));
    assert_eq!(take(&mmu), [5]);
}

/// When logging is over, what it protected is no reason to leave a page in pieces.
pub(crate) fn large_pages_come_back<F: Format>() {
    let (mmu, _) = machine::<F>(512, PageSize::Size2M);
    let ram = Ram::in_blocks(512, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    assert_eq!(fault(&mut vcpu, &ram, FIRST, Access::WRITE), FaultOutcome::Fixed);
    let size = || leaf_of(&mmu, FIRST + 9).map(|leaf| leaf.size);
    mmu.set_dirty_logging(HOME, SLOT, true).expect("the slot exists");
    mmu.split_large_pages(HOME, SLOT).expect("the heap has room");
    write(&mut vcpu, &ram, 3);
    assert_eq!(take(&mmu), [3]);
    write(&mut vcpu, &ram, 4);
    mmu.recover_large_pages(HOME, SLOT).expect("the slot exists");
    assert_eq!(size(), Some(PageSize::Size4K), "not while it is logged");
    mmu.set_dirty_logging(HOME, SLOT, false).expect("the slot exists");
    mmu.recover_large_pages(HOME, SLOT).expect("the slot exists");
    assert_eq!(size(), Some(PageSize::Size2M));
    assert_eq!(write(&mut vcpu, &ram, 9), 0, "and all of it may be written");
}

/// What a copy of the memory is kept up to date by.
#[derive(Clone, Copy, PartialEq)]
enum Copying {
    Log(LogBy),
    Rings,
}

pub(crate) fn copies_by_protection<F: Format>() {
    copies::<F>(Copying::Log(LogBy::Protection), WitnessKind::Intent);
}

pub(crate) fn copies_by_marks<F: Format>() {
    if F::HAS_DIRTY {
        copies::<F>(Copying::Log(LogBy::Marks), WitnessKind::Intent);
    }
}

pub(crate) fn copies_by_ring<F: Format>() {
    copies::<F>(Copying::Rings, WitnessKind::Lock);
}

/// A live migration: while two vCPUs write, pages are copied round by round; when they have stopped, one last time. Then the
/// copy is the memory.
fn copies<F: Format>(copying: Copying, witness: WitnessKind) {
    const ROUNDS: u64 = 60;
    let none = GfnRange::new(Gfn::new(0), Gfn::new(0));
    let host = Tests { block: PageSize::Size4K, mixed: none };
    let (mmu, _) = machine_with::<F>(FRAMES, host, LargePages::up_to(PageSize::Size4K), witness);
    let ram = Ram::new(FRAMES, 0);
    let by = if let Copying::Log(by) = copying { by } else { LogBy::Protection };
    mmu.start_dirty_log(HOME, SLOT, by, Initially::AllSet).expect("the slot exists");
    let copy: Vec<_> = (0..FRAMES).map(|_| AtomicU64::new(0)).collect();
    let race = Race::default();
    let rings: Vec<Arc<DirtyRing>> = std::thread::scope(|scope| {
        let vcpus = [1, 2].map(|seed| (seed, mmu.vcpu()));
        let mut rings = vec![];
        for (seed, mut vcpu) in vcpus {
            if copying == Copying::Rings {
                rings.push(vcpu.log_in_ring(16));
            }
            let (ram, race) = (&ram, &race);
            scope.spawn(move || write_on(&mut vcpu, ram, seed, race));
        }
        let _stop = Stop(&race);
        for round in 0..ROUNDS {
            race.let_them_run();
            copy_round(&mmu, &ram, &rings, &copy);
            if round % 5 == 4 {
                drop(mmu.invalidate(hvas(round, round + 3), Zap::Unmap, Blocking::Allowed));
            }
        }
        rings
    });
    copy_round(&mmu, &ram, &rings, &copy);
    for (frame, (copied, word)) in copy.iter().zip(&ram.words).enumerate() {
        assert_eq!(copied.load(Ordering::Relaxed), word.load(Ordering::Relaxed), "frame {frame}");
    }
}

/// Copies what was written since the last round.
fn copy_round<F: Format>(mmu: &Mmu<F>, ram: &Ram, rings: &[Arc<DirtyRing>], copy: &[AtomicU64]) {
    let mut written = take(mmu);
    for ring in rings {
        ring.collect(|frame| written.push(frame.gfn - Gfn::new(FIRST)));
    }
    mmu.reset_dirty_rings();
    for frame in written {
        let pfn = ram.pages[frame as usize].load(Ordering::Relaxed);
        copy[frame as usize].store(ram.words[pfn as usize].load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// A vCPU that writes to frames of the slot in an order of its own until the race is over.
fn write_on<F: Format>(vcpu: &mut Vcpu<'_, Stage2<F, Tests>>, ram: &Arc<Ram>, mut seed: u64, race: &Race) {
    let _stop = Stop(race);
    let mut tlb = Tlb::new();
    while !race.over.load(Ordering::Relaxed) {
        if let Err(requests) = vcpu.enter_guest() {
            obey(vcpu, &mut tlb, requests);
            continue;
        }
        let mut met = None;
        for _ in 0..64 {
            if met.is_some() || vcpu.is_kicked() {
                break;
            }
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let gfn = FIRST + (seed >> 33) % FRAMES;
            match access(vcpu, &mut tlb, ram, gfn, Access::WRITE) {
                Ok(pfn) => {
                    ram.words[pfn.as_u64() as usize].fetch_add(1, Ordering::Relaxed);
                    race.accesses.fetch_add(1, Ordering::Relaxed);
                }
                Err(found) => met = Some(Fault { found, ..Fault::new(Gfn::new(gfn), Access::WRITE) }),
            }
        }
        obey(vcpu, &mut tlb, vcpu.leave_guest());
        if let Some(fault) = met {
            match vcpu.handle_fault(&Primary(Arc::clone(ram)), &fault) {
                // The others go on until somebody collects.
                Err(FaultError::DirtyRingFull(_)) => {
                    race.accesses.fetch_add(1, Ordering::Relaxed);
                    std::thread::yield_now();
                }
                Ok(FaultOutcome::Retry(retry)) => vcpu.mmu().wait(retry.range),
                outcome => drop(outcome.expect("the page is there")),
            }
        }
    }
}
