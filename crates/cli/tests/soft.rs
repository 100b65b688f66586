//! Short runs on software vCPUs, in every format: they need no KVM, no userfaultfd and no privilege.

mod command;

use serde_json::{Value, json};

use command::{Run, afterimage, alone, run, showing, to_end};

const FORMATS: [&str; 7] = ["ept", "ept5", "npt", "npt5", "vmsa", "sv39x4", "sv48x4"];
/// Memory so small that a second of a slow build is enough to go around it many times.
const SMALL: [&str; 4] = ["--memory", "8m", "--resident", "1m"];
/// All that can be done to the memory.
const ALL: &str = "evict,discard,protect,migrate,age,dirty";

/// Runs a software guest with `options` for a moment and checks what holds for every good run.
#[track_caller]
fn good(options: &[&str], echoed: Value) -> Run {
    good_for("600ms", options, echoed)
}

/// The same for a time.
#[track_caller]
fn good_for(length: &str, options: &[&str], echoed: Value) -> Run {
    let run = run(["--guest", "soft", "--duration", length].iter().chain(options));
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
        // The dirty log is compared, and writes that are logged need no lock.
        let shows = [
            "/invalidations/evict/count",
            "/invalidations/protect/count",
            "/flushes",
            "/dirty_log/epochs",
            "/faults/fast",
        ];
        let echoed = json!({ "format": format, "page_size": "4k", "backing": null, "uffds": null });
        showing(&shows, |length| good_for(length, &options, echoed.clone()));
    }
}

/// Hardware without marks of its own leaves them to the engine, which needs no lock for that.
#[test]
fn marks_are_set_by_whom_the_format_says() {
    let _alone = alone();
    for format in FORMATS {
        let options: Vec<_> = SMALL.into_iter().chain(["--format", format]).collect();
        let run = |length: &str| good_for(length, &options, json!({ "format": format }));
        if matches!(format, "vmsa" | "sv39x4" | "sv48x4") {
            showing(&["/faults/fast"], run);
        } else {
            assert_eq!(run("600ms").number("/faults/fast"), 0, "{format}");
        }
    }
}

#[test]
fn every_workload_reads_what_it_must() {
    let _alone = alone();
    for workload in ["stamp", "scan", "hot"] {
        let options: Vec<_> = SMALL.into_iter().chain(["--workload", workload]).collect();
        // Pages went and came back.
        showing(&["/memory/from_store_frames"], |length| {
            good_for(length, &options, json!({ "workload": workload, "format": "npt" }))
        });
    }
}

#[test]
fn huge_pages_need_no_pool() {
    let _alone = alone();
    for format in ["ept", "sv39x4"] {
        let options = ["--page-size", "2m", "--memory", "16m", "--resident", "8m", "--format", format];
        let run =
            showing(&["/zapped_frames"], |length| good_for(length, &options, json!({ "page_size": "2m" })));
        assert_eq!(run.number("/zapped_frames") % 512, 0);
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
        showing(&["/nx_recovered_blocks"], |length| {
            good_for(length, &options, json!({ "witness": witness }))
        });
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
    for (format, witness) in FORMATS.into_iter().zip(["lock", "intent"].into_iter().cycle()) {
        let memory = ["--memory", "4m", "--resident", "2m", "--dirty", "ring"];
        let chosen = ["--format", format, "--witness", witness, "--invalidate", ALL];
        let options: Vec<_> = memory.into_iter().chain(chosen).collect();
        // What was logged was compared, and a ring was full before it was collected.
        showing(&["/dirty_log/epochs", "/dirty_log/frames", "/faults/ring_full"], |length| {
            good_for(length, &options, json!({ "format": format, "dirty": "ring" }))
        });
    }
}

#[test]
fn roots_are_replaced_while_they_are_in_use() {
    let _alone = alone();
    for format in ["npt", "vmsa"] {
        for witness in ["lock", "intent"] {
            let chosen = ["--format", format, "--witness", witness];
            let all = ["--invalidate", "evict,discard,migrate,age,dirty,reload"];
            let options: Vec<_> = SMALL.into_iter().chain(chosen).chain(all).collect();
            showing(&["/reloads"], |length| good_for(length, &options, json!({ "witness": witness })));
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
    showing(&["/memory/from_zero_frames"], |length| good_for(length, &options, json!({})));
}

#[test]
fn pages_migrate_while_they_are_in_use() {
    let _alone = alone();
    let options = ["--memory", "2m", "--resident", "2m", "--workload", "hot", "--invalidate", "migrate"];
    let options: Vec<_> = options.into_iter().chain(["--pressure", "5000"]).collect();
    showing(&["/invalidations/migrate/frames"], |length| {
        good_for(length, &options, json!({ "invalidate": ["migrate"] }))
    });
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
