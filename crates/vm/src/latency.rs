//! Latency histograms as the host sees them.

use core::fmt;
use core::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::layout::{BUCKETS, Histogram, SUB_BUCKET_BITS};
use crate::tsc;

/// How long accesses took: log-linear, 16 steps per power of two, so a quantile is exact to 6.25 %. The longest is
/// exact.
///
/// A sample is the first load of a page in an access, or the first store: accesses plus writes in all.
#[derive(Clone)]
pub struct LatencyHistogram {
    counts: Box<[u64]>,
    max: u64,
    khz: u64,
}

/// Latencies of a guest's accesses, told apart by whether the page lay in an invalidation window at the time.
#[derive(Clone, Debug)]
pub struct Latency {
    /// No window that covered the page was open at any moment of the access.
    pub outside: LatencyHistogram,
    /// Some window that covered the page was.
    pub inside: LatencyHistogram,
}

impl Latency {
    pub(crate) fn new(khz: u64) -> Self {
        Self { outside: LatencyHistogram::new(khz), inside: LatencyHistogram::new(khz) }
    }

    /// Both together.
    pub fn all(&self) -> LatencyHistogram {
        let mut all = self.outside.clone();
        all.merge(&self.inside);
        all
    }

    /// The `count` slowest accesses of both together: those that faulted, where `count` of them did and a fault takes
    /// longer than any other access.
    #[must_use]
    pub fn slowest(&self, count: u64) -> Self {
        let mut slowest = self.clone();
        let mut left = count;
        for bucket in (0..BUCKETS).rev() {
            for counts in [&mut slowest.inside.counts, &mut slowest.outside.counts] {
                let kept = counts[bucket].min(left);
                counts[bucket] = kept;
                left -= kept;
            }
        }
        slowest
    }

    /// What came since `earlier`, a snapshot of the same guest.
    pub fn since(&self, earlier: &Self) -> Self {
        Self { outside: self.outside.since(&earlier.outside), inside: self.inside.since(&earlier.inside) }
    }
}

impl LatencyHistogram {
    pub(crate) fn new(khz: u64) -> Self {
        Self { counts: vec![0; BUCKETS].into(), max: 0, khz }
    }

    /// Adds what a running guest has counted so far.
    pub(crate) fn add_live(&mut self, live: &Histogram) {
        for (sum, count) in self.counts.iter_mut().zip(&live.counts) {
            *sum += count.load(Relaxed);
        }
        self.max = self.max.max(live.max.load(Relaxed));
    }

    /// Adds another histogram of the same guest.
    pub fn merge(&mut self, other: &Self) {
        for (sum, count) in self.counts.iter_mut().zip(&other.counts) {
            *sum += count;
        }
        self.max = self.max.max(other.max);
    }

    /// What came since `earlier`, a snapshot of the same guest. The longest is then exact only if it is the longest
    /// of all, else rounded up like a quantile.
    pub fn since(&self, earlier: &Self) -> Self {
        let counts: Box<[u64]> =
            self.counts.iter().zip(&earlier.counts).map(|(now, then)| now.saturating_sub(*then)).collect();
        let highest = counts.iter().rposition(|&count| count > 0).map_or(0, highest_value);
        let max = if self.max > earlier.max { self.max } else { highest.min(self.max) };
        Self { counts, max, khz: self.khz }
    }

    /// Number of samples.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The latency that the share `q` (0 to 1) of all samples did not exceed; zero without samples.
    pub fn quantile(&self, q: f64) -> Duration {
        let total = self.count();
        let rank = ((total as f64 * q).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return self.duration(highest_value(bucket).min(self.max));
            }
        }
        Duration::ZERO
    }

    /// The median.
    pub fn p50(&self) -> Duration {
        self.quantile(0.5)
    }

    /// What 99 % did not exceed.
    pub fn p99(&self) -> Duration {
        self.quantile(0.99)
    }

    /// What 99.9 % did not exceed.
    pub fn p999(&self) -> Duration {
        self.quantile(0.999)
    }

    /// The longest.
    pub fn max(&self) -> Duration {
        self.duration(self.max)
    }

    fn duration(&self, cycles: u64) -> Duration {
        tsc::duration(cycles, self.khz)
    }
}

impl fmt::Debug for LatencyHistogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LatencyHistogram")
            .field("count", &self.count())
            .field("p50", &self.p50())
            .field("p99", &self.p99())
            .field("p999", &self.p999())
            .field("max", &self.max())
            .finish()
    }
}

/// The highest number of cycles that is filed in `bucket`.
fn highest_value(bucket: usize) -> u64 {
    let sub_buckets = 1 << SUB_BUCKET_BITS;
    if bucket < sub_buckets {
        return bucket as u64;
    }
    let shift = bucket / sub_buckets - 1;
    let lead = (bucket % sub_buckets + sub_buckets) as u64;
    ((u128::from(lead + 1) << shift) - 1) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[(usize, u64)], max: u64) -> LatencyHistogram {
        // 1 cycle is 1 ns at 1 GHz.
        let mut histogram = LatencyHistogram::new(1_000_000);
        for &(bucket, count) in values {
            histogram.counts[bucket] += count;
        }
        histogram.max = max;
        histogram
    }

    #[test]
    fn buckets_adjoin() {
        assert_eq!(highest_value(15), 15);
        assert_eq!(highest_value(16), 16);
        assert_eq!(highest_value(31), 31);
        assert_eq!(highest_value(32), 33);
        assert_eq!(highest_value(BUCKETS - 1), u64::MAX);
    }

    #[test]
    fn quantiles_are_upper_bounds() {
        let histogram = of(&[(10, 98), (32, 1), (64, 1)], 70);
        assert_eq!(histogram.count(), 100);
        assert_eq!(histogram.p50(), Duration::from_nanos(10));
        assert_eq!(histogram.p99(), Duration::from_nanos(33));
        assert_eq!(histogram.p999(), histogram.quantile(1.0));
        assert_eq!(histogram.max(), Duration::from_nanos(70));
        assert_eq!(of(&[], 0).p99(), Duration::ZERO);
    }

    #[test]
    fn the_slowest_are_taken_from_both_sides() {
        let latency = Latency { inside: of(&[(10, 3), (64, 2)], 70), outside: of(&[(10, 100), (32, 4)], 33) };
        let slowest = latency.slowest(5);
        assert_eq!((slowest.inside.count(), slowest.outside.count()), (2, 3));
        assert_eq!(slowest.outside.p50(), Duration::from_nanos(33));
        assert_eq!(latency.slowest(1000).all().count(), 109);
    }

    #[test]
    fn an_interval_forgets_what_was_before() {
        let early = of(&[(10, 5), (64, 1)], 66);
        let late = of(&[(10, 7), (32, 2), (64, 1)], 66);
        let interval = late.since(&early);
        assert_eq!(interval.count(), 4);
        assert_eq!(interval.max(), Duration::from_nanos(33));
    }
}
