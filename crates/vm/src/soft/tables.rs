//! Memory for tables that a software vCPU walks: a pool that is never unmapped, and that remembers what was freed.
//!
//! Physical memory as the walker sees it has guest frames from frame 0 on and table pages from [`TablePool::FIRST`] on. A
//! table page that is freed is overwritten with [`TablePool::POISON`], an entry in no format, and is given away again only
//! when no page is left that never was. So a vCPU that walks a freed table, for want of a flush or of patience in who freed
//! it, meets poison; and one who writes into it leaves a mark that the next owner finds, or who sweeps ([`TablePool::scribbled`]).

// UNSAFETY: tables lie in a raw mapping.
#![expect(unsafe_code)]

use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use afterimage_mmu::{FRAME_BYTES, Pfn};
use afterimage_stage2::{ENTRIES, TableMemory};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::error::VmError;

/// Tables of 1, 2, 4, 8 or 16 pages.
const SIZES: usize = 5;
/// Pages beyond what tables for all memory take: roots, what is cached by vCPUs, and what was freed not long ago.
const SPARE_PAGES: u64 = 4096;

/// A handle to memory for tables; clones are handles to the same memory.
#[derive(Clone)]
pub struct TablePool {
    pool: Arc<Pool>,
}

struct Pool {
    base: NonNull<u8>,
    pages: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The first page that nobody has had yet.
    fresh: u64,
    /// Freed tables by the logarithm of their pages, the one that was freed first in front.
    freed: [VecDeque<u64>; SIZES],
    used: u64,
    scribbled: u64,
}

// SAFETY: the mapping belongs to the pool alone, and is only used by atomics.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl PartialEq for TablePool {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.pool, &other.pool)
    }
}

impl fmt::Debug for TablePool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TablePool").field("pages", &self.pool.pages).finish_non_exhaustive()
    }
}

impl TablePool {
    /// What every entry of a freed table holds. Present in no format.
    pub const POISON: u64 = 0x2b6b_6b6b_6b6b_6b68;
    /// The frame of the first table page.
    pub const FIRST: Pfn = Pfn::new(1 << 34);

    /// Room for the tables of `frames` guest frames, mapped singly, more than twice.
    ///
    /// # Errors
    /// The system refuses the address space. Memory is taken only as tables come.
    pub fn new(frames: u64) -> Result<Self, VmError> {
        let lowest = frames.div_ceil(ENTRIES as u64);
        let pages = 3 * lowest + SPARE_PAGES;
        // SAFETY: a new private mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            mmap_anonymous(
                core::ptr::null_mut(),
                (pages * FRAME_BYTES) as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(VmError::system("map memory for tables"))?;
        let base = NonNull::new(base.cast::<u8>()).expect("mmap returns no null");
        Ok(Self { pool: Arc::new(Pool { base, pages, state: Mutex::default() }) })
    }

    /// Pages in use.
    pub fn used(&self) -> u64 {
        self.state().used
    }

    /// Tables that were found written to after they had been freed: when they were given away, or by [`sweep`](Self::sweep).
    pub fn scribbled(&self) -> u64 {
        self.state().scribbled
    }

    /// Looks at the poison of every table that is free.
    pub fn sweep(&self) {
        let mut state = self.state();
        let mut scribbled = 0;
        for (order, tables) in state.freed.iter().enumerate() {
            scribbled += tables.iter().filter(|&&table| self.fill(table, 1 << order, Self::POISON)).count();
        }
        state.scribbled += scribbled as u64;
    }

    /// Entry `index` of the table at `table`, as a walker reads physical memory; `None` where there are no tables.
    #[inline]
    pub(super) fn entry(&self, table: Pfn, index: usize) -> Option<&AtomicU64> {
        let page = table.as_u64().checked_sub(Self::FIRST.as_u64())?;
        let word = page.checked_mul(ENTRIES as u64)?.checked_add(index as u64)?;
        // SAFETY: (1) the word lies in the mapping, as is checked; (2) it is aligned; (3) the mapping lives as long as
        // `self`; (4) it is only used by atomics.
        (word < self.pool.pages * ENTRIES as u64)
            .then(|| unsafe { self.pool.base.cast::<AtomicU64>().add(word as usize).as_ref() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.pool.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn words(&self, page: u64, pages: usize) -> impl Iterator<Item = &AtomicU64> {
        let table = Pfn::new(Self::FIRST.as_u64() + page);
        (0..pages * ENTRIES)
            .map(move |index| self.entry(table, index).expect("the page is one of the pool's"))
    }

    /// Puts `word` into every entry of a free table; whether one was written to.
    fn fill(&self, page: u64, pages: usize, word: u64) -> bool {
        self.words(page, pages)
            .fold(false, |scribbled, entry| scribbled | (entry.swap(word, Ordering::Relaxed) != Self::POISON))
    }
}

impl State {
    /// Pages that nobody has had, aligned to their number.
    fn fresh(&mut self, pages: u64, all: u64) -> Option<u64> {
        let page = self.fresh.next_multiple_of(pages);
        self.fresh = (page + pages <= all).then_some(page + pages)?;
        Some(page)
    }
}

// SAFETY: (1) a page is given out while it is nobody else's: behind all that were, or from the freed ones, zeroed; pages are
// aligned to their number; (2) `entries` points into the mapping, which stays; (3) equal handles have one pool.
unsafe impl TableMemory for TablePool {
    fn allocate(&self, pages: usize) -> Option<Pfn> {
        let mut state = self.state();
        let page = match state.fresh(pages as u64, self.pool.pages) {
            Some(fresh) => fresh,
            None => {
                let freed = state.freed.get_mut(pages.ilog2() as usize)?.pop_front()?;
                state.scribbled += u64::from(self.fill(freed, pages, 0));
                freed
            }
        };
        state.used += pages as u64;
        Some(Pfn::new(Self::FIRST.as_u64() + page))
    }

    unsafe fn free(&self, table: Pfn, pages: usize) {
        let page = table.as_u64() - Self::FIRST.as_u64();
        for word in self.words(page, pages) {
            word.store(Self::POISON, Ordering::Relaxed);
        }
        let mut state = self.state();
        state.used -= pages as u64;
        state.freed[pages.ilog2() as usize].push_back(page);
    }

    #[inline]
    fn entries(&self, table: Pfn) -> *const AtomicU64 {
        self.entry(table, 0).expect("a table of this pool")
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; nobody has a handle any more.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), (self.pages * FRAME_BYTES) as usize) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_table_is_poison_and_then_zeros() {
        let pool = TablePool::new(512).expect("memory");
        let first = pool.allocate(4).expect("room");
        assert!(first.as_u64().is_multiple_of(4));
        // SAFETY: (1) it was allocated so; (2) nobody uses it.
        unsafe { pool.free(first, 4) };
        assert_eq!(pool.entry(first, 2047).map(|word| word.load(Ordering::Relaxed)), Some(TablePool::POISON));
        let mut last = first;
        while let Some(next) = pool.allocate(4) {
            last = next;
        }
        assert_eq!(last, first, "it comes back last");
        assert_eq!(pool.entry(first, 2047).map(|word| word.load(Ordering::Relaxed)), Some(0));
        assert_eq!(pool.scribbled(), 0);
        assert!(pool.entry(Pfn::new(0), 0).is_none());
    }

    #[test]
    fn a_write_to_a_freed_table_is_noticed() {
        let pool = TablePool::new(512).expect("memory");
        let tables: Vec<_> = core::iter::from_fn(|| pool.allocate(1)).collect();
        let entry = pool.entry(tables[0], 7).expect("an entry");
        // SAFETY: (1) it was allocated so; (2) nobody uses it but to break the rule.
        unsafe { pool.free(tables[0], 1) };
        entry.store(1, Ordering::Relaxed);
        assert_eq!((pool.allocate(1), pool.scribbled()), (Some(tables[0]), 1));
    }

    #[test]
    fn a_freed_table_that_nobody_gets_again_is_looked_at_too() {
        let pool = TablePool::new(512).expect("memory");
        for pages in [1, 4] {
            let table = pool.allocate(pages).expect("room");
            let before = pool.scribbled();
            // SAFETY: (1) it was allocated so; (2) nobody uses it but to break the rule.
            unsafe { pool.free(table, pages) };
            pool.sweep();
            assert_eq!(pool.scribbled(), before, "all are poison");
            pool.entry(table, pages * ENTRIES - 1).expect("an entry").store(1, Ordering::Relaxed);
            pool.sweep();
            pool.sweep();
            assert_eq!(pool.scribbled(), before + 1, "it is counted once");
        }
    }

    #[test]
    fn poison_is_an_entry_in_no_format() {
        use afterimage_mmu::Level;
        use afterimage_stage2::{Entry, Ept, Format, Npt, Sv39x4, Vmsa};
        for level in (1..=4).filter_map(Level::new) {
            for entry in [
                <Ept>::decode(TablePool::POISON, level),
                Ept::<4, 0>::decode(TablePool::POISON, level),
                <Npt>::decode(TablePool::POISON, level),
                <Vmsa>::decode(TablePool::POISON, level),
                Sv39x4::decode(TablePool::POISON, level),
            ] {
                assert_eq!(entry, Entry::Foreign);
            }
        }
    }
}
