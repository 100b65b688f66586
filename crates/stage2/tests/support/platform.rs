//! A platform that spins, and whose scheduler wants the CPU back when a test says so.

use std::cell::RefCell;

use afterimage_mmu::{ParkWord, Platform, Spin};

thread_local! {
    /// What runs each time that this thread gives its CPU away; there: the scheduler wants it.
    static MEANWHILE: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
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

impl Platform for Scheduled {
    const SPINS: u32 = Spin::SPINS;
    const PARKS: bool = Spin::PARKS;

    fn wait(word: &ParkWord, expected: u32) {
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
