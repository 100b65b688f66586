//! Active events against the swap of the memslots: what an event finds stays to its end, and when new slots are published, no
//! event is active that does not know them.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::{RACE, STUCK, fails_without, holds};
use crate::active::ActiveEvents;
use crate::mutation::Mutation;
use crate::platform::model::Loom;

struct Slots {
    active: ActiveEvents<Loom>,
    /// Read by who uses a set, written by who frees it.
    sets: [UnsafeCell<()>; 3],
    coming: AtomicUsize,
    published: AtomicUsize,
    /// For each set that may be published: read by events that do not know it, written by who publishes it.
    unaware: [UnsafeCell<()>; 3],
}

impl Slots {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            active: ActiveEvents::new(),
            sets: [(); 3].map(UnsafeCell::new),
            coming: AtomicUsize::new(0),
            published: AtomicUsize::new(0),
            unaware: [(); 3].map(UnsafeCell::new),
        })
    }

    /// An event, with `inside` in it.
    fn event(&self, inside: impl FnOnce()) {
        let event = self.active.start();
        let coming = self.coming.load(Ordering::Acquire);
        let published = self.published.load(Ordering::Acquire);
        let look = || {
            self.sets[coming].with(|_| ());
            self.sets[published].with(|_| ());
            self.unaware[coming + 1..].iter().for_each(|set| set.with(|_| ()));
        };
        look();
        inside();
        look();
        drop(event);
    }

    fn swap(&self, next: usize) {
        self.coming.store(next, Ordering::Release);
        self.active.swapped(|| {
            self.unaware[next].with_mut(|_| ());
            self.published.store(next, Ordering::Release);
        });
        self.sets[next - 1].with_mut(|_| ());
    }
}

fn an_event_against_a_swap() {
    let slots = Slots::new();
    let other = Arc::clone(&slots);
    let event = thread::spawn(move || other.event(|| ()));
    slots.swap(1);
    event.join().expect("the event does not panic");
}

fn nested_events_against_two_swaps() {
    let slots = Slots::new();
    let other = Arc::clone(&slots);
    let event = thread::spawn(move || other.event(|| other.event(|| ())));
    slots.swap(1);
    slots.swap(2);
    event.join().expect("the event does not panic");
}

fn two_events_against_a_swap() {
    let slots = Slots::new();
    let events = [(); 2].map(|()| {
        let other = Arc::clone(&slots);
        thread::spawn(move || other.event(|| ()))
    });
    slots.swap(1);
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
fn loom_each_rule_of_the_counts_is_needed() {
    fails_without(Mutation::SwapWithoutDrain, RACE, 3, an_event_against_a_swap);
    fails_without(Mutation::SlotsFreedUnderEvents, RACE, 3, an_event_against_a_swap);
    fails_without(Mutation::EventWithoutWake, STUCK, 3, an_event_against_a_swap);
}
