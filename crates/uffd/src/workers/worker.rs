//! One worker: reads faults, serves them through the engine, parks those that must be retried.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use afterimage_mmu::{
    Access, Emulate, Fault, FaultError, FaultOutcome, Found, Gfn, GuestMmu, Hva, HvaRange, Mapped,
    PrimaryMmu, Retry, RetryPoint, Vcpu,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::last_try::{Lack, LastTry};
use super::parked::{Await, Parked, Raised};
use super::{AfterRetry, FaultReport, ServeOptions};
use crate::{Event, EventBuffer, FaultKind, Operation, UffdError, UffdMmu, VmaPage};

/// Messages read at a time.
const BATCH: usize = 32;
/// A parked fault that no invalidation covers (an entry that changed at the same time, memory that was short for a
/// moment, a slot that is changing) is tried again after this long.
const PAUSE: Duration = Duration::from_millis(1);

/// What became of one try.
enum Tried {
    Ended,
    Again(Await),
}

/// One worker, on its thread.
pub(super) struct Worker<'m, Page: VmaPage, M: PrimaryMmu<Page = Page>, R> {
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
    pub(super) fn new(
        mmu: &'m GuestMmu<UffdMmu<Page>>,
        primary: &'m M,
        number: usize,
        options: ServeOptions,
        report: R,
    ) -> Self {
        Self { mmu, primary, vcpu: mmu.vcpu(), number, options, parked: Vec::new(), report }
    }

    /// Serves faults until it is to `stop`.
    pub(super) fn run(&mut self, stop: &AtomicBool) -> Result<(), UffdError> {
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
            self.parked.push(Parked::new(raised, awaits, Instant::now()));
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
            (Ok(FaultOutcome::Retry(Retry { point: RetryPoint::LostRace, .. })), Hope::Gone) => {
                self.poison(raised, gfn, FaultError::NoMemory(gfn))
            }
            (Ok(FaultOutcome::Retry(retry)), _) => Ok(Tried::Again(retry.into())),
            (Err(FaultError::NoMemory(_) | FaultError::Interrupted(_)), Hope::Left) => {
                Ok(Tried::Again(Await::Memory))
            }
            (Ok(FaultOutcome::Emulate(_) | FaultOutcome::WriteProtected), _)
            | (Err(FaultError::SlotChanging(_)), _) => Ok(Tried::Again(Await::Slot)),
            (Err(FaultError::NoMemory(_) | FaultError::Interrupted(_) | FaultError::NoPage { .. }), _) => {
                self.try_last(raised, &fault)
            }
            (Err(FaultError::CannotMap { cause, .. }), _) if is_unpoisoned(&cause) => Err(cause),
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
            Err(FaultError::CannotMap { cause, .. }) if is_unpoisoned(&cause) => Err(cause),
            Err(FaultError::CannotMap { cause, .. }) => {
                Ok(self.ended_badly(gfn, FaultError::CannotMap { gfn, cause }))
            }
            Err(_) => self.poison(raised, gfn, FaultError::NoMemory(gfn)),
            Ok(FaultOutcome::Fixed | FaultOutcome::FixedFast | FaultOutcome::Spurious) => Ok(Tried::Ended),
            Ok(FaultOutcome::Retry(retry)) => Ok(Tried::Again(retry.into())),
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
        let (secondary, page) = (self.mmu.secondary(), self.page_of(raised));
        if self.mmu.is_released() {
            // Nothing is mapped any more, and no checkpoint needs its protection.
            secondary.lift_protection(page);
        }
        match secondary.poison_at(page) {
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
            let now = Instant::now();
            let hope = if parked.scarce(now) > self.options.scarcity { Hope::Gone } else { Hope::Left };
            match self.attempt(parked.raised, hope)? {
                Tried::Ended => {
                    self.parked.swap_remove(index);
                    ended += 1;
                }
                Tried::Again(awaits) => {
                    self.parked[index].tried(awaits, now);
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

/// Whether not even poison could be put there, though somebody is left to wait: that ends the worker, and is told.
fn is_unpoisoned(error: &UffdError) -> bool {
    matches!(
        error,
        UffdError::Refused { operation: Operation::Poison, .. }
            | UffdError::Contradiction { operation: Operation::Poison, .. }
    )
}
