//! Memory for tables that costs the same for everyone: one block, zeroed before the clock runs, of which everyone gets the
//! same pages in the same order. Which physical pages they are, and how the host of a virtual machine maps those, makes
//! far more of a difference than who writes them. In huge pages where there are any, as a kernel's view of all memory is.

// UNSAFETY: hands out table pages from one allocation.
#![expect(unsafe_code)]

use std::alloc::{Layout, alloc};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use afterimage_mmu::{FRAME_BYTES, FRAME_SHIFT, Pfn};
use afterimage_stage2::TableMemory;
use rustix::mm::{Advice, madvise};

/// Tables for 4 GiB in 4 KiB pages, two times, and what two vCPUs keep at hand.
const PAGES: usize = 2 * 2048 + 64;
const HUGE: usize = 2 << 20;
const BYTES: usize = (PAGES << FRAME_SHIFT).next_multiple_of(HUGE);

static BLOCK: LazyLock<Arc<Block>> = LazyLock::new(|| {
    let layout = Layout::from_size_align(BYTES, HUGE).expect("a few MiB of whole pages");
    // SAFETY: the layout is not empty.
    let start = unsafe { alloc(layout) };
    assert!(!start.is_null(), "the heap has room");
    // SAFETY: a range that nobody else knows yet, and the advice changes nothing in it. Refused: small pages, then.
    let _ = unsafe { madvise(start.cast(), BYTES, Advice::LinuxHugepage) };
    Arc::new(Block { start: start.expose_provenance(), taken: AtomicUsize::new(0) })
});

#[derive(Debug)]
struct Block {
    start: usize,
    taken: AtomicUsize,
}

/// The block's pages. Nothing goes back before all of it goes.
#[derive(Clone, Debug)]
pub(crate) struct Pool(Arc<Block>);

impl PartialEq for Pool {
    fn eq(&self, _: &Self) -> bool {
        // There is one.
        true
    }
}

impl Pool {
    /// All pages, zero.
    ///
    /// # Panics
    /// If any are in use.
    pub(crate) fn new() -> Self {
        let pool = Self::again();
        assert_eq!(Arc::strong_count(&pool.0), 2, "its tables are in use");
        pool.0.taken.store(0, Ordering::Relaxed);
        let start: *mut u8 = std::ptr::with_exposed_provenance_mut(pool.0.start);
        // SAFETY: so long, and nobody has a handle, so nobody has a table.
        unsafe { start.write_bytes(0, BYTES) };
        pool
    }

    /// A handle to the pages that are in use.
    pub(crate) fn again() -> Self {
        Self(Arc::clone(&BLOCK))
    }

    #[inline]
    pub(crate) fn at(table: Pfn) -> *const AtomicU64 {
        std::ptr::with_exposed_provenance((table.as_u64() * FRAME_BYTES) as usize)
    }
}

// SAFETY: (1) whole pages of the block are handed out once, one at a time, and were zeroed; (2) `entries` is the address that
// was allocated, with the provenance that was exposed then; (3) there is one block.
unsafe impl TableMemory for Pool {
    fn allocate(&self, pages: usize) -> Option<Pfn> {
        assert_eq!(pages, 1, "x86 has no wide root");
        let page = self.0.taken.fetch_add(1, Ordering::Relaxed);
        (page < PAGES).then(|| Pfn::new((self.0.start >> FRAME_SHIFT) as u64 + page as u64))
    }

    unsafe fn free(&self, _table: Pfn, _pages: usize) {}

    #[inline]
    fn entries(&self, table: Pfn) -> *const AtomicU64 {
        Self::at(table)
    }
}
