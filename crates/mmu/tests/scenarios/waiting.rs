//! Parking after a retry: until the invalidation that covers the frame has ended, and no longer.

use core::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use crate::support::gate::{Finished, Gate, Parks};
use crate::support::hooks::Point;
use crate::support::machine::{Guest, Machine, both};
use crate::support::platform::tell_when_parked;

pub(crate) fn without_an_invalidation_nobody_waits() {
    let machine = Machine::new(both());
    machine.mmu.wait(Guest::frame(3));
    let invalidation = machine.invalidate(3, 4);
    machine.mmu.wait(Guest::frame(4));
    drop(invalidation);
    machine.mmu.wait(Guest::frame(3));
}

pub(crate) fn a_waiter_sleeps_until_its_own_invalidation_ends() {
    let machine = Machine::new(both());
    let parks = Arc::new(Parks::default());
    let returned = AtomicBool::new(false);
    let covering = machine.invalidate(3, 4);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _finished = Finished(&parks);
            tell_when_parked(&parks);
            machine.mmu.wait(Guest::frame(3));
            returned.store(true, Ordering::SeqCst);
        });
        parks.until(1);
        for round in 2..5 {
            // Ends elsewhere wake it, and send it back to sleep.
            drop(machine.invalidate(40, 41));
            parks.until(round);
            assert!(!returned.load(Ordering::SeqCst), "it was woken by another invalidation's end");
        }
        drop(covering);
    });
    assert!(returned.load(Ordering::SeqCst));
}

pub(crate) fn a_guest_inside_an_invalidation_gets_the_new_page() {
    let machine = Machine::new(both());
    let mut guest = machine.guest();
    guest.read(3, 3);
    drop(guest);
    let parks = Arc::new(Parks::default());
    let invalidation = machine.invalidate(3, 4);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            tell_when_parked(&parks);
            machine.guest().read(3, 3).generation
        });
        parks.until(1);
        machine.frames.discard(3);
        drop(invalidation);
        assert_eq!(reader.join().expect("the guest reads"), 1);
    });
    assert!(machine.mmu.fault_stats().retried() >= 1);
}

/// A guest that is told to leave while it holds a translation is waited for, and uses it before the page goes.
pub(crate) fn an_invalidation_waits_for_a_guest_that_holds_a_translation() {
    let machine = Machine::new(both());
    let (in_guest, parks) = (Arc::new(Gate::default()), Arc::new(Parks::default()));
    machine.guest().read(3, 3);
    let gate = Arc::clone(&in_guest);
    machine.mmu.secondary().hooks.once(Point::InGuest, move || gate.pass());
    let begun = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // If the page goes too early, this finds it freed, and panics.
        let reader = scope.spawn(|| machine.guest().read(3, 3));
        scope.spawn(|| {
            let _finished = Finished(&parks);
            in_guest.until_arrived();
            tell_when_parked(&parks);
            let invalidation = machine.invalidate(3, 4);
            begun.store(true, Ordering::SeqCst);
            machine.frames.discard(3);
            drop(invalidation);
        });
        parks.until(1);
        let early = begun.load(Ordering::SeqCst);
        in_guest.open();
        let read = reader.join();
        assert!(!early, "the page was given up while a guest was about to use it");
        assert_eq!(read.expect("the page was there").generation, 0);
    });
    assert_eq!(machine.guest().read(3, 3).generation, 1);
}
