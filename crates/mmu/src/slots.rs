//! Memslots: which guest frames are backed by which host memory.
//!
//! # States
//!
//! A [`SlotSet`] is immutable once published. An update builds a new set, announces it, waits until every notifier event knows it
//! (`active.rs`), swaps the pointer, waits until no event and no fault can still see the old set
//! (`VcpuWords::wait_for_readers`), and frees it.
//! Neither events nor faults ever wait, and an update waits for those alone that had begun before.
//!
//! A slot that is deleted or moved goes through [`SlotState::Invalid`] first: faults on it retry, and are neither
//! RAM nor MMIO. When every fault that saw it valid has finished its install, the slot is zapped; then the set
//! without it, or with it in its new place, is published. That zap needs no invalidation: the invalid phase
//! already keeps late installs out.
//!
//! Every set has a generation. While readers of the previous set may still run, the new one is marked as updating,
//! and no MMIO entry may be cached under it.
//!
//! Source: Linux `kvm_set_memslot`, `kvm_swap_active_memslots`, `kvm_invalidate_memslot`.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use crate::addr::{FRAME_BYTES, FRAME_SHIFT, Gfn, GfnRange, Hva, HvaRange};
use crate::dirty_bitmap::DirtyBitmap;
use crate::mutation::{self, Mutation};
use crate::sync::{AtomicU64, Ordering};

/// Guest frame numbers at and above this do not exist: 52 bits of physical address.
const GFN_LIMIT: u64 = 1 << (52 - FRAME_SHIFT);

/// Most address spaces that one virtual machine can have (x86 KVM has two: ordinary and SMM).
pub const MAX_SPACES: u16 = 8;

/// A guest-physical address space, numbered from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub u16);

/// A slot's number within its address space, chosen by whoever creates it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u16);

bitflags::bitflags! {
    /// What can be said of a slot as a whole.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct SlotFlags: u32 {
        /// Guest writes are emulated (ROM, flash; KVM: `KVM_MEM_READONLY`).
        const READ_ONLY = 1;
        /// Writes are recorded; frames are mapped singly (KVM: `KVM_MEM_LOG_DIRTY_PAGES`). Set by
        /// [`start_dirty_log`](crate::GuestMmu::start_dirty_log).
        const LOG_DIRTY = 2;
        /// With `LOG_DIRTY`: from the second round on by the marks that hardware sets, so that what is read is mapped
        /// writable.
        const LOG_BY_MARKS = 4;
    }
}

/// Whether a slot can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Faults are served.
    Valid,
    /// The slot is being deleted or moved: faults retry.
    Invalid,
}

/// Guest frames `[base, base + frames)`, backed by host memory from `hva` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memslot {
    /// The address space it lies in.
    pub space: SpaceId,
    /// Its number there.
    pub id: SlotId,
    /// Its first guest frame.
    pub base: Gfn,
    /// Its length in frames, not 0.
    pub frames: u64,
    /// Address of the first backing byte, a multiple of 4096.
    pub hva: Hva,
    /// See [`SlotFlags`].
    pub flags: SlotFlags,
    /// Set by the engine; [`SlotState::Valid`] in what a caller passes.
    pub state: SlotState,
}

impl Memslot {
    /// A valid slot without flags, with number `id` in address space 0.
    pub const fn new(id: SlotId, base: Gfn, frames: u64, hva: Hva) -> Self {
        Self { space: SpaceId(0), id, base, frames, hva, flags: SlotFlags::empty(), state: SlotState::Valid }
    }

    /// The guest frames.
    #[inline]
    pub const fn gfns(&self) -> GfnRange {
        GfnRange { start: self.base, end: Gfn::new(self.base.as_u64() + self.frames) }
    }

    /// The backing bytes.
    #[inline]
    pub const fn hvas(&self) -> HvaRange {
        HvaRange { start: self.hva, end: Hva::new(self.hva.as_u64() + self.frames * FRAME_BYTES) }
    }

    /// Where `gfn`, a frame of this slot, is backed.
    #[inline]
    pub fn hva_of(&self, gfn: Gfn) -> Hva {
        self.hva + (gfn - self.base) * FRAME_BYTES
    }

    /// Where `gfns`, frames of this slot, are backed.
    #[inline]
    pub fn hvas_of(&self, gfns: GfnRange) -> HvaRange {
        HvaRange { start: self.hva_of(gfns.start), end: self.hva_of(gfns.end) }
    }

    /// The guest frames that `hvas` touches: start rounded down, end rounded up, clipped to the slot.
    pub fn gfns_in(&self, hvas: HvaRange) -> GfnRange {
        let part = hvas.to_frames().intersection(self.hvas());
        if part.is_empty() {
            return GfnRange { start: self.base, end: self.base };
        }
        let offset = |hva: Hva| (hva - self.hva) / FRAME_BYTES;
        GfnRange { start: self.base + offset(part.start), end: self.base + offset(part.end) }
    }

    fn check(&self) -> Result<(), SlotError> {
        if self.space.0 >= MAX_SPACES {
            return Err(SlotError::NoSuchSpace(self.space));
        }
        if self.frames == 0 {
            return Err(SlotError::Empty(self.id));
        }
        if !self.hva.as_u64().is_multiple_of(FRAME_BYTES) {
            return Err(SlotError::Misaligned { id: self.id, hva: self.hva });
        }
        let gfns = self.base.as_u64().checked_add(self.frames).filter(|end| *end <= GFN_LIMIT);
        let bytes = self.frames.checked_mul(FRAME_BYTES).and_then(|len| self.hva.checked_add(len));
        if gfns.is_none() || bytes.is_none() {
            return Err(SlotError::OutOfReach { id: self.id, base: self.base, frames: self.frames });
        }
        Ok(())
    }
}

/// A change of the memslots was refused; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// The address space does not exist.
    #[error("address space {} does not exist: there are {MAX_SPACES}", .0.0)]
    NoSuchSpace(SpaceId),
    /// No slot has this number.
    #[error("address space {} has no memslot {}", .space.0, .id.0)]
    NoSuchSlot {
        /// The address space asked for.
        space: SpaceId,
        /// The slot asked for.
        id: SlotId,
    },
    /// The number is taken.
    #[error("memslot {} exists already: delete or move it instead", .0.0)]
    Exists(SlotId),
    /// A slot of no frames.
    #[error("memslot {} is empty: it needs at least one frame", .0.0)]
    Empty(SlotId),
    /// The backing address is not page-aligned.
    #[error("memslot {} is backed at {hva}, which is not a multiple of 4096", .id.0)]
    Misaligned {
        /// The slot.
        id: SlotId,
        /// Its backing address.
        hva: Hva,
    },
    /// The slot ends behind the last possible guest frame or host address.
    #[error("memslot {} of {frames} frames at {base} reaches beyond the address space", .id.0)]
    OutOfReach {
        /// The slot.
        id: SlotId,
        /// Its first frame.
        base: Gfn,
        /// Its length in frames.
        frames: u64,
    },
    /// The secondary MMU has no tables for the address space.
    #[error("memslot {} is for address space {}, which these tables do not have", .id.0, .space.0)]
    NoTables {
        /// The slot.
        id: SlotId,
        /// Its address space.
        space: SpaceId,
    },
    /// The secondary MMU's tables do not reach the slot's last guest frame.
    #[error("memslot {} of guest frames {gfns} is out of reach of tables for {bits}-bit addresses", .id.0)]
    BeyondTables {
        /// The slot.
        id: SlotId,
        /// Its guest frames.
        gfns: GfnRange,
        /// Bits of the addresses that the tables translate.
        bits: u32,
    },
    /// The secondary MMU is one mapping, and the slot's memory is another, or not whole pages of it.
    #[error(
        "memslot {} shows {hvas}, which is not whole pages of {page_bytes} bytes of the mapping {mapping}", .id.0
    )]
    NotOfMapping {
        /// The slot.
        id: SlotId,
        /// Its memory.
        hvas: HvaRange,
        /// The mapping.
        mapping: HvaRange,
        /// The size of the mapping's pages, in bytes.
        page_bytes: u64,
    },
    /// There is no memory for what was asked; it is done in part.
    #[error("there is no memory for the tables of memslot {}", .0.0)]
    NoMemory(SlotId),
    /// The slot is not logged.
    #[error("the writes to memslot {} are not logged: start that first", .0.0)]
    NotLogged(SlotId),
    /// The secondary MMU cannot have each first write noticed.
    #[error(
        "the writes to memslot {} cannot be logged by this secondary MMU: write-protect the pages in the memory object for a \
         checkpoint instead (`protect`), or use stage-2 tables, as software vCPUs do", .0.0
    )]
    NoWriteLog(SlotId),
    /// The tables do not tell written pages from others.
    #[error("memslot {} cannot be logged by marks: these tables have none", .0.0)]
    NoDirtyMarks(SlotId),
    /// Not a part of the log.
    #[error("{words} words from frame {first} on are no part of the log of memslot {}", .id.0)]
    NotInLog {
        /// The slot.
        id: SlotId,
        /// The first frame.
        first: u64,
        /// How many words.
        words: usize,
    },
    /// The guest frames belong to another slot.
    #[error("memslot {} would overlap memslot {}", .id.0, .other.0)]
    Overlap {
        /// The slot.
        id: SlotId,
        /// Whose frames it would take.
        other: SlotId,
    },
}

#[derive(Clone, Copy)]
struct ByHva {
    /// The highest end of this and every entry before it: where a search backwards may stop.
    reach: Hva,
    slot: Memslot,
}

/// All memslots of a virtual machine at one time.
pub struct SlotSet {
    generation: AtomicU64,
    /// Sorted by space, then by base. Never overlapping within a space.
    by_gfn: Vec<Memslot>,
    /// What was written to each, where that is logged; in the same order.
    logs: Vec<Log>,
    /// Sorted by address. May overlap: several slots can show one host range.
    by_hva: Vec<ByHva>,
    /// Has loom notice a set that is used while it is freed.
    #[cfg(loom)]
    watched: loom::cell::UnsafeCell<()>,
}

#[cfg(loom)]
impl Drop for SlotSet {
    fn drop(&mut self) {
        self.watched.with_mut(|_| ());
    }
}

/// The log of a slot: shared by all sets that have the slot.
type Log = Option<Arc<DirtyBitmap>>;

const UPDATING: u64 = 1 << 63;

impl fmt::Debug for SlotSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlotSet")
            .field("generation", &self.generation())
            .field("slots", &self.by_gfn)
            .finish()
    }
}

impl SlotSet {
    pub(crate) fn empty() -> Box<Self> {
        Self::of(Vec::new(), Vec::new(), Vec::new(), 0)
    }

    fn with(mut slots: Vec<(Memslot, Log)>, generation: u64) -> Box<Self> {
        slots.sort_unstable_by_key(|(slot, _)| (slot.space, slot.base));
        let (by_gfn, logs): (Vec<_>, Vec<_>) = slots.into_iter().unzip();
        let mut by_address = by_gfn.clone();
        by_address.sort_unstable_by_key(|slot| slot.hva);
        let mut reach = Hva::new(0);
        let by_hva = by_address
            .into_iter()
            .map(|slot| {
                reach = reach.max(slot.hvas().end);
                ByHva { reach, slot }
            })
            .collect();
        Self::of(by_gfn, logs, by_hva, generation | UPDATING)
    }

    fn of(by_gfn: Vec<Memslot>, logs: Vec<Log>, by_hva: Vec<ByHva>, generation: u64) -> Box<Self> {
        Box::new(Self {
            generation: AtomicU64::new(generation),
            by_gfn,
            logs,
            by_hva,
            #[cfg(loom)]
            watched: loom::cell::UnsafeCell::new(()),
        })
    }

    /// The slots with their logs, to make the next set of.
    fn parts(&self) -> Vec<(Memslot, Log)> {
        self.by_gfn.iter().copied().zip(self.logs.iter().cloned()).collect()
    }

    /// The generation, if no update is in progress; MMIO entries are valid under exactly one.
    pub fn generation(&self) -> Option<u64> {
        let generation = self.generation.load(Ordering::Acquire);
        (generation & UPDATING == 0).then_some(generation)
    }

    /// Every reader of the previous set is gone.
    pub(crate) fn settle(&self) {
        let generation = self.generation.load(Ordering::Relaxed) & !UPDATING;
        self.generation.store(generation, Ordering::Release);
    }

    /// The slot that holds `gfn`. `near` is where the last one was found, to look there first; it is updated.
    #[inline]
    pub fn find(&self, space: SpaceId, gfn: Gfn, near: &mut usize) -> Option<&Memslot> {
        #[cfg(loom)]
        self.watched.with(|_| ());
        if let Some(slot) = self.by_gfn.get(*near)
            && slot.space == space
            && slot.gfns().contains(gfn)
        {
            return Some(slot);
        }
        let behind = self.by_gfn.partition_point(|slot| (slot.space, slot.base) <= (space, gfn));
        let index = behind.checked_sub(1)?;
        let slot = self.by_gfn.get(index)?;
        if slot.space == space && slot.gfns().contains(gfn) {
            *near = index;
            return Some(slot);
        }
        None
    }

    /// Every slot that `hvas` touches, in every address space, with the frames that it touches.
    pub fn touching(&self, hvas: HvaRange) -> impl Iterator<Item = (&Memslot, GfnRange)> + Clone {
        #[cfg(loom)]
        self.watched.with(|_| ());
        let behind = self.by_hva.partition_point(|entry| entry.slot.hva < hvas.end);
        self.by_hva[..behind]
            .iter()
            .rev()
            .take_while(move |entry| entry.reach > hvas.start)
            .map(move |entry| (&entry.slot, entry.slot.gfns_in(hvas)))
            .filter(|(_, gfns)| !gfns.is_empty())
    }

    /// All slots, by address space and base.
    pub fn iter(&self) -> impl Iterator<Item = &Memslot> {
        self.by_gfn.iter()
    }

    fn position(&self, space: SpaceId, id: SlotId) -> Result<usize, SlotError> {
        self.by_gfn
            .iter()
            .position(|slot| slot.space == space && slot.id == id)
            .ok_or(SlotError::NoSuchSlot { space, id })
    }

    pub(crate) fn get(&self, space: SpaceId, id: SlotId) -> Result<Memslot, SlotError> {
        self.position(space, id).map(|index| self.by_gfn[index])
    }

    /// The set with one slot more.
    pub(crate) fn created(&self, slot: Memslot) -> Result<Box<Self>, SlotError> {
        slot.check()?;
        if self.position(slot.space, slot.id).is_ok() {
            return Err(SlotError::Exists(slot.id));
        }
        self.check_overlap(&slot)?;
        let mut slots = self.parts();
        slots.push((slot, None));
        Ok(Self::with(slots, self.next_generation()))
    }

    /// The set without one slot.
    pub(crate) fn deleted(&self, space: SpaceId, id: SlotId) -> Result<Box<Self>, SlotError> {
        let mut slots = self.parts();
        slots.remove(self.position(space, id)?);
        Ok(Self::with(slots, self.next_generation()))
    }

    /// The set with one slot changed; `change` must leave space and number as they are.
    pub(crate) fn changed(
        &self,
        space: SpaceId,
        id: SlotId,
        change: impl FnOnce(&mut Memslot),
    ) -> Result<Box<Self>, SlotError> {
        let mut slots = self.parts();
        let (slot, _) = &mut slots[self.position(space, id)?];
        change(slot);
        slot.check()?;
        self.check_overlap(slot)?;
        Ok(Self::with(slots, self.next_generation()))
    }

    /// The set with one slot logged in this way, or not.
    pub(crate) fn logged(
        &self,
        space: SpaceId,
        id: SlotId,
        flags: SlotFlags,
        log: Log,
    ) -> Result<Box<Self>, SlotError> {
        let mut slots = self.parts();
        let (slot, kept) = &mut slots[self.position(space, id)?];
        slot.flags = slot.flags.difference(SlotFlags::LOG_DIRTY | SlotFlags::LOG_BY_MARKS) | flags;
        *kept = log;
        Ok(Self::with(slots, self.next_generation()))
    }

    /// A slot and its log.
    pub(crate) fn log(&self, space: SpaceId, id: SlotId) -> Result<(Memslot, Arc<DirtyBitmap>), SlotError> {
        let index = self.position(space, id)?;
        let log = self.logs[index].as_ref().ok_or(SlotError::NotLogged(id))?;
        Ok((self.by_gfn[index], Arc::clone(log)))
    }

    /// The log of a slot of this set.
    pub(crate) fn log_of(&self, slot: &Memslot) -> Option<&DirtyBitmap> {
        let key = |slot: &Memslot| (slot.space, slot.base);
        let index = self.by_gfn.binary_search_by_key(&key(slot), key).ok()?;
        self.logs[index].as_deref()
    }

    fn check_overlap(&self, new: &Memslot) -> Result<(), SlotError> {
        let overlaps =
            |old: &&Memslot| old.space == new.space && old.id != new.id && old.gfns().overlaps(new.gfns());
        match self.by_gfn.iter().find(overlaps) {
            Some(other) => Err(SlotError::Overlap { id: new.id, other: other.id }),
            None => Ok(()),
        }
    }

    fn next_generation(&self) -> u64 {
        let generation = self.generation.load(Ordering::Relaxed) & !UPDATING;
        if mutation::active(Mutation::GenerationStays) { generation } else { generation + 1 }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use alloc::vec;

    fn slot(id: u16, base: u64, frames: u64, hva: u64) -> Memslot {
        Memslot::new(SlotId(id), Gfn::new(base), frames, Hva::new(hva))
    }

    fn set(slots: &[Memslot]) -> Box<SlotSet> {
        slots.iter().fold(SlotSet::empty(), |set, slot| set.created(*slot).expect("a good slot"))
    }

    #[test]
    fn a_gfn_finds_its_slot_or_none() {
        let set = set(&[slot(0, 0, 16, 0x10000), slot(1, 32, 16, 0x40000)]);
        let mut near = 0;
        for (gfn, id) in
            [(0, Some(0)), (15, Some(0)), (16, None), (31, None), (32, Some(1)), (48, None), (1, Some(0))]
        {
            let found = set.find(SpaceId(0), Gfn::new(gfn), &mut near).map(|slot| slot.id.0);
            assert_eq!(found, id, "gfn {gfn}");
        }
        assert_eq!(set.find(SpaceId(1), Gfn::new(0), &mut near).map(|slot| slot.id), None);
    }

    #[test]
    fn one_host_range_finds_every_slot_over_it() {
        let aliased = [slot(0, 0, 64, 0x100000), slot(1, 100, 2, 0x110000), slot(2, 200, 4, 0x200000)];
        let set = set(&aliased);
        let touched = |start: u64, end: u64| {
            let mut ids: Vec<_> = set
                .touching(HvaRange::new(Hva::new(start), Hva::new(end)))
                .map(|(slot, gfns)| (slot.id.0, gfns.start.as_u64(), gfns.end.as_u64()))
                .collect();
            ids.sort_unstable();
            ids
        };
        assert_eq!(touched(0x110000, 0x111000), vec![(0, 16, 17), (1, 100, 101)]);
        // Unaligned ends round outwards.
        assert_eq!(touched(0x100fff, 0x101001), vec![(0, 0, 2)]);
        // Behind both, although slot 1, the nearest below, ends earlier than slot 0.
        assert_eq!(touched(0x13f000, 0x200000), vec![(0, 63, 64)]);
        assert_eq!(touched(0x140000, 0x200000), vec![]);
    }

    #[test]
    fn bad_slots_are_refused_with_their_values() {
        let set = set(&[slot(0, 0, 16, 0x10000)]);
        let refused = |slot: Memslot| set.created(slot).map(|_| ()).expect_err("must be refused");
        assert_eq!(refused(slot(0, 64, 1, 0)), SlotError::Exists(SlotId(0)));
        assert_eq!(refused(slot(1, 15, 2, 0)), SlotError::Overlap { id: SlotId(1), other: SlotId(0) });
        assert_eq!(refused(slot(1, 64, 0, 0)), SlotError::Empty(SlotId(1)));
        assert!(matches!(refused(slot(1, 64, 1, 0x801)), SlotError::Misaligned { .. }));
        assert!(matches!(refused(slot(1, u64::MAX - 1, 4, 0)), SlotError::OutOfReach { .. }));
        assert!(matches!(refused(slot(1, 64, u64::MAX / 8192, 0)), SlotError::OutOfReach { .. }));
        let far = Memslot { space: SpaceId(MAX_SPACES), ..slot(1, 64, 1, 0) };
        assert_eq!(refused(far), SlotError::NoSuchSpace(SpaceId(MAX_SPACES)));
        // The same frames in another address space are fine.
        assert!(set.created(Memslot { space: SpaceId(1), ..slot(0, 0, 16, 0x10000) }).is_ok());
    }

    #[test]
    fn generations_are_unique_and_hidden_while_updating() {
        let first = set(&[slot(0, 0, 16, 0x10000)]);
        assert_eq!(first.generation(), None, "readers of the previous set may still run");
        first.settle();
        let second = first.deleted(SpaceId(0), SlotId(0)).expect("it exists");
        second.settle();
        assert_ne!(first.generation(), second.generation());
    }
}
