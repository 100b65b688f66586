//! What a run comes to: as a table for people, as JSON for machines.

use std::fmt::{self, Display};
use std::time::Duration;

use afterimage_memory::{Kind, ObjectStats, StoreStats};
use afterimage_mmu::{FaultStats, InvalidationStats, RetryPoint};
use afterimage_vm::{GuestReport, LatencyHistogram};
use serde::Serialize;

use super::dirty::DirtyReport;
use super::options::{RunPlan, ShownOptions};
use crate::units::{show_bytes, show_count, show_duration};

/// The result of a run.
#[derive(Debug, Serialize)]
pub(crate) struct RunReport {
    guest: String,
    elapsed_ms: u64,
    accesses: u64,
    writes: u64,
    wrong_pages: u64,
    /// Why the run failed, besides wrong pages.
    failures: Vec<String>,
    faults: Faults,
    retries: Retries,
    wasted_fault_ins: u64,
    invalidations: Invalidations,
    dirty_log: DirtyReport,
    nx_recovered_blocks: u64,
    zapped_frames: u64,
    reloads: u64,
    flushes: u64,
    yields: u64,
    lock_wait_ns: LockWait,
    latency_ns: Latencies,
    resident_bytes: Resident,
    stored_bytes: u64,
    memory: Memory,
    options: ShownOptions,
    #[serde(skip)]
    details: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Faults {
    taken: u64,
    fixed: u64,
    fast: u64,
    spurious: u64,
    retry: u64,
    emulated: u64,
    ring_full: u64,
    failed: u64,
}

#[derive(Debug, Serialize)]
struct Retries {
    before_fault_in: u64,
    after_fault_in: u64,
    under_lock: u64,
    lost_race: u64,
    slot_changing: u64,
}

#[derive(Debug, Serialize)]
struct Invalidations {
    evict: KindReport,
    discard: KindReport,
    protect: KindReport,
    migrate: KindReport,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct KindReport {
    count: u64,
    frames: u64,
    median_ns: u64,
    max_ns: u64,
}

#[derive(Debug, Serialize)]
struct LockWait {
    faults: u64,
    invalidations: u64,
}

#[derive(Debug, Serialize)]
struct Latencies {
    inside: Latency,
    outside: Latency,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Latency {
    count: u64,
    p50: u64,
    p99: u64,
    p999: u64,
    max: u64,
}

#[derive(Debug, Serialize)]
struct Resident {
    budget: u64,
    batch: u64,
    peak: u64,
}

#[derive(Debug, Serialize)]
struct Memory {
    from_source_frames: u64,
    from_store_frames: u64,
    from_zero_frames: u64,
    poisoned_pages: u64,
    direct_reclaims: u64,
    store_refusals: u64,
    beyond_budget_pages: u64,
    stored_frames: u64,
    saved_bytes: u64,
    bookkeeping_bytes_per_frame: f64,
}

/// What [`RunReport::new`] puts together.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) guest: GuestReport,
    pub(crate) faults: FaultStats,
    pub(crate) invalidations: InvalidationStats,
    pub(crate) object: ObjectStats,
    pub(crate) store: StoreStats,
    pub(crate) bookkeeping_bytes: u64,
    pub(crate) dirty: DirtyReport,
    pub(crate) nx_recovered_blocks: u64,
    pub(crate) failures: Vec<String>,
}

impl RunReport {
    pub(crate) fn new(plan: &RunPlan, outcome: Outcome) -> Self {
        let Outcome {
            guest,
            faults,
            invalidations,
            object,
            store,
            bookkeeping_bytes,
            dirty,
            nx_recovered_blocks,
            failures,
        } = outcome;
        let counters = guest.counters();
        let latency = guest.latency();
        let kind = |kind| {
            let stats = object.of(kind);
            let ns = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
            KindReport {
                count: stats.count,
                frames: stats.frames,
                median_ns: ns(stats.median),
                max_ns: ns(stats.longest),
            }
        };
        let frames = plan.memory / afterimage_mmu::FRAME_BYTES;
        Self {
            guest: plan.guest.to_string(),
            elapsed_ms: u64::try_from(guest.elapsed.as_millis()).unwrap_or(u64::MAX),
            accesses: counters.accesses,
            writes: counters.writes,
            wrong_pages: counters.wrong,
            failures,
            faults: Faults {
                taken: faults.taken,
                fixed: faults.fixed,
                fast: faults.fast,
                spurious: faults.spurious,
                retry: faults.retried(),
                emulated: faults.emulated,
                ring_full: faults.ring_full,
                failed: faults.failed,
            },
            retries: Retries {
                before_fault_in: faults.retries_at(RetryPoint::BeforeFaultIn),
                after_fault_in: faults.retries_at(RetryPoint::AfterFaultIn),
                under_lock: faults.retries_at(RetryPoint::UnderLock),
                lost_race: faults.retries_at(RetryPoint::LostRace),
                slot_changing: faults.retries_at(RetryPoint::SlotChanging),
            },
            wasted_fault_ins: faults.wasted_fault_ins,
            invalidations: Invalidations {
                evict: kind(Kind::Evict),
                discard: kind(Kind::Discard),
                protect: kind(Kind::Protect),
                migrate: kind(Kind::Migrate),
            },
            dirty_log: dirty,
            nx_recovered_blocks,
            zapped_frames: invalidations.zapped_frames,
            reloads: invalidations.reloads,
            flushes: invalidations.flushes,
            yields: invalidations.yields,
            lock_wait_ns: LockWait { faults: faults.lock_wait_ns, invalidations: invalidations.lock_wait_ns },
            latency_ns: Latencies {
                inside: Latency::of(&latency.inside),
                outside: Latency::of(&latency.outside),
            },
            resident_bytes: Resident {
                budget: plan.resident,
                batch: plan.batch_pages * plan.page_size.bytes(),
                peak: object.peak_bytes,
            },
            stored_bytes: store.held_bytes(),
            memory: Memory {
                from_source_frames: object.from_source,
                from_store_frames: object.from_store,
                from_zero_frames: object.from_zero,
                poisoned_pages: object.poisoned,
                direct_reclaims: object.direct_reclaims,
                store_refusals: object.store_refusals,
                beyond_budget_pages: object.beyond_budget,
                stored_frames: store.frames(),
                saved_bytes: plan.memory.saturating_sub(object.resident_bytes + store.held_bytes()),
                bookkeeping_bytes_per_frame: bookkeeping_bytes as f64 / frames as f64,
            },
            options: plan.shown.clone(),
            details: guest.wrong_pages().take(16).map(ToString::to_string).collect(),
        }
    }

    /// Whether every byte that the guest read was the right one, and everything ended as it should.
    pub(crate) fn is_good(&self) -> bool {
        self.wrong_pages == 0 && self.failures.is_empty()
    }
}

impl Latency {
    fn of(histogram: &LatencyHistogram) -> Self {
        let ns = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self {
            count: histogram.count(),
            p50: ns(histogram.p50()),
            p99: ns(histogram.p99()),
            p999: ns(histogram.p999()),
            max: ns(histogram.max()),
        }
    }
}

impl Display for RunReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.elapsed_ms as f64 / 1e3;
        let row = |f: &mut fmt::Formatter<'_>, name: &str, value: &str| writeln!(f, "  {name:<26}{value}");
        let ns = |ns| show_duration(Duration::from_nanos(ns));
        let per_second = |count: u64| show_count((count as f64 / seconds.max(0.001)) as u64);

        writeln!(f, "guest")?;
        row(
            f,
            "verified accesses",
            &format!("{} ({}/s)", show_count(self.accesses), per_second(self.accesses)),
        )?;
        row(f, "wrong pages", &show_count(self.wrong_pages))?;
        for (name, latency) in [("outside", self.latency_ns.outside), ("inside", self.latency_ns.inside)] {
            let Latency { count, p50, p99, p999, max } = latency;
            let text = format!(
                "p50 {}  p99 {}  p99.9 {}  max {}  ({} samples)",
                ns(p50),
                ns(p99),
                ns(p999),
                ns(max),
                show_count(count)
            );
            row(f, &format!("latency {name} invalid."), &text)?;
        }

        writeln!(f, "faults")?;
        let Faults { taken, fixed, fast, spurious, retry, emulated, ring_full, failed } = self.faults;
        row(f, "taken", &format!("{} ({}/s)", show_count(taken), per_second(taken)))?;
        for (name, count) in [
            ("fixed", fixed),
            ("fast", fast),
            ("spurious", spurious),
            ("emulated", emulated),
            ("dirty ring full", ring_full),
            ("failed", failed),
            ("retried", retry),
        ] {
            row(f, &format!("  {name}"), &show_count(count))?;
        }
        let Retries { before_fault_in, after_fault_in, under_lock, lost_race, slot_changing } = self.retries;
        for (name, count) in [
            ("before fault-in", before_fault_in),
            ("after fault-in", after_fault_in),
            ("under lock", under_lock),
            ("lost race", lost_race),
            ("slot changing", slot_changing),
        ] {
            let share = if retry == 0 { 0.0 } else { count as f64 * 100.0 / retry as f64 };
            row(f, &format!("    {name}"), &format!("{} ({share:.1} %)", show_count(count)))?;
        }

        writeln!(f, "invalidations")?;
        let Invalidations { evict, discard, protect, migrate } = self.invalidations;
        let kinds = [("evict", evict), ("discard", discard), ("protect", protect), ("migrate", migrate)];
        for (name, kind) in kinds {
            let KindReport { count, frames, median_ns, max_ns } = kind;
            if count > 0 {
                let text = format!(
                    "{}: {} frames, median {}, longest {}",
                    show_count(count),
                    show_count(frames),
                    ns(median_ns),
                    ns(max_ns)
                );
                row(f, name, &text)?;
            }
        }
        let DirtyReport { rounds, epochs, frames } = self.dirty_log;
        if epochs > 0 {
            let text = format!(
                "{} rounds: {} frames; as was written, each of {} times",
                show_count(rounds),
                show_count(frames),
                show_count(epochs)
            );
            row(f, "dirty log", &text)?;
        }
        if self.reloads > 0 {
            row(f, "roots replaced", &format!("{} times", show_count(self.reloads)))?;
        }
        if self.nx_recovered_blocks > 0 {
            row(f, "fetched from, recovered", &format!("{} blocks", show_count(self.nx_recovered_blocks)))?;
        }
        row(f, "flushes / yields", &format!("{} / {}", show_count(self.flushes), show_count(self.yields)))?;
        let waits = format!(
            "{} in faults, {} in invalidations",
            ns(self.lock_wait_ns.faults),
            ns(self.lock_wait_ns.invalidations)
        );
        row(f, "waited for mmu_lock", &waits)?;

        writeln!(f, "memory")?;
        let Resident { budget, batch, peak } = self.resident_bytes;
        let resident = format!(
            "peak {} of {} (and a batch of {})",
            show_bytes(peak),
            show_bytes(budget),
            show_bytes(batch)
        );
        row(f, "resident", &resident)?;
        let stored =
            format!("{} for {} frames", show_bytes(self.stored_bytes), show_count(self.memory.stored_frames));
        row(f, "stored", &stored)?;
        let Memory { store_refusals, beyond_budget_pages, .. } = self.memory;
        if store_refusals > 0 {
            let text = format!(
                "{} pages stayed, as --stored was reached; {} came beyond the budget",
                show_count(store_refusals),
                show_count(beyond_budget_pages)
            );
            row(f, "  full", &text)?;
        }
        row(f, "saved", &show_bytes(self.memory.saved_bytes))?;
        let Memory { from_source_frames, from_store_frames, from_zero_frames, .. } = self.memory;
        let came = format!(
            "{} frames from the source, {} from the store, {} as zeros",
            show_count(from_source_frames),
            show_count(from_store_frames),
            show_count(from_zero_frames)
        );
        row(f, "faulted in", &came)?;

        for wrong in &self.details {
            writeln!(f, "WRONG PAGE: {wrong}")?;
        }
        for failure in &self.failures {
            writeln!(f, "FAILED: {failure}")?;
        }
        Ok(())
    }
}
