//! Taking pages away: evict, discard, migrate, and the checkpoint's protect. Each inside an invalidation.
//!
//! Inside, pages are locked a batch at a time: a fault that slipped past the pre-check waits for a batch at most, and
//! its page does not change between the copy that is stored and the moment when it is freed.

use std::sync::PoisonError;
use std::sync::atomic::Ordering::Relaxed;

use afterimage_mmu::{
    PfnRange, Zap,
    mutation::{self, Mutation},
};
use rustix::io::Errno;

use super::MemoryObject;
use super::apart::Work;
use super::backing::Memory;
use super::buffer::Buffer;
use super::pages::{PageLock, PageWord, State};
use super::stats::Kind;
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
    /// The frames are not whole pages of the object, or the store is [full](MemoryError::StoreFull); pages that were not stored
    /// stay resident. A page that cannot be read is poisoned, and no error here.
    pub fn evict(&self, frames: PfnRange) -> Result<Moved, MemoryError> {
        self.evict_some(frames, Victims::All)
    }

    pub(super) fn evict_some(&self, frames: PfnRange, victims: Victims) -> Result<Moved, MemoryError> {
        let pages = self.pages_of(frames)?;
        if !self.pages[pages.clone()].iter().any(PageWord::may_be_resident) {
            return Ok(Moved::default());
        }
        if self.store.is_full() {
            // The guest need not be disturbed in vain.
            return Err(self.store.full(frames.start));
        }
        // In anonymous memory an unmapped page is gone, so its bytes are taken first, from under write protection.
        let zap = if self.is_anonymous() { Zap::WriteProtect } else { Zap::Unmap };
        let mut moved = Moved::default();
        let mut result = Ok(());
        self.invalidating(Kind::Evict, frames, zap, &mut || {
            let mut buffer = Buffer::take(self.page_size.bytes());
            let mut first = pages.start;
            while first < pages.end && result.is_ok() {
                let batch = first..pages.end.min(first + LOCKED_PAGES);
                first = batch.end;
                result = self.evict_batch(batch, victims, &mut buffer, &mut moved);
            }
        });
        self.counters.moved(Kind::Evict, moved.frames);
        result.map(|()| moved)
    }

    fn evict_batch(
        &self,
        pages: core::ops::Range<usize>,
        victims: Victims,
        buffer: &mut Buffer,
        moved: &mut Moved,
    ) -> Result<(), MemoryError> {
        let mut stored = Vec::with_capacity(pages.len());
        let mut result = Ok(());
        for index in pages {
            if !self.pages[index].may_be_resident() {
                continue;
            }
            let lock = self.pages[index].lock();
            if lock.state() != State::Resident || victims == Victims::Unreferenced && lock.is_referenced() {
                continue;
            }
            match self.store_page(self.page_at(index), buffer) {
                Ok(()) => stored.push(Locked { index, lock }),
                Err(error) if is_loss(&error) => self.lose_resident(&Locked { index, lock }, error),
                Err(MemoryError::StoreFull { .. }) if mutation::active(Mutation::FreeUnstored) => {
                    stored.push(Locked { index, lock });
                }
                Err(error) => {
                    let refused = matches!(error, MemoryError::StoreFull { .. });
                    self.counters.store_refusals.fetch_add(u64::from(refused), Relaxed);
                    result = Err(error);
                    break;
                }
            }
        }
        let freed = self.free(&stored, State::Stored, moved);
        if freed.is_err() {
            for page in stored.iter().filter(|page| page.lock.state() == State::Resident) {
                let frames = self.page_at(page.index);
                self.store.remove(frames.start, frames.len())?;
            }
        }
        freed.and(result)
    }

    fn store_page(&self, page: PfnRange, buffer: &mut Buffer) -> Result<(), MemoryError> {
        let (bytes, scratch) = buffer.parts();
        self.memory.read(page, bytes).map_err(|errno| MemoryError::Read { frame: page.start, errno })?;
        self.store.put(page.start, bytes, scratch)
    }

    /// A resident page that cannot be read any more: whoever touches it next is told.
    fn lose_resident(&self, page: &Locked<'_>, error: MemoryError) {
        let frames = self.page_at(page.index);
        // What cannot be freed stays in the file, unmapped, until the page is written anew.
        let _ = self.memory.free(frames);
        self.unreserve(1);
        let _ = self.lose(frames, &page.lock, error);
    }

    /// Frees locked resident pages, run by run, and moves them to `state`. What cannot be freed stays resident, and the first
    /// error tells of it.
    fn free(&self, pages: &[Locked<'_>], state: State, moved: &mut Moved) -> Result<(), MemoryError> {
        let mut result = Ok(());
        for run in pages.chunk_by(|a, b| a.index + 1 == b.index) {
            if self.free_run(run, state, moved).is_err() {
                // A part of it may have gone.
                for page in run.chunks(1) {
                    result = result.and(self.free_run(page, state, moved));
                }
            }
        }
        result
    }

    fn free_run(&self, run: &[Locked<'_>], state: State, moved: &mut Moved) -> Result<(), MemoryError> {
        let frames =
            PfnRange::new(self.page_at(run[0].index).start, self.page_at(run[run.len() - 1].index).end);
        self.memory.free(frames)?;
        for page in run {
            page.lock.set(state);
        }
        self.unreserve(run.len() as u64);
        moved.frames += frames.len();
        Ok(())
    }

    /// Forgets the pages of `frames`, wherever they are. They come back as zeros.
    ///
    /// # Errors
    /// The frames are not whole pages of the object.
    pub fn discard(&self, frames: PfnRange) -> Result<Moved, MemoryError> {
        let pages = self.pages_of(frames)?;
        let _apart = self.apart.claim(Work::Discard, frames);
        let mut moved = Moved::default();
        let mut result = Ok(());
        self.invalidating(Kind::Discard, frames, Zap::Unmap, &mut || {
            result = self.discard_all(pages.clone(), &mut moved);
        });
        self.counters.moved(Kind::Discard, moved.frames);
        result.map(|()| moved)
    }

    fn discard_all(&self, pages: core::ops::Range<usize>, moved: &mut Moved) -> Result<(), MemoryError> {
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
                    State::Resident => {
                        resident.push(Locked { index, lock });
                        continue;
                    }
                    State::Stored => {
                        self.store.remove(page.start, page.len())?;
                    }
                    State::Source => {}
                    State::Poisoned => self.forget_loss(page),
                }
                lock.set(State::Zero);
                moved.frames += page.len();
            }
            self.free(&resident, State::Zero, moved)?;
        }
        Ok(())
    }

    fn forget_loss(&self, page: PfnRange) {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).remove(&page.start.as_u64());
        // What is corrupt was kept for whoever wants to look into it; what could not be written is still whole.
        self.store.remove(page.start, page.len()).expect("the page lies in the store");
    }

    /// Moves the resident pages of `frames` to other frames of the pool, as compaction does. A page for which there is no free
    /// frame stays.
    ///
    /// # Errors
    /// The frames are not whole pages of the object, or the memory is not [pooled](Self::pooled).
    pub fn migrate(&self, frames: PfnRange) -> Result<Moved, MemoryError> {
        let Memory::Frames(pool) = &self.memory else { return Err(MemoryError::NotPooled) };
        let pages = self.pages_of(frames)?;
        let mut moved = Moved::default();
        self.invalidating(Kind::Migrate, frames, Zap::Unmap, &mut || {
            for index in pages.clone() {
                let page = self.page_at(index);
                if !self.pages[index].may_be_resident() {
                    continue;
                }
                let lock = self.pages[index].lock();
                if lock.state() == State::Resident && pool.migrate(page).is_ok() {
                    moved.frames += page.len();
                }
            }
        });
        self.counters.moved(Kind::Migrate, moved.frames);
        Ok(moved)
    }

    /// Shows `visit` every page of `frames` as it is at one time: the guest reads mapped pages meanwhile; its
    /// writes wait, and so do its touches of pages that are not mapped.
    ///
    /// `visit` gets the page's first frame and its bytes, `None` for zeros. Pages stay where they are. Discards of them
    /// wait meanwhile, so `visit` must not wait for one.
    ///
    /// # Errors
    /// The frames are not whole pages of the object, or a page is lost; the pages before it were shown.
    pub fn protect(
        &self,
        frames: PfnRange,
        mut visit: impl FnMut(afterimage_mmu::Pfn, Option<&[u8]>),
    ) -> Result<Moved, MemoryError> {
        let pages = self.pages_of(frames)?;
        let _apart = self.apart.claim(Work::Checkpoint, frames);
        let mut result = Ok(Moved::default());
        self.invalidating(Kind::Protect, frames, Zap::WriteProtect, &mut || {
            let mut buffer = Buffer::take(self.page_size.bytes());
            result = pages.clone().try_fold(Moved::default(), |moved, index| {
                let page = self.page_at(index);
                let content = self.look(index, &mut buffer)?;
                visit(page.start, (content == Content::Bytes).then_some(buffer.page()));
                Ok(Moved { frames: moved.frames + page.len() })
            });
        });
        if let Ok(moved) = &result {
            self.counters.moved(Kind::Protect, moved.frames);
        }
        result
    }

    fn look(&self, index: usize, buffer: &mut Buffer) -> Result<Content, MemoryError> {
        let (page, word) = (self.page_at(index), &self.pages[index]);
        if word.peek() == State::Source {
            // Not locked: that may take long. Should the page move meanwhile, its bytes are the same.
            return self.produce(page, State::Source, buffer);
        }
        let lock = word.lock();
        match lock.state() {
            State::Resident => {
                let (bytes, _) = buffer.parts();
                self.memory
                    .read(page, bytes)
                    .map_err(|errno| MemoryError::Read { frame: page.start, errno })?;
                Ok(Content::Bytes)
            }
            State::Poisoned => Err(MemoryError::Lost { frame: page.start }),
            state @ (State::Source | State::Stored | State::Zero) => self.produce(page, state, buffer),
        }
    }
}

struct Locked<'p> {
    index: usize,
    lock: PageLock<'p>,
}

/// Whether the error means that a resident page's bytes are gone, and not that they cannot be had just now.
fn is_loss(error: &MemoryError) -> bool {
    matches!(error, MemoryError::Read { errno: Errno::IO | Errno::HWPOISON, .. })
}
