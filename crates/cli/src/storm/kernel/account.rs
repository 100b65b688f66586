//! What KVM and the guest counted while a storm blew, without what prepared it.

use std::time::{Duration, Instant};

use afterimage_storm::{Latencies, Latency, Measured, Times};
use afterimage_vm::{KvmCounts, LatencyHistogram, Pace, TouchGuest, VmError, Walk};
use hdrhistogram::Histogram;

/// Counts of intervals, summed up.
#[derive(Debug, Default)]
pub(crate) struct Account {
    elapsed: Duration,
    counts: Vec<KvmCounts>,
    accesses: u64,
    /// Accesses of vCPUs that take fresh frames: each of them a fault.
    fresh: u64,
    latency: Option<Sums>,
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
        self.counts.push(to.counts.since(&from.counts));
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

    fn counted(&self, name: &str) -> Option<u64> {
        self.counts.iter().map(|counts| counts.get(name)).sum()
    }

    /// The numbers of one run with so many `invalidations`, each of which took as long as in `times`.
    pub(crate) fn measured(&self, invalidations: u64, times: &Histogram<u64>, wrong_pages: u64) -> Measured {
        let faults = self.counted("pf_fixed").unwrap_or(0) + self.counted("pf_spurious").unwrap_or(0);
        let retries: Option<u64> = self.counts.iter().map(KvmCounts::retries).sum();
        let ratio = |part: u64, whole: u64| part as f64 / whole as f64;
        Measured {
            elapsed_ns: u64::try_from(self.elapsed.as_nanos()).unwrap_or(u64::MAX),
            accesses: Some(self.accesses),
            faults,
            invalidations,
            flushes_per_invalidation: self
                .counted("remote_tlb_flush_requests")
                .filter(|_| invalidations > 0)
                .map(|flushes| ratio(flushes, invalidations)),
            retries_per_fault: retries.filter(|_| faults > 0).map(|retries| ratio(retries, faults)),
            invalidation_ns: Times::of(times),
            latency_ns: self.latencies(faults),
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
