//! A platform that spins, whose scheduler wants the CPU back when a test says so, and that tells who waits.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Scope, ScopedJoinHandle};

use afterimage_mmu::{ParkWord, Platform, Spin};

thread_local! {
    /// What runs each time that this thread gives its CPU away; there: the scheduler wants it.
    static MEANWHILE: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
    /// Is set when this thread waits.
    static WAITS: RefCell<Option<Arc<AtomicBool>>> = const { RefCell::new(None) };
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Scheduled;

/// Runs `run` on a CPU that the scheduler always wants back; `meanwhile` is what others do then.
pub(crate) fn rescheduled<R>(meanwhile: impl FnMut() + 'static, run: impl FnOnce() -> R) -> R {
    MEANWHILE.set(Some(Box::new(meanwhile)));
    let result = run();
    MEANWHILE.set(None);
    result
}

/// Runs `run` on a thread, and returns when that waits for somebody or is finished, however busy the machine is.
pub(crate) fn until_it_waits<'scope, R: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    run: impl FnOnce() -> R + Send + 'scope,
) -> ScopedJoinHandle<'scope, R> {
    let waits = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&waits);
    let thread = scope.spawn(move || {
        WAITS.set(Some(told));
        run()
    });
    while !waits.load(Ordering::Acquire) && !thread.is_finished() {
        std::thread::yield_now();
    }
    thread
}

impl Platform for Scheduled {
    const SPINS: u32 = Spin::SPINS;
    const PARKS: bool = Spin::PARKS;

    fn wait(word: &ParkWord, expected: u32) {
        WAITS.with_borrow(|waits| waits.iter().for_each(|waits| waits.store(true, Ordering::Release)));
        Spin::wait(word, expected);
    }

    fn wake_all(word: &ParkWord) {
        Spin::wake_all(word);
    }

    fn relax() {
        Spin::relax();
    }

    fn resched_wanted() -> bool {
        MEANWHILE.with_borrow(Option::is_some)
    }

    fn reschedule() {
        if let Some(mut meanwhile) = MEANWHILE.take() {
            meanwhile();
            MEANWHILE.set(Some(meanwhile));
        }
    }

    fn now_ns() -> u64 {
        Spin::now_ns()
    }
}
