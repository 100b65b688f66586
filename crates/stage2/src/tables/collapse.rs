//! A table of leaves that together say what one large leaf says becomes that leaf.
//!
//! Every entry of the table is frozen first: from there on nobody can give one part other permissions, or install below.
//! What does not fit is found by then, and the table is given back as it was, with no mark less.
//!
//! Where nothing must be broken first, the link becomes the leaf in one exchange, and for a while CPUs hold both, which
//! say the same, but that single frames may be fetched from where the large page may not. The table is freed after a flush
//! all the same (rule F3): paging-structure caches point to it.
//!
//! Source: Linux `recover_huge_pages_range`; the freezing is our own, since here faults hold no lock that excludes it.

use afterimage_mmu::{Gfn, GfnRange, PageSize, Pfn};

use super::freeze::{Undo, publish};
use super::split::smaller;
use super::{Removed, Tables, entry_block};
use crate::format::{Entry, Execute, Format, Leaf};
use crate::memory::TableMemory;
use crate::mutation::{self, Mutation};
use crate::sync::Ordering;

impl<F: Format, M: TableMemory> Tables<F, M> {
    /// Puts one leaf of `size` in the place of the table around `gfn`, if its leaves are contiguous, and equal but for their
    /// marks and for what a dirty log has protected, which must be over: any part that may be written makes all of it so. It allows of
    /// fetching what they do, and `most` at most. The table is unlinked; no frame is taken away. `None`: it is as it was, with no
    /// mark less.
    ///
    /// Source: Linux `recover_huge_pages_range`.
    ///
    /// `flush` as for [`split`](Self::split). The caller knows that a leaf of `size` may be mapped there.
    pub fn collapse(
        &self,
        gfn: Gfn,
        size: PageSize,
        most: Execute,
        flush: impl FnOnce(GfnRange),
    ) -> Option<Removed> {
        let (place, table) =
            self.link_above(gfn, smaller(size).level()).filter(|_| size > PageSize::Size4K)?;
        let (table, child) = (table?, place.child?);
        let looking = mutation::unless(Mutation::FreezeRelaxed, Ordering::Acquire);
        let first = match child.entries().first().map(|entry| entry.load(looking)) {
            Some(raw) => match F::decode(raw, child.level()) {
                Entry::Leaf(leaf) => leaf,
                _ => return None,
            },
            None => return None,
        };
        let part = |index: usize| Leaf {
            pfn: Pfn::new(first.pfn.as_u64() + index as u64 * first.size.frames()),
            ..first
        };
        F::encode_leaf(Leaf { size, ..first }).ok()?;
        let fits = |index: usize, said: Entry| match said {
            Entry::Leaf(leaf) => (leaf.unlogged() == part(index).unlogged()).then_some(leaf),
            _ => None,
        };
        // A look before anything is touched: most tables do not fit.
        let mut entries = child.entries().iter().enumerate();
        if !entries.all(|(index, entry)| fits(index, F::decode(entry.load(looking), child.level())).is_some())
        {
            return None;
        }
        let give_back = |count: usize, large: Leaf| {
            let Leaf { writable, accessed, .. } = large;
            child.thaw(count, |index| {
                let leaf = Leaf { writable, accessed, ..part(index) };
                F::encode_leaf(leaf).expect("the leaf was decoded, and has more marks")
            });
        };
        let mut large = Leaf { size, ..first };
        let mut merge = |index, said| match fits(index, said) {
            Some(leaf) => {
                large.writable = large.writable.max(leaf.writable);
                large.accessed |= leaf.accessed;
                true
            }
            None => false,
        };
        if mutation::active(Mutation::CollapseWithoutFreezing) {
            for (index, entry) in child.entries().iter().enumerate() {
                merge(index, F::decode(entry.load(looking), child.level()));
            }
        } else if let Err(stopped) = child.freeze(merge) {
            give_back(stopped.at, large);
            return None;
        }
        if mutation::active(Mutation::CollapseLosesDirty) {
            large.writable = first.writable;
        }
        let gfns = entry_block(gfn, place.level);
        let large = Leaf { execute: large.execute.intersection(most), ..large };
        let raw = F::encode_leaf(large).expect("it could be encoded with fewer marks");
        let next = if F::BREAK_BEFORE_MAKE { F::FROZEN } else { raw };
        let ordering = mutation::unless(Mutation::ReplaceRelaxed, Ordering::Release);
        if place.entry.compare_exchange(place.raw, next, ordering, Ordering::Relaxed).is_err() {
            give_back(child.entries().len(), large);
            return None;
        }
        self.end_era();
        if F::BREAK_BEFORE_MAKE {
            let undo = Undo::new(|| {
                give_back(child.entries().len(), large);
                publish(place.entry, place.raw);
            });
            flush(gfns);
            undo.forget();
            publish(place.entry, raw);
        }
        Some(Removed { gfns, frames: 0, table: Some(table) })
    }
}
