//! A place where a thread can be made to stand still.

use std::sync::{Condvar, Mutex};

use super::PATIENCE;

/// Lets everybody through, but for the first one on the frame that it is closed for.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    ClosedFor(u64),
    Occupied,
}

impl Gate {
    pub(crate) fn close_for(&self, frame: u64) {
        *self.state.lock().expect("the gate") = State::ClosedFor(frame);
    }

    pub(crate) fn pass(&self, frame: u64) {
        let mut state = self.state.lock().expect("the gate");
        if *state == State::ClosedFor(frame) {
            *state = State::Occupied;
            self.changed.notify_all();
            drop(self.changed.wait_while(state, |state| *state == State::Occupied).expect("the gate"));
        }
    }

    /// Waits until someone stands in the gate.
    #[track_caller]
    pub(crate) fn wait_for_someone(&self) {
        let state = self.state.lock().expect("the gate");
        let (state, waited) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| *state != State::Occupied)
            .expect("the gate");
        assert!(!waited.timed_out(), "someone should have come to the gate: {state:?}");
    }

    pub(crate) fn open(&self) {
        *self.state.lock().expect("the gate") = State::Open;
        self.changed.notify_all();
    }
}
