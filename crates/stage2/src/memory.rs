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
//! | a vCPU's words and counters | 928 |
//! | a machine with one memslot | 3,408 |
//!
//! `tests/memory.rs` counts every allocation, for 1 GiB in single frames, in large pages, and for frames here and there: the
//! first two lines and the third exactly; the last two are what it saw (it allows 1 KiB and 8 KiB). A dirty log is a bit a frame
//! of its slot, beside this.

// UNSAFETY: tables are memory that hardware walks; the seam hands out their addresses.
#![expect(unsafe_code)]

use alloc::alloc::{alloc_zeroed, dealloc};
use alloc::sync::Arc;
use core::alloc::Layout;
use core::fmt;

use afterimage_mmu::{FRAME_BYTES, FRAME_SHIFT, Pfn};

use crate::sync::{AtomicU64, AtomicUsize, Ordering};

/// Entries in one page of a table.
pub const ENTRIES: usize = 512;

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

/// Tables on the heap, their frame numbers being their addresses: for tests and for walkers in software.
#[derive(Clone, Debug)]
pub struct HeapMemory {
    counts: Arc<Counts>,
}

#[derive(Debug)]
struct Counts {
    pages: AtomicUsize,
    limit: usize,
}

impl Default for HeapMemory {
    fn default() -> Self {
        Self::with_limit(usize::MAX)
    }
}

impl PartialEq for HeapMemory {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.counts, &other.counts)
    }
}

impl HeapMemory {
    /// At most `pages` pages at a time.
    pub fn with_limit(pages: usize) -> Self {
        Self { counts: Arc::new(Counts { pages: AtomicUsize::new(0), limit: pages }) }
    }

    /// Pages that are allocated now.
    pub fn pages(&self) -> usize {
        self.counts.pages.load(Ordering::Relaxed)
    }

    fn layout(pages: usize) -> Layout {
        let bytes = pages << FRAME_SHIFT;
        Layout::from_size_align(bytes, bytes).expect("a table is a power of two of pages, and small")
    }
}

// SAFETY: (1) the layout is aligned to its size, the allocator zeroes it and owns it to nobody else; (2) `entries` is the
// address that was allocated, with the provenance that was exposed then; (3) all handles use the one heap.
unsafe impl TableMemory for HeapMemory {
    fn allocate(&self, pages: usize) -> Option<Pfn> {
        let taken = self.counts.pages.fetch_add(pages, Ordering::Relaxed);
        if taken.checked_add(pages).is_none_or(|all| all > self.counts.limit) {
            self.counts.pages.fetch_sub(pages, Ordering::Relaxed);
            return None;
        }
        // SAFETY: the layout is not empty: a table has at least one page.
        let start = unsafe { alloc_zeroed(Self::layout(pages)) };
        if start.is_null() {
            self.counts.pages.fetch_sub(pages, Ordering::Relaxed);
            return None;
        }
        Some(Pfn::new(start.expose_provenance() as u64 / FRAME_BYTES))
    }

    unsafe fn free(&self, table: Pfn, pages: usize) {
        let start = self.entries(table).cast::<u8>().cast_mut();
        // SAFETY: the caller's (1): this address was allocated with this layout; (2) it is not used any more.
        unsafe { dealloc(start, Self::layout(pages)) };
        self.counts.pages.fetch_sub(pages, Ordering::Relaxed);
    }

    #[inline]
    fn entries(&self, table: Pfn) -> *const AtomicU64 {
        core::ptr::with_exposed_provenance((table.as_u64() << FRAME_SHIFT) as usize)
    }
}

/// Most tables that one install can link: one for each level below the highest root.
const CACHED: usize = 4;

/// Zeroed table pages that one vCPU keeps at hand.
#[derive(Debug)]
pub struct TableCache<M: TableMemory> {
    memory: Option<M>,
    pages: [Pfn; CACHED],
    filled: usize,
}

impl<M: TableMemory> Default for TableCache<M> {
    fn default() -> Self {
        Self { memory: None, pages: [Pfn::new(0); CACHED], filled: 0 }
    }
}

impl<M: TableMemory> TableCache<M> {
    /// Makes sure that `count` (at most 4) pages of `memory` are at hand; `false` if there are not so many.
    #[inline]
    pub fn top_up(&mut self, memory: &M, count: usize) -> bool {
        self.filled >= count.min(CACHED) && self.memory.as_ref() == Some(memory)
            || self.fill(memory, count.min(CACHED))
    }

    #[cold]
    fn fill(&mut self, memory: &M, count: usize) -> bool {
        if self.memory.as_ref() != Some(memory) {
            self.clear();
            self.memory = Some(memory.clone());
        }
        while self.filled < count {
            let Some(page) = memory.allocate(1) else { return false };
            self.pages[self.filled] = page;
            self.filled += 1;
        }
        true
    }

    /// Pages at hand.
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

    fn clear(&mut self) {
        if let Some(memory) = &self.memory {
            for page in &self.pages[..self.filled] {
                // SAFETY: (1) `memory` gave the page, and only the cache has it; (2) it was never linked.
                unsafe { memory.free(*page, 1) };
            }
        }
        self.filled = 0;
    }
}

impl<M: TableMemory> Drop for TableCache<M> {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn tables_are_zero_and_aligned_to_their_size() {
        let memory = HeapMemory::default();
        for pages in [1, 2, 4, 16] {
            let table = memory.allocate(pages).expect("the heap has room");
            assert_eq!(table.as_u64() % pages as u64, 0);
            let entries = memory.entries(table);
            for index in 0..pages * ENTRIES {
                // SAFETY: (1) the table has as many entries; (2) it is freed below.
                let entry = unsafe { &*entries.add(index) };
                assert_eq!(entry.swap(u64::MAX, Ordering::Relaxed), 0);
            }
            // SAFETY: (1) it was allocated above; (2) nothing refers to it any more.
            unsafe { memory.free(table, pages) };
        }
        assert_eq!(memory.pages(), 0);
    }

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
        assert!(cache.top_up(&two, 1));
        assert_eq!((one.pages(), two.pages(), cache.len()), (0, 1, 1));
    }
}
