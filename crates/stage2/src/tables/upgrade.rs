//! Changing the marks and the permissions of a leaf that is there.

use afterimage_mmu::{Gfn, Mapped};

use super::reach::Place;
use super::{MapError, Tables};
use crate::format::{Entry, Format, Leaf};
use crate::memory::TableMemory;
use crate::sync::Ordering;

impl<F: Format, M: TableMemory> Tables<F, M> {
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

    pub(super) fn upgrade(
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

    /// Writes `new` over `old`, the leaf that the place was seen to hold; `Err`: the word is another by now.
    pub(super) fn change(&self, place: &Place<'_, F, M>, old: Leaf, new: Leaf) -> Result<(), u64> {
        if new == old {
            return Ok(());
        }
        let raw =
            F::encode_leaf(new).expect("a decoded leaf can be encoded with other marks and permissions");
        place.entry.compare_exchange(place.raw, raw, Ordering::AcqRel, Ordering::Acquire).map(drop)
    }
}

impl Leaf {
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
