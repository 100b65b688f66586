//! The word by which threads are ended, also while they sleep.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Said once, heard by all.
#[derive(Debug, Default)]
pub(super) struct Stop {
    is_asked: Mutex<bool>,
    asked: Condvar,
}

impl Stop {
    /// Asks everybody to stop, and wakes who sleeps.
    pub(super) fn ask(&self) {
        *self.lock() = true;
        self.asked.notify_all();
    }

    pub(super) fn is_asked(&self) -> bool {
        *self.lock()
    }

    /// Sleeps for `time`, or until it is asked to stop.
    pub(super) fn sleep(&self, time: Duration) {
        // Where it was asked before, this returns at once.
        drop(self.asked.wait_timeout_while(self.lock(), time, |is_asked| !*is_asked));
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.is_asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
