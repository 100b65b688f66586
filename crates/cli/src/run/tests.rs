//! Runs that do not end in order, since their source does not answer.

use std::sync::atomic::AtomicU64;
use std::sync::{Condvar, Mutex};

use afterimage_memory::{Content, MemoryError, Pattern, PatternSource, Source};
use afterimage_mmu::{Gfn, GfnRange, Pfn};
use afterimage_testing::skip;
use afterimage_uffd::{FaultOrigin, OpenOptions};
use clap::Parser;

use super::machine::Words;
use super::*;

/// Pages that come before the source falls silent.
const PAGES: u64 = 50;
const PATIENCE: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_millis(50);

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    run: RunArgs,
}

fn plan(guest: &str) -> RunPlan {
    let options = ["run", "--memory", "2m", "--resident", "2m", "--vcpus", "1", "--invalidate", "none"];
    let command = Command::try_parse_from(options.into_iter().chain(["--guest", guest]));
    command.expect("good options").run.plan().expect("a good plan")
}

/// A source that gives some pages, and does not answer then until it is let go.
#[derive(Debug)]
struct Silent {
    pages: PatternSource,
    asked: AtomicU64,
    is_let_go: Mutex<bool>,
    changed: Condvar,
}

impl Silent {
    fn new(pattern: Pattern, plan: &RunPlan) -> Arc<Self> {
        let frames = GfnRange::new(Gfn::new(0), Gfn::new(plan.memory >> 12));
        Arc::new(Self {
            pages: PatternSource::new(pattern, frames),
            asked: AtomicU64::new(0),
            is_let_go: Mutex::new(false),
            changed: Condvar::new(),
        })
    }

    /// Waits until somebody asks in vain.
    fn wait_asked(&self) {
        let started = Instant::now();
        while self.asked.load(Ordering::Relaxed) <= PAGES {
            assert!(started.elapsed() < PATIENCE, "the guest asks for nothing");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn let_go(&self) {
        *self.is_let_go.lock().expect("nobody panics") = true;
        self.changed.notify_all();
    }
}

impl Source for Silent {
    fn len_bytes(&self) -> u64 {
        self.pages.len_bytes()
    }

    fn read(&self, frame: Pfn, out: &mut [u8]) -> Result<Content, MemoryError> {
        if self.asked.fetch_add(1, Ordering::Relaxed) >= PAGES {
            let is_let_go = self.is_let_go.lock().expect("nobody panics");
            drop(self.changed.wait_while(is_let_go, |is_let_go| !*is_let_go));
        }
        self.pages.read(frame, out)
    }
}

/// Runs `guest` on a source that falls silent. What it comes to, as JSON.
fn run_into_silence(guest: &str) -> serde_json::Value {
    let plan = plan(guest);
    let pattern = Pattern::new(plan.seed);
    let source = Silent::new(pattern, &plan);
    let machine =
        Machine::restore(&plan, Arc::clone(&source) as _, Words::Pattern(pattern)).expect("it starts");
    let pressure = Pressure::start(&plan, &machine).expect("it starts");
    source.wait_asked();
    let mut ending = Ending::default();
    ending.fail("found before");
    let report = RunReport::new(&plan, stop(machine, pressure, ending, SOON));
    source.let_go();
    assert!(!report.is_good());
    serde_json::to_value(&report).expect("it can be written")
}

fn has_failure(report: &serde_json::Value, what: &str) -> bool {
    let failures = report["failures"].as_array().expect("a list");
    failures.iter().filter_map(serde_json::Value::as_str).any(|failure| failure.contains(what))
}

#[test]
fn a_worker_that_does_not_end_is_told_with_all_the_rest() {
    if let Err(error) = OpenOptions::new().origin(FaultOrigin::UserMode).probe() {
        return skip("a_worker_that_does_not_end_is_told_with_all_the_rest", error);
    }
    let report = run_into_silence("thread");
    for what in
        ["found before", "vCPU 0 was still waiting for gfn", "worker 0, which serves faults, did not end"]
    {
        assert!(has_failure(&report, what), "{what}: {report:#}");
    }
    assert!(report["accesses"].as_u64().is_some_and(|count| count > 0), "{report:#}");
}

#[test]
fn a_vcpu_that_does_not_stop_is_told_with_all_the_rest() {
    let report = run_into_silence("soft");
    for what in ["found before", "vCPU [0] did not stop", "vCPU 0 has not ended, and is at gfn"] {
        assert!(has_failure(&report, what), "{what}: {report:#}");
    }
    assert!(report["accesses"].as_u64().is_some_and(|count| count > 0), "{report:#}");
}
