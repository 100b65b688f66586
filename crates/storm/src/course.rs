//! The course of a run: who is told to end, in which order, and when nobody is waited for any longer.
//!
//! ```text
//! time is up ──► calm: no invalidation begins; those that are open end ──► over: no fault begins ──► done: no more ticks
//!                  │ held up for too long, or interrupted
//!                  └──► abandoned: vCPUs leave their faults, so that the invalidations end without them
//! ```
//!
//! Invalidations end first: a fault may wait for the end of one. Where a thread panics everybody is told to end at once, else
//! the others would wait for what it never does.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::panic::resume_unwind;
use std::thread::{self, ScopedJoinHandle};

use afterimage_mmu::Platform;

use crate::platform::Threads;

/// How often a run looks whether it is to end early.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How often it looks whether what is to end has ended.
const END_EVERY: Duration = Duration::from_millis(1);

/// How far a run is, for its threads to look at.
#[derive(Debug, Default)]
pub(crate) struct Course {
    /// Invalidations end.
    pub(crate) calm: AtomicBool,
    /// vCPUs end.
    pub(crate) over: AtomicBool,
    /// vCPUs end, and leave what is pending.
    pub(crate) abandoned: AtomicBool,
    /// Nobody runs any more.
    pub(crate) done: AtomicBool,
}

/// How long a run may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) duration: Duration,
    /// How much longer invalidations may be open.
    pub(crate) grace: Duration,
}

/// What the threads of a run came back with.
#[derive(Debug)]
pub(crate) struct Ended<S, T> {
    pub(crate) seen: Vec<S>,
    pub(crate) taken: Vec<T>,
    pub(crate) elapsed_ns: u64,
}

/// Tells everybody to end, when dropped.
struct EndAll<'c>(&'c Course);

impl Drop for EndAll<'_> {
    fn drop(&mut self) {
        self.0.end_all();
    }
}

impl Course {
    /// Tells everybody to end, in no order.
    pub(crate) fn end_all(&self) {
        for flag in [&self.calm, &self.over, &self.abandoned, &self.done] {
            flag.store(true, Ordering::Relaxed);
        }
    }

    /// Waits until time is up, or `interrupted`, and for the end of all. `is_open` tells whether any invalidation is open.
    /// Panics as the first thread that did.
    pub(crate) fn run<S, T>(
        &self,
        limits: Limits,
        interrupted: &AtomicBool,
        is_open: impl Fn() -> bool,
        guests: Vec<ScopedJoinHandle<'_, S>>,
        invalidators: Vec<ScopedJoinHandle<'_, T>>,
    ) -> Ended<S, T> {
        let _ending = EndAll(self);
        let Limits { duration, grace } = limits;
        let started_ns = Threads::now_ns();
        let elapsed = || Duration::from_nanos(Threads::now_ns() - started_ns);
        while elapsed() < duration && !interrupted.load(Ordering::Relaxed) {
            thread::sleep(LOOK_EVERY.min(duration.saturating_sub(elapsed())));
        }
        self.calm.store(true, Ordering::Relaxed);
        let (mut held, mut looked) = (Duration::ZERO, elapsed());
        while !invalidators.iter().all(ScopedJoinHandle::is_finished) {
            thread::sleep(END_EVERY);
            let now = elapsed();
            // One that is not open waits for no vCPU: it has its memory mapped first.
            held += if is_open() { now - looked } else { Duration::ZERO };
            looked = now;
            if held > grace || interrupted.load(Ordering::Relaxed) {
                self.abandoned.store(true, Ordering::Relaxed);
            }
        }
        let taken = join_all(invalidators);
        self.over.store(true, Ordering::Relaxed);
        let seen = join_all(guests);
        Ended { seen, taken, elapsed_ns: Threads::now_ns() - started_ns }
    }
}

fn join_all<T>(threads: Vec<ScopedJoinHandle<'_, T>>) -> Vec<T> {
    let join = |thread: ScopedJoinHandle<'_, T>| thread.join().unwrap_or_else(|panic| resume_unwind(panic));
    threads.into_iter().map(join).collect()
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::AtomicU32;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    fn wait_for(flag: &AtomicBool) {
        while !flag.load(Ordering::Relaxed) {
            thread::sleep(END_EVERY);
        }
    }

    const AT_ONCE: Limits = Limits { duration: Duration::ZERO, grace: Duration::ZERO };
    static NOBODY: AtomicBool = AtomicBool::new(false);

    #[test]
    fn a_panic_ends_everybody() {
        let course = Course::default();
        let panic = catch_unwind(AssertUnwindSafe(|| {
            thread::scope(|scope| {
                let guest = scope.spawn(|| wait_for(&course.over));
                let invalidator = scope.spawn(|| panic!("a page is lost"));
                scope.spawn(|| wait_for(&course.done));
                course.run(AT_ONCE, &NOBODY, || false, vec![guest], vec![invalidator]);
            });
        }));
        let said = panic.expect_err("it is told");
        assert_eq!(said.downcast_ref(), Some(&"a page is lost"));
    }

    #[test]
    fn only_an_open_invalidation_is_abandoned() {
        let (course, looks) = (Course::default(), AtomicU32::new(0));
        let closed_at_first = || looks.fetch_add(1, Ordering::Relaxed) >= 5;
        thread::scope(|scope| {
            let invalidator = scope.spawn(|| {
                wait_for(&course.calm);
                wait_for(&course.abandoned);
                assert!(looks.load(Ordering::Relaxed) > 5, "nothing was open");
            });
            let guests: Vec<ScopedJoinHandle<'_, ()>> = Vec::new();
            course.run(AT_ONCE, &NOBODY, closed_at_first, guests, vec![invalidator]);
        });
    }

    #[test]
    fn the_longest_duration_can_be_interrupted() {
        let (course, interrupted) = (Course::default(), AtomicBool::new(true));
        let limits = Limits { duration: Duration::MAX, grace: Duration::MAX };
        let looks = AtomicU32::new(0);
        let ended = thread::scope(|scope| {
            let guest = scope.spawn(|| wait_for(&course.over));
            let invalidator = scope.spawn(|| wait_for(&course.abandoned));
            let is_open = || looks.fetch_add(1, Ordering::Relaxed) < u32::MAX;
            course.run(limits, &interrupted, is_open, vec![guest], vec![invalidator])
        });
        assert_eq!((ended.seen.len(), ended.taken.len()), (1, 1));
    }
}
