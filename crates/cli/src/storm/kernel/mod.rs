//! `afterimage storm --kernel`: the same storms with a real guest on the KVM of the kernel that is running, and with real
//! invalidations: `madvise`, `mprotect`, samepage merging.
//!
//! Numbers are KVM's own (`KVM_GET_STATS_FD`), the guest's (latencies of its accesses) and, of one more run that is
//! recorded, tracefs's. What cannot be had here is left out with its reason, and with the way to get it.

mod account;
mod beside;
mod blow;
mod cell;
mod ksm;
mod memory;
mod plan;
mod tracefs;
mod undo;
mod watched;

use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use afterimage_storm::{Cell, Engine, Load, Measured, Policies, Scenario, Storm};
use afterimage_vm::{KvmFacts, KvmProbe, MAX_VCPUS, probe};
use anyhow::{Context as _, Result, anyhow, bail, ensure};

pub(crate) use self::beside::beside;
use self::blow::{KernelRun, KernelStorm, RecordedRun};
use self::cell::{KernelCell, KernelTable};
use self::memory::By;
use self::watched::{Tables, Watched, parameter};
use super::{NOTHING, bar};
use crate::output::{Output, ended, say};
use crate::signals::interrupted;
use crate::units::{show_bytes, show_number};

/// How long a run that is recorded blows, at most.
const RECORDED: Duration = Duration::from_millis(100);

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct KernelPlan {
    pub(crate) scenarios: Vec<Scenario>,
    /// Each by its scenario where nothing is said.
    pub(crate) vcpus: Option<usize>,
    pub(crate) threads: Option<usize>,
    pub(crate) memory: Option<u64>,
    pub(crate) duration: Duration,
    pub(crate) repeat: usize,
    pub(crate) seed: u64,
    /// Whether each side is also run alone.
    pub(crate) baselines: bool,
    /// Where the cells go.
    pub(crate) json: Option<PathBuf>,
}

impl KernelPlan {
    /// Refuses what cannot run, before anything does.
    pub(crate) fn check(&self) -> Result<()> {
        let available = memory::available(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
        for storm in storms(self) {
            let KernelStorm { scenario, load, vcpus, threads, memory, seed, duration, .. } = storm;
            ensure!(
                (1..=MAX_VCPUS).contains(&vcpus),
                "a guest on KVM has 1 to {MAX_VCPUS} vCPUs, not {vcpus}: see --vcpus"
            );
            let policies = Policies::LINUX;
            let threads = threads.max(1);
            Storm { scenario, load, policies, vcpus, threads, memory, seed, duration }.check()?;
            fits(scenario, storm.bytes(), available)?;
        }
        Ok(())
    }
}

/// Refuses what takes more memory than is `available`, where that is known: every page of a guest is written to.
fn fits(scenario: Scenario, bytes: u64, available: Option<u64>) -> Result<()> {
    let available = available.unwrap_or(u64::MAX);
    ensure!(
        bytes <= available,
        "a storm {scenario} over the kernel takes {} of memory, and this host has {} available: see --memory",
        show_bytes(bytes),
        show_bytes(available)
    );
    Ok(())
}

/// The cells to run, in order.
fn storms(plan: &KernelPlan) -> Vec<KernelStorm> {
    let mut storms = Vec::new();
    for &scenario in &plan.scenarios {
        let storm = |load, by| KernelStorm {
            scenario,
            load,
            by,
            vcpus: plan.vcpus.unwrap_or(scenario.default_vcpus()),
            threads: if by == By::Ksm { 0 } else { plan.threads.unwrap_or(scenario.default_threads()) },
            memory: plan.memory.unwrap_or(scenario.default_memory()),
            seed: plan.seed,
            duration: plan.duration,
        };
        let ways = plan::ways(scenario);
        if plan.baselines {
            storms.extend([Load::Uncontended, Load::Quiet].map(|load| storm(load, ways[0])));
        }
        storms.extend(ways.iter().map(|&by| storm(Load::Storm, by)));
    }
    storms
}

/// Lets storms blow over the kernel that is running, and reports. Ends early when interrupted, with what is done.
///
/// # Errors
///
/// There is no KVM that could be used; the result cannot be written.
pub(crate) fn run(plan: &KernelPlan) -> Result<ExitCode> {
    let facts = match probe() {
        KvmProbe::Usable(facts) => facts,
        KvmProbe::Unusable(error) => {
            bail!("/dev/kvm cannot be used: {error}; run as root or as a member of its group")
        }
        _ => bail!(
            "there is no /dev/kvm: load kvm_intel or kvm_amd, or give this virtual machine nested virtualisation"
        ),
    };
    let json = plan.json.as_deref().map(Output::open).transpose()?;
    let interrupted = interrupted()?;
    let storms = storms(plan);
    let bar = bar(storms.len());
    let (mut cells, mut left_out) = (Vec::new(), Vec::new());
    for (number, storm) in storms.iter().enumerate() {
        if interrupted.load(Relaxed) {
            break;
        }
        let name = format!("{} {} by {}", storm.scenario, load_name(storm.load), storm.by);
        bar.set_position(number as u64);
        bar.set_message(name.clone());
        match cell(storm, plan.repeat, &facts, &interrupted) {
            Ok(cell) => cells.push(cell),
            Err(why) => left_out.push(format!("{name}: {why:#}")),
        }
    }
    bar.finish_and_clear();
    let table = KernelTable { cells: &cells, left_out: &left_out }.to_string();
    if cells.is_empty() {
        Output::show(&table, true)?;
        return Err(left_out.first().map_or(anyhow!(NOTHING), |first| anyhow!("no storm was run: {first}")));
    }
    if interrupted.load(Relaxed) {
        let (done, all) = (cells.len() + left_out.len(), storms.len());
        say(format_args!(
            ": interrupted in storm {done} of {all}: the result is of what was measured until then"
        ));
    }
    let is_taken = json.as_ref().is_some_and(Output::is_standard);
    let kept = [json.map_or(Ok(()), |json| json.write_json(&cells)), Output::show(&table, is_taken)];
    Ok(ended(cells.iter().all(|cell| cell.cell.is_good()), kept))
}

fn load_name(load: Load) -> &'static str {
    match load {
        Load::Storm => "storm",
        Load::Bystanders => "bystanders",
        Load::Uncontended => "uncontended",
        Load::Busy => "busy",
        Load::Quiet => "quiet",
    }
}

/// Runs of a storm, and what its cell is made of.
#[derive(Debug, Default)]
struct Runs {
    measured: Vec<Measured>,
    failures: Vec<String>,
}

impl Runs {
    /// As many as are asked for, or until `interrupted`.
    ///
    /// # Errors
    ///
    /// Not even the first can be had here.
    fn of(
        repeat: usize,
        interrupted: &AtomicBool,
        mut blow: impl FnMut() -> Result<KernelRun>,
    ) -> Result<Self> {
        let mut runs = Self::default();
        for turn in 0..repeat {
            match blow() {
                Ok(KernelRun { measured, failures }) => {
                    runs.measured.push(measured);
                    runs.failures.extend(failures);
                }
                Err(why) if turn == 0 => return Err(why),
                // What could be had a moment ago.
                Err(why) => {
                    runs.failures.push(format!("run {} of {repeat} could not begin: {why:#}", turn + 1));
                    break;
                }
            }
            if interrupted.load(Relaxed) {
                break;
            }
        }
        Ok(runs)
    }

    /// Adds what went wrong in a run that is not to be measured.
    fn add_recorded(&mut self, KernelRun { measured, failures }: &KernelRun) {
        let wrong = (measured.wrong_pages > 0).then(|| show_number(measured.wrong_pages, "wrong page"));
        let failures = wrong.iter().chain(failures);
        self.failures.extend(failures.map(|what| format!("in the run that was recorded: {what}")));
    }
}

fn cell(
    storm: &KernelStorm,
    repeat: usize,
    facts: &KvmFacts,
    interrupted: &AtomicBool,
) -> Result<KernelCell> {
    let tables = Tables::of(facts.kind, facts.tdp_mmu, parameter);
    let mut runs = Runs::of(repeat, interrupted, || storm.blow(interrupted))?;
    let (watched, untraced) = match watch(storm, tables, interrupted) {
        None => (None, None),
        Some(Ok(RecordedRun { run, watched })) => {
            runs.add_recorded(&run);
            told(watched)
        }
        Some(Err(why)) => told(Err(why)),
    };
    let Runs { measured: runs, failures } = runs;
    let mut cell = KernelCell {
        cell: Cell {
            scenario: storm.scenario,
            engine: Engine::Kernel(format!("Linux {}", rustix::system::uname().release().to_string_lossy())),
            load: storm.load,
            policies: None,
            vcpus: storm.vcpus as u64,
            threads: storm.threads as u64,
            memory_bytes: storm.memory,
            seed: storm.seed,
            runs: runs.len() as u64,
            median: Measured::median(&runs),
            min: Measured::least(&runs),
            max: Measured::greatest(&runs),
            failures,
        },
        by: storm.by,
        kvm: facts.kind.to_string(),
        tables,
        watched,
        not_available: BTreeMap::new(),
    };
    cell.explain(untraced.as_deref());
    Ok(cell)
}

/// One more run, recorded; none of a part of a storm, and of what no thread of ours marks.
fn watch(storm: &KernelStorm, tables: Tables, interrupted: &AtomicBool) -> Option<Result<RecordedRun>> {
    let is_marked = storm.load == Load::Storm && storm.by != By::Ksm;
    let recorded = KernelStorm { duration: storm.duration.min(RECORDED), ..*storm };
    is_marked.then(|| recorded.watch(tables, interrupted))
}

/// What a trace tells, or why there is none.
fn told(watched: Result<Watched>) -> (Option<Watched>, Option<String>) {
    match watched.context("no run could be recorded") {
        Ok(watched) => (Some(watched), None),
        Err(why) => (None, Some(format!("{why:#}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(wrong_pages: u64, failures: &[&str]) -> KernelRun {
        let failures = failures.iter().map(|&what| what.to_owned()).collect();
        KernelRun { measured: Measured { wrong_pages, ..Measured::default() }, failures }
    }

    fn runs(blown: Vec<Result<KernelRun>>) -> Result<Runs> {
        let mut blown = blown.into_iter();
        Runs::of(blown.len(), &AtomicBool::new(false), || blown.next().expect("no more than these"))
    }

    #[test]
    fn more_memory_than_there_is_is_refused() {
        let available = memory::available("MemTotal:  9 kB\nMemFree: 1 kB\nMemAvailable:    4194304 kB\n");
        assert_eq!(available, Some(4 << 30));
        assert!(fits(Scenario::A, 4 << 30, available).is_ok());
        let refused = fits(Scenario::A, 64 << 30, available).expect_err("too much").to_string();
        assert!(refused.contains("takes 64 GiB of memory, and this host has 4 GiB available"), "{refused}");
        assert!(fits(Scenario::A, 64 << 30, memory::available("")).is_ok(), "nobody knows");
    }

    #[test]
    fn what_cannot_be_had_is_no_run() {
        let why = runs(vec![Err(anyhow!("no KSM")), Ok(run(0, &[]))]).expect_err("nothing ran");
        assert_eq!(why.to_string(), "no KSM");
    }

    /// Neither its wrong pages are lost, nor the runs before it.
    #[test]
    fn a_guest_that_dies_is_a_failure() {
        let runs = runs(vec![Ok(run(0, &[])), Ok(run(3, &["vCPU 0 is gone"])), Err(anyhow!("no memory"))]);
        let mut runs = runs.expect("two ran");
        assert_eq!(runs.measured.len(), 2);
        assert_eq!(Measured::greatest(&runs.measured).wrong_pages, 3);
        assert_eq!(runs.failures, ["vCPU 0 is gone", "run 3 of 3 could not begin: no memory"]);
        runs.failures.clear();
        runs.add_recorded(&run(0, &[]));
        assert!(runs.failures.is_empty(), "nothing was wrong in it");
        runs.add_recorded(&run(1, &["it hangs"]));
        let told = ["1 wrong page", "it hangs"].map(|what| format!("in the run that was recorded: {what}"));
        assert_eq!((runs.failures, runs.measured.len()), (told.to_vec(), 2));
    }
}
