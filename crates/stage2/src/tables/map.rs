//! Installing a leaf, and the tables on the way to it.

use afterimage_mmu::{Gfn, Level, Mapped, Pfn};

use super::reach::Place;
use super::split::smaller;
use super::upgrade::{Upgrade, upgrade};
use super::{MapError, Split, Tables};
use crate::format::{Entry, Format, Leaf};
use crate::memory::{TableCache, TableMemory};
use crate::mutation::{self, Mutation};
use crate::sync::Ordering;

impl<F: Format, M: TableMemory> Tables<F, M> {
    /// Maps the block of `leaf.size` around `gfn` to `leaf`.
    ///
    /// Where tables for smaller pages exist already, only the smaller page around `gfn` is mapped. Where a leaf of the
    /// same frame exists, it gains what `leaf` allows and it does not (`Fixed`), or allows all of it (`Spurious`); a larger
    /// one is split first, so that its other frames gain nothing (`LargerLeaf`: it must be [broken](Self::split) for that).
    /// The caller has topped up `cache`, and knows that `leaf` is current.
    #[inline]
    pub fn map(&self, gfn: Gfn, leaf: Leaf, cache: &mut TableCache<M>) -> Result<Mapped, MapError> {
        // Nearly always the tables are there and the entry says nothing. Then the exchange is the look, too. And mostly it is in
        // the table that the last install went to.
        let raw = F::encode_leaf(leaf)?;
        let level = leaf.size.level();
        let ordering = mutation::unless(Mutation::InstallWithoutRelease, Ordering::AcqRel);
        let near = self.near_entry(gfn, level, cache);
        if let Some(entry) = near.or_else(|| self.linked_entry(gfn, level, cache))
            && entry.compare_exchange(F::ABSENT, raw, ordering, Ordering::Relaxed).is_ok()
        {
            return Ok(Mapped::Fixed);
        }
        self.map_into(gfn, raw, level, cache)
    }

    /// Links what is missing, and looks at what is there. Takes the leaf as an entry of `level`, in a register: so that the
    /// way that is nearly always gone stores nothing for this one.
    #[cold]
    fn map_into(
        &self,
        gfn: Gfn,
        raw: u64,
        level: Level,
        cache: &mut TableCache<M>,
    ) -> Result<Mapped, MapError> {
        let Entry::Leaf(mut wanted) = F::decode(raw, level) else {
            unreachable!("a leaf that was encoded is a leaf");
        };
        let mut has_split = false;
        loop {
            let raw = F::encode_leaf(wanted)?;
            let place = match self.descend(gfn, wanted.size.level(), cache) {
                Ok(Some(place)) => place,
                Ok(None) => return Ok(Mapped::LostRace),
                Err(error) => return lost_if_split(has_split, error),
            };
            match place.said() {
                Entry::Absent | Entry::Mmio(_) => return Ok(place.exchange(raw)),
                Entry::Frozen if mutation::active(Mutation::FrozenOverwritten) => {
                    return Ok(place.exchange(raw));
                }
                Entry::Frozen => return Ok(Mapped::LostRace),
                Entry::Leaf(found) => match upgrade(gfn, found, wanted)? {
                    Upgrade::None => return Ok(Mapped::Spurious),
                    Upgrade::To(leaf) => return Ok(place.exchange(F::encode_leaf(leaf)?)),
                    Upgrade::Smaller if F::BREAK_BEFORE_MAKE => return Ok(Mapped::LargerLeaf),
                    Upgrade::Smaller => match self.split_at(place, found, gfn, cache, |_| ()) {
                        Ok(Split::Done(_)) => has_split = true,
                        Ok(Split::NotLarge | Split::LostRace) => return Ok(Mapped::LostRace),
                        Err(error) => return lost_if_split(has_split, error),
                    },
                },
                Entry::Foreign => return Err(foreign(gfn, &place)),
                Entry::Table(_) => wanted = wanted.narrowed(gfn),
            }
        }
    }

    /// Goes down to the entry of `gfn` at `target`, linking what is missing. `None`: lost a race.
    #[inline]
    pub(super) fn descend(
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
}

/// Pages for tables are there for one way down. Who has split and needs another was overtaken by one who collapsed what was split.
fn lost_if_split(has_split: bool, error: MapError) -> Result<Mapped, MapError> {
    match error {
        MapError::NoTable(_) if has_split => Ok(Mapped::LostRace),
        error => Err(error),
    }
}

pub(super) fn foreign<F: Format, M: TableMemory>(gfn: Gfn, place: &Place<'_, F, M>) -> MapError {
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
        let size = smaller(self.size);
        let pfn = Pfn::new(self.pfn_of(gfn).as_u64() & !(size.frames() - 1));
        Self { pfn, size, ..self }
    }
}
