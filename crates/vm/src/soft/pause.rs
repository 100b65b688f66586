//! Stopping a software guest between two accesses, and what it has written until then.
//!
//! ```text
//! vCPU:   runs ──sees `wanted`, leaves the guest──► parked ──`wanted` is gone──► enters, runs
//! pauser: `wanted` ──waits until all that have not ended are parked──► looks ──resumes
//! ```
//!
//! A vCPU parks only between two accesses of its program: each store that it has raised a fault for has been made then. One that
//! is stopped for good may end in the middle of an access instead: a fault of it may have been served, and its page taken away
//! again, and the store is never made ([`Paused::is_whole`]). A frame is marked as written when a store to
//! it is done, so what is marked at a pause is exactly what was written.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::dirty::DirtyFrames;
use crate::guest::GuestHandle;
use crate::spec::GuestKind;
use crate::{VmError, guest};

/// How often a pauser looks whether a vCPU has ended instead, or waits for what it does meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// What the vCPUs of a software guest share with who pauses them.
#[derive(Debug)]
pub(crate) struct Pause {
    wanted: AtomicU32,
    parked: Mutex<usize>,
    changed: Condvar,
    /// One who pauses at a time.
    one: Mutex<()>,
    /// A bit for each frame.
    written: Box<[AtomicU64]>,
}

impl Pause {
    pub(crate) fn new(frames: u64) -> Self {
        Self {
            wanted: AtomicU32::new(0),
            parked: Mutex::new(0),
            changed: Condvar::new(),
            one: Mutex::new(()),
            written: (0..frames.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Whether somebody waits for this vCPU.
    #[inline]
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) != 0
    }

    /// A vCPU that is outside the guest waits until it may go on.
    pub(super) fn park(&self) {
        let mut parked = lock(&self.parked);
        *parked += 1;
        self.changed.notify_all();
        while self.is_wanted() {
            parked = self.changed.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
        *parked -= 1;
    }

    /// A store to `frame` was made.
    #[inline]
    pub(super) fn note_written(&self, frame: u64) {
        let (word, bit) = (&self.written[(frame / 64) as usize], 1 << (frame % 64));
        if word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A software guest that stands still. It goes on when this is dropped.
#[derive(Debug)]
#[must_use = "the guest goes on when this is dropped"]
pub struct Paused<'g> {
    pause: &'g Pause,
    is_whole: bool,
    _one: MutexGuard<'g, ()>,
}

impl Paused<'_> {
    /// Whether every vCPU stands between two accesses. If not, one has ended, and may have left out a store that it had raised
    /// a fault for.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// The frames that the guest has written since this was called last.
    pub fn take_written(&self) -> DirtyFrames {
        // The lock that vCPUs parked under orders their marks before this.
        DirtyFrames::new(self.pause.written.iter().map(|word| word.swap(0, Ordering::Relaxed)).collect())
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        let _parked = lock(&self.pause.parked);
        self.pause.wanted.store(0, Ordering::Relaxed);
        self.pause.changed.notify_all();
    }
}

impl GuestHandle {
    /// Waits until every vCPU of a software guest stands between two accesses, outside the guest, or has ended.
    ///
    /// Not to be called with an invalidation active, or anything else that a fault could wait for.
    ///
    /// # Errors
    /// [`VmError::NeedsSoft`] for other guests.
    pub fn pause(&self) -> Result<Paused<'_>, VmError> {
        self.pause_while(|| ())
    }

    /// The same, and does `meanwhile` again and again while it waits: what a vCPU in the middle of an access may wait for.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub fn pause_while(&self, mut meanwhile: impl FnMut()) -> Result<Paused<'_>, VmError> {
        let state: &guest::State = self.state();
        if state.kind != GuestKind::Soft {
            return Err(VmError::NeedsSoft { what: "stand still" });
        }
        let pause = &state.pause;
        let one = lock(&pause.one);
        pause.wanted.store(1, Ordering::Relaxed);
        let mut parked = lock(&pause.parked);
        while *parked < state.running().len() {
            drop(parked);
            meanwhile();
            let is_awaited = |parked: &mut usize| *parked < state.running().len();
            let waited = pause.changed.wait_timeout_while(lock(&pause.parked), LOOK_EVERY, is_awaited);
            (parked, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        let is_whole = *parked == self.vcpus();
        drop(parked);
        Ok(Paused { pause, is_whole, _one: one })
    }
}
