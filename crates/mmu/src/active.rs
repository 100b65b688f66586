//! The counts of active notifier events, and the swap of the memslots that waits for those that know only the old ones.
//!
//! # States of the one word
//!
//! Two counts of events between their start and their end (step 4), of which new events join one; `SECOND` says which;
//! `PARKED` when someone sleeps on the word.
//!
//! An event may start at any time, whatever others do: events nest, also in one thread, and one that may not block must
//! not queue behind an updater. It pins what it found at its start, and an updater waits for it by turning to the other count and
//! waiting until the one before is 0. So no stream of overlapping events holds an update back: it waits twice, each time
//! for the events that are active then, and for none that comes later.
//!
//! | step of the updater | events that start from here on |
//! |---|---|
//! | announce the slots to come | may know them |
//! | turn, wait | know them, and cover their frames as well as those of the slots that are |
//! | publish them | find them alone |
//! | turn, wait | nobody knows the old ones |
//!
//! Source: Linux `mn_active_invalidate_count`, `mn_memslots_update_rcuwait`, `kvm_swap_active_memslots`, where the swap waits until no
//! event is active; the two counts are `srcu`'s.

use crate::invalidation;
use crate::mutation::{self, Mutation};
use crate::platform::Platform;
use crate::sync::{AtomicU32, Ordering};
use core::marker::PhantomData;

const PARKED: u32 = 1;
const SECOND: u32 = 2;
const FIRST_ONE: u32 = 1 << 2;
const SECOND_ONE: u32 = 1 << 16;
/// Most events that one count holds: one more parks until another ends.
const MOST: u32 = (1 << 14) - 1;
// Each event is an invalidation at most, and between two turns both counts may be full.
const _: () = assert!(2 * MOST as u64 <= invalidation::MOST_ACTIVE);

pub(crate) struct ActiveEvents<P: Platform> {
    word: AtomicU32,
    platform: PhantomData<fn() -> P>,
}

/// An event that has started. It ends when this is dropped.
#[must_use = "an event that is dropped at once protects nothing"]
pub(crate) struct Event<'a, P: Platform> {
    events: &'a ActiveEvents<P>,
    /// Which count it is in.
    one: u32,
}

/// What an event adds that joins now.
fn one_of(word: u32) -> u32 {
    if word & SECOND == 0 { FIRST_ONE } else { SECOND_ONE }
}

/// The events in the count of `one`.
fn count(word: u32, one: u32) -> u32 {
    (word / one) & MOST
}

impl<P: Platform> Drop for Event<'_, P> {
    fn drop(&mut self) {
        let before = self.events.word.fetch_sub(self.one, Ordering::Release);
        let is_awaited = matches!(count(before, self.one), 1 | MOST) && before & PARKED != 0;
        if is_awaited && !mutation::active(Mutation::EventWithoutWake) {
            P::wake_all(&self.events.word);
        }
    }
}

impl<P: Platform> ActiveEvents<P> {
    pub(crate) fn new() -> Self {
        Self { word: AtomicU32::new(0), platform: PhantomData }
    }

    /// An event starts: from here to its end no slot set goes that it can find.
    pub(crate) fn start(&self) -> Event<'_, P> {
        let mut seen = self.word.load(Ordering::Relaxed);
        loop {
            let one = one_of(seen);
            if count(seen, one) == MOST {
                seen = self.park(seen);
                continue;
            }
            match self.word.compare_exchange_weak(seen, seen + one, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Event { events: self, one },
                Err(now) => seen = now,
            }
        }
    }

    /// Runs `publish` when every event has ended that started before this; returns when every one has ended that started before
    /// it was run. The caller holds what makes updates take turns.
    pub(crate) fn swapped<R>(&self, publish: impl FnOnce() -> R) -> R {
        if !mutation::active(Mutation::SwapWithoutDrain) {
            self.drain();
        }
        let result = publish();
        if !mutation::active(Mutation::SlotsFreedUnderEvents) {
            self.drain();
        }
        result
    }

    /// Waits until every event has ended that is active now.
    fn drain(&self) {
        // Release: who joins the other count knows what was announced, or published. Acquire: those that have ended.
        let before = self.word.fetch_xor(SECOND, Ordering::AcqRel);
        let one = one_of(before);
        let mut seen = before ^ SECOND;
        while count(seen, one) != 0 {
            seen = self.park(seen);
        }
        if self.word.fetch_and(!PARKED, Ordering::Relaxed) & PARKED != 0 {
            // Others may have slept beside.
            P::wake_all(&self.word);
        }
    }

    /// Sleeps until the word is no longer `seen`; returns what it is then.
    fn park(&self, seen: u32) -> u32 {
        let marked = seen | PARKED;
        match self.word.compare_exchange(seen, marked, Ordering::Acquire, Ordering::Acquire) {
            Ok(_) => {
                P::wait(&self.word, marked);
                self.word.load(Ordering::Acquire)
            }
            Err(now) => now,
        }
    }
}
