//! Tables that any number of threads read and change at once.
//!
//! # States of an entry, and who may move it
//!
//! ```text
//! absent ──link──► table ──unlink──► absent            (the table is empty, or frozen as a whole)
//! absent, MMIO ──map──► leaf ──upgrade, protect, age, mark──► leaf, same frame
//!                        └──take away──► absent
//! absent, MMIO ──cache──► MMIO
//! large leaf ──split──► table of leaves that say the same ──collapse──► large leaf
//! any ──freeze──► frozen ──► what its owner says
//! ```
//!
//! Every move is one compare-exchange against the word that was looked at, by any thread at any time; exactly one of
//! those who try wins. Hardware moves too: it sets marks. Never does a leaf become a leaf of another frame: there is
//! a zap and a flush in between, or [`MapError::Conflict`].
//!
//! # Frozen
//!
//! A frozen entry belongs to the thread that froze it, which alone writes it next. An install that meets one backs off; a
//! zap waits, and looks again from the root, since the entry may be in a table that is gone by then (or say by then that
//! it was split). Entries are frozen
//! for three changes, each of which holds `mmu_lock` from the first frozen entry to the last:
//!
//! * **Removal and collapse** freeze every entry of a table, so that nobody installs below, and then unlink it. The
//!   table's entries stay frozen until it is freed.
//! * **Split and collapse where the architecture demands break-before-make** freeze the one entry that changes, flush,
//!   and then publish.
//!
//! # Retries
//!
//! An install that loses goes back outward ([`Mapped::LostRace`](afterimage_mmu::Mapped)) and never tries again by itself:
//! why it lost may be an invalidation. The page of a table that was not linked goes back to the vCPU's cache at once.
//!
//! # How long a table lives
//!
//! As long as anybody can find it: whoever has a borrow of [`Tables`] may follow every link that he finds. [`Stage2`] gives
//! out such borrows for the life of a [`Walking`](afterimage_mmu::Walking) alone; a table that was unlinked it hands to the
//! engine, which flushes, waits until everyone has moved on who walked at the time, and gives it back to be freed.
//! References to tables are made in one place, `TableRef::new`, and carry that borrow. What a vCPU remembers from one install to
//! the next is a table's number, good for as long as none was taken out (`tables/near.rs`). Tables that stand alone, in no
//! engine, may be borrowed at will: nobody frees theirs before the structure goes.
//!
//! Source: Linux `kvm_tdp_mmu_map`, `tdp_mmu_map_handle_target_level`, `tdp_mmu_link_sp`, `handle_removed_pt`,
//! `tdp_mmu_split_huge_page`.
//!
//! [`Stage2`]: crate::Stage2

mod collapse;
mod error;
mod freeze;
mod map;
mod mmio;
mod near;
mod reach;
mod remove;
mod split;
mod upgrade;
mod walk;

use core::fmt;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;

use afterimage_mmu::{Gfn, GfnRange, Level, Pfn};

use crate::format::Format;
use crate::memory::{TableCache, TableMemory};
use crate::sync::{AtomicU64, Ordering, Word};

pub use error::MapError;
pub(crate) use reach::TableRef;
pub(crate) use remove::Next;
pub use remove::Removed;
pub use split::Split;
pub use walk::{Translation, Walked};

/// In tables whose root was taken away.
const NO_ROOT: u64 = u64::MAX;

/// Stage-2 tables of one address space, in format `F`, in memory `M`.
///
/// What takes `&self` may be called by any thread at any time, without a lock, but for what [`split`](Self::split) asks of its caller.
/// No call allocates but [`new`](Self::new) and [`top_up`](Self::top_up), and none makes a CPU forget anything by itself: who takes
/// leaves, tables or permissions away flushes. No leaf ever becomes a leaf of another frame: zap and flush first. While a thread
/// [collapses](Self::collapse) or [unlinks](Self::unlink) a table, or breaks an entry before it is made, installs there back off
/// ([`Mapped::LostRace`](afterimage_mmu::Mapped)), and zaps spin until it is done. Dropping the tables frees every page that is linked.
pub struct Tables<F: Format, M: TableMemory> {
    memory: M,
    /// The frame of the root, or [`NO_ROOT`].
    root: Word,
    /// See the module `near`.
    era: AtomicU64,
    format: PhantomData<F>,
}

impl<F: Format, M: TableMemory> fmt::Debug for Tables<F, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables").field("format", &F::NAME).field("root", &self.root()).finish_non_exhaustive()
    }
}

impl<F: Format, M: TableMemory> Tables<F, M> {
    /// Empty tables, of [`Format::ROOT_PAGES`] pages; `None` if `memory` has no room for the root, or gives one that hardware could
    /// not be told of.
    pub fn new(memory: M) -> Option<Self> {
        let root = memory.allocate(F::ROOT_PAGES)?;
        let era = AtomicU64::new(near::new_era());
        let tables = Self { memory, root: Word::new(root.as_u64()), era, format: PhantomData };
        // Checked with the structure complete, so that a root out of reach is freed.
        F::encode_table(root).is_ok().then_some(tables)
    }

    /// Empty tables in the same memory; `None` if that has no room.
    pub(crate) fn empty_like(&self) -> Option<Self> {
        Self::new(self.memory.clone())
    }

    /// The root's first frame, for the register that hardware walks from until it is replaced.
    #[inline]
    pub fn root(&self) -> Pfn {
        Pfn::new(self.root.load(Ordering::Acquire))
    }

    /// Gives these tables the root of `other`, which has all that they had until now.
    ///
    /// Who walks may go on below the old root: `other` may be dropped when that has been [taken](Self::take_root), or when every
    /// borrow of these tables has ended that was alive at the exchange.
    pub(crate) fn exchange_roots(&self, other: &mut ManuallyDrop<Self>) {
        *other.root.get_mut() = self.root.swap(*other.root.get_mut(), Ordering::AcqRel);
        self.end_era();
    }

    /// The guest frames that the tables reach: `[0, 2^(GPA_BITS - 12))`.
    pub fn reach(&self) -> GfnRange {
        GfnRange::new(Gfn::new(0), Gfn::new(1 << (F::GPA_BITS - 12)))
    }

    /// Tables that one install links at most: one for each level below the root.
    pub(crate) const MOST_LINKED: usize = F::ROOT_LEVEL.number() as usize - 1;

    /// Refills a cache with the pages that one install can link, one for each level below the root; `false` if there is no memory. Before the critical section (KVM: `mmu_topup_memory_caches`).
    #[inline]
    pub fn top_up(&self, cache: &mut TableCache<M>) -> bool {
        cache.top_up(&self.memory, Self::MOST_LINKED)
    }

    /// Fills a cache, as far as there is memory; `false` if it is empty all the same.
    pub(crate) fn top_up_whole(&self, cache: &mut TableCache<M>) -> bool {
        cache.top_up(&self.memory, usize::MAX) || !cache.is_empty()
    }
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
