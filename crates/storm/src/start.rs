//! The start of a run: its threads are made one by one, wait until all are there, and set off together; or not at all, where
//! one of them cannot be had.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, Scope, ScopedJoinHandle};

use rustix::io::Errno;

use crate::storm::StormError;

/// Makes a thread that ends within `scope`.
///
/// # Errors
/// The system has none to give.
pub(crate) fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    body: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, StormError> {
    let made = Builder::new().spawn_scoped(scope, body);
    made.map_err(|error| StormError::Spawn(Errno::from_io_error(&error).unwrap_or(Errno::AGAIN)))
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// So many threads wait.
    Ready(usize),
    /// They are off.
    Off,
    /// They are to end at once.
    CalledOff,
}

/// The line that threads wait at.
#[derive(Debug)]
pub(crate) struct Start {
    state: Mutex<State>,
    changed: Condvar,
}

/// One who gets ready, and calls it off if that fails.
#[derive(Debug)]
pub(crate) struct Runner<'s>(&'s Start);

impl Start {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::new(State::Ready(0)), changed: Condvar::new() }
    }

    /// Gets ready, as one of those who run.
    pub(crate) fn runner(&self) -> Runner<'_> {
        Runner(self)
    }

    /// Lets all go once `threads` wait. `false`: one of them will not come.
    pub(crate) fn go(&self, threads: usize) -> bool {
        let is_early = |state: &mut State| matches!(*state, State::Ready(ready) if ready != threads);
        let waiting = self.changed.wait_while(self.lock(), is_early);
        let mut state = waiting.unwrap_or_else(PoisonError::into_inner);
        if *state != State::CalledOff {
            *state = State::Off;
        }
        self.changed.notify_all();
        *state == State::Off
    }

    /// Ends all who wait, and who come yet.
    pub(crate) fn call_off(&self) {
        *self.lock() = State::CalledOff;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Runner<'_> {
    /// Waits for the start. `false`: there is none.
    #[must_use]
    pub(crate) fn wait(self) -> bool {
        let start = self.0;
        core::mem::forget(self);
        let mut state = start.lock();
        if let State::Ready(ready) = &mut *state {
            *ready += 1;
        }
        start.changed.notify_all();
        let is_waiting = |state: &mut State| matches!(state, State::Ready(_));
        let state = start.changed.wait_while(state, is_waiting).unwrap_or_else(PoisonError::into_inner);
        *state == State::Off
    }
}

impl Drop for Runner<'_> {
    fn drop(&mut self) {
        self.0.call_off();
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn all_are_there_before_one_sets_off() {
        let (start, there) = (Start::new(), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    there.fetch_add(1, Ordering::Relaxed);
                    assert!(start.runner().wait());
                    assert_eq!(there.load(Ordering::Relaxed), 4);
                });
            }
            assert!(start.go(4));
        });
    }

    #[test]
    fn who_waits_is_sent_home_and_so_is_who_comes_late() {
        let start = Start::new();
        thread::scope(|scope| {
            let early = scope.spawn(|| start.runner().wait());
            start.call_off();
            assert!(!start.runner().wait());
            assert!(!early.join().expect("it only waits"));
        });
    }

    #[test]
    fn who_panics_before_the_start_is_not_waited_for() {
        let start = Start::new();
        thread::scope(|scope| {
            let waits = scope.spawn(|| start.runner().wait());
            let fails = scope.spawn(|| {
                let _runner = start.runner();
                panic!("it cannot get ready");
            });
            assert!(!start.go(2));
            assert!(fails.join().is_err());
            assert!(!waits.join().expect("it only waits"));
        });
    }
}
