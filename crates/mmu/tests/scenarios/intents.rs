//! Faults that announce what they install: who waits for them, and who does not.

use core::sync::atomic::{AtomicBool, Ordering};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use afterimage_mmu::{Access, Block, FaultOutcome, Gfn, GfnRange, Policy, Stale, Witness as _, WitnessKind};

use crate::support::gate::{Finished, Gate, Opened, Parks};
use crate::support::hooks::Point;
use crate::support::machine::{Machine, both};
use crate::support::platform::tell_when_parked;
use crate::support::table::Entry;

fn machine() -> Machine {
    Machine::new(Policy { witness: WitnessKind::Intent, ..both() })
}

/// A vCPU loses its CPU in the middle of an install of frame 3. Runs `meanwhile`, with a count of how often an invalidation of
/// that frame has parked.
fn with_a_slow_install(machine: &Machine, meanwhile: impl FnOnce(&Parks)) {
    let (installing, parks) = (Arc::new(Gate::default()), Arc::new(Parks::default()));
    let gate = Arc::clone(&installing);
    machine.mmu.secondary().hooks.once(Point::Map, move || gate.pass());
    let begun = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(machine.guest().fault(3, Access::READ), Ok(FaultOutcome::Fixed)));
        installing.until_arrived();
        scope.spawn(|| {
            let _finished = Finished(&parks);
            tell_when_parked(&parks);
            let invalidation = machine.invalidate(3, 4);
            begun.store(true, Ordering::SeqCst);
            assert_eq!(machine.entry(3), Entry::Absent, "the zap found what was installed");
            drop(invalidation);
        });
        // Also when something below panics.
        let _installed = Opened(&installing);
        parks.until(1);
        assert!(!begun.load(Ordering::SeqCst), "it began before the install was done");
        meanwhile(&parks);
        assert!(!begun.load(Ordering::SeqCst), "it began before the install was done");
    });
}

pub(crate) fn an_invalidation_waits_parked_for_an_install_of_its_frames() {
    let machine = machine();
    with_a_slow_install(&machine, |_| {});
    let stats = machine.mmu.invalidation_stats();
    assert_eq!((stats.drains, stats.completed), (1, 1));
    assert!(stats.drain_wait_ns > 0);
    assert_eq!(machine.mmu.fault_stats().lock_contended, 0);
    machine.assert_balanced();
}

pub(crate) fn a_slow_install_holds_nobody_else_up() {
    let machine = machine();
    with_a_slow_install(&machine, |_| {
        // The invalidation that waits holds no lock, either: others begin and end, and faults are served.
        let mut guest = machine.guest();
        guest.read(40, 40);
        drop(machine.invalidate(40, 64));
        assert_eq!(machine.entry(40), Entry::Absent);
        assert_eq!(guest.fault(2, Access::READ), Ok(FaultOutcome::Fixed));
        // It has published its range: its own frames are refused, the slow vCPU's are not touched.
        assert!(machine.mmu.invalidations().covers(GfnRange::frame(Gfn::new(3))));
        assert_eq!(machine.entry(3), Entry::Absent);
    });
    assert_eq!(machine.mmu.invalidation_stats().drains, 1, "only the one of the frame waited");
}

pub(crate) fn an_announced_block_is_verified_like_a_fault() {
    let machine = machine();
    let mut guest = machine.guest();
    let (frame, words) = (Block::frame(Gfn::new(3)), machine.mmu.invalidations());
    let since = words.snapshot(frame);
    let intent = guest.vcpu.announce(frame);
    assert_eq!(intent.verify(since).map(|fresh| fresh.range()), Ok(frame.range()));
    drop(intent);
    let invalidation = machine.invalidate(3, 4);
    let intent = guest.vcpu.announce(frame);
    assert_eq!(intent.verify(since).map(|fresh| fresh.range()), Err(Stale::Covered));
    drop((intent, invalidation));
    let intent = guest.vcpu.announce(frame);
    assert_eq!(intent.verify(since).map(|fresh| fresh.range()), Err(Stale::SequenceMoved));
    drop(intent);
}

/// A block in one region, and one that spans several; the invalidation is of a part, and of more.
pub(crate) fn an_invalidation_waits_for_blocks_around_its_frames() {
    for (block, taken) in
        [((0, 512), (3, 4)), ((0, 1024), (3, 4)), ((512, 1024), (3, 1000)), ((0, 1024), (600, 601))]
    {
        let machine = Machine::bare(Policy { witness: WitnessKind::Intent, ..both() });
        machine.mmu.create_slot(machine.slot(0, 0, 1024, 0)).expect("the first slot is in nobody's way");
        let (mut guest, parks) = (machine.guest(), Arc::new(Parks::default()));
        let announced = Block::around(GfnRange::new(Gfn::new(block.0), Gfn::new(block.1)));
        std::thread::scope(|scope| {
            let intent = guest.vcpu.announce(announced);
            let invalidating = scope.spawn(|| {
                let _finished = Finished(&parks);
                tell_when_parked(&parks);
                drop(machine.invalidate(taken.0, taken.1));
            });
            parks.until(1);
            assert!(!invalidating.is_finished(), "{announced} was not waited for");
            drop(intent);
        });
        assert_eq!(machine.mmu.invalidation_stats().drains, 1, "{announced}");
        assert_eq!(machine.mmu.invalidation_stats().completed, 1, "{announced}");
    }
}

pub(crate) fn an_intent_of_other_frames_is_refused() {
    let machine = machine();
    let mut guest = machine.guest();
    let words = machine.mmu.invalidations();
    let since = words.snapshot(Block::frame(Gfn::new(4)));
    let intent = guest.vcpu.announce(Block::frame(Gfn::new(3)));
    let verdict = AssertUnwindSafe(|| drop(intent.verify(since)));
    assert!(catch_unwind(verdict).is_err(), "nobody would wait for it");
}
