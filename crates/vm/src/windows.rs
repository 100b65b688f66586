//! Invalidation windows, as published to the guest.
//!
//! The guest files each access by whether a window that covers its page was open at any moment of it. A window is
//! published by its bounds, then by its slot's `begins`; its end by the slot's `ends`. The guest loads `ends`
//! before and `begins` after the access, so of two windows in one slot it never mistakes one for the other, as long
//! as no more than [`WINDOW_RING`] pass during one access; older ones count as not covering.
//!
//! | host | guest |
//! |---|---|
//! | `bounds` (relaxed), then `begins` (release), then a full fence | `begins`, then `bounds` (loads are in order) |
//! | everything that the invalidation does, then `ends` (release) | `ends` before the access |
//!
//! The fence puts `begins` before whatever the host does next, so an access that the invalidation held up sees it.

use core::sync::atomic::Ordering::{AcqRel, Relaxed, Release, SeqCst};
use core::sync::atomic::{AtomicU32, fence};
use std::sync::Arc;

use afterimage_mmu::GfnRange;

use crate::layout::{WINDOW_RING, WINDOW_SLOTS};
use crate::system::SystemMemory;

/// The place to publish invalidation windows of one guest. Clones publish to the same guest.
#[derive(Clone, Debug)]
pub struct Windows {
    shared: Arc<WindowSlots>,
}

#[derive(Debug)]
struct WindowSlots {
    system: Arc<SystemMemory>,
    /// A bit per slot that some open window has.
    taken: AtomicU32,
}

/// An open invalidation window; it ends when this is dropped.
#[derive(Debug)]
#[must_use = "the window ends when this is dropped"]
pub struct Window {
    shared: Arc<WindowSlots>,
    slot: Option<usize>,
}

impl Windows {
    pub(crate) fn new(system: Arc<SystemMemory>) -> Self {
        Self { shared: Arc::new(WindowSlots { system, taken: AtomicU32::new(0) }) }
    }

    /// Opens a window over `range`. To be called before the invalidation begins; any thread may, and eight windows
    /// can be open at once. A ninth is not published ([`Window::is_published`]).
    pub fn open(&self, range: GfnRange) -> Window {
        let slot = self.shared.take();
        if let Some(slot) = slot {
            let table = self.shared.system.windows();
            // Only the owner of the slot writes it.
            let number = table.begins[slot].load(Relaxed) + 1;
            let bounds = &table.bounds[slot][number as usize % WINDOW_RING];
            bounds.start.store(range.start.as_u64(), Relaxed);
            bounds.end.store(range.end.as_u64(), Relaxed);
            table.begins[slot].store(number, Release);
            fence(SeqCst);
        }
        Window { shared: Arc::clone(&self.shared), slot }
    }
}

impl WindowSlots {
    fn take(&self) -> Option<usize> {
        let all = (1 << WINDOW_SLOTS) - 1;
        // AcqRel pairs with the release in `Window::drop`: the next owner sees the counters of the last.
        let taken = self.taken.fetch_update(AcqRel, Relaxed, |taken| {
            (taken != all).then(|| taken | (1 << taken.trailing_ones()))
        });
        taken.ok().map(|taken| taken.trailing_ones() as usize)
    }
}

impl Window {
    /// Whether the guest can see the window.
    pub fn is_published(&self) -> bool {
        self.slot.is_some()
    }

    /// Ends the window, as dropping it does.
    pub fn end(self) {}
}

impl Drop for Window {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            let ends = &self.shared.system.windows().ends[slot];
            ends.store(ends.load(Relaxed) + 1, Release);
            self.shared.taken.fetch_and(!(1 << slot), Release);
        }
    }
}
