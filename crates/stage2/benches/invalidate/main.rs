//! What an invalidation costs, as ratios taken in one run: its begin with each witness, a zap of 1 GiB, and what faults
//! beside a zap wait. `cargo bench -p afterimage-stage2 --bench invalidate`, or with the name of one part behind it.
//!
//! What is compared takes turns; medians of the rounds are printed, each with its ratio to the first of its table.

mod invalidations;
mod machine;
mod zaps;

use std::time::Duration;

/// One thing that is measured: nanoseconds for one unit of work, a round each call.
type Measured<'a> = (&'a str, Box<dyn FnMut() -> f64 + 'a>);

/// Runs all in turns and prints the medians.
fn compare(title: &str, unit: &str, rounds: usize, mut measured: Vec<Measured<'_>>) {
    println!("\n{title}");
    let mut samples = vec![Vec::with_capacity(rounds); measured.len()];
    for _ in 0..rounds {
        for ((_, round), samples) in measured.iter_mut().zip(&mut samples) {
            samples.push(round());
        }
    }
    let medians: Vec<f64> = samples.iter_mut().map(|samples| median(samples)).collect();
    for ((name, _), ns) in measured.iter().zip(&medians) {
        println!("  {name:<44} {ns:>12.1} ns {unit:<14} {:>7.2} x", ns / medians[0]);
    }
}

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn per(elapsed: Duration, units: u64) -> f64 {
    elapsed.as_nanos() as f64 / units as f64
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if !arguments.iter().any(|argument| argument == "--bench") {
        println!("measured by `cargo bench` only");
        return;
    }
    let wanted: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    let parts: [(&str, fn()); 3] =
        [("begin", invalidations::compare_all), ("zap", zaps::compare_all), ("beside", zaps::faults_beside)];
    for (name, part) in parts {
        if wanted.is_empty() || wanted.iter().any(|wanted| *wanted == name) {
            part();
        }
    }
}
