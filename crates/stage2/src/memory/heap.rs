//! Tables on the heap.

// UNSAFETY: tables are allocated, and freed, as raw memory.
#![expect(unsafe_code)]

use alloc::alloc::{alloc_zeroed, dealloc};
use alloc::sync::Arc;
use core::alloc::Layout;

use afterimage_mmu::{FRAME_BYTES, FRAME_SHIFT, Pfn};

use super::TableMemory;
use crate::sync::{AtomicU64, AtomicUsize, Ordering};

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
    /// At most `pages` pages of 4 KiB at a time: beyond that there is no memory.
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

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::super::ENTRIES;
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
}
