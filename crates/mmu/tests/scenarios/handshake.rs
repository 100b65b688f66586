//! vCPUs: modes, requests, numbers, and counts that outlive them.

use core::sync::atomic::{AtomicBool, Ordering};

use afterimage_mmu::{Access, FaultOutcome, Flush, Gfn, GfnRange, Requests};

use crate::support::machine::{Machine, both};

pub(crate) fn a_request_keeps_a_vcpu_out_of_the_guest() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    guest.read(3, 3);
    assert!(guest.caches(3));
    drop(machine.invalidate(3, 4));
    assert_eq!(guest.vcpu.enter_guest(), Err(Requests::FLUSH_TLB));
    assert_eq!(guest.vcpu.enter_guest(), Ok(()), "a request is handed out once");
    assert!(!guest.vcpu.is_kicked());
    assert!(guest.vcpu.leave_guest().is_empty());
}

fn gfns(start: u64, end: u64) -> GfnRange {
    GfnRange::new(Gfn::new(start), Gfn::new(end))
}

/// What was zapped is forgotten to its ends, and nothing else is.
pub(crate) fn a_flush_of_a_range_leaves_the_rest() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    guest.read_all(0..8);
    drop(machine.invalidate(3, 6));
    guest.enter();
    let cached: Vec<_> = (0..8).filter(|gfn| guest.caches(*gfn)).collect();
    assert_eq!(cached, [0, 1, 2, 6, 7]);
    assert!(guest.vcpu.leave_guest().is_empty());
}

/// A vCPU that stays outside owes what all flushes meanwhile have asked for, once.
pub(crate) fn flushes_of_ranges_add_up() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    guest.read_all(0..8);
    drop(machine.invalidate(1, 2));
    drop(machine.invalidate(4, 6));
    assert_eq!(guest.vcpu.enter_guest(), Err(Requests::FLUSH_TLB));
    assert_eq!(guest.vcpu.take_flush(), Flush::of(gfns(1, 6)), "one range that holds both");
    assert!(guest.vcpu.take_flush().is_nothing());
    drop(machine.invalidate(0, 1));
    assert_eq!(guest.vcpu.take_flush(), Flush::of(gfns(0, 1)));
}

pub(crate) fn a_vcpu_in_the_guest_is_kicked_and_waited_for() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    guest.read(3, 3);
    guest.enter();
    let begun = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let invalidation = machine.invalidate(3, 4);
            begun.store(true, Ordering::SeqCst);
            drop(invalidation);
        });
        while !guest.vcpu.is_kicked() {
            std::thread::yield_now();
        }
        assert!(!begun.load(Ordering::SeqCst), "a guest that is inside may still use the page");
        assert_eq!(guest.vcpu.leave_guest(), Requests::FLUSH_TLB);
    });
    assert!(begun.load(Ordering::SeqCst));
}

pub(crate) fn a_vcpu_that_goes_away_in_the_guest_holds_nobody_up() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    guest.read(3, 3);
    guest.enter();
    drop(guest);
    drop(machine.invalidate(3, 4));
}

pub(crate) fn numbers_are_reused_and_counts_are_kept() {
    let machine = Machine::new(both());
    let (first, mut second) = (machine.guest(), machine.guest());
    assert_eq!((first.vcpu.id(), second.vcpu.id()), (0, 1));
    assert_eq!(second.fault(3, Access::READ), Ok(FaultOutcome::Fixed));
    drop(first);
    assert_eq!(machine.guest().vcpu.id(), 0);
    drop(second);
    let stats = machine.mmu.fault_stats();
    assert_eq!((stats.taken, stats.fixed), (1, 1), "of a vCPU that is gone");
}
