//! Two kernels' cells beside each other: what `storm --kernel --json` wrote on each.
//!
//! Times are left out: this is for kernels under emulation, where they mean nothing, and for machines that differ.

use core::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

const NAMES: usize = 34;
const COLUMN: usize = 26;

/// A row: its name, where in a cell it is, and what it is divided by.
type Row = (&'static str, &'static [&'static str], Option<&'static [&'static str]>);

const INVALIDATIONS: &[&str] = &["watched", "invalidations"];
const ROWS: &[Row] = &[
    ("flushes/invalidation", &["flushes_per_invalidation"], None),
    ("invalidations", &["invalidations"], None),
    ("faults", &["faults"], None),
    ("retries/fault", &["retries_per_fault"], None),
    ("wrong pages", &["wrong_pages"], None),
    ("recorded, per invalidation:", &[], None),
    ("  entries zapped", &["watched", "zapped"], Some(INVALIDATIONS)),
    ("  flushes", &["watched", "flushes"], Some(INVALIDATIONS)),
    ("  attempts of faults inside", &["watched", "faults"], Some(INVALIDATIONS)),
    ("  pages looked up inside", &["watched", "faulted_in"], Some(INVALIDATIONS)),
    ("  entries installed inside", &["watched", "installed"], Some(INVALIDATIONS)),
    ("  faults waited for mmu_lock", &["watched", "faults_waited", "count"], Some(INVALIDATIONS)),
    ("  invalidations waited for it", &["watched", "invalidations_waited", "count"], Some(INVALIDATIONS)),
];

/// What cells should have in common; a row where they do not.
const SIZES: [(&str, &str); 3] =
    [("vCPUs", "vcpus"), ("threads", "threads"), ("memory, bytes", "memory_bytes")];

/// Reads files of cells, and sets those of one scenario, load and way beside each other: whatever is in one file at least.
///
/// # Errors
///
/// A file cannot be read, or holds no cells of a kernel.
pub(crate) fn beside(files: &[impl AsRef<Path>]) -> Result<String> {
    let kernels = files.iter().map(|file| cells(file.as_ref())).collect::<Result<Vec<_>>>()?;
    let mut firsts: Vec<&Value> = Vec::new();
    for cell in kernels.iter().flatten() {
        if !firsts.iter().any(|first| is_same(cell, first)) {
            firsts.push(cell);
        }
    }
    let mut shown = String::new();
    for first in firsts {
        let column: Vec<Option<&Value>> =
            kernels.iter().map(|cells| cells.iter().find(|cell| is_same(cell, first))).collect();
        write_cells(&mut shown, first, &column);
    }
    Ok(shown)
}

fn cells(file: &Path) -> Result<Vec<Value>> {
    let name = file.display();
    let text = fs::read_to_string(file).with_context(|| format!("{name} cannot be read"))?;
    let cells: Vec<Value> =
        serde_json::from_str(&text).with_context(|| format!("{name} is no list of a storm's cells"))?;
    ensure!(
        !cells.is_empty() && cells.iter().all(|cell| cell.get("tables").is_some()),
        "{name} holds no cells of `storm --kernel`"
    );
    Ok(cells)
}

fn is_same(one: &Value, other: &Value) -> bool {
    ["scenario", "load", "by"].iter().all(|key| one[*key] == other[*key])
}

fn at<'c>(cell: &'c Value, path: &[&str]) -> &'c Value {
    path.iter().fold(cell, |value, key| &value[*key])
}

fn number(cell: &Value, (_, path, divisor): &Row) -> Option<f64> {
    let whole = divisor.map_or(Some(1.0), |path| at(cell, path).as_f64().filter(|&whole| whole > 0.0));
    Some(at(cell, path).as_f64()? / whole?)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

fn write_cells(shown: &mut String, first: &Value, column: &[Option<&Value>]) {
    let mut line = |name: &str, values: &mut dyn Iterator<Item = String>| {
        let line = values.fold(format!("{name:NAMES$}"), |line, value| line + &format!("{value:>COLUMN$}"));
        // Writing to a string cannot fail.
        let _ = writeln!(shown, "{}", line.trim_end());
    };
    let title = format!("{} {} by {}", text(&first["scenario"]), text(&first["load"]), text(&first["by"]));
    let of_kernel = |cell: &Option<&Value>| {
        cell.map_or("–".to_owned(), |cell| {
            let name = text(&cell["engine"]);
            name.split('-').next().unwrap_or(name).to_owned()
        })
    };
    line(&title, &mut column.iter().map(of_kernel));
    for (name, key) in SIZES {
        if column.iter().flatten().any(|cell| cell[key] != first[key]) {
            line(
                name,
                &mut column.iter().map(|cell| cell.map_or("–".to_owned(), |cell| cell[key].to_string())),
            );
        }
    }
    for row in ROWS {
        let values: Vec<_> = column.iter().map(|cell| cell.and_then(|cell| number(cell, row))).collect();
        let is_heading = row.1.is_empty() && column.iter().flatten().any(|cell| cell["watched"].is_object());
        // What nobody can know needs no row.
        if is_heading || values.iter().any(Option::is_some) {
            let show = |value: Option<f64>| match value {
                Some(value) if value == value.trunc() => format!("{value}"),
                Some(value) => format!("{value:.2}"),
                None if is_heading => String::new(),
                None => "not available".to_owned(),
            };
            line(row.0, &mut values.into_iter().map(show));
        }
    }
    for cell in column.iter().flatten() {
        let order = cell["watched"]["order"].as_array().map_or(&[][..], Vec::as_slice);
        if !order.is_empty() {
            let steps: Vec<_> = order.iter().map(step).collect();
            let name = text(&cell["engine"]);
            let _ = writeln!(shown, "  in order, {name}:\n    {}", steps.join(", "));
        }
    }
    shown.push('\n');
}

/// `["fault_waits", 3]`.
fn step(step: &Value) -> String {
    let name = text(&step[0]).replace('_', " ");
    match step[1].as_u64() {
        Some(count) if count > 1 => format!("{name} ×{count}"),
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(engine: &str, flushes: f64, watched: Value) -> Value {
        serde_json::json!({
            "scenario": "A", "load": "storm", "by": "madvise", "engine": engine, "tables": "tdp",
            "flushes_per_invalidation": flushes, "invalidations": 4, "faults": 10, "wrong_pages": 0,
            "watched": watched,
        })
    }

    #[test]
    fn what_one_of_two_does_not_know_is_said() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = |name: &str, cell: Value| {
            let path = directory.path().join(name);
            fs::write(&path, serde_json::to_vec(&[cell]).expect("it is JSON")).expect("it can be written");
            path
        };
        let watched = serde_json::json!({
            "invalidations": 2, "zapped": 8, "faults": 6, "installed": 0, "faults_waited": {"count": 5, "ns": 1},
            "order": [["begin", 1], ["zap", 3], ["fault_waits", 1]],
        });
        let before = file("before", cell("Linux 6.1.0-56-cloud", 12.5, watched));
        let after = file("after", cell("Linux 6.12.1+deb12-cloud", 1.0, Value::Null));
        let shown = beside(&[before, after]).expect("both can be read");
        let line = |name: &str| {
            let line = shown.lines().find(|line| line.trim_start().starts_with(name)).expect(name);
            line.trim_start()[name.len()..].split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(line("A storm by madvise"), "Linux 6.1.0 Linux 6.12.1+deb12");
        assert_eq!(line("flushes/invalidation"), "12.50 1");
        assert_eq!(line("faults waited for mmu_lock"), "2.50 not available");
        assert!(shown.contains("begin, zap ×3, fault waits"), "{shown}");
        assert!(!shown.contains("retries/fault"), "nobody knows: {shown}");
    }

    /// What ran on one of them only, or with other sizes, must not look as if it had not, or alike.
    #[test]
    fn what_differs_is_said() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = |name: &str, cells: &[Value]| {
            let path = directory.path().join(name);
            fs::write(&path, serde_json::to_vec(cells).expect("it is JSON")).expect("it can be written");
            path
        };
        let with = |mut cell: Value, key: &str, value: Value| {
            cell[key] = value;
            cell
        };
        let old = with(cell("Linux 6.1", 2.0, Value::Null), "vcpus", 2.into());
        let new = with(cell("Linux 6.12", 1.0, Value::Null), "vcpus", 4.into());
        let only_new = with(new.clone(), "scenario", "C".into());
        let shown = beside(&[file("old", &[old]), file("new", &[only_new, new])]).expect("both can be read");
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let lines: Vec<_> = shown.lines().map(words).collect();
        let has = |line: &str| lines.contains(&words(line));
        assert!(has("A storm by madvise Linux 6.1 Linux 6.12") && has("vCPUs 2 4"), "{shown}");
        assert!(has("C storm by madvise – Linux 6.12"), "{shown}");
        assert!(!shown.contains("threads"), "they are alike: {shown}");
    }

    #[test]
    fn other_files_are_refused() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        fs::write(file.path(), "[{}]").expect("it can be written");
        assert!(beside(&[file.path()]).is_err());
    }
}
