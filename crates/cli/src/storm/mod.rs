//! `afterimage storm`: what a change to the kernel's fault path did, measured.

mod kernel;
mod options;
mod report;
mod simulate;
mod table;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering::Relaxed;

use afterimage_storm::{Cell, Load, Outcome, Outcomes};
use anyhow::{Result, anyhow};
use indicatif::{ProgressBar, ProgressStyle};

pub(crate) use self::options::StormArgs;
use self::options::StormPlan;
use self::table::Table;
use crate::output::{Output, ended, say};
use crate::signals::interrupted;
use crate::units::show_number;

/// What is said of a storm that was interrupted at its very beginning.
const NOTHING: &str = "interrupted before anything was measured: nothing was written";

/// Lets a storm blow, and reports.
pub(crate) fn run(args: StormArgs) -> Result<ExitCode> {
    if !args.beside.is_empty() {
        Output::show(&kernel::beside(&args.beside)?, false)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.kernel {
        return kernel::run(&args.kernel_plan()?);
    }
    let plan = args.plan()?;
    // Opened first: a storm whose result cannot be kept does not blow.
    let open = |path: &Option<PathBuf>| path.as_deref().map(Output::open).transpose();
    let (json, trace, report) = (open(&plan.json)?, open(&plan.trace)?, open(&plan.report)?);
    let outputs: Vec<_> = [&json, &trace, &report].into_iter().flatten().collect();
    Output::check_apart(&outputs)?;
    let is_taken = outputs.into_iter().any(Output::is_standard);
    let interrupted = interrupted()?;
    let runs = plan.matrix.runs();
    say(format_args!(" storm: {} of {:?} each", show_number(runs as u64, "run"), plan.duration));
    let bar = bar(runs);
    let tell = |done: usize, what: &str| {
        bar.set_position(done as u64);
        bar.set_message(what.to_owned());
    };
    let (worth, Outcomes { outcomes, stopped }) = if plan.simulates {
        let (worth, outcomes) = simulate::simulate(&plan, &interrupted, tell)?;
        (worth.to_string(), Outcomes { outcomes, stopped: None })
    } else {
        let outcomes = plan.matrix.run(&interrupted, |done, storm| {
            let load = match storm.load {
                Load::Storm | Load::Bystanders => storm.policies.to_string(),
                Load::Uncontended => "uncontended".to_owned(),
                Load::Busy => "busy".to_owned(),
                Load::Quiet => "quiet".to_owned(),
            };
            tell(done, &format!("{} {load}", storm.scenario));
        });
        (String::new(), outcomes)
    };
    bar.finish_and_clear();
    let cells: Vec<Cell> = outcomes.iter().map(|Outcome { cell, .. }| cell.clone()).collect();
    if cells.is_empty() {
        return Err(stopped.map_or(anyhow!(NOTHING), Into::into));
    }
    let done = cells.iter().map(|cell| cell.runs).sum::<u64>();
    let part = "the result is of what was measured until then";
    if interrupted.load(Relaxed) {
        say(format_args!(": interrupted in run {done} of {runs}: {part}"));
    }
    let all = stopped.map_or(Ok(()), |why| Err(anyhow!("stopped after run {done} of {runs}: {why}; {part}")));
    // One that cannot be kept does not take the others with it.
    let kept = [
        all,
        json.map_or(Ok(()), |json| json.write_json(&cells)),
        trace.map_or(Ok(()), |trace| trace.write(&trace::trace(&outcomes).to_string())),
        report.map_or(Ok(()), |report| report.write(&report::page(&outcomes, &made(&plan)))),
        Output::show(&format!("{worth}{}", Table(&cells)), is_taken),
    ];
    Ok(ended(cells.iter().all(Cell::is_good), kept))
}

/// On what it was measured and how, in a few words.
fn made(plan: &StormPlan) -> String {
    let system = rustix::system::uname();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("?");
    let time = if plan.simulates { "Simulated in virtual time, with costs measured by" } else { "By" };
    format!(
        "{time} afterimage {}{} on {}, Linux {}, load average {load} at the end; {:?} a run, seed {}",
        env!("CARGO_PKG_VERSION"),
        if cfg!(debug_assertions) { ", built without optimisation (slow)," } else { "" },
        show_number(cpus as u64, "CPU"),
        system.release().to_string_lossy(),
        plan.duration,
        plan.matrix.seed,
    )
}

/// How far it is, of `runs`.
fn bar(runs: usize) -> ProgressBar {
    let bar = ProgressBar::new(runs as u64);
    let style = ProgressStyle::with_template("{elapsed:>4} {bar:20} {pos}/{len} {wide_msg}");
    bar.set_style(style.expect("the template is well-formed"));
    bar
}
