//! Ratios taken in one run. The first of a table is measured right before each of the others, in every round, and a
//! ratio is that of two neighbours: where the machine changes its pace, it does so for both.

pub(crate) mod instructions;

use std::time::Duration;

/// One thing that is measured: nanoseconds for one unit of work, a round each call.
pub(crate) type Measured<'a> = (&'a str, Box<dyn FnMut() -> f64 + 'a>);

/// Measures all of them and prints the medians: of the time, and of the ratios to the first, with the least and the greatest.
pub(crate) fn compare(title: &str, unit: &str, rounds: usize, mut measured: Vec<Measured<'_>>) {
    println!("\n{title}");
    println!("  {:<44} {:>12} {:>11}", "", "median", "ratio");
    let ((first, base), others) = measured.split_first_mut().expect("a table has a first line");
    let mut bases = Vec::with_capacity(rounds * others.len());
    let mut samples = vec![Vec::with_capacity(rounds); others.len()];
    for _ in 0..rounds {
        for ((_, round), samples) in others.iter_mut().zip(&mut samples) {
            let before = base();
            let ns = round();
            bases.push(before);
            samples.push((ns, ns / before));
        }
    }
    println!("  {first:<44} {:>9.1} ns {:>9.2} x {:<18} {unit}", median(&mut bases), 1.0, "");
    for ((name, _), samples) in others.iter().zip(samples) {
        let (mut ns, mut ratios): (Vec<f64>, Vec<f64>) = samples.into_iter().unzip();
        let (ns, ratio) = (median(&mut ns), median(&mut ratios));
        let range = format!("[{:.2} to {:.2}]", ratios[0], ratios[ratios.len() - 1]);
        println!("  {name:<44} {ns:>9.1} ns {ratio:>9.2} x {range:<18} {unit}");
    }
}

/// The middle of `samples`, which it sorts.
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
