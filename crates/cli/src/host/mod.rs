//! `afterimage host`: what this host offers, what is missing, what that stops, and what turns it on.
//!
//! In three steps, so that each can be tested with made-up hosts: `gather` reads `/proc`, `/sys` and `/dev` under a
//! root directory ([`Files`]) and takes what only system calls can tell ([`Asked`]); `verdict` and `missing` judge
//! the facts; `table` prints them. A fact that cannot be read is unknown, never an error and never "no".

mod asked;
mod facts;
mod features;
mod files;
mod missing;
mod table;
mod verdict;

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use serde::Serialize;

use asked::Asked;
use facts::{Facts, gather};
use files::Files;
use missing::{Missing, missing};
use verdict::{Verdict, verdicts};

/// Version of the JSON: raised when a field changes its meaning or goes away, not when one is added.
const FORMAT: u32 = 1;

/// What this host offers, and what to turn on
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct HostArgs {
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Everything that the command says.
#[derive(Clone, Debug, Serialize)]
struct HostReport {
    format: u32,
    /// What can be started here.
    verdicts: Vec<Verdict>,
    #[serde(flatten)]
    facts: Facts,
    /// The gravest first.
    missing: Vec<Missing>,
}

impl HostReport {
    fn new(facts: Facts) -> Self {
        Self { format: FORMAT, verdicts: verdicts(&facts), missing: missing(&facts), facts }
    }
}

/// Looks at the host and prints what it finds. Ends with code 0 whatever that is.
pub(crate) fn run(args: HostArgs) -> anyhow::Result<ExitCode> {
    let report = HostReport::new(gather(&Files::of_host(), Asked::of_kernel()));
    let text = if args.json {
        serde_json::to_string_pretty(&report).context("the report could not be written as JSON")? + "\n"
    } else {
        table::render(&report)
    };
    match io::stdout().lock().write_all(text.as_bytes()) {
        // Whoever read the beginning (`afterimage host | head`) has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("the report could not be printed")
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::files::tests::root;
    use super::*;

    /// A report about a host of files alone, on which every question was answered "no".
    fn bare(root: &Path) -> HostReport {
        HostReport::new(gather(&Files::at(root), Asked::nothing()))
    }

    #[test]
    fn a_host_without_any_file_is_unknown_and_no_error() {
        let root = root(&[]);
        let report = bare(root.path());
        assert_eq!(report.facts.machine.memory_total_bytes, None);
        assert_eq!(report.facts.pages.hugetlb_2m, None);
        let text = table::render(&report);
        assert!(text.contains("unknown"), "{text}");
        assert!(!text.contains("None"), "{text}");
    }

    #[test]
    fn this_host_can_be_described() {
        let report = HostReport::new(gather(&Files::of_host(), Asked::of_kernel()));
        assert!(report.facts.machine.memory_total_bytes.is_some());
        assert!(report.facts.machine.cores_usable.is_some_and(|cores| cores > 0));
        let text = table::render(&report);
        for line in text.lines() {
            assert!(line.chars().count() <= 110, "a long line: {line}");
            assert_eq!(line.trim_end(), line);
        }
        let json = serde_json::to_value(&report).expect("JSON");
        assert_eq!(json["format"], FORMAT);
    }

    #[test]
    fn the_json_keeps_its_names() {
        let root = root(&[]);
        let json = serde_json::to_value(bare(root.path())).expect("JSON");
        let keys: Vec<_> = json.as_object().expect("an object").keys().map(String::as_str).collect();
        let mut expected = [
            "format",
            "verdicts",
            "kernel",
            "machine",
            "process",
            "kvm",
            "userfaultfd",
            "pages",
            "calls",
            "watching",
            "missing",
        ];
        expected.sort_unstable();
        assert_eq!(keys, expected);
        assert_eq!(json["kvm"]["state"], "missing");
        assert_eq!(json["userfaultfd"]["any"]["state"], "refused");
        assert_eq!(json["pages"]["hugetlb_2m"], serde_json::Value::Null);
        let first = &json["missing"][0];
        assert_eq!(first["effect"], "stops");
        assert!(first["turn_on"]["command"].is_string() || first["turn_on"]["advice"].is_string(), "{first}");
    }
}
