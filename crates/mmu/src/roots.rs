//! Dropping every translation of a virtual machine at once, fast: new, empty roots in place of the old.
//!
//! | step | `mmu_lock` | who may use the old tables from here on |
//! |---|---|---|
//! | memory for the new roots | not held | |
//! | the new roots take the place of the old | held for write | vCPUs that have loaded them; who walks and has found them |
//! | every vCPU is asked to reload its root, kicked out of the guest, and waited for | held on | who walks |
//! | what is below the old roots is zapped, leaf by leaf, then table by table from the lowest level up | held, given up between two steps | |
//! | the tables are freed | not held | nobody: waited for |
//!
//! The guest faults again on whatever it touches, and finds it mapped by the new tables.
//!
//! * **The request lies in the critical section of the swap.** So the next holder of the lock need not look at the old tables: an
//!   invalidation that finds nothing below the new root is right, since no vCPU enters the guest with the old one any more.
//! * **A reload forgets everything** that was cached, so nothing below an old root is flushed (KVM's rule F4).
//! * **A fault** installs below the root that it finds under its witness. If that was replaced meanwhile, what it installs is
//!   seen by nobody, and goes with the rest; the guest faults once more.
//! * **Marks are kept**: what was written reaches the dirty log, what was used the host. The request comes first, so that no
//!   vCPU sets a mark that the zap has passed.
//!
//! Source: Linux `kvm_mmu_zap_all_fast`, `kvm_tdp_mmu_invalidate_roots`, `kvm_tdp_mmu_zap_invalidated_roots`.

use crate::guest_mmu::GuestMmu;
use crate::host::{Blocking, SecondaryMmu, Zap};
use crate::zap::ZapWalk;

impl<S: SecondaryMmu> GuestMmu<S> {
    /// Drops every translation that there is at the time of the call. Faults go on meanwhile, and install new ones.
    ///
    /// Where the tables have no roots that can be replaced, or there is no memory for new ones, each slot is invalidated.
    pub fn zap_all(&self) {
        // The log of a slot and the slots themselves stay until the old tables have been gone through.
        let _update = self.updates.write();
        let mut walk = ZapWalk::start(self, Blocking::Allowed);
        let replaced = self.secondary().replace_roots(self.slot_set(), &mut walk);
        walk.finish();
        if !replaced {
            for slot in self.slot_set().iter() {
                drop(self.invalidate(slot.hvas(), Zap::Unmap, Blocking::Allowed));
            }
        }
    }
}
