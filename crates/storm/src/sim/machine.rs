//! The simulated machine: vCPUs, invalidators and their lock, as events in virtual time.
//!
//! ```text
//! vCPU:        miss ─► first check ─► page looked up, second check ─► lock ─► verify ─► installed ─► served
//!                ▲         │                  │                                 │
//!                └─────────┴── retry: at once, or parked until an end ◄─────────┘
//! invalidator: ready ─► lock ─► zap ─► flush ─► unlock ─► change ─► lock ─► end ─► unlock, wake ─► again
//!                        ▲       │ contended
//!                        └─ unlock ◄─ flush
//! ```
//!
//! What a machine of hundreds of vCPUs makes many of is taken together, exactly where nothing in between can matter: the
//! turns of a fault that spins on a check until an invalidation ends; and the vCPUs that an invalidation lets in at a yield, all to
//! be told to retry, which go round in step until it ends. Every thread has a CPU. Translations that a guest holds in its
//! TLB live until the next flush, or to the end of its stay.

mod faults;
mod invalidations;

use core::cmp::Reverse;
use core::sync::atomic::{AtomicBool, Ordering};
use std::collections::BinaryHeap;

use super::costs::Costs;
use super::lock::Lock;
use super::words::{Frames, Words};
use crate::cell::{Latencies, Latency, Load, LockWait, Measured, Retries, Times};
use crate::guest::Choices;
use crate::policy::{Policies, Precheck, Scenario};
use crate::recording::Recording;
use crate::scenario::{Plan, Take, Touch};

/// What happens next to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The vCPU's access misses, if this is still its turn.
    Miss(usize, u64),
    Hint(usize),
    Looked(usize),
    Verify(usize),
    Installed(usize),
    /// The invalidator is ready to begin.
    Ready(usize),
    /// It has zapped all, if it was not made to yield.
    Zapped(usize, u64),
    Yield(usize, u64),
    /// It has flushed and yields the lock.
    Yielded(usize),
    /// Its begin is over.
    Begun(usize),
    /// It wants the lock for its end.
    Ending(usize),
    Ended(usize),
}

#[derive(Debug)]
struct SimVcpu {
    touch: Touch,
    at: u64,
    /// Counts the plans for its next miss: older ones are void.
    turn: u64,
    /// Since when it has been in the guest, if it is.
    in_guest: Option<u64>,
    fault: Option<SimFault>,
    /// vCPUs that go round in step with this one.
    in_step: Vec<(usize, u64)>,
}

#[derive(Clone, Copy, Debug)]
struct SimFault {
    gfn: u64,
    cell: usize,
    started: u64,
    snapshot: u64,
    retries: u64,
    inside: bool,
}

#[derive(Debug)]
struct SimInvalidator {
    take: Take,
    at: u64,
    frames: Frames,
    started: u64,
    /// Entries that are left, since when they are being zapped, and what one costs.
    left: u64,
    since: u64,
    each: f64,
    is_ending: bool,
    is_zapping: bool,
    unflushed: bool,
    turn: u64,
}

/// Frames that are zapped together, and how many of them are mapped.
#[derive(Clone, Copy, Debug)]
struct Part {
    start: u64,
    frames: u64,
    mapped: u64,
}

/// One run in virtual time.
#[derive(Debug)]
pub(super) struct Machine {
    costs: Costs,
    policies: Policies,
    now: u64,
    duration: u64,
    /// Whether it ends early: nothing begins any more.
    is_cut: bool,
    /// Invalidations from their begin to their end.
    under_way: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    scheduled: u64,
    choices: Choices,
    lock: Lock,
    words: Words,
    vcpus: Vec<SimVcpu>,
    invalidators: Vec<SimInvalidator>,
    parts: Vec<Part>,
    mapped: u64,
    touched: u64,
    /// Faults that spin on a check: since when, and how long a turn is.
    spinning: Vec<(usize, u64, f64, Precheck)>,
    parked: Vec<usize>,
    retries: Retries,
    begun_faults: u64,
    faults: u64,
    accesses: u64,
    most_retries: u64,
    wasted: u64,
    doomed_locks: u64,
    doomed_cpu: f64,
    lock_wait: LockWait,
    invalidations: u64,
    flushes: u64,
    flushes_for_waiters: u64,
    yields: u64,
    recording: Recording,
}

/// What a run in virtual time came to.
#[derive(Clone, Debug)]
pub struct Simulated {
    /// The numbers.
    pub measured: Measured,
    /// Distributions.
    pub recording: Recording,
    /// Faults and invalidations that had begun and not ended when the limit of events was reached.
    pub unfinished: u64,
    /// Whether it ended early, at half of the limit of events.
    pub is_cut: bool,
}

impl Machine {
    pub(super) fn new(
        scenario: Scenario,
        load: Load,
        policies: Policies,
        costs: Costs,
        (vcpus, threads, memory): (usize, usize, u64),
        seed: u64,
        duration: u64,
    ) -> Self {
        let plan = Plan::new(scenario, load, vcpus, threads, memory);
        // What is touched by all, in pieces of what is taken at a time.
        let shared = plan.touches.iter().find_map(|touch| match touch {
            Touch::Any(gfns) => Some(*gfns),
            Touch::Fresh(_) => None,
        });
        let touched = shared.map_or(0, |gfns| gfns.len());
        let piece = plan.takes.first().map_or(1, |take| take.frames);
        let piece = if piece <= touched { piece } else { 1 };
        let parts = (0..touched / piece).map(|part| Part { start: part * piece, frames: piece, mapped: 0 });
        let vcpu = |touch: &Touch| SimVcpu {
            touch: *touch,
            at: 0,
            turn: 0,
            in_guest: None,
            fault: None,
            in_step: Vec::new(),
        };
        let invalidator = |take: &Take| SimInvalidator {
            take: *take,
            at: 0,
            frames: (0, 0),
            started: 0,
            left: 0,
            since: 0,
            each: 0.0,
            is_ending: false,
            is_zapping: false,
            unflushed: false,
            turn: 0,
        };
        let mut machine = Self {
            costs,
            policies,
            now: 0,
            duration,
            is_cut: false,
            under_way: 0,
            events: BinaryHeap::new(),
            scheduled: 0,
            choices: Choices::new(seed, 99),
            lock: Lock::default(),
            words: Words::new(policies.sequence, policies.coverage),
            vcpus: plan.touches.iter().map(vcpu).collect(),
            invalidators: plan.takes.iter().map(invalidator).collect(),
            parts: parts.collect(),
            mapped: 0,
            touched,
            spinning: Vec::new(),
            parked: Vec::new(),
            retries: Retries::default(),
            begun_faults: 0,
            faults: 0,
            accesses: 0,
            most_retries: 0,
            wasted: 0,
            doomed_locks: 0,
            doomed_cpu: 0.0,
            lock_wait: LockWait::default(),
            invalidations: 0,
            flushes: 0,
            flushes_for_waiters: 0,
            yields: 0,
            recording: Recording::default(),
        };
        for vcpu in 0..machine.vcpus.len() {
            machine.stay(vcpu, 0);
        }
        for invalidator in 0..machine.invalidators.len() {
            machine.prepare(invalidator);
        }
        machine
    }

    /// Runs until all that began within the duration has ended; vCPUs fault until the last invalidation has. After half of
    /// `limit` events nothing begins any more, and after all of them, or when `interrupted`, it stops.
    pub(super) fn run(mut self, limit: u64, interrupted: &AtomicBool) -> Simulated {
        let mut events = 0;
        while let Some(Reverse((time, _, event))) = self.events.pop() {
            if events == limit || interrupted.load(Ordering::Relaxed) {
                break;
            }
            self.is_cut |= events == limit / 2;
            events += 1;
            self.now = time;
            self.happen(event);
        }
        let unfinished_faults = self.begun_faults - self.faults;
        let unfinished = unfinished_faults + self.under_way;
        let per = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        let measured = Measured {
            elapsed_ns: self.now.max(1),
            accesses: Some(self.accesses),
            faults: Some(self.faults),
            unfinished_faults: Some(unfinished_faults),
            invalidations: self.invalidations,
            flushes_per_invalidation: per(self.flushes, self.invalidations),
            // There is no scheduler.
            flushes_for_waiters_per_invalidation: per(self.flushes_for_waiters, self.invalidations),
            flushes_for_scheduler_per_invalidation: per(0, self.invalidations),
            yields_per_invalidation: per(self.yields, self.invalidations),
            yields_to_waiters_per_invalidation: per(self.yields, self.invalidations),
            retries_per_fault: per(self.retries.all(), self.faults),
            retries: Some(self.retries),
            most_retries: Some(self.most_retries),
            most_ends: None,
            wasted_fault_ins: Some(self.wasted),
            invalidation_ns: Times::of(&self.recording.invalidations),
            invalidation_cpu_ns: None,
            lock_wait_ns: Some(self.lock_wait),
            doomed_lock_acquisitions: Some(self.doomed_locks),
            doomed_cpu_ns: Some(self.doomed_cpu as u64),
            latency_ns: Latencies {
                inside: Latency::of(&self.recording.inside),
                outside: Latency::of(&self.recording.outside),
            },
            wrong_pages: 0,
        };
        Simulated { measured, recording: self.recording, unfinished, is_cut: self.is_cut }
    }

    fn after(&mut self, delay: f64, event: Event) {
        self.at(self.now + delay.round().max(0.0) as u64, event);
    }

    fn at(&mut self, time: u64, event: Event) {
        self.scheduled += 1;
        self.events.push(Reverse((time, self.scheduled, event)));
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Miss(vcpu, turn) if self.vcpus[vcpu].turn == turn => self.miss(vcpu),
            Event::Hint(vcpu) => self.hint(vcpu),
            Event::Looked(vcpu) => self.looked(vcpu),
            Event::Verify(vcpu) => self.verify(vcpu),
            Event::Installed(vcpu) => self.installed(vcpu),
            Event::Ready(who) => self.ready(who),
            Event::Zapped(who, turn) if self.invalidators[who].turn == turn => self.zapped(who),
            Event::Yield(who, turn) if self.invalidators[who].turn == turn => self.give_way(who),
            Event::Yielded(who) => self.yielded(who),
            Event::Begun(who) => self.begun(who),
            Event::Ending(who) => self.ending(who),
            Event::Ended(who) => self.ended(who),
            // Plans that something came in the way of.
            Event::Miss(..) | Event::Zapped(..) | Event::Yield(..) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::lock::Admitted;
    use crate::sim::tests::COSTS;

    #[test]
    fn each_of_those_in_step_waits_for_the_lock() {
        let size = (3, 1, 1024);
        let mut machine = Machine::new(Scenario::A, Load::Storm, Policies::BEFORE, COSTS, size, 1, 1000);
        for vcpu in &mut machine.vcpus {
            let (gfn, cell, started, snapshot) = (1, 0, 0, 0);
            vcpu.fault = Some(SimFault { gfn, cell, started, snapshot, retries: 0, inside: false });
        }
        machine.words.begin((0, 1024));
        machine.join(0, 1);
        machine.join(0, 2);
        machine.now = 100;
        machine.admit(Admitted { readers: vec![(0, 40)], writer: None });
        assert_eq!((machine.lock_wait.faults, machine.doomed_cpu), (3 * 60, 180.0));
    }
}
