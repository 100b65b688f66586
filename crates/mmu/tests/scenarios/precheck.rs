//! Where a doomed fault is found: by the hint before fault-in, by the hint after it, or under the lock.

use afterimage_mmu::{Access, Emulate, FaultOutcome, Policy, Precheck, RetryPoint};

use crate::support::frames::Frames;
use crate::support::hooks::Point;
use crate::support::machine::{Guest, Machine, both, unchecked};
use crate::support::table::Entry;

fn checking(precheck: Precheck) -> Policy {
    Policy { precheck, ..both() }
}

/// Where a fault that begins during an invalidation of its frame is found.
fn found_during(policy: Policy) -> (RetryPoint, u64) {
    let machine = Machine::new(policy);
    let mut guest = machine.guest();
    let invalidation = machine.invalidate(3, 4);
    let point = guest.retry_point(3);
    assert_eq!(machine.entry(3), Entry::Absent);
    drop(invalidation);
    guest.read(3, 3);
    machine.assert_balanced();
    (point, machine.mmu.fault_stats().wasted_fault_ins)
}

/// Where a fault is found whose page an invalidation takes away while it is being faulted in.
fn found_overtaken(policy: Policy) -> RetryPoint {
    let machine = Machine::new(policy);
    let mut guest = machine.guest();
    let other = machine.share();
    machine.frames.hooks.once(Point::FaultedIn, move || other.discard(3, 4));
    let point = guest.retry_point(3);
    assert_eq!(machine.entry(3), Entry::Absent, "the page that is gone was not installed");
    assert_eq!(guest.read(3, 3).generation, 1);
    machine.assert_balanced();
    point
}

pub(crate) fn a_fault_inside_an_invalidation_is_found_where_the_policy_looks() {
    assert_eq!(found_during(both()), (RetryPoint::BeforeFaultIn, 0));
    assert_eq!(found_during(checking(Precheck::BEFORE_FAULT_IN)), (RetryPoint::BeforeFaultIn, 0));
    assert_eq!(found_during(checking(Precheck::AFTER_FAULT_IN)), (RetryPoint::AfterFaultIn, 1));
    assert_eq!(found_during(unchecked()), (RetryPoint::UnderLock, 1));
}

pub(crate) fn an_overtaken_fault_is_found_where_the_policy_looks() {
    assert_eq!(found_overtaken(both()), RetryPoint::AfterFaultIn);
    assert_eq!(found_overtaken(checking(Precheck::AFTER_FAULT_IN)), RetryPoint::AfterFaultIn);
    assert_eq!(found_overtaken(checking(Precheck::BEFORE_FAULT_IN)), RetryPoint::UnderLock);
    assert_eq!(found_overtaken(unchecked()), RetryPoint::UnderLock);
}

pub(crate) fn a_doomed_fault_touches_neither_page_nor_lock() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let invalidation = machine.invalidate(3, 4);
    machine.frames.hooks.each(Point::FaultIn, || panic!("the page was asked for"));
    assert_eq!(guest.retry_point(3), RetryPoint::BeforeFaultIn);
    drop(invalidation);
    let stats = machine.mmu.fault_stats();
    assert_eq!((stats.wasted_fault_ins, stats.lock_contended), (0, 0));
}

pub(crate) fn an_invalidation_elsewhere_holds_nobody_up() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let invalidation = machine.invalidate(3, 4);
    assert_eq!(guest.fault(5, Access::READ), Ok(FaultOutcome::Fixed));
    drop(invalidation);
}

pub(crate) fn any_end_since_the_snapshot_is_a_retry() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let other = machine.share();
    machine.frames.hooks.once(Point::FaultedIn, move || drop(other.invalidate(40, 41)));
    assert_eq!(guest.retry_point(3), RetryPoint::AfterFaultIn, "the sequence knows no ranges");
}

/// Version 4 of the change tested the slot the wrong way round.
pub(crate) fn a_frame_of_no_slot_is_never_retried() {
    for policy in [both(), unchecked()] {
        let machine = Machine::new(policy);
        let mut guest = machine.guest();
        // The hull covers frame 100, which has no slot, since both of its neighbours are taken away.
        machine.mmu.create_slot(machine.slot(1, 200, 4, 200)).expect("nothing is there");
        let (left, right) = (machine.invalidate(3, 4), machine.invalidate(200, 201));
        assert!(machine.mmu.invalidations().covers(Guest::frame(100)));
        assert_eq!(guest.fault(100, Access::READ), Ok(FaultOutcome::Emulate(Emulate::Mmio)));
        drop((left, right));
    }
}

pub(crate) fn a_fault_may_invalidate_itself() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let other = machine.share();
    // Copy-on-write, say: the primary MMU replaces the page while it resolves it.
    machine.frames.hooks.once(Point::FaultIn, move || other.discard(3, 4));
    assert_eq!(guest.read(3, 3).generation, 1);
    assert_eq!(machine.mmu.fault_stats().retried(), 1, "one retry, then it is stable");
}

pub(crate) fn who_retries_holds_nothing() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let invalidation = machine.invalidate(3, 4);
    assert_eq!(guest.retry_point(3), RetryPoint::BeforeFaultIn);
    drop(invalidation);
    assert!(!machine.mmu.is_locked());
    // No read section either: an update of the memslots returns.
    machine.mmu.create_slot(machine.slot(1, 100, 4, 100)).expect("nothing is there");
    machine.assert_balanced();
}

/// The snapshot is taken before the page is looked up: what ends in between is noticed.
pub(crate) fn a_page_looked_up_before_an_end_is_not_installed_after_it() {
    let machine = Machine::new(unchecked());
    let mut guest = machine.guest();
    let old = machine.frames.generation(3);
    let other = machine.share();
    machine.frames.hooks.once(Point::FaultedIn, move || other.discard(3, 4));
    let _ = guest.fault(3, Access::READ);
    assert_eq!(machine.frames.generation(3), old + 1);
    assert!(guest.read(3, 3).generation > old);
}

pub(crate) fn a_block_is_checked_as_a_whole() {
    let machine = Machine::bare(both());
    let mut guest = machine.guest();
    machine.mmu.create_slot(machine.slot(0, 0, 1024, 0)).expect("the first slot");
    machine.mmu.secondary().huge.store(true, core::sync::atomic::Ordering::Relaxed);
    let invalidation = machine.mmu.invalidate(
        Frames::hvas(511, 512),
        afterimage_mmu::Zap::Unmap,
        afterimage_mmu::Blocking::Allowed,
    );
    // The block of 0 ends where the invalidation is; the next block does not touch it.
    assert_eq!(guest.retry_point(0), RetryPoint::BeforeFaultIn);
    assert_eq!(guest.fault(512, Access::READ), Ok(FaultOutcome::Fixed));
    drop(invalidation);
    assert_eq!(guest.fault(0, Access::READ), Ok(FaultOutcome::Fixed));
}
