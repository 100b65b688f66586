//! A timed access and the histogram it is filed in: `program/access.rs`, in Rust.
//!
//! How many windows of each slot have ended is read before the access, how many have begun after it. Where the two are
//! equal, no window of that slot was open at any moment of it; else those in between were.

use core::sync::atomic::Ordering::{Acquire, Relaxed};
use core::sync::atomic::fence;

use crate::layout::{Histogram, SUB_BUCKET_BITS, WINDOW_RING, WINDOW_SLOTS, WindowTable};
use crate::system::SystemMemory;
use crate::tsc;

/// An access that is under way.
pub(super) struct Timing {
    gfn: u64,
    ends: [u64; WINDOW_SLOTS],
    started: u64,
}

impl Timing {
    #[inline]
    pub(super) fn start(system: &SystemMemory, gfn: u64) -> Self {
        let windows = system.windows();
        // Acquire: before the access.
        let ends = core::array::from_fn(|slot| windows.ends[slot].load(Acquire));
        Self { gfn, ends, started: tsc::now() }
    }

    /// Files the time since the start for `vcpu`.
    #[inline]
    pub(super) fn file(self, system: &SystemMemory, vcpu: usize) {
        let cycles = tsc::now().saturating_sub(self.started);
        // After the access.
        fence(Acquire);
        let inside = self.was_inside(system.windows());
        count(system.histogram(vcpu, inside), cycles);
    }

    /// Whether a window that covers the frame was open at any moment of the access.
    fn was_inside(&self, windows: &WindowTable) -> bool {
        (0..WINDOW_SLOTS).any(|slot| {
            let (begun, ended) = (windows.begins[slot].load(Relaxed), self.ends[slot]);
            // Of a slot's windows only so many are known; older ones count as not covering.
            let first = ended.max(begun.saturating_sub(WINDOW_RING as u64)) + 1;
            (first..=begun).any(|number| {
                let bounds = &windows.bounds[slot][number as usize % WINDOW_RING];
                (bounds.start.load(Relaxed)..bounds.end.load(Relaxed)).contains(&self.gfn)
            })
        })
    }
}

/// Counts `cycles`. The histogram has this one writer.
#[inline]
fn count(histogram: &Histogram, cycles: u64) {
    if cycles > histogram.max.load(Relaxed) {
        histogram.max.store(cycles, Relaxed);
    }
    let shift = cycles.max(1).ilog2().saturating_sub(SUB_BUCKET_BITS);
    let bucket = ((shift as usize) << SUB_BUCKET_BITS) + (cycles >> shift) as usize;
    let counter = &histogram.counts[bucket];
    counter.store(counter.load(Relaxed) + 1, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::BUCKETS;

    #[test]
    fn buckets_are_those_of_the_assembled_program() {
        // With e the logarithm: (e - 4) * 16 + (value >> (e - 4)), and the value itself below 16.
        for (cycles, bucket) in
            [(0, 0), (15, 15), (16, 16), (31, 31), (32, 32), (33, 32), (34, 33), (u64::MAX, BUCKETS - 1)]
        {
            let histogram = Histogram {
                counts: core::array::from_fn(|_| core::sync::atomic::AtomicU64::new(0)),
                max: core::sync::atomic::AtomicU64::new(0),
            };
            count(&histogram, cycles);
            assert_eq!(histogram.counts[bucket].load(Relaxed), 1, "{cycles}");
            assert_eq!(histogram.max.load(Relaxed), cycles);
        }
    }
}
