//! Where faults were found to be doomed: before a page was touched, after, or only with the lock in hand.

use std::fmt::{self, Write as _};

use afterimage_storm::{Outcome, Retries};

use super::drawing::{Drawing, STRETCHED};
use super::{row, storms};
use crate::units::show_count;

const HEIGHT: f64 = 18.0;
const POINTS: [(&str, &str); 4] = [
    ("before", "before fault-in"),
    ("after", "after fault-in"),
    ("locked", "under the lock"),
    ("lost", "lost race"),
];

pub(super) fn write(page: &mut String, cells: &[&Outcome]) -> fmt::Result {
    let rows: Vec<_> = storms(cells)
        .into_iter()
        .filter_map(|(_, outcome)| Some((outcome, outcome.cell.median.retries.as_ref()?)))
        .filter(|(_, retries)| retries.all() > 0)
        .collect();
    if rows.is_empty() {
        return Ok(());
    }
    page.write_str("<h3>Retries, by where the fault was found to be doomed</h3>\n<p class=\"what\">")?;
    for (class, point) in POINTS {
        write!(page, "<span class=\"line\"><span class=\"key part {class}\"></span>{point}</span> ")?;
    }
    page.write_str("</p>\n<div class=\"rows short\">\n")?;
    for (outcome, retries) in rows {
        let told = told(outcome.cell.median.retries_per_fault.unwrap_or(0.0), retries);
        row(page, &outcome.cell, &draw(retries), &told)?;
    }
    page.write_str("</div>\n")
}

/// Each point with its count; a change of the memslot is a lost race, too.
fn counts(retries: &Retries) -> [u64; 4] {
    [
        retries.before_fault_in,
        retries.after_fault_in,
        retries.under_lock,
        retries.lost_race + retries.slot_changing,
    ]
}

fn draw(retries: &Retries) -> Drawing {
    let mut drawing = Drawing::stretched(HEIGHT, "Share of retries by where they were found");
    let mut x = 0.0;
    for ((class, point), count) in POINTS.iter().zip(counts(retries)) {
        let share = count as f64 / retries.all() as f64;
        let title = format!("{point}: {} ({:.2} %)", show_count(count), share * 100.0);
        drawing.rect(&format!("part {class}"), (x, 0.0), (share * STRETCHED, HEIGHT), &title);
        x += share * STRETCHED;
    }
    drawing
}

/// How many there were, and where most of them were found.
fn told(per_fault: f64, retries: &Retries) -> String {
    let per_fault = match per_fault {
        many if many >= 10.0 => show_count(many.round() as u64),
        few if few >= 0.01 => format!("{few:.2}"),
        few => format!("{few:.0e}"),
    };
    let most = POINTS.iter().zip(counts(retries)).max_by_key(|(_, count)| *count);
    let most = most.map_or(String::new(), |((_, point), count)| {
        format!("{:.1} % {point}", count as f64 / retries.all() as f64 * 100.0)
    });
    format!("{per_fault} a fault, {most}")
}
