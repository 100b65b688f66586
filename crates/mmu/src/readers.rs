//! Read sections: how a fault looks at the memslots without a lock, and how an updater waits it out.
//!
//! # States
//!
//! Each vCPU owns one word. 0: outside. Odd: inside a section; the upper bits number the section. `WAITED` is
//! added by an updater that waits for this very section.
//!
//! # Who may do what
//!
//! Only the owner enters and leaves. An updater publishes its pointer first, then (heavy barrier) looks at every word:
//! a section that it finds may still use what was published before, and is waited for; one that it does not find
//! entered later (its light barrier lies between its store and its look at the pointer) and sees the new pointer.
//! A leaving reader learns from its own exchange whether someone waits. This is KVM's `srcu`, with one word a
//! vCPU; the fault path writes no line that another CPU writes.

use crate::intent::Barrier;
use crate::mutation::{self, Mutation};
use crate::platform::Platform;
use crate::sync::{AtomicU32, Ordering};

const INSIDE: u32 = 1;
const WAITED: u32 = 2;
const STEP: u32 = 4;

/// The word of one reader.
#[derive(Debug)]
pub(crate) struct ReaderWord {
    section: AtomicU32,
    /// Between a section's start and the look that follows. Here, so that a fault has it on a line that it writes anyway.
    barrier: Barrier,
}

impl ReaderWord {
    pub(crate) fn new(barrier: Barrier) -> Self {
        Self { section: AtomicU32::new(0), barrier }
    }

    /// Enters the section with this number (any number that differs from the last one's).
    #[inline]
    pub(crate) fn enter(&self, number: u32) {
        // Release: an updater may wait for the last section and find this one. What was done there comes before all
        // the same.
        let ordering = mutation::unless(Mutation::SectionEnterRelaxed, Ordering::Release);
        self.section.store(number.wrapping_mul(STEP) | INSIDE, ordering);
        if !mutation::active(Mutation::ReaderWithoutFence) {
            self.barrier.light();
        }
    }

    /// Leaves the section.
    #[inline]
    pub(crate) fn leave<P: Platform>(&self) {
        let ordering = mutation::unless(Mutation::SectionLeaveRelaxed, Ordering::Release);
        let section = self.section.swap(0, ordering);
        if section & WAITED != 0 && !mutation::active(Mutation::SectionWithoutWake) {
            P::wake_all(&self.section);
        }
    }

    /// Waits until the section that is running now, if any, has been left.
    fn wait_out<P: Platform>(&self) {
        let found = self.section.load(Ordering::Acquire);
        if found & INSIDE == 0 {
            return;
        }
        let marked = found | WAITED;
        let mut seen = found;
        for _ in 0..P::SPINS {
            if seen | WAITED != marked {
                return;
            }
            P::relax();
            seen = self.section.load(Ordering::Acquire);
        }
        while seen | WAITED == marked {
            // Acquire on failure too: what the section installed must be seen by who waited for it.
            match self.section.compare_exchange(seen, marked, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => {
                    P::wait(&self.section, marked);
                    seen = self.section.load(Ordering::Acquire);
                }
                Err(now) => seen = now,
            }
        }
    }
}

/// Waits for every section that may still use what was published before the call.
pub(crate) fn wait_for_readers<'a, P: Platform>(
    words: impl IntoIterator<Item = &'a ReaderWord>,
    barrier: Barrier,
) {
    barrier.heavy::<P>();
    if mutation::active(Mutation::SwapWithoutReaders) {
        return;
    }
    for word in words {
        word.wait_out::<P>();
    }
}
