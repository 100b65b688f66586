//! A turn for the starved: who goes before the next invalidation, and when nobody does.
//!
//! One thread plays both: what a vCPU does while an invalidation lets it go first runs when the invalidation spins.

use std::sync::Arc;
use std::time::Duration;

use afterimage_mmu::{Access, Blocking, FaultInError, FaultOutcome, Policy, RetryPoint, Turns, Zap};

use crate::support::frames::Frames;
use crate::support::gate::{Finished, Parks};
use crate::support::hooks::Point;
use crate::support::machine::{Guest, Machine, both};
use crate::support::platform::{let_pass, never_spun, tell_when_parked, when_spinning};
use crate::support::table::Entry;

const AFTER: u32 = 2;
/// Less than an invalidation is patient.
const LONG: Duration = Duration::from_millis(12);

fn machine() -> &'static Machine {
    machine_with(0)
}

fn machine_with(at_most_ns: u64) -> &'static Machine {
    Box::leak(Box::new(Machine::new(Policy { turns: Some(Turns { after: AFTER, at_most_ns }), ..both() })))
}

/// A vCPU that was retried so often that it claims a turn for frame 3.
fn starved(machine: &'static Machine) -> Guest<'static> {
    starved_for(machine, Duration::ZERO)
}

/// The same, after so much time.
fn starved_for(machine: &'static Machine, time: Duration) -> Guest<'static> {
    let [guest] = all_starved_for(machine, time);
    guest
}

/// Several at once.
fn all_starved_for<const GUESTS: usize>(
    machine: &'static Machine,
    time: Duration,
) -> [Guest<'static>; GUESTS] {
    let mut guests = core::array::from_fn(|_| machine.guest());
    let invalidation = machine.invalidate(3, 4);
    for guest in &mut guests {
        for _ in 0..AFTER {
            assert_eq!(guest.retry_point(3), RetryPoint::BeforeFaultIn);
        }
    }
    let_pass(time);
    for guest in &mut guests {
        assert_eq!(guest.retry_point(3), RetryPoint::BeforeFaultIn);
    }
    drop(invalidation);
    guests
}

/// A vCPU that goes away gives its turn back: this one does not.
fn stays(guest: Guest<'static>) {
    core::mem::forget(guest);
}

pub(crate) fn the_starved_goes_before_the_next_invalidation() {
    let machine = machine();
    let mut guest = starved(machine);
    when_spinning(move || {
        assert_eq!(guest.fault(3, Access::READ), Ok(FaultOutcome::Fixed));
        assert!(matches!(machine.entry(3), Entry::Leaf { .. }));
        stays(guest);
    });
    let invalidation = machine.invalidate(0, 8);
    assert!(!never_spun(), "nobody was let go first");
    assert_eq!(machine.entry(3), Entry::Absent, "and zapped after that");
    drop(invalidation);
    assert_eq!(machine.mmu.invalidation_stats().turns, 1);
    when_spinning(|| panic!("it was served: nobody starves"));
    drop(machine.invalidate(3, 4));
    assert!(never_spun());
}

/// An install that is zapped before the guest has used it was no service. And a stay in the guest that only ends in the same
/// fault again is no use of it.
pub(crate) fn a_turn_lasts_until_the_guest_has_made_its_access() {
    let machine = machine();
    let mut guest = starved(machine);
    guest.enter();
    assert!(guest.vcpu.leave_guest().is_empty());
    when_spinning(move || {
        assert_eq!(guest.fault(3, Access::READ), Ok(FaultOutcome::Fixed));
        when_spinning(move || {
            guest.read(3, 3);
            stays(guest);
        });
    });
    drop(machine.invalidate(3, 4));
    assert!(!never_spun(), "it began when the fault was served, before the access");
    assert_eq!(machine.mmu.invalidation_stats().turns, 1);
}

pub(crate) fn a_turn_that_nobody_takes_is_taken_away() {
    let machine = machine();
    let mut guest = starved(machine);
    // It spins for a while, and begins.
    drop(machine.invalidate(3, 4));
    assert_eq!(machine.mmu.invalidation_stats().turns, 0);
    when_spinning(|| panic!("the claim was taken away"));
    drop(machine.invalidate(3, 4));
    assert!(never_spun());
    guest.read(3, 3);
}

/// However many they are, nobody is waited for longer than one of them would be. Those that were not waited for are, next time.
pub(crate) fn claims_are_waited_for_together() {
    let machine = machine();
    let [_guest, mut other] = all_starved_for(machine, Duration::ZERO);
    drop(machine.invalidate(3, 4));
    when_spinning(move || {
        other.read(3, 3);
        stays(other);
    });
    drop(machine.invalidate(3, 4));
    assert!(!never_spun(), "the second claim was taken away with the first");
    assert_eq!(machine.mmu.invalidation_stats().turns, 1);
}

/// The vCPU may need the very CPU that the invalidation would spin on.
pub(crate) fn who_lets_others_go_first_sleeps_until_they_went() {
    let machine = machine();
    let mut guest = starved(machine);
    let parks = Arc::new(Parks::default());
    std::thread::scope(|scope| {
        let invalidator = scope.spawn(|| {
            let _finished = Finished(&parks);
            tell_when_parked(&parks);
            drop(machine.invalidate(3, 4));
        });
        parks.until(1);
        guest.read(3, 3);
        invalidator.join().expect("invalidating does not panic");
    });
    assert_eq!(machine.mmu.invalidation_stats().turns, 1);
}

/// Its access needed no fault any more: nobody is to wait until it has another one.
pub(crate) fn a_claim_that_another_has_served_is_given_back() {
    let machine = machine();
    let (mut guest, mut other) = (starved(machine), machine.guest());
    other.read(3, 3);
    guest.read(3, 3);
    guest.enter();
    assert!(guest.vcpu.leave_guest().is_empty());
    when_spinning(|| panic!("nobody starves"));
    drop(machine.invalidate(3, 4));
    assert!(never_spun());
}

pub(crate) fn a_claim_for_another_frame_is_given_back() {
    let machine = machine();
    let mut guest = starved(machine);
    assert_eq!(guest.fault(5, Access::READ), Ok(FaultOutcome::Fixed));
    when_spinning(|| panic!("it has gone on to another frame"));
    drop(machine.invalidate(3, 4));
    assert!(never_spun());
}

pub(crate) fn who_may_not_block_lets_nobody_go_first() {
    let machine = machine();
    let _guest = starved(machine);
    when_spinning(|| panic!("it may not block"));
    drop(machine.mmu.invalidate(Frames::hvas(3, 4), Zap::Unmap, Blocking::Forbidden));
    assert!(never_spun());
}

/// While another invalidation covers the frame a turn is of no use, and the thread that nests them would wait for itself.
pub(crate) fn inside_an_invalidation_nobody_is_let_go_first() {
    let machine = machine();
    let _guest = starved(machine);
    let outer = machine.mmu.invalidate(Frames::hvas(3, 4), Zap::Unmap, Blocking::Forbidden);
    when_spinning(|| panic!("it is covered"));
    drop(machine.invalidate(3, 4));
    drop(machine.invalidate(40, 41));
    assert!(never_spun());
    drop(outer);
}

/// Parked in a stream of invalidations it would sleep through all of them, and never be retried often enough.
pub(crate) fn who_parks_comes_back_at_each_end() {
    let machine = machine();
    let parks = Arc::new(Parks::default());
    let (first, next) = (machine.invalidate(3, 4), machine.invalidate(3, 4));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let _finished = Finished(&parks);
            tell_when_parked(&parks);
            machine.mmu.wait(Guest::frame(3));
        });
        parks.until(1);
        drop(first);
        waiter.join().expect("waiting does not panic");
        assert!(machine.mmu.invalidations().covers(Guest::frame(3)), "the next one covers it all the same");
    });
    drop(next);
}

/// A page that has to be read first would make the invalidation wait for I/O.
pub(crate) fn a_page_that_needs_io_has_no_turn() {
    let machine = machine();
    let mut guest = starved(machine);
    machine.frames.answer_with([FaultInError::WouldWait]);
    machine.frames.hooks.once(Point::FaultedIn, move || {
        when_spinning(|| panic!("it is reading"));
        drop(machine.invalidate(3, 4));
        assert!(never_spun());
    });
    assert!(matches!(guest.fault(3, Access::READ), Ok(FaultOutcome::Retry(_))));
}

/// One access for each invalidation of a stream is not much.
pub(crate) fn a_turn_is_kept_for_as_long_as_the_fault_was_held_up() {
    let machine = machine_with(LONG.as_nanos() as u64);
    let mut guest = starved_for(machine, LONG / 2);
    when_spinning(move || {
        guest.read(3, 3);
        let_pass(LONG / 3);
        when_spinning(move || {
            guest.read(4, 4);
            when_spinning(move || {
                let_pass(LONG / 3);
                guest.read(5, 5);
                stays(guest);
                when_spinning(|| panic!("it was held up for 6 ms, and had 8"));
            });
        });
    });
    drop(machine.invalidate(0, 8));
    assert!(never_spun());
    assert_eq!(machine.mmu.invalidation_stats().turns, 1);
    assert_eq!(machine.mmu.fault_stats().fixed, 3, "three accesses went first");
}

pub(crate) fn a_turn_is_kept_no_longer_than_the_policy_says() {
    let machine = machine_with((LONG / 4).as_nanos() as u64);
    let mut guest = starved_for(machine, LONG);
    when_spinning(move || {
        guest.read(3, 3);
        when_spinning(move || {
            let_pass(LONG / 3);
            guest.read(4, 4);
            stays(guest);
            when_spinning(|| panic!("it had 3 ms, and took 4"));
        });
    });
    drop(machine.invalidate(0, 8));
    assert!(never_spun());
    assert_eq!(machine.mmu.invalidation_stats().turns, 1);
}

pub(crate) fn who_waits_keeps_no_turn() {
    let machine = machine_with(LONG.as_nanos() as u64);
    let mut guest = starved_for(machine, LONG / 2);
    guest.read(3, 3);
    let elsewhere = machine.mmu.invalidate(Frames::hvas(40, 41), Zap::Unmap, Blocking::Forbidden);
    assert_eq!(guest.retry_point(40), RetryPoint::BeforeFaultIn);
    when_spinning(|| panic!("who has the turn waits itself"));
    drop(machine.invalidate(3, 4));
    assert!(never_spun());
    drop(elsewhere);
}
