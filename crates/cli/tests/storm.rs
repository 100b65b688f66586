//! Storms blow, end, and tell; and what the change is about can be seen in them.

mod command;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use afterimage_testing::skip;
use rustix::process::Signal;
use serde_json::Value;

use command::{Running, afterimage, alone, to_end};

/// Attempts at what a busy machine may not show at once.
const ATTEMPTS: usize = 40;

/// The cells of a storm with these options, which must end well.
#[track_caller]
fn storm(options: &[&str]) -> Vec<Value> {
    let ended = to_end(afterimage().args(["storm", "--json", "-"]).args(options).args(once(options)));
    assert_eq!(ended.code(), 0, "{options:?}: {ended:?}");
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {}", ended.stdout))
}

/// One run of each cell is enough, where nothing else is asked for.
fn once(options: &[&str]) -> &'static [&'static str] {
    if options.contains(&"--repeat") { &[] } else { &["--repeat", "1"] }
}

#[track_caller]
fn number(cell: &Value, pointer: &str) -> f64 {
    let value = cell.pointer(pointer).unwrap_or_else(|| panic!("{pointer} is missing: {cell:#}"));
    value.as_f64().unwrap_or_else(|| panic!("{pointer} is no number: {value}"))
}

#[test]
fn every_scenario_ends_without_a_wrong_page() {
    let _alone = alone();
    let cells = storm(&["--duration", "20ms", "--memory", "4M", "--shuffle"]);
    // Three baselines and six policies.
    assert_eq!(cells.len(), 6 * 9);
    for cell in &cells {
        assert_eq!(number(cell, "/wrong_pages"), 0.0, "{cell:#}");
        assert_eq!(cell["failures"], Value::Array(vec![]));
        let (has_faults, has_invalidations) = match cell["load"].as_str() {
            Some("uncontended" | "busy") => (false, true),
            Some("quiet") => (true, false),
            _ => (true, true),
        };
        // In a few milliseconds of a busy machine a thread may not have had a turn, but not in all of them.
        assert!(has_invalidations || number(cell, "/invalidations") == 0.0, "{cell:#}");
        assert!(has_faults || number(cell, "/faults") == 0.0, "{cell:#}");
        // Nor has who maps memory before it is taken looked any up for it.
        assert!(has_faults || number(cell, "/wasted_fault_ins") == 0.0, "{cell:#}");
    }
    for number_of in ["/invalidations", "/faults"] {
        assert!(cells.iter().map(|cell| number(cell, number_of)).sum::<f64>() > 0.0);
    }
}

#[test]
fn nobody_takes_what_bystanders_touch() {
    let _alone = alone();
    let options =
        ["--bystanders", "--duration", "20ms", "--memory", "4M", "--vcpus", "1", "--witness", "intent"];
    for _ in 0..ATTEMPTS {
        let cells = storm(&options);
        let beside: Vec<_> = cells.iter().filter(|cell| cell["load"] == "bystanders").collect();
        assert_eq!((beside.len(), cells.len()), (6, 18), "each scenario, uncontended and quiet");
        for cell in &beside {
            assert_eq!((&cell["wrong_pages"], &cell["witness"]), (&0.into(), &"intent".into()), "{cell}");
            assert!(cell["latency_ns"]["inside"].is_null(), "{cell}");
            assert!(cell["invalidations"].as_u64() > Some(0), "{cell}");
        }
        // In a few milliseconds of a busy machine a vCPU may not have had a turn.
        if beside.iter().all(|cell| !cell["latency_ns"]["outside"].is_null()) {
            assert!(beside.iter().all(|cell| cell["faults"].as_u64() > Some(0)), "{beside:#?}");
            return;
        }
    }
    panic!("some bystander never had a turn");
}

#[test]
fn the_cells_have_the_promised_shape() {
    let _alone = alone();
    let cells =
        storm(&["--scenario", "C,e-inside", "--duration", "50ms", "--no-baseline", "--precheck", "off"]);
    assert_eq!(cells.len(), 2);
    for (cell, scenario) in cells.iter().zip(["C", "E-inside"]) {
        for (field, value) in [
            ("scenario", scenario),
            ("engine", "afterimage"),
            ("load", "storm"),
            ("precheck", "off"),
            ("yield", "contention"),
            ("sequence", "global"),
            ("coverage", "hull"),
            ("turns", "never"),
            ("witness", "lock"),
            ("after_retry", "refault"),
        ] {
            assert_eq!(cell[field], value, "{field}");
        }
        for pointer in [
            "/vcpus",
            "/threads",
            "/memory_bytes",
            "/seed",
            "/runs",
            "/elapsed_ns",
            "/accesses",
            "/faults",
            "/unfinished_faults",
            "/invalidations",
            "/flushes_per_invalidation",
            "/flushes_for_waiters_per_invalidation",
            "/flushes_for_scheduler_per_invalidation",
            "/yields_per_invalidation",
            "/yields_to_waiters_per_invalidation",
            "/retries/before_fault_in",
            "/retries/after_fault_in",
            "/retries/under_lock",
            "/retries/lost_race",
            "/retries/slot_changing",
            "/most_retries",
            "/most_ends",
            "/wasted_fault_ins",
            "/invalidation_ns/median",
            "/invalidation_ns/mean",
            "/invalidation_ns/max",
            "/lock_wait_ns/faults",
            "/lock_wait_ns/invalidations",
            "/doomed_lock_acquisitions",
            "/doomed_cpu_ns",
            "/wrong_pages",
            "/min/faults",
            "/max/faults",
        ] {
            assert!(number(cell, pointer) >= 0.0, "{pointer}");
        }
        // Looked at nowhere else, so found nowhere else.
        assert_eq!(number(cell, "/retries/before_fault_in") + number(cell, "/retries/after_fault_in"), 0.0);
        assert_eq!(number(cell, "/doomed_lock_acquisitions"), number(cell, "/retries/under_lock"));
        assert!(cell["latency_ns"].is_object());
    }
}

/// Every field is told of where the document says what the fields are.
#[test]
fn each_field_is_explained() {
    let _alone = alone();
    let cells = storm(&["--scenario", "A,E-inside", "--duration", "50ms", "--memory", "8M"]);
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/the-change.md");
    let document = std::fs::read_to_string(document).expect("it is there");
    let table = document.split_once("## The JSON").expect("there is such a part").1;
    let table = table.split_once("\n## ").map_or(table, |(table, _)| table);
    let mut fields = BTreeSet::new();
    cells.iter().for_each(|cell| gather(cell, &mut fields));
    assert!(fields.len() > 40, "{fields:?}");
    for field in fields {
        assert!(table.contains(&format!("`{field}`")), "{field} is not explained");
    }
}

/// The names of all fields, those within others, too.
fn gather(value: &Value, into: &mut BTreeSet<String>) {
    for (name, value) in value.as_object().into_iter().flatten() {
        into.insert(name.clone());
        gather(value, into);
    }
}

#[test]
fn a_zap_that_yields_to_doomed_faults_flushes_over_and_over() {
    let _alone = alone();
    let mut most: f64 = 0.0;
    for _ in 0..ATTEMPTS {
        let options = ["--scenario", "A", "--memory", "8M", "--vcpus", "2", "--duration", "50ms"];
        let cells = storm(&[&options[..], &["--no-baseline", "--precheck", "off"]].concat());
        let flushes = number(&cells[0], "/flushes_per_invalidation");
        if flushes > 3.0 && number(&cells[0], "/doomed_lock_acquisitions") > 0.0 {
            return;
        }
        most = most.max(flushes);
    }
    panic!("never more than {most} flushes for each invalidation, or never for a doomed fault");
}

#[test]
fn with_the_checks_a_doomed_fault_disturbs_nobody() {
    let _alone = alone();
    let mut least = f64::INFINITY;
    for _ in 0..ATTEMPTS {
        let options = ["--scenario", "A", "--memory", "8M", "--vcpus", "2", "--duration", "50ms"];
        let cells = storm(&[&options[..], &["--precheck", "both"]].concat());
        let of = |load: &str| {
            cells.iter().find(|cell| cell["load"] == load).unwrap_or_else(|| panic!("no {load}: {cells:#?}"))
        };
        let (uncontended, busy, both) = (of("uncontended"), of("busy"), of("storm"));
        // A doomed fault takes the lock only if the invalidation began between its last look and the lock: once at most.
        let raced = number(both, "/invalidations") * 2.0 * 2.0;
        assert!(number(both, "/doomed_lock_acquisitions") <= raced, "{both:#}");
        let yields = number(both, "/yields_to_waiters_per_invalidation") * number(both, "/invalidations");
        assert!(yields <= raced, "it yields to no others than those: {both:#}");
        let flushes = |cell| number(cell, "/flushes_per_invalidation");
        let owed = |cell, to: &str| number(cell, &format!("/flushes_for_{to}_per_invalidation"));
        assert_eq!(owed(busy, "waiters"), 0.0, "nobody faults there: {busy:#}");
        for cell in [uncontended, busy, both] {
            let at_the_end = flushes(cell) - owed(cell, "waiters") - owed(cell, "scheduler");
            assert!((-1e-9..=1.0 + 1e-9).contains(&at_the_end), "{at_the_end}: {cell:#}");
        }
        least = least.min(flushes(both) - flushes(uncontended));
        if least <= 1.0 {
            return;
        }
    }
    panic!("always {least} more flushes than uncontended");
}

#[test]
fn what_cannot_blow_is_refused_in_one_sentence() {
    for (options, part) in [
        (&["--repeat", "0"][..], "--repeat is 0, and must be from 1 to 1000"),
        // As many runs as would fill the machine's memory before the first began.
        (&["--repeat", "99999999999"], "and must be from 1 to 1000"),
        (&["--kernel", "--repeat", "1001"], "and must be from 1 to 1000"),
        (&["--json", "-", "--report", "-"], "two results would be written to standard output"),
        (&["--json", "/nowhere/at.all"], "/nowhere/at.all cannot be written"),
        (&["--vcpus", "0"], "1 to 256 vCPUs"),
        (&["--vcpus", "257"], "1 to 256 vCPUs"),
        (&["--threads", "2"], "a storm A takes 1 thread that invalidates, not 2"),
        (&["--scenario", "D,B", "--threads", "2"], "a storm B takes 1 thread that invalidates, not 2"),
        (&["--scenario", "B", "--kernel", "--threads", "2"], "a storm B takes 1 thread"),
        (&["--scenario", "C", "--threads", "9"], "1 to 8 threads"),
        (&["--memory", "4k"], "512 KiB to 256 GiB"),
        (&["--memory", "12T"], "512 KiB to 256 GiB"),
        (&["--memory", "1000001"], "whole frames of 4 KiB of memory, and 1000001 bytes are none"),
        (&["--simulate", "--memory", "65T"], "512 KiB to 64 TiB"),
        (&["--simulate", "--memory", "1000001"], "whole frames of 4 KiB"),
        (&["--simulate", "--vcpus", "5000"], "1 to 4096 vCPUs"),
    ] {
        let ended = to_end(afterimage().arg("storm").args(options));
        assert_eq!(ended.code(), 2, "{options:?}: {ended:?}");
        assert!(ended.stderr.contains(part), "{options:?}: {}", ended.stderr);
        assert_eq!(ended.stderr.lines().count(), 1, "{options:?}: {}", ended.stderr);
        assert!(ended.stdout.is_empty());
    }
    let ended = to_end(afterimage().args(["storm", "--precheck", "sometimes"]));
    assert_eq!(ended.code(), 2);
    assert!(ended.stderr.contains("write one of off, before, after, both"), "{}", ended.stderr);
}

#[test]
fn what_contradicts_is_refused() {
    for options in [
        &["--kernel", "--simulate"][..],
        &["--bystanders", "--simulate"],
        &["--bystanders", "--kernel"],
        &["--kernel", "--coverage", "exact"],
        &["--kernel", "--turns", "slice"],
        &["--beside", "a.json", "--scenario", "A"],
        &["--beside", "a.json", "--kernel"],
    ] {
        let ended = to_end(afterimage().arg("storm").args(options));
        assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{options:?}: {ended:?}");
        assert!(ended.stderr.contains("cannot be used with"), "{options:?}: {}", ended.stderr);
    }
}

#[test]
fn each_result_has_a_file_of_its_own() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("cells.json");
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).expect("a link");
    let ended = to_end(afterimage().args(["storm", "--json"]).arg(&path).arg("--trace").arg(&link));
    assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{ended:?}");
    assert!(ended.stderr.contains("two results would be written to "), "{}", ended.stderr);
    assert!(!path.exists(), "nothing is left behind");
}

/// Of several results, what cannot be kept takes nothing else with it.
#[test]
fn a_result_that_cannot_be_kept_takes_no_other_with_it() {
    let _alone = alone();
    let test = "a_result_that_cannot_be_kept_takes_no_other_with_it";
    if !Path::new("/dev/full").exists() {
        return skip(test, "there is no /dev/full");
    }
    let directory = tempfile::tempdir().expect("a directory");
    let report = directory.path().join("report.html");
    let options =
        ["--scenario", "E", "--memory", "1M", "--duration", "5ms", "--repeat", "1", "--no-baseline"];
    let mut command = afterimage();
    command.args(["storm", "--json", "/dev/full", "--report"]).arg(&report).args(options);
    let ended = to_end(&mut command);
    assert_eq!(ended.code(), 2, "{ended:?}");
    assert!(ended.stderr.contains("cannot be written to /dev/full: No space left"), "{}", ended.stderr);
    assert!(ended.stdout.contains("WRONG PAGES"), "the table is shown: {}", ended.stdout);
    let page = std::fs::read_to_string(&report).expect("it is there");
    assert!(page.ends_with("</html>\n"), "the page is whole");
}

#[test]
fn an_interrupted_storm_tells_what_it_has() {
    let _alone = alone();
    let mut command = afterimage();
    command.args(["storm", "--json", "-", "--scenario", "A", "--memory", "8M", "--duration", "1h"]);
    let mut running = Running::start(&mut command, None);
    running.wait_started();
    running.signal(Signal::INT);
    let ended = running.end();
    if ended.code() == 2 {
        // It had not begun yet.
        assert!(ended.stderr.contains("interrupted before anything was measured"), "{ended:?}");
        return;
    }
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.stderr.contains("interrupted in run 1 of 27: "), "{ended:?}");
    let cells: Vec<Value> = serde_json::from_str(&ended.stdout).expect("it wrote its cells");
    assert_eq!(cells.len(), 1, "one was blowing: {cells:#?}");
}

/// The simulation measures costs for two seconds before its first run.
#[test]
fn who_interrupts_before_the_first_run_keeps_the_result_before() {
    let _alone = alone();
    let directory = tempfile::tempdir().expect("a directory");
    let (old, new) = (directory.path().join("old.json"), directory.path().join("new.html"));
    std::fs::write(&old, "old").expect("an old result");
    let mut command = afterimage();
    command.args(["storm", "--simulate", "--vcpus", "448", "--memory", "12T", "--json"]).arg(&old);
    let mut running = Running::start(command.arg("--report").arg(&new), None);
    running.wait_started();
    running.signal(Signal::TERM);
    let ended = running.end();
    assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{ended:?}");
    assert!(ended.stderr.contains("interrupted before anything was measured"), "{ended:?}");
    assert_eq!(std::fs::read_to_string(&old).expect("it is there"), "old");
    assert!(!new.exists(), "an empty page is left behind");
}

#[test]
fn what_is_asked_for_twice_is_done_once() {
    let _alone = alone();
    let options = ["--scenario", "C,c", "--precheck", "off,off", "--no-baseline", "--duration", "5ms"];
    assert_eq!(storm(&options).len(), 1);
}

/// The last seed has none behind it for a second run.
#[test]
fn every_number_is_a_seed() {
    let _alone = alone();
    let options = ["--scenario", "C", "--no-baseline", "--precheck", "off", "--duration", "5ms"];
    storm(&[&options[..], &["--repeat", "2", "--seed", "18446744073709551615"]].concat());
}

#[test]
fn the_simulation_goes_beyond_the_machine_and_says_what_it_is_worth() {
    let _alone = alone();
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("cells.json");
    let options =
        ["--scenario", "B", "--vcpus", "448", "--memory", "12T", "--duration", "1ms", "--repeat", "1"];
    let mut command = afterimage();
    command.args(["storm", "--simulate", "--no-baseline", "--json"]).arg(&path).args(options);
    let ended = to_end(command.args(["--precheck", "both"]));
    assert_eq!(ended.code(), 0, "{ended:?}");
    for part in ["calibration, on real threads", "zap an entry", "error", "12 TiB of memory, 448 vCPUs"] {
        assert!(ended.stdout.contains(part), "{part}: {}", ended.stdout);
    }
    let cells = command::read_json(&path).expect("it wrote its cells");
    assert_eq!(cells[0]["engine"], "simulation");
    assert!(number(&cells[0], "/faults") > 0.0 && number(&cells[0], "/invalidations") > 0.0);
}

/// A file system that is full, in a namespace of its own, which goes with the command.
#[test]
fn a_full_disk_keeps_the_result_before() {
    let _alone = alone();
    let test = "a_full_disk_keeps_the_result_before";
    let directory = tempfile::tempdir().expect("a directory");
    // Room for the old result, and not for all cells.
    let script = "mount -t tmpfs -o size=4k none . && cd \"$PWD\" && printf old > cells.json || exit 77
        \"$0\" storm --scenario E --memory 1M --duration 5ms --repeat 1 --json cells.json
        echo \"code $?\"; cat cells.json";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script, env!("CARGO_BIN_EXE_afterimage")]).stdin(Stdio::null());
    let ended = to_end(command.current_dir(directory.path()));
    if !ended.stdout.contains("code ") {
        return skip(test, format!("nothing can be mounted here: {}", ended.stderr));
    }
    assert!(ended.stdout.contains("WRONG PAGES"), "the table is shown: {ended:?}");
    assert!(ended.stdout.ends_with("code 2\nold"), "{ended:?}");
    assert!(ended.stderr.contains("cells.json: No space left on device"), "{ended:?}");
}

/// What is known of each page takes more than there is.
#[test]
fn a_storm_that_does_not_fit_is_refused() {
    let _alone = alone();
    let Some(mut command) = limited("a_storm_that_does_not_fit_is_refused", "--as=1000000000") else {
        return;
    };
    command.args(["storm", "--scenario", "C", "--memory", "256G", "--duration", "5ms", "--no-baseline"]);
    let ended = to_end(&mut command);
    assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{ended:?}");
    assert!(ended.stderr.contains("too little memory for the storm"), "{ended:?}");
}

/// The command under a limit of its own.
fn limited(test: &str, limit: &str) -> Option<Command> {
    if Command::new("prlimit").arg("--version").output().is_err() {
        skip(test, "there is no prlimit: apt-get install util-linux");
        return None;
    }
    let mut command = Command::new("prlimit");
    command.args([limit, env!("CARGO_BIN_EXE_afterimage")]).stdin(Stdio::null());
    Some(command)
}

/// A limit on the size of files is a full disk, and no end in the middle of a write.
#[test]
fn a_limit_on_files_keeps_the_result_before() {
    let _alone = alone();
    let test = "a_limit_on_files_keeps_the_result_before";
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("cells.json");
    std::fs::write(&path, "old").expect("an old result");
    let Some(mut command) = limited(test, "--fsize=1024") else { return };
    command.args([
        "storm",
        "--scenario",
        "E",
        "--memory",
        "1M",
        "--duration",
        "5ms",
        "--repeat",
        "1",
        "--json",
    ]);
    let ended = to_end(command.arg(&path));
    assert_eq!(ended.code(), 2, "{ended:?}");
    assert!(ended.stderr.contains("cells.json: File too large"), "{ended:?}");
    assert!(ended.stdout.contains("WRONG PAGES"), "the table is shown: {ended:?}");
    assert_eq!(std::fs::read_to_string(&path).expect("it is there"), "old");
}
