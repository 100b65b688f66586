//! Where table pages come from, and the few that each vCPU keeps at hand.
//!
//! Nothing may allocate between the moment a fault is verified and its install: [`TableCache::top_up`] runs before,
//! and leaves as many pages as one install can need. A page that was taken and not linked (another thread linked its
//! own first) goes back to the cache: it was never visible, and is still zero.
//!
//! # What it costs
//!
//! | what | bytes |
//! |---|---|
//! | a mapped page, large or not, besides the tables | 0 |
//! | tables | 4 KiB for each that the architecture needs, and the root: 4 KiB to 64 KiB |
//! | pages at hand | 4 KiB for each level below the root, at most, for each vCPU |
//! | a vCPU's words and counters | 5,632, at most |
//! | a machine with one memslot | 32 KiB, at most; with `LargeExecute::Never` 32 KiB more |
//!
//! `tests/memory.rs` counts every allocation, for 1 GiB in single frames, in large pages, and for frames here and there. A
//! dirty log is a bit a frame of its slot, beside this.

// UNSAFETY: tables are memory that hardware walks; the seam hands out their addresses.
#![expect(unsafe_code)]

#[cfg(not(loom_tables))]
mod heap;

use core::fmt;

use afterimage_mmu::Pfn;

#[cfg(not(loom_tables))]
pub use self::heap::HeapMemory;
use crate::sync::AtomicU64;

/// Entries in one page of a table.
pub const ENTRIES: usize = if cfg!(loom_tables) { 2 } else { 512 };

/// A handle to memory for tables; clones are handles to the same memory.
///
/// # Safety
///
/// Implementations keep these promises:
///
/// 1. `allocate(pages)` gives a frame from which `pages` pages are all zero, used by nobody else until they are freed,
///    and aligned to their whole size.
/// 2. `entries` of such a frame points to those pages, valid for reads and writes of `pages * 512` atomics from every
///    thread, until they are freed.
/// 3. What a handle allocated, each handle that is equal to it can free, and gives the same `entries` for.
pub unsafe trait TableMemory: Clone + PartialEq + fmt::Debug + Send + Sync + 'static {
    /// Zeroed pages for one table: one page, or as many as a wide root takes (a power of two). `None`: there are none.
    fn allocate(&self, pages: usize) -> Option<Pfn>;

    /// Gives the pages back.
    ///
    /// # Safety
    ///
    /// (1) `allocate(pages)` of an equal handle gave `table`, and it was not freed since; (2) nobody, hardware included,
    /// can reach it any more.
    unsafe fn free(&self, table: Pfn, pages: usize);

    /// Where the entries of the table at `table` lie for this CPU.
    fn entries(&self, table: Pfn) -> *const AtomicU64;
}

/// Most tables that one install can link: one for each level below the highest root.
const CACHED: usize = 4;

/// Zeroed table pages that one vCPU keeps at hand, and where its last install went. For tables of one memory: that which it was
/// filled from first.
#[derive(Debug)]
pub struct TableCache<M: TableMemory> {
    memory: Option<M>,
    pages: [Pfn; CACHED],
    filled: usize,
    pub(crate) last: LastTable,
}

/// The table that an install went to. The module `near` says when it can be used again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LastTable {
    /// Which frames it translates, and its level: see `near`.
    pub(crate) at: u64,
    /// The era of its tables; none has the era 0.
    pub(crate) era: u64,
    pub(crate) table: Pfn,
}

impl<M: TableMemory> Default for TableCache<M> {
    fn default() -> Self {
        let last = LastTable { at: 0, era: 0, table: Pfn::new(0) };
        Self { memory: None, pages: [Pfn::new(0); CACHED], filled: 0, last }
    }
}

impl<M: TableMemory> TableCache<M> {
    /// Makes sure that `count` (at most 4) pages are at hand; `false` if there are not so many. Pages of another memory than before are
    /// found out when they are to be filled up, or taken ([`MapError::NoTable`](crate::MapError::NoTable)).
    #[inline]
    pub fn top_up(&mut self, memory: &M, count: usize) -> bool {
        // Whose they are is looked at by who fills it and by who takes one: both are rare.
        self.filled >= count.min(CACHED) || self.fill(memory, count.min(CACHED))
    }

    #[cold]
    fn fill(&mut self, memory: &M, count: usize) -> bool {
        if self.memory.get_or_insert_with(|| memory.clone()) != memory {
            return false;
        }
        while self.filled < count {
            let Some(page) = memory.allocate(1) else { return false };
            self.pages[self.filled] = page;
            self.filled += 1;
        }
        true
    }

    /// Pages at hand.
    #[inline]
    pub fn len(&self) -> usize {
        self.filled
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// A page of `memory`; `None` if none is at hand.
    pub(crate) fn take(&mut self, memory: &M) -> Option<Pfn> {
        if self.memory.as_ref() != Some(memory) {
            return None;
        }
        self.filled = self.filled.checked_sub(1)?;
        Some(self.pages[self.filled])
    }

    /// Takes back what [`take`](Self::take) gave last, unused.
    pub(crate) fn put_back(&mut self, page: Pfn) {
        self.pages[self.filled] = page;
        self.filled += 1;
    }
}

impl<M: TableMemory> Drop for TableCache<M> {
    fn drop(&mut self) {
        if let Some(memory) = &self.memory {
            for page in &self.pages[..self.filled] {
                // SAFETY: (1) `memory` gave the page, and only the cache has it; (2) it was never linked.
                unsafe { memory.free(*page, 1) };
            }
        }
    }
}

#[cfg(all(test, not(any(shuttle, loom_tables))))]
mod tests {
    use super::*;

    #[test]
    fn a_cache_gives_its_pages_back() {
        let memory = HeapMemory::with_limit(5);
        let mut cache = TableCache::default();
        assert!(cache.top_up(&memory, 3));
        assert_eq!((cache.len(), memory.pages()), (3, 3));
        let page = cache.take(&memory).expect("three are at hand");
        assert_eq!(cache.len(), 2);
        cache.put_back(page);
        assert!(cache.top_up(&memory, 3));
        assert_eq!(memory.pages(), 3);
        let mut other = TableCache::default();
        assert!(!other.top_up(&memory, 4), "only two are left");
        drop((cache, other));
        assert_eq!(memory.pages(), 0);
    }

    #[test]
    fn pages_of_one_memory_are_not_used_for_another() {
        let (one, two) = (HeapMemory::default(), HeapMemory::default());
        let mut cache = TableCache::default();
        assert!(cache.top_up(&one, 2));
        assert_eq!(cache.take(&two), None);
        assert!(!cache.top_up(&two, 3));
        assert_eq!((one.pages(), two.pages(), cache.len()), (2, 0, 2));
    }
}
