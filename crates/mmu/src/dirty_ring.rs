//! A ring of frames that one vCPU has written: collected while it runs, and reset a lap at a time.
//!
//! # States of an entry
//!
//! ```text
//! empty ──push, by its vCPU──► dirty ──collect, by anyone──► collected ──reset, under mmu_lock──► empty
//! ```
//!
//! The cost is in the frames that were written, not in the size of the memory; and a vCPU that writes faster than it is
//! collected stops by itself: its faults end in [`FaultError::DirtyRingFull`](crate::FaultError) when the ring is nearly
//! full, before it can be lost what does not fit.
//!
//! A reset has the frames of collected entries noticed again when they are written, and flushes; the memory is to be read
//! after that. A frame that was written again meanwhile is in the ring twice.
//!
//! Source: Linux `kvm_dirty_ring_push`, `kvm_dirty_ring_reset`.

use alloc::boxed::Box;
use core::fmt;

use crate::addr::{Gfn, GfnRange};
use crate::guest_mmu::GuestMmu;
use crate::host::{Blocking, SecondaryMmu, Zap};
use crate::mutation::{self, Mutation};
use crate::slots::{SlotFlags, SlotId, SpaceId};
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::zap::ZapWalk;

const EMPTY: u32 = 0;
const DIRTY: u32 = 1;
const COLLECTED: u32 = 2;

/// Entries that stay free when a vCPU is stopped: one fault logs one frame.
const RESERVED: u64 = 1;

/// A frame that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyFrame {
    /// The address space.
    pub space: SpaceId,
    /// The slot, at that time.
    pub slot: SlotId,
    /// The frame.
    pub gfn: Gfn,
}

struct Entry {
    state: AtomicU32,
    /// Space in the upper half, slot in the lower.
    place: AtomicU32,
    gfn: AtomicU64,
}

/// The ring of one vCPU: the frames that it has written, in order. [`collect`](Self::collect) them while it runs, then
/// [reset](GuestMmu::reset_dirty_rings), then read their memory. A frame that is written again in between is in it twice. A vCPU whose
/// ring is full stops: [`FaultError::DirtyRingFull`](crate::FaultError::DirtyRingFull).
pub struct DirtyRing {
    entries: Box<[Entry]>,
    /// Entries that were ever pushed, collected, reset.
    pushed: AtomicU64,
    collected: AtomicU64,
    reset: AtomicU64,
    /// Whether its vCPU is gone, or has another ring.
    abandoned: AtomicU32,
}

impl fmt::Debug for DirtyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyRing")
            .field("entries", &self.entries.len())
            .field("pushed", &self.pushed)
            .field("collected", &self.collected)
            .field("reset", &self.reset)
            .finish()
    }
}

impl DirtyRing {
    /// A ring of `entries` entries of 16 bytes, rounded up to a power of two of at least 2. One of them stays free.
    pub fn new(entries: usize) -> Self {
        let entry =
            |_| Entry { state: AtomicU32::new(EMPTY), place: AtomicU32::new(0), gfn: AtomicU64::new(0) };
        Self {
            entries: (0..entries.max(2).next_power_of_two()).map(entry).collect(),
            pushed: AtomicU64::new(0),
            collected: AtomicU64::new(0),
            reset: AtomicU64::new(0),
            abandoned: AtomicU32::new(0),
        }
    }

    fn entry(&self, number: u64) -> &Entry {
        &self.entries[number as usize & (self.entries.len() - 1)]
    }

    /// Entries that are not empty.
    pub fn len(&self) -> u64 {
        // In this order: what was pushed only grows, and what was reset was pushed before.
        let reset = self.reset.load(Ordering::Acquire);
        self.pushed.load(Ordering::Acquire) - reset
    }

    /// Whether all entries are empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether its vCPU must not go on before a reset.
    #[inline]
    pub fn is_soft_full(&self) -> bool {
        self.len() + RESERVED >= self.entries.len() as u64
    }

    /// By its vCPU, after the entry was made writable, and never while the ring is full.
    pub(crate) fn push(&self, frame: DirtyFrame) {
        let number = self.pushed.load(Ordering::Relaxed);
        debug_assert!(self.len() < self.entries.len() as u64);
        let entry = self.entry(number);
        entry.place.store(u32::from(frame.space.0) << 16 | u32::from(frame.slot.0), Ordering::Relaxed);
        entry.gfn.store(frame.gfn.as_u64(), Ordering::Relaxed);
        // Release: who collects the entry sees what it says.
        entry.state.store(DIRTY, Ordering::Release);
        self.pushed.store(number + 1, Ordering::Release);
    }

    /// Its vCPU pushes no more. What is in it stays until it is reset: other vCPUs write to those frames unnoticed.
    pub(crate) fn abandon(&self) {
        self.abandoned.store(1, Ordering::Release);
    }

    /// Hands out what was pushed and not collected, in order, while the vCPU may run. One thread at a time.
    ///
    /// The memory is to be read after [`GuestMmu::reset_dirty_rings`], which has later writes noticed.
    pub fn collect(&self, mut frame: impl FnMut(DirtyFrame)) {
        let mut number = self.collected.load(Ordering::Relaxed);
        while self.entry(number).state.load(Ordering::Acquire) == DIRTY {
            let entry = self.entry(number);
            frame(entry.says());
            entry.state.store(COLLECTED, Ordering::Release);
            number += 1;
        }
        self.collected.store(number, Ordering::Relaxed);
    }

    /// Empties the collected entries, and hands them out.
    fn reset(&self, mut frame: impl FnMut(DirtyFrame)) -> u64 {
        let first = self.reset.load(Ordering::Relaxed);
        let mut number = first;
        while self.entry(number).state.load(Ordering::Acquire) == COLLECTED {
            let entry = self.entry(number);
            frame(entry.says());
            entry.state.store(EMPTY, Ordering::Relaxed);
            number += 1;
        }
        // Release: the vCPU finds the entries empty.
        self.reset.store(number, Ordering::Release);
        number - first
    }
}

impl Entry {
    fn says(&self) -> DirtyFrame {
        let place = self.place.load(Ordering::Relaxed);
        DirtyFrame {
            space: SpaceId((place >> 16) as u16),
            slot: SlotId(place as u16),
            gfn: Gfn::new(self.gfn.load(Ordering::Relaxed)),
        }
    }
}

impl<S: SecondaryMmu> GuestMmu<S> {
    /// Hands out what every vCPU has pushed and nobody has collected yet, ring by ring, while the vCPUs may run.
    ///
    /// The memory is to be read after [`reset_dirty_rings`](Self::reset_dirty_rings).
    pub fn collect_dirty_rings(&self, mut frame: impl FnMut(DirtyFrame)) {
        // One who collects at a time.
        let _update = self.updates.write();
        for ring in self.rings.read().iter() {
            ring.collect(&mut frame);
        }
    }

    /// Empties the collected entries of every vCPU's ring, has the next write to each frame noticed, and flushes. How many
    /// there were (KVM: `KVM_RESET_DIRTY_RINGS`).
    pub fn reset_dirty_rings(&self) -> u64 {
        let _update = self.updates.write();
        let set = self.slot_set();
        let mut walk = ZapWalk::start(self, Blocking::Allowed);
        let mut count = 0;
        for ring in self.rings.read().iter() {
            count += ring.reset(|frame| {
                // A slot may be gone, moved, or logged no more since: then there is nothing to notice.
                if let Ok(slot) = set.get(frame.space, frame.slot)
                    && slot.flags.contains(SlotFlags::LOG_DIRTY)
                    && slot.gfns().contains(frame.gfn)
                    && !mutation::active(Mutation::RingResetUnprotected)
                {
                    self.secondary().zap(&slot, GfnRange::frame(frame.gfn), Zap::TrackDirty, &mut walk);
                }
            });
        }
        walk.finish();
        let is_over = |ring: &DirtyRing| ring.abandoned.load(Ordering::Acquire) != 0 && ring.is_empty();
        self.rings.write().retain(|ring| !is_over(ring));
        count
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn frame(gfn: u64) -> DirtyFrame {
        DirtyFrame { space: SpaceId(1), slot: SlotId(7), gfn: Gfn::new(gfn) }
    }

    #[test]
    fn entries_come_out_in_order_and_are_free_after_a_reset() {
        let ring = DirtyRing::new(4);
        let mut seen = Vec::new();
        for lap in 0..5 {
            for gfn in 0..3 {
                assert!(!ring.is_soft_full());
                ring.push(frame(lap * 3 + gfn));
            }
            assert!(ring.is_soft_full(), "three of four, and one is kept free");
            ring.collect(|frame| seen.push(frame));
            assert!(ring.is_soft_full(), "collected is not reset");
            assert_eq!(ring.reset(|_| ()), 3);
            assert!(ring.is_empty());
        }
        assert_eq!(seen, (0..15).map(frame).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_not_collected_is_not_reset() {
        let ring = DirtyRing::new(8);
        ring.push(frame(1));
        ring.collect(|_| ());
        ring.push(frame(2));
        assert_eq!(ring.reset(|_| ()), 1);
        assert_eq!(ring.len(), 1);
        let mut seen = Vec::new();
        ring.collect(|frame| seen.push(frame));
        assert_eq!(seen, [frame(2)]);
    }
}
