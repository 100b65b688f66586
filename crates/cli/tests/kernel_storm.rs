//! `afterimage storm --kernel`: real invalidations under a real guest are counted, and what is missing is said.

mod command;

use std::fs;

use afterimage_testing::skip;
use afterimage_vm::{KvmProbe, probe};
use command::{Running, afterimage, alone, has_kvm, to_end, wait_until};
use rustix::process::Signal;
use serde_json::Value;

/// Storms that a busy machine may spoil.
const ATTEMPTS: usize = 5;

/// Runs `storm --kernel` with these arguments, short; nothing without KVM.
fn storm(test: &str, arguments: &[&str]) -> Option<(String, Vec<Value>)> {
    if !matches!(probe(), KvmProbe::Usable(_)) {
        skip(test, "no usable /dev/kvm");
        return None;
    }
    let _alone = alone();
    let short =
        ["storm", "--kernel", "--duration", "200ms", "--repeat", "1", "--memory", "16M", "--json", "-"];
    let ended = to_end(afterimage().args(short).args(arguments));
    assert_eq!(ended.code(), 0, "{ended:?}");
    let cells = serde_json::from_str(&ended.stdout).expect("standard output is a list of cells");
    Some((ended.stderr, cells))
}

fn faults(cell: &Value) -> u64 {
    cell["faults"].as_u64().expect("a cell has faults")
}

#[test]
fn each_side_alone_is_calm_and_both_are_a_storm() {
    let test = "each_side_alone_is_calm_and_both_are_a_storm";
    // Fresh frames: each access faults. The last may be counted on one side of the sample only, and more of them where
    // another thread gets the CPU between the two sides.
    let is_even = |cell: &Value| faults(cell).abs_diff(cell["accesses"].as_u64().expect("a number")) <= 64;
    let mut storms = (0..ATTEMPTS).map_while(|_| storm(test, &["--scenario", "E"])).peekable();
    if storms.peek().is_none() {
        return;
    }
    let (table, cells) = storms.find(|(_, cells)| is_even(&cells[2])).expect("each access faults");
    let [uncontended, quiet, storm] = &cells[..] else { panic!("3 cells, not {cells:#?}") };
    assert_eq!((&uncontended["load"], &quiet["load"]), (&"uncontended".into(), &"quiet".into()));
    assert_eq!(uncontended["accesses"], 0);
    assert_eq!(quiet["invalidations"], 0);
    assert!(faults(quiet) > 0 && faults(storm) > 0, "{cells:#?}");
    assert!(uncontended["invalidations"].as_u64() > Some(0) && storm["invalidations"].as_u64() > Some(0));
    assert!(
        storm["invalidation_ns"]["median"].as_u64() > Some(100),
        "no system call is that fast: {storm:#?}"
    );
    assert!(storm["engine"].as_str().is_some_and(|name| name.starts_with("Linux ")));
    assert!(cells.iter().all(|cell| cell["wrong_pages"] == 0));
    assert!(table.contains("E: "), "{table}");
}

#[test]
fn a_wide_zap_takes_what_was_mapped_away() {
    let Some((_, cells)) =
        storm("a_wide_zap_takes_what_was_mapped_away", &["--scenario", "A", "--no-baseline"])
    else {
        return;
    };
    let [cell] = &cells[..] else { panic!("one cell, not {cells:#?}") };
    // What is mapped cannot be zapped without a flush.
    assert!(cell["flushes_per_invalidation"].as_f64().is_some_and(|flushes| flushes >= 1.0), "{cell:#?}");
    assert!(faults(cell) > 0, "what was zapped faults again: {cell:#?}");
    let median = cell["invalidation_ns"]["median"].as_u64().expect("there was an invalidation");
    assert!(median > 10_000, "nobody zaps 4,096 frames in {median} ns: {cell:#?}");
    assert_eq!(cell["wrong_pages"], 0);
}

#[test]
fn no_number_is_silently_missing() {
    let Some((table, cells)) = storm("no_number_is_silently_missing", &["--scenario", "E-inside,C"]) else {
        return;
    };
    for cell in &cells {
        let reasons = cell["not_available"].as_object().expect("a cell says what it has not");
        for number in ["retries", "wasted_fault_ins", "lock_wait_ns", "doomed_cpu_ns", "retries_per_fault"] {
            assert!(cell.get(number).is_some() != reasons.contains_key(number), "{number}: {cell:#?}");
        }
        let recorded = cell["load"] == "storm" && cell["by"] != "ksm";
        assert!(
            !recorded || cell["watched"].is_object() != reasons.contains_key("watched"),
            "a trace, or why there is none: {cell:#?}"
        );
    }
    for by in ["madvise", "mprotect", "ksm"] {
        let ran = cells.iter().any(|cell| cell["by"] == by);
        let name = if by == "ksm" { "KSM" } else { by };
        assert!(ran || table.contains(&format!("NOT RUN: C storm by {name}: ")), "{by}: {table}");
    }
}

/// Neither its settings nor its tracing stay as they were for a storm, however that ends.
#[test]
fn a_storm_that_is_killed_leaves_the_kernel_as_it_was() {
    let test = "a_storm_that_is_killed_leaves_the_kernel_as_it_was";
    let setting = |name| format!("/sys/kernel/mm/ksm/{name}");
    let may_set = fs::OpenOptions::new().write(true).open(setting("run")).is_ok();
    let traces = || -> Option<usize> {
        let instances = fs::read_dir("/sys/kernel/tracing/instances").ok()?;
        let ours = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with("afterimage-");
        Some(instances.filter(|found| found.as_ref().is_ok_and(|found| ours(&found.file_name()))).count())
    };
    let (true, Some(traces_before)) = (may_set, traces()) else {
        return skip(test, "KSM cannot be set here, or nothing can be traced");
    };
    if !has_kvm(test) {
        return;
    }
    let _alone = alone();
    let settings = || {
        ["run", "sleep_millisecs", "pages_to_scan"]
            .map(|name| fs::read_to_string(setting(name)).expect("it is there"))
    };
    let before = settings();
    let mut command = afterimage();
    command.args([
        "storm",
        "--kernel",
        "--scenario",
        "C",
        "--no-baseline",
        "--duration",
        "5s",
        "--repeat",
        "1",
        "--memory",
        "16M",
    ]);
    let storm = Running::start(&mut command, None);
    assert!(wait_until(|| settings() != before && traces() > Some(traces_before)), "KSM is set to work");
    storm.signal(Signal::KILL);
    assert_eq!(storm.end().status.code(), None);
    assert!(wait_until(|| settings() == before && traces() == Some(traces_before)), "{:?}", settings());
}

#[test]
fn two_kernels_are_set_beside_each_other() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("cells.json");
    let Some((_, cells)) =
        storm("two_kernels_are_set_beside_each_other", &["--scenario", "E", "--no-baseline"])
    else {
        return;
    };
    fs::write(&file, serde_json::to_vec(&cells).expect("it is JSON")).expect("the file can be written");
    let ended = to_end(afterimage().args(["storm", "--beside"]).args([&file, &file]));
    assert_eq!(ended.code(), 0, "{ended:?}");
    let invalidations = cells[0]["invalidations"].to_string();
    let row = ended.stdout.lines().find(|line| line.starts_with("invalidations")).expect("a row of them");
    assert_eq!(row.matches(&invalidations).count(), 2, "{row}");
}

#[test]
fn the_kernels_policies_are_not_ours_to_choose() {
    let ended = to_end(afterimage().args(["storm", "--kernel", "--precheck", "off"]));
    assert_eq!(ended.code(), 2, "{ended:?}");
    let ended = to_end(afterimage().args(["storm", "--kernel", "--vcpus", "1000"]));
    assert_eq!(ended.code(), 2, "{ended:?}");
    assert!(ended.stderr.contains("1 to 64 vCPUs"), "{ended:?}");
}

/// What could not run at all has shown nothing.
#[test]
fn a_storm_that_cannot_run_is_no_success() {
    let _alone = alone();
    if !has_kvm("a_storm_that_cannot_run_is_no_success") {
        return;
    }
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "ulimit -n 5; exec \"$0\" storm --kernel --scenario E --duration 20ms --repeat 1"]);
    let ended = to_end(shell.arg(env!("CARGO_BIN_EXE_afterimage")));
    assert_eq!(ended.code(), 2, "{ended:?}");
    let said = ended.stderr.lines().last().expect("a reason");
    assert!(said.starts_with("afterimage: no storm was run: E "), "{said}");
    assert!(said.contains("Too many open files") && said.contains("ulimit -n"), "{said}");
}
