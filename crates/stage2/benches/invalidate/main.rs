//! What an invalidation costs, as ratios taken in one run: its begin with each witness, a zap of 1 GiB, and what faults
//! beside a zap wait. `cargo bench -p afterimage-stage2 --bench invalidate`, or with the name of one part behind it.

#[path = "../compare/mod.rs"]
mod compare;
mod instructions;
mod invalidations;
mod machine;
mod zaps;

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(ended) = instructions::child() {
        return ended;
    }
    compare::run(&[
        ("instructions", instructions::count_all),
        ("begin", invalidations::compare_all),
        ("zap", zaps::compare_all),
        ("beside", zaps::faults_beside),
    ]);
    ExitCode::SUCCESS
}
