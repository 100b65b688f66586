//! A large leaf becomes a table of leaves that say the same.
//!
//! Nobody who translates by it notices, so nothing is flushed (rule F7), except where the architecture
//! demands [break-before-make](crate::Format::BREAK_BEFORE_MAKE): there the entry is frozen, flushed, and then published.
//!
//! Source: Linux `tdp_mmu_split_huge_page`, arm64 `stage2_split_walker`.

use afterimage_mmu::{Gfn, GfnRange, PageSize, Pfn};

use super::freeze::{Undo, publish};
use super::reach::Place;
use super::{MapError, Tables, entry_block};
use crate::format::{Entry, Format, Leaf, Writable};
use crate::memory::{TableCache, TableMemory};
use crate::mutation::{self, Mutation};
use crate::sync::Ordering;

/// What became of a split.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// A table of leaves of this size is in the place of the leaf.
    Done(PageSize),
    /// No large leaf maps the frame.
    NotLarge,
    /// Someone else changed the entry at the same time.
    LostRace,
}

impl<F: Format, M: TableMemory> Tables<F, M> {
    /// Splits the large leaf that maps `gfn` by one level, with a table from `cache`.
    ///
    /// `flush` makes every CPU forget the frames, before it returns. It is asked where the format demands it, and then the
    /// caller holds what keeps others from splitting, collapsing and zapping meanwhile.
    ///
    /// Source: Linux `tdp_mmu_split_huge_page`, arm64 `stage2_split_walker`.
    ///
    /// # Errors
    /// `cache` has no page ([`MapError::NoTable`]), or one that the format cannot link ([`MapError::Refused`]); nothing has changed.
    pub fn split(
        &self,
        gfn: Gfn,
        cache: &mut TableCache<M>,
        flush: impl FnOnce(GfnRange),
    ) -> Result<Split, MapError> {
        let Some(place) = self.find(gfn) else { return Ok(Split::NotLarge) };
        match place.said() {
            Entry::Leaf(leaf) if leaf.size > PageSize::Size4K => {
                self.split_at(place, leaf, gfn, cache, flush)
            }
            Entry::Frozen => Ok(Split::LostRace),
            _ => Ok(Split::NotLarge),
        }
    }

    pub(super) fn split_at(
        &self,
        mut place: Place<'_, F, M>,
        mut leaf: Leaf,
        gfn: Gfn,
        cache: &mut TableCache<M>,
        flush: impl FnOnce(GfnRange),
    ) -> Result<Split, MapError> {
        let small = leaf.first_part().size;
        let page = cache.take(&self.memory).ok_or(MapError::NoTable(place.level))?;
        let link = match F::encode_table(page) {
            Ok(link) => link,
            Err(refused) => {
                cache.put_back(page);
                return Err(refused.into());
            }
        };
        let breaks = F::BREAK_BEFORE_MAKE && !mutation::active(Mutation::SplitWithoutBreak);
        let ordering = mutation::unless(Mutation::ReplaceRelaxed, Ordering::Release);
        loop {
            self.fill(page, &place, leaf);
            let next = if breaks { F::FROZEN } else { link };
            let now = match place.entry.compare_exchange(place.raw, next, ordering, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => now,
            };
            // Hardware's marks come at any time, and belong into every part; another change is someone else's.
            place.raw = now;
            match place.said() {
                Entry::Leaf(marked) if marked.is_marked_more_than(leaf) => leaf = marked,
                _ => {
                    self.empty(page, &place);
                    cache.put_back(page);
                    return Ok(Split::LostRace);
                }
            }
        }
        if breaks {
            let undo = Undo::new(|| {
                publish(place.entry, place.raw);
                self.empty(page, &place);
                cache.put_back(page);
            });
            flush(entry_block(gfn, place.level));
            undo.forget();
            publish(place.entry, link);
        }
        Ok(Split::Done(small))
    }

    /// Makes a table that nobody can find yet say what `leaf` says.
    fn fill(&self, page: Pfn, place: &Place<'_, F, M>, leaf: Leaf) {
        let mut first = leaf.first_part();
        if mutation::active(Mutation::SplitLosesDirty) {
            first.writable = first.writable.min(Writable::Clean);
        }
        for (pfn, entry) in (leaf.pfn.as_u64()..)
            .step_by(first.size.frames() as usize)
            .zip(self.unlinked(page, place.level).entries())
        {
            let part = Leaf { pfn: Pfn::new(pfn), ..first };
            let raw = F::encode_leaf(part).expect("a part of a decoded leaf can be encoded");
            entry.store(raw, Ordering::Relaxed);
        }
    }

    /// Makes a table that nobody has found say nothing again, as pages in a cache do.
    fn empty(&self, page: Pfn, place: &Place<'_, F, M>) {
        for entry in self.unlinked(page, place.level).entries() {
            entry.store(F::ABSENT, Ordering::Relaxed);
        }
    }
}

impl Leaf {
    /// The first of the leaves, one size smaller, that say the same.
    pub(super) fn first_part(self) -> Self {
        Self { size: smaller(self.size), ..self }
    }

    /// Whether it is `other` with no mark less.
    fn is_marked_more_than(self, other: Self) -> bool {
        let unmarked = Self { accessed: other.accessed, writable: other.writable, ..self };
        unmarked == other
            && self.accessed >= other.accessed
            && self.writable >= other.writable
            && self.writable.is_allowed() == other.writable.is_allowed()
    }
}

/// One size smaller; there is nothing below 4 KiB.
pub(super) fn smaller(size: PageSize) -> PageSize {
    match size {
        PageSize::Size1G => PageSize::Size2M,
        PageSize::Size2M | PageSize::Size4K => PageSize::Size4K,
    }
}
