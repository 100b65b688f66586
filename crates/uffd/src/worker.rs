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

use core::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use afterimage_mmu::{
    Access, Emulate, Fault, FaultError, FaultInError, FaultOutcome, Found, Gfn, GfnRange, GuestMmu, Hva,
    HvaRange, Mapped, Memslot, Patience, PrimaryMmu, Retry, RetryPoint, Snapshot, Vcpu,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{Event, EventBuffer, FaultKind, UffdError, UffdMmu, VmaPage};

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
    awaits: Await,
    /// Since when there is no memory for it.
    scarce_since: Option<Instant>,
}

/// What a parked fault waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Await {
    /// The end of whatever covers these frames.
    End(GfnRange),
    /// Memory. Also another's change of the same entry, which is over in a moment.
    Memory,
    /// A memslot.
    Slot,
}

/// What became of one try.
enum Tried {
    Ended,
    Again(Await),
}

struct Worker<'m, Page: VmaPage, M: PrimaryMmu<Page = Page>, R> {
    mmu: &'m GuestMmu<UffdMmu<Page>>,
    primary: &'m M,
    vcpu: Vcpu<'m, UffdMmu<Page>>,
    number: usize,
    options: ServeOptions,
    parked: Vec<Parked>,
    report: R,
}

impl<'m, Page, M, R> Worker<'m, Page, M, R>
where
    Page: VmaPage,
    M: PrimaryMmu<Page = Page>,
    R: Fn(FaultReport<M::Error>),
{
    fn new(
        mmu: &'m GuestMmu<UffdMmu<Page>>,
        primary: &'m M,
        number: usize,
        options: ServeOptions,
        report: R,
    ) -> Self {
        Self { mmu, primary, vcpu: mmu.vcpu(), number, options, parked: Vec::new(), report }
    }

    fn run(&mut self, stop: &AtomicBool) -> Result<(), UffdError> {
        let secondary = self.mmu.secondary();
        let doorbell = PollFd::new(secondary.doorbell(self.number), PollFlags::IN);
        let uffds = secondary.uffds_of(self.number).map(|uffd| PollFd::new(uffd, PollFlags::IN));
        let mut polled: Vec<_> = [doorbell].into_iter().chain(uffds).collect();
        let mut buffer = EventBuffer::with_capacity(BATCH);
        let mut raised = Vec::with_capacity(BATCH);
        let mut quiet_since = None;
        while !stop.load(Ordering::Acquire) {
            let mut found = 0;
            for uffd in secondary.uffds_of(self.number) {
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
            if now - *quiet_since.get_or_insert(now) < self.options.spin {
                core::hint::spin_loop();
                continue;
            }
            self.sleep(&mut polled)?;
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
        if let Tried::Again(awaits) = self.attempt(raised, Hope::Left)? {
            if self.options.after_retry == AfterRetry::Refault && matches!(awaits, Await::End(_)) {
                return self.mmu.secondary().wake(self.page_of(raised));
            }
            let scarce_since = (awaits == Await::Memory).then(Instant::now);
            self.parked.push(Parked { raised, awaits, scarce_since });
        }
        Ok(())
    }

    fn attempt(&mut self, raised: Raised, hope: Hope) -> Result<Tried, UffdError> {
        let Some((space, gfn)) = self.vcpu.gfn_at(raised.page) else {
            // No memslot, or none any more: its memory is nobody's to fill until there is one again.
            return Ok(Tried::Again(Await::Slot));
        };
        let mut fault = Fault { space, gfn, access: raised.access, found: raised.found, ..Fault::default() };
        let mut outcome = self.vcpu.handle_fault(self.primary, &fault);
        if let Ok(FaultOutcome::Emulate(Emulate::ReadOnly)) = outcome {
            // The guest's own writes to a read-only slot never come here: this is the VMM, loading its ROM.
            fault.access = Access::READ;
            outcome = self.vcpu.handle_fault(self.primary, &fault);
        }
        match (outcome, hope) {
            (Ok(FaultOutcome::Fixed | FaultOutcome::FixedFast | FaultOutcome::Spurious), _) => {
                Ok(Tried::Ended)
            }
            (Ok(FaultOutcome::Retry(Retry { point: RetryPoint::LostRace, .. })), Hope::Left)
            | (Err(FaultError::NoMemory(_) | FaultError::Interrupted(_)), Hope::Left) => {
                Ok(Tried::Again(Await::Memory))
            }
            (Ok(FaultOutcome::Retry(Retry { point: RetryPoint::SlotChanging, .. })), _)
            | (Ok(FaultOutcome::Emulate(_) | FaultOutcome::WriteProtected), _)
            | (Err(FaultError::SlotChanging(_)), _) => Ok(Tried::Again(Await::Slot)),
            (Ok(FaultOutcome::Retry(Retry { point: RetryPoint::LostRace, .. })), Hope::Gone) => {
                self.poison(raised, gfn, FaultError::NoMemory(gfn))
            }
            (Ok(FaultOutcome::Retry(retry)), _) => Ok(Tried::Again(Await::End(retry.range))),
            (Err(FaultError::NoMemory(_) | FaultError::Interrupted(_) | FaultError::NoPage { .. }), _) => {
                self.try_last(raised, &fault)
            }
            // In both cases the secondary MMU has put the poison there.
            (Err(error @ (FaultError::Poisoned { .. } | FaultError::CannotMap { .. })), _) => {
                Ok(self.ended_badly(gfn, error))
            }
            (Err(error), _) => self.poison(raised, gfn, error),
        }
    }

    /// The page cannot be had. Asks once more, and has the engine install poison in the page's place, checked against
    /// invalidations like any page: a discard in between makes zeros of it, which can be had.
    fn try_last(&mut self, raised: Raised, fault: &Fault) -> Result<Tried, UffdError> {
        let gfn = fault.gfn;
        match self.vcpu.handle_fault(&LastTry(self.primary), fault) {
            Err(FaultError::Poisoned { cause: Lack::Page(cause), .. }) => {
                Ok(self.ended_badly(gfn, FaultError::NoPage { gfn, cause }))
            }
            Err(FaultError::Poisoned { cause: Lack::Memory, .. }) => {
                Ok(self.ended_badly(gfn, FaultError::NoMemory(gfn)))
            }
            Err(FaultError::CannotMap { cause, .. }) => {
                Ok(self.ended_badly(gfn, FaultError::CannotMap { gfn, cause }))
            }
            Err(_) => self.poison(raised, gfn, FaultError::NoMemory(gfn)),
            Ok(FaultOutcome::Fixed | FaultOutcome::FixedFast | FaultOutcome::Spurious) => Ok(Tried::Ended),
            Ok(FaultOutcome::Retry(retry)) => Ok(Tried::Again(Await::End(retry.range))),
            Ok(FaultOutcome::Emulate(_) | FaultOutcome::WriteProtected) => Ok(Tried::Again(Await::Slot)),
        }
    }

    fn page_of(&self, raised: Raised) -> HvaRange {
        let bytes = self.mmu.secondary().mapping().page_size().bytes();
        HvaRange::new(raised.page, raised.page + bytes)
    }

    fn poison(
        &self,
        raised: Raised,
        gfn: Gfn,
        error: FaultError<M::Error, UffdError>,
    ) -> Result<Tried, UffdError> {
        match self.mmu.secondary().poison_at(self.page_of(raised)) {
            Ok(Mapped::LostRace | Mapped::LargerLeaf) => Ok(Tried::Again(Await::Memory)),
            // Nobody is left to wait.
            Ok(Mapped::Fixed | Mapped::Spurious) | Err(UffdError::Lost { .. }) => {
                Ok(self.ended_badly(gfn, error))
            }
            Err(error) => Err(error),
        }
    }

    fn ended_badly(&self, gfn: Gfn, error: FaultError<M::Error, UffdError>) -> Tried {
        (self.report)(FaultReport { gfn, error });
        Tried::Ended
    }

    /// Tries every parked fault that nothing covers. Returns how many got an end.
    fn retry_parked(&mut self) -> Result<usize, UffdError> {
        let mut ended = 0;
        let mut index = 0;
        while let Some(parked) = self.parked.get(index).copied() {
            if let Await::End(range) = parked.awaits
                && self.mmu.invalidations().covers(range)
            {
                index += 1;
                continue;
            }
            let hope = match parked.scarce_since {
                Some(since) if since.elapsed() >= self.options.scarcity => Hope::Gone,
                _ => Hope::Left,
            };
            match self.attempt(parked.raised, hope)? {
                Tried::Ended => {
                    self.parked.swap_remove(index);
                    ended += 1;
                }
                Tried::Again(awaits) => {
                    let parked = &mut self.parked[index];
                    parked.awaits = awaits;
                    match awaits {
                        Await::Memory => _ = parked.scarce_since.get_or_insert_with(Instant::now),
                        // An invalidation in between says nothing about memory.
                        Await::End(_) => {}
                        Await::Slot => parked.scarce_since = None,
                    }
                    index += 1;
                }
            }
        }
        Ok(ended)
    }

    /// Sleeps until a fault comes, the doorbell rings, or a parked fault that waits for no end is due.
    fn sleep(&mut self, polled: &mut [PollFd<'_>]) -> Result<(), UffdError> {
        let doorbell = self.mmu.secondary().doorbell(self.number);
        let mut timeout = None;
        if !self.parked.is_empty() {
            doorbell.expect_ring();
            for parked in &self.parked {
                match parked.awaits {
                    Await::End(range) if self.mmu.invalidations().covers(range) => {}
                    // Its end came before the doorbell was armed.
                    Await::End(_) => {
                        doorbell.awake();
                        return Ok(());
                    }
                    Await::Memory | Await::Slot => timeout = Timespec::try_from(PAUSE).ok(),
                }
            }
        }
        match poll(polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(UffdError::Poll { errno }),
        }
        doorbell.awake();
        if !polled[0].revents().is_empty() {
            doorbell.answer();
        }
        Ok(())
    }
}

/// Whether it pays to wait for what a fault lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hope {
    Left,
    Gone,
}

/// Why a page is not to be had.
#[derive(Debug)]
enum Lack<E> {
    Memory,
    Page(E),
}

impl<E: fmt::Display> fmt::Display for Lack<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("there is no memory for it"),
            Self::Page(cause) => cause.fmt(f),
        }
    }
}

/// The primary MMU, asked for the last time: what it does not give now is lost.
struct LastTry<'m, M>(&'m M);

impl<M: PrimaryMmu> PrimaryMmu for LastTry<'_, M> {
    type Page = M::Page;
    type Error = Lack<M::Error>;

    fn fault_in(
        &self,
        slot: &Memslot,
        fault: &Fault,
        since: &Snapshot,
        patience: Patience,
    ) -> Result<M::Page, FaultInError<Self::Error>> {
        self.0.fault_in(slot, fault, since, patience).map_err(|error| match error {
            FaultInError::WouldWait => FaultInError::WouldWait,
            FaultInError::ReadOnly => FaultInError::ReadOnly,
            FaultInError::Interrupted | FaultInError::NoMemory => FaultInError::Poisoned(Lack::Memory),
            FaultInError::Poisoned(cause) | FaultInError::Failed(cause) => {
                FaultInError::Poisoned(Lack::Page(cause))
            }
        })
    }

    fn privacy(&self, gfn: Gfn) -> afterimage_mmu::Privacy {
        self.0.privacy(gfn)
    }
}
