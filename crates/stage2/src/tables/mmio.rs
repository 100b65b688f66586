//! Entries that say: no memory here.

use afterimage_mmu::{CachedMmio, Gfn, Mapped, PageSize};

use super::map::foreign;
use super::{MapError, Tables};
use crate::format::{Entry, Format};
use crate::memory::{TableCache, TableMemory};

impl<F: Format, M: TableMemory> Tables<F, M> {
    /// Caches that `gfn` is no memory under this `generation` of the memslots. `None`: the format cannot, or the generation has more
    /// than [`MMIO_GENERATION_BITS`](crate::MMIO_GENERATION_BITS) bits.
    ///
    /// Source: Linux `handle_mmio_page_fault`, `make_mmio_spte`.
    ///
    /// # Errors
    /// As for [`map`](Self::map): the frame is out of reach, the cache is empty, or the entry is not one of ours.
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
