//! The count of active notifier events, and the swap that waits until it is 0.
//!
//! # States of the one word
//!
//! Count of events between their start and their end (step 4); `SWAPPING` while an updater, alone, publishes a slot
//! set; `PARKED` when someone sleeps on the word.
//!
//! An event may start whenever nobody is swapping, and pins the slot set from start to end. The updater goes to
//! `SWAPPING` only from a count of 0. It is a count and not a lock on purpose: events nest, also in one thread, and
//! one that may not block must not queue behind an updater. The price is KVM's too: a stream of
//! overlapping events can hold a memslot update back.
//!
//! Source: Linux `mn_active_invalidate_count`, `mn_memslots_update_rcuwait`, `kvm_swap_active_memslots`.

use crate::mutation::{self, Mutation};
use crate::platform::Platform;
use crate::sync::{AtomicU32, Ordering};
use core::marker::PhantomData;

const SWAPPING: u32 = 1;
const PARKED: u32 = 2;
const ONE: u32 = 4;

pub(crate) struct ActiveEvents<P> {
    word: AtomicU32,
    platform: PhantomData<fn() -> P>,
}

impl<P: Platform> ActiveEvents<P> {
    pub(crate) fn new() -> Self {
        Self { word: AtomicU32::new(0), platform: PhantomData }
    }

    /// An event starts: from here to its end no slot set is swapped.
    pub(crate) fn start(&self) {
        let mut seen = self.word.load(Ordering::Relaxed);
        loop {
            if seen & SWAPPING != 0 {
                seen = self.park(seen);
                continue;
            }
            match self.word.compare_exchange_weak(seen, seen + ONE, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    /// An event ends.
    pub(crate) fn end(&self) {
        let before = self.word.fetch_sub(ONE, Ordering::Release);
        if before == ONE | PARKED && !mutation::active(Mutation::EventWithoutWake) {
            P::wake_all(&self.word);
        }
    }

    /// Waits until no event is active and runs `publish` while none can start.
    pub(crate) fn drained<R>(&self, publish: impl FnOnce() -> R) -> R {
        if mutation::active(Mutation::SwapWithoutDrain) {
            return publish();
        }
        let mut seen = self.word.load(Ordering::Acquire);
        loop {
            if seen & !PARKED != 0 {
                seen = self.park(seen);
                continue;
            }
            match self.word.compare_exchange_weak(seen, SWAPPING, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => break,
                Err(now) => seen = now,
            }
        }
        let result = publish();
        if self.word.swap(0, Ordering::Release) & PARKED != 0 {
            P::wake_all(&self.word);
        }
        result
    }

    /// Sleeps until the word is no longer `seen`; returns what it is then.
    fn park(&self, seen: u32) -> u32 {
        let marked = seen | PARKED;
        match self.word.compare_exchange(seen, marked, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => {
                P::wait(&self.word, marked);
                self.word.load(Ordering::Acquire)
            }
            Err(now) => now,
        }
    }
}
