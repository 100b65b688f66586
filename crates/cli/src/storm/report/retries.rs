//! Where faults were found to be doomed: before a page was touched, after, or only with the lock in hand.

use std::fmt::{self, Write as _};

use afterimage_storm::Outcome;

use super::drawing::{Anchor, Drawing};
use super::{name, storms};
use crate::units::show_count;

const WIDTH: f64 = 960.0;
const ROW: f64 = 26.0;
const NAMES: f64 = 250.0;
const VALUES: f64 = 200.0;
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
    let mut drawing =
        Drawing::new(WIDTH, ROW * rows.len() as f64 + 4.0, "Share of retries by where they were found");
    let room = WIDTH - NAMES - VALUES;
    for (row, (outcome, retries)) in rows.iter().enumerate() {
        let top = row as f64 * ROW;
        let (words, _) = name(&outcome.cell);
        drawing.text("name", (0.0, top + 17.0), Anchor::Start, &words);
        let all = retries.all();
        let counts = [
            retries.before_fault_in,
            retries.after_fault_in,
            retries.under_lock,
            retries.lost_race + retries.slot_changing,
        ];
        let mut x = NAMES;
        for ((class, point), count) in POINTS.iter().zip(counts) {
            let share = count as f64 / all as f64;
            let title = format!("{words}: {point} {} ({:.2} %)", show_count(count), share * 100.0);
            drawing.rect(&format!("part {class}"), (x, top + 4.0), (share * room, 18.0), &title);
            if share > 0.12 {
                let label = format!("{point} {:.1} %", share * 100.0);
                drawing.text("inbar", (x + 6.0, top + 17.0), Anchor::Start, &label);
            }
            x += share * room;
        }
        let per_fault = outcome.cell.median.retries_per_fault.unwrap_or(0.0);
        let per_fault = match per_fault {
            many if many >= 10.0 => show_count(many.round() as u64),
            few if few >= 0.01 => format!("{few:.2}"),
            few => format!("{few:.0e}"),
        };
        drawing.text(
            "value",
            (NAMES + room + 8.0, top + 17.0),
            Anchor::Start,
            &format!("{per_fault} a fault"),
        );
    }
    page.write_str("<h3>Retries, by where the fault was found to be doomed</h3>\n<p class=\"what\">")?;
    for (class, point) in POINTS {
        write!(page, "<span class=\"key part {class}\"></span>{point} &ensp; ")?;
    }
    write!(page, "</p>\n{drawing}")
}
