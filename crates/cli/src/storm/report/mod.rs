//! A storm as one page for a person: what the change did at a glance, then all that was measured.
//!
//! The page is one file of HTML, style and drawings (SVG). It loads nothing and runs nothing, so it can be mailed, kept
//! and printed. Colours follow the reader's light or dark setting; nothing is told by colour alone.

mod drawing;
mod glance;
mod latency;
mod matrix;
mod retries;
mod timeline;

use std::fmt::Write as _;

use afterimage_storm::{Cell, Load, Outcome, Scenario};

use self::drawing::escape;
use super::table::BYSTANDERS;
use crate::units::show_bytes;

/// The page about `outcomes`; `what` says of what machine and when they are.
pub(crate) fn page(outcomes: &[Outcome], what: &str) -> String {
    let mut page = String::new();
    write(&mut page, outcomes, what).expect("a string takes all that is written to it");
    page
}

fn write(page: &mut String, outcomes: &[Outcome], what: &str) -> std::fmt::Result {
    page.write_str("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n")?;
    page.write_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n")?;
    // Keeps browsers from asking for an icon.
    page.write_str("<link rel=\"icon\" href=\"data:,\">\n<title>Invalidation storms</title>\n")?;
    writeln!(page, "<style>\n{}</style>\n</head>\n<body>", include_str!("style.css"))?;
    writeln!(page, "<header><h1>Invalidation storms</h1>\n<p class=\"what\">{}</p></header>", escape(what))?;
    glance::write(page, outcomes)?;
    for &scenario in Scenario::ALL {
        let here: Vec<&Outcome> =
            outcomes.iter().filter(|outcome| outcome.cell.scenario == scenario).collect();
        let Some(first) = here.first() else { continue };
        let Cell { memory_bytes, vcpus, threads, runs, .. } = &first.cell;
        writeln!(page, "<section id=\"{scenario}\">\n<h2>{scenario}: {}</h2>", scenario.sentence())?;
        if here.iter().any(|outcome| outcome.cell.load == Load::Bystanders) {
            writeln!(page, "<p class=\"what\">{BYSTANDERS}.</p>")?;
        }
        writeln!(
            page,
            "<p class=\"what\">{} of memory, {vcpus} vCPUs, {threads} invalidating; medians of {runs} runs, distributions of \
             all of them, timelines of the first.</p>",
            show_bytes(*memory_bytes)
        )?;
        matrix::write(page, &here)?;
        latency::write(page, &here)?;
        retries::write(page, &here)?;
        timeline::write(page, &here)?;
        page.write_str("</section>\n")?;
    }
    page.write_str("</body>\n</html>\n")
}

/// What a reader calls a cell: in a few words, and what it was made of.
fn name(cell: &Cell) -> (String, String) {
    match (cell.load, &cell.policies) {
        (Load::Uncontended, _) => ("uncontended".to_owned(), "no faults in the way".to_owned()),
        (Load::Busy, _) => ("busy".to_owned(), "vCPUs that do not fault".to_owned()),
        (Load::Quiet, _) => ("quiet".to_owned(), "no invalidations".to_owned()),
        (Load::Storm | Load::Bystanders, None) => (cell.engine.to_string(), "as it is".to_owned()),
        (Load::Storm | Load::Bystanders, Some(policies)) => match policies.name() {
            Some(name) => (name.to_owned(), policies.to_string()),
            None => (policies.to_string(), String::new()),
        },
    }
}

/// The class that gives a cell its colour: baselines are grey, the others differ, the same in every drawing.
fn class(cells: &[&Outcome], index: usize) -> String {
    if !cells[index].cell.load.is_storm() {
        return "base".to_owned();
    }
    let before = cells[..index].iter().filter(|outcome| outcome.cell.load.is_storm()).count();
    format!("c{}", before % 8)
}

/// The cells that the whole storm blew in.
fn storms<'o>(cells: &[&'o Outcome]) -> Vec<(usize, &'o Outcome)> {
    let is_storm = |(_, outcome): &(usize, &Outcome)| outcome.cell.load.is_storm();
    cells.iter().copied().enumerate().filter(is_storm).collect()
}
