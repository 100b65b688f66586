//! `afterimage run`: a guest verifies its memory while that is taken away.

mod live;
mod machine;
mod options;
mod pressure;
mod report;

use std::fs::File;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};

use self::live::LiveLine;
use self::machine::Machine;
pub(crate) use self::options::RunArgs;
use self::options::RunPlan;
use self::pressure::Pressure;
use self::report::{Outcome, RunReport};
use crate::EXIT_WRONG;

/// How often the run is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often the live line changes.
const SHOW_EVERY: Duration = Duration::from_millis(250);
/// A guest that makes no access for so long hangs.
const STALL: Duration = Duration::from_secs(10);

/// Runs a guest and reports.
pub(crate) fn run(args: RunArgs) -> Result<ExitCode> {
    let mut plan = args.plan()?;
    // Opened first: a run whose result cannot be kept does not start.
    let json = plan.json.as_deref().map(Output::create).transpose()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The second time, the default: whoever insists gets out.
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&interrupted))?;
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }

    let machine = Machine::start(&mut plan)?;
    eprintln!(
        "afterimage run: {}; {} vCPUs, {} of memory, {} resident, {} pages",
        plan.guest_because,
        plan.vcpus,
        crate::units::show_bytes(plan.memory),
        crate::units::show_bytes(plan.resident),
        crate::units::show_bytes(plan.page_size.bytes()),
    );
    let pressure = Pressure::start(&plan, &machine.object, &machine.guest)?;
    let mut failures = watch(&plan, &machine, &pressure, &interrupted);
    let outcome = stop(machine, pressure, &mut failures)?;
    let report = RunReport::new(&plan, outcome);
    print!("{report}");
    if let Some(json) = json {
        json.write(&report)?;
    }
    Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_WRONG) })
}

/// Waits for the end of the time, for Ctrl-C, or for something to go wrong, which it returns.
fn watch(plan: &RunPlan, machine: &Machine, pressure: &Pressure, interrupted: &AtomicBool) -> Vec<String> {
    let started = Instant::now();
    let mut line = LiveLine::start(plan.duration, machine);
    let mut shown = started;
    let mut progress = (started, 0);
    let mut failures = Vec::new();
    while started.elapsed() < plan.duration && !interrupted.load(Ordering::Relaxed) {
        thread::sleep(LOOK_EVERY.min(plan.duration.saturating_sub(started.elapsed())));
        if machine.guest.failure().is_some() || machine.workers.has_failed() || pressure.has_failed() {
            // Which of them, and why, is found when they are stopped.
            break;
        }
        let accesses = machine.guest.counters().accesses;
        if accesses != progress.1 {
            progress = (Instant::now(), accesses);
        } else if progress.0.elapsed() > STALL {
            failures.push(format!("the guest hangs: no access for {STALL:?}"));
            break;
        }
        if shown.elapsed() >= SHOW_EVERY {
            shown = Instant::now();
            line.update(started.elapsed(), machine);
        }
    }
    line.finish();
    failures
}

/// Stops everything in order: the guest while its faults are still served, then what takes memory away, then the workers.
fn stop(machine: Machine, pressure: Pressure, failures: &mut Vec<String>) -> Result<Outcome> {
    let Machine { object, mmu, guest, workers, poisoned } = machine;
    let guest = guest.stop().context("the guest could not be stopped")?;
    if let Err(error) = pressure.stop() {
        failures.push(format!("taking memory away failed: {error}"));
    }
    if let Err(error) = workers.stop() {
        failures.push(format!("serving faults failed: {error}"));
    }
    if let Some(failure) = guest.failure() {
        failures.push(failure.to_string());
    }
    for report in poisoned.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        failures.push(report.error.to_string());
    }
    object.detach_all();
    Ok(Outcome {
        guest,
        faults: mmu.fault_stats(),
        invalidations: mmu.invalidation_stats(),
        object: object.stats(),
        store: object.store_stats(),
        bookkeeping_bytes: object.bookkeeping_bytes(),
        failures: std::mem::take(failures),
    })
}

/// Where the JSON goes.
enum Output {
    Standard,
    File { file: File, path: std::path::PathBuf },
}

impl Output {
    fn create(path: &std::path::Path) -> Result<Self> {
        if path.as_os_str() == "-" {
            return Ok(Self::Standard);
        }
        let file =
            File::create(path).with_context(|| format!("--json {} cannot be written", path.display()))?;
        Ok(Self::File { file, path: path.to_owned() })
    }

    fn write(self, report: &RunReport) -> Result<()> {
        let mut text = serde_json::to_string_pretty(report)?;
        text.push('\n');
        match self {
            Self::Standard => io::stdout().write_all(text.as_bytes()).context("the JSON cannot be written"),
            Self::File { mut file, path } => file
                .write_all(text.as_bytes())
                .with_context(|| format!("the JSON cannot be written to {}", path.display())),
        }
    }
}
