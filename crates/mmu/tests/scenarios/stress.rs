//! Everything at once, on real threads: guests through their TLBs, pages thrown away, a slot on the move.
//!
//! A page says which one it is and how often it was thrown away; a freed frame belongs to nobody. So any stale
//! translation, in the table or in a TLB, that a guest uses shows itself.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use afterimage_mmu::{Access, Emulate, Gfn, Policy, SlotId, SpaceId, YieldPolicy};

use crate::support::machine::{Machine, Touched, both, unchecked};

const PAGES: u64 = 64;
const HOMES: [u64; 2] = [256, 512];
const TIME: Duration = Duration::from_millis(1000);

/// A small generator, so that a schedule depends on threads only.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn guest(machine: &Machine, seed: u64, stop: &AtomicBool) -> u64 {
    let mut guest = machine.guest();
    let mut random = Random(seed);
    let mut reads = 0;
    while !stop.load(Ordering::Relaxed) {
        let page = random.below(PAGES);
        // Frames 0.. stay where they are; the same pages show once more in a slot that moves.
        if random.below(4) != 0 {
            guest.read(page, page);
        } else {
            let gfn = HOMES[random.below(2) as usize] + page;
            let oldest = machine.frames.generation(page);
            match guest.touch(gfn, Access::READ).expect("neither memory nor device fails") {
                Touched::Page(stamp) => {
                    assert_eq!(stamp.page, page, "gfn {gfn:#x} shows another page");
                    assert!(stamp.generation >= oldest, "gfn {gfn:#x} shows {stamp:?}, older than {oldest}");
                }
                Touched::Emulated(why) => assert_eq!(why, Emulate::Mmio),
            }
        }
        reads += 1;
    }
    reads
}

pub(crate) fn guests_never_read_a_page_that_is_gone() {
    race(Policy { yielding: YieldPolicy::OnContention, ..both() });
}

pub(crate) fn nor_where_nothing_is_checked_without_the_lock() {
    race(Policy { yielding: YieldPolicy::OnContention, ..unchecked() });
}

/// What a race says that shows nothing, right or wrong.
pub(crate) const NO_RACE: &str = "the race never took place";

fn race(policy: Policy) {
    let machine = Machine::bare(policy);
    machine.mmu.create_slot(machine.slot(0, 0, PAGES, 0)).expect("the first slot");
    machine.mmu.create_slot(machine.slot(1, HOMES[0], PAGES, 0)).expect("nothing is there");
    let stop = AtomicBool::new(false);
    let (reads, discards, moves) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for seed in 1..4 {
            let (machine, stop, reads) = (&machine, &stop, &reads);
            scope.spawn(move || {
                let _last = StopOnPanic(stop);
                reads.fetch_add(guest(machine, seed, stop), Ordering::Relaxed);
            });
        }
        for seed in 11..13 {
            let (machine, stop, discards) = (&machine, &stop, &discards);
            scope.spawn(move || {
                let _last = StopOnPanic(stop);
                let mut random = Random(seed);
                while !stop.load(Ordering::Relaxed) {
                    let start = random.below(PAGES);
                    machine.discard(start, (start + 1 + random.below(16)).min(PAGES));
                    discards.fetch_add(1, Ordering::Relaxed);
                    // A memslot update waits for a moment without any invalidation.
                    thread::yield_now();
                }
            });
        }
        scope.spawn(|| {
            let _last = StopOnPanic(&stop);
            while !stop.load(Ordering::Relaxed) {
                let moved = moves.fetch_add(1, Ordering::Relaxed) + 1;
                let home = Gfn::new(HOMES[(moved % 2) as usize]);
                machine.mmu.move_slot(SpaceId(0), SlotId(1), home).expect("its two homes are free");
                thread::yield_now();
            }
        });
        // As long as it takes on a busy machine to have raced often enough.
        let (end, latest) = (Instant::now() + TIME, Instant::now() + 20 * TIME);
        let enough = || {
            let stats = machine.mmu.fault_stats();
            let raced = discards.load(Ordering::Relaxed) > 100 && moves.load(Ordering::Relaxed) > 10;
            raced && stats.fixed > 1000 && stats.retried() > 0
        };
        while !stop.load(Ordering::Relaxed) && Instant::now() < latest && (Instant::now() < end || !enough())
        {
            thread::sleep(Duration::from_millis(10));
        }
        stop.store(true, Ordering::Relaxed);
    });
    machine.assert_balanced();
    let stats = machine.mmu.fault_stats();
    let (reads, discards, moves) = (reads.into_inner(), discards.into_inner(), moves.into_inner());
    let counts = format!("{reads} reads, {discards} discards, {moves} moves, {stats:?}");
    let raced = reads > 1000 && discards > 100 && moves > 10 && stats.fixed > 100 && stats.retried() > 0;
    assert!(raced, "{NO_RACE}: {counts}");
}

/// A thread that fails ends the run, so that the others do not wait for it.
struct StopOnPanic<'s>(&'s AtomicBool);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}
