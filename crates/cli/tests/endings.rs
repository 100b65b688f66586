//! Runs that end before their time: by a signal, or since memory is lost.

mod command;

use std::fs::File;
use std::io::{PipeWriter, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use afterimage_testing::skip;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::Signal;
use serde_json::{Value, json};

use command::{Running, afterimage, alone, has_guest, read_json, wait_until};

/// Longer than any test waits.
const FOR_EVER: &str = "1h";
const SMALL: [&str; 4] = ["--memory", "8m", "--resident", "1m"];

/// Starts a run that does not end by itself and waits until its guest runs.
#[track_caller]
fn started(options: &[&str], json: &Path, stdout: Option<Stdio>) -> Running {
    let mut command = afterimage();
    command.args(["run", "--duration", FOR_EVER, "--json"]).arg(json).args(options);
    let mut running = Running::start(&mut command, stdout);
    running.wait_started();
    running
}

#[test]
fn the_first_signal_ends_a_run_in_order() {
    let _alone = alone();
    if !has_guest("the_first_signal_ends_a_run_in_order") {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    for (signal, guest) in [(Signal::INT, None), (Signal::TERM, None), (Signal::INT, Some("thread"))] {
        let json = directory.path().join(format!("{signal:?}-{guest:?}.json"));
        let options: Vec<_> =
            SMALL.into_iter().chain(guest.iter().flat_map(|guest| ["--guest", guest])).collect();
        let running = started(&options, &json, None);
        running.signal(signal);
        let ended = running.end();
        assert_eq!(ended.code(), 0, "{signal:?}: {ended:?}");
        assert!(ended.stdout.contains("verified accesses"), "{signal:?}: {ended:?}");
        let json = read_json(&json).expect("the JSON is whole");
        assert_eq!((&json["wrong_pages"], &json["failures"]), (&json!(0), &json!([])), "{signal:?}");
        assert!(json["elapsed_ms"].as_u64().is_some_and(|ms| ms < 3_600_000), "{json:#}");
    }
}

/// A pipe that takes nothing more: whoever writes to it waits for a reader.
fn full_pipe() -> (std::io::PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    let flags = fcntl_getfl(&writer).expect("its flags");
    fcntl_setfl(&writer, flags | OFlags::NONBLOCK).expect("no waiting");
    for bytes in [4096, 1] {
        while writer.write(&[b' '; 4096][..bytes]).is_ok() {}
    }
    fcntl_setfl(&writer, flags).expect("waiting");
    (reader, writer)
}

/// The first signal has been taken when the JSON is there; then the command waits for the reader of its table.
#[test]
fn the_second_signal_kills() {
    let _alone = alone();
    if !has_guest("the_second_signal_kills") {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    for second in [Signal::INT, Signal::TERM] {
        let path = directory.path().join(format!("{second:?}.json"));
        let (_reader, writer) = full_pipe();
        let running = started(&SMALL, &path, Some(writer.into()));
        running.signal(Signal::INT);
        assert!(wait_until(|| read_json(&path).is_some()), "the first signal does not end it");
        running.signal(second);
        let ended = running.end();
        assert_eq!(ended.status.signal(), Some(second.as_raw()), "{ended:?}");
    }
}

/// As in `afterimage run | head -1`.
#[test]
fn a_reader_that_has_gone_is_no_error() {
    let _alone = alone();
    if !has_guest("a_reader_that_has_gone_is_no_error") {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("run.json");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let running = started(&SMALL, &path, Some(writer.into()));
    running.signal(Signal::INT);
    let ended = running.end();
    assert_eq!((ended.code(), ended.stderr.lines().count()), (0, 1), "{ended:?}");
    assert!(read_json(&path).is_some(), "the JSON is whole");
}

/// The guest would notice zeros in the place of lost pages: no page of the file holds any.
#[test]
fn lost_memory_is_an_error_and_never_zeros() {
    let _alone = alone();
    if !has_guest("lost_memory_is_an_error_and_never_zeros") {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    for options in [
        ["--guest", "thread"].as_slice(),
        &["--guest", "thread", "--backing", "anonymous"],
        // The best guest of this host.
        &[],
        &["--uffds", "2", "--workers", "2"],
    ] {
        let source = directory.path().join("memory");
        let file = File::create(&source).expect("a memory file");
        let words: Vec<u8> = (0..4096).map(|byte| byte as u8 | 1).collect();
        for page in 0..32 << 8 {
            file.write_all_at(&words, page * 4096).expect("a page");
        }
        let name = source.to_str().expect("a path of text");
        let json = directory.path().join("run.json");
        let running = started(&[&["--source", name], options].concat(), &json, None);
        // A frame is left, for whoever has begun with that.
        file.set_len(4096).expect("truncated");
        let ended = running.end();
        assert_eq!(ended.code(), 1, "{options:?}: {ended:?}");

        let json = read_json(&json).expect("the JSON is whole");
        assert_eq!(json["wrong_pages"], 0, "{options:?}: {json:#}");
        let failures: Vec<_> =
            json["failures"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
        let is_cause =
            |failure: &&str| failure.contains(name) && failure.contains("now ends at or before byte");
        let is_vcpu = |failure: &&str| failure.starts_with("vCPU ") && failure.contains("gfn 0x");
        assert!(failures.iter().any(is_cause), "{options:?} names the cause: {failures:?}");
        assert!(failures.iter().any(is_vcpu), "{options:?} names the gfn: {failures:?}");
        for failure in failures {
            assert!(ended.stdout.contains(&format!("FAILED: {failure}\n")), "{options:?}: {}", ended.stdout);
        }
    }
}

/// A memory file must stay as it is while a guest runs on it. Wrong pages of one that did not are explained.
#[test]
fn a_memory_file_that_was_changed_is_named() {
    let _alone = alone();
    if !has_guest("a_memory_file_that_was_changed_is_named") {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let source = directory.path().join("memory");
    let page = |byte: u8| vec![byte; 4096];
    let file = File::create(&source).expect("a memory file");
    (0..32 << 8).for_each(|frame| file.write_all_at(&page(1), frame * 4096).expect("a page"));
    let (name, json) = (source.to_str().expect("a path of text"), directory.path().join("run.json"));
    let options =
        ["run", "--source", name, "--guest", "thread", "--resident", "1m", "--duration", "1s", "--json"];
    for byte in 2..10 {
        let mut running = Running::start(afterimage().args(options).arg(&json), None);
        running.wait_started();
        (0..32 << 8).for_each(|frame| file.write_all_at(&page(byte), frame * 4096).expect("a page"));
        let ended = running.end();
        let json = read_json(&json).expect("the JSON is whole");
        if json["wrong_pages"] == 0 {
            // It had read all of it before.
            continue;
        }
        assert_eq!(ended.code(), 1, "{ended:?}");
        let said = json["failures"][0].as_str().expect("a reason");
        assert!(said.contains("was changed during the run") && said.contains("run it on a copy"), "{said}");
        return;
    }
    panic!("the guest read no page that was changed");
}

/// What is said beside the result may be lost, as on a full disk; the result is not.
#[test]
fn a_result_does_not_depend_on_who_listens() {
    let _alone = alone();
    let test = "a_result_does_not_depend_on_who_listens";
    if !has_guest(test) {
        return;
    }
    if !Path::new("/dev/full").exists() {
        return skip(test, "there is no /dev/full");
    }
    let directory = tempfile::tempdir().expect("a directory");
    let json = directory.path().join("run.json");
    let mut command = afterimage();
    command.args(["run", "--guest", "thread", "--duration", "100ms"]).args(SMALL).arg("--json").arg(&json);
    let full = File::options().write(true).open("/dev/full").expect("it is there");
    let status = command.stdout(Stdio::null()).stderr(full).status().expect("it starts");
    assert_eq!(status.code(), Some(0));
    assert_eq!(read_json(&json).expect("the JSON is whole")["wrong_pages"], 0);
}

/// A terminal that goes away ends a run like Ctrl-C, unless `nohup` was there before.
#[test]
fn who_hangs_up_ends_a_run_and_nohup_does_not() {
    let _alone = alone();
    if !has_guest("who_hangs_up_ends_a_run_and_nohup_does_not") {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    for (disposition, ends) in [("--default-signal=HUP", true), ("--ignore-signal=HUP", false)] {
        let json = directory.path().join(format!("{ends}.json"));
        let mut command = Command::new("env");
        command.args([disposition, env!("CARGO_BIN_EXE_afterimage"), "run", "--duration", FOR_EVER]);
        let mut running = Running::start(command.args(SMALL).arg("--json").arg(&json), None);
        running.wait_started();
        running.signal(Signal::HUP);
        if !ends {
            running.signal(Signal::INT);
        }
        let ended = running.end();
        // Two signals that both count kill.
        assert_eq!(ended.code(), 0, "{disposition}: {ended:?}");
        assert!(read_json(&json).is_some(), "{disposition}: the JSON is whole");
    }
}
