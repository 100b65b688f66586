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

use core::cmp::Reverse;
use std::collections::BinaryHeap;

use super::costs::Costs;
use super::lock::{Admitted, Lock};
use super::words::{Frames, Words};
use crate::cell::{Latencies, Latency, Load, LockWait, Measured, Retries, Times};
use crate::guest::{BATCH, Choices};
use crate::policy::{AfterRetry, Policies, Precheck, Scenario, Witness, Yielding};
use crate::recording::Recording;
use crate::scenario::{Order, Plan, Take, Touch};

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

    /// Runs until all that began within the duration has ended. After half of `limit` events nothing begins any more, and
    /// after all of them it stops.
    pub(super) fn run(mut self, limit: u64) -> Simulated {
        let mut events = 0;
        while let Some(Reverse((time, _, event))) = self.events.pop() {
            if events == limit {
                break;
            }
            if events == limit / 2 {
                self.duration = self.duration.min(time);
            }
            events += 1;
            self.now = time;
            self.happen(event);
        }
        let unfinished = self.begun_faults - self.faults
            + self
                .invalidators
                .iter()
                .filter(|invalidator| invalidator.left > 0 || invalidator.is_ending)
                .count() as u64;
        let per = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        let measured = Measured {
            elapsed_ns: self.now.max(1),
            accesses: Some(self.accesses),
            faults: self.faults,
            invalidations: self.invalidations,
            flushes_per_invalidation: per(self.flushes, self.invalidations),
            yields_per_invalidation: per(self.yields, self.invalidations),
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
        Simulated { measured, recording: self.recording, unfinished, is_cut: events > limit / 2 }
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

    // In the guest.

    /// The vCPU is in the guest from `from` on; when does it miss?
    fn stay(&mut self, vcpu: usize, from: u64) {
        self.vcpus[vcpu].turn += 1;
        self.vcpus[vcpu].in_guest = Some(from);
        let turn = self.vcpus[vcpu].turn;
        let delay = match self.vcpus[vcpu].touch {
            Touch::Fresh(_) => self.costs.between_faults,
            Touch::Any(_) if self.mapped >= self.touched => return,
            Touch::Any(_) => {
                // Accesses until one meets a frame that is not mapped.
                let share = (self.touched - self.mapped) as f64 / self.touched as f64;
                let uniform = (self.choices.below(1 << 53) + 1) as f64 / (1_u64 << 53) as f64;
                let hits = if share >= 1.0 { 0.0 } else { (uniform.ln() / (1.0 - share).ln()).floor() };
                hits.min(1e12) * self.costs.touch
            }
        };
        self.at(from + delay as u64, Event::Miss(vcpu, turn));
    }

    fn miss(&mut self, vcpu: usize) {
        let (gfn, cell) = match self.vcpus[vcpu].touch {
            Touch::Fresh(own) => {
                self.vcpus[vcpu].at += 1;
                (own.start.as_u64() + self.vcpus[vcpu].at % own.len(), usize::MAX)
            }
            Touch::Any(_) => match self.unmapped() {
                Some(found) => found,
                None => return self.stay(vcpu, self.now),
            },
        };
        if self.now >= self.duration {
            return;
        }
        if let (Touch::Any(_), Some(since)) = (self.vcpus[vcpu].touch, self.vcpus[vcpu].in_guest) {
            self.accesses += ((self.now - since) as f64 / self.costs.touch) as u64;
        }
        self.begun_faults += 1;
        let inside = self.words.is_inside(gfn);
        let state = &mut self.vcpus[vcpu];
        state.in_guest = None;
        state.fault = Some(SimFault { gfn, cell, started: self.now, snapshot: 0, retries: 0, inside });
        self.after(self.costs.to_hint, Event::Hint(vcpu));
    }

    /// A frame that is not mapped, and its part.
    fn unmapped(&mut self) -> Option<(u64, usize)> {
        let piece = self.parts.first()?.frames;
        for _ in 0..64 {
            let frame = self.choices.below(self.touched);
            let index = (frame / piece).min(self.parts.len() as u64 - 1) as usize;
            let part = self.parts[index];
            if self.choices.below(part.frames) >= part.mapped {
                return Some((frame, index));
            }
        }
        let index = self.parts.iter().position(|part| part.mapped < part.frames)?;
        Some((self.parts[index].start, index))
    }

    // A fault.

    fn fault(&mut self, vcpu: usize) -> &mut SimFault {
        self.vcpus[vcpu].fault.as_mut().expect("who is on the fault path has a fault")
    }

    fn looks(&self, check: Precheck) -> bool {
        [check, Precheck::Both].contains(&self.policies.precheck)
    }

    fn hint(&mut self, vcpu: usize) {
        let gfn = self.fault(vcpu).gfn;
        let snapshot = self.words.snapshot(gfn);
        let inside = self.words.is_inside(gfn);
        let fault = self.fault(vcpu);
        fault.snapshot = snapshot;
        fault.inside |= inside;
        if self.looks(Precheck::Before) && self.words.is_covered(gfn) {
            self.retry(vcpu, Precheck::Before, self.costs.to_hint);
        } else {
            self.after(self.costs.fault_in, Event::Looked(vcpu));
        }
    }

    fn is_stale(&mut self, vcpu: usize) -> bool {
        let SimFault { gfn, snapshot, .. } = *self.fault(vcpu);
        let inside = self.words.is_inside(gfn);
        self.fault(vcpu).inside |= inside;
        self.words.is_covered(gfn) || self.words.snapshot(gfn) != snapshot
    }

    fn looked(&mut self, vcpu: usize) {
        if self.looks(Precheck::After) && self.is_stale(vcpu) {
            return self.retry(vcpu, Precheck::After, self.costs.to_hint + self.costs.fault_in);
        }
        match self.policies.witness {
            Witness::Lock if !self.lock.read(vcpu, self.now) => self.contended(),
            Witness::Lock | Witness::Intent => self.after(self.costs.locked, Event::Verify(vcpu)),
        }
    }

    fn verify(&mut self, vcpu: usize) {
        if !self.is_stale(vcpu) {
            return self.after(self.costs.install, Event::Installed(vcpu));
        }
        self.unlock_read();
        if self.policies.witness == Witness::Lock {
            self.doomed_locks += 1 + self.vcpus[vcpu].in_step.len() as u64;
        }
        self.retry(vcpu, Precheck::Off, self.costs.to_hint + self.costs.fault_in + self.costs.locked);
    }

    fn unlock_read(&mut self) {
        if self.policies.witness == Witness::Lock {
            let admitted = self.lock.unlock_read();
            self.admit(admitted);
        }
    }

    /// Nothing was installed. `at` is where it was found, `turn` what it took.
    fn retry(&mut self, vcpu: usize, at: Precheck, turn: f64) {
        let many = 1 + self.vcpus[vcpu].in_step.len() as u64;
        self.count_retries(vcpu, at, 1, many, turn);
        let gfn = self.fault(vcpu).gfn;
        let covered = self.words.is_covered(gfn);
        match (covered, self.policies.after_retry) {
            (true, AfterRetry::Park) => self.parked.push(vcpu),
            (true, AfterRetry::Refault) if at != Precheck::Off => {
                self.spinning.push((vcpu, self.now, turn, at));
            }
            _ => self.after(self.costs.to_hint, Event::Hint(vcpu)),
        }
    }

    fn count_retries(&mut self, vcpu: usize, at: Precheck, turns: u64, many: u64, turn: f64) {
        let count = match at {
            Precheck::Before => &mut self.retries.before_fault_in,
            Precheck::After => &mut self.retries.after_fault_in,
            Precheck::Off | Precheck::Both => &mut self.retries.under_lock,
        };
        *count += turns * many;
        if at != Precheck::Before {
            self.wasted += turns * many;
        }
        self.doomed_cpu += turns as f64 * many as f64 * turn;
        let fault = self.fault(vcpu);
        fault.retries += turns;
        self.most_retries = self.most_retries.max(self.vcpus[vcpu].fault.map_or(0, |fault| fault.retries));
    }

    fn installed(&mut self, vcpu: usize) {
        self.unlock_read();
        let SimFault { cell, started, inside, .. } = *self.fault(vcpu);
        self.vcpus[vcpu].fault = None;
        self.faults += 1;
        self.accesses += 1;
        let histogram = if inside { &mut self.recording.inside } else { &mut self.recording.outside };
        Recording::sample(histogram, self.now - started);
        if let Some(part) = self.parts.get_mut(cell)
            && part.mapped < part.frames
        {
            part.mapped += 1;
            self.mapped += 1;
        }
        self.stay(vcpu, self.now);
    }

    // The lock.

    fn admit(&mut self, admitted: Admitted) {
        let Admitted { readers, writer } = admitted;
        let crowd = self.costs.handover + self.costs.crowd * readers.len().saturating_sub(1) as f64;
        let mut leader: Option<usize> = None;
        for (vcpu, since) in readers {
            self.lock_wait.faults += self.now - since;
            self.doomed_cpu += if self.is_stale(vcpu) { (self.now - since) as f64 } else { 0.0 };
            match leader {
                // Told to retry as well, and in step from here on: one of them is enough to watch.
                Some(leader) if self.is_doomed(vcpu) => {
                    self.join(leader, vcpu);
                    self.lock.unlock_read();
                }
                _ => {
                    if self.is_doomed(vcpu) {
                        leader = Some(vcpu);
                    }
                    self.after(crowd + self.costs.locked, Event::Verify(vcpu));
                }
            }
        }
        if let Some((who, since)) = writer {
            self.lock_wait.invalidations += self.now - since;
            self.granted(who, self.costs.handover);
        }
    }

    fn is_doomed(&self, vcpu: usize) -> bool {
        self.vcpus[vcpu].fault.is_some_and(|fault| self.words.is_covered(fault.gfn))
    }

    /// From here on `vcpu`, and who goes with it, does as `leader` does.
    fn join(&mut self, leader: usize, vcpu: usize) {
        let since = self.fault(leader).retries;
        let own = self.part(vcpu);
        self.vcpus[leader].in_step.extend([vcpu].into_iter().chain(own).map(|vcpu| (vcpu, since)));
    }

    /// Those in step with `leader` go their own ways again.
    fn part(&mut self, leader: usize) -> Vec<usize> {
        let in_step = core::mem::take(&mut self.vcpus[leader].in_step);
        let retries = self.vcpus[leader].fault.map_or(0, |fault| fault.retries);
        in_step
            .into_iter()
            .map(|(vcpu, since)| {
                self.fault(vcpu).retries += retries - since;
                vcpu
            })
            .collect()
    }

    /// Somebody waits for the writer: it yields at the next entry, if that is what it does.
    fn contended(&mut self) {
        let Some(who) = self.lock.writer() else { return };
        let invalidator = &mut self.invalidators[who];
        if self.policies.yielding != Yielding::Contention || !invalidator.is_zapping {
            return;
        }
        // At least one entry between two yields.
        let passed =
            (self.now.saturating_sub(invalidator.since) as f64 / invalidator.each).ceil().max(1.0) as u64;
        if passed >= invalidator.left {
            return;
        }
        invalidator.is_zapping = false;
        invalidator.turn += 1;
        let (turn, at) = (invalidator.turn, invalidator.since + (passed as f64 * invalidator.each) as u64);
        invalidator.left -= passed;
        self.at(at.max(self.now), Event::Yield(who, turn));
        self.unmap(who, passed);
    }

    // An invalidation.

    fn prepare(&mut self, who: usize) {
        if self.now >= self.duration && self.invalidators[who].at > 0 {
            return;
        }
        let invalidator = &mut self.invalidators[who];
        let Take { from, frames, order, populates, .. } = invalidator.take;
        let places = from.len() / frames;
        let place = match order {
            Order::InTurn => invalidator.at % places,
            Order::Random => self.choices.below(places),
        };
        invalidator.at += 1;
        let start = from.start.as_u64() + place * frames;
        invalidator.frames = (start, start + frames);
        let served = self.costs.to_hint + self.costs.fault_in + self.costs.locked + self.costs.install;
        // All is mapped at the start.
        let is_first = self.invalidators[who].at == 1;
        let delay = if populates && !is_first { frames as f64 * served } else { 0.0 };
        self.after(delay, Event::Ready(who));
    }

    fn ready(&mut self, who: usize) {
        let frames = self.invalidators[who].frames;
        if self.invalidators[who].take.populates {
            for index in self.touched_parts(frames) {
                let part = &mut self.parts[index];
                self.mapped += part.frames - part.mapped;
                part.mapped = part.frames;
            }
        }
        let invalidator = &mut self.invalidators[who];
        invalidator.started = self.now;
        invalidator.is_ending = false;
        invalidator.left = invalidator.take.frames;
        if self.lock.write(who, self.now) {
            self.granted(who, 0.0);
        } else {
            self.contended();
        }
    }

    /// The parts that `frames` takes from what is touched.
    fn touched_parts(&self, (start, end): Frames) -> core::ops::Range<usize> {
        let Some(first) = self.parts.first() else { return 0..0 };
        let index = |frame: u64| (frame / first.frames).min(self.parts.len() as u64) as usize;
        index(start)..index(end.div_ceil(first.frames) * first.frames)
    }

    fn granted(&mut self, who: usize, delay: f64) {
        let (frames, is_ending) = (self.invalidators[who].frames, self.invalidators[who].is_ending);
        if is_ending {
            return self.after(delay + self.costs.single / 2.0, Event::Ended(who));
        }
        let mut delay = delay;
        if self.invalidators[who].left == self.invalidators[who].take.frames {
            self.words.begin(frames);
            delay += self.costs.single / 2.0;
            self.forget(frames);
        }
        let passing = self.costs.pass_entry;
        let invalidator = &mut self.invalidators[who];
        invalidator.each = match (invalidator.take.populates, invalidator.take.frames) {
            (true, _) => self.costs.zap_entry,
            (false, 1) => 0.1,
            (false, _) => passing,
        };
        invalidator.is_zapping = true;
        invalidator.since = self.now + delay as u64;
        invalidator.turn += 1;
        let (turn, zap) = (invalidator.turn, invalidator.left as f64 * invalidator.each);
        self.after(delay + zap, Event::Zapped(who, turn));
        if self.lock.is_contended() {
            self.contended();
        }
    }

    /// vCPUs in the guest will meet what is zapped without a flush when their stay, and with it their TLB, ends.
    fn forget(&mut self, frames: Frames) {
        if frames.1 - frames.0 == 1 || self.touched_parts(frames).is_empty() {
            return;
        }
        let stay = (f64::from(BATCH) * self.costs.touch) as u64 + 1;
        for vcpu in 0..self.vcpus.len() {
            if self.vcpus[vcpu].in_guest.is_some() && matches!(self.vcpus[vcpu].touch, Touch::Any(_)) {
                self.vcpus[vcpu].turn += 1;
                let turn = self.vcpus[vcpu].turn;
                let delay = self.choices.below(stay) as f64;
                self.after(delay, Event::Miss(vcpu, turn));
            }
        }
        // The first ones go first.
        let first = self.touched_parts(frames).start;
        if self.parts[first].frames == 1 {
            self.unmap_all(frames);
        }
    }

    fn unmap_all(&mut self, frames: Frames) -> u64 {
        let mut gone = 0;
        for index in self.touched_parts(frames) {
            gone += core::mem::take(&mut self.parts[index].mapped);
        }
        self.mapped -= gone;
        gone
    }

    /// `count` more entries of the invalidation are zapped.
    fn unmap(&mut self, who: usize, count: u64) {
        let invalidator = &self.invalidators[who];
        let (frames, populates) = (invalidator.frames, invalidator.take.populates);
        let all = invalidator.take.frames;
        let mut gone = 0;
        for index in self.touched_parts(frames) {
            let part = &mut self.parts[index];
            let share = (part.frames as f64 * count as f64 / all as f64).ceil() as u64;
            let zapped = share.min(part.mapped);
            part.mapped -= zapped;
            gone += zapped;
        }
        self.mapped -= gone;
        self.invalidators[who].unflushed |= populates || gone > 0;
    }

    /// Asks every vCPU; those in the guest leave it. What it takes.
    fn flush(&mut self, who: usize) -> f64 {
        if !core::mem::take(&mut self.invalidators[who].unflushed) {
            return 0.0;
        }
        self.flushes += 1;
        let kicked: Vec<_> =
            (0..self.vcpus.len()).filter(|vcpu| self.vcpus[*vcpu].in_guest.is_some()).collect();
        let kick = if kicked.is_empty() { 0.0 } else { self.costs.kick };
        let time = self.costs.request * self.vcpus.len() as f64 + kick;
        for vcpu in kicked {
            if let (Touch::Any(_), Some(since)) = (self.vcpus[vcpu].touch, self.vcpus[vcpu].in_guest) {
                self.accesses += (self.now.saturating_sub(since) as f64 / self.costs.touch) as u64;
            }
            self.stay(vcpu, self.now + time as u64);
        }
        time
    }

    fn give_way(&mut self, who: usize) {
        let time = self.flush(who);
        self.yields += 1;
        self.after(time, Event::Yielded(who));
    }

    fn yielded(&mut self, who: usize) {
        let admitted = self.lock.unlock_write();
        self.admit(admitted);
        if self.lock.write(who, self.now) {
            self.granted(who, 0.0);
        }
    }

    fn zapped(&mut self, who: usize) {
        let left = core::mem::take(&mut self.invalidators[who].left);
        self.invalidators[who].is_zapping = false;
        self.unmap(who, left);
        let time = self.flush(who);
        self.after(time, Event::Begun(who));
    }

    fn begun(&mut self, who: usize) {
        let admitted = self.lock.unlock_write();
        self.admit(admitted);
        let change = if self.invalidators[who].take.compares { self.costs.compare } else { 0.0 };
        self.after(change, Event::Ending(who));
    }

    fn ending(&mut self, who: usize) {
        self.invalidators[who].is_ending = true;
        if self.lock.write(who, self.now) {
            self.granted(who, 0.0);
        } else {
            self.contended();
        }
    }

    fn ended(&mut self, who: usize) {
        let SimInvalidator { frames, started, .. } = self.invalidators[who];
        self.words.end(frames);
        self.invalidators[who].is_ending = false;
        self.invalidations += 1;
        Recording::sample(&mut self.recording.invalidations, self.now - started);
        let admitted = self.lock.unlock_write();
        self.admit(admitted);
        self.let_go();
        self.prepare(who);
    }

    /// Whoever waited for an end tries again.
    fn let_go(&mut self) {
        for (vcpu, since, turn, at) in core::mem::take(&mut self.spinning) {
            let turns = ((self.now - since) as f64 / turn).floor();
            self.count_retries(vcpu, at, turns as u64, 1, turn);
            self.at(since + ((turns + 1.0) * turn) as u64, Event::Hint(vcpu));
        }
        for vcpu in core::mem::take(&mut self.parked) {
            self.after(self.costs.wake, Event::Hint(vcpu));
        }
        for leader in 0..self.vcpus.len() {
            for vcpu in self.part(leader) {
                self.after(self.costs.to_hint, Event::Hint(vcpu));
            }
        }
    }
}
