//! Distributions of fault latencies: by percentile, nines to the right, on a logarithmic scale of time.

use std::fmt::{self, Write as _};
use std::time::Duration;

use afterimage_storm::{Histogram, Outcome, Recording};

use super::drawing::{Anchor, Drawing, LogScale};
use super::{class, name, name_in_page};
use crate::units::{show_count, show_duration};

const WIDTH: f64 = 470.0;
const HEIGHT: f64 = 250.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 24.0;
const BOTTOM: f64 = 24.0;
/// Where the percentiles stand, evenly apart.
const AT: [(f64, &str); 7] = [
    (0.1, "p10"),
    (0.5, "p50"),
    (0.9, "p90"),
    (0.99, "p99"),
    (0.999, "p99.9"),
    (0.9999, "p99.99"),
    (1.0, "max"),
];

pub(super) fn write(page: &mut String, cells: &[&Outcome]) -> fmt::Result {
    page.write_str("<h3>Fault latency</h3>\n<p class=\"what\">")?;
    for (index, outcome) in cells.iter().enumerate() {
        let Recording { inside, outside, .. } = &outcome.recording;
        if inside.len() + outside.len() > 0 {
            legend(page, &class(cells, index), &name_in_page(&outcome.cell).0)?;
        }
    }
    page.write_str("</p>\n<div class=\"pair\">\n")?;
    draw(page, cells, "page inside an invalidation", |recording| &recording.inside)?;
    draw(page, cells, "page outside", |recording| &recording.outside)?;
    page.write_str("</div>\n")
}

fn legend(page: &mut String, class: &str, words: &str) -> fmt::Result {
    write!(
        page,
        "<span class=\"line\"><svg viewBox=\"0 0 40 10\" aria-hidden=\"true\"><polyline class=\"curve {class}\" \
         points=\"0,5 40,5\"/></svg>{words}</span> "
    )
}

fn draw(
    page: &mut String,
    cells: &[&Outcome],
    what: &str,
    of: fn(&Recording) -> &Histogram<u64>,
) -> fmt::Result {
    let some: Vec<_> = cells.iter().enumerate().filter(|(_, cell)| !of(&cell.recording).is_empty()).collect();
    let mut drawing = Drawing::new(WIDTH, HEIGHT, format!("Percentiles of fault latency, {what}"));
    drawing.text("title", (LEFT, 14.0), Anchor::Start, what);
    if some.is_empty() {
        drawing.text("small", (LEFT, HEIGHT / 2.0), Anchor::Start, "no such fault");
        return writeln!(page, "<figure>{drawing}</figure>");
    }
    let least = some.iter().map(|(_, cell)| of(&cell.recording).value_at_quantile(AT[0].0)).min();
    let greatest = some.iter().map(|(_, cell)| of(&cell.recording).max()).max();
    let scale = LogScale::new(least.unwrap_or(1), greatest.unwrap_or(1), HEIGHT - BOTTOM, TOP);
    let x = |index: usize| LEFT + index as f64 * (WIDTH - LEFT - RIGHT) / (AT.len() - 1) as f64;
    for tick in scale.ticks() {
        let y = scale.at(tick);
        drawing.line("grid", (LEFT, y), (WIDTH - RIGHT, y));
        drawing.text("small", (LEFT - 6.0, y + 4.0), Anchor::End, &show_power(tick));
    }
    for (index, (_, percentile)) in AT.iter().enumerate() {
        drawing.text("small", (x(index), HEIGHT - 6.0), Anchor::Middle, percentile);
    }
    for (index, cell) in some {
        let histogram = of(&cell.recording);
        let class = class(cells, index);
        let known: Vec<_> = AT.iter().enumerate().filter(|(_, (at, _))| is_known(histogram, *at)).collect();
        let values = known.iter().map(|(_, (quantile, _))| histogram.value_at_quantile(*quantile));
        let values: Vec<_> = values.collect();
        let points = known.iter().zip(&values).map(|((at, _), value)| (x(*at), scale.at(*value)));
        let points: Vec<_> = points.collect();
        drawing.path(&format!("curve {class}"), &points);
        for ((point, value), (_, (_, percentile))) in points.iter().zip(values).zip(known) {
            let value = show_duration(Duration::from_nanos(value));
            let samples = show_count(histogram.len());
            let title = format!("{}: {percentile} {value} ({samples} faults)", name(&cell.cell).0);
            drawing.dot(&format!("point {class}"), *point, &title);
        }
    }
    writeln!(page, "<figure>{drawing}</figure>")
}

/// Whether there are samples enough for one to lie beyond `quantile`; the last of all is always known.
fn is_known(histogram: &Histogram<u64>, quantile: f64) -> bool {
    quantile == 1.0 || histogram.len() as f64 * (1.0 - quantile) >= 0.999
}

/// A power of ten of nanoseconds, short.
fn show_power(ns: u64) -> String {
    match ns {
        ns if ns < 1_000 => format!("{ns} ns"),
        ns if ns < 1_000_000 => format!("{} µs", ns / 1_000),
        ns if ns < 1_000_000_000 => format!("{} ms", ns / 1_000_000),
        ns => format!("{} s", ns / 1_000_000_000),
    }
}
