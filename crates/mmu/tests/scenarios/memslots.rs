//! Memslots come, go and move while guests run.

use core::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_mmu::{
    Access, Emulate, Fault, FaultError, FaultKind, FaultOutcome, Gfn, Policy, RetryPoint, SlotError, SlotId,
    SpaceId, YieldPolicy,
};

use crate::support::gate::{Finished, Gate, Parks};
use crate::support::hooks::Point;
use crate::support::machine::{Machine, Touched, both};
use crate::support::platform::{forget_resched, tell_when_parked, want_resched};
use crate::support::table::Entry;

const HOME: SpaceId = SpaceId(0);
/// How long another thread may take. Long: only a bug ever waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn a_slot_comes_moves_and_goes() {
    let machine = Machine::bare(both());
    let mut guest = machine.guest();
    let mmio = Ok(Touched::Emulated(Emulate::Mmio));
    assert_eq!(guest.touch(8, Access::READ), mmio);
    machine.mmu.create_slot(machine.slot(0, 8, 4, 100)).expect("nothing is there");
    guest.read(9, 101);
    machine.mmu.move_slot(HOME, SlotId(0), Gfn::new(32)).expect("nothing is there");
    assert_eq!(machine.entry(9), Entry::Absent);
    assert_eq!(guest.touch(9, Access::READ), mmio, "where it was is a device now");
    assert_eq!(guest.read(33, 101).generation, 0, "and its memory is what it was");
    machine.mmu.delete_slot(HOME, SlotId(0)).expect("it exists");
    assert_eq!(guest.touch(33, Access::READ), mmio);
    assert_eq!(machine.mmu.secondary().mapped(), 0);
}

pub(crate) fn an_update_that_is_refused_changes_nothing() {
    let machine = Machine::new(both());
    machine.mmu.create_slot(machine.slot(1, 100, 4, 100)).expect("nothing is there");
    let mut guest = machine.guest();
    guest.read(100, 100);
    let refused = |result: Result<(), SlotError>| result.expect_err("it must be refused");
    let overlap = SlotError::Overlap { id: SlotId(1), other: SlotId(0) };
    assert_eq!(refused(machine.mmu.move_slot(HOME, SlotId(1), Gfn::new(60))), overlap);
    assert_eq!(refused(machine.mmu.create_slot(machine.slot(1, 300, 1, 300))), SlotError::Exists(SlotId(1)));
    let missing = SlotError::NoSuchSlot { space: HOME, id: SlotId(7) };
    assert_eq!(refused(machine.mmu.delete_slot(HOME, SlotId(7))), missing);
    assert_eq!(refused(machine.mmu.move_slot(HOME, SlotId(7), Gfn::new(600))), missing);
    assert_eq!(refused(machine.mmu.set_dirty_logging(HOME, SlotId(7), true)), missing);
    assert!(matches!(machine.entry(100), Entry::Leaf { .. }), "not even the translations");
    guest.read(100, 100);
}

/// What a guest and a prefetch find at gfn 3 while the first frames of slot 0 are being zapped.
fn found_during(update: impl FnOnce(&Machine)) -> Vec<Result<FaultOutcome, FaultKindOf>> {
    let machine = Machine::new(Policy { yielding: YieldPolicy::OnResched, ..both() });
    machine.guest().read(3, 3);
    let other = machine.share();
    let found = Rc::new(Cell::new(Vec::new()));
    let finds = Rc::clone(&found);
    let mut first = true;
    want_resched(move || {
        if core::mem::take(&mut first) {
            let mut guest = other.guest();
            let prefetch = Fault { kind: FaultKind::Prefetch, ..Fault::new(Gfn::new(3), Access::READ) };
            let demanded = guest.fault(3, Access::READ).map_err(FaultKindOf::from);
            let prefetched = guest.serve(&prefetch).map_err(FaultKindOf::from);
            finds.set(vec![demanded, prefetched]);
        }
    });
    update(&machine);
    forget_resched();
    found.take()
}

/// What kind of failure it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FaultKindOf {
    SlotChanging,
    Other,
}

impl From<crate::support::machine::Failure> for FaultKindOf {
    fn from(failure: crate::support::machine::Failure) -> Self {
        match failure {
            FaultError::SlotChanging(gfn) if gfn == Gfn::new(3) => Self::SlotChanging,
            _ => Self::Other,
        }
    }
}

fn assert_neither_memory_nor_device(found: &[Result<FaultOutcome, FaultKindOf>]) {
    let [demanded, prefetched] = found else { panic!("the zap did not yield") };
    let Ok(FaultOutcome::Retry(retry)) = demanded else { panic!("a guest found {demanded:?}") };
    assert_eq!(retry.point, RetryPoint::SlotChanging);
    assert_eq!(*prefetched, Err(FaultKindOf::SlotChanging), "a prefetch must not loop here");
}

pub(crate) fn a_slot_that_is_moved_is_neither_memory_nor_a_device() {
    assert_neither_memory_nor_device(&found_during(|machine| {
        machine.mmu.move_slot(HOME, SlotId(0), Gfn::new(200)).expect("nothing is there");
    }));
}

pub(crate) fn a_slot_that_is_deleted_is_neither_memory_nor_a_device() {
    assert_neither_memory_nor_device(&found_during(|machine| {
        machine.mmu.delete_slot(HOME, SlotId(0)).expect("it exists");
    }));
}

/// A fault that saw the slot valid installs, however late: the slot is zapped after that, not before.
pub(crate) fn a_slot_is_zapped_after_the_last_fault_that_saw_it() {
    let machine = Machine::new(both());
    let (inside, parks) = (Arc::new(Gate::default()), Arc::new(Parks::default()));
    let gate = Arc::clone(&inside);
    machine.frames.hooks.once(Point::FaultedIn, move || gate.pass());
    std::thread::scope(|scope| {
        scope.spawn(|| machine.guest().fault(3, Access::READ).expect("memory is there"));
        scope.spawn(|| {
            let _finished = Finished(&parks);
            inside.until_arrived();
            tell_when_parked(&parks);
            machine.mmu.delete_slot(HOME, SlotId(0)).expect("it exists");
        });
        parks.until(1);
        inside.open();
    });
    assert_eq!(machine.entry(3), Entry::Absent, "an install came after the slot's zap");
    assert_eq!(machine.mmu.fault_stats().fixed, 1);
    machine.assert_balanced();
}

pub(crate) fn slots_stay_while_an_invalidation_is_active() {
    let machine = Machine::new(both());
    let parks = Arc::new(Parks::default());
    let mut guest = machine.guest();
    std::thread::scope(|scope| {
        // It touches no slot, and pins the slots as well: the end must meet the same ones.
        let invalidation = machine.invalidate(100, 101);
        scope.spawn(|| {
            let _finished = Finished(&parks);
            tell_when_parked(&parks);
            machine.mmu.create_slot(machine.slot(1, 100, 4, 100)).expect("nothing is there");
        });
        parks.until(1);
        let outcome = guest.fault(100, Access::READ);
        drop(invalidation);
        assert_eq!(outcome, Ok(FaultOutcome::Emulate(Emulate::Mmio)), "the slots were swapped inside");
    });
    guest.read(100, 100);
}

/// There is never a moment without an active invalidation, and the update comes to its end all the same.
pub(crate) fn no_stream_of_invalidations_holds_an_update_back() {
    let machine = Machine::new(both());
    std::thread::scope(|scope| {
        let latest = Instant::now() + PATIENCE;
        let mut active = machine.invalidate(3, 4);
        let update =
            scope.spawn(|| machine.mmu.create_slot(machine.slot(1, 100, 4, 100)).expect("nothing is there"));
        while !update.is_finished() && Instant::now() < latest {
            let next = machine.invalidate(3, 4);
            drop(active);
            active = next;
            std::thread::yield_now();
        }
        let is_finished = update.is_finished();
        drop(active);
        assert!(is_finished, "the update waits for invalidations that began after it");
    });
    machine.guest().read(100, 100);
}

/// What an invalidation takes that starts while slots change, nobody maps through the slots to come.
pub(crate) fn an_invalidation_covers_slots_to_come() {
    let machine = Machine::new(both());
    let parks = Arc::new(Parks::default());
    let mut guest = machine.guest();
    std::thread::scope(|scope| {
        let first = machine.invalidate(3, 4);
        scope.spawn(|| {
            let _finished = Finished(&parks);
            tell_when_parked(&parks);
            machine.mmu.create_slot(machine.slot(1, 100, 4, 100)).expect("nothing is there");
        });
        parks.until(1);
        let second = machine.invalidate(100, 101);
        drop(first);
        // The other frames of the slot are memory as soon as it is published, and the update waits on.
        let waited = Instant::now();
        while guest.fault(102, Access::READ) == Ok(FaultOutcome::Emulate(Emulate::Mmio)) {
            assert!(waited.elapsed() < PATIENCE, "the slot is never published");
            std::thread::yield_now();
        }
        let outcome = guest.fault(100, Access::READ);
        drop(second);
        assert!(matches!(outcome, Ok(FaultOutcome::Retry(_))), "mapped while its page changes: {outcome:?}");
    });
    guest.read(100, 100);
}

pub(crate) fn faults_go_on_while_an_update_waits() {
    let machine = Machine::new(both());
    let (inside, parks) = (Arc::new(Gate::default()), Arc::new(Parks::default()));
    let gate = Arc::clone(&inside);
    machine.frames.hooks.once(Point::FaultedIn, move || gate.pass());
    std::thread::scope(|scope| {
        scope.spawn(|| machine.guest().fault(3, Access::READ).expect("memory is there"));
        scope.spawn(|| {
            inside.until_arrived();
            tell_when_parked(&parks);
            machine.mmu.create_slot(machine.slot(1, 100, 4, 100)).expect("nothing is there");
        });
        parks.until(1);
        // The new slots are published, and the old ones still in use.
        let mut guest = machine.guest();
        guest.read(100, 100);
        assert_eq!(guest.fault(200, Access::READ), Ok(FaultOutcome::Emulate(Emulate::Mmio)));
        assert_eq!(machine.entry(200), Entry::Absent, "no device is remembered while generations change");
        drop(machine.invalidate(100, 101));
        inside.open();
    });
    assert_eq!(machine.guest().fault(200, Access::READ), Ok(FaultOutcome::Emulate(Emulate::Mmio)));
    assert!(matches!(machine.entry(200), Entry::Mmio { .. }));
}

pub(crate) fn every_update_has_a_generation_of_its_own() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    let mut seen = Vec::new();
    for round in 0..4 {
        if round % 2 == 0 {
            machine.mmu.create_slot(machine.slot(1, 100, 4, 100)).expect("nothing is there");
        } else {
            machine.mmu.delete_slot(HOME, SlotId(1)).expect("it exists");
        }
        assert_eq!(guest.fault(200, Access::READ), Ok(FaultOutcome::Emulate(Emulate::Mmio)));
        let Entry::Mmio { generation } = machine.entry(200) else { panic!("devices are remembered") };
        assert!(!seen.contains(&generation), "generation {generation} came back");
        seen.push(generation);
    }
}

pub(crate) fn dirty_logging_protects_what_is_mapped() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    guest.touch(3, Access::WRITE).expect("it is memory");
    machine.mmu.set_dirty_logging(HOME, SlotId(0), true).expect("it exists");
    assert!(matches!(machine.entry(3), Entry::Leaf { writable: false, .. }));
    guest.enter();
    assert!(!guest.caches(3), "and no TLB lets a write through unseen");
    assert!(guest.vcpu.leave_guest().is_empty());
    assert_eq!(guest.fault(4, Access::READ), Ok(FaultOutcome::Fixed));
    assert!(matches!(machine.entry(4), Entry::Leaf { writable: false, .. }));
    assert_eq!(guest.fault(4, Access::WRITE), Ok(FaultOutcome::FixedFast));
    machine.mmu.set_dirty_logging(HOME, SlotId(0), false).expect("it exists");
    assert_eq!(guest.fault(5, Access::READ), Ok(FaultOutcome::Fixed));
    assert!(matches!(machine.entry(5), Entry::Leaf { writable: true, .. }));
}
