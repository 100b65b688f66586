//! Changing the marks and the permissions of a leaf that is there.

use afterimage_mmu::{Gfn, Mapped};

use super::reach::Place;
use super::{MapError, Tables};
use crate::format::{Entry, Format, Leaf, Writable};
use crate::memory::TableMemory;
use crate::mutation::{self, Mutation};
use crate::sync::Ordering;

impl<F: Format, M: TableMemory> Tables<F, M> {
    /// Lets `change` give the present leaf of `gfn` other marks or permissions, by one compare-exchange (KVM's fast
    /// page fault). `None`: there is no leaf, or `change` wants none of it, or the format cannot say what it wants.
    ///
    /// What `change` gives allows at least what is there, for the same frame and size. Nothing need be flushed.
    ///
    /// Source: Linux `fast_page_fault`.
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

    /// Writes `new` over `old`, the leaf that the place was seen to hold; `Err`: the word is another by now.
    pub(super) fn change(&self, place: &Place<'_, F, M>, old: Leaf, new: Leaf) -> Result<(), u64> {
        if new == old {
            return Ok(());
        }
        let raw =
            F::encode_leaf(new).expect("a decoded leaf can be encoded with other marks and permissions");
        let ordering = mutation::unless(Mutation::MarkRelaxed, Ordering::Acquire);
        place.entry.compare_exchange(place.raw, raw, ordering, ordering).map(drop)
    }
}

/// What a leaf that is there lacks of what is wanted.
pub(super) enum Upgrade {
    /// Nothing.
    None,
    /// It is to become this.
    To(Leaf),
    /// Something, for a part of it only.
    Smaller,
}

/// Compares what maps `gfn` with what is to map it.
pub(super) fn upgrade(gfn: Gfn, found: Leaf, wanted: Leaf) -> Result<Upgrade, MapError> {
    let conflicts = found.pfn_of(gfn) != wanted.pfn_of(gfn) || found.memory != wanted.memory;
    if conflicts && mutation::active(Mutation::ConflictOverwritten) {
        return Ok(Upgrade::To(wanted));
    }
    if conflicts {
        return Err(MapError::Conflict { gfn, found, wanted });
    }
    let merged = found.merged(wanted);
    Ok(match () {
        () if merged == found => Upgrade::None,
        // A mark alone is no reason to split.
        () if found.size != wanted.size && merged.without_marks() != found.without_marks() => {
            Upgrade::Smaller
        }
        () => Upgrade::To(merged),
    })
}

impl Leaf {
    /// The same with both marks, as far as it may have them: to compare what leaves allow.
    pub(super) fn without_marks(self) -> Self {
        let writable = if self.writable.is_allowed() { Writable::Dirty } else { self.writable };
        Self { writable, accessed: true, ..self }
    }

    /// The same, with both marks where nothing but a dirty log that is over forbids them.
    pub(super) fn unlogged(self) -> Self {
        match self.writable {
            Writable::Protected => Self { writable: Writable::Dirty, accessed: true, ..self },
            _ => self.without_marks(),
        }
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
