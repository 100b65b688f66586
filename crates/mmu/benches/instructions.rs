//! Instructions, counted under callgrind: a figure that no neighbour on the machine can blur.
//!
//! Runs itself under `valgrind --tool=callgrind` with one and with two times so many rounds; the difference is the
//! rounds alone. Fails if the hint takes more than [`HINT_LIMIT`]. Says so loudly and passes if valgrind is missing.

mod host;

use core::hint::black_box;
use std::process::{Command, ExitCode};

use afterimage_mmu::{Access, Block, Fault, Gfn, MmuLock, Snapshot, Stale};

use host::{AllResident, Bare, FRAMES, machine};

/// Most instructions that the hint may add to a fault that is not doomed, over a call that returns a constant.
const HINT_LIMIT: f64 = 8.0;
const ROUNDS: u64 = 10_000;
const CHILD: &str = "AFTERIMAGE_COUNT";

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// A check that looks at nothing: what is taken from the others.
    Nothing,
    Hint,
    HandleFault,
}

impl Work {
    const ALL: [Self; 3] = [Self::Nothing, Self::Hint, Self::HandleFault];

    fn run(self, rounds: u64) {
        match self {
            Self::Nothing => ask(nothing, rounds),
            Self::Hint => ask(hint, rounds),
            Self::HandleFault => handle_fault(rounds),
        }
    }
}

type Check = fn(Snapshot<'_>) -> Option<Stale>;

/// What a fault asks before it looks for its page.
fn hint(since: Snapshot<'_>) -> Option<Stale> {
    since.hint()
}

/// The same without looking.
fn nothing(_since: Snapshot<'_>) -> Option<Stale> {
    None
}

/// Calls through a pointer that the compiler cannot see through, so that the loop is the same for both.
#[inline(never)]
fn ask(check: Check, rounds: u64) {
    let (lock, check) = (MmuLock::<Bare>::new(), black_box(check));
    let since = lock.invalidations().snapshot(Block::frame(Gfn::new(7)));
    for _ in 0..rounds {
        black_box(check(black_box(since)));
    }
}

#[inline(never)]
fn handle_fault(rounds: u64) {
    let mmu = machine();
    let mut vcpu = mmu.vcpu();
    for round in 0..rounds {
        let fault = Fault::new(Gfn::new(round % FRAMES), Access::WRITE);
        let _ = black_box(vcpu.handle_fault(&AllResident, black_box(&fault)));
    }
}

/// Instructions of one whole run, or what kept them from being counted.
fn counted(work: Work, rounds: u64) -> Result<u64, String> {
    let binary = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(binary)
        .env(CHILD, format!("{work:?} {rounds}"))
        .output()
        .map_err(|error| format!("valgrind does not start: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let count = said.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
    count.ok_or_else(|| format!("callgrind gave no count: {said}"))
}

fn per_round(work: Work) -> Result<f64, String> {
    let once = counted(work, ROUNDS)?;
    let twice = counted(work, 2 * ROUNDS)?;
    Ok((twice - once) as f64 / ROUNDS as f64)
}

fn report() -> Result<bool, String> {
    let nothing = per_round(Work::Nothing)?;
    let hint = per_round(Work::Hint)? - nothing;
    let fault = per_round(Work::HandleFault)? - nothing;
    println!("hint, not doomed:          {hint:6.1} instructions (limit {HINT_LIMIT})");
    println!("handle_fault, uncontended: {fault:6.1} instructions");
    Ok(hint <= HINT_LIMIT)
}

fn main() -> ExitCode {
    if let Ok(task) = std::env::var(CHILD) {
        let (name, rounds) = task.split_once(' ').expect("the parent writes both");
        let work = Work::ALL.into_iter().find(|work| format!("{work:?}") == name).expect("the parent knows");
        work.run(rounds.parse().expect("the parent writes a number"));
        return ExitCode::SUCCESS;
    }
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("instructions are counted by `cargo bench` only");
        return ExitCode::SUCCESS;
    }
    match report() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("the hint takes more than {HINT_LIMIT} instructions");
            ExitCode::FAILURE
        }
        Err(why) => {
            eprintln!("!!! SKIPPED: instructions were not counted, the limit was not checked: {why}");
            ExitCode::SUCCESS
        }
    }
}
