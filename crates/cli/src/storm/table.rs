//! Cells as a table for people: a block for each scenario, a column for each cell, a row for each number.

use std::fmt::{self, Display};
use std::time::Duration;

use afterimage_storm::{Cell, Latency, Load, Measured, Scenario};

use crate::units::{show_bytes, show_count, show_duration, show_number};

/// Width of the rows' names.
const NAMES: usize = 24;
/// Width of a column.
const COLUMN: usize = 18;
/// Columns beside each other.
const COLUMNS: usize = 6;

/// What is said of vCPUs that the storm does not aim at.
pub(super) const BYSTANDERS: &str =
    "the vCPUs are bystanders: they fault on memory of their own, which nobody takes";

/// Cells, whoever measured them.
#[derive(Debug)]
pub(crate) struct Table<'c>(pub(crate) &'c [Cell]);

/// A row: its name, and what it says of a cell's numbers.
type Row = (&'static str, fn(&Measured) -> Option<String>);

const ROWS: &[Row] = &[
    ("flushes/invalidation", |m| m.flushes_per_invalidation.map(ratio)),
    ("  for who waits", |m| m.flushes_for_waiters_per_invalidation.map(ratio)),
    ("  for the scheduler", |m| m.flushes_for_scheduler_per_invalidation.map(ratio)),
    ("yields/invalidation", |m| m.yields_per_invalidation.map(ratio)),
    ("  to who waits", |m| m.yields_to_waiters_per_invalidation.map(ratio)),
    ("invalidations", |m| Some(show_count(m.invalidations))),
    ("  median", |m| m.invalidation_ns.as_ref().map(|times| ns(times.median))),
    ("  longest", |m| m.invalidation_ns.as_ref().map(|times| ns(times.max))),
    ("  mean", |m| m.invalidation_ns.as_ref().map(|times| ns(times.mean))),
    ("  CPU time", |m| m.invalidation_cpu_ns.map(ns)),
    ("faults", |m| m.faults.map(show_count)),
    ("retries/fault", |m| m.retries_per_fault.map(ratio)),
    ("  before fault-in", |m| {
        m.retries.as_ref().map(|retries| share(retries.before_fault_in, retries.all()))
    }),
    ("  after fault-in", |m| m.retries.as_ref().map(|retries| share(retries.after_fault_in, retries.all()))),
    ("  under the lock", |m| m.retries.as_ref().map(|retries| share(retries.under_lock, retries.all()))),
    ("  lost race", |m| m.retries.as_ref().map(|retries| share(retries.lost_race, retries.all()))),
    ("  most of one fault", |m| m.most_retries.map(show_count)),
    ("ends seen by a fault", |m| m.most_ends.map(show_count)),
    ("wasted fault-ins", |m| m.wasted_fault_ins.map(show_count)),
    ("doomed lock takings", |m| m.doomed_lock_acquisitions.map(show_count)),
    ("doomed CPU time", |m| m.doomed_cpu_ns.map(ns)),
    ("lock wait of faults", |m| m.lock_wait_ns.as_ref().map(|wait| ns(wait.faults))),
    ("  of invalidations", |m| m.lock_wait_ns.as_ref().map(|wait| ns(wait.invalidations))),
    ("fault inside     p50", |m| inside(m, |latency| Some(latency.p50))),
    ("                 p99", |m| inside(m, Latency::p99)),
    ("               p99.9", |m| inside(m, Latency::p999)),
    ("                 max", |m| inside(m, |latency| Some(latency.max))),
    ("fault outside    p50", |m| outside(m, |latency| Some(latency.p50))),
    ("                 p99", |m| outside(m, Latency::p99)),
    ("               p99.9", |m| outside(m, Latency::p999)),
    ("                 max", |m| outside(m, |latency| Some(latency.max))),
    ("accesses/s", |m| m.accesses.map(|count| show_count(per_second(count, m.elapsed_ns)))),
    ("WRONG PAGES", |m| Some(show_count(m.wrong_pages))),
];

fn ratio(ratio: f64) -> String {
    match ratio {
        ratio if ratio >= 1000.0 => show_count(ratio.round() as u64),
        ratio if ratio >= 10.0 => format!("{ratio:.1}"),
        0.0 => "0".to_owned(),
        ratio if ratio < 0.01 => format!("{ratio:.1e}"),
        ratio => format!("{ratio:.2}"),
    }
}

fn share(part: u64, whole: u64) -> String {
    match whole {
        0 => "0".to_owned(),
        _ => format!("{:.1} %", part as f64 * 100.0 / whole as f64),
    }
}

fn ns(ns: u64) -> String {
    show_duration(Duration::from_nanos(ns))
}

fn inside(measured: &Measured, value: fn(&Latency) -> Option<u64>) -> Option<String> {
    measured.latency_ns.inside.as_ref().and_then(value).map(ns)
}

fn outside(measured: &Measured, value: fn(&Latency) -> Option<u64>) -> Option<String> {
    measured.latency_ns.outside.as_ref().and_then(value).map(ns)
}

fn per_second(count: u64, ns: u64) -> u64 {
    (count as f64 * 1e9 / ns.max(1) as f64) as u64
}

/// How many runs medians are of: one that was interrupted may have left cells with fewer than the others.
pub(super) fn runs(runs: impl Iterator<Item = u64> + Clone) -> String {
    let (least, most) = (runs.clone().min().unwrap_or(0), runs.max().unwrap_or(0));
    let most_shown = show_number(most, "run");
    if least == most { most_shown } else { format!("{} to {most_shown}", show_count(least)) }
}

/// What is said of a cell whose vCPUs had to leave before their faults were served.
pub(super) fn cut_off(cell: &Cell) -> Option<String> {
    let faults = cell.max.unfinished_faults.filter(|&faults| faults > 0)?;
    let faults = show_number(faults, "fault");
    Some(format!("{faults} of one run did not end: what is told of faults may look better than it is"))
}

/// The lines over a cell's column: who measured, and what was chosen.
fn head(cell: &Cell) -> [String; 6] {
    let engine = cell.engine.to_string();
    match (cell.load, &cell.policies) {
        (Load::Uncontended, _) => {
            [engine, "uncontended:".into(), "no faults".into(), "".into(), "".into(), "".into()]
        }
        (Load::Busy, _) => {
            [engine, "busy: vCPUs".into(), "that do not fault".into(), "".into(), "".into(), "".into()]
        }
        (Load::Quiet, _) => {
            [engine, "quiet:".into(), "no invalidations".into(), "".into(), "".into(), "".into()]
        }
        (Load::Storm | Load::Bystanders, None) => {
            [engine, "as it is".into(), "".into(), "".into(), "".into(), "".into()]
        }
        (Load::Storm | Load::Bystanders, Some(policies)) => [
            policies.name().map_or(engine, str::to_owned),
            format!("precheck {}", policies.precheck),
            format!("yield {}", policies.yielding),
            format!("sequence {}", policies.sequence),
            format!("{}, {}", policies.coverage, policies.turns),
            format!("{}, {}", policies.witness, policies.after_retry),
        ],
    }
}

impl Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &scenario in Scenario::ALL {
            let cells: Vec<&Cell> = self.0.iter().filter(|cell| cell.scenario == scenario).collect();
            for block in cells.chunks(COLUMNS) {
                write_block(f, scenario, block)?;
            }
        }
        for cell in self.0 {
            if let Some(cut_off) = cut_off(cell) {
                writeln!(f, "CUT OFF: {} {}: {cut_off}", cell.scenario, head(cell)[0])?;
            }
            // The median of several runs may be none.
            if cell.max.wrong_pages > 0 {
                let pages = show_number(cell.max.wrong_pages, "wrong page");
                writeln!(f, "FAILED: {} {}: {pages} in one run", cell.scenario, head(cell)[0])?;
            }
            for failure in &cell.failures {
                writeln!(f, "FAILED: {} {}: {failure}", cell.scenario, cell.engine)?;
            }
        }
        Ok(())
    }
}

fn write_block(f: &mut fmt::Formatter<'_>, scenario: Scenario, cells: &[&Cell]) -> fmt::Result {
    let first = cells[0];
    writeln!(f, "{scenario}: {}", scenario.sentence())?;
    if cells.iter().any(|cell| cell.load == Load::Bystanders) {
        writeln!(f, "{:NAMES$}{BYSTANDERS}", "")?;
    }
    writeln!(
        f,
        "{:NAMES$}{} of memory, {}, {} invalidating; medians of {}",
        "",
        show_bytes(first.memory_bytes),
        show_number(first.vcpus, "vCPU"),
        first.threads,
        runs(cells.iter().map(|cell| cell.runs))
    )?;
    let heads: Vec<_> = cells.iter().map(|cell| head(cell)).collect();
    for line in 0..heads[0].len() {
        write_line(f, "", heads.iter().map(|head| head[line].clone()))?;
    }
    for (name, value) in ROWS {
        let values: Vec<_> = cells.iter().map(|cell| value(&cell.median)).collect();
        // What nobody here can know needs no row.
        if values.iter().any(Option::is_some) {
            write_line(f, name, values.into_iter().map(|value| value.unwrap_or_else(|| "–".to_owned())))?;
        }
    }
    writeln!(f)
}

fn write_line(f: &mut fmt::Formatter<'_>, name: &str, values: impl Iterator<Item = String>) -> fmt::Result {
    let line = values.fold(format!("{name:NAMES$}"), |line, value| line + &format!("{value:>COLUMN$}"));
    writeln!(f, "{}", line.trim_end())
}

#[cfg(test)]
mod tests {
    use afterimage_storm::{Engine, Policies};

    use super::*;

    fn cell(policies: Policies, max: Measured) -> Cell {
        Cell {
            scenario: Scenario::A,
            engine: Engine::Afterimage,
            load: Load::Storm,
            policies: Some(policies),
            vcpus: 2,
            threads: 1,
            memory_bytes: 1 << 20,
            seed: 1,
            runs: 3,
            median: Measured::default(),
            min: Measured::default(),
            max,
            failures: Vec::new(),
        }
    }

    #[test]
    fn medians_are_of_as_many_runs_as_there_were() {
        let table = |runs: [u64; 2]| {
            let cells = runs.map(|runs| Cell { runs, ..cell(Policies::LINUX, Measured::default()) });
            Table(&cells).to_string()
        };
        assert!(table([3, 3]).contains("; medians of 3 runs\n"), "{}", table([3, 3]));
        assert!(table([2, 1]).contains("; medians of 1 to 2 runs\n"), "{}", table([2, 1]));
    }

    #[test]
    fn a_wrong_page_in_one_of_three_runs_is_told_of() {
        let table = |wrong_pages| {
            let max = Measured { wrong_pages, ..Measured::default() };
            Table(&[cell(Policies::OURS, max)]).to_string()
        };
        assert!(!table(0).contains("FAILED"));
        let wrong = table(1);
        assert!(wrong.contains("FAILED: A ours: 1 wrong page in one run\n"), "{wrong}");
    }

    #[test]
    fn faults_that_were_cut_off_are_told_of() {
        let table = |unfinished| {
            let max = Measured { unfinished_faults: Some(unfinished), ..Measured::default() };
            Table(&[cell(Policies::BEFORE, max)]).to_string()
        };
        assert!(!table(0).contains("CUT OFF"));
        let one = table(1);
        assert!(one.contains("CUT OFF: A before the change: 1 fault of one run did not end"), "{one}");
    }
}
