//! Ratios taken in one run: what is compared takes turns; the median and the least of the rounds are printed, each
//! with its ratio to the first of its table.

pub(crate) mod instructions;

use std::time::Duration;

/// One thing that is measured: nanoseconds for one unit of work, a round each call.
pub(crate) type Measured<'a> = (&'a str, Box<dyn FnMut() -> f64 + 'a>);

/// Runs all in turns and prints the medians.
pub(crate) fn compare(title: &str, unit: &str, rounds: usize, mut measured: Vec<Measured<'_>>) {
    println!("\n{title}");
    let mut samples = vec![Vec::with_capacity(rounds); measured.len()];
    for _ in 0..rounds {
        for ((_, round), samples) in measured.iter_mut().zip(&mut samples) {
            samples.push(round());
        }
    }
    let medians: Vec<f64> = samples.iter_mut().map(|samples| median(samples)).collect();
    let least = |samples: &[f64]| samples.iter().copied().fold(f64::INFINITY, f64::min);
    let base = (medians[0], least(&samples[0]));
    println!("  {:<44} {:>12} {:>10}     {:>12}", "", "median", "", "least");
    for (((name, _), ns), samples) in measured.iter().zip(medians).zip(&samples) {
        let (to_base, least) = (ns / base.0, least(samples));
        println!(
            "  {name:<44} {ns:>12.1} ns {to_base:>7.2} x {least:>12.1} ns {:>7.2} x   {unit}",
            least / base.1
        );
    }
}

pub(crate) fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// Nanoseconds for one of `units`.
pub(crate) fn per(elapsed: Duration, units: u64) -> f64 {
    elapsed.as_nanos() as f64 / units as f64
}

/// Runs the parts that the command line names, or all, if this is `cargo bench`.
pub(crate) fn run(parts: &[(&str, fn())]) {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if !arguments.iter().any(|argument| argument == "--bench") {
        println!("measured by `cargo bench` only");
        return;
    }
    let wanted: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    for (name, part) in parts {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            part();
        }
    }
}
