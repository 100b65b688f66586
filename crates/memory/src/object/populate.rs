//! Populating: pages made resident ahead of the guest's faults.

use afterimage_mmu::{
    FRAME_BYTES, Fault, FaultError, FaultKind, FaultOutcome, PfnRange, Retry, RetryPoint, SecondaryMmu, Vcpu,
};

use super::{MemoryView, Moved, ObjectPage, State};
use crate::error::MemoryError;

/// Races for one entry that a prefetch loses before it gives up.
const MOST_RACES: u32 = 64;

impl MemoryView {
    /// Makes the pages of `frames` resident and maps them, in ascending order, by prefetch faults of `vcpu`, which
    /// belongs to the secondary MMU over this view's mapping. Returns the frames that it brought.
    ///
    /// It takes only what is free: it ends early where the budget or the system's memory is used up, and never makes a
    /// page go. A page that lies in no memslot, or cannot be had, is left to whoever touches it. Pages that are resident
    /// already stay as they are, mapped or not.
    ///
    /// Needs no invalidation: a page that comes is no page that goes, and these are faults like the guest's.
    ///
    /// # Errors
    /// The frames are not whole pages of the object.
    pub fn populate<S>(&self, vcpu: &mut Vcpu<'_, S>, frames: PfnRange) -> Result<Moved, MemoryError>
    where
        S: SecondaryMmu<Page = ObjectPage>,
    {
        let object = self.object();
        let mut moved = Moved::default();
        for index in object.pages_of(frames)? {
            if matches!(object.pages[index].peek(), State::Resident | State::Poisoned) {
                continue;
            }
            if !object.has_room() {
                break;
            }
            let page = object.page_at(index);
            match self.prefetch(vcpu, page) {
                Prefetch::Brought => moved.frames += page.len(),
                Prefetch::Left => {}
                Prefetch::NoMemory => break,
            }
        }
        Ok(moved)
    }

    fn prefetch<S>(&self, vcpu: &mut Vcpu<'_, S>, page: PfnRange) -> Prefetch
    where
        S: SecondaryMmu<Page = ObjectPage>,
    {
        let hva = self.base() + page.start.as_u64() * FRAME_BYTES;
        let mut races = 0;
        loop {
            let Some((space, gfn)) = vcpu.gfn_at(hva) else { return Prefetch::Left };
            let fault = Fault { space, gfn, kind: FaultKind::Prefetch, ..Fault::default() };
            match vcpu.handle_fault(self, &fault) {
                Ok(FaultOutcome::Fixed | FaultOutcome::FixedFast) => return Prefetch::Brought,
                // Nobody else's change lasts for so long: the system has no memory for the page.
                Ok(FaultOutcome::Retry(Retry { point: RetryPoint::LostRace, .. })) if races == MOST_RACES => {
                    return Prefetch::NoMemory;
                }
                Ok(FaultOutcome::Retry(Retry { point: RetryPoint::LostRace, .. })) => {
                    races += 1;
                    rustix::thread::sched_yield();
                }
                // Whatever covers it may need this thread's CPU, but nothing that this thread holds.
                Ok(FaultOutcome::Retry(retry)) => vcpu.mmu().wait(retry.range),
                Ok(FaultOutcome::Spurious | FaultOutcome::Emulate(_) | FaultOutcome::WriteProtected) => {
                    return Prefetch::Left;
                }
                Err(FaultError::NoMemory(_)) => return Prefetch::NoMemory,
                Err(_) => return Prefetch::Left,
            }
        }
    }
}

/// What became of one page.
enum Prefetch {
    Brought,
    Left,
    NoMemory,
}
