//! What an invalidation costs, as ratios taken in one run: its begin with each witness, a zap of 1 GiB, and what faults
//! beside a zap wait. `cargo bench -p afterimage-stage2 --bench invalidate`, or with the name of one part behind it.

#[path = "../compare/mod.rs"]
mod compare;
mod invalidations;
mod machine;
mod zaps;

fn main() {
    compare::run(&[
        ("begin", invalidations::compare_all),
        ("zap", zaps::compare_all),
        ("beside", zaps::faults_beside),
    ]);
}
