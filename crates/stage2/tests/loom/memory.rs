//! Table pages of loom's atomics: loom sees who reads one that is being made or freed.

// UNSAFETY: the seam hands out pointers.
#![expect(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use afterimage_mmu::Pfn;
use afterimage_stage2::{AtomicU64, ENTRIES, TableMemory};
use loom::cell::UnsafeCell;

struct Table {
    entries: Box<[AtomicU64]>,
    /// Read by whoever uses the table, written by whoever frees it.
    life: UnsafeCell<()>,
}

/// Frame number n is table n - 1 of those that were ever allocated.
#[derive(Clone)]
pub(crate) struct Tables {
    tables: Arc<Mutex<Vec<Option<Box<Table>>>>>,
}

impl Tables {
    pub(crate) fn new() -> Self {
        Self { tables: Arc::new(Mutex::new(vec![])) }
    }

    // No access of an entry happens while it is held, so no thread of loom's waits for it.
    fn all(&self) -> MutexGuard<'_, Vec<Option<Box<Table>>>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PartialEq for Tables {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.tables, &other.tables)
    }
}

impl core::fmt::Debug for Tables {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Tables")
    }
}

// SAFETY: (1) new atomics are zero, and in one box; (2) the box stays where it is until it is freed; (3) handles are equal
// that have the same list.
unsafe impl TableMemory for Tables {
    fn allocate(&self, pages: usize) -> Option<Pfn> {
        let entries = (0..pages * ENTRIES).map(|_| AtomicU64::new(0)).collect();
        let table = Box::new(Table { entries, life: UnsafeCell::new(()) });
        let mut all = self.all();
        all.push(Some(table));
        Some(Pfn::new(all.len() as u64))
    }

    unsafe fn free(&self, table: Pfn, _pages: usize) {
        let freed = self.all()[table.as_u64() as usize - 1].take().expect("it is freed once");
        freed.life.with_mut(|_| ());
    }

    fn entries(&self, table: Pfn) -> *const AtomicU64 {
        let all = self.all();
        let table = all[table.as_u64() as usize - 1].as_ref().expect("a table in use was freed");
        table.life.with(|_| ());
        table.entries.as_ptr()
    }
}
