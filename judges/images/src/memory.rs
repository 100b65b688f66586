//! Tables at the physical addresses that they will have in the machine.

// UNSAFETY: the crate is handed the addresses of tables.
#![expect(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use afterimage_mmu::Pfn;
use afterimage_stage2::{ENTRIES, TableMemory};

/// Pages for tables in an image. None is given back before the whole.
#[derive(Clone, Debug)]
pub(crate) struct ImageMemory(Arc<Pages>);

#[derive(Debug)]
struct Pages {
    /// The frame of the first.
    start: Pfn,
    words: Box<[AtomicU64]>,
    /// Pages that are used.
    used: AtomicUsize,
}

impl PartialEq for ImageMemory {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl ImageMemory {
    /// Room for `pages` pages from frame `start` on.
    pub(crate) fn new(start: Pfn, pages: usize) -> Self {
        let words = (0..pages * ENTRIES).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Pages { start, words, used: AtomicUsize::new(0) }))
    }

    /// Pages that hold tables, or may.
    pub(crate) fn used(&self) -> usize {
        self.0.used.load(Ordering::Relaxed)
    }

    /// All words, in order.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        &self.0.words
    }

    /// The word of an entry.
    pub(crate) fn entry(&self, table: Pfn, index: usize) -> &AtomicU64 {
        &self.0.words[self.index(table) + index]
    }

    fn index(&self, table: Pfn) -> usize {
        (table.as_u64() - self.0.start.as_u64()) as usize * ENTRIES
    }
}

// SAFETY: (1) pages are zero at the start and given out once, aligned, since the region is aligned to more than any
// table; (2) they live as long as a handle does; (3) all handles share them.
unsafe impl TableMemory for ImageMemory {
    fn allocate(&self, pages: usize) -> Option<Pfn> {
        let first = self.0.used.load(Ordering::Relaxed).next_multiple_of(pages);
        self.0.used.store(first + pages, Ordering::Relaxed);
        (first + pages <= self.0.words.len() / ENTRIES)
            .then(|| Pfn::new(self.0.start.as_u64() + first as u64))
    }

    unsafe fn free(&self, _table: Pfn, _pages: usize) {}

    fn entries(&self, table: Pfn) -> *const AtomicU64 {
        &raw const self.0.words[self.index(table)]
    }
}
