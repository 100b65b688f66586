//! When a zap gives `mmu_lock` up, what it does before, and that it gets on.

use core::cell::{Cell, RefCell};
use core::sync::atomic::{AtomicU64, Ordering};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use afterimage_mmu::{Access, Blocking, FaultOutcome, Found, Gfn, Policy, SpaceId, YieldPolicy, Zap};

use crate::support::frames::Frames;
use crate::support::gate::{Finished, Gate, Parks};
use crate::support::hooks::Point;
use crate::support::machine::{Guest, Machine, both};
use crate::support::platform::{forget_resched, let_pass, tell_when_parked, want_resched};
use crate::support::table::Entry;

fn yielding(yielding: YieldPolicy) -> Machine {
    Machine::new(Policy { yielding, ..both() })
}

/// How often an invalidation of 16 mapped frames yields while the scheduler always wants the CPU.
fn yields(policy: YieldPolicy, blocking: Blocking) -> u64 {
    let machine = yielding(policy);
    let mut guest = machine.guest();
    guest.read_all(0..16);
    want_resched(|| {});
    let invalidation = machine.mmu.invalidate(Frames::hvas(0, 16), Zap::Unmap, blocking);
    forget_resched();
    drop(invalidation);
    let stats = machine.mmu.invalidation_stats();
    assert_eq!((stats.flushes_for_scheduler, stats.flushes_for_waiters), (stats.yields, 0));
    stats.yields
}

pub(crate) fn the_policy_says_whether_to_yield() {
    assert_eq!(yields(YieldPolicy::OnContention, Blocking::Allowed), 16);
    assert_eq!(
        yields(YieldPolicy::OnResched, Blocking::Allowed),
        16,
        "an entry each time, and no more yields"
    );
    assert_eq!(yields(YieldPolicy::Never, Blocking::Allowed), 0);
}

pub(crate) fn who_may_not_block_never_yields() {
    for policy in [YieldPolicy::OnContention, YieldPolicy::OnResched, YieldPolicy::Never] {
        assert_eq!(yields(policy, Blocking::Forbidden), 0, "{policy:?}");
    }
}

/// Rule F2: whoever gets the lock finds no absent entry that a TLB still holds.
pub(crate) fn nothing_is_owed_while_the_lock_is_given_up() {
    let machine = yielding(YieldPolicy::OnResched);
    let mut guest = machine.guest();
    guest.read_all(0..4);
    drop(guest);
    let other = machine.share();
    let stale = Rc::new(RefCell::new(Vec::new()));
    let found = Rc::clone(&stale);
    let flushed = Rc::new(Cell::new(0));
    let before = Rc::clone(&flushed);
    want_resched(move || {
        // One more entry is gone, and one more flush was done for it.
        let gone = (0..4).filter(|gfn| other.entry(*gfn) == Entry::Absent).count() as u64;
        let flushes = other.mmu.invalidation_stats().flushes;
        if flushes != gone {
            found.borrow_mut().push((gone, flushes));
        }
        before.set(flushes);
        assert!(!other.mmu.is_locked(), "the lock is given up");
    });
    drop(machine.invalidate(0, 4));
    forget_resched();
    assert_eq!(*stale.borrow(), [], "entries were gone and not flushed: (gone, flushed)");
    assert_eq!(flushed.get(), 4);
}

/// The same seen from a second invalidation: it finds nothing to zap, flushes nothing, and frees the page.
pub(crate) fn a_second_invalidation_during_a_yield_may_free_the_page() {
    let machine: &'static Machine = Box::leak(Box::new(yielding(YieldPolicy::OnResched)));
    let mut guest = machine.guest();
    guest.read(0, 0);
    want_resched(move || {
        if machine.frames.generation(0) > 0 {
            return;
        }
        // It may not block, since a yield of its own would run this again.
        let second = machine.mmu.invalidate(Frames::hvas(0, 1), Zap::Unmap, Blocking::Forbidden);
        machine.frames.discard(0);
        drop(second);
        // The guest runs while the first invalidation still has the lock given up.
        guest.enter();
        let found = guest.through_tlb((SpaceId(0), Gfn::new(0)), Access::READ);
        assert_eq!(found, Err(Found::Absent), "the TLB forgot it");
        assert!(guest.vcpu.leave_guest().is_empty());
    });
    drop(machine.invalidate(0, 2));
    forget_resched();
    assert_eq!(machine.guest().read(0, 0).generation, 1);
}

pub(crate) fn a_waiting_fault_gets_the_lock_between_two_entries() {
    let machine = yielding(YieldPolicy::OnContention);
    let mut guest = machine.guest();
    guest.read_all(0..16);
    let (zapping, parks) = (Arc::new(Gate::default()), Arc::new(Parks::default()));
    let (hook_gate, hook_parks) = (Arc::clone(&zapping), Arc::clone(&parks));
    let step = AtomicU64::new(0);
    machine.mmu.secondary().hooks.each(Point::Zap, move || {
        if step.fetch_add(1, Ordering::Relaxed) == 4 {
            hook_gate.arrive();
            hook_parks.until(1);
        }
    });
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _finished = Finished(&parks);
            let mut guest = machine.guest();
            zapping.until_arrived();
            tell_when_parked(&parks);
            assert_eq!(guest.fault(40, Access::READ), Ok(FaultOutcome::Fixed));
        });
        drop(machine.invalidate(0, 16));
    });
    let stats = machine.mmu.invalidation_stats();
    assert_eq!(stats.yields, 1, "for the one who waited");
    assert_eq!((stats.flushes, stats.flushes_for_waiters, stats.flushes_for_scheduler), (2, 1, 0));
    assert_eq!(machine.mmu.fault_stats().lock_contended, 1);
}

/// While the lock is given up the range stays announced: its frames are refused, others are served.
pub(crate) fn the_range_stays_refused_during_a_yield() {
    let machine = yielding(YieldPolicy::OnResched);
    let other = machine.share();
    want_resched(move || {
        let mut guest = other.guest();
        assert!(other.mmu.invalidations().covers(Guest::frame(3)));
        assert!(matches!(guest.fault(3, Access::READ), Ok(FaultOutcome::Retry(_))));
        let outside = guest.fault(40, Access::READ);
        assert!(matches!(outside, Ok(FaultOutcome::Fixed | FaultOutcome::Spurious)), "{outside:?}");
    });
    drop(machine.invalidate(3, 6));
    forget_resched();
    assert_eq!(machine.mmu.invalidation_stats().yields, 3);
}

/// What others do meanwhile, and the CPU that they have, is no wait for the lock.
pub(crate) fn a_cpu_given_away_is_no_wait_for_the_lock() {
    let machine = yielding(YieldPolicy::OnResched);
    let mut guest = machine.guest();
    guest.read_all(0..4);
    want_resched(|| let_pass(Duration::from_millis(1)));
    drop(machine.invalidate(0, 4));
    forget_resched();
    let stats = machine.mmu.invalidation_stats();
    assert_eq!(stats.yields, 4);
    assert!(stats.lock_wait_ns < 1_000_000, "no more than readings of the clock: {stats:?}");
}
