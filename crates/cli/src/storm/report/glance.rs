//! The first picture: one invalidation under each policy, on one scale of time, with a mark for each flush.

use std::fmt::{self, Write as _};
use std::time::Duration;

use afterimage_storm::{Cell, Event, Load, Outcome, Policies, Scenario, What};

use super::drawing::{Drawing, STRETCHED, escape};
use super::{axis, class, row};
use crate::units::{show_bytes, show_count, show_duration};

/// What a reader has to know who has not heard of it.
const CHANGE: &str = "<p class=\"what\">The change: since Linux 6.9 (commit d02c357e5bfa) a fault that an invalidation \
dooms is told so before it takes <code>mmu_lock</code>, for which the invalidation would flush and step aside.<br>\
Bars: how long one invalidation takes, on average, all on one scale. <span class=\"mark\">|</span> is a remote TLB flush: \
every vCPU is made to leave the guest. Where threads outnumber CPUs an invalidation waits for a CPU, too: its CPU time does \
not.</p>\n";

const HEIGHT: f64 = 30.0;
/// Marks that are drawn at most: more would be a bar of their own.
const MARKS: usize = 400;

pub(super) fn write(page: &mut String, outcomes: &[Outcome]) -> fmt::Result {
    // The one that the change was made for, if it blew.
    let of = |scenario| outcomes.iter().any(|outcome: &Outcome| outcome.cell.scenario == scenario);
    let Some(&scenario) = Scenario::ALL.iter().find(|scenario| of(**scenario)) else { return Ok(()) };
    let here: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.cell.scenario == scenario).collect();
    let rows: Vec<_> = here
        .iter()
        .enumerate()
        .filter_map(|(index, outcome)| {
            let times = outcome.cell.median.invalidation_ns.as_ref()?;
            (outcome.cell.load != Load::Quiet).then_some((index, *outcome, times.mean))
        })
        .collect();
    let Some(longest) = rows.iter().map(|(_, _, mean)| *mean).max() else { return Ok(()) };

    writeln!(page, "<section class=\"glance\">\n<h2>{}</h2>", escape(&headline(&here, scenario)))?;
    page.write_str(CHANGE)?;
    page.write_str("<div class=\"rows\">\n")?;
    for (index, outcome, mean) in rows {
        let told = match outcome.cell.median.invalidation_cpu_ns {
            Some(cpu) => {
                format!("{}\n{} of CPU time", told(&outcome.cell), show_duration(Duration::from_nanos(cpu)))
            }
            None => told(&outcome.cell),
        };
        let mut drawing = Drawing::stretched(HEIGHT, &told);
        let length = (mean as f64 / longest.max(1) as f64 * STRETCHED).max(2.5);
        let bar = format!("bar {}", class(&here, index));
        drawing.rect(&bar, (0.0, 4.0), (length, HEIGHT - 8.0), &told);
        for mark in marks(outcome) {
            let x = (mark * length).max(1.0);
            drawing.line("flush", (x, 0.0), (x, HEIGHT));
        }
        row(page, &outcome.cell, &drawing, &told)?;
    }
    axis(page, Duration::from_nanos(longest))?;
    page.write_str("</div>\n</section>\n")
}

fn told(cell: &Cell) -> String {
    let time = cell.median.invalidation_ns.as_ref().map_or(0, |times| times.mean);
    let time = show_duration(Duration::from_nanos(time));
    match cell.median.flushes_per_invalidation {
        Some(flushes) if flushes >= 9.5 => format!("{time}, {} flushes", show_count(flushes.round() as u64)),
        Some(flushes) => format!("{time}, {flushes:.1} flushes"),
        None => time,
    }
}

/// Before and after, in one sentence of numbers.
fn headline(cells: &[&Outcome], scenario: Scenario) -> String {
    let of = |policies: Policies| {
        let found = cells
            .iter()
            .find(|outcome| outcome.cell.load.is_storm() && outcome.cell.policies == Some(policies));
        found.map(|outcome| &outcome.cell)
    };
    match (of(Policies::BEFORE), of(Policies::LINUX)) {
        (Some(before), Some(after)) => format!(
            "Taking {} away: {} before the change; {} since",
            show_bytes(match scenario {
                Scenario::A | Scenario::EInside => before.memory_bytes,
                Scenario::B => (before.memory_bytes / 2).min(1 << 30),
                Scenario::C | Scenario::D | Scenario::E => 4096,
            }),
            told(before).replace(", ", " and "),
            told(after).replace(", ", " and ")
        ),
        _ => format!("One invalidation of scenario {scenario} under each policy"),
    }
}

/// Where along an invalidation the flushes were, each yield's and the last at the end of its begin: of one that had about
/// as many as the mean has.
fn marks(outcome: &Outcome) -> Vec<f64> {
    let yields = outcome.cell.median.yields_per_invalidation.unwrap_or(0.0);
    let nearest = outcome
        .recording
        .events
        .iter()
        .filter_map(|event| match &event.what {
            What::Invalidation { begun_ns, yields_ns } => Some((event, *begun_ns, yields_ns)),
            What::Fault { .. } => None,
        })
        .min_by(|(.., one), (.., other)| {
            let far = |many: &Vec<u64>| (many.len() as f64 - yields).abs();
            far(one).total_cmp(&far(other))
        });
    let Some((Event { start_ns, end_ns, .. }, begun_ns, yields_ns)) = nearest else { return Vec::new() };
    let length = (end_ns - start_ns).max(1) as f64;
    let step = yields_ns.len().div_ceil(MARKS).max(1);
    let flushed = outcome.cell.median.flushes_per_invalidation.is_some_and(|flushes| flushes >= 0.5);
    let all = yields_ns.iter().step_by(step).copied().chain(flushed.then_some(begun_ns));
    all.map(|at| at.saturating_sub(*start_ns) as f64 / length).collect()
}
