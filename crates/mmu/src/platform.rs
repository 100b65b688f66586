//! What the engine needs from whatever it runs on: park, wake, tell the time, give the CPU away.
//!
//! A platform has no state that the engine could hold: its functions are static, so that a lock stays three
//! words and works in `no_std`. [`Spin`] needs nothing and is right for bare metal; a Linux host parks on
//! futexes (in `afterimage-uffd`).

use crate::sync::ParkWord;

/// The services of the machine below. All functions may be called from any thread.
pub trait Platform: Send + Sync + 'static {
    /// How often a waiter looks at its word before it parks. Small where other CPUs may be asleep or absent.
    const SPINS: u32;

    /// Whether [`wait`](Self::wait) sleeps until it is woken. Where it does not, nobody need be woken.
    const PARKS: bool = true;

    /// A barrier for all CPUs at once, if there is one: it spares faults a fence each.
    const HEAVY_BARRIER: Option<HeavyBarrier> = None;

    /// Sleeps while `word` holds `expected`, until woken. May return early, for no reason. Must not sleep if the
    /// word differed from `expected` at any time after a waker changed it (futex semantics: the comparison and
    /// going to sleep are one step for wakers).
    fn wait(word: &ParkWord, expected: u32);

    /// The same, for `ns` nanoseconds at most. A platform that cannot tell when those are over gives the CPU away, and returns.
    fn wait_for(_word: &ParkWord, _expected: u32, _ns: u64) {
        Self::reschedule();
    }

    /// Wakes every thread that sleeps on `word`.
    fn wake_all(word: &ParkWord);

    /// One turn of a short spin.
    fn relax();

    /// Whether the scheduler wants this CPU back (KVM: `need_resched`).
    fn resched_wanted() -> bool {
        false
    }

    /// Gives the CPU to whoever wants it (KVM: `cond_resched`).
    fn reschedule() {
        Self::relax();
    }

    /// Monotonic time in nanoseconds; 0 for ever where there is no clock, and then no durations are counted.
    fn now_ns() -> u64;
}

/// A full memory barrier on every CPU that runs a thread of the virtual machine (Linux: `membarrier(2)`; bare metal: an IPI).
#[derive(Clone, Copy, Debug)]
pub struct HeavyBarrier {
    ready: fn() -> bool,
    everywhere: fn(),
}

// UNSAFETY: what vCPUs walk through is freed behind this barrier, and they have no fence of their own.
#[expect(unsafe_code)]
impl HeavyBarrier {
    /// `ready` makes it ready, may be called often, and says `false` where it cannot be had; `everywhere` executes it.
    ///
    /// # Safety
    ///
    /// Once `ready` has said `true`, every CPU that runs a thread of the virtual machine, the caller's included, executes a full
    /// memory barrier between the call of `everywhere` and its return; a thread that runs on none has executed one, or will before
    /// it goes on.
    pub const unsafe fn new(ready: fn() -> bool, everywhere: fn()) -> Self {
        Self { ready, everywhere }
    }
}

impl HeavyBarrier {
    /// Whether it can be had.
    pub fn is_ready(self) -> bool {
        (self.ready)()
    }

    /// Executes it. Only where [`is_ready`](Self::is_ready) has said so.
    pub fn everywhere(self) {
        (self.everywhere)();
    }
}

/// A platform that can only spin and has no clock: `no_std` without an operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spin;

#[cfg(not(loom))]
impl Platform for Spin {
    const SPINS: u32 = 64;
    const PARKS: bool = false;

    fn wait(_word: &ParkWord, _expected: u32) {
        core::hint::spin_loop();
    }

    fn wake_all(_word: &ParkWord) {}

    fn relax() {
        core::hint::spin_loop();
    }

    fn now_ns() -> u64 {
        0
    }
}

/// The platform of the loom tests: parks on one condition variable that all words share.
#[cfg(all(loom, test))]
pub(crate) mod model {
    use super::{ParkWord, Platform};
    use crate::sync::Ordering;

    loom::lazy_static! {
        static ref PARKED: (loom::sync::Mutex<()>, loom::sync::Condvar) =
            (loom::sync::Mutex::new(()), loom::sync::Condvar::new());
    }

    #[derive(Clone, Copy, Debug, Default)]
    pub(crate) struct Loom;

    impl Platform for Loom {
        const SPINS: u32 = 0;

        fn wait(word: &ParkWord, expected: u32) {
            let held = PARKED.0.lock().expect("no loom thread panics while it holds the park mutex");
            if word.load(Ordering::Relaxed) == expected {
                drop(PARKED.1.wait(held).expect("no loom thread panics while it holds the park mutex"));
            }
        }

        fn wake_all(_word: &ParkWord) {
            drop(PARKED.0.lock().expect("no loom thread panics while it holds the park mutex"));
            PARKED.1.notify_all();
        }

        fn relax() {
            loom::thread::yield_now();
        }

        fn now_ns() -> u64 {
            0
        }
    }

    /// The same, with waiters that only look again: nobody is woken, and no fence is there for it.
    #[derive(Clone, Copy, Debug, Default)]
    pub(crate) struct LoomSpin;

    impl Platform for LoomSpin {
        const SPINS: u32 = 0;
        const PARKS: bool = false;

        fn wait(_word: &ParkWord, _expected: u32) {
            loom::thread::yield_now();
        }

        fn wake_all(_word: &ParkWord) {}

        fn relax() {
            loom::thread::yield_now();
        }

        fn now_ns() -> u64 {
            0
        }
    }
}
