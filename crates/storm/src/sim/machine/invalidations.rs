//! What the invalidators do: begin, zap, flush, yield, end.

use super::{Event, Machine, SimInvalidator};
use crate::guest::BATCH;
use crate::recording::Recording;
use crate::scenario::{Order, Take, Touch};
use crate::sim::words::Frames;

impl Machine {
    pub(super) fn prepare(&mut self, who: usize) {
        if self.is_late(who) {
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

    /// Whether `who` begins no more: it has had one invalidation at least.
    fn is_late(&self, who: usize) -> bool {
        (self.now >= self.duration || self.is_cut) && self.invalidators[who].at > 0
    }

    pub(super) fn ready(&mut self, who: usize) {
        // Time was up while its memory was being mapped.
        if self.invalidators[who].at > 1 && self.is_late(who) {
            return;
        }
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
        self.under_way += 1;
        if self.lock.write(who, self.now) {
            self.granted(who, 0.0);
        } else {
            self.contended();
        }
    }

    /// The parts that `frames` takes from what is touched.
    pub(super) fn touched_parts(&self, (start, end): Frames) -> core::ops::Range<usize> {
        let Some(first) = self.parts.first() else { return 0..0 };
        let index = |frame: u64| (frame / first.frames).min(self.parts.len() as u64) as usize;
        index(start)..index(end.div_ceil(first.frames) * first.frames)
    }

    pub(super) fn granted(&mut self, who: usize, delay: f64) {
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
    pub(super) fn forget(&mut self, frames: Frames) {
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

    pub(super) fn unmap_all(&mut self, frames: Frames) -> u64 {
        let mut gone = 0;
        for index in self.touched_parts(frames) {
            gone += core::mem::take(&mut self.parts[index].mapped);
        }
        self.mapped -= gone;
        gone
    }

    /// `count` more entries of the invalidation are zapped.
    pub(super) fn unmap(&mut self, who: usize, count: u64) {
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
    pub(super) fn flush(&mut self, who: usize) -> f64 {
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

    pub(super) fn give_way(&mut self, who: usize) {
        self.flushes_for_waiters += u64::from(self.invalidators[who].unflushed);
        let time = self.flush(who);
        self.yields += 1;
        self.after(time, Event::Yielded(who));
    }

    pub(super) fn yielded(&mut self, who: usize) {
        let admitted = self.lock.unlock_write();
        self.admit(admitted);
        if self.lock.write(who, self.now) {
            self.granted(who, 0.0);
        }
    }

    pub(super) fn zapped(&mut self, who: usize) {
        let left = core::mem::take(&mut self.invalidators[who].left);
        self.invalidators[who].is_zapping = false;
        self.unmap(who, left);
        let time = self.flush(who);
        self.after(time, Event::Begun(who));
    }

    pub(super) fn begun(&mut self, who: usize) {
        let admitted = self.lock.unlock_write();
        self.admit(admitted);
        let change = if self.invalidators[who].take.compares { self.costs.compare } else { 0.0 };
        self.after(change, Event::Ending(who));
    }

    pub(super) fn ending(&mut self, who: usize) {
        self.invalidators[who].is_ending = true;
        if self.lock.write(who, self.now) {
            self.granted(who, 0.0);
        } else {
            self.contended();
        }
    }

    pub(super) fn ended(&mut self, who: usize) {
        let SimInvalidator { frames, started, .. } = self.invalidators[who];
        self.words.end(frames);
        self.invalidators[who].is_ending = false;
        self.invalidations += 1;
        self.under_way -= 1;
        Recording::sample(&mut self.recording.invalidations, self.now - started);
        let admitted = self.lock.unlock_write();
        self.admit(admitted);
        self.let_go();
        self.prepare(who);
    }

    /// Whoever waited for an end tries again.
    pub(super) fn let_go(&mut self) {
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
