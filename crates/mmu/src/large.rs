//! Large pages of a memslot, split and recovered as a whole: before writes are logged, and after.
//!
//! The guest notices neither. A split ahead of time spares each vCPU the split at its first write; a recovery gives the
//! large pages back when logging is over. Both run under `mmu_lock` and give way like a zap.
//!
//! A fault that finds a larger page in its way splits that one page, by its install, or, where the entry must be broken first, under
//! `mmu_lock` here. Then the fault is retried, and finds a page of its own size.
//!
//! Source: Linux `kvm_mmu_slot_try_split_huge_pages`, `kvm_mmu_recover_huge_pages`.

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
