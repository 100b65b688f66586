//! The matrix of one scenario: numbers against policies, shaded by how much worse than the best of the row.

use std::fmt::{self, Write as _};
use std::time::Duration;

use afterimage_storm::{Load, Measured, Outcome};

use super::{class, name_in_page};
use crate::units::{show_count, show_duration};

/// A row: its name, its number, and how that is shown. Of all of them less is better.
type Row = (&'static str, fn(&Measured) -> Option<f64>, fn(f64) -> String);

const ROWS: &[Row] = &[
    ("flushes per invalidation", |m| m.flushes_per_invalidation, ratio),
    ("… for who waits", |m| m.flushes_for_waiters_per_invalidation, ratio),
    ("… for the scheduler", |m| m.flushes_for_scheduler_per_invalidation, ratio),
    ("invalidation, median", |m| m.invalidation_ns.as_ref().map(|times| times.median as f64), ns),
    ("invalidation, mean", |m| m.invalidation_ns.as_ref().map(|times| times.mean as f64), ns),
    ("invalidation, longest", |m| m.invalidation_ns.as_ref().map(|times| times.max as f64), ns),
    ("invalidation, CPU time", |m| m.invalidation_cpu_ns.map(|time| time as f64), ns),
    ("retries per fault", |m| m.retries_per_fault, ratio),
    ("pages looked up in vain", |m| m.wasted_fault_ins.map(|count| count as f64), count),
    ("lock taken in vain", |m| m.doomed_lock_acquisitions.map(|count| count as f64), count),
    ("CPU time of doomed faults", |m| m.doomed_cpu_ns.map(|time| time as f64), ns),
    (
        "waiting for the lock",
        |m| m.lock_wait_ns.as_ref().map(|wait| (wait.faults + wait.invalidations) as f64),
        ns,
    ),
    ("fault inside, median", |m| m.latency_ns.inside.as_ref().map(|latency| latency.p50 as f64), ns),
    ("fault inside, longest", |m| m.latency_ns.inside.as_ref().map(|latency| latency.max as f64), ns),
    ("fault outside, median", |m| m.latency_ns.outside.as_ref().map(|latency| latency.p50 as f64), ns),
    ("fault outside, p99.9", |m| m.latency_ns.outside.as_ref()?.p999().map(|time| time as f64), ns),
    ("wrong pages", |m| Some(m.wrong_pages as f64), count),
];

fn ratio(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        value if value >= 100.0 => count(value),
        value if value >= 0.01 => format!("{value:.2}"),
        value => format!("{value:.0e}"),
    }
}

fn ns(value: f64) -> String {
    show_duration(Duration::from_nanos(value as u64))
}

fn count(value: f64) -> String {
    show_count(value.round() as u64)
}

pub(super) fn write(page: &mut String, cells: &[&Outcome]) -> fmt::Result {
    page.write_str("<div class=\"wide\"><table>\n<thead><tr><th></th>")?;
    for (index, outcome) in cells.iter().enumerate() {
        let (words, made_of) = name_in_page(&outcome.cell);
        let class = class(cells, index);
        write!(page, "<th><span class=\"key {class}\"></span>{words}<br><small>{made_of}</small></th>")?;
    }
    page.write_str("</tr></thead>\n<tbody>\n")?;
    for (row, value, show) in ROWS {
        let values: Vec<_> = cells.iter().map(|outcome| value(&outcome.cell.median)).collect();
        if values.iter().all(Option::is_none) {
            continue;
        }
        let storms = cells.iter().zip(&values).filter(|(outcome, _)| outcome.cell.load.is_storm());
        let best = storms.filter_map(|(_, value)| *value).fold(f64::INFINITY, f64::min);
        write!(page, "<tr><th scope=\"row\">{row}</th>")?;
        for (outcome, median) in cells.iter().zip(&values) {
            let Some(median) = median else {
                page.write_str("<td class=\"none\">–</td>")?;
                continue;
            };
            let shade = match outcome.cell.load {
                Load::Storm | Load::Bystanders => shade(*median, best),
                Load::Uncontended | Load::Busy | Load::Quiet => 0,
            };
            let spread = match (value(&outcome.cell.min), value(&outcome.cell.max)) {
                (Some(least), Some(greatest)) if least != greatest => {
                    format!("{} to {}", show(least), show(greatest))
                }
                _ => String::new(),
            };
            write!(page, "<td class=\"s{shade}\" title=\"{spread}\">{}</td>", show(*median))?;
        }
        page.write_str("</tr>\n")?;
    }
    page.write_str("</tbody></table></div>\n")?;
    page.write_str(
        "<p class=\"what\">Shades say how much worse a policy is than the best of its row: <span class=\"shade s1\">4 \
         times</span> <span class=\"shade s2\">16</span> <span class=\"shade s3\">64</span> <span class=\"shade s4\">256 and \
         more</span>. A percentile is shown where enough faults lie beyond it.</p>\n",
    )
}

/// 0 for about the best, one more for each factor of 4, up to 4.
fn shade(value: f64, best: f64) -> u32 {
    match value / best {
        factor if factor.is_finite() => (factor.log2() / 2.0).round().clamp(0.0, 4.0) as u32,
        // The best is none at all.
        _ if value > 0.0 => ((1.0 + value.log10()).round()).clamp(1.0, 4.0) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::shade;

    #[test]
    fn worse_is_darker() {
        assert_eq!((shade(1.0, 1.0), shade(4.0, 1.0), shade(1e9, 1.0)), (0, 1, 4));
        assert_eq!((shade(0.0, 0.0), shade(1.0, 0.0), shade(1e9, 0.0)), (0, 1, 4));
    }
}
