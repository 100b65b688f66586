//! `afterimage storm`: what a change to the kernel's fault path did, measured.

mod kernel;
mod options;
mod output;
mod table;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use afterimage_storm::{Cell, Load, Outcome};
use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};

pub(crate) use self::options::StormArgs;
use self::output::Output;
use self::table::Table;
use crate::EXIT_WRONG;

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
    let json = plan.json.as_deref().map(Output::open).transpose()?;
    let interrupted = interrupted()?;
    let bar = bar(plan.matrix.runs());
    let outcomes = plan.matrix.run(&interrupted, |done, storm| {
        bar.set_position(done as u64);
        let load = match storm.load {
            Load::Storm => storm.policies.to_string(),
            Load::Uncontended => "uncontended".to_owned(),
            Load::Quiet => "quiet".to_owned(),
        };
        bar.set_message(format!("{} {load}", storm.scenario));
    })?;
    bar.finish_and_clear();
    let cells: Vec<Cell> = outcomes.iter().map(|Outcome { cell, .. }| cell.clone()).collect();
    let is_taken = json.as_ref().is_some_and(Output::is_standard);
    if let Some(json) = json {
        json.write(&format!("{}\n", serde_json::to_string_pretty(&cells)?))?;
    }
    Output::show(&Table(&cells).to_string(), is_taken)?;
    Ok(if cells.iter().all(Cell::is_good) { ExitCode::SUCCESS } else { ExitCode::from(EXIT_WRONG) })
}

/// A flag that SIGINT and SIGTERM raise.
fn interrupted() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The second time, the default: whoever insists gets out.
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&interrupted))?;
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }
    Ok(interrupted)
}

/// How far it is, of `runs`.
fn bar(runs: usize) -> ProgressBar {
    let bar = ProgressBar::new(runs as u64);
    let style = ProgressStyle::with_template("{elapsed:>4} {bar:20} {pos}/{len} {wide_msg}");
    bar.set_style(style.expect("the template is well-formed"));
    bar
}
