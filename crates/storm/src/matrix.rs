//! Many storms, each several times, in an order that no slow drift of the machine can favour.

use core::sync::atomic::{AtomicBool, Ordering};

use crate::cell::{Cell, Engine, Measured};
use crate::guest::Choices;
use crate::recording::Recording;
use crate::storm::{Run, Storm, StormError};

/// Storms to run.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// One for each cell.
    pub storms: Vec<Storm>,
    /// Runs of each.
    pub repeat: usize,
    /// Whether all runs are in an order of chance; else all storms once, then all again.
    pub shuffle: bool,
    /// What that order comes from.
    pub seed: u64,
}

/// What a matrix came to.
#[derive(Clone, Debug)]
pub struct Outcomes {
    /// One for each storm that has run.
    pub outcomes: Vec<Outcome>,
    /// Why it ended before its time: a storm could not start.
    pub stopped: Option<StormError>,
}

/// One cell, and what else its runs left behind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The cell.
    pub cell: Cell,
    /// Distributions of all its runs, events of the first.
    pub recording: Recording,
}

impl Matrix {
    /// Runs everything, or until `interrupted`, or until a storm cannot start: then what was measured by then. `next` is told
    /// of each run before it starts: how many were done, and which one comes.
    pub fn run(&self, interrupted: &AtomicBool, mut next: impl FnMut(usize, &Storm)) -> Outcomes {
        let mut runs: Vec<Vec<Run>> = self.storms.iter().map(|_| Vec::new()).collect();
        let mut stopped = None;
        for (done, index) in self.order().into_iter().enumerate() {
            if interrupted.load(Ordering::Relaxed) {
                break;
            }
            let turn = runs[index].len() as u64;
            let storm = Storm { seed: self.storms[index].seed.wrapping_add(turn), ..self.storms[index] };
            next(done, &storm);
            match storm.blow(interrupted) {
                Ok(run) => runs[index].push(run),
                Err(why) => {
                    stopped = Some(why);
                    break;
                }
            }
        }
        let outcomes = self.storms.iter().zip(runs).filter(|(_, runs)| !runs.is_empty());
        Outcomes { outcomes: outcomes.map(|(storm, runs)| Outcome::of(storm, runs)).collect(), stopped }
    }

    /// How many runs there are.
    pub fn runs(&self) -> usize {
        self.storms.len() * self.repeat
    }

    /// The storm of each run.
    fn order(&self) -> Vec<usize> {
        let mut order: Vec<_> = (0..self.repeat).flat_map(|_| 0..self.storms.len()).collect();
        if self.shuffle {
            let mut choices = Choices::new(self.seed, 0);
            for last in (1..order.len()).rev() {
                order.swap(last, choices.below(last as u64 + 1) as usize);
            }
        }
        order
    }
}

impl Outcome {
    fn of(storm: &Storm, runs: Vec<Run>) -> Self {
        let measured: Vec<_> = runs.iter().map(|run| run.measured.clone()).collect();
        let mut recording = Recording::default();
        let mut failures = Vec::new();
        let count = runs.len() as u64;
        for (turn, mut run) in runs.into_iter().enumerate() {
            if turn > 0 {
                run.recording.events.clear();
            }
            recording.merge(run.recording);
            failures.extend(run.failures);
        }
        let cell = Cell {
            scenario: storm.scenario,
            engine: Engine::Afterimage,
            load: storm.load,
            policies: Some(storm.policies),
            vcpus: storm.vcpus as u64,
            threads: storm.threads as u64,
            memory_bytes: storm.memory,
            seed: storm.seed,
            runs: count,
            median: Measured::median(&measured),
            min: Measured::least(&measured),
            max: Measured::greatest(&measured),
            failures,
        };
        Self { cell, recording }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cell::Load;
    use crate::policy::{Policies, Scenario};

    fn storm() -> Storm {
        Storm {
            scenario: Scenario::C,
            load: Load::Storm,
            policies: Policies::LINUX,
            vcpus: 1,
            threads: 1,
            memory: 64 << 20,
            seed: 1,
            duration: core::time::Duration::from_millis(1),
        }
    }

    #[test]
    fn a_storm_that_cannot_start_takes_no_other_with_it() {
        let storms = vec![storm(), Storm { vcpus: 0, ..storm() }, storm()];
        let matrix = Matrix { storms, repeat: 2, shuffle: false, seed: 1 };
        let Outcomes { outcomes, stopped } = matrix.run(&AtomicBool::new(false), |_, _| ());
        assert_eq!(outcomes.iter().map(|outcome| outcome.cell.runs).collect::<Vec<_>>(), [1]);
        assert_eq!(stopped, Some(StormError::Vcpus(0)));
    }

    #[test]
    fn every_run_has_its_turn_in_any_order() {
        let matrix = |shuffle, seed| Matrix { storms: vec![storm(); 7], repeat: 3, shuffle, seed };
        assert_eq!(matrix(false, 1).order()[..8], [0, 1, 2, 3, 4, 5, 6, 0]);
        let order = matrix(true, 1).order();
        assert_eq!(order, matrix(true, 1).order());
        assert_ne!(order, matrix(true, 2).order());
        assert_eq!(order.len(), matrix(true, 1).runs());
        for index in 0..7 {
            assert_eq!(order.iter().filter(|&&other| other == index).count(), 3);
        }
    }
}
