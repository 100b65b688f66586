//! Short runs with every option: nothing is wrong, the budget holds, and the JSON has everything.

mod command;

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;

use afterimage_testing::{HugePages, skip};
use serde_json::{Value, json};

use command::{Run, afterimage, alone, has_guest, has_kvm, read_json, run, showing, to_end};

/// Memory so small that a second of a slow build is enough to go around it many times.
const SMALL: [&str; 4] = ["--memory", "8m", "--resident", "1m"];
/// Runs until a rare event shows.
const TRIES: usize = 8;

/// Runs `options` for a moment and checks what holds for every good run; `echoed` are options as the JSON repeats them.
#[track_caller]
fn good(options: &[&str], echoed: Value) -> Run {
    good_for("1s", options, echoed)
}

/// The same for a time.
#[track_caller]
fn good_for(length: &str, options: &[&str], echoed: Value) -> Run {
    let run = run(["--duration", length].iter().chain(options));
    check_good(&run);
    for (name, value) in echoed.as_object().expect("options by name") {
        assert_eq!(run.json["options"][name], *value, "--{name} is echoed");
    }
    run
}

#[track_caller]
fn check_good(run: &Run) {
    let Run { ended, json } = run;
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert_eq!((run.number("/wrong_pages"), run.failures()), (0, vec![]));
    for pointer in NUMBERS {
        run.number(pointer);
    }
    assert!(run.number("/elapsed_ms") >= run.number("/options/duration_ms"), "it ran to its end: {json:#}");
    assert!(run.number("/accesses") > 0, "{json:#}");
    assert!(run.number("/faults/taken") > 0, "{json:#}");
    let points = ["before_fault_in", "after_fault_in", "under_lock", "lost_race", "slot_changing"];
    let retries: u64 = points.iter().map(|point| run.number(&format!("/retries/{point}"))).sum();
    assert_eq!(retries, run.number("/faults/retry"), "every retry has its point");
    let (budget, batch) = (run.number("/resident_bytes/budget"), run.number("/resident_bytes/batch"));
    assert!(run.number("/resident_bytes/peak") <= budget + batch, "{}", json["resident_bytes"]);
    assert_eq!(budget, run.number("/options/resident"));
    assert!(json["memory"]["bookkeeping_bytes_per_frame"].as_f64().is_some_and(|bytes| bytes <= 16.0));

    assert!(ended.stdout.contains("\n  wrong pages               0\n"), "{}", ended.stdout);
    for heading in ["guest\n", "faults\n", "invalidations\n", "memory\n"] {
        assert!(ended.stdout.contains(heading), "{heading} is missing: {}", ended.stdout);
    }
    // It is no terminal: one line, and no live one.
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    assert!(!ended.stderr.contains('\u{1b}'), "{}", ended.stderr);
}

const NUMBERS: &[&str] = &[
    "/elapsed_ms",
    "/writes",
    "/faults/fixed",
    "/faults/fast",
    "/faults/spurious",
    "/faults/emulated",
    "/faults/failed",
    "/wasted_fault_ins",
    "/invalidations/evict/count",
    "/invalidations/evict/frames",
    "/invalidations/evict/median_ns",
    "/invalidations/evict/max_ns",
    "/invalidations/discard/count",
    "/invalidations/discard/frames",
    "/invalidations/discard/median_ns",
    "/invalidations/discard/max_ns",
    "/invalidations/protect/count",
    "/zapped_frames",
    "/flushes",
    "/yields",
    "/lock_wait_ns/faults",
    "/lock_wait_ns/invalidations",
    "/latency_ns/inside/count",
    "/latency_ns/inside/p50",
    "/latency_ns/inside/p99",
    "/latency_ns/inside/p999",
    "/latency_ns/inside/max",
    "/latency_ns/outside/count",
    "/latency_ns/outside/p50",
    "/latency_ns/outside/p99",
    "/latency_ns/outside/p999",
    "/latency_ns/outside/max",
    "/stored_bytes",
    "/memory/store_refusals",
    "/memory/beyond_budget_pages",
    "/memory/from_source_frames",
    "/memory/from_store_frames",
    "/memory/from_zero_frames",
    "/memory/stored_frames",
    "/memory/saved_bytes",
];

/// Runs again, with another seed, until `shows`.
#[track_caller]
fn until_it_shows(what: &str, options: &[&str], shows: impl Fn(&Run) -> bool) {
    for seed in 1..=TRIES {
        let run = run(["--duration", "1s", "--seed", &seed.to_string()].iter().chain(options));
        check_good(&run);
        assert_eq!(run.number("/options/seed"), seed as u64);
        if shows(&run) {
            return;
        }
    }
    panic!("in {TRIES} runs there were no {what}");
}

#[test]
fn the_default_is_a_kvm_guest() {
    let _alone = alone();
    if !has_kvm("the_default_is_a_kvm_guest") {
        return;
    }
    let echoed = json!({
        "duration_ms": 1000, "vcpus": 2, "memory": 256 << 20, "resident": 64 << 20, "page_size": "4k",
        "backing": "shared", "workload": "stamp", "source": null, "invalidate": ["evict", "discard"],
        "precheck": "both", "sequence": "region", "witness": "intent", "uffds": 1, "workers": 1, "seed": 1,
    });
    let run = good(&[], echoed);
    assert_eq!(run.json["guest"], "kvm");
    assert!(run.ended.stderr.starts_with("afterimage run: KVM vCPUs on "), "{}", run.ended.stderr);
    assert_eq!(run.json["options"].get("pressure").and_then(Value::as_u64), Some(200));
}

#[test]
fn threads_stand_in_for_vcpus() {
    let _alone = alone();
    if !has_guest("threads_stand_in_for_vcpus") {
        return;
    }
    let run = good(&["--guest", "thread"], json!({}));
    assert_eq!(run.json["guest"], "thread");
    assert!(run.ended.stderr.contains("host threads, as asked"), "{}", run.ended.stderr);
}

#[test]
fn huge_pages_are_moved_as_a_whole() {
    let _alone = alone();
    let test = "huge_pages_are_moved_as_a_whole";
    if !has_guest(test) {
        return;
    }
    // Four in the budget, and a batch of two.
    let Some(_pages) = HugePages::claim(test, 6) else { return };
    let options = ["--page-size", "2m", "--memory", "32m", "--resident", "8m", "--duration", "2s"];
    let run = run(options);
    check_good(&run);
    assert_eq!(run.json["options"]["page_size"], "2m");
    assert_eq!(run.number("/options/pressure"), 12, "about as many bytes as with small pages");
    assert_eq!(run.number("/zapped_frames") % 512, 0);
}

#[test]
fn retries_happen_where_the_precheck_looks() {
    let _alone = alone();
    if !has_guest("retries_happen_where_the_precheck_looks") {
        return;
    }
    let cases: [(&str, &[&str], &str); 4] = [
        ("off", &["before_fault_in", "after_fault_in"], "under_lock"),
        ("before", &["after_fault_in"], "before_fault_in"),
        ("after", &["before_fault_in"], "after_fault_in"),
        ("both", &[], "before_fault_in"),
    ];
    for (precheck, never, sometimes) in cases {
        let options: Vec<_> =
            SMALL.into_iter().chain(["--pressure", "2000", "--precheck", precheck]).collect();
        until_it_shows(&format!("retries {sometimes} with --precheck {precheck}"), &options, |run| {
            assert_eq!(run.json["options"]["precheck"], precheck);
            for point in never {
                assert_eq!(
                    run.number(&format!("/retries/{point}")),
                    0,
                    "{precheck}: {}",
                    run.json["retries"]
                );
            }
            run.number(&format!("/retries/{sometimes}")) > 0
        });
    }
}

#[test]
fn memory_can_be_split_over_userfaultfds_and_workers() {
    let _alone = alone();
    if !has_guest("memory_can_be_split_over_userfaultfds_and_workers") {
        return;
    }
    good(&["--uffds", "4", "--workers", "2"], json!({ "uffds": 4, "workers": 2 }));
    good(&["--uffds", "2", "--workers", "4"], json!({ "uffds": 2, "workers": 4 }));
}

#[test]
fn anonymous_memory_works_as_well() {
    let _alone = alone();
    if !has_guest("anonymous_memory_works_as_well") {
        return;
    }
    let options: Vec<_> = SMALL.into_iter().chain(["--backing", "anonymous"]).collect();
    let echoed = json!({ "backing": "anonymous", "memory": 8 << 20, "resident": 1 << 20 });
    // Pages went and came back.
    showing(&["/memory/from_store_frames"], |length| good_for(length, &options, echoed.clone()));
}

#[test]
fn every_workload_reads_what_it_must() {
    let _alone = alone();
    if !has_guest("every_workload_reads_what_it_must") {
        return;
    }
    for workload in ["stamp", "scan", "hot"] {
        let options: Vec<_> = SMALL.into_iter().chain(["--workload", workload]).collect();
        // The budget evicts.
        showing(&["/memory/from_source_frames", "/invalidations/evict/count"], |length| {
            good_for(length, &options, json!({ "workload": workload }))
        });
    }
}

#[test]
fn only_what_is_asked_for_is_done_to_the_memory() {
    let _alone = alone();
    if !has_guest("only_what_is_asked_for_is_done_to_the_memory") {
        return;
    }
    let all = ["evict", "discard", "protect"];
    showing(&["/invalidations/protect/count"], |length| {
        good_for(length, &["--invalidate", "protect,evict,discard,evict"], json!({ "invalidate": all }))
    });
    // All of it may be resident, so that nothing is evicted for the budget's sake.
    let run = good(
        &["--memory", "8m", "--resident", "8m", "--invalidate", "none"],
        json!({ "invalidate": [], "resident": 8 << 20 }),
    );
    for kind in all {
        assert_eq!(run.number(&format!("/invalidations/{kind}/count")), 0, "{:#}", run.json);
    }
    assert_eq!(run.number("/faults/retry"), 0);
}

#[test]
fn the_sequence_can_be_one_for_all_memory() {
    let _alone = alone();
    if !has_guest("the_sequence_can_be_one_for_all_memory") {
        return;
    }
    let options: Vec<_> = SMALL.into_iter().chain(["--sequence", "global"]).collect();
    good(&options, json!({ "sequence": "global" }));
}

#[test]
fn faults_hold_the_lock_or_announce_an_intent() {
    let _alone = alone();
    if !has_guest("faults_hold_the_lock_or_announce_an_intent") {
        return;
    }
    for witness in ["lock", "intent"] {
        for backing in ["shared", "anonymous"] {
            let chosen = ["--witness", witness, "--backing", backing, "--pressure", "1000"];
            let options: Vec<_> = SMALL.into_iter().chain(chosen).collect();
            let run = good(&options, json!({ "witness": witness, "backing": backing }));
            if witness == "intent" {
                assert_eq!(run.number("/lock_wait_ns/faults"), 0, "{:#}", run.json);
            }
        }
    }
}

#[test]
fn a_retried_fault_is_parked_or_let_go() {
    let _alone = alone();
    if !has_guest("a_retried_fault_is_parked_or_let_go") {
        return;
    }
    for after_retry in ["park", "refault"] {
        let options: Vec<_> = SMALL.into_iter().chain(["--after-retry", after_retry]).collect();
        good(&options, json!({ "after_retry": after_retry }));
    }
}

#[test]
fn a_guest_has_as_many_vcpus_as_asked_for() {
    let _alone = alone();
    if !has_guest("a_guest_has_as_many_vcpus_as_asked_for") {
        return;
    }
    for vcpus in [1, 4] {
        good(&["--vcpus", &vcpus.to_string()], json!({ "vcpus": vcpus }));
    }
}

/// Evictions end where the store may take no more: that is told, the guest goes on, and every byte is right.
#[test]
fn a_full_store_is_told_and_harms_nobody() {
    let _alone = alone();
    if !has_guest("a_full_store_is_told_and_harms_nobody") {
        return;
    }
    for guest in [["--guest", "thread"], ["--guest", "soft"]] {
        let options: Vec<_> = SMALL.into_iter().chain(guest).chain(["--stored", "512k"]).collect();
        let shows = ["/memory/store_refusals", "/memory/beyond_budget_pages", "/memory/stored_frames"];
        let run = showing(&shows, |length| {
            let run = run(options.iter().chain(&["--duration", length]));
            assert_eq!(run.ended.code(), 0, "{:?}", run.ended);
            assert_eq!((run.number("/wrong_pages"), run.failures()), (0, vec![]));
            run
        });
        assert_eq!(run.number("/options/stored"), 512 << 10);
        // Its index of 4 bytes a frame, and the lists of what it has taken.
        let most = (512 << 10) + 4 * 2048 + (64 << 10);
        assert!(run.number("/stored_bytes") <= most, "{:#}", run.json);
        assert!(run.ended.stdout.contains("pages stayed, as --stored was reached"), "{:?}", run.ended);
    }
}

#[test]
fn tiny_memory_is_enough() {
    let _alone = alone();
    if !has_guest("tiny_memory_is_enough") {
        return;
    }
    showing(&["/memory/from_store_frames"], |length| {
        let small = ["--memory", "2m", "--resident", "64k"];
        good_for(length, &small, json!({ "memory": 2 << 20, "resident": 64 << 10 }))
    });
    // The smallest: every page that comes drives the only other one out.
    good(
        &["--memory", "8k", "--resident", "4k", "--vcpus", "1"],
        json!({ "memory": 8192, "resident": 4096 }),
    );
}

#[test]
fn without_pressure_only_the_budget_evicts() {
    let _alone = alone();
    if !has_guest("without_pressure_only_the_budget_evicts") {
        return;
    }
    let run = good(&["--memory", "8m", "--resident", "8m", "--pressure", "0"], json!({ "pressure": 0 }));
    assert_eq!(run.number("/invalidations/evict/count"), 0, "{:#}", run.json);
}

/// More evictions a second than a clock can tell apart are as many as possible, not none.
#[test]
fn a_high_pressure_is_not_no_pressure() {
    let _alone = alone();
    if !has_guest("a_high_pressure_is_not_no_pressure") {
        return;
    }
    let memory = ["--memory", "2m", "--resident", "2m", "--workload", "hot", "--invalidate", "evict"];
    let options: Vec<_> = memory.into_iter().chain(["--pressure", "4000000000"]).collect();
    until_it_shows("evictions", &options, |run| run.number("/invalidations/evict/count") > 0);
}

/// 8 MiB: random bytes, a hole, random bytes again; and a frame of which only a part is data.
fn memory_file(path: &std::path::Path) {
    let file = File::create(path).expect("a file");
    file.set_len(8 << 20).expect("its size");
    let mut random = vec![0; 2 << 20];
    let mut source = File::open("/dev/urandom").expect("random bytes");
    for offset in [0, 5 << 20] {
        std::io::Read::read_exact(&mut source, &mut random).expect("random bytes");
        file.write_all_at(&random, offset).expect("data");
    }
    file.write_all_at(b"not a whole frame", (3 << 20) + 1000).expect("data");
}

#[test]
fn a_memory_file_is_restored() {
    let _alone = alone();
    if !has_guest("a_memory_file_is_restored") {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("memory");
    memory_file(&path);
    let before = std::fs::read(&path).expect("it can be read");
    let source = path.to_str().expect("a path of text");
    // Its size is the guest's, and may be given.
    for options in [["--source", source].as_slice(), &["--source", source, "--memory", "8m"]] {
        showing(&["/memory/from_source_frames", "/memory/from_store_frames"], |length| {
            good_for(length, options, json!({ "source": source, "memory": 8 << 20, "resident": 2 << 20 }))
        });
    }
    assert!(std::fs::read(&path).expect("it can be read") == before, "the source is only read");
}

/// A path may hold any bytes, and JSON only text.
#[test]
fn a_memory_file_of_any_name_can_be_told_of() {
    let _alone = alone();
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join(OsStr::from_bytes(b"mem\xffory"));
    memory_file(&path);
    let options = ["--guest", "soft", "--duration", "200ms", "--source"].map(OsStr::new);
    let run = run(options.into_iter().chain([path.as_os_str()]));
    assert_eq!(run.ended.code(), 0, "{:?}", run.ended);
    let shown = run.json["options"]["source"].as_str().expect("a path as text");
    assert!(shown.ends_with("/mem\u{fffd}ory"), "{shown}");
}

#[test]
fn json_on_standard_output_stands_alone() {
    let _alone = alone();
    if !has_guest("json_on_standard_output_stands_alone") {
        return;
    }
    let ended = to_end(afterimage().args(["run", "--duration", "200ms", "--json", "-"]));
    let json: Value = serde_json::from_str(&ended.stdout).expect("nothing but JSON");
    assert_eq!((ended.code(), &json["wrong_pages"]), (0, &json!(0)), "{ended:?}");
    assert!(ended.stderr.contains("verified accesses"), "the table is elsewhere: {}", ended.stderr);
}

#[test]
fn a_result_replaces_the_one_before() {
    let _alone = alone();
    if !has_guest("a_result_replaces_the_one_before") {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("run.json");
    std::fs::write(&path, vec![b'x'; 100_000]).expect("a longer one");
    let ended = to_end(afterimage().args(["run", "--duration", "200ms", "--json"]).arg(&path));
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(read_json(&path).is_some(), "nothing of the old one is left");
}

/// A result that cannot be kept is a failure, but the table is still shown.
#[test]
fn json_that_cannot_be_written_is_a_failure() {
    let _alone = alone();
    let test = "json_that_cannot_be_written_is_a_failure";
    if !has_guest(test) {
        return;
    }
    if !std::path::Path::new("/dev/full").exists() {
        return skip(test, "there is no /dev/full");
    }
    let ended = to_end(afterimage().args(["run", "--duration", "200ms", "--json", "/dev/full"]));
    assert_eq!(ended.code(), 2, "{ended:?}");
    assert!(ended.stdout.contains("verified accesses"), "{}", ended.stdout);
    let last = ended.stderr.lines().last().expect("a reason");
    assert!(last.starts_with("afterimage: the result cannot be written to /dev/full: "), "{last}");
}
