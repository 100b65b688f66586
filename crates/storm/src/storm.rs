//! A storm on real threads: one run.

use core::sync::atomic::AtomicBool;
use core::time::Duration;
use std::thread;

use afterimage_mmu::{FRAME_BYTES, Gfn, GuestMmu, Memslot, PageSize, Platform, RetryPoint, SlotId};
use afterimage_stage2::{HeapMemory, Stage2};
use rustix::io::Errno;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::cell::{Latencies, Latency, Load, LockWait, Measured, Retries, Times};
use crate::course::{Course, Ended, Limits};
use crate::guest::{Guest, Seen, Shared, StormHost};
use crate::invalidator::{Invalidator, Taken};
use crate::platform::{Threads, set_crowded, tick};
use crate::policy::{Policies, Scenario, Witness};
use crate::ram::{BASE, Ram, Spares};
use crate::recording::Recording;
use crate::scenario::{Plan, Take, Touch};
use crate::sim::MAX_SIMULATED_VCPUS;
use crate::start::{Start, spawn};
use crate::windows::Windows;

/// How much longer invalidations may be open: then the vCPUs stop, so that they end.
const GRACE: Duration = Duration::from_secs(5);
/// The most memory, in bytes: its stamps alone take 24 bytes a page.
pub const MAX_MEMORY: u64 = 256 << 30;
/// The most vCPUs on real threads.
pub const MAX_VCPUS: usize = 256;

/// One run.
#[derive(Clone, Copy, Debug)]
pub struct Storm {
    /// What blows.
    pub scenario: Scenario,
    /// Which part of it.
    pub load: Load,
    /// What is chosen.
    pub policies: Policies,
    /// Threads that touch memory.
    pub vcpus: usize,
    /// Threads that invalidate.
    pub threads: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// What the choices come from.
    pub seed: u64,
    /// How long it blows. What has begun then is brought to its end; where invalidations are open for more than 5 s more,
    /// the vCPUs leave, so that they end, and faults that are under way are cut off.
    pub duration: Duration,
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Run {
    /// The numbers.
    pub measured: Measured,
    /// The rest.
    pub recording: Recording,
    /// What went wrong besides wrong pages, in sentences.
    pub failures: Vec<String>,
}

/// Why a storm cannot blow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StormError {
    /// Too little or too much memory.
    #[error("a storm {scenario} takes {} KiB to {} GiB of memory on real threads, not {bytes} bytes", .least >> 10, MAX_MEMORY >> 30)]
    Memory {
        /// What was to blow.
        scenario: Scenario,
        /// What was asked for.
        bytes: u64,
        /// The least.
        least: u64,
    },
    /// Too few or too many vCPUs.
    #[error("a storm takes 1 to {MAX_VCPUS} vCPUs on real threads, not {0}")]
    Vcpus(usize),
    /// Too few or too many threads.
    #[error("a storm {scenario} takes {}, not {threads}", threads_of(*.scenario))]
    Threads {
        /// What was to blow.
        scenario: Scenario,
        /// What was asked for.
        threads: usize,
    },
    /// Too little or too much memory, in virtual time.
    #[error("a simulated storm {scenario} takes {} KiB to 64 TiB of memory, not {bytes} bytes", .least >> 10)]
    SimulatedMemory {
        /// What was to blow.
        scenario: Scenario,
        /// What was asked for.
        bytes: u64,
        /// The least.
        least: u64,
    },
    /// Too few or too many vCPUs, in virtual time.
    #[error("a simulated storm takes 1 to {MAX_SIMULATED_VCPUS} vCPUs, not {0}")]
    SimulatedVcpus(usize),
    /// Memory that is no whole number of frames.
    #[error("a storm takes whole frames of 4 KiB of memory, and {0} bytes are none")]
    PartOfFrame(u64),
    /// No memory for the tables' roots, or for what is known of each page.
    #[error(
        "this machine has too little memory for the storm, which takes 24 bytes a page and tables: less --memory needs less"
    )]
    NoMemory,
    /// No thread.
    #[error(
        "the system gives no thread: {0}; fewer --vcpus need fewer, and `ulimit -u` or a cgroup says how many there may be"
    )]
    Spawn(Errno),
}

/// How many threads may invalidate.
fn threads_of(scenario: Scenario) -> String {
    match scenario.most_threads() {
        1 => "1 thread that invalidates".to_owned(),
        most => format!("1 to {most} threads that invalidate"),
    }
}

impl Storm {
    /// Whether it can blow on real threads.
    ///
    /// # Errors
    /// It cannot.
    pub fn check(&self) -> Result<(), StormError> {
        let Self { scenario, vcpus, threads, memory, .. } = *self;
        let least = scenario.least_memory();
        if !(least..=MAX_MEMORY).contains(&memory) {
            return Err(StormError::Memory { scenario, bytes: memory, least });
        }
        if !memory.is_multiple_of(FRAME_BYTES) {
            return Err(StormError::PartOfFrame(memory));
        }
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(StormError::Vcpus(vcpus));
        }
        if !(1..=scenario.most_threads()).contains(&threads) {
            return Err(StormError::Threads { scenario, threads });
        }
        Ok(())
    }

    /// Lets it blow, for as long as it is to, or until `interrupted`.
    ///
    /// # Errors
    /// It cannot start.
    pub fn blow(&self, interrupted: &AtomicBool) -> Result<Run, StormError> {
        self.check()?;
        let Self { scenario, load, policies, vcpus, threads, memory, seed, duration } = *self;
        let plan = Plan::new(scenario, load, vcpus, threads, memory / FRAME_BYTES);
        let (ram, spares) = Ram::new(plan.frames, plan.takes.len()).ok_or(StormError::NoMemory)?;
        let tables = Stage2::new(StormHost::new(), HeapMemory::default(), 1, PageSize::Size4K);
        let mmu = GuestMmu::new(tables.ok_or(StormError::NoMemory)?, policies.engine());
        mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(0), plan.frames, BASE))
            .expect("the slot is the first, not empty, and far from the end of all addresses");
        let windows: Vec<_> = plan.takes.iter().map(|take| Windows::new(take.from)).collect();
        let shared = Shared {
            mmu: &mmu,
            ram: &ram,
            windows: &windows,
            after_retry: policies.after_retry,
            started_ns: Threads::now_ns(),
        };

        let count = plan.touches.len() + plan.takes.len();
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        // With a CPU for each they stay apart; else the scheduler knows better.
        let place = |thread: usize| {
            if count <= cpus {
                let mut set = CpuSet::new();
                set.set(thread);
                // Where the CPUs that may be used are numbered in another way it runs where it is put.
                let _ = sched_setaffinity(None, &set);
            }
        };
        set_crowded(count > cpus);
        let start = Start::new();
        let course = Course::default();
        let Ended { seen, taken, elapsed_ns } = thread::scope(|scope| {
            let guest = |(number, touch): (usize, &Touch)| {
                let (shared, start, course, touch) = (&shared, &start, &course, *touch);
                spawn(scope, move || {
                    let runner = start.runner();
                    place(number);
                    let mut guest = Guest::new(shared, number, touch, seed);
                    if load == Load::Busy {
                        guest.map_all();
                    }
                    if runner.wait() { guest.run(&course.over, &course.abandoned) } else { Seen::default() }
                })
            };
            let invalidator = |((number, take), spares): ((usize, &Take), Spares)| {
                let (shared, start, course, guests) = (&shared, &start, &course, plan.touches.len());
                let take = *take;
                spawn(scope, move || {
                    let runner = start.runner();
                    place(guests + number);
                    let invalidator = Invalidator::new(shared, number, take, spares, seed);
                    if runner.wait() { invalidator.run(&course.calm) } else { Taken::default() }
                })
            };
            let threads = || {
                if count > cpus {
                    spawn(scope, || tick(&course.done))?;
                }
                let guests: Vec<_> = plan.touches.iter().enumerate().map(guest).collect::<Result<_, _>>()?;
                let takes = plan.takes.iter().enumerate().zip(spares).map(invalidator);
                Ok((guests, takes.collect::<Result<Vec<_>, _>>()?))
            };
            // Who is there already must not wait for one that does not come.
            let (guests, invalidators) = threads().inspect_err(|_: &StormError| {
                start.call_off();
                course.end_all();
            })?;
            // Who panics before the start ends it: there is nothing to wait for.
            let duration = if start.go(count) { duration } else { Duration::ZERO };
            let limits = Limits { duration, grace: GRACE };
            let is_open = || windows.iter().any(Windows::is_open);
            Ok(course.run(limits, interrupted, is_open, guests, invalidators))
        })?;

        let mut recording = Recording::default();
        let mut failures = Vec::new();
        let mut total = Seen::default();
        for seen in seen {
            total.accesses += seen.accesses;
            total.faults += seen.faults;
            total.unfinished += seen.unfinished;
            total.wrong += seen.wrong;
            total.doomed_cpu_ns += seen.doomed_cpu_ns;
            total.most_retries = total.most_retries.max(seen.most_retries);
            total.most_ends = total.most_ends.max(seen.most_ends);
            for (sum, retries) in total.retries.iter_mut().zip(seen.retries) {
                *sum += retries;
            }
            failures.extend(seen.failure);
            recording.merge(seen.recording);
        }
        let (mut invalidations, mut cpu_ns) = (0, None);
        for taken in taken {
            invalidations += taken.invalidations;
            cpu_ns = cpu_ns.max(taken.cpu_ns.and_then(|ns| ns.checked_div(taken.invalidations)));
            failures.extend(taken.failure);
            recording.merge(taken.recording);
        }
        let (faults, stats) = (mmu.fault_stats(), mmu.invalidation_stats());
        drop(mmu);
        match ram.references() {
            0 => {}
            references => failures.push(format!("{references} references to pages were not given back")),
        }
        let retries = Retries {
            before_fault_in: total.retries[RetryPoint::BeforeFaultIn as usize],
            after_fault_in: total.retries[RetryPoint::AfterFaultIn as usize],
            under_lock: total.retries[RetryPoint::UnderLock as usize],
            lost_race: total.retries[RetryPoint::LostRace as usize],
            slot_changing: total.retries[RetryPoint::SlotChanging as usize],
        };
        let measured = Measured {
            elapsed_ns,
            accesses: Some(total.accesses),
            faults: Some(total.faults),
            unfinished_faults: Some(total.unfinished),
            invalidations,
            flushes_per_invalidation: per(stats.flushes, invalidations),
            flushes_for_waiters_per_invalidation: per(stats.flushes_for_waiters, invalidations),
            flushes_for_scheduler_per_invalidation: per(stats.flushes_for_scheduler, invalidations),
            yields_per_invalidation: per(stats.yields, invalidations),
            yields_to_waiters_per_invalidation: per(stats.yields_to_waiters, invalidations),
            retries_per_fault: per(retries.all(), total.faults),
            most_retries: Some(total.most_retries),
            most_ends: Some(total.most_ends),
            // Those of the vCPUs: who maps what it takes away has looked pages up, too.
            wasted_fault_ins: Some(retries.after_fault_in + retries.under_lock + retries.lost_race),
            invalidation_ns: Times::of(&recording.invalidations),
            invalidation_cpu_ns: cpu_ns,
            lock_wait_ns: Some(LockWait { faults: faults.lock_wait_ns, invalidations: stats.lock_wait_ns }),
            doomed_lock_acquisitions: Some(match policies.witness {
                Witness::Lock => retries.under_lock,
                Witness::Intent => 0,
            }),
            retries: Some(retries),
            doomed_cpu_ns: Some(total.doomed_cpu_ns),
            latency_ns: Latencies {
                inside: Latency::of(&recording.inside),
                outside: Latency::of(&recording.outside),
            },
            wrong_pages: total.wrong,
        };
        Ok(Run { measured, recording, failures })
    }
}

/// `part` for each one of `whole`; `None` if there is none.
fn per(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}
