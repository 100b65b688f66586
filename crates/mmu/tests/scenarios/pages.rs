//! Every page comes back exactly once, on every way out: used under the lock, unused wherever the fault gave up.

use core::panic::AssertUnwindSafe;
use core::sync::atomic::Ordering;
use std::panic::catch_unwind;

use afterimage_mmu::{Access, FaultOutcome, Memslot, PageUse, RetryPoint, SlotFlags};

use crate::support::frames::{LockThen, Release};
use crate::support::hooks::Point;
use crate::support::machine::{Machine, both, unchecked};
use crate::support::table::Entry;

pub(crate) fn an_installed_page_comes_back_under_the_lock() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    assert_eq!(guest.fault(3, Access::WRITE), Ok(FaultOutcome::Fixed));
    machine.frames.set_writable(false);
    assert_eq!(guest.fault(4, Access::READ), Ok(FaultOutcome::Fixed));
    let dirty = Release { used: PageUse::Dirty, lock: LockThen::Held };
    let clean = Release { used: PageUse::Clean, lock: LockThen::Held };
    assert_eq!(machine.frames.releases(), [dirty, clean]);
    machine.assert_balanced();
}

pub(crate) fn a_page_found_doomed_after_fault_in_comes_back() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let other = machine.share();
    machine.frames.hooks.once(Point::FaultedIn, move || drop(other.invalidate(3, 4)));
    assert_eq!(guest.retry_point(3), RetryPoint::AfterFaultIn);
    machine.assert_balanced();
    let unused = Release { used: PageUse::Unused, lock: LockThen::Free };
    assert_eq!(machine.frames.releases(), [unused], "once, and nobody had to take the lock for it");
    assert_eq!(machine.mmu.fault_stats().wasted_fault_ins, 1);
}

pub(crate) fn a_page_found_doomed_under_the_lock_comes_back_unused() {
    let machine = Machine::new(unchecked());
    let mut guest = machine.guest();
    let other = machine.share();
    machine.frames.hooks.once(Point::FaultedIn, move || drop(other.invalidate(3, 4)));
    assert_eq!(guest.retry_point(3), RetryPoint::UnderLock);
    let unused = Release { used: PageUse::Unused, lock: LockThen::Held };
    assert_eq!(machine.frames.releases(), [unused]);
    machine.assert_balanced();
}

pub(crate) fn a_page_that_lost_its_race_comes_back_unused() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    machine.mmu.secondary().lose_races.store(true, Ordering::Relaxed);
    assert_eq!(guest.retry_point(3), RetryPoint::LostRace);
    let unused = Release { used: PageUse::Unused, lock: LockThen::Held };
    assert_eq!(machine.frames.releases(), [unused]);
    machine.assert_balanced();
}

pub(crate) fn a_panic_in_map_leaves_nothing_behind() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    machine.mmu.secondary().hooks.once(Point::Map, || panic!("deliberately, in map"));
    let fault = catch_unwind(AssertUnwindSafe(|| guest.fault(3, Access::READ)));
    fault.expect_err("it panicked");
    machine.mmu.secondary().hooks.clear();
    let unused = Release { used: PageUse::Unused, lock: LockThen::Held };
    assert_eq!(machine.frames.releases(), [unused], "given back, and before the lock");
    assert!(!machine.mmu.is_locked());
    // The read section is over, too: an update returns, and the guest goes on.
    machine.mmu.create_slot(machine.slot(1, 100, 4, 100)).expect("nothing is there");
    assert_eq!(machine.entry(3), Entry::Absent);
    guest.read(3, 3);
    machine.assert_balanced();
}

pub(crate) fn a_page_of_read_only_memory_comes_back_clean() {
    let machine = Machine::new(both());
    let slot = Memslot { flags: SlotFlags::READ_ONLY, ..machine.slot(1, 100, 4, 100) };
    machine.mmu.create_slot(slot).expect("nothing is there");
    // The host could write the page; the guest cannot, through this slot.
    assert_eq!(machine.guest().fault(100, Access::READ), Ok(FaultOutcome::Fixed));
    let clean = Release { used: PageUse::Clean, lock: LockThen::Held };
    assert_eq!(machine.frames.releases(), [clean]);
}
