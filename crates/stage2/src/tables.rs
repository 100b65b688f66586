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

mod error;
mod map;
mod mmio;
mod reach;
mod upgrade;
mod walk;

use core::fmt;
use core::marker::PhantomData;

use afterimage_mmu::{Gfn, GfnRange, Level, Pfn};

use crate::format::Format;
use crate::memory::{TableCache, TableMemory};

pub use error::MapError;
pub(crate) use reach::TableRef;
pub use walk::{Translation, Walked};

/// Stage-2 tables of one address space, in format `F`, in memory `M`.
pub struct Tables<F: Format, M: TableMemory> {
    memory: M,
    root: Pfn,
    format: PhantomData<F>,
}

impl<F: Format, M: TableMemory> fmt::Debug for Tables<F, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables").field("format", &F::NAME).field("root", &self.root).finish_non_exhaustive()
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
