//! What a storm's threads run on: Linux, with a scheduler that says when it wants the CPU back.
//!
//! User space cannot see the kernel's wish to reschedule. So a storm with more threads than CPUs has a thread that ticks, and at a
//! tick each thread is asked to give way that has used up a slice of CPU time since it was asked last: as a timer interrupt finds it that
//! finds somebody else runnable. That is more than a kernel asks, where a thread with a CPU to itself goes on, and where a tick that
//! comes while a thread waits for a CPU is not seen by it: here it is, later, which makes the longer a zap waits for a CPU the likelier one
//! that falls into it. Waiting for `mmu_lock` is a spin, as in KVM, and a sleep only after longer than any holder has it that runs. A
//! kernel's holder is not preempted; one here can be, so in such a storm whoever spins lets others run now and then.

use core::cell::{Cell, RefCell};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use std::thread;

use afterimage_mmu::{ParkWord, Platform};
use afterimage_uffd::Linux;
use rustix::time::{ClockId, clock_gettime};

/// How far apart ticks are: a kernel with 250 a second.
const TICK: Duration = Duration::from_millis(4);

/// CPU time after which a tick asks a thread to give way: what it has had when the next one finds it.
const SLICE_NS: u64 = TICK.as_nanos() as u64;

/// Ticks so far.
static TICKS: AtomicU64 = AtomicU64::new(0);

/// Whether there are more threads than CPUs.
static CROWDED: AtomicBool = AtomicBool::new(false);
/// Turns of a spin between two in which others may run, where it is crowded: some tens of microseconds. Each time can be a
/// whole slice of the scheduler's, and the engine bounds some waits by turns.
const TURNS: u32 = 1024;

thread_local! {
    /// Turns that this thread has spun.
    static SPUN: Cell<u32> = const { Cell::new(0) };
    /// The last tick that wanted nothing of this thread.
    static QUIET: Cell<u64> = const { Cell::new(0) };
    /// CPU time of this thread at the start of its slice, in nanoseconds.
    static SLICE_STARTED: Cell<u64> = const { Cell::new(0) };
    /// When this thread gave way, where that is asked for.
    static GAVE_WAY: RefCell<Option<Thinned>> = const { RefCell::new(None) };
}

/// Times that are kept, evenly thinned out as they become many.
#[derive(Debug, Default)]
struct Thinned {
    kept: Vec<u64>,
    seen: u64,
    /// One in `1 << thin` is kept.
    thin: u32,
}

impl Thinned {
    const MOST: usize = 1024;

    fn push(&mut self, time: u64) {
        if self.seen.trailing_zeros() >= self.thin {
            self.kept.push(time);
        }
        self.seen += 1;
        if self.kept.len() == Self::MOST {
            let mut index = 0;
            self.kept.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.thin += 1;
        }
    }
}

/// The platform of a storm.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Threads;

impl Platform for Threads {
    /// Some hundred microseconds.
    const SPINS: u32 = 4096;

    fn wait(word: &ParkWord, expected: u32) {
        Linux::wait(word, expected);
    }

    fn wait_for(word: &ParkWord, expected: u32, ns: u64) {
        Linux::wait_for(word, expected, ns);
    }

    fn wake_all(word: &ParkWord) {
        Linux::wake_all(word);
    }

    fn relax() {
        core::hint::spin_loop();
        if CROWDED.load(Ordering::Relaxed) {
            let spun = SPUN.get().wrapping_add(1);
            SPUN.set(spun);
            if spun.is_multiple_of(TURNS) {
                rustix::thread::sched_yield();
            }
        }
    }

    #[inline]
    fn resched_wanted() -> bool {
        TICKS.load(Ordering::Relaxed) != QUIET.get() && is_slice_over()
    }

    fn reschedule() {
        GAVE_WAY.with_borrow_mut(|times| {
            if let Some(times) = times {
                times.push(Linux::now_ns());
            }
        });
        if Self::resched_wanted() {
            next_slice();
            rustix::thread::sched_yield();
        } else {
            Self::relax();
        }
    }

    fn now_ns() -> u64 {
        Linux::now_ns()
    }
}

/// Says whether there are more threads than CPUs.
pub(crate) fn set_crowded(crowded: bool) {
    CROWDED.store(crowded, Ordering::Relaxed);
}

/// From here on this thread keeps the times at which it gives way.
pub(crate) fn keep_times() {
    GAVE_WAY.set(Some(Thinned::default()));
}

/// The times since the last call, in nanoseconds of the monotonic clock, evenly thinned out where they are many; none
/// unless they are kept.
pub(crate) fn take_times() -> Vec<u64> {
    GAVE_WAY.with_borrow_mut(|times| times.as_mut().map(core::mem::take).unwrap_or_default().kept)
}

/// There was a tick: whether it found this thread's slice used up. Until the thread gives way, it did.
#[cold]
fn is_slice_over() -> bool {
    let tick = TICKS.load(Ordering::Relaxed);
    let is_over = cpu_ns() - SLICE_STARTED.get() >= SLICE_NS;
    if !is_over {
        QUIET.set(tick);
    }
    is_over
}

/// This thread gives way: another slice, of as many as its CPU time comes to.
fn next_slice() {
    QUIET.set(TICKS.load(Ordering::Relaxed));
    let used = cpu_ns() - SLICE_STARTED.get();
    SLICE_STARTED.set(SLICE_STARTED.get() + used / SLICE_NS * SLICE_NS);
}

/// This thread's first slice starts now.
pub(crate) fn start_of_slice() {
    QUIET.set(TICKS.load(Ordering::Relaxed));
    SLICE_STARTED.set(cpu_ns());
}

/// Gives way if that is wanted: where a kernel's thread holds no lock, it does so at once.
pub(crate) fn give_way_if_wanted() {
    if Threads::resched_wanted() {
        Threads::reschedule();
    }
}

/// Ticks until `over`.
pub(crate) fn tick(over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        thread::sleep(TICK);
        TICKS.fetch_add(1, Ordering::Relaxed);
    }
}

/// CPU time of this thread, in nanoseconds.
pub(crate) fn cpu_ns() -> u64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_asked_to_give_way_once_a_slice_and_at_a_tick() {
        let tick = || TICKS.fetch_add(1, Ordering::Relaxed);
        start_of_slice();
        tick();
        assert!(!Threads::resched_wanted(), "it has just begun");
        while cpu_ns() - SLICE_STARTED.get() < SLICE_NS {}
        assert!(!Threads::resched_wanted(), "no tick has found it so");
        tick();
        assert!(Threads::resched_wanted() && Threads::resched_wanted(), "until it gives way");
        give_way_if_wanted();
        tick();
        assert!(!Threads::resched_wanted(), "it has another slice");
    }

    #[test]
    fn many_times_are_thinned_out_evenly() {
        let mut times = Thinned::default();
        (0..100_000).for_each(|time| times.push(time));
        let apart = times.kept[1];
        assert!(times.kept.len() >= Thinned::MOST / 2 && apart.is_power_of_two());
        assert!(times.kept.iter().enumerate().all(|(index, time)| *time == index as u64 * apart));
    }
}
