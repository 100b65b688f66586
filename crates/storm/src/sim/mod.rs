//! Storms beyond the machine at hand: the same policies, in virtual time.
//!
//! A discrete-event simulation of the protocol, not of the engine's code. Its only constants are [`Costs`], measured on this
//! machine; [`Simulation::check`] compares it with storms on real threads, so that a reader knows what it is worth. Not
//! simulated: a scheduler (each thread has a CPU), and turns for the starved.

mod costs;
mod lock;
mod machine;
mod words;

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;

use afterimage_mmu::FRAME_BYTES;
use serde::Serialize;

pub use self::costs::Costs;
use self::machine::Machine;
pub use self::machine::Simulated;
use crate::cell::{Cell, Engine, Load, Measured};
use crate::matrix::Outcome;
use crate::policy::{Policies, Scenario};
use crate::storm::{Storm, StormError};

/// Events that one run may take: about ten seconds of real time.
const LIMIT: u64 = 60_000_000;
/// The most memory, in bytes: 64 TiB.
pub(crate) const MAX_SIMULATED_MEMORY: u64 = 64 << 40;
/// The most vCPUs in virtual time.
pub(crate) const MAX_SIMULATED_VCPUS: usize = 4096;
/// Which number, and how it is got.
type Number = (&'static str, fn(&Measured) -> Option<f64>);
/// What is compared.
const CHECKED_NUMBERS: [Number; 3] = [
    ("flushes/invalidation", |m| m.flushes_per_invalidation),
    ("invalidation, median ns", |m| m.invalidation_ns.as_ref().map(|times| times.median as f64)),
    ("retries/fault", |m| m.retries_per_fault),
];
/// How long the storms blow that the simulation is checked against.
const CHECKED: Duration = Duration::from_millis(200);
/// Their memory, in bytes.
const CHECKED_MEMORY: u64 = 16 << 20;

/// A run in virtual time that was too many events: from half of the limit on nothing began any more.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// Faults and invalidations that had not ended at the limit: what is told of the others may look better than it is.
    pub unfinished: u64,
}

/// A simulator with its costs.
#[derive(Clone, Copy, Debug)]
pub struct Simulation {
    /// What things cost.
    pub costs: Costs,
}

/// One number, on real threads and in the simulation.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// What blew.
    pub scenario: Scenario,
    /// What was chosen.
    pub policies: Policies,
    /// Threads, vCPUs and invalidators together.
    pub threads: usize,
    /// Whether each had a CPU. The simulation gives each one.
    pub is_crowded: bool,
    /// Which number.
    pub what: &'static str,
    /// On real threads.
    pub real: f64,
    /// In the simulation.
    pub simulated: f64,
}

impl Compared {
    /// How far the simulation is off, as a share of what is real: 0.1 is 10 % too much.
    pub fn error(&self) -> f64 {
        (self.simulated - self.real) / self.real
    }
}

impl Simulation {
    /// Runs `storm` in virtual time. Its memory and its vCPUs may be more than any machine has.
    pub fn run(&self, storm: &Storm) -> Simulated {
        self.run_until(storm, LIMIT, &AtomicBool::new(false))
    }

    fn run_until(&self, storm: &Storm, limit: u64, interrupted: &AtomicBool) -> Simulated {
        let Storm { scenario, load, policies, vcpus, threads, memory, seed, duration } = *storm;
        let size = (vcpus, threads, memory / FRAME_BYTES);
        let duration = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Machine::new(scenario, load, policies, self.costs, size, seed, duration).run(limit, interrupted)
    }

    /// Whether it can blow in virtual time.
    ///
    /// # Errors
    /// It cannot.
    pub fn check_size(storm: &Storm) -> Result<(), StormError> {
        let Storm { scenario, vcpus, memory, .. } = *storm;
        let least = scenario.least_memory();
        if !(least..=MAX_SIMULATED_MEMORY).contains(&memory) {
            return Err(StormError::SimulatedMemory { scenario, bytes: memory, least });
        }
        if !(1..=MAX_SIMULATED_VCPUS).contains(&vcpus) {
            return Err(StormError::SimulatedVcpus(vcpus));
        }
        if !memory.is_multiple_of(FRAME_BYTES) {
            return Err(StormError::PartOfFrame(memory));
        }
        Storm { vcpus: 1, memory: least, ..*storm }.check()
    }

    /// Runs `storm` with `repeat` seeds, or until `interrupted`; `None` if that is before the first has run. Also how
    /// any of them was cut off, being too many events.
    pub fn outcome(
        &self,
        storm: &Storm,
        repeat: usize,
        interrupted: &AtomicBool,
    ) -> Option<(Outcome, Option<Cut>)> {
        let runs: Vec<_> = (0..repeat as u64)
            .map(|turn| {
                self.run_until(&Storm { seed: storm.seed.wrapping_add(turn), ..*storm }, LIMIT, interrupted)
            })
            // One that was interrupted is none.
            .take_while(|_| !interrupted.load(Ordering::Relaxed))
            .collect();
        let measured: Vec<_> = runs.iter().map(|run| run.measured.clone()).collect();
        let is_cut = runs.iter().any(|run| run.is_cut);
        let unfinished = runs.iter().map(|run| run.unfinished).max()?;
        let recording = runs.into_iter().map(|run| run.recording).reduce(|mut all, run| {
            all.merge(run);
            all
        })?;
        let cell = Cell {
            scenario: storm.scenario,
            engine: Engine::Simulation,
            load: storm.load,
            policies: Some(storm.policies),
            vcpus: storm.vcpus as u64,
            threads: storm.threads as u64,
            memory_bytes: storm.memory,
            seed: storm.seed,
            runs: measured.len() as u64,
            median: Measured::median(&measured),
            min: Measured::least(&measured),
            max: Measured::greatest(&measured),
            failures: Vec::new(),
        };
        Some((Outcome { cell, recording }, is_cut.then_some(Cut { unfinished })))
    }

    /// Compares the simulation with real threads: storm A before and after the change, with 1 to 3 vCPUs beside the thread
    /// that invalidates.
    ///
    /// # Errors
    /// A storm cannot blow here.
    pub fn check(&self, interrupted: &AtomicBool) -> Result<Vec<Compared>, StormError> {
        let mut all = Vec::new();
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        for vcpus in 0..=3 {
            for policies in [Policies::BEFORE, Policies::LINUX] {
                let storm = Storm {
                    scenario: Scenario::A,
                    load: if vcpus == 0 { Load::Uncontended } else { Load::Storm },
                    policies,
                    vcpus: vcpus.max(1),
                    threads: 1,
                    memory: CHECKED_MEMORY,
                    seed: 1,
                    duration: CHECKED,
                };
                if interrupted.load(Ordering::Relaxed) {
                    return Ok(all);
                }
                let real = storm.blow(interrupted)?.measured;
                let simulated = self.run(&storm).measured;
                for (what, of) in CHECKED_NUMBERS {
                    if let (Some(real), Some(simulated)) = (of(&real), of(&simulated)) {
                        let is_crowded = vcpus + 1 > cpus;
                        let scenario = Scenario::A;
                        all.push(Compared {
                            scenario,
                            policies,
                            threads: vcpus + 1,
                            is_crowded,
                            what,
                            real,
                            simulated,
                        });
                    }
                }
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{AfterRetry, Precheck, Witness, Yielding};

    /// Round numbers of no machine.
    pub(super) const COSTS: Costs = Costs {
        touch: 10.0,
        between_faults: 50.0,
        to_hint: 60.0,
        fault_in: 20.0,
        locked: 40.0,
        install: 60.0,
        zap_entry: 20.0,
        pass_entry: 2.0,
        single: 300.0,
        compare: 500.0,
        request: 20.0,
        kick: 300.0,
        handover: 150.0,
        crowd: 30.0,
        wake: 20_000.0,
    };

    fn storm(scenario: Scenario, policies: Policies) -> Storm {
        let duration = Duration::from_millis(2);
        let (load, vcpus, threads, memory) = (Load::Storm, 5, scenario.most_threads().min(2), 4 << 20);
        Storm { scenario, load, policies, vcpus, threads, memory, seed: 7, duration }
    }

    fn simulate(storm: &Storm) -> Simulated {
        Simulation { costs: COSTS }.run_until(storm, 3_000_000, &AtomicBool::new(false))
    }

    fn every_policy() -> impl Iterator<Item = Policies> {
        Precheck::ALL.iter().flat_map(|&precheck| {
            Yielding::ALL.iter().flat_map(move |&yielding| {
                [Policies::LINUX, Policies::OURS].into_iter().flat_map(move |policies| {
                    AfterRetry::ALL.iter().map(move |&after_retry| Policies {
                        precheck,
                        yielding,
                        after_retry,
                        ..policies
                    })
                })
            })
        })
    }

    /// A long one takes a minute: who interrupts it does not wait for its end, and is not told of a part of it.
    #[test]
    fn an_interrupted_run_stops_at_once() {
        let simulation = Simulation { costs: COSTS };
        let storm = storm(Scenario::A, Policies::LINUX);
        let run = simulation.run_until(&storm, LIMIT, &AtomicBool::new(true));
        assert_eq!((run.measured.faults, run.measured.invalidations), (Some(0), 0));
        assert!(simulation.outcome(&storm, 3, &AtomicBool::new(true)).is_none());
        assert!(simulation.outcome(&storm, 1, &AtomicBool::new(false)).is_some());
    }

    #[test]
    fn what_begins_ends_under_every_policy() {
        for &scenario in Scenario::ALL {
            for policies in every_policy() {
                let run = simulate(&storm(scenario, policies));
                assert_eq!(run.unfinished, 0, "{scenario} {policies}");
                assert!(
                    run.measured.faults > Some(0) && run.measured.invalidations > 0,
                    "{scenario} {policies}"
                );
                let latency = &run.measured.latency_ns;
                let served = [&latency.inside, &latency.outside]
                    .map(|side| side.as_ref().map_or(0, |side| side.count));
                assert_eq!(Some(served.iter().sum()), run.measured.faults, "{scenario} {policies}");
            }
        }
    }

    /// As on real threads: the storm is over with its last invalidation, and none begins late.
    #[test]
    fn vcpus_fault_until_the_last_invalidation_has_ended() {
        let (load, duration) = (Load::Bystanders, Duration::from_nanos(1));
        let storm = Storm { load, duration, ..storm(Scenario::A, Policies::OURS) };
        let Simulated { measured, unfinished, .. } = simulate(&storm);
        assert_eq!((measured.invalidations, unfinished), (1, 0));
        let each = measured.faults.expect("the simulation counts them") / storm.vcpus as u64;
        assert!(each > 10, "{each} faults of a vCPU beside a wide invalidation");
    }

    #[test]
    fn time_that_is_up_while_memory_is_mapped_is_up() {
        let alone = Storm { load: Load::Uncontended, ..storm(Scenario::A, Policies::LINUX) };
        let blow = |ns| simulate(&Storm { duration: Duration::from_nanos(ns), ..alone }).measured;
        let first = blow(1);
        assert_eq!(first.invalidations, 1);
        assert_eq!(blow(first.elapsed_ns + 1).invalidations, 1);
    }

    #[test]
    fn a_seed_is_a_run() {
        let storm = storm(Scenario::C, Policies::LINUX);
        assert_eq!(simulate(&storm).measured, simulate(&storm).measured);
        assert_ne!(simulate(&storm).measured, simulate(&Storm { seed: 8, ..storm }).measured);
    }

    #[test]
    fn a_fault_that_looks_takes_no_lock_in_vain_but_in_a_race() {
        for &scenario in Scenario::ALL {
            let Simulated { measured, .. } = simulate(&storm(scenario, Policies::LINUX));
            let retries = measured.retries.expect("the simulation counts them");
            // A race is lost once to each begin or end, by those who stand before the lock at that moment.
            let races = 2 * 5 * measured.invalidations;
            assert!(retries.under_lock <= races, "{scenario}: {} of {races}", retries.under_lock);
        }
        let Simulated { measured, .. } = simulate(&storm(Scenario::A, Policies::LINUX));
        assert!(
            measured.doomed_lock_acquisitions.is_some_and(|count| count <= 2 * 5 * measured.invalidations)
        );
    }

    #[test]
    fn looking_nowhere_and_yielding_to_whoever_waits_is_the_storm() {
        let flushes = |policies| {
            let run = simulate(&storm(Scenario::A, policies));
            run.measured.flushes_per_invalidation.expect("there were invalidations")
        };
        assert!(flushes(Policies::BEFORE) > 100.0);
        assert!(flushes(Policies::LINUX) < 3.0);
        assert!(flushes(Policies { yielding: Yielding::Never, ..Policies::BEFORE }) < 3.0);
        assert!(flushes(Policies { witness: Witness::Intent, ..Policies::BEFORE }) < 3.0);
    }
}
