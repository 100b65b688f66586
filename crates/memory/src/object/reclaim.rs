//! The resident budget, and the clock that decides who goes.
//!
//! # Second chance
//!
//! The hardware's mark of an access is not to be had through userfaultfd. So the clock hand takes a resident page's mark
//! away, and its translation with it ("zap the mapping, keep the page"): if the guest comes back, the fault finds the page
//! resident, costs no copy, and marks it again. When the hand comes round and finds no mark, the page goes. In anonymous
//! memory a page cannot lose its translation and stay; there the hand is first in, first out.
//!
//! # Who makes room
//!
//! [`MemoryObject::reclaim`] evicts one batch; a thread of the owner's calls it while [`MemoryObject::is_over_budget`]. A fault that
//! finds the budget and one batch more used up calls it itself, so the bound holds without that thread too. Only where no
//! page can go, since the store is full or an eviction fails, the fault takes its page beyond the bound: the guest goes on, and
//! nothing is lost.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use afterimage_mmu::{Age, FaultKind, Pfn, PfnRange, Young};

use super::pages::Clock;
use super::{MemoryObject, Moved, ObjectOptions};
use crate::error::MemoryError;
use crate::object::moves::Victims;

/// Faults try no eviction for so long after one has failed: it is an invalidation that disturbs the guest in vain, and that may
/// have the very fault retried that tries it.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Evictions that fail in one search for pages that can go, at most, before it is given up.
const MOST_FAILURES: u32 = 8;

#[derive(Debug)]
pub(crate) struct Budget {
    /// Pages that may be resident.
    pages: u64,
    batch: u64,
    /// Where the clock hand is, a page's index.
    hand: Mutex<usize>,
    /// When an eviction for a fault has failed last.
    failed: Mutex<Option<Instant>>,
}

impl Budget {
    pub(super) fn new(options: &ObjectOptions) -> Self {
        let pages = options.resident_bytes.unwrap_or(options.bytes) / options.page_size.bytes();
        Self { pages, batch: options.batch_pages.min(pages), hand: Mutex::new(0), failed: Mutex::new(None) }
    }

    fn failed(&self) -> MutexGuard<'_, Option<Instant>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_failure(&self) {
        *self.failed() = Some(Instant::now());
    }

    fn is_stuck(&self) -> bool {
        self.failed().is_some_and(|failed| failed.elapsed() < BACK_OFF)
    }
}

/// One page's place in the budget; given back unless kept.
#[derive(Debug)]
pub(super) struct Reserved<'o> {
    object: &'o MemoryObject,
}

impl Reserved<'_> {
    /// The page exists: its place is given back when it is freed.
    pub(super) fn keep(self) {
        core::mem::forget(self);
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.object.unreserve(1);
    }
}

/// What came of a fault's wish for room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// Some pages have gone.
    Made,
    /// None has, and one may in a moment.
    Later,
    /// No page can go for a while.
    None,
}

impl MemoryObject {
    /// Whether pages should go: the budget is used up but for half a batch. Never, where all memory may be resident.
    pub fn is_over_budget(&self) -> bool {
        self.budget.pages < self.pages.len() as u64
            && self.resident.load(Relaxed) + self.budget.batch.div_ceil(2) > self.budget.pages
    }

    /// Takes a place in the budget, making room if there is none, or beyond the budget where no page can go. The caller holds no
    /// page. `None`: nobody waits for the page, and there is no place to spare.
    pub(super) fn reserve(&self, kind: FaultKind) -> Option<Reserved<'_>> {
        let bound = self.budget.pages + self.budget.batch;
        let mut most = match kind {
            FaultKind::Demand => bound,
            FaultKind::Prefetch => self.budget.pages,
        };
        loop {
            let taken = self.resident.fetch_update(Relaxed, Relaxed, |now| (now < most).then_some(now + 1));
            match (taken, kind) {
                (Ok(before), _) => {
                    self.peak.fetch_max(before + 1, Relaxed);
                    self.counters.beyond_budget.fetch_add(u64::from(before >= bound), Relaxed);
                    return Some(Reserved { object: self });
                }
                (Err(_), FaultKind::Prefetch) => return None,
                (Err(_), FaultKind::Demand) => {}
            }
            match self.make_room() {
                Room::Made => {}
                // All are locked, by faults that are about to finish.
                Room::Later => rustix::thread::sched_yield(),
                Room::None => most = u64::MAX,
            }
        }
    }

    /// Has pages go for a fault. Why none can is another page's trouble: who calls [`reclaim`](Self::reclaim) is told.
    pub(super) fn make_room(&self) -> Room {
        if self.budget.is_stuck() || self.store.is_full() {
            return Room::None;
        }
        self.counters.direct_reclaims.fetch_add(1, Relaxed);
        match self.reclaim() {
            Ok(Moved { frames: 0 }) => Room::Later,
            Ok(_) => Room::Made,
            Err(_) => {
                self.budget.note_failure();
                Room::None
            }
        }
    }

    /// Whether one more page would fit without another one going.
    pub(super) fn has_room(&self) -> bool {
        self.resident.load(Relaxed) < self.budget.pages
    }

    pub(super) fn unreserve(&self, pages: u64) {
        self.resident.fetch_sub(pages, Relaxed);
    }

    /// Evicts about one batch of pages that the guest has not come back for. Nothing, if every page is on its way. A page that cannot go
    /// is passed by, as long as there are not many.
    ///
    /// # Errors
    /// As for [`evict`](Self::evict); none, if pages have gone all the same.
    pub fn reclaim(&self) -> Result<Moved, MemoryError> {
        if self.store.is_full() {
            // No marks need be taken away, either.
            return Err(self.store.full(self.frames().start));
        }
        let mut hand = self.budget.hand.lock().unwrap_or_else(PoisonError::into_inner);
        let count = self.pages.len();
        let (mut scanned, mut failures, mut last_error) = (0, 0, None);
        // Twice: once to take all marks away, once to find who has not got his back.
        while scanned < 2 * count {
            let window = *hand..count.min(*hand + self.budget.batch as usize);
            *hand = window.end % count;
            scanned += window.len();
            self.mark_young(window.clone());
            // First those whose mark was taken away a round ago: they are told apart from this round's by having none.
            let victims = self.hull(window.clone(), Clock::Take);
            let evicted = victims.map(|victims| self.evict_some(victims, Victims::Unreferenced));
            let moved = match evicted.unwrap_or(Ok(Moved::default())) {
                Err(error) if matches!(error, MemoryError::StoreFull { .. }) || failures == MOST_FAILURES => {
                    return Err(error);
                }
                Err(error) => {
                    failures += 1;
                    last_error = Some(error);
                    Moved::default()
                }
                Ok(moved) => moved,
            };
            if let Some(spared) = self.hull(window.clone(), Clock::Spare) {
                self.spare(spared);
            }
            if moved.frames > 0 {
                return Ok(moved);
            }
        }
        last_error.map_or(Ok(Moved::default()), Err)
    }

    /// Marks the pages without a mark that were used all the same: tables with marks of their own see that without a fault.
    fn mark_young(&self, window: core::ops::Range<usize>) {
        for index in window.filter(|index| self.pages[*index].clock() == Clock::Take) {
            if self.age(self.page_at(index), Age::Test) == Young::Yes {
                self.pages[index].touch_resident();
            }
        }
    }

    /// The hull of the window's pages that the hand would treat so.
    fn hull(&self, window: core::ops::Range<usize>, clock: Clock) -> Option<PfnRange> {
        let pages = window.filter(|index| self.pages[*index].clock() == clock);
        pages.map(|index| self.page_at(index)).reduce(PfnRange::hull)
    }

    /// Takes marks away, then translations. A guest that comes back from here on faults, and marks its page again.
    fn spare(&self, frames: PfnRange) {
        for page in &self.pages[self.index(frames.start)..=self.index(Pfn::new(frames.end.as_u64() - 1))] {
            page.unmark();
        }
        // Who was young has been asked already.
        let _ = self.age(frames, Age::Clear);
    }
}
