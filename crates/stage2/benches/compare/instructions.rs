//! Instructions, counted under callgrind: a figure that no neighbour on the machine can blur.
//!
//! A benchmark runs itself under `valgrind --tool=callgrind`, with one and with two times so many units of work; the difference
//! is the units alone. Says so loudly if valgrind is missing.

use std::process::{Command, ExitCode};

/// Units of one run: what is counted does so many, or two times so many.
pub(crate) const UNITS: u64 = 1 << 16;
const CHILD: &str = "AFTERIMAGE_COUNT";

/// Does as many units of work as it is told.
pub(crate) type Run = fn(u64);

/// Things whose instructions are counted.
pub(crate) struct Counted {
    pub(crate) title: &'static str,
    pub(crate) all: &'static [(&'static str, Run)],
}

/// If this is a run that is counted: does it.
pub(crate) fn child(tables: &[Counted]) -> Option<ExitCode> {
    let task = std::env::var(CHILD).ok()?;
    let mut numbers = task.split(' ').map(|number| number.parse().expect("the parent writes numbers"));
    let mut next = || numbers.next().expect("the parent writes three");
    let (table, index, units) = (next(), next(), next());
    let (_, run) = tables[table as usize].all[index as usize];
    run(units);
    Some(ExitCode::SUCCESS)
}

/// Instructions of one whole run, or what kept them from being counted.
fn counted(table: usize, index: usize, units: u64) -> Result<u64, String> {
    let binary = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(binary)
        .env(CHILD, format!("{table} {index} {units}"))
        .output()
        .map_err(|error| format!("valgrind does not start: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("what is counted fails: {said}"));
    }
    let count = said.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
    count.ok_or_else(|| format!("callgrind gave no count: {said}"))
}

fn of_one(table: usize, index: usize) -> Result<f64, String> {
    let once = counted(table, index, UNITS)?;
    let twice = counted(table, index, 2 * UNITS)?;
    Ok((twice - once) as f64 / UNITS as f64)
}

/// Counts and prints them.
pub(crate) fn count_all(tables: &[Counted]) {
    for (table, Counted { title, all }) in tables.iter().enumerate() {
        println!("\nInstructions of {title}");
        for (index, (name, _)) in all.iter().enumerate() {
            match of_one(table, index) {
                Ok(count) => println!("  {name:<44} {count:>12.1}"),
                Err(why) => {
                    println!("!!! SKIPPED: instructions were not counted: {why}");
                    return;
                }
            }
        }
    }
}
