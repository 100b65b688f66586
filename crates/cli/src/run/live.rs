//! The line that is seen while a run goes on.

use std::time::{Duration, Instant};

use afterimage_mmu::RetryPoint;
use afterimage_vm::Latency;
use indicatif::{ProgressBar, ProgressStyle};

use super::machine::Machine;
use crate::units::{show_bytes, show_count, show_duration};

/// A line on standard error that is written over and over; nothing where that is no terminal.
#[derive(Debug)]
pub(crate) struct LiveLine {
    bar: ProgressBar,
    last: Seen,
}

#[derive(Debug)]
struct Seen {
    at: Instant,
    accesses: u64,
    faults: u64,
    latency: Latency,
}

impl Seen {
    fn now(machine: &Machine) -> Self {
        Self {
            at: Instant::now(),
            accesses: machine.guest.counters().accesses,
            faults: machine.engine.fault_stats().taken,
            latency: machine.guest.latency(),
        }
    }
}

impl LiveLine {
    pub(crate) fn start(duration: Duration, machine: &Machine) -> Self {
        let bar = ProgressBar::new(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX));
        let style = ProgressStyle::with_template("{elapsed:>4} {bar:10} {wide_msg}");
        bar.set_style(style.expect("the template is well-formed"));
        Self { bar, last: Seen::now(machine) }
    }

    pub(crate) fn update(&mut self, elapsed: Duration, machine: &Machine) {
        if self.bar.is_hidden() {
            return;
        }
        let now = Seen::now(machine);
        let seconds = (now.at - self.last.at).as_secs_f64().max(1e-3);
        let rate = |now: u64, then: u64| show_count(((now - then) as f64 / seconds) as u64);
        let stats = machine.engine.fault_stats();
        let retries = RetryPoint::ALL.map(|point| stats.retries_at(point).to_string()).join("/");
        self.bar.set_position(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
        self.bar.set_message(format!(
            "{} accesses/s  {} faults/s  resident {}  p99 {}  retries {retries}",
            rate(now.accesses, self.last.accesses),
            rate(now.faults, self.last.faults),
            show_bytes(machine.object.stats().resident_bytes),
            show_duration(now.latency.all().since(&self.last.latency.all()).p99()),
        ));
        self.last = now;
    }

    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
    }
}
