//! Which frames are being invalidated, exactly, for who classifies faults.
//!
//! The engine's own words give a hull, and only as a hint. Each invalidating thread publishes here, around each of its
//! invalidations, the frames that it takes: before the begin, until after the end. A fault asks at its end which of those
//! that were open at any moment of it covered its frame. The last [`KEPT`] are kept of each thread; of those that are gone
//! by then it is only known what all of them lie in, and they count as covering.

use core::sync::atomic::{AtomicU64, Ordering};

use afterimage_mmu::{Gfn, GfnRange};

/// Invalidations that are remembered of each thread.
const KEPT: u64 = 64;

/// The invalidations of one thread.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Windows {
    opened: AtomicU64,
    closed: AtomicU64,
    ranges: [(AtomicU64, AtomicU64); KEPT as usize],
    /// What all of them lie in.
    within: GfnRange,
}

/// Invalidations of a thread that are over, as counted at the start of a fault.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Since(u64);

/// What a fault had to do with a thread's invalidations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Met {
    /// Some covered its frame.
    pub(crate) inside: bool,
    /// How many of those ended before the fault was served.
    pub(crate) ends: u64,
}

impl Windows {
    pub(crate) fn new(within: GfnRange) -> Self {
        Self {
            opened: AtomicU64::new(0),
            closed: AtomicU64::new(0),
            ranges: core::array::from_fn(|_| (AtomicU64::new(0), AtomicU64::new(0))),
            within,
        }
    }

    /// An invalidation of `gfns` is about to begin.
    pub(crate) fn open(&self, gfns: GfnRange) {
        let number = self.opened.load(Ordering::Relaxed);
        let (start, end) = &self.ranges[(number % KEPT) as usize];
        start.store(gfns.start.as_u64(), Ordering::Relaxed);
        end.store(gfns.end.as_u64(), Ordering::Relaxed);
        self.opened.store(number + 1, Ordering::Release);
    }

    /// It has ended.
    pub(crate) fn close(&self) {
        self.closed.store(self.opened.load(Ordering::Relaxed), Ordering::Release);
    }

    /// Whether an invalidation is under way.
    pub(crate) fn is_open(&self) -> bool {
        self.closed.load(Ordering::Acquire) != self.opened.load(Ordering::Acquire)
    }

    /// What is over now.
    #[inline]
    pub(crate) fn since(&self) -> Since {
        Since(self.closed.load(Ordering::Acquire))
    }

    /// Those that were open since then, and `gfn`.
    pub(crate) fn met(&self, since: Since, gfn: Gfn) -> Met {
        let closed = self.closed.load(Ordering::Acquire);
        let opened = self.opened.load(Ordering::Acquire);
        let mut met = Met::default();
        // One place may be overwritten while it is read: the oldest.
        let known = opened.saturating_sub(KEPT - 1).max(since.0);
        if known > since.0 && self.within.contains(gfn) {
            met = Met { inside: true, ends: known - since.0 };
        }
        for number in known..opened {
            let (start, end) = &self.ranges[(number % KEPT) as usize];
            let covers = (start.load(Ordering::Relaxed)..end.load(Ordering::Relaxed)).contains(&gfn.as_u64());
            met.inside |= covers;
            met.ends += u64::from(covers && number < closed);
        }
        met
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gfns(start: u64, end: u64) -> GfnRange {
        GfnRange::new(Gfn::new(start), Gfn::new(end))
    }

    #[test]
    fn a_fault_meets_what_was_open_and_covered_it() {
        let windows = Windows::new(gfns(0, 100));
        let met = |since, gfn| windows.met(since, Gfn::new(gfn));
        windows.open(gfns(0, 10));
        windows.close();
        let since = windows.since();
        assert_eq!(met(since, 5), Met::default(), "over before");
        windows.open(gfns(5, 6));
        assert_eq!(met(since, 5), Met { inside: true, ends: 0 });
        assert_eq!(met(since, 6), Met::default(), "elsewhere");
        windows.close();
        windows.open(gfns(0, 50));
        assert_eq!(met(since, 5), Met { inside: true, ends: 1 });
        windows.close();
        assert_eq!(met(since, 5), Met { inside: true, ends: 2 });
        assert_eq!(met(windows.since(), 5), Met::default());
    }

    #[test]
    fn what_is_forgotten_counts_where_it_may_have_been() {
        let windows = Windows::new(gfns(0, 100));
        let since = windows.since();
        for _ in 0..2 * KEPT {
            windows.open(gfns(0, 1));
            windows.close();
        }
        assert_eq!(windows.met(since, Gfn::new(200)), Met::default());
        let met = windows.met(since, Gfn::new(50));
        assert_eq!(met, Met { inside: true, ends: KEPT + 1 });
    }
}
