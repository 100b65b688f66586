//! Short runs on software vCPUs, in every format: they need no KVM, no userfaultfd and no privilege.

mod command;

use serde_json::{Value, json};

use command::{Run, afterimage, alone, run, to_end};

const FORMATS: [&str; 7] = ["ept", "ept5", "npt", "npt5", "vmsa", "sv39x4", "sv48x4"];
/// Memory so small that a second of a slow build is enough to go around it many times.
const SMALL: [&str; 4] = ["--memory", "8m", "--resident", "1m"];
/// Attempts at what a busy machine may not show at once.
const ATTEMPTS: usize = 20;
/// All that can be done to the memory.
const ALL: &str = "evict,discard,protect,migrate,age,dirty";

/// Runs a software guest with `options` and checks what holds for every good run.
#[track_caller]
fn good(options: &[&str], echoed: Value) -> Run {
    let run = run(["--guest", "soft", "--duration", "600ms"].iter().chain(options));
    assert_eq!(run.ended.code(), 0, "{:?}", run.ended);
    assert_eq!((run.number("/wrong_pages"), run.failures()), (0, vec![]));
    assert_eq!(run.json["guest"], "soft");
    assert!(run.number("/accesses") > 0 && run.number("/faults/fixed") > 0, "{:#}", run.json);
    assert_eq!(run.number("/faults/failed"), 0, "{:#}", run.json);
    let (budget, batch) = (run.number("/resident_bytes/budget"), run.number("/resident_bytes/batch"));
    assert!(run.number("/resident_bytes/peak") <= budget + batch, "{}", run.json["resident_bytes"]);
    assert!(run.json["memory"]["bookkeeping_bytes_per_frame"].as_f64().is_some_and(|bytes| bytes <= 16.0));
    for (name, value) in echoed.as_object().expect("options by name") {
        assert_eq!(run.json["options"][name], *value, "--{name} is echoed");
    }
    run
}

#[test]
fn every_format_reads_what_it_must() {
    let _alone = alone();
    for format in FORMATS {
        let memory = ["--memory", "4m", "--resident", "2m"];
        let options: Vec<_> = memory.into_iter().chain(["--format", format, "--invalidate", ALL]).collect();
        let run =
            good(&options, json!({ "format": format, "page_size": "4k", "backing": null, "uffds": null }));
        for kind in ["evict", "protect"] {
            assert!(run.number(&format!("/invalidations/{kind}/count")) > 0, "{kind}: {:#}", run.json);
        }
        assert!(run.number("/flushes") > 0, "{:#}", run.json);
        assert!(run.number("/dirty_log/epochs") > 0, "it was compared: {:#}", run.json);
        // Writes that are logged need no lock.
        assert!(run.number("/faults/fast") > 0, "{format}: {:#}", run.json["faults"]);
    }
}

/// Hardware without marks of its own leaves them to the engine, which needs no lock for that.
#[test]
fn marks_are_set_by_whom_the_format_says() {
    let _alone = alone();
    for format in FORMATS {
        let options: Vec<_> = SMALL.into_iter().chain(["--format", format]).collect();
        let run = good(&options, json!({ "format": format }));
        let by_software = matches!(format, "vmsa" | "sv39x4" | "sv48x4");
        assert_eq!(run.number("/faults/fast") > 0, by_software, "{format}: {:#}", run.json["faults"]);
    }
}

#[test]
fn every_workload_reads_what_it_must() {
    let _alone = alone();
    for workload in ["stamp", "scan", "hot"] {
        let options: Vec<_> = SMALL.into_iter().chain(["--workload", workload]).collect();
        let run = good(&options, json!({ "workload": workload, "format": "npt" }));
        assert!(run.number("/memory/from_store_frames") > 0, "pages went and came back: {:#}", run.json);
    }
}

#[test]
fn huge_pages_need_no_pool() {
    let _alone = alone();
    for format in ["ept", "sv39x4"] {
        let options = ["--page-size", "2m", "--memory", "16m", "--resident", "8m", "--format", format];
        let run = good(&options, json!({ "page_size": "2m" }));
        assert_eq!(run.number("/zapped_frames") % 512, 0);
        assert!(run.number("/zapped_frames") > 0, "{:#}", run.json);
    }
}

#[test]
fn large_pages_are_split_and_recovered() {
    let _alone = alone();
    for format in ["npt", "vmsa", "sv48x4"] {
        for witness in ["lock", "intent"] {
            let memory = ["--page-size", "2m", "--memory", "16m", "--resident", "16m", "--pressure", "20"];
            let chosen = ["--format", format, "--witness", witness];
            let all = ["--invalidate", "discard,protect,migrate,age,dirty,split,collapse,reload"];
            let options: Vec<_> = memory.into_iter().chain(chosen).chain(all).collect();
            good(&options, json!({ "witness": witness }));
        }
    }
}

#[test]
fn what_was_fetched_from_is_recovered() {
    let _alone = alone();
    for (format, witness) in FORMATS.into_iter().zip(["lock", "intent"].into_iter().cycle()) {
        let memory = ["--page-size", "2m", "--memory", "16m", "--resident", "16m", "--pressure", "20"];
        let chosen = ["--format", format, "--witness", witness, "--nx-ratio", "2", "--nx-period", "2ms"];
        let all = ["--invalidate", "discard,protect,migrate,age,dirty,split,collapse,nx", "--dirty", "ring"];
        let options: Vec<_> = memory.into_iter().chain(chosen).chain(all).collect();
        good(&options, json!({ "format": format, "nx_ratio": 2, "nx_period_ns": 2_000_000 }));
        let options: Vec<_> = memory.into_iter().chain(chosen).chain(["--invalidate", "nx"]).collect();
        let recovers = || good(&options, json!({ "witness": witness })).number("/nx_recovered_blocks") > 0;
        assert!((0..ATTEMPTS).any(|_| recovers()), "{format} {witness}: no block was ever recovered");
    }
}

/// What is to be done in an hour does not hold the end of a run back.
#[test]
fn a_long_period_does_not_outlast_the_run() {
    let _alone = alone();
    let memory = ["--page-size", "2m", "--memory", "16m", "--resident", "16m"];
    let options: Vec<_> = memory
        .into_iter()
        .chain(["--invalidate", "nx", "--nx-period", "1h", "--duration", "500ms"])
        .collect();
    let run = run(["--guest", "soft"].iter().chain(&options));
    assert_eq!(run.ended.code(), 0, "{:?}", run.ended);
    assert_eq!(run.number("/options/nx_period_ns"), 3_600_000_000_000);
}

#[test]
fn writes_are_logged_in_rings() {
    let _alone = alone();
    // A busy machine may give no vCPU the time to fill a ring before it is collected: then once more.
    for _ in 0..3 {
        if log_in_rings() > 0 {
            return;
        }
    }
    panic!("in none of the runs was a ring full");
}

/// Runs in every format; how often a ring was full.
fn log_in_rings() -> u64 {
    let mut full = 0;
    for (format, witness) in FORMATS.into_iter().zip(["lock", "intent"].into_iter().cycle()) {
        let memory = ["--memory", "4m", "--resident", "2m", "--dirty", "ring"];
        let chosen = ["--format", format, "--witness", witness, "--invalidate", ALL];
        let options: Vec<_> = memory.into_iter().chain(chosen).collect();
        let run = good(&options, json!({ "format": format, "dirty": "ring" }));
        assert!(run.number("/dirty_log/epochs") > 0, "it was compared: {:#}", run.json);
        assert!(run.number("/dirty_log/frames") > 0, "{:#}", run.json);
        full += run.number("/faults/ring_full");
    }
    full
}

#[test]
fn roots_are_replaced_while_they_are_in_use() {
    let _alone = alone();
    for format in ["npt", "vmsa"] {
        for witness in ["lock", "intent"] {
            let chosen = ["--format", format, "--witness", witness];
            let all = ["--invalidate", "evict,discard,migrate,age,dirty,reload"];
            let options: Vec<_> = SMALL.into_iter().chain(chosen).chain(all).collect();
            let run = good(&options, json!({ "witness": witness }));
            assert!(run.number("/reloads") > 0, "{:#}", run.json);
        }
    }
}

#[test]
fn faults_are_parked_or_let_go() {
    let _alone = alone();
    for after_retry in ["park", "refault"] {
        let options: Vec<_> =
            SMALL.into_iter().chain(["--after-retry", after_retry, "--vcpus", "3"]).collect();
        good(&options, json!({ "after_retry": after_retry, "vcpus": 3 }));
    }
}

#[test]
fn what_is_discarded_comes_back_as_zeros() {
    let _alone = alone();
    let options = ["--memory", "1m", "--resident", "1m", "--workload", "hot", "--invalidate", "discard"];
    let mut zeros = 0;
    for seed in (1..=8).map(|seed: u64| seed.to_string()) {
        let options: Vec<_> = options.into_iter().chain(["--seed", &seed]).collect();
        zeros += good(&options, json!({})).number("/memory/from_zero_frames");
        if zeros > 0 {
            return;
        }
    }
    panic!("in none of the runs was anything discarded");
}

#[test]
fn pages_migrate_while_they_are_in_use() {
    let _alone = alone();
    let options = ["--memory", "2m", "--resident", "2m", "--workload", "hot", "--invalidate", "migrate"];
    let mut moved = 0;
    for seed in ["1", "2", "3", "4"] {
        let options: Vec<_> = options.into_iter().chain(["--pressure", "5000", "--seed", seed]).collect();
        moved += good(&options, json!({ "invalidate": ["migrate"] })).number("/invalidations/migrate/frames");
    }
    assert!(moved > 0, "in none of the runs did a page move");
}

#[test]
fn options_of_other_guests_are_refused() {
    let refused = |options: &[&str], why: &str| {
        let ended = to_end(afterimage().arg("run").args(options));
        assert_eq!(ended.code(), 2, "{ended:?}");
        assert!(ended.stderr.contains(why), "{ended:?}");
    };
    for option in [["--uffds", "1"], ["--workers", "2"], ["--backing", "shared"]] {
        refused(&["--guest", "soft", option[0], option[1]], "userfaultfd");
    }
    refused(&["--guest", "thread", "--format", "ept"], "--format is for the tables of --guest soft");
    refused(
        &["--guest", "thread", "--invalidate", "migrate"],
        "--invalidate migrate is only for --guest soft",
    );
    refused(&["--guest", "soft", "--invalidate", "split"], "--invalidate split is for large pages");
    refused(&["--guest", "soft", "--invalidate", "nx"], "--invalidate nx is for large pages");
    refused(&["--guest", "soft", "--dirty", "ring"], "--invalidate dirty");
    refused(&["--guest", "soft", "--nx-ratio", "2"], "--invalidate nx");
    refused(&["--guest", "soft", "--nx-period", "2ms"], "--invalidate nx");
    refused(&["--invalidate", "evict,age"], "--invalidate age is only for --guest soft");
}
