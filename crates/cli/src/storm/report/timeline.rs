//! Invalidations and faults over time and guest frames: a stretch of each cell's first run, all on one scale of time.

use std::fmt::{self, Write as _};
use std::time::Duration;

use afterimage_storm::{Event, Outcome, What};

use super::drawing::{Anchor, Drawing};
use super::{name, storms};
use crate::units::{show_count, show_duration};

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 120.0;
const LEFT: f64 = 250.0;
const TOP: f64 = 10.0;
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
    writeln!(
        page,
        "<h3>Timeline</h3>\n<p class=\"what\">{} of each run's start, time to the right, guest frames upward. \
         <span class=\"key inval\"></span>invalidation, <span class=\"mark\">|</span> flush, \
         <span class=\"key ok\"></span>fault served at once, <span class=\"key retried\"></span>fault that was retried.</p>",
        show_duration(Duration::from_nanos(length))
    )?;
    for (outcome, (start, _)) in rows {
        write!(page, "{}", draw(outcome, start, length))?;
    }
    Ok(())
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

fn draw(outcome: &Outcome, start: u64, length: u64) -> Drawing {
    let (words, made_of) = name(&outcome.cell);
    let mut drawing = Drawing::new(WIDTH, HEIGHT + 22.0, format!("Timeline of {words}"));
    drawing.text("name", (0.0, TOP + 16.0), Anchor::Start, &words);
    drawing.text("small", (0.0, TOP + 32.0), Anchor::Start, &made_of);
    let seen: Vec<_> = outcome
        .recording
        .events
        .iter()
        .filter(|event| event.end_ns >= start && event.start_ns <= start + length)
        .collect();
    let lowest = seen.iter().map(|event| event.gfn).min().unwrap_or(0);
    let highest = seen.iter().map(|event| event.gfn + event.frames).max().unwrap_or(1);
    let room = WIDTH - LEFT;
    let x = |ns: u64| LEFT + (ns.saturating_sub(start) as f64 / length as f64).min(1.0) * room;
    let y = |gfn: u64| {
        let part = (gfn - lowest) as f64 / (highest - lowest).max(1) as f64;
        TOP + HEIGHT - 6.0 - part * (HEIGHT - 12.0)
    };
    drawing.rect("plot", (LEFT, TOP), (room, HEIGHT), "");
    let (mut boxes, mut lines) = (0, 0);
    for event in &seen {
        let (from, to) = (x(event.start_ns), x(event.end_ns));
        let time = show_duration(Duration::from_nanos(event.end_ns - event.start_ns));
        match &event.what {
            What::Invalidation { yields_ns, .. } if boxes < DRAWN => {
                boxes += 1;
                let (top, bottom) = (y(event.gfn + event.frames), y(event.gfn));
                let flushes = yields_ns.len();
                let title =
                    format!("invalidation of {} frames: {time}, {flushes} yields", show_count(event.frames));
                let size = ((to - from).max(0.8), (bottom - top).max(3.0));
                drawing.rect("inval", (from, top - 1.0), size, &title);
                for at in yields_ns.iter().step_by(flushes.div_ceil(MARKS).max(1)) {
                    drawing.line("flush", (x(*at), top - 4.0), (x(*at), top + 6.0));
                }
            }
            What::Fault { retries, .. } if lines < DRAWN => {
                lines += 1;
                // vCPUs that touch the same frame stay apart.
                let at = y(event.gfn) - 3.0 * (event.thread % 8) as f64;
                let class = if *retries > 0 { "retried" } else { "ok" };
                let title = format!(
                    "vCPU {}, frame {:#x}: {time}, {} retries",
                    event.thread,
                    event.gfn,
                    show_count(*retries)
                );
                drawing.rect(class, (from, at - 1.0), ((to - from).max(1.2), 2.4), &title);
            }
            What::Invalidation { .. } | What::Fault { .. } => {}
        }
    }
    drawing.text("small", (LEFT, TOP + HEIGHT + 12.0), Anchor::Start, "0");
    let end = show_duration(Duration::from_nanos(length));
    drawing.text("small", (WIDTH, TOP + HEIGHT + 12.0), Anchor::End, &end);
    drawing
}
