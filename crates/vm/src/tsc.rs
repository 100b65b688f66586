//! How fast the time stamp counter runs.

#![expect(unsafe_code)]
// UNSAFETY: reads the counter.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The counter, now.
pub(crate) fn now() -> u64 {
    // SAFETY: every x86-64 has `rdtsc`, and Linux leaves it open to user space unless a process asks otherwise.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Cycles per millisecond, measured against the monotonic clock, once per process.
///
/// Assumes a counter of constant rate, as all x86-64 of the last fifteen years have.
pub(crate) fn khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| {
        let (clock, counter) = (Instant::now(), now());
        let mut elapsed = Duration::ZERO;
        while elapsed < Duration::from_millis(10) {
            elapsed = clock.elapsed();
        }
        let cycles = u128::from(now() - counter);
        (cycles * 1_000_000 / elapsed.as_nanos()) as u64
    })
}

/// The time that `cycles` take at `khz` cycles per millisecond.
pub(crate) fn duration(cycles: u64, khz: u64) -> Duration {
    Duration::from_nanos((u128::from(cycles) * 1_000_000 / u128::from(khz.max(1))) as u64)
}
