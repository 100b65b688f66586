//! Large pages of a memslot, split and recovered as a whole: before writes are logged, and after.
//!
//! The guest notices neither. A split ahead of time spares each vCPU the split at its first write; a recovery gives the
//! large pages back when logging is over. Both run under `mmu_lock` and give way like a zap.
//!
//! A fault that finds a larger page in its way splits that one page, by its install, or, where the entry must be broken first, under
//! `mmu_lock` here. Then the fault is retried, and finds a page of its own size.
//!
//! Where large pages are never executable, a fetch splits them, and they are recovered a few at a time.
//!
//! Source: Linux `kvm_mmu_slot_try_split_huge_pages`, `kvm_mmu_recover_huge_pages`, `kvm_recover_nx_huge_pages`.

use core::num::NonZeroU32;

use crate::addr::Gfn;
use crate::guest_mmu::GuestMmu;
use crate::host::{Blocking, SecondaryMmu};
use crate::slots::{Memslot, SlotError, SlotId, SpaceId};
use crate::zap::ZapWalk;

impl<S: SecondaryMmu> GuestMmu<S> {
    /// Maps every frame of a slot singly that a larger page maps.
    ///
    /// # Errors
    /// The slot does not exist; or there is no memory for the tables, and some large pages are left.
    pub fn split_large_pages(&self, space: SpaceId, id: SlotId) -> Result<(), SlotError> {
        let _update = self.updates.write();
        let slot = self.slot_set().get(space, id)?;
        let mut walk = ZapWalk::start(self, Blocking::Allowed);
        let complete = self.secondary().split_large(&slot, slot.gfns(), &mut walk);
        walk.finish();
        if complete { Ok(()) } else { Err(SlotError::NoMemory(id)) }
    }

    /// Maps frames of a slot by larger pages again, wherever slot and pages allow it.
    ///
    /// # Errors
    /// The slot does not exist.
    pub fn recover_large_pages(&self, space: SpaceId, id: SlotId) -> Result<(), SlotError> {
        let _update = self.updates.write();
        let slot = self.slot_set().get(space, id)?;
        let mut walk = ZapWalk::start(self, Blocking::Allowed);
        self.secondary().recover_large(&slot, slot.gfns(), &mut walk);
        walk.finish();
        Ok(())
    }

    /// Takes blocks away that are mapped singly because they were fetched from, where large pages are never executable, so that they
    /// become large again: one in `ratio` of them, rounded up. To be called once a period; a block lives about `ratio` periods. How many
    /// blocks it was.
    ///
    /// Blocks of slots whose writes are logged stay as they are, until that is over.
    pub fn recover_nx_huge_pages(&self, ratio: NonZeroU32) -> u64 {
        let _update = self.updates.write();
        let slots = self.slot_set();
        let mut walk = ZapWalk::start(self, Blocking::Allowed);
        let slot_of = |space, gfn| slots.find(space, gfn, &mut 0);
        let recovered = self.secondary().recover_nx_huge_pages(ratio, &slot_of, &mut walk);
        walk.finish();
        recovered
    }

    /// Splits the larger page around `gfn` for a fault, which keeps the slot in place and holds no witness. The page maps what it
    /// mapped, so that nothing has to be verified.
    pub(crate) fn split_around(
        &self,
        slot: &Memslot,
        gfn: Gfn,
        cache: &mut S::Cache,
    ) -> Result<(), S::Error> {
        let mut walk = ZapWalk::start(self, Blocking::Allowed);
        let split = self.secondary().split_around(slot, gfn, cache, &mut walk);
        walk.finish();
        split
    }
}
