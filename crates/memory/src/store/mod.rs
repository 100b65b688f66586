//! The store: evicted pages, compressed in RAM.
//!
//! # States and moves
//! Each frame has one word of 4 bytes: *empty*, *zeros*, or an *entry*: its class and slot. Only these moves exist:
//!
//! ```text
//! empty ──put──► zeros | entry ──remove──► empty          entry ──another is removed──► entry (in another slot)
//! ```
//!
//! A frame of zeros has no bytes. A frame that compresses is an lz4 block, any other is kept as it is. A page of 2 MiB is
//! 512 frames: one block of it takes as long to make, saves from nothing to an eighth of the bytes, and a fault on one frame
//! would have to decompress it all.
//!
//! # Locks
//! Frames are dealt out to shards by their low bits, and each class ([`class`]) of each shard has a lock. It guards
//! the class's entries **and every word that names one of them**: such a word changes only with that lock held. So:
//! * who reads a word takes the lock of the class that it names, and reads the word again. Still the same: the slot is
//!   his until he releases the lock. Changed (the entry has moved, or is gone): he starts anew, which is all that a
//!   retry means here;
//! * between empty and zeros, words change by compare-exchange, without a lock. From empty to an entry too, but with the
//!   lock of the new entry's class held, so that nobody finds a slot that is not filled.
//!
//! One class lock is held at a time, and under it at most the arena's. Compressing, checking and decompressing happen
//! without any.
//!
//! # Limit
//! All memory that entries occupy is on one account ([`room`]); a class takes from it before it grows. Where that is refused,
//! every class gives back what it keeps behind its entries, and the page is tried once more. Then the store is full: the
//! page is not stored, and until another one leaves, no eviction need be begun ([`Store::is_full`]).
//!
//! The words are atomics with `Relaxed` accesses: an entry's bytes are published by its class's lock, and the
//! other two states have none. In the memory object, one caller at a time has a frame (the page's lock). Where two do
//! nevertheless, either may win, but both see whole pages of that frame or none.

mod arena;
mod class;
mod room;
mod scratch;

use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use afterimage_mmu::Pfn;

use self::arena::{Arena, CHUNK_BYTES};
use self::class::{CLASSES, Class, HEADER_BYTES, MAX_SLOTS, RAW, checksum};
pub use self::scratch::Scratch;
pub(crate) use self::scratch::is_zero;
use crate::FRAME_LEN;
use crate::error::{Damage, MemoryError};
use crate::source::{Content, frames_of, gather};

/// Shards of a store, a power of two: enough that workers seldom meet in a class.
const SHARDS: usize = 4;
/// Frames that a store can have: each shard's could all be in one class.
const MAX_FRAMES: u64 = SHARDS as u64 * MAX_SLOTS as u64;

/// Evicted pages, compressed in RAM.
pub struct Store {
    words: Box<[AtomicU32]>,
    shards: Box<[Shard; SHARDS]>,
    arena: Arc<Arena>,
}

/// A part of the frames. On cache lines of its own: its locks and counters change with every page.
#[repr(align(128))]
struct Shard {
    classes: [Mutex<Class>; CLASSES],
    zeros: AtomicU64,
    puts: AtomicU64,
    gets: AtomicU64,
    corrupt: AtomicU64,
}

/// What a frame's word says.
#[derive(Clone, Copy)]
enum State {
    Empty,
    Zeros,
    Entry { class: usize, slot: u32 },
}

const EMPTY: u32 = 0;
/// Below all entries' words, and several bits away from each neighbour: one that flips must not make zeros of a frame.
const ZEROS: u32 = 0x05a5_a5a5;

impl State {
    /// An entry's word: class + 1 in the high 5 bits, slot in the low 27.
    const fn entry(class: usize, slot: u32) -> u32 {
        (class as u32 + 1) << 27 | slot
    }

    const fn of(word: u32) -> Self {
        match word {
            EMPTY => Self::Empty,
            ZEROS => Self::Zeros,
            _ => {
                // Only a flipped bit makes a class that does not exist. Any class will do: the entry is not this frame's.
                let class = (word >> 27).wrapping_sub(1) as usize;
                Self::Entry { class: if class < CLASSES { class } else { RAW }, slot: word & (MAX_SLOTS - 1) }
            }
        }
    }
}

/// What a store holds, and what it cost. Taken class by class: exact only while nothing changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreStats {
    /// Frames held that are zeros.
    pub zero_frames: u64,
    /// Frames held as lz4 blocks.
    pub packed_frames: u64,
    /// Frames held as they are.
    pub raw_frames: u64,
    /// Bytes of the blocks and raw frames alone.
    pub payload_bytes: u64,
    /// Bytes of memory that the entries occupy: with headers, what slots leave over and what is not given back yet.
    pub resident_bytes: u64,
    /// Bytes of the index: the words of all frames, held or not.
    pub index_bytes: u64,
    /// Frames put since the start.
    pub puts: u64,
    /// Frames got since the start.
    pub gets: u64,
    /// Frames found corrupt since the start, each time that it was tried.
    pub corrupt: u64,
}

impl StoreStats {
    /// Frames held.
    pub const fn frames(&self) -> u64 {
        self.zero_frames + self.packed_frames + self.raw_frames
    }

    /// All memory of the store, in bytes.
    pub const fn held_bytes(&self) -> u64 {
        self.resident_bytes + self.index_bytes
    }
}

impl Store {
    /// An empty store for the frames `0..frames`, which takes what it needs: at most somewhat more than their bytes.
    ///
    /// # Errors
    /// There are too many frames, or the address space cannot be had: somewhat more than the frames' bytes are reserved,
    /// but not used.
    pub fn new(frames: u64) -> Result<Self, MemoryError> {
        Self::with_limit(frames, u64::MAX)
    }

    /// The same, whose entries occupy at most `limit` bytes of memory. Pages of zeros have none. The index, of 4 bytes a
    /// frame, is not counted.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn with_limit(frames: u64, limit: u64) -> Result<Self, MemoryError> {
        Self::check(frames)?;
        // Every frame in the largest class, and for each class a chunk begun and one not given back yet.
        let slots = (CHUNK_BYTES / (FRAME_LEN + HEADER_BYTES)) as u64;
        let chunks = frames.div_ceil(slots) as u32 + 2 * (SHARDS * CLASSES) as u32;
        let shard = |_| Shard {
            classes: core::array::from_fn(|class| Mutex::new(Class::new(class))),
            zeros: AtomicU64::new(0),
            puts: AtomicU64::new(0),
            gets: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
        };
        Ok(Self {
            words: (0..frames).map(|_| AtomicU32::new(EMPTY)).collect(),
            shards: Box::new(core::array::from_fn(shard)),
            arena: Arena::reserve(chunks, limit)?,
        })
    }

    /// Whether there can be a store for so many frames.
    pub(crate) fn check(frames: u64) -> Result<(), MemoryError> {
        if frames <= MAX_FRAMES {
            return Ok(());
        }
        Err(MemoryError::StoreTooLarge { frames, max: MAX_FRAMES })
    }

    /// Frames that the store has room for.
    pub fn frames(&self) -> u64 {
        self.words.len() as u64
    }

    /// Whether a page was refused since there is no room, and none has left since. Another try would be in vain.
    pub fn is_full(&self) -> bool {
        self.arena.room().is_full()
    }

    /// What a page gets that is refused.
    pub(crate) fn full(&self, frame: Pfn) -> MemoryError {
        MemoryError::StoreFull { frame, bytes: self.arena.most_bytes() }
    }

    /// Stores the page that begins with `frame`; `page` is a whole number of frames, and what was stored for them before
    /// is gone.
    ///
    /// # Errors
    /// The frames do not exist, or there is no room. Then none of them is stored.
    pub fn put(&self, frame: Pfn, page: &[u8], scratch: &mut Scratch) -> Result<(), MemoryError> {
        let count = frames_of(frame, page.len(), self.frames())?;
        let departures = self.arena.room().departures();
        for (index, bytes) in page.chunks_exact(FRAME_LEN).enumerate() {
            if let Err(error) = self.put_frame(frame + index as u64, bytes, scratch) {
                self.clear_all(frame, count);
                self.arena.room().refuse(departures);
                return Err(error);
            }
        }
        Ok(())
    }

    fn put_frame(&self, frame: Pfn, bytes: &[u8], scratch: &mut Scratch) -> Result<(), MemoryError> {
        let (word, shard) = self.at(frame);
        shard.puts.fetch_add(1, Relaxed);
        if is_zero(bytes) {
            self.clear(frame);
            while word.compare_exchange(EMPTY, ZEROS, Relaxed, Relaxed).is_err() {
                self.clear(frame);
            }
            shard.zeros.fetch_add(1, Relaxed);
            return Ok(());
        }
        let (class, bytes) = scratch.pack(bytes);
        let mut is_trimmed = false;
        loop {
            self.clear(frame);
            let mut entries = shard.lock(class);
            let Some(slot) = entries.push(&self.arena, frame, bytes) else {
                drop(entries);
                if core::mem::replace(&mut is_trimmed, true) {
                    return Err(self.full(frame));
                }
                self.trim();
                continue;
            };
            if word.compare_exchange(EMPTY, State::entry(class, slot), Relaxed, Relaxed).is_ok() {
                return Ok(());
            }
            // Someone else has put the same frame. Ours is still the last entry, so none moves.
            let _ = entries.remove(self.arena.room(), slot, frame);
        }
    }

    /// Reads the page that begins with `frame` and is `out.len()` bytes long, a whole number of frames. It stays stored.
    ///
    /// # Errors
    /// One of the frames does not exist, is not stored, or is corrupt. `out` then holds anything, and what is stored
    /// stays as it is: the page is lost, and the caller poisons it.
    pub fn get(&self, frame: Pfn, out: &mut [u8], scratch: &mut Scratch) -> Result<Content, MemoryError> {
        frames_of(frame, out.len(), self.frames())?;
        gather(out, |index, out| self.get_frame(frame + index, out, scratch))
    }

    fn get_frame(&self, frame: Pfn, out: &mut [u8], scratch: &mut Scratch) -> Result<Content, MemoryError> {
        let (word, shard) = self.at(frame);
        shard.gets.fetch_add(1, Relaxed);
        let read = loop {
            let seen = word.load(Relaxed);
            let (class, slot) = match State::of(seen) {
                State::Empty => return Err(MemoryError::NotStored { frame }),
                State::Zeros => return Ok(Content::Zeros),
                State::Entry { class, slot } => (class, slot),
            };
            let entries = shard.lock(class);
            if word.load(Relaxed) != seen {
                continue;
            }
            let entry = match entries.entry(slot, frame) {
                Ok(entry) => entry,
                Err(damage) => break Err(damage),
            };
            let expected = entry.checksum;
            // The copy is all that happens under the lock.
            let copy = scratch.copy(entry.bytes);
            drop(entries);
            let found = checksum(frame, copy);
            if found != expected {
                break Err(Damage::Checksum { expected, found });
            }
            break unpack(class, copy, out);
        };
        match read {
            Ok(()) => Ok(Content::Bytes),
            Err(damage) => {
                shard.corrupt.fetch_add(1, Relaxed);
                Err(MemoryError::CorruptStore { frame, damage })
            }
        }
    }

    /// [`Self::get`] and then [`Self::remove`].
    ///
    /// # Errors
    /// As for [`Self::get`]; nothing is removed then.
    pub fn take(&self, frame: Pfn, out: &mut [u8], scratch: &mut Scratch) -> Result<Content, MemoryError> {
        let content = self.get(frame, out, scratch)?;
        self.clear_all(frame, (out.len() / FRAME_LEN) as u64);
        self.arena.room().departed();
        Ok(content)
    }

    /// Forgets `count` frames from `frame` on, and says how many of them were stored.
    ///
    /// # Errors
    /// The frames do not exist.
    pub fn remove(&self, frame: Pfn, count: u64) -> Result<u64, MemoryError> {
        match frame.checked_add(count) {
            Some(end) if end.as_u64() <= self.frames() => {
                let cleared = self.clear_all(frame, count);
                self.arena.room().departed();
                Ok(cleared)
            }
            _ => Err(MemoryError::OutOfRange { frame, count, frames: self.frames() }),
        }
    }

    /// Whether the frame is stored. One that does not exist is not.
    pub fn holds(&self, frame: Pfn) -> bool {
        usize::try_from(frame.as_u64())
            .ok()
            .and_then(|index| self.words.get(index))
            .is_some_and(|word| word.load(Relaxed) != EMPTY)
    }

    /// What the store holds. Takes every class's lock once, in turn.
    pub fn stats(&self) -> StoreStats {
        let index_bytes = (self.words.len() * size_of::<AtomicU32>()) as u64;
        let mut stats = StoreStats { index_bytes, ..StoreStats::default() };
        for shard in self.shards.iter() {
            for class in 0..CLASSES {
                let entries = shard.lock(class);
                let frames = if class == RAW { &mut stats.raw_frames } else { &mut stats.packed_frames };
                *frames += u64::from(entries.live());
                stats.payload_bytes += entries.payload_bytes();
                stats.resident_bytes += entries.resident_bytes();
            }
            stats.zero_frames += shard.zeros.load(Relaxed);
            stats.puts += shard.puts.load(Relaxed);
            stats.gets += shard.gets.load(Relaxed);
            stats.corrupt += shard.corrupt.load(Relaxed);
        }
        stats
    }

    /// Damages a stored frame, for tests: changes a bit of byte `byte` (modulo their number) of its header and bytes.
    /// `false` if the frame has none.
    #[doc(hidden)]
    pub fn corrupt(&self, frame: Pfn, byte: usize) -> bool {
        let (word, shard) = self.at(frame);
        loop {
            let seen = word.load(Relaxed);
            let State::Entry { class, slot } = State::of(seen) else { return false };
            let mut entries = shard.lock(class);
            if word.load(Relaxed) == seen {
                entries.corrupt(slot, byte);
                return true;
            }
        }
    }

    /// The word and the shard of a frame that exists.
    fn at(&self, frame: Pfn) -> (&AtomicU32, &Shard) {
        let index = frame.as_u64() as usize;
        (&self.words[index], &self.shards[index % SHARDS])
    }

    /// Has every class give back all that it keeps behind its entries.
    fn trim(&self) {
        for shard in self.shards.iter() {
            for class in 0..CLASSES {
                shard.lock(class).trim(self.arena.room(), 1);
            }
        }
    }

    fn clear_all(&self, frame: Pfn, count: u64) -> u64 {
        (0..count).map(|index| u64::from(self.clear(frame + index))).sum()
    }

    /// Makes the frame empty, and says whether it was not.
    fn clear(&self, frame: Pfn) -> bool {
        let (word, shard) = self.at(frame);
        loop {
            let seen = word.load(Relaxed);
            match State::of(seen) {
                State::Empty => return false,
                State::Zeros => {
                    if word.compare_exchange(seen, EMPTY, Relaxed, Relaxed).is_ok() {
                        shard.zeros.fetch_sub(1, Relaxed);
                        return true;
                    }
                }
                State::Entry { class, slot } => {
                    let mut entries = shard.lock(class);
                    if word.load(Relaxed) != seen {
                        continue;
                    }
                    word.store(EMPTY, Relaxed);
                    if let Some(moved) = entries.remove(self.arena.room(), slot, frame) {
                        self.tell(
                            moved.frame,
                            State::entry(class, moved.from),
                            State::entry(class, moved.to),
                        );
                    }
                    return true;
                }
            }
        }
    }

    /// Changes the word of an entry's owner. An owner that the entry names wrongly does not have that word, and keeps its
    /// own; the true one then finds no entry, or another's, and knows that it is corrupt.
    fn tell(&self, owner: Pfn, from: u32, to: u32) {
        if let Some(word) = self.words.get(owner.as_u64() as usize) {
            let _ = word.compare_exchange(from, to, Relaxed, Relaxed);
        }
    }
}

/// Makes a frame of an entry's bytes, whose checksum is right.
fn unpack(class: usize, bytes: &[u8], out: &mut [u8]) -> Result<(), Damage> {
    if class != RAW {
        return scratch::unpack(bytes, out);
    }
    if bytes.len() != out.len() {
        return Err(Damage::Length { bytes: bytes.len() });
    }
    out.copy_from_slice(bytes);
    Ok(())
}

impl Shard {
    fn lock(&self, class: usize) -> MutexGuard<'_, Class> {
        self.classes[class].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("frames", &self.frames())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
