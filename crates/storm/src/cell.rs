//! What was measured: one cell of the matrix, whoever measured it.
//!
//! A cell is filled by real threads over this project's engine, by the simulation, or by a real kernel that was watched.
//! What one of them cannot know is `None`, absent in JSON. Times are nanoseconds.

use afterimage_mmu::{FaultStats, RetryPoint};
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::policy::{Policies, Scenario};

/// Who measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// This project's engine, on threads.
    Afterimage,
    /// The simulation, in virtual time.
    Simulation,
    /// A kernel, named as a reader knows it: `Linux 6.12.57`.
    #[serde(untagged)]
    Kernel(String),
}

impl core::fmt::Display for Engine {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Afterimage => f.pad("afterimage"),
            Self::Simulation => f.pad("simulation"),
            Self::Kernel(name) => f.pad(name),
        }
    }
}

/// Which part of the storm blew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Load {
    /// All of it.
    Storm,
    /// Invalidations as in the storm, and vCPUs that fault on memory of their own, which nobody takes: what it does to them.
    Bystanders,
    /// Invalidations with no vCPU in their way: what one costs by itself.
    Uncontended,
    /// Invalidations, and as many busy vCPUs as in the storm, none of which faults: what one costs on a machine as full.
    Busy,
    /// Faults with no invalidation: what one costs by itself.
    Quiet,
}

impl Load {
    /// Whether policies make a difference to it; the others are what it is compared with.
    pub fn is_storm(self) -> bool {
        matches!(self, Self::Storm | Self::Bystanders)
    }
}

/// One cell of the matrix: medians over its runs, and what the runs lay between.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    /// What kind of storm.
    pub scenario: Scenario,
    /// Who measured.
    pub engine: Engine,
    /// Which part of it blew.
    pub load: Load,
    /// What was chosen; `None` where it is the kernel's own.
    #[serde(flatten)]
    pub policies: Option<Policies>,
    /// Threads or processors that touch memory.
    pub vcpus: u64,
    /// Threads that invalidate.
    pub threads: u64,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// What the choices of the run came from.
    pub seed: u64,
    /// Runs that the medians are of.
    pub runs: u64,
    /// Each number's median over the runs.
    #[serde(flatten)]
    pub median: Measured,
    /// Each number's least.
    pub min: Measured,
    /// Each number's greatest.
    pub max: Measured,
    /// What went wrong besides wrong pages, in sentences.
    pub failures: Vec<String>,
}

impl Cell {
    /// Whether nothing was wrong.
    pub fn is_good(&self) -> bool {
        self.max.wrong_pages == 0 && self.failures.is_empty()
    }
}

/// Makes one of several runs' numbers.
trait Fold: Sized {
    fn fold(runs: &[Self], pick: fn(&mut [f64]) -> f64) -> Self;
}

impl Fold for u64 {
    fn fold(runs: &[Self], pick: fn(&mut [f64]) -> f64) -> Self {
        // Exact to 2^53, which is 104 days of nanoseconds.
        let mut runs: Vec<_> = runs.iter().map(|number| *number as f64).collect();
        pick(&mut runs).round() as Self
    }
}

impl Fold for f64 {
    fn fold(runs: &[Self], pick: fn(&mut [f64]) -> f64) -> Self {
        pick(&mut runs.to_vec())
    }
}

impl<T: Fold + Clone> Fold for Option<T> {
    fn fold(runs: &[Self], pick: fn(&mut [f64]) -> f64) -> Self {
        let known: Vec<T> = runs.iter().flatten().cloned().collect();
        (!known.is_empty()).then(|| T::fold(&known, pick))
    }
}

macro_rules! measured {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $field:ident: $type:ty,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize)]
        pub struct $name {
            $($(#[$doc])* pub $field: $type,)+
        }

        impl Fold for $name {
            fn fold(runs: &[Self], pick: fn(&mut [f64]) -> f64) -> Self {
                Self {
                    $($field: Fold::fold(&runs.iter().map(|run| run.$field.clone()).collect::<Vec<_>>(), pick),)+
                }
            }
        }
    };
}

measured! {
    /// The numbers of one run, or of several folded into one.
    Measured {
        /// How long it blew.
        elapsed_ns: u64,
        /// Accesses of the guest to memory.
        #[serde(skip_serializing_if = "Option::is_none")]
        accesses: Option<u64>,
        /// Accesses that faulted, each counted once however often it was retried.
        #[serde(skip_serializing_if = "Option::is_none")]
        faults: Option<u64>,
        /// Faults that were cut off: what held them up had to be ended without them, or the simulation had too many events.
        /// On real threads they are among the others, with what they had come to by then.
        #[serde(skip_serializing_if = "Option::is_none")]
        unfinished_faults: Option<u64>,
        /// Invalidations from begin to end.
        invalidations: u64,
        /// Remote TLB flushes for each of those.
        #[serde(skip_serializing_if = "Option::is_none")]
        flushes_per_invalidation: Option<f64>,
        /// Those of them that were owed to somebody who waited for the lock, before a yield to them.
        #[serde(skip_serializing_if = "Option::is_none")]
        flushes_for_waiters_per_invalidation: Option<f64>,
        /// Those that were owed to the scheduler. What is left is the one at the end of a zap.
        #[serde(skip_serializing_if = "Option::is_none")]
        flushes_for_scheduler_per_invalidation: Option<f64>,
        /// Times that a zap gave up the lock, for each invalidation.
        #[serde(skip_serializing_if = "Option::is_none")]
        yields_per_invalidation: Option<f64>,
        /// Those of them that were for somebody who waited for the lock; the others were for the scheduler.
        #[serde(skip_serializing_if = "Option::is_none")]
        yields_to_waiters_per_invalidation: Option<f64>,
        /// Retries, by where on its path the fault was found to be doomed.
        #[serde(skip_serializing_if = "Option::is_none")]
        retries: Option<Retries>,
        /// All retries, for each fault.
        #[serde(skip_serializing_if = "Option::is_none")]
        retries_per_fault: Option<f64>,
        /// Retries of the fault that had most.
        #[serde(skip_serializing_if = "Option::is_none")]
        most_retries: Option<u64>,
        /// Ends of covering invalidations that a fault saw before it was served, once it had been told to retry; at most.
        #[serde(skip_serializing_if = "Option::is_none")]
        most_ends: Option<u64>,
        /// Pages resolved and thrown away.
        #[serde(skip_serializing_if = "Option::is_none")]
        wasted_fault_ins: Option<u64>,
        /// An invalidation from before its begin to after its end.
        #[serde(skip_serializing_if = "Option::is_none")]
        invalidation_ns: Option<Times>,
        /// CPU time of an invalidation, its mean: what is left of it where threads outnumber CPUs. Of wide ones only, since it
        /// takes time to read.
        #[serde(skip_serializing_if = "Option::is_none")]
        invalidation_cpu_ns: Option<u64>,
        /// Waiting for `mmu_lock`, all threads together.
        #[serde(skip_serializing_if = "Option::is_none")]
        lock_wait_ns: Option<LockWait>,
        /// Times that a fault took `mmu_lock` only to be told to retry.
        #[serde(skip_serializing_if = "Option::is_none")]
        doomed_lock_acquisitions: Option<u64>,
        /// CPU time of faults that ended in a retry.
        #[serde(skip_serializing_if = "Option::is_none")]
        doomed_cpu_ns: Option<u64>,
        /// From the access that faulted to the same access done.
        latency_ns: Latencies,
        /// Accesses that met another page's content, or none's.
        wrong_pages: u64,
    }
}

measured! {
    /// Retries, by where they were found.
    Retries {
        /// By the check before the page was looked up.
        before_fault_in: u64,
        /// By the check after that.
        after_fault_in: u64,
        /// By the check that counts.
        under_lock: u64,
        /// Another thread changed the same entry.
        lost_race: u64,
        /// The slot was being changed.
        slot_changing: u64,
    }
}

measured! {
    /// A time that is taken over and over.
    Times {
        /// The median.
        median: u64,
        /// The mean.
        mean: u64,
        /// The longest.
        max: u64,
    }
}

measured! {
    /// Who waited for the lock how long.
    LockWait {
        /// Faults.
        faults: u64,
        /// Invalidations.
        invalidations: u64,
    }
}

measured! {
    /// Latencies of faults.
    Latencies {
        /// The page lay in an invalidation that had begun when the fault missed or was served, or that had it retried.
        #[serde(skip_serializing_if = "Option::is_none")]
        inside: Option<Latency>,
        /// It lay in none.
        #[serde(skip_serializing_if = "Option::is_none")]
        outside: Option<Latency>,
    }
}

measured! {
    /// The distribution of a latency.
    Latency {
        /// Samples.
        count: u64,
        /// Half of them took no longer.
        p50: u64,
        /// 99 % took no longer.
        p99: u64,
        /// 99.9 % took no longer.
        p999: u64,
        /// The longest.
        max: u64,
    }
}

impl Latency {
    /// `p99`, where samples are enough for one to lie beyond it.
    pub fn p99(&self) -> Option<u64> {
        (self.count >= 100).then_some(self.p99)
    }

    /// `p999`, where samples are enough for one to lie beyond it.
    pub fn p999(&self) -> Option<u64> {
        (self.count >= 1000).then_some(self.p999)
    }

    /// What a histogram of nanoseconds comes to; `None` if it is empty.
    pub fn of(histogram: &Histogram<u64>) -> Option<Self> {
        (!histogram.is_empty()).then(|| Self {
            count: histogram.len(),
            p50: histogram.value_at_quantile(0.5),
            p99: histogram.value_at_quantile(0.99),
            p999: histogram.value_at_quantile(0.999),
            max: histogram.max(),
        })
    }
}

impl Times {
    /// What a histogram of nanoseconds comes to; `None` if it is empty.
    pub fn of(histogram: &Histogram<u64>) -> Option<Self> {
        (!histogram.is_empty()).then(|| Self {
            median: histogram.value_at_quantile(0.5),
            mean: histogram.mean().round() as u64,
            max: histogram.max(),
        })
    }
}

impl Retries {
    /// What the engine counted.
    pub fn of(stats: &FaultStats) -> Self {
        Self {
            before_fault_in: stats.retries_at(RetryPoint::BeforeFaultIn),
            after_fault_in: stats.retries_at(RetryPoint::AfterFaultIn),
            under_lock: stats.retries_at(RetryPoint::UnderLock),
            lost_race: stats.retries_at(RetryPoint::LostRace),
            slot_changing: stats.retries_at(RetryPoint::SlotChanging),
        }
    }

    /// All of them.
    pub fn all(&self) -> u64 {
        let Self { before_fault_in, after_fault_in, under_lock, lost_race, slot_changing } = self;
        before_fault_in + after_fault_in + under_lock + lost_race + slot_changing
    }
}

impl Measured {
    /// Each number's median.
    pub fn median(runs: &[Self]) -> Self {
        Self::fold(runs, |numbers| {
            numbers.sort_by(f64::total_cmp);
            match (numbers.len(), numbers.len() / 2) {
                (0, _) => 0.0,
                (count, middle) if count % 2 == 1 => numbers[middle],
                (_, middle) => (numbers[middle - 1] + numbers[middle]) / 2.0,
            }
        })
    }

    /// Each number's least.
    pub fn least(runs: &[Self]) -> Self {
        Self::fold(runs, |numbers| numbers.iter().copied().min_by(f64::total_cmp).unwrap_or(0.0))
    }

    /// Each number's greatest.
    pub fn greatest(runs: &[Self]) -> Self {
        Self::fold(runs, |numbers| numbers.iter().copied().max_by(f64::total_cmp).unwrap_or(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(faults: u64, flushes: Option<f64>, inside: Option<u64>) -> Measured {
        Measured {
            faults: Some(faults),
            flushes_per_invalidation: flushes,
            latency_ns: Latencies {
                inside: inside.map(|max| Latency { max, ..Latency::default() }),
                outside: None,
            },
            ..Measured::default()
        }
    }

    #[test]
    fn runs_are_folded_number_by_number() {
        let runs = [
            run(10, Some(1.0), None),
            run(30, Some(3.0), Some(7)),
            run(20, None, Some(5)),
            run(60, None, None),
        ];
        let median = Measured::median(&runs);
        assert_eq!(median.faults, Some(25));
        assert_eq!(median.flushes_per_invalidation, Some(2.0));
        assert_eq!(median.latency_ns.inside.map(|latency| latency.max), Some(6));
        assert_eq!(median.latency_ns.outside, None);
        assert_eq!(Measured::least(&runs).faults, Some(10));
        assert_eq!(Measured::greatest(&runs).faults, Some(60));
        assert_eq!(Measured::median(&[]), Measured::default());
    }

    #[test]
    fn a_cell_says_in_json_what_is_known() {
        let cell = Cell {
            scenario: Scenario::EInside,
            engine: Engine::Kernel("Linux 6.1".to_owned()),
            load: Load::Storm,
            policies: None,
            vcpus: 2,
            threads: 1,
            memory_bytes: 1 << 30,
            seed: 1,
            runs: 1,
            median: run(3, None, None),
            min: run(3, None, None),
            max: run(3, None, None),
            failures: Vec::new(),
        };
        assert!(cell.is_good());
        let json = serde_json::to_value(&cell).expect("it has no maps with odd keys");
        assert_eq!(json["scenario"], "E-inside");
        assert_eq!(json["engine"], "Linux 6.1");
        assert_eq!(json["faults"], 3);
        assert!(json.get("precheck").is_none() && json.get("flushes_per_invalidation").is_none());
        let json =
            serde_json::to_value(Cell { policies: Some(Policies::OURS), engine: Engine::Afterimage, ..cell });
        let json = json.expect("as above");
        assert_eq!((&json["engine"], &json["yield"]), (&"afterimage".into(), &"never".into()));
    }
}
