//! From a frame number to the table there, and from a table to an entry: the one place where links are followed.

// UNSAFETY: references to tables are made from frame numbers, and tables are freed in the end.
#![expect(unsafe_code)]

use afterimage_mmu::{Gfn, GfnRange, Level, Mapped, Pfn};

use super::{NO_ROOT, Tables};
use crate::format::{Entry, Format};
use crate::memory::{ENTRIES, TableMemory};
use crate::mutation::{self, Mutation};
use crate::sync::{AtomicU64, Ordering};

/// A table that is linked, or the root.
pub(crate) struct TableRef<'t, F: Format, M: TableMemory> {
    tables: &'t Tables<F, M>,
    entries: &'t [AtomicU64],
    level: Level,
}

impl<F: Format, M: TableMemory> Clone for TableRef<'_, F, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F: Format, M: TableMemory> Copy for TableRef<'_, F, M> {}

impl<'t, F: Format, M: TableMemory> TableRef<'t, F, M> {
    /// The table at `frame`, which is the root or was read from a link.
    #[inline]
    fn new(tables: &'t Tables<F, M>, frame: Pfn, entries: usize, level: Level) -> Self {
        let start = tables.memory.entries(frame);
        // SAFETY: (1) the frame came from `allocate` of this memory, with as many entries: `link` and `split` alone
        // write links, to such frames, and what is not one of ours is not followed, nor remembered; (2) it is freed by `drop`, which no
        // borrow of the tables outlives (nor, after `exchange_roots`, one of those that had the root before), or by
        // `free`, whose caller knows that no borrow is left that could have found it; (3) entries are only ever used as atomics.
        let entries = unsafe { core::slice::from_raw_parts::<AtomicU64>(start, entries) };
        Self { tables, entries, level }
    }

    #[inline]
    pub(crate) fn level(self) -> Level {
        self.level
    }

    /// The entry of `gfn`.
    #[inline]
    pub(super) fn entry(self, gfn: Gfn) -> &'t AtomicU64 {
        let index = (gfn.as_u64() / self.level.frames()) as usize & (self.entries.len() - 1);
        // SAFETY: a root's and a child's length is a power of two, so the index lies below it.
        unsafe { self.entries.get_unchecked(index) }
    }

    /// The table that `raw` links, a word that was read from an entry of this one.
    #[inline]
    pub(crate) fn child(self, raw: u64) -> Option<Self> {
        let child = F::child(raw, self.level)?;
        let level = Level::new(self.level.number() - 1)?;
        Some(Self::new(self.tables, child, ENTRIES, level))
    }

    /// Every entry, in order.
    pub(super) fn entries(self) -> &'t [AtomicU64] {
        self.entries
    }

    /// The entries of the frames of `gfns`, from its first on, as far as the table reaches.
    pub(crate) fn entries_of(self, gfns: GfnRange) -> &'t [AtomicU64] {
        let frames = self.level.frames();
        let first = gfns.start.as_u64() / frames;
        let index = first as usize & (self.entries.len() - 1);
        let count = gfns.end.as_u64().div_ceil(frames) - first;
        let left = &self.entries[index..];
        &left[..count.min(left.len() as u64) as usize]
    }

    /// Reads the entry of `gfn`.
    #[inline]
    pub(crate) fn look(self, gfn: Gfn) -> Place<'t, F, M> {
        let entry = self.entry(gfn);
        let raw = entry.load(mutation::unless(Mutation::WalkRelaxed, Ordering::Acquire));
        Place { entry, raw, level: self.level, child: self.child(raw) }
    }
}

impl<F: Format, M: TableMemory> Tables<F, M> {
    #[inline]
    pub(crate) fn root_table(&self) -> TableRef<'_, F, M> {
        TableRef::new(self, self.root(), F::ROOT_PAGES * ENTRIES, F::ROOT_LEVEL)
    }
}

impl<F: Format, M: TableMemory> Tables<F, M> {
    /// A page of a cache, which is linked nowhere, as the table that it may become below an entry of `level`.
    pub(super) fn unlinked(&self, page: Pfn, level: Level) -> TableRef<'_, F, M> {
        let below =
            Level::new(level.number() - 1).expect("only tables above the lowest level have tables below");
        TableRef::new(self, page, ENTRIES, below)
    }

    /// A table of `level` that was found linked, where the era says that it is still there.
    #[inline]
    pub(super) fn known(&self, table: Pfn, level: Level) -> TableRef<'_, F, M> {
        TableRef::new(self, table, ENTRIES, level)
    }

    /// Frees a table that was unlinked, of `pages` pages: one, but for a root.
    ///
    /// # Safety
    ///
    /// (1) [`unlink`](Self::unlink) or [`collapse`](Self::collapse) of these tables gave `table`, or it is the whole of a root that
    /// was taken from tables in the same memory, and it was not freed since; (2) every CPU was made to forget it; (3) every borrow of these tables has ended that was alive when it
    /// was unlinked, and what later ones read of them is what was written before.
    pub unsafe fn free(&self, table: Pfn, pages: usize) {
        // SAFETY: (1) a linked frame came from this memory as one page, and has one link, a root as so many; (2) it was unlinked, so that
        // whoever still could reach it had found it before: nobody, by the caller's (2) and (3).
        unsafe { self.memory.free(table, pages) };
    }
}

fn free_below<F: Format, M: TableMemory>(table: TableRef<'_, F, M>) {
    if table.level.number() == 1 {
        return;
    }
    for index in 0..table.entries.len() as u64 {
        let place = table.look(Gfn::new(index * table.level.frames()));
        if let (Entry::Table(frame), Some(child)) = (place.said(), place.child) {
            free_below(child);
            // SAFETY: (1) a linked frame came from this memory as one page, and has one link; (2) called by `drop`,
            // so that nobody walks any more, and `child` is not used again.
            unsafe { table.tables.memory.free(frame, 1) };
        }
    }
}

impl<F: Format, M: TableMemory> Drop for Tables<F, M> {
    fn drop(&mut self) {
        if *self.root.get_mut() == NO_ROOT {
            return;
        }
        free_below(self.root_table());
        // SAFETY: (1) `new` allocated it so; (2) nobody has the structure any more.
        unsafe { self.memory.free(self.root(), F::ROOT_PAGES) };
    }
}

/// An entry as it was read: on the way, or where a descent ended.
pub(crate) struct Place<'t, F: Format, M: TableMemory> {
    pub(crate) entry: &'t AtomicU64,
    pub(crate) raw: u64,
    pub(crate) level: Level,
    /// The table that it links.
    pub(crate) child: Option<TableRef<'t, F, M>>,
}

impl<F: Format, M: TableMemory> Place<'_, F, M> {
    /// What the word says.
    #[inline]
    pub(crate) fn said(&self) -> Entry {
        F::decode(self.raw, self.level)
    }

    #[inline]
    pub(super) fn exchange(&self, raw: u64) -> Mapped {
        let ordering = mutation::unless(Mutation::InstallWithoutRelease, Ordering::AcqRel);
        match self.entry.compare_exchange(self.raw, raw, ordering, Ordering::Relaxed) {
            Ok(_) => Mapped::Fixed,
            Err(_) => Mapped::LostRace,
        }
    }
}
