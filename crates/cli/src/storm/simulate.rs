//! `storm --simulate`: the costs, what the simulation is worth, and the matrix in virtual time.

use std::fmt::{self, Display};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use afterimage_storm::{Compared, Costs, Cut, Outcome, Simulation};
use anyhow::Result;

use super::options::StormPlan;
use crate::units::show_duration;

/// What a reader must know before believing the simulation.
#[derive(Debug)]
pub(super) struct Worth {
    costs: Costs,
    compared: Vec<Compared>,
    /// What ended early, in words.
    cut: Vec<String>,
}

/// Calibrates, checks, and runs every storm in virtual time, or until `interrupted`. `next` is told what comes.
pub(super) fn simulate(
    plan: &StormPlan,
    interrupted: &AtomicBool,
    mut next: impl FnMut(usize, &str),
) -> Result<(Worth, Vec<Outcome>)> {
    next(0, "calibrating on real threads");
    let simulation = Simulation { costs: Costs::calibrate()? };
    next(0, "checking against real threads");
    let compared = simulation.check(interrupted)?;
    let (mut outcomes, mut cut) = (Vec::new(), Vec::new());
    for (index, storm) in plan.matrix.storms.iter().enumerate() {
        if interrupted.load(Ordering::Relaxed) {
            break;
        }
        next(index * plan.matrix.repeat, &format!("{} {}", storm.scenario, storm.policies));
        if let Some((outcome, cut_off)) = simulation.outcome(storm, plan.matrix.repeat, interrupted) {
            if let Some(Cut { unfinished }) = cut_off {
                let after = show_duration(Duration::from_nanos(outcome.cell.median.elapsed_ns));
                cut.push(format!(
                    "{} {}: {after}, {unfinished} under way then",
                    storm.scenario, storm.policies
                ));
            }
            outcomes.push(outcome);
        }
    }
    Ok((Worth { costs: simulation.costs, compared, cut }, outcomes))
}

impl Display for Worth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "calibration, on real threads")?;
        for (what, ns) in self.costs.named() {
            writeln!(f, "  {what:<38}{ns:>10.1} ns")?;
        }
        writeln!(f, "simulation against real threads; it gives each thread a CPU")?;
        writeln!(
            f,
            "  {:<14}{:<20}{:<24}{:>14}{:>14}{:>10}",
            "threads", "policies", "", "real", "simulated", "error"
        )?;
        for compared in &self.compared {
            let Compared { policies, threads, is_crowded, what, real, simulated, .. } = compared;
            let threads = format!("{threads}{}", if *is_crowded { ", too few CPUs" } else { "" });
            let name = policies.name().unwrap_or("");
            let error = match compared.error() {
                error if error.is_finite() => format!("{:+.0} %", error * 100.0),
                _ => "–".to_owned(),
            };
            writeln!(f, "  {threads:<14}{name:<20}{what:<24}{real:>14.1}{simulated:>14.1}{error:>10}")?;
        }
        if !self.cut.is_empty() {
            writeln!(
                f,
                "ended early, being too many events; virtual time that was covered, faults and invalidations unfinished:"
            )?;
        }
        for cut in &self.cut {
            writeln!(f, "  {cut}")?;
        }
        writeln!(f)
    }
}
