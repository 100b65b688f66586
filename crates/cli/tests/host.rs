//! `afterimage host` says what there is, whoever asks.

mod command;

use serde_json::Value;

use command::{afterimage, alone, to_end};

#[test]
fn the_host_is_described_for_people() {
    let _alone = alone();
    let ended = to_end(afterimage().arg("host"));
    assert_eq!((ended.code(), ended.stderr.as_str()), (0, ""), "{ended:?}");
    for what in ["run --guest kvm", "run --guest thread", "run --page-size 2m", "userfaultfd", "KVM"] {
        assert!(ended.stdout.contains(what), "{what} is missing: {}", ended.stdout);
    }
}

#[test]
fn the_host_is_described_for_programs() {
    let _alone = alone();
    let ended = to_end(afterimage().args(["host", "--json"]));
    assert_eq!((ended.code(), ended.stderr.as_str()), (0, ""), "{ended:?}");
    let json: Value = serde_json::from_str(&ended.stdout).expect("it is JSON");
    assert!(json.as_object().is_some_and(|facts| !facts.is_empty()), "{json:#}");
}

#[test]
fn help_and_version_are_no_errors() {
    let _alone = alone();
    for options in [["--help"].as_slice(), &["--version"], &["run", "--help"], &["host", "--help"]] {
        let ended = to_end(afterimage().args(options));
        assert_eq!((ended.code(), ended.stderr.as_str()), (0, ""), "{ended:?}");
        assert!(!ended.stdout.is_empty());
    }
    let ended = to_end(&mut afterimage());
    assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{ended:?}");
}
