//! `mmu_lock`: a phase-fair reader-writer lock that can say whether someone waits, and give way to them.
//!
//! # States
//!
//! Readers and writers alternate in *phases*. A reader that arrives while a writer is in or next waits for that
//! one writer phase and no longer; a writer waits for the writers that came before it (tickets) and for the
//! readers that were in when its turn came. So neither starves, however many the others are. (Brandenburg and
//! Anderson, "Spin-Based Reader-Writer Synchronization for Multiprocessor Real-Time Systems", 2010, PF-T.)
//!
//! | word | bits 0..=2 | bits 3.. |
//! |---|---|---|
//! | `rin` | phase number, writer present, readers parked | readers that arrived |
//! | `rout` | writer parked (bit 2) | readers that left |
//! | `win` | – | writers that arrived (whole word, step 8) |
//! | `wout` | writers parked (bit 2) | writers that left |
//!
//! # Who may do what
//!
//! A reader adds to `rin` on its way in and to `rout` on its way out: two read-modify-writes. Only the writer whose
//! ticket is up sets and clears the phase bits. Whoever parks sets the parked bit of the word it sleeps on, in
//! the same word that the waker changes: the waker's own read-modify-write tells it whether to wake, and no
//! fence is needed.
//!
//! Waiting is a short spin (`Platform::SPINS`), then a park.

use core::fmt;
use core::marker::PhantomData;

use crate::mutation::{self, Mutation};
use crate::platform::Platform;
use crate::sync::{AtomicU32, Ordering};

const PHASE: u32 = 1;
const WRITER: u32 = 2;
const PARKED: u32 = 4;
const ONE: u32 = 8;
const COUNT: u32 = !(ONE - 1);

/// The lock without data, as a [`lock_api::RawRwLock`]: fair from phase to phase, so that a reader waits for one writer at most, and
/// a writer for those that came before it. Who unlocks holds the lock.
pub struct RawMmuLock<P> {
    rin: AtomicU32,
    rout: AtomicU32,
    win: AtomicU32,
    wout: AtomicU32,
    platform: PhantomData<fn() -> P>,
}

impl<P> fmt::Debug for RawMmuLock<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawMmuLock")
            .field("rin", &self.rin.load(Ordering::Relaxed))
            .field("rout", &self.rout.load(Ordering::Relaxed))
            .field("win", &self.win.load(Ordering::Relaxed))
            .field("wout", &self.wout.load(Ordering::Relaxed))
            .finish()
    }
}

impl<P: Platform> Default for RawMmuLock<P> {
    fn default() -> Self {
        Self::new()
    }
}

impl<P: Platform> RawMmuLock<P> {
    /// An unlocked lock.
    #[cfg(not(loom))]
    pub const fn new() -> Self {
        Self {
            rin: AtomicU32::new(0),
            rout: AtomicU32::new(0),
            win: AtomicU32::new(0),
            wout: AtomicU32::new(0),
            platform: PhantomData,
        }
    }

    /// An unlocked lock.
    #[cfg(loom)]
    pub fn new() -> Self {
        Self {
            rin: AtomicU32::new(0),
            rout: AtomicU32::new(0),
            win: AtomicU32::new(0),
            wout: AtomicU32::new(0),
            platform: PhantomData,
        }
    }

    /// Takes the lock for reading; waits for at most one writer.
    #[inline]
    pub fn read(&self) {
        let phase = self.rin.fetch_add(ONE, Ordering::Acquire) & (WRITER | PHASE);
        if phase & WRITER != 0 && !mutation::active(Mutation::ReaderIgnoresWriter) {
            self.wait_for_phase(phase);
        }
    }

    #[cold]
    fn wait_for_phase(&self, phase: u32) {
        park_while::<P>(&self.rin, |rin| rin & (WRITER | PHASE) == phase);
    }

    /// Takes the lock for reading if no writer is in or next.
    #[inline]
    pub fn try_read(&self) -> bool {
        let mut rin = self.rin.load(Ordering::Relaxed);
        while rin & WRITER == 0 {
            match self.rin.compare_exchange_weak(
                rin,
                rin.wrapping_add(ONE),
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(now) => rin = now,
            }
        }
        false
    }

    /// Gives up a read lock.
    #[inline]
    pub fn unlock_read(&self) {
        let before = self.rout.fetch_add(ONE, mutation::unless(Mutation::UnlockRelaxed, Ordering::Release));
        if before & PARKED != 0 {
            self.wake(&self.rout);
        }
    }

    /// Takes the lock for writing; waits for the writers that came first and the readers that are in.
    pub fn write(&self) {
        let ticket = self.win.fetch_add(ONE, Ordering::Relaxed);
        park_while::<P>(&self.wout, |wout| wout & COUNT != ticket);
        let readers = self.close_phase();
        if !mutation::active(Mutation::WriterIgnoresReaders) {
            park_while::<P>(&self.rout, |rout| rout & COUNT != readers);
            // Only this writer can have set the bit, and only while it waited.
            self.rout.fetch_and(!PARKED, Ordering::Relaxed);
        }
    }

    /// Starts the writer's phase: readers that arrive from here on wait. Returns the readers to wait for.
    ///
    /// The phase number changes with every phase that is really closed, not with every ticket: a reader that
    /// sleeps through the end of its phase must not take the next one, which waits for it, for its own.
    fn close_phase(&self) -> u32 {
        self.rin.fetch_xor(WRITER | PHASE, Ordering::Relaxed) & COUNT
    }

    /// Takes the lock for writing if nobody holds it or waits for it.
    pub fn try_write(&self) -> bool {
        // Acquire: the writer that left at this turn has published what it did.
        let turn = self.wout.load(Ordering::Acquire) & COUNT;
        if self
            .win
            .compare_exchange(turn, turn.wrapping_add(ONE), Ordering::Relaxed, Ordering::Relaxed)
            .is_err()
        {
            return false;
        }
        let readers = self.rout.load(Ordering::Acquire) & COUNT;
        let rin = self.rin.load(Ordering::Relaxed);
        let closed = rin & COUNT == readers
            && self
                .rin
                .compare_exchange(rin, rin ^ (WRITER | PHASE), Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if !closed {
            self.pass_turn();
        }
        closed
    }

    /// Gives up the write lock: the readers that wait go in, then the next writer's turn comes.
    pub fn unlock_write(&self) {
        let ordering = mutation::unless(Mutation::UnlockRelaxed, Ordering::Release);
        let before = self.rin.fetch_and(!(WRITER | PARKED), ordering);
        if before & PARKED != 0 {
            self.wake(&self.rin);
        }
        self.pass_turn();
    }

    fn pass_turn(&self) {
        let ordering = mutation::unless(Mutation::UnlockRelaxed, Ordering::Release);
        let mut wout = self.wout.load(Ordering::Relaxed);
        loop {
            let next = (wout & COUNT).wrapping_add(ONE);
            match self.wout.compare_exchange_weak(wout, next, ordering, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => wout = now,
            }
        }
        if wout & PARKED != 0 {
            self.wake(&self.wout);
        }
    }

    fn wake(&self, word: &AtomicU32) {
        if !mutation::active(Mutation::UnlockWithoutWake) {
            P::wake_all(word);
        }
    }

    /// Whether anyone waits for the writer that asks. Meaningful only to the thread that holds the write lock.
    pub fn is_contended_by_writer(&self) -> bool {
        let readers_wait =
            self.rin.load(Ordering::Relaxed) & COUNT != self.rout.load(Ordering::Relaxed) & COUNT;
        let turn = self.wout.load(Ordering::Relaxed) & COUNT;
        readers_wait || self.win.load(Ordering::Relaxed) != turn.wrapping_add(ONE)
    }

    /// Whether a writer waits for the readers. Meaningful only to a thread that holds a read lock.
    pub fn is_contended_by_reader(&self) -> bool {
        self.win.load(Ordering::Relaxed) != self.wout.load(Ordering::Relaxed) & COUNT
    }

    pub(crate) fn is_locked_now(&self) -> bool {
        self.is_write_locked_now()
            || self.rin.load(Ordering::Relaxed) & COUNT != self.rout.load(Ordering::Relaxed) & COUNT
    }

    fn is_write_locked_now(&self) -> bool {
        self.win.load(Ordering::Relaxed) != self.wout.load(Ordering::Relaxed) & COUNT
    }
}

/// Waits while `blocked` says so of the word: spins, then marks the word and parks.
fn park_while<P: Platform>(word: &AtomicU32, blocked: impl Fn(u32) -> bool) {
    for _ in 0..P::SPINS {
        if !blocked(word.load(Ordering::Acquire)) {
            return;
        }
        P::relax();
    }
    loop {
        let seen = word.load(Ordering::Acquire);
        if !blocked(seen) {
            return;
        }
        let marked = seen | PARKED;
        if seen == marked || word.compare_exchange(seen, marked, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            P::wait(word, marked);
        }
    }
}

// UNSAFETY: `RawRwLock` is an unsafe trait; no unsafe operation happens here.
#[cfg(not(loom))]
#[expect(unsafe_code)]
mod raw {
    use super::{Platform, RawMmuLock};
    use lock_api::{GuardSend, RawRwLock, RawRwLockFair};

    // SAFETY: (1) a reader is in only between `rin` and `rout` increments and while no writer phase is open; (2) a
    // writer is in only with its ticket up, its phase bits set and every earlier reader gone. So a writer
    // excludes everyone, and any number of readers exclude writers only.
    unsafe impl<P: Platform> RawRwLock for RawMmuLock<P> {
        const INIT: Self = Self::new();
        type GuardMarker = GuardSend;

        fn lock_shared(&self) {
            self.read();
        }

        fn try_lock_shared(&self) -> bool {
            self.try_read()
        }

        unsafe fn unlock_shared(&self) {
            self.unlock_read();
        }

        fn lock_exclusive(&self) {
            self.write();
        }

        fn try_lock_exclusive(&self) -> bool {
            self.try_write()
        }

        unsafe fn unlock_exclusive(&self) {
            self.unlock_write();
        }

        fn is_locked(&self) -> bool {
            self.is_locked_now()
        }

        fn is_locked_exclusive(&self) -> bool {
            self.is_write_locked_now()
        }
    }

    // SAFETY: the lock is fair in every unlock, so the fair variants are the ordinary ones.
    unsafe impl<P: Platform> RawRwLockFair for RawMmuLock<P> {
        unsafe fn unlock_shared_fair(&self) {
            self.unlock_read();
        }

        unsafe fn unlock_exclusive_fair(&self) {
            self.unlock_write();
        }
    }
}
