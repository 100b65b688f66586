//! Tables that any number of threads read and change at once.
//!
//! # States of an entry, and who may move it
//!
//! ```text
//! absent ──link──► table                     (stays until the structure goes)
//! absent, MMIO ──map──► leaf ──upgrade, protect, age, mark──► leaf, same frame
//!                        └──take away──► absent
//! absent, MMIO ──cache──► MMIO
//! ```
//!
//! Every move is one compare-exchange against the word that was looked at, by any thread at any time; exactly one of
//! those who try wins. Hardware moves too: it sets marks. Never does a leaf become a leaf of another frame: there is
//! a zap and a flush in between, or [`MapError::Conflict`]. A frozen entry belongs to another thread: an install backs
//! off, a zap waits.
//!
//! # Retries
//!
//! An install that loses goes back outward ([`Mapped::LostRace`]) and never looks again by itself: why it lost may be an
//! invalidation. The page of a table that was not linked goes back to the vCPU's cache at once.
//!
//! # How long a table lives
//!
//! As long as the structure. Tables are linked and never unlinked, so whoever found one may use it as long as it
//! borrows [`Tables`]. References to tables are made in one place, `TableRef::new`, and carry that borrow; freeing tables
//! earlier means to give them the life of a walker's critical section instead, and to free after the flush and after the
//! last such section. (KVM: RCU. See rule F3 of its zap: flush before the section is left.)
//!
//! Source: Linux `kvm_tdp_mmu_map`, `tdp_mmu_map_handle_target_level`, `tdp_mmu_link_sp`.

use core::fmt;
use core::marker::PhantomData;

use afterimage_mmu::{Access, CachedMmio, Found, Gfn, GfnRange, Level, Mapped, PageSize, Pfn};

use crate::format::{Entry, Execute, Format, Leaf, Refused, Writable};
use crate::memory::{TableCache, TableMemory};
use crate::sync::{AtomicU64, Ordering};

/// Stage-2 tables of one address space, in format `F`, in memory `M`.
pub struct Tables<F: Format, M: TableMemory> {
    memory: M,
    root: Pfn,
    format: PhantomData<F>,
}

/// Why a translation cannot be installed, now or ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The tables do not reach the guest frame.
    #[error("guest frame {gfn} is out of reach of tables for {bits}-bit addresses")]
    OutOfReach {
        /// The frame.
        gfn: Gfn,
        /// What they translate.
        bits: u32,
    },
    /// The format cannot say it.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The cache held no page for a table: it was not topped up.
    #[error("the vCPU's cache holds no page for a table below level {}", .0.number())]
    NoTable(Level),
    /// Another page, or another type of memory, is mapped there. The primary MMU let go of a page without an invalidation.
    #[error(
        "guest frame {gfn} is mapped to {found:?} and was to be mapped to {wanted:?} without a zap in between"
    )]
    Conflict {
        /// The frame.
        gfn: Gfn,
        /// What is mapped.
        found: Leaf,
        /// What was to be.
        wanted: Leaf,
    },
    /// A larger leaf maps the frame and forbids the access; it would have to be split, or zapped.
    #[error("guest frame {gfn} is mapped by a page of {size:?}, which must be split or zapped first")]
    LargerLeaf {
        /// The frame.
        gfn: Gfn,
        /// The size of the leaf there.
        size: PageSize,
    },
    /// Someone else wrote into the tables.
    #[error("the entry of guest frame {gfn} at level {}, {raw:#x}, is not one of ours", .level.number())]
    Foreign {
        /// The frame.
        gfn: Gfn,
        /// The level.
        level: Level,
        /// The word.
        raw: u64,
    },
    /// The engine asked for an address space that these tables do not have.
    #[error("there are no tables for address space {0}")]
    NoSuchSpace(u16),
}

/// Where a walk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walked {
    /// The last entry: no link to a table.
    pub entry: Entry,
    /// The level of its table.
    pub level: Level,
}

/// What an access of the guest meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translation {
    /// This frame.
    Frame(Pfn),
    /// A fault.
    Fault(Found),
}

/// The `frames` frames, a power of two, around `gfn`.
fn block(gfn: Gfn, frames: u64) -> GfnRange {
    let start = gfn.as_u64() & !(frames - 1);
    GfnRange::new(Gfn::new(start), Gfn::new(start + frames))
}

/// The frames of one entry of `level`.
pub(crate) fn entry_block(gfn: Gfn, level: Level) -> GfnRange {
    block(gfn, level.frames())
}

pub(crate) use reach::TableRef;

// UNSAFETY: references to tables are made from frame numbers, and tables are freed in the end.
#[expect(unsafe_code)]
mod reach {
    use super::{
        AtomicU64, Entry, Format, Gfn, GfnRange, Level, Ordering, Pfn, Place, TableMemory, Tables, block,
    };
    use crate::memory::ENTRIES;

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
            // SAFETY: (1) the frame came from `allocate` of this memory, with as many entries: `link` alone writes
            // links, to such frames, and what is not one of ours is not followed; (2) it is freed by `drop` alone, which
            // no borrow of the tables outlives; (3) entries are only ever used as atomics.
            let entries = unsafe { core::slice::from_raw_parts::<AtomicU64>(start, entries) };
            Self { tables, entries, level }
        }

        pub(crate) fn level(self) -> Level {
            self.level
        }

        /// Reads the entry of `gfn`.
        #[inline]
        pub(crate) fn look(self, gfn: Gfn) -> Place<'t, F, M> {
            let index = gfn.as_u64() / self.level.frames();
            // Both a root's and a child's length is a power of two.
            let entry = &self.entries[index as usize & (self.entries.len() - 1)];
            let raw = entry.load(Ordering::Acquire);
            let child = match (F::child(raw, self.level), Level::new(self.level.number() - 1)) {
                (Some(child), Some(level)) => Some(Self::new(self.tables, child, ENTRIES, level)),
                _ => None,
            };
            Place { entry, raw, level: self.level, child }
        }

        /// The frames that the table translates around `gfn`.
        pub(crate) fn span(self, gfn: Gfn) -> GfnRange {
            block(gfn, self.level.frames() * self.entries.len() as u64)
        }
    }

    impl<F: Format, M: TableMemory> Tables<F, M> {
        #[inline]
        pub(crate) fn root_table(&self) -> TableRef<'_, F, M> {
            TableRef::new(self, self.root, F::ROOT_PAGES * ENTRIES, F::ROOT_LEVEL)
        }
    }

    fn free_below<F: Format, M: TableMemory>(table: TableRef<'_, F, M>) {
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
            free_below(self.root_table());
            // SAFETY: (1) `new` allocated it so; (2) nobody has the structure any more.
            unsafe { self.memory.free(self.root, F::ROOT_PAGES) };
        }
    }
}

impl<F: Format, M: TableMemory> fmt::Debug for Tables<F, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables").field("format", &F::NAME).field("root", &self.root).finish_non_exhaustive()
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
    fn exchange(&self, raw: u64) -> Mapped {
        match self.entry.compare_exchange(self.raw, raw, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Mapped::Fixed,
            Err(_) => Mapped::LostRace,
        }
    }
}

impl<F: Format, M: TableMemory> Tables<F, M> {
    /// Empty tables; `None` if `memory` has no room for the root, or gives one that hardware could not be told of.
    pub fn new(memory: M) -> Option<Self> {
        let root = memory.allocate(F::ROOT_PAGES)?;
        let tables = Self { memory, root, format: PhantomData };
        // Checked with the structure complete, so that a root out of reach is freed.
        F::encode_table(root).is_ok().then_some(tables)
    }

    /// The root's first frame, for the register that hardware walks from.
    pub fn root(&self) -> Pfn {
        self.root
    }

    /// The guest frames that the tables reach.
    pub fn reach(&self) -> GfnRange {
        GfnRange::new(Gfn::new(0), Gfn::new(1 << (F::GPA_BITS - 12)))
    }

    /// Refills a cache for one install; `false` if there is no memory. Before the critical section.
    #[inline]
    pub fn top_up(&self, cache: &mut TableCache<M>) -> bool {
        cache.top_up(&self.memory, usize::from(F::ROOT_LEVEL.number()) - 1)
    }

    /// Looks up `gfn`, without a lock. Nothing is changed, no mark is set.
    #[inline]
    pub fn walk(&self, gfn: Gfn) -> Walked {
        match self.find(gfn) {
            Some(place) => Walked { entry: place.said(), level: place.level },
            None => Walked { entry: Entry::Absent, level: F::ROOT_LEVEL },
        }
    }

    /// The entry at which a walk for `gfn` ends; `None` out of reach.
    #[inline]
    fn find(&self, gfn: Gfn) -> Option<Place<'_, F, M>> {
        if !self.reach().contains(gfn) {
            return None;
        }
        let mut table = self.root_table();
        loop {
            let place = table.look(gfn);
            match place.child {
                Some(child) => table = child,
                None => return Some(place),
            }
        }
    }

    /// Translates an access of the guest as hardware does, which sets the marks (a vCPU in software).
    ///
    /// Hardware that leaves the marks to software faults where this sets them.
    pub fn translate(&self, gfn: Gfn, access: Access) -> Translation {
        let Some(mut place) = self.find(gfn) else { return Translation::Fault(Found::Absent) };
        loop {
            let leaf = match F::decode(place.raw, place.level) {
                Entry::Leaf(leaf) => leaf,
                Entry::Mmio(_) => return Translation::Fault(Found::Reserved),
                _ => return Translation::Fault(Found::Absent),
            };
            if F::HIDES_UNUSED && !leaf.accessed {
                return Translation::Fault(Found::Absent);
            }
            let is_write = access.contains(Access::WRITE);
            if is_write && !leaf.writable.is_allowed()
                || access.contains(Access::EXEC) && leaf.execute == Execute::Never
            {
                return Translation::Fault(Found::Present);
            }
            let writable = if is_write { Writable::Dirty } else { leaf.writable };
            match self.change(&place, leaf, Leaf { writable, accessed: true, ..leaf }) {
                Ok(()) => return Translation::Frame(leaf.pfn_of(gfn)),
                Err(now) => place.raw = now,
            }
        }
    }

    /// Writes `new` over `old`, the leaf that the place was seen to hold; `Err`: the word is another by now.
    fn change(&self, place: &Place<'_, F, M>, old: Leaf, new: Leaf) -> Result<(), u64> {
        if new == old {
            return Ok(());
        }
        let raw =
            F::encode_leaf(new).expect("a decoded leaf can be encoded with other marks and permissions");
        place.entry.compare_exchange(place.raw, raw, Ordering::AcqRel, Ordering::Acquire).map(drop)
    }

    /// Maps the block of `leaf.size` around `gfn` to `leaf`.
    ///
    /// Where tables for smaller pages exist already, only the smaller page around `gfn` is mapped. Where a leaf of the
    /// same frame exists, it gains what `leaf` allows and it does not (`Fixed`), or allows all of it (`Spurious`).
    /// The caller has topped up `cache`, and knows that `leaf` is current.
    #[inline]
    pub fn map(&self, gfn: Gfn, leaf: Leaf, cache: &mut TableCache<M>) -> Result<Mapped, MapError> {
        let mut wanted = leaf;
        loop {
            let raw = F::encode_leaf(wanted)?;
            let Some(place) = self.descend(gfn, wanted.size.level(), cache)? else {
                return Ok(Mapped::LostRace);
            };
            if place.raw == F::ABSENT {
                return Ok(place.exchange(raw));
            }
            match place.said() {
                Entry::Absent | Entry::Mmio(_) => return Ok(place.exchange(raw)),
                Entry::Frozen => return Ok(Mapped::LostRace),
                Entry::Leaf(found) => return self.upgrade(&place, gfn, found, wanted),
                Entry::Foreign => return Err(foreign(gfn, &place)),
                Entry::Table(_) => wanted = wanted.narrowed(gfn),
            }
        }
    }

    fn upgrade(
        &self,
        place: &Place<'_, F, M>,
        gfn: Gfn,
        found: Leaf,
        wanted: Leaf,
    ) -> Result<Mapped, MapError> {
        if found.pfn_of(gfn) != wanted.pfn_of(gfn) || found.memory != wanted.memory {
            return Err(MapError::Conflict { gfn, found, wanted });
        }
        let merged = found.merged(wanted);
        if merged == found {
            return Ok(Mapped::Spurious);
        }
        if found.size != wanted.size {
            return Err(MapError::LargerLeaf { gfn, size: found.size });
        }
        Ok(place.exchange(F::encode_leaf(merged)?))
    }

    /// Lets `change` give the present leaf of `gfn` other marks or permissions, by one compare-exchange (KVM's fast
    /// page fault). `None`: there is no leaf, or `change` wants none of it.
    pub fn upgrade_present(&self, gfn: Gfn, change: impl FnOnce(Leaf) -> Option<Leaf>) -> Option<Mapped> {
        let place = self.find(gfn)?;
        let Entry::Leaf(found) = place.said() else { return None };
        let wanted = change(found)?;
        debug_assert_eq!((wanted.pfn, wanted.size), (found.pfn, found.size));
        let merged = found.merged(wanted);
        if merged == found {
            return Some(Mapped::Spurious);
        }
        Some(place.exchange(F::encode_leaf(merged).ok()?))
    }

    /// Goes down to the entry of `gfn` at `target`, linking what is missing. `None`: lost a race.
    #[inline]
    fn descend(
        &self,
        gfn: Gfn,
        target: Level,
        cache: &mut TableCache<M>,
    ) -> Result<Option<Place<'_, F, M>>, MapError> {
        if !self.reach().contains(gfn) {
            return Err(MapError::OutOfReach { gfn, bits: F::GPA_BITS });
        }
        let mut table = self.root_table();
        loop {
            let place = table.look(gfn);
            if place.level == target {
                return Ok(Some(place));
            }
            match place.child {
                Some(child) => table = child,
                // Linked, by us: look again and go down.
                None if place.raw == F::ABSENT && self.link(&place, cache)? == Mapped::Fixed => {}
                None if place.raw == F::ABSENT => return Ok(None),
                None => return Ok(Some(place)),
            }
        }
    }

    #[cold]
    fn link(&self, place: &Place<'_, F, M>, cache: &mut TableCache<M>) -> Result<Mapped, MapError> {
        let child = cache.take(&self.memory).ok_or(MapError::NoTable(place.level))?;
        let linked = F::encode_table(child).map(|raw| place.exchange(raw));
        if linked != Ok(Mapped::Fixed) {
            // Never visible to anyone, and zero still.
            cache.put_back(child);
        }
        Ok(linked?)
    }

    /// Caches that `gfn` is no memory under this `generation` of the memslots. `None`: the format cannot.
    pub fn cache_mmio(
        &self,
        gfn: Gfn,
        generation: u64,
        cache: &mut TableCache<M>,
    ) -> Result<Option<Mapped>, MapError> {
        let Some(raw) = F::encode_mmio(generation) else { return Ok(None) };
        let Some(place) = self.descend(gfn, PageSize::Size4K.level(), cache)? else {
            return Ok(Some(Mapped::LostRace));
        };
        match place.said() {
            Entry::Mmio(_) if place.raw == raw => Ok(Some(Mapped::Spurious)),
            Entry::Absent | Entry::Mmio(_) => Ok(Some(place.exchange(raw))),
            Entry::Foreign => Err(foreign(gfn, &place)),
            // Memory after all, or about to be: whoever installed it knows better.
            Entry::Leaf(_) | Entry::Frozen | Entry::Table(_) => Ok(Some(Mapped::LostRace)),
        }
    }

    /// The cached MMIO entry of `gfn`.
    pub fn cached_mmio(&self, gfn: Gfn) -> CachedMmio {
        match self.walk(gfn).entry {
            Entry::Mmio(generation) => CachedMmio::Generation(generation),
            _ => CachedMmio::Gone,
        }
    }
}

fn foreign<F: Format, M: TableMemory>(gfn: Gfn, place: &Place<'_, F, M>) -> MapError {
    MapError::Foreign { gfn, level: place.level, raw: place.raw }
}

impl Leaf {
    /// The frame behind `gfn`, which lies in the block that the leaf maps.
    #[inline]
    pub fn pfn_of(&self, gfn: Gfn) -> Pfn {
        Pfn::new(self.pfn.as_u64() + (gfn.as_u64() & (self.size.frames() - 1)))
    }

    /// The part of it around `gfn`, one size smaller.
    fn narrowed(self, gfn: Gfn) -> Self {
        let size = match self.size {
            PageSize::Size1G => PageSize::Size2M,
            PageSize::Size2M | PageSize::Size4K => PageSize::Size4K,
        };
        let pfn = Pfn::new(self.pfn_of(gfn).as_u64() & !(size.frames() - 1));
        Self { pfn, size, ..self }
    }

    /// What either allows.
    fn merged(self, other: Self) -> Self {
        Self {
            writable: self.writable.max(other.writable),
            execute: self.execute.union(other.execute),
            accessed: self.accessed || other.accessed,
            ..self
        }
    }
}
