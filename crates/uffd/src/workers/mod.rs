//! Workers: threads that read faults from userfaultfds and serve them through the engine.
//!
//! # One round of a worker
//!
//! 1. Read what its descriptors have, in batches, without waiting. No lock is held or taken for that.
//! 2. Serve each fault. One that must be retried is *parked*: kept here, once for each page and kind, until the
//!    invalidation that covers it has ended; or let go, to fault again ([`AfterRetry`]).
//! 3. Try the parked ones that are no longer covered.
//! 4. Nothing to do: look again for a short while ([`ServeOptions::spin`]), then sleep on the descriptors and on the
//!    doorbell. Waking a thread costs more than serving a fault, so a moment of looking pays.
//!
//! # What ends a fault
//!
//! Mapped: the kernel wakes whoever waits. Poisoned: they get SIGBUS. Nothing else: a fault whose page cannot be had is
//! poisoned, never left asleep and never given other bytes. One for which there is no memory is tried again for a while
//! ([`ServeOptions::scarcity`]), since memory can come back, and poisoned then.
//!
//! Two kinds of fault wait as long as it takes: those on memory that is in no memslot, which may be in one again, and
//! those of a worker that is stopped. Stop the guest first.

mod failure;
mod last_try;
mod parked;
mod worker;

use core::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use afterimage_mmu::{FaultError, Gfn, GuestMmu, PrimaryMmu};

pub use self::failure::WorkerFailure;
use self::worker::Worker;
use crate::{UffdError, UffdMmu, VmaPage};

/// What becomes of a fault that an invalidation made retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterRetry {
    /// The worker keeps it until the invalidation has ended. Costs no CPU, and cannot starve.
    Park,
    /// The guest is woken, touches the page and faults again, as often as it takes: KVM's way.
    Refault,
}

/// How workers go about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServeOptions {
    /// How long to look for new faults, when there is nothing to do, before sleeping.
    pub spin: Duration,
    /// How long a fault waits for memory, where there is none, before its page is poisoned.
    pub scarcity: Duration,
    /// What becomes of a fault that must be retried.
    pub after_retry: AfterRetry,
}

impl Default for ServeOptions {
    /// 20 µs of looking, less than a wake-up costs on most machines; 10 s without memory; retries are parked.
    fn default() -> Self {
        Self {
            spin: Duration::from_micros(20),
            scarcity: Duration::from_secs(10),
            after_retry: AfterRetry::Park,
        }
    }
}

/// A fault that ended badly: the page was poisoned, and its user stops.
#[derive(Debug)]
pub struct FaultReport<E: fmt::Debug + fmt::Display> {
    /// The guest frame.
    pub gfn: Gfn,
    /// Why.
    pub error: FaultError<E, UffdError>,
}

/// The running workers of one [`UffdMmu`].
#[derive(Debug)]
pub struct Workers {
    threads: Vec<JoinHandle<Result<(), UffdError>>>,
    stop: Arc<Stop>,
}

struct Stop {
    asked: AtomicBool,
    ring: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stop").field("asked", &self.asked).finish_non_exhaustive()
    }
}

impl Workers {
    /// Starts as many workers as the [`UffdMmu`] was made for. `report` is told of every fault that ends in poison.
    ///
    /// # Errors
    ///
    /// The system's, if a thread cannot be started; those that were are stopped.
    pub fn start<Page, M>(
        mmu: &Arc<GuestMmu<UffdMmu<Page>>>,
        primary: &Arc<M>,
        options: ServeOptions,
        report: impl Fn(FaultReport<M::Error>) + Clone + Send + 'static,
    ) -> io::Result<Self>
    where
        Page: VmaPage + 'static,
        M: PrimaryMmu<Page = Page> + Send + Sync + 'static,
        M::Error: Send,
    {
        let belongs = Arc::clone(mmu);
        let ring = move || {
            for worker in 0..belongs.secondary().workers() {
                belongs.secondary().doorbell(worker).ring();
            }
        };
        let stop = Arc::new(Stop { asked: AtomicBool::new(false), ring: Box::new(ring) });
        let mut workers = Self { threads: Vec::new(), stop: Arc::clone(&stop) };
        for number in 0..mmu.secondary().workers() {
            let (mmu, primary, stop, report) =
                (Arc::clone(mmu), Arc::clone(primary), Arc::clone(&stop), report.clone());
            let body = move || Worker::new(&mmu, &*primary, number, options, report).run(&stop.asked);
            match thread::Builder::new().name(format!("uffd-worker-{number}")).spawn(body) {
                Ok(thread) => workers.threads.push(thread),
                Err(error) => {
                    // Started ones must not outlive the failure.
                    let _ = workers.stop();
                    return Err(error);
                }
            }
        }
        Ok(workers)
    }

    /// Whether a worker has ended by itself, which only an error makes it do.
    pub fn has_failed(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Ends the workers and waits for them. Faults that come later are not served.
    ///
    /// # Errors
    ///
    /// The first error that ended a worker.
    pub fn stop(mut self) -> Result<(), UffdError> {
        self.finish()
    }

    /// Ends the workers and waits for them, at most for `grace`. A worker that is still at a fault by then, in a source that
    /// does not answer or in a change of the page that does not end, is left behind, with all that it holds.
    pub fn stop_within(mut self, grace: Duration) -> Vec<WorkerFailure> {
        self.ask();
        let deadline = Instant::now() + grace;
        let threads = self.threads.drain(..).enumerate();
        threads.filter_map(|(worker, thread)| failure::of(worker, thread, deadline, grace)).collect()
    }

    fn ask(&self) {
        self.stop.asked.store(true, Ordering::Release);
        (self.stop.ring)();
    }

    fn finish(&mut self) -> Result<(), UffdError> {
        self.ask();
        let mut result = Ok(());
        for thread in self.threads.drain(..) {
            let ended = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(ended);
        }
        result
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        if !thread::panicking() {
            let _ = self.finish();
        }
    }
}
