//! What a memory object counts, by kind of invalidation and by where pages came from.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;

/// Why an object takes pages away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Kind {
    /// The host takes them; they come back as they were.
    Evict = 0,
    /// The guest gave them up; they come back as zeros.
    Discard,
    /// They are write-protected and read for a checkpoint.
    Protect,
    /// They move to other frames.
    Migrate,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Evict, Self::Discard, Self::Protect, Self::Migrate];

    /// Its name, as options and reports have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Evict => "evict",
            Self::Discard => "discard",
            Self::Protect => "protect",
            Self::Migrate => "migrate",
        }
    }
}

/// Invalidations of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindStats {
    /// How many have ended.
    pub count: u64,
    /// Frames of 4 KiB that they moved (evicted, discarded, read for the checkpoint, or given another frame).
    pub frames: u64,
    /// The median of their durations, from the start of begin to the end of end, to two significant digits.
    pub median: Duration,
    /// The longest.
    pub longest: Duration,
}

/// All that an object counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ObjectStats {
    /// By [`Kind`].
    pub kinds: [KindStats; Kind::ALL.len()],
    /// Frames made resident from the source.
    pub from_source: u64,
    /// Frames made resident from the store.
    pub from_store: u64,
    /// Frames made resident as zeros.
    pub from_zero: u64,
    /// Pages lost.
    pub poisoned: u64,
    /// Times that a fault had to make room itself.
    pub direct_reclaims: u64,
    /// Pages that were to be evicted and stayed, since the store was full.
    pub store_refusals: u64,
    /// Pages that faults took beyond the budget and its batch, since none could go.
    pub beyond_budget: u64,
    /// Bytes resident now.
    pub resident_bytes: u64,
    /// The most bytes that were ever resident.
    pub peak_bytes: u64,
}

impl ObjectStats {
    /// The counts of one kind.
    pub fn of(&self, kind: Kind) -> &KindStats {
        &self.kinds[kind as usize]
    }
}

#[derive(Debug)]
struct KindCounters {
    frames: AtomicU64,
    durations: Mutex<Histogram<u64>>,
}

#[derive(Debug)]
pub(crate) struct Counters {
    kinds: [KindCounters; Kind::ALL.len()],
    pub(crate) from_source: AtomicU64,
    pub(crate) from_store: AtomicU64,
    pub(crate) from_zero: AtomicU64,
    pub(crate) poisoned: AtomicU64,
    pub(crate) direct_reclaims: AtomicU64,
    pub(crate) store_refusals: AtomicU64,
    pub(crate) beyond_budget: AtomicU64,
}

impl Counters {
    pub(crate) fn new() -> Self {
        let kind = |_| KindCounters {
            frames: AtomicU64::new(0),
            durations: Mutex::new(Histogram::new(2).expect("two significant digits are allowed")),
        };
        Self {
            kinds: core::array::from_fn(kind),
            from_source: AtomicU64::new(0),
            from_store: AtomicU64::new(0),
            from_zero: AtomicU64::new(0),
            poisoned: AtomicU64::new(0),
            direct_reclaims: AtomicU64::new(0),
            store_refusals: AtomicU64::new(0),
            beyond_budget: AtomicU64::new(0),
        }
    }

    pub(crate) fn moved(&self, kind: Kind, frames: u64) {
        self.kinds[kind as usize].frames.fetch_add(frames, Relaxed);
    }

    pub(crate) fn took(&self, kind: Kind, duration: Duration) {
        let mut durations =
            self.kinds[kind as usize].durations.lock().unwrap_or_else(PoisonError::into_inner);
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        durations.record(ns).expect("the histogram grows by itself");
    }

    /// `resident` and `peak` are filled in by the object.
    pub(crate) fn get(&self) -> ObjectStats {
        let kind = |counters: &KindCounters| {
            let durations = counters.durations.lock().unwrap_or_else(PoisonError::into_inner);
            KindStats {
                count: durations.len(),
                frames: counters.frames.load(Relaxed),
                median: Duration::from_nanos(durations.value_at_quantile(0.5)),
                longest: Duration::from_nanos(durations.max()),
            }
        };
        ObjectStats {
            kinds: core::array::from_fn(|index| kind(&self.kinds[index])),
            from_source: self.from_source.load(Relaxed),
            from_store: self.from_store.load(Relaxed),
            from_zero: self.from_zero.load(Relaxed),
            poisoned: self.poisoned.load(Relaxed),
            direct_reclaims: self.direct_reclaims.load(Relaxed),
            store_refusals: self.store_refusals.load(Relaxed),
            beyond_budget: self.beyond_budget.load(Relaxed),
            resident_bytes: 0,
            peak_bytes: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_invalidations_are_counted_as_long_as_they_were() {
        let counters = Counters::new();
        for millis in [1, 20, 20, 3_000] {
            counters.took(Kind::Evict, Duration::from_millis(millis));
        }
        let stats = counters.get();
        let evict = stats.of(Kind::Evict);
        assert_eq!(evict.count, 4);
        assert!((19..=21).contains(&evict.median.as_millis()), "{:?}", evict.median);
        assert!((2_950..=3_050).contains(&evict.longest.as_millis()), "{:?}", evict.longest);
        assert_eq!(stats.of(Kind::Discard).count, 0);
    }
}
