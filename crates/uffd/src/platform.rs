//! The engine's services on Linux: futexes, `membarrier`, `sched_yield`, the monotonic clock.

use std::sync::OnceLock;

use afterimage_mmu::{HeavyBarrier, ParkWord, Platform};
use rustix::io::Errno;
use rustix::thread::{MembarrierCommand, futex, membarrier, sched_yield};
use rustix::time::{ClockId, Timespec, clock_gettime};

/// Threads of a Linux process.
///
/// User space cannot see that the scheduler wants a CPU back, so [`Platform::resched_wanted`] is never true here:
/// the kernel takes the CPU by itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Linux;

impl Platform for Linux {
    /// Some 20 µs: several times what holds the engine's lock, which is one ioctl, and less than a wake-up costs. An
    /// invalidation that sleeps on its way to the lock also lets faults through that it is about to make retry.
    const SPINS: u32 = 512;

    const HEAVY_BARRIER: Option<HeavyBarrier> = Some(MEMBARRIER);

    fn wait(word: &ParkWord, expected: u32) {
        // Every error means "look again": the word has changed, or a signal came.
        let _ = futex::wait(word, futex::Flags::PRIVATE, expected, None);
    }

    fn wait_for(word: &ParkWord, expected: u32, ns: u64) {
        let time = Timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 };
        // As above; and that the time is over.
        let _ = futex::wait(word, futex::Flags::PRIVATE, expected, Some(&time));
    }

    fn wake_all(word: &ParkWord) {
        // The only error is a bad address, and a reference has a good one.
        let _ = futex::wake(word, futex::Flags::PRIVATE, i32::MAX as u32);
    }

    fn relax() {
        core::hint::spin_loop();
    }

    fn reschedule() {
        sched_yield();
    }

    fn now_ns() -> u64 {
        let now = clock_gettime(ClockId::Monotonic);
        now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
    }
}

/// `MEMBARRIER_CMD_PRIVATE_EXPEDITED` (Linux 4.14; a sandbox may forbid it).
// UNSAFETY: the engine frees what it protects.
#[expect(unsafe_code)]
// SAFETY: the kernel promises a full barrier on every CPU that runs a thread of this process, and one at each switch to one,
// before the call returns; a call that fails is made again, or panics.
const MEMBARRIER: HeavyBarrier = unsafe { HeavyBarrier::new(may_use_membarrier, membarrier_everywhere) };

fn may_use_membarrier() -> bool {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    *REGISTERED.get_or_init(|| membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok())
}

/// # Panics
/// If the system call, which could be registered, is forbidden since: without it nothing here is safe.
fn membarrier_everywhere() {
    while let Err(error) = membarrier(MembarrierCommand::PrivateExpedited) {
        assert_eq!(error, Errno::NOMEM, "membarrier was registered, and fails");
        sched_yield();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering, compiler_fence};
    use std::thread;

    use super::*;

    #[test]
    fn a_parked_thread_is_woken_and_a_changed_word_does_not_park() {
        let word = AtomicU32::new(0);
        Linux::wait(&word, 1);
        thread::scope(|scope| {
            scope.spawn(|| {
                while word.load(Ordering::Acquire) == 0 {
                    Linux::wait(&word, 0);
                }
            });
            word.store(1, Ordering::Release);
            Linux::wake_all(&word);
        });
    }

    #[test]
    fn a_thread_that_parks_for_a_while_needs_nobody_to_wake_it() {
        let word = AtomicU32::new(0);
        Linux::wait_for(&word, 0, 1_000);
        Linux::wait_for(&word, 1, u64::MAX);
    }

    /// Two threads that each store and then look: with the barrier on one side alone, one of them sees the other.
    #[test]
    fn a_heavy_barrier_spares_the_other_side_its_fence() {
        if !MEMBARRIER.is_ready() {
            eprintln!(
                "SKIP: membarrier(2) is not to be had: a_heavy_barrier_spares_the_other_side_its_fence"
            );
            return;
        }
        let [light, heavy, turn] = [const { AtomicU32::new(0) }; 3];
        let [seen_light, seen_heavy] = [const { AtomicU32::new(0) }; 2];
        const ROUNDS: u32 = 2_000;
        let meet = |round: u32| {
            turn.fetch_add(1, Ordering::AcqRel);
            let mut looks = 0_u32;
            while turn.load(Ordering::Acquire) < 2 * round {
                looks += 1;
                // The other thread may need this core.
                if looks.is_multiple_of(256) { thread::yield_now() } else { std::hint::spin_loop() }
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=ROUNDS {
                    meet(2 * round - 1);
                    light.store(round, Ordering::Release);
                    compiler_fence(Ordering::SeqCst);
                    seen_heavy.store(heavy.load(Ordering::Relaxed), Ordering::Relaxed);
                    meet(2 * round);
                }
            });
            for round in 1..=ROUNDS {
                meet(2 * round - 1);
                heavy.store(round, Ordering::Release);
                MEMBARRIER.everywhere();
                seen_light.store(light.load(Ordering::Relaxed), Ordering::Relaxed);
                meet(2 * round);
                let seen = [&seen_light, &seen_heavy].map(|word| word.load(Ordering::Relaxed));
                assert!(seen.contains(&round), "round {round}: neither saw the other: {seen:?}");
            }
        });
    }

    #[test]
    fn time_moves_forward() {
        let start = Linux::now_ns();
        assert!(start > 0);
        assert!(Linux::now_ns() >= start);
    }
}
