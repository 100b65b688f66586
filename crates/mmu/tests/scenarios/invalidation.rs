//! What is true when an invalidation has begun, and until it ends.

use core::cell::Cell;
use core::sync::atomic::{AtomicU64, Ordering};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

use afterimage_mmu::{
    Access, Age, Blocking, Coverage, Emulate, FaultOutcome, Gfn, HvaRange, Memslot, Notifier, Policy,
    RetryPoint, SlotId, SpaceId, YieldPolicy, Young, Zap,
};

use crate::support::frames::Frames;
use crate::support::gate::{Finished, Gate, Parks};
use crate::support::hooks::Point;
use crate::support::machine::{Machine, both, unchecked};
use crate::support::platform::{forget_resched, tell_when_parked, want_resched};
use crate::support::table::Entry;

pub(crate) fn when_it_has_begun_nothing_maps_the_range() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    guest.read_all(0..64);
    let invalidation = machine.invalidate(8, 24);
    for gfn in 0..64 {
        let mapped = machine.entry(gfn) != Entry::Absent;
        assert_eq!(mapped, !(8..24).contains(&gfn), "gfn {gfn}");
    }
    // No TLB does either: this guest must forget before it runs again.
    guest.enter();
    assert!(!guest.caches(8), "the TLB was not flushed before the invalidation had begun");
    assert!(guest.vcpu.leave_guest().is_empty());
    drop(invalidation);
    let stats = machine.mmu.invalidation_stats();
    assert_eq!((stats.events, stats.completed, stats.zapped_frames, stats.flushes), (1, 1, 16, 1));
    assert!(stats.total_ns >= stats.longest_ns && stats.longest_ns > 0);
}

pub(crate) fn without_translations_nothing_is_flushed() {
    let machine = Machine::new(both());
    machine.discard(8, 24);
    assert_eq!(machine.mmu.invalidation_stats().flushes, 0);
}

pub(crate) fn a_range_without_slots_takes_no_lock() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let other = machine.share();
    // The lock is held by the fault that runs this.
    machine.mmu.secondary().hooks.once(Point::Map, move || {
        let invalidation = other.invalidate(500, 600);
        assert_eq!(other.mmu.invalidations().in_progress(), 0, "begin was not called");
        drop(invalidation);
    });
    assert_eq!(
        guest.fault(3, Access::READ),
        Ok(FaultOutcome::Fixed),
        "and no end either: the sequence stays"
    );
    let stats = machine.mmu.invalidation_stats();
    assert_eq!((stats.events, stats.completed), (1, 0));
}

pub(crate) fn every_slot_over_the_range_is_zapped() {
    let machine = Machine::new(both());
    let alias = Memslot { space: SpaceId(1), ..machine.slot(0, 64, 32, 16) };
    machine.mmu.create_slot(alias).expect("another space");
    machine.mmu.create_slot(machine.slot(1, 128, 8, 16)).expect("nothing is there");
    let mut guest = machine.guest();
    guest.read(16, 16);
    guest.read(128, 16);
    guest.space = SpaceId(1);
    guest.read(64, 16);
    assert_eq!(machine.mmu.secondary().mapped(), 3);
    let invalidation = machine.invalidate(16, 17);
    assert_eq!(machine.mmu.secondary().mapped(), 0, "one page, three views of it");
    assert_eq!(guest.retry_point(64), RetryPoint::BeforeFaultIn);
    guest.space = SpaceId(0);
    for gfn in [16, 128] {
        assert_eq!(guest.retry_point(gfn), RetryPoint::BeforeFaultIn);
    }
    drop(invalidation);
}

/// A host's function panics within a begin: what was begun is ended, and who takes the same frames next flushes.
pub(crate) fn a_panic_in_a_zap_leaves_only_its_flush() {
    for (point, nth) in [(Point::Zap, 2), (Point::Flush, 1)] {
        let machine = Machine::new(both());
        let mut guest = machine.guest();
        guest.read_all(2..6);
        let times = AtomicU64::new(0);
        machine.mmu.secondary().hooks.each(point, move || {
            assert_ne!(times.fetch_add(1, Ordering::Relaxed) + 1, nth, "deliberately, in a callback");
        });
        catch_unwind(AssertUnwindSafe(|| drop(machine.invalidate(2, 6)))).expect_err("it panicked");
        machine.mmu.secondary().hooks.clear();
        assert!(!machine.mmu.is_locked());
        assert_eq!(machine.mmu.invalidations().in_progress(), 0);
        machine.mmu.create_slot(machine.slot(1, 100, 4, 100)).expect("no event holds it up");
        let flushes = || machine.mmu.invalidation_stats().flushes;
        assert_eq!(machine.entry(2), Entry::Absent);
        let before = flushes();
        drop(machine.invalidate(2, 3));
        assert_eq!(flushes(), before + 1, "a vCPU may still have what was zapped");
        drop(machine.invalidate(2, 3));
        assert_eq!(flushes(), before + 1, "once");
        guest.read(2, 2);
        machine.assert_balanced();
    }
}

pub(crate) fn a_part_of_a_page_is_the_whole_page() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    guest.read_all(2..6);
    let hvas = HvaRange::new(Frames::hva(3) + 4095, Frames::hva(4) + 1);
    drop(machine.mmu.invalidate(hvas, Zap::Unmap, Blocking::Allowed));
    let absent: Vec<u64> = (2..6).filter(|gfn| machine.entry(*gfn) == Entry::Absent).collect();
    assert_eq!(absent, [3, 4]);
}

pub(crate) fn the_hull_grows_and_lasts_until_the_last_end() {
    for policy in [both(), unchecked()] {
        let machine = Machine::new(policy);
        let mut guest = machine.guest();
        let first = machine.invalidate(4, 5);
        assert_eq!(guest.fault(20, Access::READ), Ok(FaultOutcome::Fixed), "one range, no hull yet");
        let second = machine.invalidate(40, 41);
        assert!(matches!(guest.fault(19, Access::READ), Ok(FaultOutcome::Retry(_))), "between the two");
        drop(first);
        assert!(
            matches!(guest.fault(4, Access::READ), Ok(FaultOutcome::Retry(_))),
            "ranges are not taken away"
        );
        assert!(matches!(guest.fault(19, Access::READ), Ok(FaultOutcome::Retry(_))));
        assert_eq!(guest.fault(41, Access::READ), Ok(FaultOutcome::Fixed), "behind the hull");
        drop(second);
        assert_eq!(guest.fault(19, Access::READ), Ok(FaultOutcome::Fixed));
        // The old bounds mean nothing to the next invalidation.
        let third = machine.invalidate(50, 51);
        assert_eq!(guest.fault(18, Access::READ), Ok(FaultOutcome::Fixed));
        drop(third);
    }
}

/// With exact ranges the frames between are free, until there are more ranges than entries.
pub(crate) fn frames_between_exact_ranges_are_free() {
    let machine = Machine::new(Policy { coverage: Coverage::Exact, ..both() });
    let mut guest = machine.guest();
    let first = machine.invalidate(3, 4);
    let second = machine.invalidate(40, 41);
    assert_eq!(guest.fault(20, Access::READ), Ok(FaultOutcome::Fixed));
    for covered in [3, 40] {
        assert_eq!(guest.retry_point(covered), RetryPoint::BeforeFaultIn);
    }
    let six: Vec<_> = (50..56).map(|page| machine.invalidate(page, page + 1)).collect();
    assert_eq!(guest.fault(21, Access::READ), Ok(FaultOutcome::Fixed), "eight ranges are known exactly");
    let ninth = machine.invalidate(60, 61);
    assert_eq!(guest.retry_point(22), RetryPoint::BeforeFaultIn, "the ninth is not: the hull counts");
    drop(ninth);
    assert_eq!(guest.fault(22, Access::READ), Ok(FaultOutcome::Fixed));
    drop((first, six));
    let again = machine.invalidate(3, 6);
    assert_eq!(guest.retry_point(4), RetryPoint::BeforeFaultIn, "entries are used again");
    drop((again, second));
    guest.read_all(0..64);
}

/// Aliases of one host page: one invalidation with a range in each slot.
pub(crate) fn every_range_of_an_invalidation_is_exact() {
    let machine = Machine::new(Policy { coverage: Coverage::Exact, ..both() });
    machine.mmu.create_slot(machine.slot(1, 100, 4, 3)).expect("an alias of host pages 3..7");
    let mut guest = machine.guest();
    let invalidation = machine.invalidate(3, 4);
    for (gfn, covered) in [(3, true), (100, true), (50, false), (101, false)] {
        match covered {
            true => assert_eq!(guest.retry_point(gfn), RetryPoint::BeforeFaultIn),
            false => assert_eq!(guest.fault(gfn, Access::READ), Ok(FaultOutcome::Fixed)),
        }
    }
    drop(invalidation);
}

pub(crate) fn invalidations_nest_in_one_thread() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let outer = machine.invalidate(4, 8);
    let inner = machine.invalidate(5, 6);
    assert_eq!(machine.mmu.invalidations().in_progress(), 2);
    drop(inner);
    assert_eq!(guest.retry_point(5), RetryPoint::BeforeFaultIn, "the outer one covers it still");
    drop(outer);
    assert_eq!(guest.fault(5, Access::READ), Ok(FaultOutcome::Fixed));
}

pub(crate) fn a_fault_before_the_zap_is_zapped() {
    let machine = Machine::new(both());
    let (holds_lock, parks) = (Arc::new(Gate::default()), Arc::new(Parks::default()));
    // The invalidation comes while the fault holds the lock: it waits for the install, and zaps it.
    let (hook_gate, hook_parks) = (Arc::clone(&holds_lock), Arc::clone(&parks));
    machine.mmu.secondary().hooks.once(Point::Map, move || {
        hook_gate.arrive();
        hook_parks.until(1);
    });
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _finished = Finished(&parks);
            tell_when_parked(&parks);
            holds_lock.until_arrived();
            machine.discard(3, 4);
            assert_eq!(machine.entry(3), Entry::Absent);
        });
        assert_eq!(machine.guest().fault(3, Access::READ), Ok(FaultOutcome::Fixed));
    });
    assert_eq!(machine.guest().read(3, 3).generation, 1);
}

/// A zap may give the lock up between two slots: a fault on the later one installs, and is zapped in its turn.
pub(crate) fn every_slot_is_refused_during_a_yield() {
    let machine = Machine::new(Policy { yielding: YieldPolicy::OnResched, ..both() });
    machine.mmu.create_slot(machine.slot(1, 100, 4, 3)).expect("nothing is there");
    machine.mmu.create_slot(machine.slot(2, 200, 4, 3)).expect("nothing is there");
    let other = machine.share();
    let refused = Rc::new(Cell::new(0));
    let count = Rc::clone(&refused);
    want_resched(move || {
        let mut guest = other.guest();
        for gfn in [3, 100, 200] {
            assert_eq!(guest.retry_point(gfn), RetryPoint::BeforeFaultIn);
            count.set(count.get() + 1);
        }
    });
    let invalidation = machine.invalidate(3, 4);
    forget_resched();
    assert_eq!(refused.get(), 9, "three slots, and a yield in each");
    assert_eq!(machine.mmu.secondary().mapped(), 0);
    drop(invalidation);
}

pub(crate) fn write_protection_leaves_reading() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    guest.touch(3, Access::WRITE).expect("it is memory");
    let invalidation = machine.mmu.invalidate(Frames::hvas(3, 4), Zap::WriteProtect, Blocking::Allowed);
    assert!(matches!(machine.entry(3), Entry::Leaf { writable: false, .. }));
    guest.enter();
    assert!(!guest.caches(3), "the TLB would let writes through");
    assert!(guest.vcpu.leave_guest().is_empty());
    drop(invalidation);
}

pub(crate) fn ages_are_told_and_taken() {
    let machine = Machine::new(both());
    machine.mmu.create_slot(machine.slot(1, 100, 4, 3)).expect("an alias of host pages 3..7");
    let mut guest = machine.guest();
    let page = Frames::hvas(3, 4);
    assert_eq!(machine.mmu.age(page, Age::Test), Young::No);
    guest.read(100, 3);
    assert_eq!(machine.mmu.age(page, Age::Test), Young::Yes, "through either view");
    assert_eq!(machine.mmu.age(page, Age::Clear), Young::Yes);
    assert_eq!(machine.mmu.age(page, Age::Test), Young::No);
    assert_eq!(machine.mmu.age(Frames::hvas(900, 901), Age::Clear), Young::No, "no slot");
    assert_eq!(machine.mmu.invalidation_stats().events, 0, "aging is no invalidation");
}

pub(crate) fn the_notifier_changes_pages_inside() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    guest.read(3, 3);
    let notifier: &dyn Notifier = &*machine.mmu;
    notifier.invalidating(Frames::hvas(3, 4), Zap::Unmap, Blocking::Forbidden, &mut || {
        assert_eq!(machine.entry(3), Entry::Absent);
        assert_eq!(machine.mmu.invalidations().in_progress(), 1);
        machine.frames.discard(3);
    });
    assert_eq!(machine.mmu.invalidations().in_progress(), 0);
    assert_eq!(guest.read(3, 3).generation, 1);
    assert_eq!(notifier.age(Frames::hvas(3, 4), Age::Test), Young::Yes);
}

/// Many pages go in turn, each with its own invalidation, and a guest finds none of the old ones.
pub(crate) fn each_round_shows_the_page_of_that_round() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    for round in 0..4 {
        for page in 0..8 {
            assert_eq!(guest.read(page, page).generation, round);
        }
        machine.discard(0, 8);
    }
    machine.assert_balanced();
    assert_eq!(
        guest.fault(Gfn::new(63).as_u64() + 1, Access::READ),
        Ok(FaultOutcome::Emulate(Emulate::Mmio))
    );
    assert_eq!(machine.mmu.delete_slot(SpaceId(0), SlotId(0)), Ok(()));
}
