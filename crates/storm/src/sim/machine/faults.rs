//! What the vCPUs do: a stay in the guest, a miss, a fault step by step.

use super::{Event, Machine, SimFault};
use crate::policy::{AfterRetry, Precheck, Witness, Yielding};
use crate::recording::Recording;
use crate::scenario::Touch;
use crate::sim::lock::Admitted;

impl Machine {
    /// The vCPU is in the guest from `from` on; when does it miss?
    pub(super) fn stay(&mut self, vcpu: usize, from: u64) {
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

    pub(super) fn miss(&mut self, vcpu: usize) {
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
        let is_over = self.now >= self.duration && self.under_way == 0;
        if is_over || self.is_cut {
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
    pub(super) fn unmapped(&mut self) -> Option<(u64, usize)> {
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

    pub(super) fn fault(&mut self, vcpu: usize) -> &mut SimFault {
        self.vcpus[vcpu].fault.as_mut().expect("who is on the fault path has a fault")
    }

    pub(super) fn looks(&self, check: Precheck) -> bool {
        [check, Precheck::Both].contains(&self.policies.precheck)
    }

    pub(super) fn hint(&mut self, vcpu: usize) {
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

    pub(super) fn is_stale(&mut self, vcpu: usize) -> bool {
        let SimFault { gfn, snapshot, .. } = *self.fault(vcpu);
        let inside = self.words.is_inside(gfn);
        self.fault(vcpu).inside |= inside;
        self.words.is_covered(gfn) || self.words.snapshot(gfn) != snapshot
    }

    pub(super) fn looked(&mut self, vcpu: usize) {
        if self.looks(Precheck::After) && self.is_stale(vcpu) {
            return self.retry(vcpu, Precheck::After, self.costs.to_hint + self.costs.fault_in);
        }
        match self.policies.witness {
            Witness::Lock if !self.lock.read(vcpu, self.now) => self.contended(),
            Witness::Lock | Witness::Intent => self.after(self.costs.locked, Event::Verify(vcpu)),
        }
    }

    pub(super) fn verify(&mut self, vcpu: usize) {
        if !self.is_stale(vcpu) {
            return self.after(self.costs.install, Event::Installed(vcpu));
        }
        self.unlock_read();
        if self.policies.witness == Witness::Lock {
            self.doomed_locks += self.in_step(vcpu);
        }
        self.retry(vcpu, Precheck::Off, self.costs.to_hint + self.costs.fault_in + self.costs.locked);
    }

    pub(super) fn unlock_read(&mut self) {
        if self.policies.witness == Witness::Lock {
            let admitted = self.lock.unlock_read();
            self.admit(admitted);
        }
    }

    /// Nothing was installed. `at` is where it was found, `turn` what it took.
    pub(super) fn retry(&mut self, vcpu: usize, at: Precheck, turn: f64) {
        self.count_retries(vcpu, at, 1, self.in_step(vcpu), turn);
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

    pub(super) fn count_retries(&mut self, vcpu: usize, at: Precheck, turns: u64, many: u64, turn: f64) {
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

    pub(super) fn installed(&mut self, vcpu: usize) {
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

    pub(super) fn admit(&mut self, admitted: Admitted) {
        let Admitted { readers, writer } = admitted;
        let crowd = self.costs.handover + self.costs.crowd * readers.len().saturating_sub(1) as f64;
        let mut leader: Option<usize> = None;
        for (vcpu, since) in readers {
            let waited = (self.now - since) * self.in_step(vcpu);
            self.lock_wait.faults += waited;
            self.doomed_cpu += if self.is_stale(vcpu) { waited as f64 } else { 0.0 };
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

    pub(super) fn is_doomed(&self, vcpu: usize) -> bool {
        self.vcpus[vcpu].fault.is_some_and(|fault| self.words.is_covered(fault.gfn))
    }

    /// How many vCPUs do what `vcpu` does, itself included.
    fn in_step(&self, vcpu: usize) -> u64 {
        1 + self.vcpus[vcpu].in_step.len() as u64
    }

    /// From here on `vcpu`, and who goes with it, does as `leader` does.
    pub(super) fn join(&mut self, leader: usize, vcpu: usize) {
        let since = self.fault(leader).retries;
        let own = self.part(vcpu);
        self.vcpus[leader].in_step.extend([vcpu].into_iter().chain(own).map(|vcpu| (vcpu, since)));
    }

    /// Those in step with `leader` go their own ways again.
    pub(super) fn part(&mut self, leader: usize) -> Vec<usize> {
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
    pub(super) fn contended(&mut self) {
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
}
