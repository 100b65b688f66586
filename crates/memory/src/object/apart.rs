//! Keeps checkpoints and discards of the same pages apart.
//!
//! A checkpoint shows all of its pages as they are at one time. The guest's writes wait for it by write protection, and
//! evictions change no bytes. A discard is the guest's doing too, and comes from the side: it has to wait here.
//!
//! Taken before the invalidation, and waited for with nothing held.

use std::sync::{Condvar, Mutex, PoisonError};

use afterimage_mmu::PfnRange;

/// Who works on pages. Two of the same kind get along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Checkpoint,
    Discard,
}

/// The pages that are being worked on.
#[derive(Debug, Default)]
pub(super) struct Apart {
    active: Mutex<Vec<(Work, PfnRange)>>,
    ended: Condvar,
}

/// Work on pages that the other kind stays away from.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    apart: &'a Apart,
    mine: (Work, PfnRange),
}

impl Apart {
    /// Waits until nobody does the other kind of work on a page of `frames`.
    pub(super) fn claim(&self, work: Work, frames: PfnRange) -> Claim<'_> {
        let conflicts = |(other, theirs): &(Work, PfnRange)| *other != work && theirs.overlaps(frames);
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        while active.iter().any(conflicts) {
            active = self.ended.wait(active).unwrap_or_else(PoisonError::into_inner);
        }
        active.push((work, frames));
        Claim { apart: self, mine: (work, frames) }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut active = self.apart.active.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = active.iter().position(|claim| *claim == self.mine) {
            active.swap_remove(index);
        }
        drop(active);
        self.apart.ended.notify_all();
    }
}
