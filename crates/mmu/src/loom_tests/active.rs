//! Active events against the swap of the memslots: between an event's start and its end they stay.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use super::{RACE, STUCK, fails_without, holds};
use crate::active::ActiveEvents;
use crate::mutation::Mutation;
use crate::platform::model::Loom;

struct Slots {
    active: ActiveEvents<Loom>,
    slots: UnsafeCell<()>,
}

impl Slots {
    fn new() -> Arc<Self> {
        Arc::new(Self { active: ActiveEvents::new(), slots: UnsafeCell::new(()) })
    }

    /// An event, with another one inside it.
    fn nested(&self) {
        self.active.start();
        self.slots.with(|_| ());
        self.event();
        self.slots.with(|_| ());
        self.active.end();
    }

    fn event(&self) {
        self.active.start();
        self.slots.with(|_| ());
        self.active.end();
    }

    fn swap(&self) {
        self.active.drained(|| self.slots.with_mut(|_| ()));
    }
}

fn an_event_against_a_swap() {
    let slots = Slots::new();
    let other = Arc::clone(&slots);
    let event = thread::spawn(move || other.event());
    slots.swap();
    event.join().expect("the event does not panic");
}

fn nested_events_against_two_swaps() {
    let slots = Slots::new();
    let other = Arc::clone(&slots);
    let event = thread::spawn(move || other.nested());
    slots.swap();
    slots.swap();
    event.join().expect("the event does not panic");
}

fn two_events_against_a_swap() {
    let slots = Slots::new();
    let events = [(); 2].map(|()| {
        let other = Arc::clone(&slots);
        thread::spawn(move || other.event())
    });
    slots.swap();
    for event in events {
        event.join().expect("the event does not panic");
    }
}

#[test]
fn loom_slots_stay_during_an_event() {
    holds("event, swap", 5, an_event_against_a_swap);
    holds("nested events, two swaps", 4, nested_events_against_two_swaps);
    holds("two events, swap", 3, two_events_against_a_swap);
}

#[test]
fn loom_each_rule_of_the_count_is_needed() {
    fails_without(Mutation::SwapWithoutDrain, RACE, 3, an_event_against_a_swap);
    fails_without(Mutation::EventWithoutWake, STUCK, 3, an_event_against_a_swap);
}
