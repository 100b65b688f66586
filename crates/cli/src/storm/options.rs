//! The options of `storm`, and the cells that they come to.

use std::path::PathBuf;
use std::time::Duration;

use afterimage_storm::{
    AfterRetry, Coverage, Load, Matrix, Policies, Precheck, Scenario, Sequence, Simulation, Storm, Turns,
    Witness, Yielding,
};
use anyhow::{Result, ensure};
use clap::Args;

use super::kernel::KernelPlan;
use crate::units;

/// The policies that tell the story where none are asked for: before the change, after it, and with what this project
/// adds.
const STORY: [Policies; 6] = [
    Policies::BEFORE,
    Policies { yielding: Yielding::Resched, ..Policies::BEFORE },
    Policies::LINUX,
    Policies { yielding: Yielding::Resched, ..Policies::LINUX },
    Policies::OURS_LOCKED,
    Policies::OURS,
];

/// The most runs of a cell: they are all kept until its medians are known.
const MAX_REPEAT: usize = 1000;

/// What can be asked of `storm`.
#[derive(Args, Clone, Debug)]
pub(crate) struct StormArgs {
    /// What blows: A, B, C, D, E, E-inside, separated by commas [default: all]
    #[arg(long, value_delimiter = ',', hide_default_value = true)]
    scenario: Vec<Scenario>,
    /// Where a fault looks, without the lock, whether it is doomed: off, before, after, both
    #[arg(long, value_delimiter = ',')]
    precheck: Vec<Precheck>,
    /// When a zap gives the lock up: contention (a preemptible kernel), resched (one that is not), never
    #[arg(long = "yield", value_delimiter = ',')]
    yielding: Vec<Yielding>,
    /// Whose end makes a fault under way retry: global (any), region (of 2 MiB; of 64 MiB for what touches more than 64)
    #[arg(long, value_delimiter = ',')]
    sequence: Vec<Sequence>,
    /// Which frames an active invalidation holds back: hull (of all that are active), exact
    #[arg(long, value_delimiter = ',')]
    coverage: Vec<Coverage>,
    /// Whether a fault that is retried too often goes before the next invalidation: never, starved, slice
    #[arg(long, value_delimiter = ',')]
    turns: Vec<Turns>,
    /// What keeps a verdict true until the install is done: lock, intent
    #[arg(long, value_delimiter = ',')]
    witness: Vec<Witness>,
    /// What becomes of a retried fault: refault, park
    #[arg(long, value_delimiter = ',')]
    after_retry: Vec<AfterRetry>,
    /// Threads that touch memory [default: 1 or 2, by scenario]
    #[arg(long)]
    vcpus: Option<usize>,
    /// Threads that take it away; in A and B one [default: 1 or 2, by scenario]
    #[arg(long)]
    threads: Option<usize>,
    /// Guest memory [default: 64M to 1G, by scenario]
    #[arg(long, value_parser = units::bytes)]
    memory: Option<u64>,
    /// How long each run blows: 500ms, 10s
    #[arg(long, default_value = "500ms", value_parser = units::duration)]
    duration: Duration,
    /// Runs of each cell: medians are shown, with the least and the greatest
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// Run everything in an order of chance
    #[arg(long)]
    shuffle: bool,
    /// What all choices come from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Have the vCPUs fault on memory of their own, which nobody takes: what the storm does to bystanders
    #[arg(long, conflicts_with_all = ["kernel", "simulate"])]
    bystanders: bool,
    /// Blow in virtual time: any number of vCPUs and any memory, with costs measured on this machine first
    #[arg(long)]
    simulate: bool,
    /// Leave out the cells without faults and without invalidations, which the others are compared with
    #[arg(long)]
    no_baseline: bool,
    /// With a real guest on this host's KVM, and with its kernel's own invalidations, instead of with our engine
    #[arg(long, conflicts_with_all = ["precheck", "yielding", "sequence", "coverage", "turns", "witness", "after_retry", "simulate", "shuffle", "trace", "report"])]
    pub(super) kernel: bool,
    /// Set what `storm --kernel --json` wrote on several hosts beside each other, and run nothing
    #[arg(long, value_name = "FILES", num_args = 1.., exclusive = true)]
    pub(super) beside: Vec<PathBuf>,
    /// Write the cells as JSON; "-" for standard output, and the table to standard error then
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the first events of each cell's first run as a trace that Chrome and Perfetto show
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Write a page for people: one file of HTML that loads nothing
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// What the options come to.
#[derive(Debug)]
pub(crate) struct StormPlan {
    pub(crate) matrix: Matrix,
    pub(crate) json: Option<PathBuf>,
    pub(crate) trace: Option<PathBuf>,
    pub(crate) report: Option<PathBuf>,
    /// Of each run.
    pub(crate) duration: Duration,
    /// In virtual time.
    pub(crate) simulates: bool,
}

impl StormArgs {
    /// Everything that can be refused before anything starts is refused here.
    pub(crate) fn plan(self) -> Result<StormPlan> {
        self.check_repeat()?;
        let scenarios = self.scenarios();
        let policies = self.policies();
        let mut storms = Vec::new();
        for scenario in scenarios {
            let storm = Storm {
                scenario,
                load: if self.bystanders { Load::Bystanders } else { Load::Storm },
                policies: Policies::LINUX,
                vcpus: self.vcpus.unwrap_or(scenario.default_vcpus()),
                threads: self.threads.unwrap_or(scenario.default_threads()),
                memory: self.memory.unwrap_or(scenario.default_memory()),
                seed: self.seed,
                duration: self.duration,
            };
            if self.simulate {
                Simulation::check_size(&storm)?
            } else {
                storm.check()?
            }
            if !self.no_baseline {
                // In virtual time each thread has a CPU of its own: no machine is fuller than another.
                let busy = (!self.simulate && !self.bystanders).then_some(Load::Busy);
                let baselines = [Some(Load::Uncontended), busy, Some(Load::Quiet)];
                storms.extend(baselines.into_iter().flatten().map(|load| Storm { load, ..storm }));
            }
            storms.extend(policies.iter().map(|&policies| Storm { policies, ..storm }));
        }
        let matrix = Matrix { storms, repeat: self.repeat, shuffle: self.shuffle, seed: self.seed };
        Ok(StormPlan {
            matrix,
            json: self.json,
            trace: self.trace,
            report: self.report,
            duration: self.duration,
            simulates: self.simulate,
        })
    }

    /// The same for the kernel that is running.
    pub(super) fn kernel_plan(self) -> Result<KernelPlan> {
        self.check_repeat()?;
        let plan = KernelPlan {
            scenarios: self.scenarios(),
            vcpus: self.vcpus,
            threads: self.threads,
            memory: self.memory,
            duration: self.duration,
            repeat: self.repeat,
            seed: self.seed,
            baselines: !self.no_baseline,
            json: self.json,
        };
        plan.check()?;
        Ok(plan)
    }

    /// What blows, each once.
    fn scenarios(&self) -> Vec<Scenario> {
        if self.scenario.is_empty() { Scenario::ALL.to_vec() } else { each_once(&self.scenario) }
    }

    fn check_repeat(&self) -> Result<()> {
        let repeat = self.repeat;
        ensure!(
            (1..=MAX_REPEAT).contains(&repeat),
            "--repeat is {repeat}, and must be from 1 to {MAX_REPEAT}"
        );
        Ok(())
    }

    /// Every combination of what was asked for, and as in Linux where nothing was; the story if nothing was at all.
    fn policies(&self) -> Vec<Policies> {
        let Self { precheck, yielding, sequence, coverage, turns, witness, after_retry, .. } = self;
        if precheck.is_empty()
            && yielding.is_empty()
            && sequence.is_empty()
            && coverage.is_empty()
            && turns.is_empty()
            && witness.is_empty()
            && after_retry.is_empty()
        {
            return STORY.to_vec();
        }
        fn or<T: Copy + PartialEq>(asked: &[T], linux: T) -> Vec<T> {
            if asked.is_empty() { vec![linux] } else { each_once(asked) }
        }
        let linux = Policies::LINUX;
        let mut all = vec![linux];
        fn times<T>(
            all: &[Policies],
            choices: &[T],
            with: impl Fn(Policies, &T) -> Policies,
        ) -> Vec<Policies> {
            choices.iter().flat_map(|choice| all.iter().map(|policies| with(*policies, choice))).collect()
        }
        all = times(&all, &or(precheck, linux.precheck), |policies, &precheck| Policies {
            precheck,
            ..policies
        });
        all = times(&all, &or(yielding, linux.yielding), |policies, &yielding| Policies {
            yielding,
            ..policies
        });
        all = times(&all, &or(sequence, linux.sequence), |policies, &sequence| Policies {
            sequence,
            ..policies
        });
        all = times(&all, &or(coverage, linux.coverage), |policies, &coverage| Policies {
            coverage,
            ..policies
        });
        all = times(&all, &or(turns, linux.turns), |policies, &turns| Policies { turns, ..policies });
        all = times(&all, &or(witness, linux.witness), |policies, &witness| Policies { witness, ..policies });
        all = times(&all, &or(after_retry, linux.after_retry), |policies, &after_retry| Policies {
            after_retry,
            ..policies
        });
        all
    }
}

/// What was asked for, in its order, without what was asked for again.
fn each_once<T: Copy + PartialEq>(asked: &[T]) -> Vec<T> {
    let mut all = Vec::new();
    for choice in asked {
        if !all.contains(choice) {
            all.push(*choice);
        }
    }
    all
}
