//! `afterimage run`: a guest verifies its memory while that is taken away.

mod choices;
mod dirty;
mod ending;
mod hosts;
mod live;
mod machine;
mod options;
mod pressure;
mod progress;
mod report;
mod served;
mod soft;
mod source_file;
mod stop;
mod threads;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use self::ending::Ending;
use self::live::LiveLine;
use self::machine::{Host, Machine};
pub(crate) use self::options::RunArgs;
use self::options::RunPlan;
use self::pressure::Pressure;
use self::progress::{Progress, STALL};
use self::report::{Outcome, RunReport};
use self::source_file::SourceFile;
use crate::output::{Output, ended, say};
use crate::signals::interrupted;
use crate::units;

/// How often the run is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often the live line changes.
const SHOW_EVERY: Duration = Duration::from_millis(250);
/// How long threads may take to end when they are asked to.
const GRACE: Duration = Duration::from_secs(10);

/// Runs a guest and reports.
pub(crate) fn run(args: RunArgs) -> Result<ExitCode> {
    let mut plan = args.plan()?;
    // Opened first: a run whose result cannot be kept does not start.
    let json = plan.json.as_deref().map(Output::open).transpose()?;
    let json = match &plan.shown.source {
        Some(source) => json.map(|json| json.other_than(source)).transpose()?,
        None => json,
    };
    let source = plan.shown.source.as_deref().map(SourceFile::new).transpose()?;
    let interrupted = interrupted()?;

    let machine = Machine::start(&mut plan, &interrupted)?;
    say(format_args!(
        " run: {}; {}, {} of memory, {} resident, {} pages",
        plan.guest_because,
        units::show_number(plan.vcpus as u64, "vCPU"),
        units::show_bytes(plan.memory),
        units::show_bytes(plan.resident),
        units::show_bytes(plan.page_size.bytes()),
    ));
    finish(&plan, machine, source, json, &interrupted)
}

/// Runs to the end and reports: what goes wrong from here on is a result.
fn finish(
    plan: &RunPlan,
    machine: Machine,
    source: Option<SourceFile>,
    json: Option<Output>,
    interrupted: &AtomicBool,
) -> Result<ExitCode> {
    let pressure = Pressure::start(plan, &machine)?;
    let ending = watch(plan, &machine, &pressure, interrupted);
    let mut outcome = stop(machine, pressure, ending, GRACE);
    // Who interrupts a run at its start has not shown anything to be wrong.
    if outcome.guest.counters().accesses == 0 && !interrupted.load(Ordering::Relaxed) {
        outcome.failures.push("the guest made no access at all".to_owned());
    }
    if outcome.guest.counters().wrong > 0 {
        outcome.failures.extend(source.and_then(|source| source.explanation()));
    }
    let report = RunReport::new(plan, outcome);
    // The JSON first: it is for programs, which wait for it, and the table for a reader, who may have gone.
    let is_taken = json.as_ref().is_some_and(Output::is_standard);
    let kept =
        [json.map_or(Ok(()), |json| json.write_json(&report)), Output::show(&report.to_string(), is_taken)];
    Ok(ended(report.is_good(), kept))
}

/// Waits for the end of the time, for Ctrl-C, or for something to go wrong, which it returns. On a machine so busy that the guest
/// has made no access by then, it gets more time.
fn watch(plan: &RunPlan, machine: &Machine, pressure: &Pressure, interrupted: &AtomicBool) -> Ending {
    let started = Instant::now();
    let mut line = LiveLine::start(plan.duration, machine);
    let mut shown = started;
    let mut progress = Progress::new(machine.guest.vcpus(), started);
    let mut ending = Ending::default();
    while (started.elapsed() < plan.duration || progress.is_none()) && !interrupted.load(Ordering::Relaxed) {
        let left = plan.duration.saturating_sub(started.elapsed());
        thread::sleep(if left.is_zero() { LOOK_EVERY } else { LOOK_EVERY.min(left) });
        let served = match &machine.host {
            Host::Served(served) => !served.has_failed(),
            Host::Soft(_) => true,
        };
        if machine.guest.failure().is_some() || !served || pressure.has_failed() {
            // Which of them, and why, is found when they are stopped.
            break;
        }
        let hanging = progress.look(&machine.guest);
        if !hanging.is_empty() {
            let why = hanging.iter().map(|vcpu| format!("vCPU {vcpu} hangs: no access for {STALL:?}"));
            ending.failures.extend(why);
            break;
        }
        if shown.elapsed() >= SHOW_EVERY {
            shown = Instant::now();
            line.update(started.elapsed(), machine);
        }
    }
    line.finish();
    ending
}

/// Stops everything in order: the guest while its faults are still served, then what takes memory away, then the workers. Who
/// does not end within `grace` is left behind.
fn stop(machine: Machine, pressure: Pressure, mut ending: Ending, grace: Duration) -> Outcome {
    let Machine { object, engine, guest, host } = machine;
    let handle = guest.handle();
    let guest = guest.stop().unwrap_or_else(|error| {
        ending.leave(format!("the guest could not be stopped: {error}"));
        handle.report()
    });
    let (counts, nx_blocks) = (Arc::clone(&pressure.dirty), Arc::clone(&pressure.nx_blocks));
    pressure.stop(grace, &mut ending);
    if let Some(failure) = guest.failure() {
        ending.fail(failure.to_string());
    }
    match host {
        Host::Served(served) => served.stop(grace, &mut ending),
        Host::Soft(soft) => soft.stop(&mut ending),
    }
    if !ending.is_left {
        // It waits for invalidations that are under way.
        object.detach_all();
    }
    Outcome {
        guest,
        faults: engine.fault_stats(),
        invalidations: engine.invalidation_stats(),
        object: object.stats(),
        store: object.store_stats(),
        bookkeeping_bytes: object.bookkeeping_bytes(),
        dirty: counts.get(),
        nx_recovered_blocks: nx_blocks.load(Ordering::Relaxed),
        failures: ending.failures,
    }
}

#[cfg(test)]
mod tests;
