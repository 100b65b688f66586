//! The page and the trace of a storm: well-formed, whole, and of no need of anything else.

mod command;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use afterimage_testing::skip;
use serde_json::Value;
use tempfile::TempDir;

use command::{Ended, afterimage, alone, to_end};

/// What a short storm leaves: a page and a trace.
fn blow(directory: &TempDir) -> (PathBuf, PathBuf) {
    let (page, trace) = (directory.path().join("storm.html"), directory.path().join("trace.json"));
    let mut command = afterimage();
    command.args(["storm", "--repeat", "1", "--duration", "20ms", "--memory", "4M", "--report"]).arg(&page);
    let ended = to_end(command.arg("--trace").arg(&trace));
    assert_eq!(ended.code(), 0, "{ended:?}");
    (page, trace)
}

/// The elements of a page, each closed in its order.
fn assert_balanced(page: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = page.split_once("<body>").expect("there is a body").1;
    open.push("body");
    while let Some((_, tag)) = rest.split_once('<') {
        let (tag, after) = tag.split_once('>').expect("every tag ends");
        rest = after;
        let name = tag.trim_start_matches('/').split([' ', '/']).next().expect("a split has a first part");
        if tag.starts_with('/') {
            if name == "html" {
                continue;
            }
            assert_eq!(open.pop(), Some(name), "closed out of order");
        } else if !tag.ends_with('/') && !["br", "wbr"].contains(&name) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "left open: {open:?}");
}

#[test]
fn the_page_is_whole_and_needs_nothing_else() {
    let _alone = alone();
    let directory = tempfile::tempdir().expect("a directory");
    let (page, trace) = blow(&directory);
    let page = std::fs::read_to_string(page).expect("it wrote the page");
    assert_balanced(&page);
    for part in [
        "prefers-color-scheme: dark",
        "@media print",
        "Fault latency",
        "Timeline",
        "Retries, by where",
        "before the change; ",
    ] {
        assert!(page.contains(part), "{part}");
    }
    for scenario in ["A", "B", "C", "D", "E", "E-inside"] {
        assert!(page.contains(&format!("<section id=\"{scenario}\">")), "{scenario}");
    }
    for outside in ["<script", "http:", "https:", "@import", "url(", "src="] {
        assert!(!page.contains(outside), "{outside}");
    }

    let trace = std::fs::read(trace).expect("it wrote the trace");
    assert_can_be_shown(&serde_json::from_slice(&trace).expect("JSON"));
}

/// Whether a viewer can draw the events: by the format, processes and threads have numbers and names, times are microseconds
/// from 0 on, and what lasts lies beside or within what lasts on the same thread.
fn assert_can_be_shown(trace: &Value) {
    let events = trace["traceEvents"].as_array().expect("a list of events");
    assert!(events.iter().any(|event| event["name"] == "invalidation"));
    let mut named = BTreeSet::new();
    let mut lasting: BTreeMap<_, Vec<(f64, f64)>> = BTreeMap::new();
    for event in events {
        let (process, thread) = (event["pid"].as_u64().expect("a number"), event["tid"].as_u64());
        match event["ph"].as_str() {
            Some("M") => {
                assert!(event["args"]["name"].is_string());
                named.insert((process, thread));
                continue;
            }
            Some("X") => {
                let (start, time) = (event["ts"].as_f64().expect("a time"), event["dur"].as_f64());
                let time = time.filter(|time| *time >= 0.0).unwrap_or_else(|| panic!("no time: {event}"));
                lasting.entry((process, thread)).or_default().push((start, start + time));
            }
            Some("i") => assert!(event["s"] == "t"),
            other => panic!("{other:?}: {event}"),
        }
        assert!(thread.is_some() && event["ts"].as_f64() >= Some(0.0), "{event}");
    }
    for (thread, mut times) in lasting {
        assert!(named.contains(&thread) && named.contains(&(thread.0, None)), "{thread:?} has no name");
        times.sort_by(|one, other| one.0.total_cmp(&other.0).then(other.1.total_cmp(&one.1)));
        let mut open: Vec<f64> = Vec::new();
        for (start, end) in times {
            open.retain(|around| *around > start);
            // A nanosecond for the sum of two numbers that are not binary.
            assert!(open.iter().all(|around| end <= around + 1e-3), "{thread:?}: {start} to {end} crosses");
            open.push(end);
        }
    }
}

/// A browser that opens `page`, takes a picture of it, and logs what it asks the network for.
fn look(browser: &str, page: &Path, into: &Path, mode: &str) -> Ended {
    let mut command = Command::new(browser);
    command.args([
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--window-size=1100,2400",
        "--enable-logging=stderr",
    ]);
    if mode == "dark" {
        command.arg("--force-dark-mode");
    }
    command
        .arg(format!("--user-data-dir={}", into.join(format!("{mode}.profile")).display()))
        .arg(format!("--log-net-log={}", into.join(format!("{mode}.net.json")).display()))
        .arg(format!("--screenshot={}", into.join(format!("{mode}.png")).display()))
        .arg(format!("file://{}", page.display()));
    to_end(&mut command)
}

/// What was complained of while `mode`'s picture was taken, and what the page asked for.
fn noticed(ended: &Ended, into: &Path, mode: &str) -> Vec<String> {
    let console = ended.stderr.lines().filter(|line| line.contains("CONSOLE")).map(str::to_owned);
    let log = std::fs::read(into.join(format!("{mode}.net.json"))).expect("it logged");
    let log: Value = serde_json::from_slice(&log).expect("the log is whole");
    let events = log["events"].as_array().expect("a list of events");
    let asked = events.iter().filter_map(|event| {
        let params = &event["params"];
        let url = params["url"].as_str().filter(|url| url.starts_with("http"))?;
        // The browser asks for things of its own, which no page started.
        let by_page = params["initiator"].as_str().is_some_and(|initiator| initiator != "not an origin");
        by_page.then(|| url.to_owned())
    });
    console.chain(asked).collect()
}

#[test]
fn a_browser_shows_it_without_a_complaint_or_a_request() {
    const TEST: &str = "a_browser_shows_it_without_a_complaint_or_a_request";
    let browser = "chromium";
    if Command::new(browser).arg("--version").output().is_err() {
        return skip(TEST, "there is no chromium: apt-get install chromium");
    }
    let _alone = alone();
    let directory = tempfile::tempdir().expect("a directory");
    let (page, _) = blow(&directory);
    let into = directory.path();
    let mut pictures = Vec::new();
    for mode in ["light", "dark"] {
        let ended = look(browser, &page, into, mode);
        assert_eq!(ended.code(), 0, "{ended:?}");
        assert_eq!(noticed(&ended, into, mode), [""; 0], "{mode}");
        pictures.push(std::fs::read(into.join(format!("{mode}.png"))).expect("it took a picture"));
    }
    // A page of one colour packs to less.
    assert!(pictures.iter().all(|picture| picture.len() > 50_000));
    assert_ne!(pictures[0], pictures[1], "light and dark look the same");

    // What is looked for is found where it is.
    let other = into.join("other.html");
    let bad = "<!doctype html><img src=\"http://127.0.0.1:9/x.png\"><script>console.error(\"no\")</script>";
    std::fs::write(&other, bad).expect("the directory can be written");
    let found = noticed(&look(browser, &other, into, "other"), into, "other");
    assert!(found.iter().any(|line| line.contains("CONSOLE")), "{found:?}");
    assert!(found.iter().any(|line| line == "http://127.0.0.1:9/x.png"), "{found:?}");
}
