//! Every step and outcome of the fault path but the retries of the sequence, which are in `precheck.rs`.

use core::sync::atomic::Ordering;
use std::sync::Arc;

use afterimage_mmu::{
    Access, Blocking, Emulate, Fault, FaultError, FaultInError, FaultKind, FaultOutcome, Found, Gfn, Memslot,
    PageUse, Patience, Privacy, RetryPoint, SlotFlags, SlotId, SpaceId, Zap,
};

use crate::support::frames::{Frames, LockThen, Release};
use crate::support::hooks::Point;
use crate::support::machine::{Machine, Touched, both};
use crate::support::table::Entry;

pub(crate) fn a_first_touch_maps_the_page() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    assert_eq!(machine.entry(3), Entry::Absent);
    assert_eq!(guest.fault(3, Access::READ), Ok(FaultOutcome::Fixed));
    assert!(matches!(machine.entry(3), Entry::Leaf { writable: true, .. }));
    assert_eq!(guest.read(3, 3).generation, 0);
    let stats = machine.mmu.fault_stats();
    assert_eq!((stats.taken, stats.fixed, stats.retried()), (1, 1, 0));
    machine.assert_balanced();
}

pub(crate) fn a_present_translation_is_spurious_without_a_page() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    assert_eq!(guest.fault(3, Access::READ), Ok(FaultOutcome::Fixed));
    machine.frames.releases();
    assert_eq!(guest.fault(3, Access::READ), Ok(FaultOutcome::Spurious));
    assert_eq!(machine.frames.releases(), [], "the fast path asks for no page");
    assert_eq!(machine.mmu.fault_stats().spurious, 1);
}

pub(crate) fn a_missing_permission_comes_back_without_the_lock() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    assert_eq!(guest.fault(3, Access::WRITE), Ok(FaultOutcome::Fixed));
    drop(machine.mmu.invalidate(Frames::hvas(3, 4), Zap::WriteProtect, Blocking::Allowed));
    assert!(matches!(machine.entry(3), Entry::Leaf { writable: false, .. }), "it can be read still");
    // While another invalidation covers it, too: a present entry loses to any zap.
    let invalidation = machine.mmu.invalidate(Frames::hvas(3, 4), Zap::WriteProtect, Blocking::Allowed);
    assert_eq!(guest.fault(3, Access::WRITE), Ok(FaultOutcome::FixedFast));
    drop(invalidation);
    assert_eq!(machine.mmu.fault_stats().fast, 1);
}

pub(crate) fn another_install_first_is_spurious() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let other = machine.share();
    machine.frames.hooks.once(Point::FaultedIn, move || {
        assert_eq!(other.guest().fault(3, Access::WRITE), Ok(FaultOutcome::Fixed));
    });
    assert_eq!(guest.fault(3, Access::WRITE), Ok(FaultOutcome::Spurious));
    machine.assert_balanced();
}

pub(crate) fn a_lost_race_is_retried() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    machine.mmu.secondary().lose_races.store(true, Ordering::Relaxed);
    assert_eq!(guest.retry_point(3), RetryPoint::LostRace);
    let stats = machine.mmu.fault_stats();
    assert_eq!((stats.retries_at(RetryPoint::LostRace), stats.wasted_fault_ins), (1, 1));
    assert_eq!(machine.entry(3), Entry::Absent);
    machine.assert_balanced();
}

pub(crate) fn a_stale_root_is_retried_under_the_lock() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    machine.mmu.secondary().root_stale.store(true, Ordering::Relaxed);
    assert_eq!(guest.retry_point(3), RetryPoint::UnderLock);
    assert_eq!(machine.entry(3), Entry::Absent);
    machine.assert_balanced();
}

pub(crate) fn without_memory_for_caches_nothing_is_taken() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    machine.mmu.secondary().no_memory.store(true, Ordering::Relaxed);
    assert_eq!(guest.fault(3, Access::READ), Err(FaultError::NoMemory(Gfn::new(3))));
    assert_eq!(machine.frames.releases(), [], "no page was asked for");
    assert_eq!(machine.mmu.fault_stats().failed, 1);
}

pub(crate) fn a_tracked_frame_can_be_read_and_not_written() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    machine.mmu.secondary().track_writes(Gfn::new(3));
    assert_eq!(guest.fault(3, Access::WRITE), Ok(FaultOutcome::WriteProtected));
    assert_eq!(machine.mmu.fault_stats().write_protected, 1);
    assert_eq!(machine.entry(3), Entry::Absent);
    assert_eq!(guest.fault(3, Access::READ), Ok(FaultOutcome::Fixed));
}

pub(crate) fn private_memory_is_not_shared_memory() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    machine.frames.set_private(Gfn::new(3));
    let wrong = |accessed| Err(FaultError::WrongPrivacy { gfn: Gfn::new(3), accessed });
    assert_eq!(guest.fault(3, Access::READ), wrong(Privacy::Shared));
    let private = Fault { privacy: Privacy::Private, ..Fault::new(Gfn::new(3), Access::READ) };
    assert_eq!(guest.serve(&private), Ok(FaultOutcome::Fixed));
    let outside = Fault { privacy: Privacy::Private, ..Fault::new(Gfn::new(100), Access::READ) };
    machine.frames.set_private(Gfn::new(100));
    let wrong = Err(FaultError::WrongPrivacy { gfn: Gfn::new(100), accessed: Privacy::Private });
    assert_eq!(guest.serve(&outside), wrong, "private memory of no slot");
}

pub(crate) fn a_shared_translation_is_no_answer_to_a_private_access() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    assert_eq!(guest.fault(3, Access::READ), Ok(FaultOutcome::Fixed));
    let wrong = Err(FaultError::WrongPrivacy { gfn: Gfn::new(3), accessed: Privacy::Private });
    for access in [Access::READ, Access::WRITE] {
        let found = Fault { found: Found::Present, ..Fault::new(Gfn::new(3), access) };
        assert_eq!(guest.serve(&Fault { privacy: Privacy::Private, ..found }), wrong);
        assert_eq!(guest.serve(&found), Ok(FaultOutcome::Spurious), "the translation is good for others");
    }
}

pub(crate) fn an_attribute_that_changes_after_it_was_read_is_noticed() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let other = machine.share();
    // The attribute is read after the snapshot: the conversion, an invalidation, ends after it.
    let frames = Arc::clone(&machine.frames);
    let convert = move || drop(other.invalidate(3, 4));
    machine.mmu.secondary().hooks.once(Point::TopUp, move || frames.hooks.once(Point::Privacy, convert));
    assert_eq!(guest.retry_point(3), RetryPoint::BeforeFaultIn);
}

fn read_only(machine: &Machine) -> Memslot {
    Memslot { flags: SlotFlags::READ_ONLY, ..machine.slot(1, 100, 4, 100) }
}

pub(crate) fn read_only_memory_emulates_writes() {
    let machine = Machine::new(both());
    machine.mmu.create_slot(read_only(&machine)).expect("nothing is there");
    let mut guest = machine.guest();
    assert_eq!(guest.fault(100, Access::WRITE), Ok(FaultOutcome::Emulate(Emulate::ReadOnly)));
    assert_eq!(machine.frames.releases(), [], "no page was asked for");
    assert_eq!(guest.fault(100, Access::READ), Ok(FaultOutcome::Fixed));
    assert!(matches!(machine.entry(100), Entry::Leaf { writable: false, .. }));
    assert_eq!(guest.touch(100, Access::WRITE), Ok(Touched::Emulated(Emulate::ReadOnly)));
}

pub(crate) fn each_failure_of_the_page_has_its_outcome() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let gfn = Gfn::new(3);
    let cases = [
        (FaultInError::Interrupted, Err(FaultError::Interrupted(gfn))),
        (FaultInError::ReadOnly, Ok(FaultOutcome::Emulate(Emulate::ReadOnly))),
        (FaultInError::NoMemory, Err(FaultError::NoMemory(gfn))),
        (FaultInError::Failed("hole"), Err(FaultError::NoPage { gfn, cause: "hole" })),
    ];
    for (answer, outcome) in cases {
        machine.frames.answer_with([answer]);
        assert_eq!(guest.fault(3, Access::WRITE), outcome, "{answer:?}");
        assert_eq!(machine.frames.asked(), [Patience::NoWait], "{answer:?}");
        assert_eq!(machine.entry(3), Entry::Absent, "{answer:?}");
    }
    assert_eq!(machine.frames.releases(), [], "there was no page to give back");
    assert!(!machine.mmu.is_locked());
}

pub(crate) fn a_page_that_needs_io_is_asked_for_again_with_patience() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    machine.frames.answer_with([FaultInError::WouldWait]);
    assert_eq!(guest.fault(3, Access::READ), Ok(FaultOutcome::Fixed));
    assert_eq!(machine.frames.asked(), [Patience::NoWait, Patience::Interruptible]);
    machine.frames.answer_with([FaultInError::WouldWait, FaultInError::Interrupted]);
    assert_eq!(guest.fault(4, Access::READ), Err(FaultError::Interrupted(Gfn::new(4))));
    machine.assert_balanced();
}

pub(crate) fn a_lost_page_is_poisoned_and_says_why() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    machine.frames.answer_with([FaultInError::Poisoned("disk gone")]);
    let poisoned = FaultError::Poisoned { gfn: Gfn::new(3), cause: "disk gone" };
    assert_eq!(guest.fault(3, Access::READ), Err(poisoned));
    assert_eq!(poisoned.to_string(), "the content of guest frame 0x3 is lost and it is poisoned: disk gone");
    assert_eq!(machine.entry(3), Entry::Poison);
    assert_eq!(machine.mmu.fault_stats().poisoned, 1);
}

pub(crate) fn poison_is_checked_like_any_install() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let other = machine.share();
    machine.frames.answer_with([FaultInError::Poisoned("disk gone")]);
    machine.frames.hooks.once(Point::FaultIn, move || other.discard(3, 4));
    assert_eq!(guest.retry_point(3), RetryPoint::UnderLock, "the page was replaced by a good one meanwhile");
    assert_eq!(machine.entry(3), Entry::Absent);
    machine.mmu.secondary().lose_races.store(true, Ordering::Relaxed);
    machine.frames.answer_with([FaultInError::Poisoned("disk gone")]);
    assert_eq!(guest.retry_point(3), RetryPoint::LostRace);
    machine.mmu.secondary().refuse.store(true, Ordering::Relaxed);
    machine.frames.answer_with([FaultInError::Poisoned("disk gone")]);
    let refused = FaultError::CannotMap { gfn: Gfn::new(3), cause: "the table refuses" };
    assert_eq!(guest.fault(3, Access::READ), Err(refused));
}

pub(crate) fn frames_of_no_slot_are_a_device() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    assert_eq!(guest.fault(100, Access::READ), Ok(FaultOutcome::Emulate(Emulate::Mmio)));
    assert!(matches!(machine.entry(100), Entry::Mmio { .. }), "and are remembered as one");
    assert_eq!(machine.mmu.fault_stats().emulated, 1);
}

pub(crate) fn a_cached_device_is_one_until_the_memslots_change() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let reserved = Fault { found: Found::Reserved, ..Fault::new(Gfn::new(100), Access::READ) };
    assert_eq!(guest.serve(&reserved).map(retried), Ok(Some(RetryPoint::LostRace)), "the entry is gone");
    assert_eq!(guest.touch(100, Access::READ), Ok(Touched::Emulated(Emulate::Mmio)));
    let found_slot = machine.share();
    machine.mmu.secondary().hooks.each(Point::TopUp, || panic!("a cached device takes no further step"));
    assert_eq!(guest.serve(&reserved), Ok(FaultOutcome::Emulate(Emulate::Mmio)));
    machine.mmu.secondary().hooks.clear();
    found_slot.mmu.create_slot(machine.slot(1, 100, 4, 100)).expect("nothing is there");
    // Nothing was zapped for it: the generation alone makes the entry old.
    assert!(matches!(machine.entry(100), Entry::Mmio { .. }));
    guest.read(100, 100);
}

fn retried(outcome: FaultOutcome) -> Option<RetryPoint> {
    match outcome {
        FaultOutcome::Retry(retry) => Some(retry.point),
        _ => None,
    }
}

pub(crate) fn address_spaces_do_not_share_slots() {
    let machine = Machine::new(both());
    let other_space = Memslot { space: SpaceId(1), ..machine.slot(0, 0, 4, 32) };
    machine.mmu.create_slot(other_space).expect("another space");
    let mut guest = machine.guest();
    guest.read(3, 3);
    guest.space = SpaceId(1);
    guest.read(3, 35);
    assert_eq!(guest.fault(4, Access::READ), Ok(FaultOutcome::Emulate(Emulate::Mmio)));
    machine.mmu.delete_slot(SpaceId(1), SlotId(0)).expect("it exists");
    assert!(matches!(machine.entry(3), Entry::Leaf { .. }), "the other space keeps its own");
}

pub(crate) fn a_prefetch_is_served_like_a_demand() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let prefetch = Fault { kind: FaultKind::Prefetch, ..Fault::new(Gfn::new(3), Access::READ) };
    assert_eq!(guest.serve(&prefetch), Ok(FaultOutcome::Fixed));
    assert_eq!(guest.serve(&prefetch), Ok(FaultOutcome::Spurious));
}

pub(crate) fn an_install_that_fails_says_why() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    machine.mmu.secondary().refuse.store(true, Ordering::Relaxed);
    let refused = FaultError::CannotMap { gfn: Gfn::new(3), cause: "the table refuses" };
    assert_eq!(guest.fault(3, Access::READ), Err(refused));
    let unused = Release { used: PageUse::Unused, lock: LockThen::Held };
    assert_eq!(machine.frames.releases(), [unused]);
    assert!(!machine.mmu.is_locked());
}

pub(crate) fn a_released_machine_maps_nothing() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    guest.read(3, 3);
    machine.mmu.release();
    assert!(machine.mmu.is_released());
    assert_eq!(machine.mmu.secondary().mapped(), 0);
    assert_eq!(guest.fault(3, Access::READ), Err(FaultError::Released(Gfn::new(3))));
    guest.enter();
    assert!(!guest.caches(3), "and no TLB holds anything");
    assert!(guest.vcpu.leave_guest().is_empty());
}

/// The fault has its page when the machine is released: it must not install behind the back of the release.
pub(crate) fn a_release_overtakes_a_fault() {
    for poisoned in [false, true] {
        let machine = Machine::new(both());
        let mut guest = machine.guest();
        let other = machine.share();
        if poisoned {
            machine.frames.answer_with([FaultInError::Poisoned("disk gone")]);
        }
        machine.frames.hooks.once(Point::FaultIn, move || other.mmu.release());
        assert_eq!(guest.fault(3, Access::READ), Err(FaultError::Released(Gfn::new(3))));
        assert_eq!(machine.entry(3), Entry::Absent, "nobody will ever zap this entry");
        machine.assert_balanced();
    }
}
