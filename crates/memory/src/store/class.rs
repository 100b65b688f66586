//! A size class: entries of one size, without gaps.
//!
//! The entries of a class are the slots `0..live` of its chunks. When one is removed, the **last** entry moves into its
//! slot. So memory does not fragment, however long pages come and go: what a class occupies is its live entries, rounded
//! up, and what is behind them is given back to the host once it is worth the call ([`TRIM_BYTES`]). The price is one
//! more copy of an entry for a removal.
//!
//! An entry is a header and the bytes: checksum (4 bytes), frame (4), length (2), all little-endian. The frame is there
//! because whoever moves an entry must tell its owner, and so that an entry is never taken for another frame's. A
//! header is not trusted: an entry that is damaged may be lost, but no other with it.

use std::sync::Arc;

use afterimage_mmu::Pfn;
use twox_hash::XxHash64;

use super::arena::{Arena, CHUNK_BYTES, Chunk, HOST_PAGE};
use super::room::Room;
use crate::FRAME_LEN;
use crate::error::Damage;

/// Bytes in an entry's header.
pub(super) const HEADER_BYTES: usize = 10;
/// How many size classes there are.
pub(super) const CLASSES: usize = 28;
/// The class of frames that do not compress.
pub(super) const RAW: usize = CLASSES - 1;
/// A class never has more slots, so that a slot's number fits the index (27 bits).
pub(super) const MAX_SLOTS: u32 = 1 << 27;
/// Memory behind the last entry from which on a class gives it back. Less would be a system call for every few pages that
/// come and go.
pub(super) const TRIM_BYTES: usize = 32 << 10;

/// Bytes in a slot, header included, by class: steps of at most an eighth, or 64 bytes.
const SLOT_BYTES: [usize; CLASSES] = {
    let (mut sizes, mut size, mut class) = ([0; CLASSES], 0, 0);
    while class < RAW {
        size += match size {
            0..512 => 64,
            512..2048 => 128,
            _ => 256,
        };
        sizes[class] = size;
        class += 1;
    }
    sizes[RAW] = FRAME_LEN + HEADER_BYTES;
    sizes
};

/// The smallest class whose slots hold `bytes` bytes and a header; [`RAW`] for all that is larger than the rest.
pub(super) fn class_of(bytes: usize) -> usize {
    SLOT_BYTES.partition_point(|&slot| slot < bytes + HEADER_BYTES).min(RAW)
}

/// The checksum of an entry: it covers the bytes, their number and whose they are.
pub(super) fn checksum(frame: Pfn, bytes: &[u8]) -> u32 {
    (XxHash64::oneshot(frame.as_u64() << 16 | bytes.len() as u64, bytes) >> 32) as u32
}

/// An entry, read from its slot and checked for form, not for its checksum.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    pub(super) checksum: u32,
    pub(super) bytes: &'a [u8],
}

/// The last entry has moved into the slot of one that was removed. Its owner must learn it before the lock is released.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the owner's index still names the old slot"]
pub(super) struct Moved {
    /// The owner, as the entry names it: not to be trusted.
    pub(super) frame: Pfn,
    pub(super) from: u32,
    pub(super) to: u32,
}

/// The entries of one size.
#[derive(Debug)]
pub(super) struct Class {
    slot_bytes: usize,
    chunks: Vec<Chunk>,
    live: u32,
    /// Slots that may be resident: those written since memory was last given back. At least `live`.
    touched: u32,
    /// Bytes of the live entries, without headers.
    payload: u64,
}

impl Class {
    pub(super) fn new(class: usize) -> Self {
        Self { slot_bytes: SLOT_BYTES[class], chunks: Vec::new(), live: 0, touched: 0, payload: 0 }
    }

    /// Live entries.
    pub(super) fn live(&self) -> u32 {
        self.live
    }

    /// Bytes of the live entries, without headers.
    pub(super) fn payload_bytes(&self) -> u64 {
        self.payload
    }

    /// Bytes of memory that the class occupies, slack included, and the list of its chunks.
    pub(super) fn resident_bytes(&self) -> u64 {
        self.bytes_of(self.touched) + (self.chunks.capacity() * size_of::<Chunk>()) as u64
    }

    /// Bytes of memory that the first `slots` slots occupy.
    fn bytes_of(&self, slots: u32) -> u64 {
        let per_chunk = self.slots_per_chunk();
        let (full, rest) = (slots / per_chunk, (slots % per_chunk) as usize);
        let in_full = (per_chunk as usize * self.slot_bytes).next_multiple_of(HOST_PAGE);
        let in_rest = (rest * self.slot_bytes).next_multiple_of(HOST_PAGE);
        u64::from(full) * in_full as u64 + in_rest as u64
    }

    /// Adds an entry behind the last and names its slot; `None` if there is no room. `bytes` fit the class.
    pub(super) fn push(&mut self, arena: &Arc<Arena>, frame: Pfn, bytes: &[u8]) -> Option<u32> {
        let slot = self.live;
        if slot == MAX_SLOTS {
            return None;
        }
        let touched = self.touched.max(slot + 1);
        let growth = self.bytes_of(touched) - self.bytes_of(self.touched);
        if !arena.room().take(growth) {
            return None;
        }
        if self.place(slot).0 == self.chunks.len() {
            let Some(chunk) = arena.chunk() else {
                arena.room().give(growth);
                return None;
            };
            self.chunks.push(chunk);
        }
        let out = self.slot_mut(slot);
        out[..4].copy_from_slice(&checksum(frame, bytes).to_le_bytes());
        out[4..8].copy_from_slice(&(frame.as_u64() as u32).to_le_bytes());
        out[8..10].copy_from_slice(&(bytes.len() as u16).to_le_bytes());
        out[HEADER_BYTES..][..bytes.len()].copy_from_slice(bytes);
        self.live += 1;
        self.touched = touched;
        self.payload += bytes.len() as u64;
        Some(slot)
    }

    /// The entry in `slot`, which is `frame`'s.
    pub(super) fn entry(&self, slot: u32, frame: Pfn) -> Result<Entry<'_>, Damage> {
        if slot >= self.live {
            return Err(Damage::Slot { slot });
        }
        let bytes = self.slot(slot);
        let (owner, length) = (owner(bytes), length(bytes));
        if owner != frame {
            return Err(Damage::Owner { found: owner });
        }
        let damage = Damage::Length { bytes: length };
        let payload = bytes.get(HEADER_BYTES..HEADER_BYTES + length).ok_or(damage)?;
        Ok(Entry { checksum: word(bytes, 0), bytes: payload })
    }

    /// Removes the entry in `slot` if it is `frame`'s, and fills the gap with the last one.
    pub(super) fn remove(&mut self, room: &Room, slot: u32, frame: Pfn) -> Option<Moved> {
        if slot >= self.live || owner(self.slot(slot)) != frame {
            // Damaged: the slot, if there is one, is lost, rather than another frame's entry.
            return None;
        }
        self.payload = self.payload.saturating_sub(length(self.slot(slot)) as u64);
        let last = self.live - 1;
        let moved = (slot != last).then(|| {
            self.copy_slot(last, slot);
            Moved { frame: owner(self.slot(slot)), from: last, to: slot }
        });
        self.live = last;
        self.trim(room, TRIM_BYTES);
        moved
    }

    /// Changes a bit of the entry in `slot`: of byte `byte` of header and bytes, modulo their number.
    pub(super) fn corrupt(&mut self, slot: u32, byte: usize) {
        let bytes = self.slot_mut(slot);
        let length = HEADER_BYTES + length(bytes);
        bytes[byte % length] ^= 1 << (byte % 8);
    }

    /// Gives back what lies behind the last entry, if it is `least` bytes or more.
    pub(super) fn trim(&mut self, room: &Room, least: usize) {
        let slack = (self.touched - self.live) as usize * self.slot_bytes;
        if slack < least {
            return;
        }
        let (tail, offset) = self.place(self.live);
        // The tail's first page may be shared with the last entry; it stays unless it is all slack.
        let mut keep = offset.next_multiple_of(HOST_PAGE);
        for chunk in self.chunks.iter_mut().skip(tail) {
            // What fails (the memory is locked) stays resident and stays on our account.
            if chunk.release(keep..CHUNK_BYTES).is_err() {
                return;
            }
            keep = 0;
        }
        room.give(self.bytes_of(self.touched) - self.bytes_of(self.live));
        self.touched = self.live;
        self.chunks.truncate(if offset == 0 { tail } else { tail + 1 });
        if self.chunks.len() * 4 < self.chunks.capacity() {
            self.chunks.shrink_to_fit();
        }
    }

    fn slots_per_chunk(&self) -> u32 {
        (CHUNK_BYTES / self.slot_bytes) as u32
    }

    /// A slot's chunk, and the offset in it.
    fn place(&self, slot: u32) -> (usize, usize) {
        let per_chunk = self.slots_per_chunk();
        ((slot / per_chunk) as usize, (slot % per_chunk) as usize * self.slot_bytes)
    }

    fn slot(&self, slot: u32) -> &[u8] {
        let (chunk, offset) = self.place(slot);
        &self.chunks[chunk].bytes()[offset..][..self.slot_bytes]
    }

    fn slot_mut(&mut self, slot: u32) -> &mut [u8] {
        let (chunk, offset) = self.place(slot);
        &mut self.chunks[chunk].bytes_mut()[offset..][..self.slot_bytes]
    }

    /// Copies slot `from` over a lower one.
    fn copy_slot(&mut self, from: u32, to: u32) {
        let ((source, from), (target, to)) = (self.place(from), self.place(to));
        let bytes = self.slot_bytes;
        if source == target {
            self.chunks[source].bytes_mut().copy_within(from..from + bytes, to);
            return;
        }
        let (below, above) = self.chunks.split_at_mut(source);
        below[target].bytes_mut()[to..][..bytes].copy_from_slice(&above[0].bytes()[from..][..bytes]);
    }
}

/// The little-endian word at `offset` of a slot.
fn word(slot: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes([slot[offset], slot[offset + 1], slot[offset + 2], slot[offset + 3]])
}

/// The frame that a slot's header names.
fn owner(slot: &[u8]) -> Pfn {
    Pfn::new(u64::from(word(slot, 4)))
}

/// The length that a slot's header names.
fn length(slot: &[u8]) -> usize {
    usize::from(u16::from_le_bytes([slot[8], slot[9]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(number: u64) -> Pfn {
        Pfn::new(number)
    }

    #[test]
    fn the_checksum_covers_bytes_length_and_owner() {
        let sum = checksum(frame(1), b"bytes");
        assert_ne!(sum, checksum(frame(1), b"bites"));
        assert_ne!(sum, checksum(frame(2), b"bytes"));
        assert_ne!(checksum(frame(1), &[0; 8]), checksum(frame(1), &[0; 9]));
    }

    #[test]
    fn classes_rise_and_waste_little() {
        assert!(SLOT_BYTES.is_sorted());
        for bytes in 0..=FRAME_LEN {
            let slot = SLOT_BYTES[class_of(bytes)];
            let needed = bytes + HEADER_BYTES;
            assert!(slot >= needed);
            assert!(slot - needed < 64.max(needed / 4) || slot == SLOT_BYTES[RAW], "{bytes} in {slot}");
        }
    }

    #[test]
    fn the_last_entry_fills_the_gap_across_chunks() {
        let arena = Arena::reserve(2, u64::MAX).expect("2 MiB");
        let mut class = Class::new(RAW);
        let last = class.slots_per_chunk();
        for number in 0..=last {
            assert_eq!(class.push(&arena, frame(number.into()), &[number as u8; FRAME_LEN]), Some(number));
        }
        let moved = class.remove(arena.room(), 1, frame(1));
        assert_eq!(moved, Some(Moved { frame: frame(last.into()), from: last, to: 1 }));
        let entry = class.entry(1, frame(last.into())).expect("moved");
        assert!(entry.bytes.iter().all(|&byte| byte == last as u8));
        assert_eq!(entry.checksum, checksum(frame(last.into()), entry.bytes));
        assert!(matches!(class.entry(last, frame(last.into())), Err(Damage::Slot { .. })));
        assert_eq!(
            class.remove(arena.room(), last - 1, frame(u64::from(last) - 1)),
            None,
            "the last leaves no gap"
        );
    }

    #[test]
    fn an_entry_is_not_removed_for_another_frame() {
        let arena = Arena::reserve(1, u64::MAX).expect("1 MiB");
        let mut class = Class::new(0);
        let slot = class.push(&arena, frame(5), b"five").expect("room");
        assert_eq!(class.remove(arena.room(), slot, frame(6)), None);
        assert!(matches!(class.entry(slot, frame(6)), Err(Damage::Owner { found }) if found == frame(5)));
        assert_eq!(class.entry(slot, frame(5)).expect("still there").bytes, b"five");
    }

    #[test]
    fn memory_behind_the_last_entry_goes_back() {
        let arena = Arena::reserve(3, u64::MAX).expect("3 MiB");
        let mut class = Class::new(RAW);
        let count = 2 * class.slots_per_chunk() + 3;
        for number in 0..count {
            class.push(&arena, frame(number.into()), &[1; FRAME_LEN]).expect("room");
        }
        assert!(arena.chunk().is_none());
        for number in (0..count).rev() {
            let _ = class.remove(arena.room(), number, frame(number.into()));
            let needed = u64::from(class.live) * class.slot_bytes as u64;
            // Up to a page is lost behind each chunk's last slot.
            let allowed = needed + (TRIM_BYTES + 4 * HOST_PAGE) as u64;
            assert!(class.resident_bytes() <= allowed, "{} bytes for {needed}", class.resident_bytes());
        }
        assert_eq!((class.payload_bytes(), class.live()), (0, 0));
        assert!(class.chunks.len() <= 1 && arena.chunk().is_some(), "chunks come back");
    }
}
