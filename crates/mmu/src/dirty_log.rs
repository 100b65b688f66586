//! Dirty logging of a memslot: who has it logs which of its frames the guest writes, round after round.
//!
//! | step | by protection | by marks |
//! |---|---|---|
//! | start | every frame is write-protected (unless all bits are set at first) | the same |
//! | first write of a round | faults; the fast path makes the entry writable, then the bit is set | the same in the first round; then the hardware sets the entry's mark |
//! | round | bits are taken, their frames protected again, and flushed | marks are taken, and flushed; their bits with the others |
//! | a written translation goes | its bit is set | the same |
//! | stop | permissions come back fault by fault | the same |
//!
//! Rounds and their order: [`dirty_bitmap`](crate::dirty_bitmap). A round is one of
//!
//! * [`GuestMmu::take_dirty_log`]: takes all bits and protects (KVM: `KVM_GET_DIRTY_LOG`);
//! * [`GuestMmu::look_at_dirty_log`], then [`GuestMmu::clear_dirty_log`] for a part at a time (KVM: manual protection): what
//!   is cleared is protected; read the memory after that.
//!
//! All run under the lock that makes memslot updates take turns, and protect under `mmu_lock`, giving way like a zap. Where
//! a vCPU has a [`DirtyRing`](crate::DirtyRing), its own writes go there, and the bitmap has only what no vCPU
//! wrote by itself (written translations that were zapped).
//!
//! Source: Linux `kvm_get_dirty_log_protect`, `kvm_clear_dirty_log_protect`, `kvm_mmu_slot_leaf_clear_dirty`.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::addr::GfnRange;
use crate::dirty_bitmap::{DirtyBitmap, Initially, SlotLog, WORD_FRAMES, runs};
use crate::guest_mmu::GuestMmu;
use crate::host::{Blocking, SecondaryMmu, Zap};
use crate::mutation::{self, Mutation};
use crate::slots::{Memslot, SlotError, SlotFlags, SlotId, SpaceId};
use crate::zap::ZapWalk;

/// How writes are noticed from the second round on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogBy {
    /// The frame is write-protected again: its next write faults.
    #[default]
    Protection,
    /// The mark that hardware sets in the entry is taken away: no write faults, each round looks at every entry. Only where
    /// [`SecondaryMmu::HAS_DIRTY_MARKS`].
    Marks,
}

impl<S: SecondaryMmu> GuestMmu<S> {
    /// Turns dirty logging of a slot on, by protection and with no bit set, or off. A slot is created read-only or not,
    /// for good.
    ///
    /// # Errors
    /// The slot does not exist; or this secondary MMU does not log writes.
    pub fn set_dirty_logging(&self, space: SpaceId, id: SlotId, on: bool) -> Result<(), SlotError> {
        if on {
            return self.start_dirty_log(space, id, LogBy::Protection, Initially::Clean);
        }
        let _update = self.updates.write();
        self.replace(self.slot_set().logged(space, id, SlotFlags::empty(), None)?);
        Ok(())
    }

    /// Starts to log the writes to a slot. With [`Initially::Clean`], what is written after this returns is logged; a log
    /// that was kept is lost.
    ///
    /// # Errors
    /// The slot does not exist; or this secondary MMU does not log writes, or has no marks to log by.
    pub fn start_dirty_log(
        &self,
        space: SpaceId,
        id: SlotId,
        by: LogBy,
        initially: Initially,
    ) -> Result<(), SlotError> {
        let _update = self.updates.write();
        let slot = self.slot_set().get(space, id)?;
        if !S::LOGS_WRITES {
            return Err(SlotError::NoWriteLog(id));
        }
        let flags = match by {
            LogBy::Protection => SlotFlags::LOG_DIRTY,
            LogBy::Marks if S::HAS_DIRTY_MARKS => SlotFlags::LOG_DIRTY | SlotFlags::LOG_BY_MARKS,
            LogBy::Marks => return Err(SlotError::NoDirtyMarks(id)),
        };
        let bitmap = Arc::new(DirtyBitmap::new(slot.frames, initially));
        self.replace(self.slot_set().logged(space, id, flags, Some(bitmap))?);
        let slot = self.slot_set().get(space, id)?;
        if initially == Initially::Clean {
            self.protected(|secondary, walk| secondary.zap(&slot, slot.gfns(), Zap::TrackDirty, walk));
        }
        Ok(())
    }

    /// Takes the whole log of a slot: bit `n % 64` of word `n / 64` says that its frame `n` was written since it was taken
    /// last. What is written from now on is in the next one. Read the memory after this (KVM: `KVM_GET_DIRTY_LOG`).
    ///
    /// # Errors
    /// The slot does not exist, or is not logged.
    pub fn take_dirty_log(&self, space: SpaceId, id: SlotId) -> Result<Vec<u64>, SlotError> {
        let _update = self.updates.write();
        let (slot, bitmap) = self.slot_set().log(space, id)?;
        self.collect_marks(&slot, &bitmap, slot.gfns());
        // Allocated before the lock is taken.
        let mut taken = alloc::vec![0; bitmap.len()];
        self.protected(|secondary, walk| {
            for (index, word) in taken.iter_mut().enumerate() {
                *word = self.take_word(&slot, &bitmap, index, u64::MAX, secondary, walk);
            }
        });
        Ok(taken)
    }

    /// The log of a slot as it is, a bit a frame, with nothing cleared and nothing protected (KVM: `KVM_GET_DIRTY_LOG` with manual
    /// protection).
    ///
    /// # Errors
    /// The slot does not exist, or is not logged.
    pub fn look_at_dirty_log(&self, space: SpaceId, id: SlotId) -> Result<Vec<u64>, SlotError> {
        let _update = self.updates.write();
        let (slot, bitmap) = self.slot_set().log(space, id)?;
        self.collect_marks(&slot, &bitmap, slot.gfns());
        Ok((0..bitmap.len()).map(|index| bitmap.peek(index)).collect())
    }

    /// Clears the bits of `mask` in the log of a slot, from its frame `first` (a multiple of 64) on, and has writes to
    /// those frames that were set noticed again. Their memory is to be read after this (KVM: `KVM_CLEAR_DIRTY_LOG`).
    ///
    /// # Errors
    /// The slot does not exist, or is not logged; `first` is no multiple of 64, or the mask is longer than the log.
    pub fn clear_dirty_log(
        &self,
        space: SpaceId,
        id: SlotId,
        first: u64,
        mask: &[u64],
    ) -> Result<(), SlotError> {
        let _update = self.updates.write();
        let (slot, bitmap) = self.slot_set().log(space, id)?;
        let start = (first / WORD_FRAMES) as usize;
        let fits = start.checked_add(mask.len()).is_some_and(|end| end <= bitmap.len());
        if !first.is_multiple_of(WORD_FRAMES) || !fits {
            return Err(SlotError::NotInLog { id, first, words: mask.len() });
        }
        self.protected(|secondary, walk| {
            for (index, mask) in (start..).zip(mask) {
                self.take_word(&slot, &bitmap, index, *mask, secondary, walk);
            }
        });
        Ok(())
    }

    /// Takes the bits of a word, then has the next write to each frame noticed. In this order: see `dirty_bitmap`.
    fn take_word(
        &self,
        slot: &Memslot,
        bitmap: &DirtyBitmap,
        index: usize,
        mask: u64,
        secondary: &S,
        walk: &mut ZapWalk<'_, S>,
    ) -> u64 {
        let protect = |bits, walk: &mut ZapWalk<'_, S>| {
            // Whose marks were taken is noticed by its mark.
            if !slot.flags.contains(SlotFlags::LOG_BY_MARKS) {
                for gfns in runs(slot, index, bits) {
                    secondary.zap(slot, gfns.intersection(slot.gfns()), Zap::TrackDirty, walk);
                }
            }
        };
        if mutation::active(Mutation::ProtectBeforeTake) {
            protect(bitmap.peek(index) & mask, walk);
            return bitmap.take(index, mask);
        }
        let taken = bitmap.take(index, mask);
        protect(taken, walk);
        taken
    }

    /// Moves the marks of the entries into the bitmap, where writes are noticed by them.
    fn collect_marks(&self, slot: &Memslot, bitmap: &DirtyBitmap, gfns: GfnRange) {
        if slot.flags.contains(SlotFlags::LOG_BY_MARKS) {
            // Where the lock is given up meanwhile, nobody collects: the lock of memslot updates is held.
            let mut log = SlotLog::new(slot, Some(bitmap));
            self.protected(|secondary, walk| {
                secondary.clean(slot, gfns, walk, &mut |written| log.written(written));
            });
        }
    }

    /// Runs `what` with `mmu_lock` held for write, and pays what it owes.
    fn protected(&self, what: impl FnOnce(&S, &mut ZapWalk<'_, S>)) {
        let mut walk = ZapWalk::start(self, Blocking::Allowed);
        what(self.secondary(), &mut walk);
        walk.finish();
    }
}
