//! Frames of our own: memory for secondary MMUs whose tables are walked by software.
//!
//! A page has a frame only while it is resident, and another one each time. So a translation that outlives its
//! invalidation leads to a frame that is nobody's, or somebody else's. Both show:
//!
//! * A frame that is freed is overwritten with [`FramePool::POISON`]. Frames are reused in the order in which they were
//!   freed, so that it stays poisoned for long.
//! * Each frame carries a generation, which moves on when it is given to a page and when it is taken back: odd while it is
//!   somebody's. A walker that remembers it with a translation can tell a frame that has changed hands.
//! * When a frame is given to a page again, its poison is looked at, and that of all that are free when somebody asks for it: a
//!   write to a freed frame has left its mark there ([`FramePool::scribbled`]).
//!
//! A page's frame changes only with the page locked, inside an invalidation where it was mapped. Whoever reads
//! `places` without the lock gets a number that may be old, and has it checked by the engine before it is installed.

// UNSAFETY: frames are copied and poisoned by address, while a vCPU that breaks the rules may be using them.
#![expect(unsafe_code)]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use afterimage_mmu::{FRAME_BYTES, PageSize, Pfn, PfnRange};
use afterimage_uffd::Mapping;

use crate::error::MemoryError;
use crate::source::Content;

/// Words in 4 KiB.
const FRAME_WORDS: usize = (FRAME_BYTES / 8) as usize;

/// The frames of a [pooled](crate::MemoryObject::pooled) memory object: physical memory from frame 0 on.
#[derive(Debug)]
pub struct FramePool {
    mapping: Mapping,
    /// Bytes from the mapping's start to frame 0, for the alignment of huge pages.
    offset: u64,
    page_size: PageSize,
    /// By place in the pool (a page's worth of frames).
    generations: Box<[AtomicU32]>,
    free: Mutex<VecDeque<u32>>,
    /// By page of memory: its place in the pool, or the last one that it had.
    places: Box<[AtomicU32]>,
    scribbled: AtomicU64,
}

/// There is no free frame.
#[derive(Debug)]
pub(super) struct NoFrame;

impl FramePool {
    /// What every word of a frame holds that is nobody's.
    pub const POISON: u64 = 0x6b6b_6b6b_6b6b_6b6b;

    /// Frames for `places` pages at a time, of a memory of `pages` pages.
    pub(super) fn new(pages: u64, places: u64, page_size: PageSize) -> Result<Self, MemoryError> {
        let page = page_size.bytes();
        let mapping = Mapping::anonymous((places + 1) * page, PageSize::Size4K).map_err(MemoryError::Uffd)?;
        let start = mapping.range().start.as_u64();
        Ok(Self {
            offset: start.next_multiple_of(page) - start,
            mapping,
            page_size,
            generations: (0..places).map(|_| AtomicU32::new(0)).collect(),
            free: Mutex::new((0..places as u32).collect()),
            places: (0..pages).map(|_| AtomicU32::new(0)).collect(),
            scribbled: AtomicU64::new(0),
        })
    }

    /// How many frames of 4 KiB there are, used or not.
    pub fn frames(&self) -> u64 {
        self.generations.len() as u64 * self.page_size.frames()
    }

    /// Where the 4 KiB of frame `pfn` lie in this process, for as long as the pool lives; `None`: there is no such frame.
    ///
    /// The memory is the guest's: only to be accessed by atomics or volatile accesses.
    #[inline]
    pub fn frame(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        if pfn.as_u64() >= self.frames() {
            return None;
        }
        let offset = self.offset + pfn.as_u64() * FRAME_BYTES;
        // SAFETY: the mapping has room for all frames behind the first, which is at `self.offset`, less than a page.
        NonNull::new(unsafe { self.mapping.as_ptr().add(offset as usize) })
    }

    /// How often frame `pfn` has changed hands: odd while it is somebody's. 0 behind the end.
    #[inline]
    pub fn generation(&self, pfn: Pfn) -> u32 {
        let place = pfn.as_u64() / self.page_size.frames();
        // Acquire: who sees a new generation does not see older bytes.
        self.generations.get(place as usize).map_or(0, |generation| generation.load(Ordering::Acquire))
    }

    /// Frames that were found written to after they had been freed: when they were given to a page, or by [`sweep`](Self::sweep).
    pub fn scribbled(&self) -> u64 {
        self.scribbled.load(Ordering::Relaxed)
    }

    /// Looks at the poison of every frame that is free.
    pub fn sweep(&self) {
        for &place in self.free.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            self.look_at_poison(place);
        }
    }

    /// Bytes of bookkeeping.
    pub(super) fn bookkeeping_bytes(&self) -> u64 {
        size_of_val(&*self.places) as u64
    }

    /// The place of the page that `frame` of the memory object lies in, or the last that it had.
    #[inline]
    fn place_of(&self, frame: Pfn) -> &AtomicU32 {
        &self.places[(frame.as_u64() / self.page_size.frames()) as usize]
    }

    /// Where the bytes of `frame` of the memory object are, or were last.
    #[inline]
    pub(super) fn pfn_of(&self, frame: Pfn) -> Pfn {
        let frames = self.page_size.frames();
        // The page's state was read with acquire, and is set with release behind the place.
        let place = u64::from(self.place_of(frame).load(Ordering::Relaxed));
        Pfn::new(place * frames + frame.as_u64() % frames)
    }

    /// Gives `page` of the memory object, which is locked and has none, a frame that holds `bytes`, or zeros.
    pub(super) fn fill(&self, page: PfnRange, content: Content, bytes: &[u8]) -> Result<(), NoFrame> {
        let place = self.take()?;
        let to = self.at(place);
        match content {
            // SAFETY: (1) the frame has as many bytes, and is nobody else's; (2) the buffer is private.
            Content::Bytes => unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) },
            // SAFETY: as above.
            Content::Zeros => unsafe { core::ptr::write_bytes(to, 0, bytes.len()) },
        }
        self.place_of(page.start).store(place, Ordering::Relaxed);
        Ok(())
    }

    /// Copies the resident `page`, which is locked and which no guest writes meanwhile.
    pub(super) fn read(&self, page: PfnRange, bytes: &mut [u8]) {
        let from = self.at(self.place_of(page.start).load(Ordering::Relaxed));
        // SAFETY: (1) the frame has as many bytes; (2) an invalidation keeps guests from writing it; (3) the buffer is
        // private.
        unsafe { core::ptr::copy_nonoverlapping(from.cast_const(), bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Takes the frames of the resident `pages` back. They are locked, and an invalidation is active.
    pub(super) fn free(&self, pages: PfnRange) {
        let frames = self.page_size.frames();
        for page in 0..pages.len() / frames {
            self.give_back(self.place_of(pages.start + page * frames).load(Ordering::Relaxed));
        }
    }

    /// Moves the resident `page` to another frame. It is locked, and an invalidation is active.
    pub(super) fn migrate(&self, page: PfnRange) -> Result<(), NoFrame> {
        let place = self.take()?;
        let from = self.place_of(page.start).load(Ordering::Relaxed);
        let bytes = self.page_size.bytes() as usize;
        // SAFETY: (1) both frames have as many bytes and are different ones; (2) the new one is nobody else's; (3) an
        // invalidation keeps guests from writing the old one.
        unsafe { core::ptr::copy_nonoverlapping(self.at(from).cast_const(), self.at(place), bytes) };
        self.place_of(page.start).store(place, Ordering::Relaxed);
        self.give_back(from);
        Ok(())
    }

    fn take(&self) -> Result<u32, NoFrame> {
        let place = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop_front().ok_or(NoFrame)?;
        self.look_at_poison(place);
        self.generations[place as usize].fetch_add(1, Ordering::Release);
        Ok(place)
    }

    /// Counts the free `place` if it was written to. Once: it is poison again.
    fn look_at_poison(&self, place: u32) {
        let is_scribbled =
            || self.words(place).iter().any(|word| word.load(Ordering::Relaxed) != Self::POISON);
        // One that nobody has had is as the system made it.
        if self.generations[place as usize].load(Ordering::Relaxed) != 0 && is_scribbled() {
            self.scribbled.fetch_add(1, Ordering::Relaxed);
            self.poison(place);
        }
    }

    fn poison(&self, place: u32) {
        for word in self.words(place) {
            word.store(Self::POISON, Ordering::Relaxed);
        }
    }

    fn give_back(&self, place: u32) {
        self.generations[place as usize].fetch_add(1, Ordering::Release);
        self.poison(place);
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push_back(place);
    }

    fn at(&self, place: u32) -> *mut u8 {
        let first = Pfn::new(u64::from(place) * self.page_size.frames());
        self.frame(first).expect("places are those of the pool").as_ptr()
    }

    fn words(&self, place: u32) -> &[AtomicU64] {
        let count = FRAME_WORDS * self.page_size.frames() as usize;
        // SAFETY: (1) the page's frames lie in the mapping, one behind the other, aligned; (2) who uses them while they
        // are nobody's (a guest that breaks the rules) does so by atomics; (3) they live as long as the pool.
        unsafe { core::slice::from_raw_parts(self.at(place).cast_const().cast::<AtomicU64>(), count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(pool: &FramePool, pfn: Pfn) -> &AtomicU64 {
        let frame = pool.frame(pfn).expect("a frame of the pool").cast::<AtomicU64>();
        // SAFETY: (1) the frame is mapped and aligned; (2) it lives as long as the pool.
        unsafe { frame.as_ref() }
    }

    #[test]
    fn a_freed_frame_is_poison_until_it_is_anothers() {
        let pool = FramePool::new(4, 2, PageSize::Size4K).expect("memory");
        let page = PfnRange::new(Pfn::new(3), Pfn::new(4));
        let other = PfnRange::new(Pfn::new(0), Pfn::new(1));
        let bytes = [7; 4096];
        pool.fill(page, Content::Bytes, &bytes).expect("two are free");
        let first = pool.pfn_of(page.start);
        assert_eq!(word(&pool, first).load(Ordering::Relaxed), 0x0707_0707_0707_0707);
        assert_eq!(pool.generation(first), 1);
        pool.migrate(page).expect("one is free");
        let second = pool.pfn_of(page.start);
        assert_ne!(first, second);
        assert_eq!(word(&pool, first).load(Ordering::Relaxed), FramePool::POISON);
        assert_eq!((pool.generation(first), pool.generation(second)), (2, 1));
        assert!(pool.fill(other, Content::Zeros, &bytes).is_ok());
        assert!(pool.migrate(page).is_err(), "none is free");
        let mut read = [0; 4096];
        pool.read(page, &mut read);
        assert_eq!((read, pool.scribbled()), (bytes, 0));
    }

    #[test]
    fn a_write_to_a_freed_frame_is_noticed() {
        let pool = FramePool::new(1, 1, PageSize::Size2M).expect("memory");
        let zeros = vec![0; 2 << 20];
        let page = PfnRange::new(Pfn::new(0), Pfn::new(512));
        pool.fill(page, Content::Zeros, &zeros).expect("it is free");
        pool.free(page);
        word(&pool, Pfn::new(511)).store(1, Ordering::Relaxed);
        pool.fill(page, Content::Zeros, &zeros).expect("it is free");
        assert_eq!(pool.scribbled(), 1);
        pool.sweep();
        assert_eq!(pool.scribbled(), 1, "what is a page's may be written to");
        let aligned = pool.frame(Pfn::new(0)).expect("frame 0").as_ptr().addr();
        assert!(aligned.is_multiple_of(2 << 20));
        assert_eq!(pool.frame(Pfn::new(512)), None);
    }

    #[test]
    fn a_freed_frame_that_nobody_gets_again_is_looked_at_too() {
        let pool = FramePool::new(1, 8, PageSize::Size4K).expect("memory");
        let page = PfnRange::new(Pfn::new(0), Pfn::new(1));
        pool.fill(page, Content::Zeros, &[0; 4096]).expect("eight are free");
        let pfn = pool.pfn_of(page.start);
        pool.free(page);
        pool.sweep();
        assert_eq!(pool.scribbled(), 0, "one is poison, and the others were nobody's");
        word(&pool, pfn).store(1, Ordering::Relaxed);
        pool.sweep();
        pool.sweep();
        assert_eq!(pool.scribbled(), 1, "it is counted once");
    }
}
