//! Workers: threads that read faults from userfaultfds and serve them through the engine.
//!
//! # One round of a worker
//!
//! 1. Read what its descriptors have, in batches, without waiting. No lock is held or taken for that.
//! 2. Serve each fault. One that must be retried is *parked*: kept here, once for each page and kind, until the
//!    invalidation that covers it has ended.
//! 3. Try the parked ones that are no longer covered.
//! 4. Nothing to do: look again for a short while ([`Idle::spin`]), then sleep on the descriptors and on the
//!    doorbell. Waking a thread costs more than serving a fault, so a moment of looking pays.
//!
//! # What ends a fault
//!
//! Mapped: the kernel wakes whoever waits. Poisoned: they get SIGBUS. Nothing else: a fault whose page cannot be had is
//! poisoned, never left asleep and never given other bytes. Parked faults of a worker that is stopped stay asleep: stop
//! the guest first.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use afterimage_mmu::{
    Access, Emulate, Fault, FaultError, FaultOutcome, Found, Gfn, GfnRange, GuestMmu, Hva, HvaRange,
    PrimaryMmu, Retry, RetryPoint, Vcpu,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{Event, EventBuffer, FaultKind, UffdError, UffdMmu, VmaPage};

/// What a worker does when nothing is left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Idle {
    /// How long to look for new faults before sleeping.
    pub spin: Duration,
}

impl Default for Idle {
    /// 20 µs: less than a wake-up costs on most machines.
    fn default() -> Self {
        Self { spin: Duration::from_micros(20) }
    }
}

/// A fault that ended badly: the page was poisoned, and its user stops.
#[derive(Debug)]
pub struct FaultReport<E: core::fmt::Debug> {
    /// The guest frame.
    pub gfn: Gfn,
    /// Why.
    pub error: FaultError<E, UffdError>,
}

/// Messages read at a time.
const BATCH: usize = 32;
/// A parked fault that no invalidation covers (an entry that changed at the same time, memory that was short for a
/// moment, a slot that is changing) is tried again after this long.
const PAUSE: Duration = Duration::from_millis(1);

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

impl core::fmt::Debug for Stop {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
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
        idle: Idle,
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
            let body = move || {
                let mut worker = Worker::new(&mmu, &*primary, number, report);
                worker.run(idle, &stop.asked)
            };
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

    fn finish(&mut self) -> Result<(), UffdError> {
        self.stop.asked.store(true, Ordering::Release);
        (self.stop.ring)();
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

/// A fault as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Raised {
    page: Hva,
    access: Access,
    found: Found,
}

/// A fault that waits for another try.
#[derive(Clone, Copy, Debug)]
struct Parked {
    raised: Raised,
    /// What it waits for: the end of whatever covers these frames; none: just a while.
    covered: Option<GfnRange>,
}

/// What became of one try.
enum Tried {
    Ended,
    Again(Option<GfnRange>),
}

struct Worker<'m, Page: VmaPage, M: PrimaryMmu<Page = Page>, R> {
    mmu: &'m GuestMmu<UffdMmu<Page>>,
    primary: &'m M,
    vcpu: Vcpu<'m, UffdMmu<Page>>,
    number: usize,
    parked: Vec<Parked>,
    report: R,
}

impl<'m, Page, M, R> Worker<'m, Page, M, R>
where
    Page: VmaPage,
    M: PrimaryMmu<Page = Page>,
    R: Fn(FaultReport<M::Error>),
{
    fn new(mmu: &'m GuestMmu<UffdMmu<Page>>, primary: &'m M, number: usize, report: R) -> Self {
        Self { mmu, primary, vcpu: mmu.vcpu(), number, parked: Vec::new(), report }
    }

    fn run(&mut self, idle: Idle, stop: &AtomicBool) -> Result<(), UffdError> {
        let mut buffer = EventBuffer::with_capacity(BATCH);
        let mut raised = Vec::with_capacity(BATCH);
        let mut quiet_since = None;
        while !stop.load(Ordering::Acquire) {
            let mut found = 0;
            for uffd in self.mmu.secondary().uffds_of(self.number) {
                raised.extend(uffd.read_events(&mut buffer)?.filter_map(|event| self.raised_by(&event)));
                found += raised.len();
                for fault in raised.drain(..) {
                    self.serve(fault)?;
                }
            }
            found += self.retry_parked()?;
            if found > 0 {
                quiet_since = None;
                continue;
            }
            let now = Instant::now();
            if now - *quiet_since.get_or_insert(now) < idle.spin {
                core::hint::spin_loop();
                continue;
            }
            self.sleep()?;
            quiet_since = None;
        }
        Ok(())
    }

    fn raised_by(&self, event: &Event) -> Option<Raised> {
        // Other events are not enabled on these descriptors.
        let Event::PageFault { address, access, kind, .. } = event else { return None };
        let bytes = self.mmu.secondary().mapping().page_size().bytes();
        let found = match kind {
            FaultKind::WriteProtect => Found::Present,
            FaultKind::Missing | FaultKind::Minor => Found::Absent,
        };
        let access = match access {
            crate::Access::Read => Access::READ,
            crate::Access::Write => Access::READ | Access::WRITE,
        };
        Some(Raised { page: Hva::new(address.as_u64() & !(bytes - 1)), access, found })
    }

    fn serve(&mut self, raised: Raised) -> Result<(), UffdError> {
        // One page's fault comes once for each thread that waits, and again for each that was woken for nothing. Ending
        // one ends all of its kind.
        let known =
            |parked: &Parked| parked.raised.page == raised.page && parked.raised.found == raised.found;
        if self.parked.iter().any(known) {
            return Ok(());
        }
        if let Tried::Again(covered) = self.attempt(raised)? {
            self.parked.push(Parked { raised, covered });
        }
        Ok(())
    }

    fn attempt(&mut self, raised: Raised) -> Result<Tried, UffdError> {
        let Some((space, gfn)) = self.vcpu.gfn_at(raised.page) else {
            // No memslot, or none any more: its memory is nobody's to fill until there is one again.
            return Ok(Tried::Again(None));
        };
        let mut fault = Fault { space, gfn, access: raised.access, found: raised.found, ..Fault::default() };
        let mut outcome = self.vcpu.handle_fault(self.primary, &fault);
        if let Ok(FaultOutcome::Emulate(Emulate::ReadOnly)) = outcome {
            // The guest's own writes to a read-only slot never come here: this is the VMM, loading its ROM.
            fault.access = Access::READ;
            outcome = self.vcpu.handle_fault(self.primary, &fault);
        }
        match outcome {
            Ok(FaultOutcome::Fixed | FaultOutcome::FixedFast | FaultOutcome::Spurious) => Ok(Tried::Ended),
            Ok(FaultOutcome::Retry(Retry {
                point: RetryPoint::LostRace | RetryPoint::SlotChanging, ..
            }))
            | Ok(FaultOutcome::Emulate(_) | FaultOutcome::WriteProtected)
            | Err(FaultError::NoMemory(_) | FaultError::Interrupted(_) | FaultError::SlotChanging(_)) => {
                Ok(Tried::Again(None))
            }
            Ok(FaultOutcome::Retry(retry)) => Ok(Tried::Again(Some(retry.range))),
            Err(error @ FaultError::Poisoned { .. }) => {
                (self.report)(FaultReport { gfn, error });
                Ok(Tried::Ended)
            }
            Err(error) => {
                self.poison(raised)?;
                (self.report)(FaultReport { gfn, error });
                Ok(Tried::Ended)
            }
        }
    }

    fn poison(&self, raised: Raised) -> Result<(), UffdError> {
        let secondary = self.mmu.secondary();
        let bytes = secondary.mapping().page_size().bytes();
        secondary.poison_at(HvaRange::new(raised.page, raised.page + bytes))
    }

    /// Tries every parked fault that nothing covers. Returns how many got an end.
    fn retry_parked(&mut self) -> Result<usize, UffdError> {
        let mut ended = 0;
        let mut index = 0;
        while let Some(parked) = self.parked.get(index).copied() {
            let covered = parked.covered.is_some_and(|range| self.mmu.invalidations().covers(range));
            if covered {
                index += 1;
                continue;
            }
            match self.attempt(parked.raised)? {
                Tried::Ended => {
                    self.parked.swap_remove(index);
                    ended += 1;
                }
                Tried::Again(covered) => {
                    self.parked[index].covered = covered;
                    index += 1;
                }
            }
        }
        Ok(ended)
    }

    /// Sleeps until a fault comes, the doorbell rings, or a parked fault that waits for no end is due.
    fn sleep(&mut self) -> Result<(), UffdError> {
        let secondary = self.mmu.secondary();
        let doorbell = secondary.doorbell(self.number);
        let mut timeout = None;
        if !self.parked.is_empty() {
            doorbell.expect_ring();
            for parked in &self.parked {
                match parked.covered {
                    Some(range) if self.mmu.invalidations().covers(range) => {}
                    // Its end came before the doorbell was armed.
                    Some(_) => {
                        doorbell.awake();
                        return Ok(());
                    }
                    None => timeout = Timespec::try_from(PAUSE).ok(),
                }
            }
        }
        let mut polled = vec![PollFd::new(doorbell, PollFlags::IN)];
        polled.extend(secondary.uffds_of(self.number).map(|uffd| PollFd::new(uffd, PollFlags::IN)));
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(UffdError::Poll { errno }),
        }
        doorbell.awake();
        Ok(())
    }
}
