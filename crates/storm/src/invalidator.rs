//! A thread that takes memory away: what a kernel's memory management does to a virtual machine.

use core::sync::atomic::{AtomicBool, Ordering};
use std::hint::black_box;

use afterimage_mmu::{Blocking, FRAME_BYTES, Gfn, GfnRange, Platform, Vcpu, Zap};

use crate::guest::{Choices, Shared, StormTables};
use crate::platform::{Threads, cpu_ns, give_way_if_wanted, keep_times, start_of_slice, take_times};
use crate::ram::{Ram, Spares};
use crate::recording::{Event, Recording, What};
use crate::scenario::{Order, Take};
use crate::windows::Windows;

/// Pages that are moved in one invalidation, at most: a few make a wrong page seen, all would take longer than the zap.
const MOVED: u64 = 16;

/// Frames from which on an invalidation's CPU time is taken: reading it is as long as to zap some tens of frames.
const WIDE: u64 = 4096;

/// What one thread did.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pub(crate) invalidations: u64,
    /// CPU time of those, where it is taken.
    pub(crate) cpu_ns: Option<u64>,
    pub(crate) failure: Option<String>,
    pub(crate) recording: Recording,
}

pub(crate) struct Invalidator<'m, 'r> {
    shared: &'m Shared<'m, 'r>,
    number: usize,
    take: Take,
    windows: &'m Windows,
    spares: Spares,
    choices: Choices,
    at: u64,
    /// Two pages' content, to compare.
    pages: Box<[[u64; FRAME_BYTES as usize / 8]; 2]>,
    taken: Taken,
}

impl<'m, 'r> Invalidator<'m, 'r> {
    pub(crate) fn new(
        shared: &'m Shared<'m, 'r>,
        number: usize,
        take: Take,
        spares: Spares,
        seed: u64,
    ) -> Self {
        let windows = &shared.windows[number];
        let choices = Choices::new(seed, (number as u64 + 1) << 32);
        let pages = Box::new([[1; FRAME_BYTES as usize / 8]; 2]);
        Self { shared, number, take, windows, spares, choices, at: 0, pages, taken: Taken::default() }
    }

    /// Takes memory away until the storm is over; once at least.
    pub(crate) fn run(mut self, over: &AtomicBool) -> Taken {
        start_of_slice();
        keep_times();
        let mut vcpu = self.shared.mmu.vcpu();
        loop {
            let gfns = self.next();
            if self.take.populates && !self.populate(&mut vcpu, gfns, over) {
                return self.taken;
            }
            self.invalidate(gfns);
            if over.load(Ordering::Relaxed) {
                return self.taken;
            }
        }
    }

    fn next(&mut self) -> GfnRange {
        let Take { from, frames, order, .. } = self.take;
        let places = from.len() / frames;
        let place = match order {
            Order::InTurn => self.at % places,
            Order::Random => self.choices.below(places),
        };
        self.at += 1;
        let start = from.start + place * frames;
        GfnRange::new(start, start + frames)
    }

    /// Has everything mapped, as in a machine that uses its memory. `false`: the storm is over, or something failed.
    fn populate(&mut self, vcpu: &mut Vcpu<'m, StormTables<'r>>, gfns: GfnRange, over: &AtomicBool) -> bool {
        for gfn in gfns.start.as_u64()..gfns.end.as_u64() {
            give_way_if_wanted();
            if let Err(failure) = self.shared.map(vcpu, Gfn::new(gfn)) {
                self.taken.failure = Some(failure);
                return false;
            }
            if over.load(Ordering::Relaxed) && self.taken.invalidations > 0 {
                return false;
            }
        }
        true
    }

    fn invalidate(&mut self, gfns: GfnRange) {
        give_way_if_wanted();
        let shared = self.shared;
        self.windows.open(gfns);
        take_times();
        let cpu_before = (gfns.len() >= WIDE).then(cpu_ns);
        let start_ns = Threads::now_ns();
        let hvas = Ram::hvas(gfns.start.as_u64(), gfns.len());
        let invalidation = shared.mmu.invalidate(hvas, Zap::Unmap, Blocking::Allowed);
        let begun_ns = Threads::now_ns();
        self.change(gfns);
        drop(invalidation);
        let end_ns = Threads::now_ns();
        self.windows.close();
        self.taken.invalidations += 1;
        if let Some(before) = cpu_before {
            *self.taken.cpu_ns.get_or_insert(0) += cpu_ns() - before;
        }
        Recording::sample(&mut self.taken.recording.invalidations, end_ns - start_ns);
        let from = |ns: u64| ns.saturating_sub(shared.started_ns);
        self.taken.recording.keep(|| Event {
            thread: self.number,
            what: What::Invalidation {
                begun_ns: from(begun_ns),
                yields_ns: take_times().into_iter().map(from).collect(),
            },
            gfn: gfns.start.as_u64(),
            frames: gfns.len(),
            start_ns: from(start_ns),
            end_ns: from(end_ns),
        });
    }

    /// What the memory was taken away for.
    fn change(&mut self, gfns: GfnRange) {
        if self.take.compares {
            // Whoever merges pages looks at both while nobody can write them: a checksum and a comparison.
            let [one, other] = black_box(&*self.pages);
            let sum = one.iter().fold(0_u64, |sum, word| (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            black_box((sum, one == other));
        }
        // The first ones always: those are touched in every scenario.
        for page in 0..gfns.len().min(MOVED) {
            let page = if page < MOVED / 2 { page } else { self.choices.below(gfns.len()) };
            self.shared.ram.migrate(gfns.start.as_u64() + page, &mut self.spares);
        }
    }
}
