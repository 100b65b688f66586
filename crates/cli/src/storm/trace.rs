//! Events in the format that Chrome's and Perfetto's trace viewers read: one process for each cell, one line for each thread.

use std::collections::BTreeMap;

use afterimage_storm::{Event, Load, Outcome, What};
use serde_json::{Value, json};

/// The number of the first thread that invalidates; vCPUs have those below.
const INVALIDATORS: usize = 10_000;

/// The events of all outcomes.
pub(crate) fn trace(outcomes: &[Outcome]) -> Value {
    let mut events = Vec::new();
    for (process, outcome) in outcomes.iter().enumerate() {
        let cell = &outcome.cell;
        let load = match (cell.load, &cell.policies) {
            (Load::Uncontended, _) => "uncontended".to_owned(),
            (Load::Busy, _) => "busy".to_owned(),
            (Load::Quiet, _) => "quiet".to_owned(),
            (Load::Storm, Some(policies)) => policies.to_string(),
            (Load::Bystanders, Some(policies)) => format!("bystanders {policies}"),
            (Load::Storm | Load::Bystanders, None) => cell.engine.to_string(),
        };
        let name = format!("{} {load}", cell.scenario);
        events.push(json!({ "ph": "M", "name": "process_name", "pid": process, "args": { "name": name } }));
        let mut threads = BTreeMap::new();
        for event in &outcome.recording.events {
            let (thread, name) = thread(event);
            threads.insert(thread, name);
            add(&mut events, (process, thread), event);
        }
        events.extend(threads.into_iter().map(|(thread, name)| {
            json!({ "ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": { "name": name } })
        }));
    }
    json!({ "traceEvents": events, "displayTimeUnit": "ns" })
}

/// The number and the name of an event's thread.
fn thread(event: &Event) -> (usize, String) {
    let number = event.thread;
    match event.what {
        What::Invalidation { .. } => (INVALIDATORS + number, format!("invalidator {number}")),
        What::Fault { .. } => (number, format!("vCPU {number}")),
    }
}

fn add(events: &mut Vec<Value>, (process, thread): (usize, usize), event: &Event) {
    // Microseconds, by the format.
    let us = |ns: u64| ns as f64 / 1e3;
    let slice = |name: &str, end_ns: u64, args: Value| {
        json!({
            "ph": "X", "name": name, "pid": process, "tid": thread,
            "ts": us(event.start_ns), "dur": us(end_ns - event.start_ns), "args": args,
        })
    };
    match &event.what {
        What::Invalidation { begun_ns, yields_ns } => {
            let args = json!({ "gfn": event.gfn, "frames": event.frames, "yields": yields_ns.len() });
            events.push(slice("invalidation", event.end_ns, args));
            events.push(slice("begin", *begun_ns, json!({})));
            for at in yields_ns {
                events.push(json!({
                    "ph": "i", "name": "flush and yield", "pid": process, "tid": thread, "ts": us(*at), "s": "t",
                }));
            }
        }
        What::Fault { retries, inside } => {
            let args = json!({ "gfn": event.gfn, "retries": retries, "inside": inside });
            events.push(slice("fault", event.end_ns, args));
        }
    }
}
