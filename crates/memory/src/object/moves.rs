//! Taking pages away: evict, discard, and the checkpoint's protect. Each inside an invalidation.
//!
//! Inside, pages are locked a batch at a time: a fault that slipped past the pre-check waits for a batch at most, and
//! its page does not change between the copy that is stored and the moment when it is freed.

use std::sync::PoisonError;

use afterimage_mmu::{PfnRange, Zap};

use super::backing::Memory;
use super::buffer::Buffer;
use super::pages::{PageLock, State};
use super::stats::Kind;
use super::MemoryObject;
use crate::error::MemoryError;
use crate::source::Content;

/// What became of a range that was to be moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Frames of 4 KiB that changed their state (for a checkpoint: that were read).
    pub frames: u64,
}

/// Which resident pages an eviction takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Victims {
    All,
    Unreferenced,
}

/// Pages locked at a time.
const LOCKED_PAGES: usize = 64;

impl MemoryObject {
    /// Moves the resident pages of `frames` to the store. They come back as they were.
    ///
    /// # Errors
    /// The frames are not whole pages of the object, or the store is full; pages that were not stored stay resident.
    pub fn evict(&self, frames: PfnRange) -> Result<Moved, MemoryError> {
        self.evict_some(frames, Victims::All)
    }

    pub(super) fn evict_some(&self, frames: PfnRange, victims: Victims) -> Result<Moved, MemoryError> {
        let pages = self.pages_of(frames)?;
        if self.pages[pages.clone()].iter().all(|page| page.peek() != State::Resident) {
            return Ok(Moved::default());
        }
        let mut result = Ok(Moved::default());
        self.invalidating(Kind::Evict, frames, self.zap_before_free(), &mut || {
            let mut moved = Moved::default();
            let mut buffer = Buffer::take(self.page_size.bytes());
            let mut first = pages.start;
            while first < pages.end {
                let batch = first..pages.end.min(first + LOCKED_PAGES);
                match self.evict_batch(batch.clone(), victims, &mut buffer) {
                    Ok(evicted) => moved.frames += evicted,
                    Err(error) => {
                        result = Err(error);
                        return;
                    }
                }
                first = batch.end;
            }
            result = Ok(moved);
        });
        if let Ok(moved) = &result {
            self.counters.moved(Kind::Evict, moved.frames);
        }
        result
    }

    /// What an invalidation does to the mappings before pages are freed.
    ///
    /// In anonymous memory an unmapped page is gone, and another invalidation of the same page may be about to read it:
    /// a page goes with its lock held and not before. Until then the guest may read it, but not write.
    fn zap_before_free(&self) -> Zap {
        if matches!(self.memory, Memory::Mapping(_)) { Zap::WriteProtect } else { Zap::Unmap }
    }

    fn evict_batch(
        &self,
        pages: core::ops::Range<usize>,
        victims: Victims,
        buffer: &mut Buffer,
    ) -> Result<u64, MemoryError> {
        let mut stored = Vec::with_capacity(pages.len());
        let mut result = Ok(());
        for index in pages {
            let lock = self.pages[index].lock();
            if lock.state() != State::Resident || victims == Victims::Unreferenced && lock.is_referenced() {
                continue;
            }
            result = self.store_page(self.page_at(index), buffer);
            if result.is_err() {
                break;
            }
            stored.push(Locked { index, lock });
        }
        let frames = stored.len() as u64 * self.page_size.frames();
        self.free(stored, State::Stored)?;
        result.map(|()| frames)
    }

    fn store_page(&self, page: PfnRange, buffer: &mut Buffer) -> Result<(), MemoryError> {
        let (bytes, scratch) = buffer.parts();
        self.memory.read(page, bytes).map_err(|errno| MemoryError::Read { frame: page.start, errno })?;
        self.store.put(page.start, bytes, scratch)
    }

    /// Frees locked resident pages, run by run, and moves them to `state`.
    fn free(&self, pages: Vec<Locked<'_>>, state: State) -> Result<(), MemoryError> {
        for run in pages.chunk_by(|a, b| a.index + 1 == b.index) {
            let frames = PfnRange::new(self.page_at(run[0].index).start, self.page_at(run[run.len() - 1].index).end);
            // On an error the rest stays resident; what the store has of it is dropped when it is evicted again.
            self.memory.free(frames)?;
            for page in run {
                page.lock.set(state);
            }
            self.unreserve(run.len() as u64);
        }
        Ok(())
    }

    /// Forgets the pages of `frames`, wherever they are. They come back as zeros.
    ///
    /// # Errors
    /// The frames are not whole pages of the object.
    pub fn discard(&self, frames: PfnRange) -> Result<Moved, MemoryError> {
        let pages = self.pages_of(frames)?;
        let mut result = Ok(Moved::default());
        self.invalidating(Kind::Discard, frames, self.zap_before_free(), &mut || {
            result = self.discard_all(pages.clone());
        });
        if let Ok(moved) = &result {
            self.counters.moved(Kind::Discard, moved.frames);
        }
        result
    }

    fn discard_all(&self, pages: core::ops::Range<usize>) -> Result<Moved, MemoryError> {
        let mut moved = Moved::default();
        let mut first = pages.start;
        while first < pages.end {
            let batch = first..pages.end.min(first + LOCKED_PAGES);
            first = batch.end;
            let mut resident = Vec::with_capacity(batch.len());
            for index in batch {
                let lock = self.pages[index].lock();
                let page = self.page_at(index);
                match lock.state() {
                    State::Zero => continue,
                    State::Resident => resident.push(Locked { index, lock }),
                    State::Stored => {
                        self.store.remove(page.start, page.len())?;
                        lock.set(State::Zero);
                    }
                    State::Source => lock.set(State::Zero),
                    State::Poisoned => {
                        self.lost.lock().unwrap_or_else(PoisonError::into_inner).remove(&page.start.as_u64());
                        lock.set(State::Zero);
                    }
                }
                moved.frames += page.len();
            }
            self.free(resident, State::Zero)?;
        }
        Ok(moved)
    }

    /// Shows `visit` every page of `frames` as it is at one time: the guest can read meanwhile, and its writes wait.
    ///
    /// `visit` gets the page's first frame and its bytes, `None` for zeros. Pages stay where they are.
    ///
    /// # Errors
    /// The frames are not whole pages of the object, or a page is lost; the pages before it were shown.
    pub fn protect(
        &self,
        frames: PfnRange,
        mut visit: impl FnMut(afterimage_mmu::Pfn, Option<&[u8]>),
    ) -> Result<Moved, MemoryError> {
        let pages = self.pages_of(frames)?;
        let mut result = Ok(Moved::default());
        self.invalidating(Kind::Protect, frames, Zap::WriteProtect, &mut || {
            let mut buffer = Buffer::take(self.page_size.bytes());
            result = pages.clone().try_fold(Moved::default(), |moved, index| {
                let page = self.page_at(index);
                let lock = self.pages[index].lock();
                let content = self.look(page, lock.state(), &mut buffer)?;
                drop(lock);
                visit(page.start, (content == Content::Bytes).then_some(buffer.page()));
                Ok(Moved { frames: moved.frames + page.len() })
            });
        });
        if let Ok(moved) = &result {
            self.counters.moved(Kind::Protect, moved.frames);
        }
        result
    }

    fn look(&self, page: PfnRange, state: State, buffer: &mut Buffer) -> Result<Content, MemoryError> {
        match state {
            State::Resident => {
                let (bytes, _) = buffer.parts();
                self.memory.read(page, bytes).map_err(|errno| MemoryError::Read { frame: page.start, errno })?;
                Ok(Content::Bytes)
            }
            State::Poisoned => Err(MemoryError::Lost { frame: page.start }),
            State::Source | State::Stored | State::Zero => self.produce(page, state, buffer),
        }
    }
}

struct Locked<'p> {
    index: usize,
    lock: PageLock<'p>,
}
