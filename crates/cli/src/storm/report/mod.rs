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

use std::fmt::{self, Write as _};
use std::time::Duration;

use afterimage_storm::{Cell, Load, Outcome, Policies, Scenario};

use self::drawing::{Drawing, escape};
use super::table::{BYSTANDERS, cut_off, runs};
use crate::units::{show_bytes, show_duration, show_number};

/// The page about `outcomes`; `what` says of what machine they are, and how they came about.
pub(crate) fn page(outcomes: &[Outcome], what: &str) -> String {
    let mut page = String::new();
    write(&mut page, outcomes, what).expect("a string takes all that is written to it");
    page
}

fn write(page: &mut String, outcomes: &[Outcome], what: &str) -> fmt::Result {
    page.write_str("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n")?;
    page.write_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n")?;
    // Keeps browsers from asking for an icon.
    page.write_str("<link rel=\"icon\" href=\"data:,\">\n<title>Invalidation storms</title>\n")?;
    writeln!(page, "<style>\n{}</style>\n</head>\n<body>", include_str!("style.css"))?;
    writeln!(page, "<header><h1>Invalidation storms</h1>\n<p class=\"what\">{}</p></header>", escape(what))?;
    wrongs(page, outcomes)?;
    glance::write(page, outcomes)?;
    for &scenario in Scenario::ALL {
        let here: Vec<&Outcome> =
            outcomes.iter().filter(|outcome| outcome.cell.scenario == scenario).collect();
        let Some(first) = here.first() else { continue };
        let Cell { memory_bytes, vcpus, threads, .. } = &first.cell;
        let vcpus = show_number(*vcpus, "vCPU");
        let runs = runs(here.iter().map(|outcome| outcome.cell.runs));
        writeln!(page, "<section id=\"{scenario}\">\n<h2>{scenario}: {}</h2>", scenario.sentence())?;
        if here.iter().any(|outcome| outcome.cell.load == Load::Bystanders) {
            writeln!(page, "<p class=\"what\">{BYSTANDERS}.</p>")?;
        }
        writeln!(
            page,
            "<p class=\"what\">{} of memory, {vcpus}, {threads} invalidating; medians of {runs}, distributions of \
             all of them, timelines of the first.</p>",
            show_bytes(*memory_bytes)
        )?;
        for outcome in &here {
            if let Some(cut_off) = cut_off(&outcome.cell) {
                let who = name_in_page(&outcome.cell).0;
                writeln!(page, "<p class=\"what\">CUT OFF: {who}: {}.</p>", escape(&cut_off))?;
            }
        }
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
            None => (differences(policies), policies.to_string()),
        },
    }
}

/// In what policies are not those of Linux.
fn differences(policies: &Policies) -> String {
    let words = |policies: &Policies| {
        let Policies { precheck, yielding, sequence, coverage, turns, witness, after_retry } = policies;
        [
            format!("precheck {precheck}"),
            format!("yield {yielding}"),
            format!("sequence {sequence}"),
            format!("coverage {coverage}"),
            format!("turns {turns}"),
            witness.to_string(),
            after_retry.to_string(),
        ]
    };
    let (these, linux) = (words(policies), words(&Policies::LINUX));
    let differing: Vec<_> =
        these.into_iter().zip(linux).filter(|(this, linux)| this != linux).map(|(this, _)| this).collect();
    differing.join(", ")
}

/// The same, as it stands in the page: lines may break between what it was made of.
fn name_in_page(cell: &Cell) -> (String, String) {
    let (words, made_of) = name(cell);
    (escape(&words), escape(&made_of).replace('/', "/<wbr>"))
}

/// A line of a picture: whose it is, what is drawn, and what is told of it.
fn row(page: &mut String, cell: &Cell, drawing: &Drawing, told: &str) -> fmt::Result {
    let (words, made_of) = name_in_page(cell);
    writeln!(
        page,
        "<div class=\"row\"><div class=\"who\"><b>{words}</b> <small>{made_of}</small></div>\n\
         <div class=\"drawn\">{drawing}</div><div class=\"told\">{}</div></div>",
        escape(told)
    )
}

/// The scale under such lines, from 0 on.
fn axis(page: &mut String, to: Duration) -> fmt::Result {
    writeln!(
        page,
        "<div class=\"row\"><div class=\"who\"></div><div class=\"drawn axis\"><span>0</span><span>{}</span></div></div>",
        show_duration(to)
    )
}

/// What must not have happened, before anything else.
fn wrongs(page: &mut String, outcomes: &[Outcome]) -> fmt::Result {
    for Outcome { cell, .. } in outcomes.iter().filter(|outcome| !outcome.cell.is_good()) {
        let wrong = match cell.max.wrong_pages {
            0 => None,
            pages => Some(format!("{} in one run", show_number(pages, "wrong page"))),
        };
        for what in wrong.iter().chain(&cell.failures) {
            let (scenario, who) = (cell.scenario, name_in_page(cell).0);
            writeln!(page, "<p class=\"wrong\">WRONG: {scenario}, {who}: {}</p>", escape(what))?;
        }
    }
    Ok(())
}

/// The class that gives a cell its colour: baselines are grey, the others differ, the same in every drawing.
fn class(cells: &[&Outcome], index: usize) -> String {
    if !cells[index].cell.load.is_storm() {
        return "base".to_owned();
    }
    let before = cells[..index].iter().filter(|outcome| outcome.cell.load.is_storm()).count();
    let again = if before < 8 { "" } else { " again" };
    format!("c{}{again}", before % 8)
}

/// The cells that the whole storm blew in.
fn storms<'o>(cells: &[&'o Outcome]) -> Vec<(usize, &'o Outcome)> {
    let is_storm = |(_, outcome): &(usize, &Outcome)| outcome.cell.load.is_storm();
    cells.iter().copied().enumerate().filter(is_storm).collect()
}

#[cfg(test)]
mod tests {
    use afterimage_storm::{Engine, Measured, Precheck, Recording, Yielding};

    use super::*;

    fn outcome(policies: Policies, failures: Vec<String>) -> Outcome {
        let measured = Measured { wrong_pages: failures.len() as u64, ..Measured::default() };
        let cell = Cell {
            scenario: Scenario::C,
            engine: Engine::Afterimage,
            load: Load::Storm,
            policies: Some(policies),
            vcpus: 1,
            threads: 1,
            memory_bytes: 1 << 20,
            seed: 1,
            runs: 1,
            median: measured.clone(),
            min: measured.clone(),
            max: measured,
            failures,
        };
        Outcome { cell, recording: Recording::default() }
    }

    #[test]
    fn policies_without_a_name_are_told_by_what_differs() {
        let policies = Policies { precheck: Precheck::After, yielding: Yielding::Never, ..Policies::LINUX };
        let (words, made_of) = name(&outcome(policies, Vec::new()).cell);
        assert_eq!(words, "precheck after, yield never");
        assert_eq!(made_of, "after/never/global/hull/never/lock/refault");
        assert_eq!(name(&outcome(Policies::OURS, Vec::new()).cell).0, "ours");
    }

    /// A storm that went wrong must not look like one that did not.
    #[test]
    fn what_went_wrong_stands_first() {
        let good = page(&[outcome(Policies::LINUX, Vec::new())], "here");
        assert!(!good.contains("WRONG"), "{good}");
        let bad = page(&[outcome(Policies::LINUX, vec!["a <reference> is left".to_owned()])], "here");
        let wrong = bad.find("WRONG: C, Linux since 6.9: 1 wrong page in one run").expect("it is told");
        assert!(bad.contains("WRONG: C, Linux since 6.9: a &lt;reference&gt; is left"), "{bad}");
        assert!(wrong < bad.find("<section").expect("there is a section"));
    }

    #[test]
    fn faults_that_were_cut_off_are_told_of() {
        let mut outcome = outcome(Policies::BEFORE, Vec::new());
        outcome.cell.max.unfinished_faults = Some(0);
        assert!(!page(&[outcome.clone()], "here").contains("CUT OFF"));
        outcome.cell.max.unfinished_faults = Some(2);
        assert!(page(&[outcome], "here").contains("CUT OFF: before the change: 2 faults of one run"));
    }
}
