//! The engine's services on Linux: futexes, `sched_yield`, the monotonic clock.

use afterimage_mmu::{ParkWord, Platform};
use rustix::thread::futex;
use rustix::time::{ClockId, clock_gettime};

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

    fn wait(word: &ParkWord, expected: u32) {
        // Every error means "look again": the word has changed, or a signal came.
        let _ = futex::wait(word, futex::Flags::PRIVATE, expected, None);
    }

    fn wake_all(word: &ParkWord) {
        // The only error is a bad address, and a reference has a good one.
        let _ = futex::wake(word, futex::Flags::PRIVATE, i32::MAX as u32);
    }

    fn relax() {
        core::hint::spin_loop();
    }

    fn reschedule() {
        rustix::thread::sched_yield();
    }

    fn now_ns() -> u64 {
        let now = clock_gettime(ClockId::Monotonic);
        now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
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
    fn time_moves_forward() {
        let start = Linux::now_ns();
        assert!(start > 0);
        assert!(Linux::now_ns() >= start);
    }
}
