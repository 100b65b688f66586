//! Instructions of one install, counted under callgrind: a figure that no neighbour on the machine can blur.
//!
//! Runs itself under `valgrind --tool=callgrind` with one and with two times so many installs; the difference is the
//! installs alone, tables that they link included. Says so loudly if valgrind is missing.

use std::process::{Command, ExitCode};

use afterimage_mmu::Barrier;

use crate::peers::{LockedX86, Multiarch, X86};
use crate::whole::{Locked, Whole};
use crate::{FRAMES, Order, Ours, tables, timed};

const INSTALLS: u64 = FRAMES / 16;
const CHILD: &str = "AFTERIMAGE_COUNT_INSTALLS";

type Run = fn(u64);

/// Who installs.
const ALL: [(&str, Run); 7] = [
    ("x86_64, one writer", |installs| {
        let _ = timed(Order::Sequential, 0..installs, &mut X86::new());
    }),
    ("page_table_multiarch, one writer", |installs| {
        let _ = timed(Order::Sequential, 0..installs, &mut Multiarch::new());
    }),
    ("x86_64, mutex", |installs| {
        let _ = timed(Order::Sequential, 0..installs, &mut LockedX86::new().mapper());
    }),
    ("ours, bare", |installs| {
        let _ = timed(Order::Sequential, 0..installs, &mut Ours::new(&tables()));
    }),
    ("ours, intent, heavy barrier", |installs| {
        let _ = timed(Order::Sequential, 0..installs, &mut Whole::new(Barrier::Heavy).mapper());
    }),
    ("ours, intent, fences", |installs| {
        let _ = timed(Order::Sequential, 0..installs, &mut Whole::new(Barrier::Symmetric).mapper());
    }),
    ("ours, lock", |installs| {
        let _ = timed(Order::Sequential, 0..installs, &mut Locked::new().mapper());
    }),
];

/// If this is the run that is counted: does it.
pub(crate) fn child() -> Option<ExitCode> {
    let task = std::env::var(CHILD).ok()?;
    let (index, installs) = task.split_once(' ').expect("the parent writes both");
    let (_, install) = ALL[index.parse::<usize>().expect("the parent writes a number")];
    install(installs.parse().expect("the parent writes a number"));
    Some(ExitCode::SUCCESS)
}

/// Instructions of one whole run, or what kept them from being counted.
fn counted(index: usize, installs: u64) -> Result<u64, String> {
    let binary = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(binary)
        .env(CHILD, format!("{index} {installs}"))
        .output()
        .map_err(|error| format!("valgrind does not start: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let count = said.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
    count.ok_or_else(|| format!("callgrind gave no count: {said}"))
}

fn for_one(index: usize) -> Result<f64, String> {
    let once = counted(index, INSTALLS)?;
    let twice = counted(index, 2 * INSTALLS)?;
    Ok((twice - once) as f64 / INSTALLS as f64)
}

pub(crate) fn count_all() {
    println!("\nInstructions of an install, in sequence, one thread");
    for (index, (name, _)) in ALL.into_iter().enumerate() {
        match for_one(index) {
            Ok(count) => println!("  {name:<44} {count:>12.1}"),
            Err(why) => {
                println!("!!! SKIPPED: instructions were not counted: {why}");
                return;
            }
        }
    }
}
