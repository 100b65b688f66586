//! The platform of the tests: threads of `std`, parked on condition variables.

use core::cell::{Cell, RefCell};
use core::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use afterimage_mmu::{ParkWord, Platform};

use super::gate::Parks;

/// Parks on one of a few condition variables, chosen by the word's address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Threads;

const BUCKETS: usize = 64;
static BUCKET: [(Mutex<()>, Condvar); BUCKETS] = [const { (Mutex::new(()), Condvar::new()) }; BUCKETS];

fn bucket(word: &ParkWord) -> &'static (Mutex<()>, Condvar) {
    &BUCKET[(core::ptr::from_ref(word).addr() / align_of::<ParkWord>()) % BUCKETS]
}

thread_local! {
    static RESCHED: Cell<bool> = const { Cell::new(false) };
    static RESCHEDULE: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
    static RELAX: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
    static CLOCK_NS: Cell<u64> = const { Cell::new(0) };
    static PARKS: RefCell<Option<Arc<Parks>>> = const { RefCell::new(None) };
}

/// From here on the scheduler wants this thread's CPU, always; `meanwhile` runs each time that it is given away.
pub(crate) fn want_resched(meanwhile: impl FnMut() + 'static) {
    RESCHED.set(true);
    RESCHEDULE.set(Some(Box::new(meanwhile)));
}

/// The scheduler wants this thread's CPU no longer.
pub(crate) fn forget_resched() {
    RESCHED.set(false);
    RESCHEDULE.set(None);
}

/// Runs `meanwhile` the next time that this thread spins.
pub(crate) fn when_spinning(meanwhile: impl FnOnce() + 'static) {
    RELAX.set(Some(Box::new(meanwhile)));
}

/// Forgets what was to run when this thread spins; whether it still was.
pub(crate) fn never_spun() -> bool {
    RELAX.take().is_some()
}

/// So much time passes for this thread.
pub(crate) fn let_pass(time: Duration) {
    CLOCK_NS.set(CLOCK_NS.get() + time.as_nanos() as u64);
}

/// `parks` counts from here on how often this thread parks.
pub(crate) fn tell_when_parked(parks: &Arc<Parks>) {
    PARKS.set(Some(Arc::clone(parks)));
}

impl Platform for Threads {
    const SPINS: u32 = 16;

    fn wait(word: &ParkWord, expected: u32) {
        let (lock, woken) = bucket(word);
        let held = lock.lock().expect("nothing panics with a bucket held");
        if word.load(Ordering::Relaxed) == expected {
            // Whoever wakes needs the bucket, so it may be told already.
            PARKS.with_borrow(|parks| parks.iter().for_each(|parks| parks.one_more()));
            drop(woken.wait(held).expect("nothing panics with a bucket held"));
        }
    }

    fn wait_for(word: &ParkWord, expected: u32, ns: u64) {
        if PARKS.with_borrow(Option::is_some) {
            // Who tells that it parks does so until it is woken.
            Self::wait(word, expected);
        } else {
            let_pass(Duration::from_nanos(ns));
        }
    }

    fn wake_all(word: &ParkWord) {
        let (lock, woken) = bucket(word);
        drop(lock.lock().expect("nothing panics with a bucket held"));
        woken.notify_all();
    }

    fn relax() {
        match RELAX.take() {
            Some(meanwhile) => meanwhile(),
            None => std::thread::yield_now(),
        }
    }

    fn resched_wanted() -> bool {
        RESCHED.get()
    }

    fn reschedule() {
        let meanwhile = RESCHEDULE.take();
        if let Some(mut meanwhile) = meanwhile {
            meanwhile();
            RESCHEDULE.set(Some(meanwhile));
        } else {
            std::thread::yield_now();
        }
    }

    fn now_ns() -> u64 {
        // A look takes a nanosecond, whatever the machine: no test depends on how fast it is.
        let_pass(Duration::from_nanos(1));
        CLOCK_NS.get()
    }
}
