//! Invalidations and faults over time and guest frames: a stretch of each cell's first run, all on one scale of time.

use std::fmt::{self, Write as _};
use std::time::Duration;

use afterimage_storm::{Event, KEPT, Outcome, What};

use super::drawing::{Drawing, STRETCHED};
use super::{axis, row, storms};
use crate::units::{show_count, show_duration};

const HEIGHT: f64 = 110.0;
/// Room above the highest frame and below the lowest.
const MARGIN: f64 = 8.0;
/// Events that are drawn of each kind, at most.
const DRAWN: usize = 600;
/// Marks of one invalidation, at most.
const MARKS: usize = 200;
/// The shortest stretch worth a look.
const SHORTEST_NS: u64 = 50_000;

pub(super) fn write(page: &mut String, cells: &[&Outcome]) -> fmt::Result {
    let rows: Vec<_> = storms(cells)
        .into_iter()
        .filter_map(|(_, outcome)| Some((outcome, stretch(&outcome.recording.events)?)))
        .collect();
    let Some(length) = rows.iter().map(|(_, (start, end))| end - start).max() else { return Ok(()) };
    let length = length.max(SHORTEST_NS);
    let length = length + length / 10;
    let seen: Vec<_> = rows
        .into_iter()
        .map(|(outcome, (start, _))| Seen {
            outcome,
            start,
            events: outcome
                .recording
                .events
                .iter()
                .filter(|event| event.end_ns >= start && event.start_ns <= start + length)
                .collect(),
        })
        .collect();
    let all = || seen.iter().flat_map(|seen| &seen.events);
    let lowest = all().map(|event| event.gfn).min().unwrap_or(0);
    let highest = all().map(|event| event.gfn + event.frames).max().unwrap_or(1);
    let scale = Scale { length, lowest, highest };
    writeln!(
        page,
        "<h3>Timeline</h3>\n<p class=\"what\">{} of each first run, from an invalidation that met a fault on: time to the \
         right, guest frames {lowest:#x} to {highest:#x} upward.<br>\
         <span class=\"line\"><span class=\"key inval\"></span>invalidation</span> \
         <span class=\"line\"><span class=\"mark\">|</span> flush</span> \
         <span class=\"line\"><span class=\"key retried\"></span>fault that was retried (thick)</span> \
         <span class=\"line\"><span class=\"key ok\"></span>served at once (thin; the first {KEPT} of each vCPU)</span></p>\n\
         <div class=\"rows timeline\">",
        show_duration(Duration::from_nanos(length))
    )?;
    for seen in &seen {
        row(page, &seen.outcome.cell, &draw(seen, scale), "")?;
    }
    axis(page, Duration::from_nanos(length))?;
    page.write_str("</div>\n")
}

/// A stretch of a run.
struct Seen<'o> {
    outcome: &'o Outcome,
    /// Where it begins, in nanoseconds of the run.
    start: u64,
    events: Vec<&'o Event>,
}

/// What all stretches of a scenario are drawn by.
#[derive(Clone, Copy)]
struct Scale {
    /// In nanoseconds.
    length: u64,
    lowest: u64,
    highest: u64,
}

/// The first invalidation that some fault met, or the first of all.
fn stretch(events: &[Event]) -> Option<(u64, u64)> {
    let invalidations = || events.iter().filter(|event| matches!(event.what, What::Invalidation { .. }));
    let is_met = |invalidation: &&Event| {
        events.iter().any(|event| {
            matches!(event.what, What::Fault { .. })
                && event.start_ns < invalidation.end_ns
                && invalidation.start_ns < event.end_ns
        })
    };
    let first = invalidations().find(is_met).or_else(|| invalidations().next())?;
    let before = (first.end_ns - first.start_ns) / 20;
    Some((first.start_ns.saturating_sub(before), first.end_ns))
}

fn draw(seen: &Seen<'_>, scale: Scale) -> Drawing {
    let mut drawing = Drawing::stretched(HEIGHT, "Invalidations and faults over time and guest frames");
    let x = |ns: u64| (ns.saturating_sub(seen.start) as f64 / scale.length as f64).min(1.0) * STRETCHED;
    let y = |gfn: u64| {
        let part = (gfn - scale.lowest) as f64 / (scale.highest - scale.lowest).max(1) as f64;
        HEIGHT - MARGIN - part * (HEIGHT - 2.0 * MARGIN)
    };
    drawing.rect("plot", (0.0, 0.0), (STRETCHED, HEIGHT), "");
    let (mut boxes, mut lines) = (0, 0);
    for event in &seen.events {
        let (from, to) = (x(event.start_ns), x(event.end_ns));
        let time = show_duration(Duration::from_nanos(event.end_ns - event.start_ns));
        match &event.what {
            What::Invalidation { yields_ns, .. } if boxes < DRAWN => {
                boxes += 1;
                let (top, bottom) = (y(event.gfn + event.frames), y(event.gfn));
                let flushes = yields_ns.len();
                let title =
                    format!("invalidation of {} frames: {time}, {flushes} yields", show_count(event.frames));
                let size = ((to - from).max(1.2), (bottom - top).max(3.0));
                drawing.rect("inval", (from, top - 1.0), size, &title);
                for at in yields_ns.iter().step_by(flushes.div_ceil(MARKS).max(1)) {
                    drawing.line("flush", (x(*at), top - 4.0), (x(*at), top + 6.0));
                }
            }
            What::Fault { retries, .. } if lines < DRAWN => {
                lines += 1;
                // vCPUs that touch the same frame stay apart.
                let at = y(event.gfn) - 3.0 * (event.thread % 8) as f64;
                let (class, thick) = if *retries > 0 { ("retried", 3.6) } else { ("ok", 1.4) };
                let title = format!(
                    "vCPU {}, frame {:#x}: {time}, {} retries",
                    event.thread,
                    event.gfn,
                    show_count(*retries)
                );
                let size = ((to - from).max(1.8), thick);
                drawing.rect(class, (from, at - thick / 2.0), size, &title);
            }
            What::Invalidation { .. } | What::Fault { .. } => {}
        }
    }
    drawing
}
