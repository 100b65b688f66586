//! A gate: holds a thread at a point until the test opens it.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// How long a thread may stay away before the test is a failure. Long: only a bug ever waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    #[default]
    Shut,
    Arrived,
    Open,
}

/// One thread arrives and stays; another waits for it and opens.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// Announces this thread and stays until the gate is opened. Does not stay at one that is open.
    pub(crate) fn pass(&self) {
        self.arrive();
        self.until(State::Open);
    }

    /// Announces this thread and goes on.
    pub(crate) fn arrive(&self) {
        let mut state = self.state.lock().expect("no thread panics in a gate");
        *state = (*state).max(State::Arrived);
        self.changed.notify_all();
    }

    /// Waits for the thread to arrive.
    pub(crate) fn until_arrived(&self) {
        self.until(State::Arrived);
    }

    /// Lets the thread go.
    pub(crate) fn open(&self) {
        *self.state.lock().expect("no thread panics in a gate") = State::Open;
        self.changed.notify_all();
    }

    fn until(&self, wanted: State) {
        let state = self.state.lock().expect("no thread panics in a gate");
        let (state, timeout) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| *state < wanted)
            .expect("no thread panics in a gate");
        drop(state);
        assert!(!timeout.timed_out(), "the other thread never came to {wanted:?}");
    }
}

/// Opens a gate in the end, however it comes.
#[derive(Debug)]
pub(crate) struct Opened<'g>(pub(crate) &'g Gate);

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// How often a thread has parked, for another one to wait for.
#[derive(Debug, Default)]
pub(crate) struct Parks {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Parks {
    /// The thread goes to sleep, or is finished: nobody needs to wait for it to sleep any more.
    pub(crate) fn one_more(&self) {
        *self.count.lock().expect("no thread panics in here") += 1;
        self.changed.notify_all();
    }

    /// Waits until the thread has parked this often, or is finished.
    pub(crate) fn until(&self, wanted: u64) {
        let count = self.count.lock().expect("no thread panics in here");
        let (count, timeout) = self
            .changed
            .wait_timeout_while(count, PATIENCE, |count| *count < wanted)
            .expect("no thread panics in here");
        drop(count);
        assert!(!timeout.timed_out(), "the other thread never parked");
    }
}

/// Tells those who wait for a thread to park that it is finished, or panics, too.
#[derive(Debug)]
pub(crate) struct Finished<'p>(pub(crate) &'p Parks);

impl Drop for Finished<'_> {
    fn drop(&mut self) {
        self.0.one_more();
    }
}
