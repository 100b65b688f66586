//! What KVM and the guest counted while a storm blew, without what prepared it.

use std::time::{Duration, Instant};

use afterimage_storm::{Latencies, Latency, Measured, Times};
use afterimage_vm::{KvmCounts, LatencyHistogram, Pace, TouchGuest, VmError, Walk};
use hdrhistogram::Histogram;

/// Counts of intervals, summed up.
#[derive(Debug, Default)]
pub(crate) struct Account {
    elapsed: Duration,
    intervals: Vec<Interval>,
    accesses: u64,
    /// Accesses of vCPUs that take fresh frames: each of them a fault.
    fresh: u64,
    latency: Option<Sums>,
    /// Flushes in these intervals that belong to nothing that is counted.
    left_out_flushes: u64,
}

/// What KVM counted in an interval; `None` where this one has no such counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Interval {
    faults: Option<u64>,
    retries: Option<u64>,
    flushes: Option<u64>,
}

impl Interval {
    fn of(counts: &KvmCounts) -> Self {
        Self { retries: counts.retries(), ..Self::by_name(|name| counts.get(name)) }
    }

    fn by_name(counter: impl Fn(&str) -> Option<u64>) -> Self {
        let both = |fixed: u64| Some(fixed + counter("pf_spurious")?);
        Self {
            faults: counter("pf_fixed").and_then(both),
            retries: None,
            flushes: counter("remote_tlb_flush_requests"),
        }
    }
}

/// Latencies of vCPUs whose accesses all fault, and of the others.
#[derive(Debug)]
struct Sums {
    fresh: afterimage_vm::Latency,
    others: afterimage_vm::Latency,
}

/// A moment.
#[derive(Debug)]
pub(crate) struct Sample {
    at: Instant,
    counts: KvmCounts,
    accesses: Vec<u64>,
    latencies: Vec<afterimage_vm::Latency>,
}

impl Sample {
    pub(crate) fn take(guest: &TouchGuest) -> Result<Self, VmError> {
        Ok(Self {
            counts: guest.counters_of_kvm().read()?,
            accesses: (0..guest.vcpus()).map(|vcpu| guest.vcpu_counters(vcpu).accesses).collect(),
            latencies: (0..guest.vcpus()).map(|vcpu| guest.vcpu_latency(vcpu)).collect(),
            at: Instant::now(),
        })
    }
}

impl Account {
    /// Adds what lies between two samples of a guest with these walks.
    pub(crate) fn add(&mut self, walks: &[Walk], from: &Sample, to: &Sample) {
        self.elapsed += to.at - from.at;
        self.intervals.push(Interval::of(&to.counts.since(&from.counts)));
        for (vcpu, walk) in walks.iter().enumerate() {
            let accesses = to.accesses[vcpu] - from.accesses[vcpu];
            let latency = to.latencies[vcpu].since(&from.latencies[vcpu]);
            self.accesses += accesses;
            let sums = self.latency.get_or_insert_with(|| {
                let none = latency.slowest(0);
                Sums { fresh: none.clone(), others: none }
            });
            let sum = if walk.pace == Pace::OnRelease {
                self.fresh += accesses;
                &mut sums.fresh
            } else {
                &mut sums.others
            };
            sum.inside.merge(&latency.inside);
            sum.outside.merge(&latency.outside);
        }
    }

    /// Leaves out the flushes of what is no invalidation: those from `before` it to `after` it.
    pub(crate) fn leave_out(&mut self, before: &KvmCounts, after: &KvmCounts) {
        self.left_out_flushes += Interval::of(&after.since(before)).flushes.unwrap_or(0);
    }

    fn counted(&self, number: fn(&Interval) -> Option<u64>) -> Option<u64> {
        self.intervals.iter().map(number).sum()
    }

    /// The numbers of one run with so many `invalidations`, each of which took as long as in `times`.
    pub(crate) fn measured(&self, invalidations: u64, times: &Histogram<u64>, wrong_pages: u64) -> Measured {
        let faults = self.counted(|counted| counted.faults);
        let ratio = |part: u64, whole: u64| part as f64 / whole as f64;
        Measured {
            elapsed_ns: u64::try_from(self.elapsed.as_nanos()).unwrap_or(u64::MAX),
            accesses: Some(self.accesses),
            faults,
            invalidations,
            flushes_per_invalidation: self
                .counted(|counted| counted.flushes)
                .filter(|_| invalidations > 0)
                .map(|flushes| ratio(flushes.saturating_sub(self.left_out_flushes), invalidations)),
            retries_per_fault: self
                .counted(|counted| counted.retries)
                .zip(faults.filter(|&faults| faults > 0))
                .map(|(retries, faults)| ratio(retries, faults)),
            invalidation_ns: Times::of(times),
            latency_ns: self.latencies(faults.unwrap_or(0)),
            wrong_pages,
            ..Measured::default()
        }
    }

    /// Of the vCPUs that do not take fresh frames, the slowest accesses are those that faulted.
    fn latencies(&self, faults: u64) -> Latencies {
        let Some(sums) = &self.latency else { return Latencies::default() };
        let mut all = sums.others.slowest(faults.saturating_sub(self.fresh));
        all.inside.merge(&sums.fresh.inside);
        all.outside.merge(&sums.fresh.outside);
        Latencies { inside: shown(&all.inside), outside: shown(&all.outside) }
    }
}

fn shown(histogram: &LatencyHistogram) -> Option<Latency> {
    let ns = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    (histogram.count() > 0).then(|| Latency {
        count: histogram.count(),
        p50: ns(histogram.p50()),
        p99: ns(histogram.p99()),
        p999: ns(histogram.p999()),
        max: ns(histogram.max()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(intervals: &[Interval], left_out_flushes: u64) -> Measured {
        let account = Account { intervals: intervals.to_vec(), left_out_flushes, ..Account::default() };
        account.measured(4, &Histogram::new(3).expect("3 digits are in range"), 0)
    }

    #[test]
    fn what_is_not_counted_is_not_zero() {
        let old = Interval::by_name(|name| (name == "pf_fixed").then_some(7));
        assert_eq!(old, Interval { faults: None, retries: None, flushes: None });
        let old = measured(&[old], 0);
        assert_eq!((old.faults, old.retries_per_fault, old.flushes_per_invalidation), (None, None, None));
        let new = Interval { retries: Some(3), ..Interval::by_name(|name| Some(name.len() as u64)) };
        let measured = measured(&[new, new], 0);
        assert_eq!(measured.faults, Some(2 * ("pf_fixed".len() + "pf_spurious".len()) as u64));
        assert_eq!(measured.retries_per_fault, Some(3.0 / 19.0));
        assert!(measured.flushes_per_invalidation.is_some());
    }

    #[test]
    fn flushes_of_what_is_no_invalidation_are_left_out() {
        let counted = Interval { faults: Some(1), retries: Some(0), flushes: Some(12) };
        assert_eq!(measured(&[counted], 0).flushes_per_invalidation, Some(3.0));
        assert_eq!(measured(&[counted], 4).flushes_per_invalidation, Some(2.0));
    }
}
