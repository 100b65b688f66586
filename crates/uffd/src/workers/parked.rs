//! Faults that wait for another try.

use std::time::{Duration, Instant};

use afterimage_mmu::{Access, Found, GfnRange, Hva, Retry, RetryPoint};

/// A fault as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Raised {
    pub(super) page: Hva,
    pub(super) access: Access,
    pub(super) found: Found,
}

/// What a parked fault waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Await {
    /// The end of whatever covers these frames.
    End(GfnRange),
    /// Memory. Also another's change of the same entry, which is over in a moment.
    Memory,
    /// A memslot.
    Slot,
}

impl From<Retry> for Await {
    fn from(retry: Retry) -> Self {
        match retry.point {
            RetryPoint::BeforeFaultIn | RetryPoint::AfterFaultIn | RetryPoint::UnderLock => {
                Self::End(retry.range)
            }
            RetryPoint::LostRace => Self::Memory,
            RetryPoint::SlotChanging => Self::Slot,
        }
    }
}

/// A fault that waits for another try.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parked {
    pub(super) raised: Raised,
    pub(super) awaits: Await,
    /// Since when it awaits that.
    since: Instant,
    /// How long it had waited for memory by then.
    scarce: Duration,
}

impl Parked {
    /// Tried at `now`.
    pub(super) fn new(raised: Raised, awaits: Await, now: Instant) -> Self {
        Self { raised, awaits, since: now, scarce: Duration::ZERO }
    }

    /// For how long there has been no memory for it, at `now`. An invalidation that it waits for says nothing about memory.
    pub(super) fn scarce(&self, now: Instant) -> Duration {
        match self.awaits {
            Await::Memory => self.scarce + now.saturating_duration_since(self.since),
            Await::End(_) | Await::Slot => self.scarce,
        }
    }

    /// It was tried again at `now`, and still waits.
    pub(super) fn tried(&mut self, awaits: Await, now: Instant) {
        let scarce = if awaits == Await::Slot { Duration::ZERO } else { self.scarce(now) };
        *self = Self { raised: self.raised, awaits, since: now, scarce };
    }
}

#[cfg(test)]
mod tests {
    use afterimage_mmu::Gfn;

    use super::*;

    const RAISED: Raised = Raised { page: Hva::new(0), access: Access::READ, found: Found::Absent };
    const FRAMES: GfnRange = GfnRange::new(Gfn::new(0), Gfn::new(1));

    #[test]
    fn only_the_time_without_memory_counts() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut parked = Parked::new(RAISED, Await::End(FRAMES), at(0));
        parked.tried(Await::Memory, at(10));
        assert_eq!(parked.scarce(at(10)), Duration::ZERO, "it had waited for an invalidation");
        parked.tried(Await::Memory, at(11));
        parked.tried(Await::End(FRAMES), at(12));
        assert_eq!(parked.scarce(at(100)), Duration::from_secs(2), "as long as the invalidation lasts");
        parked.tried(Await::Memory, at(100));
        assert_eq!(parked.scarce(at(103)), Duration::from_secs(5), "and on from there");
        parked.tried(Await::Slot, at(103));
        parked.tried(Await::Memory, at(104));
        assert_eq!(parked.scarce(at(105)), Duration::from_secs(1), "another memslot begins anew");
    }

    #[test]
    fn a_retry_waits_for_an_invalidation_only_if_one_is_the_cause() {
        let awaits = |point| Await::from(Retry { point, range: FRAMES });
        for point in [RetryPoint::BeforeFaultIn, RetryPoint::AfterFaultIn, RetryPoint::UnderLock] {
            assert_eq!(awaits(point), Await::End(FRAMES), "{point:?}");
        }
        assert_eq!(awaits(RetryPoint::LostRace), Await::Memory);
        assert_eq!(awaits(RetryPoint::SlotChanging), Await::Slot);
    }
}
