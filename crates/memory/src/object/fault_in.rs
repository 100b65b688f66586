//! Faulting a page in: from the source, the store or nothing to a resident page.
//!
//! A source is read with nothing held, since it can take as long as it likes. In a memory file, and in a
//! pool of frames, the page is then filled under its lock, and stays resident whatever becomes of the fault. In anonymous memory there is no place for a page
//! that is not mapped: its bytes are handed to the engine, and the page stays locked until the engine gives the
//! reference back, with the witness still held. Used: it is resident. Unused: it is where it was.

use core::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};

use afterimage_mmu::{
    FRAME_BYTES, Fault, FaultInError, FaultKind, Found, Hva, Memslot, PageRef, PageSize, PageUse, Patience,
    Pfn, PfnRange, PrimaryMmu, Snapshot,
    mutation::{self, Mutation},
};
use afterimage_uffd::{Place, VmaPage};

use super::backing::WriteError;
use super::buffer::Buffer;
use super::pages::PageLock;
use super::reclaim::Room;
use super::{MemoryObject, State};
use crate::error::MemoryError;
use crate::source::Content;

/// Why a page is lost. Shared, since every fault on the page gets it.
#[derive(Clone)]
pub struct PageError(Arc<MemoryError>);

impl PageError {
    /// The cause.
    pub fn cause(&self) -> &Arc<MemoryError> {
        &self.0
    }
}

impl fmt::Debug for PageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Display for PageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A memory object as one mapping shows it: the primary MMU of the secondary MMU over that mapping.
#[derive(Clone, Debug)]
pub struct MemoryView {
    object: Arc<MemoryObject>,
    base: Hva,
}

impl MemoryView {
    pub(super) fn new(object: Arc<MemoryObject>, base: Hva) -> Self {
        Self { object, base }
    }

    /// The object.
    pub fn object(&self) -> &Arc<MemoryObject> {
        &self.object
    }

    /// Where the mapping begins.
    pub fn base(&self) -> Hva {
        self.base
    }

    /// The frame of the object that the mapping shows at `hva`; `None` outside.
    pub fn frame_at(&self, hva: Hva) -> Option<Pfn> {
        let frame = Pfn::new(hva.checked_sub(self.base)? / FRAME_BYTES);
        self.object.frames().contains(frame).then_some(frame)
    }
}

/// A reference to a page that was faulted in.
#[derive(Debug)]
pub struct ObjectPage {
    /// Where the frame that faulted is.
    pfn: Pfn,
    /// What the object moves at a time: contiguous, aligned, and gone as a whole.
    block: PageSize,
    held: Held,
}

#[derive(Debug)]
enum Held {
    /// In the memory file, or in a frame of the pool.
    Cached,
    /// Mapped already, in anonymous memory.
    Mapped,
    /// On its way to anonymous memory.
    Bytes(Arriving),
}

/// A page that is locked and has its place in the budget, until this is dropped.
#[derive(Debug)]
struct Arriving {
    object: Arc<MemoryObject>,
    index: usize,
    from: State,
    bytes: Buffer,
    mapped: bool,
}

impl Drop for Arriving {
    fn drop(&mut self) {
        let object = &self.object;
        let lock = object.pages[self.index].kept();
        if self.mapped {
            object.became_resident(object.page_at(self.index), self.from, &lock);
        } else {
            object.unreserve(1);
        }
    }
}

impl PageRef for ObjectPage {
    fn pfn(&self) -> Pfn {
        self.pfn
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn block(&self) -> PageSize {
        self.block
    }

    fn release(self, used: PageUse) {
        if let Held::Bytes(mut arriving) = self.held {
            arriving.mapped = used != PageUse::Unused;
        }
    }
}

impl VmaPage for ObjectPage {
    fn place(&self) -> Place<'_> {
        match &self.held {
            Held::Cached => Place::Cached,
            Held::Mapped => Place::Mapped,
            Held::Bytes(arriving) => Place::Bytes(arriving.bytes.page()),
        }
    }
}

impl PrimaryMmu for MemoryView {
    type Page = ObjectPage;
    type Error = PageError;

    fn fault_in(
        &self,
        slot: &Memslot,
        fault: &Fault,
        _since: &Snapshot,
        patience: Patience,
    ) -> Result<ObjectPage, FaultInError<PageError>> {
        let hva = slot.hva_of(fault.gfn);
        let Some(frame) = self.frame_at(hva) else {
            return Err(failed(MemoryError::NotMapped { hva, base: self.base, bytes: self.object.bytes() }));
        };
        self.object.fault_in(frame, fault, patience)
    }
}

impl MemoryObject {
    fn fault_in(
        self: &Arc<Self>,
        frame: Pfn,
        fault: &Fault,
        patience: Patience,
    ) -> Result<ObjectPage, FaultInError<PageError>> {
        let index = self.index(frame);
        let word = &self.pages[index];
        // In a pool a translation that the guest met says nothing about where the page is by now.
        if word.touch_resident() || fault.found == Found::Present && self.pool().is_none() {
            return Ok(self.held_page(frame, self.resident_page()));
        }
        if patience == Patience::NoWait && self.may_wait(word.peek()) {
            return Err(FaultInError::WouldWait);
        }
        loop {
            match self.bring(index, fault.kind, patience) {
                // The system has run out of memory, or of huge pages, before the budget has. Nothing goes for what nobody waits for.
                Err(FaultInError::NoMemory)
                    if fault.kind == FaultKind::Demand && self.make_room() == Room::Made => {}
                brought => return brought.map(|held| self.held_page(frame, held)),
            }
        }
    }

    /// The page that `frame` lies in, as the engine gets it.
    fn held_page(&self, frame: Pfn, held: Held) -> ObjectPage {
        let pfn = self.pool().map_or(frame, |pool| pool.pfn_of(frame));
        ObjectPage { pfn, block: self.page_size, held }
    }

    fn resident_page(&self) -> Held {
        if self.is_anonymous() { Held::Mapped } else { Held::Cached }
    }

    /// One try to make the page resident.
    fn bring(
        self: &Arc<Self>,
        index: usize,
        kind: FaultKind,
        patience: Patience,
    ) -> Result<Held, FaultInError<PageError>> {
        let page = self.page_at(index);
        let word = &self.pages[index];
        let mut buffer = Buffer::take(self.page_size.bytes());
        // Nothing is held yet: a discard of this page need not wait for the device.
        let read = (word.peek() == State::Source).then(|| self.produce(page, State::Source, &mut buffer));
        // Before the page is locked: making room locks others.
        let reserved = self.reserve(kind).ok_or(FaultInError::NoMemory)?;
        let lock = match patience {
            Patience::NoWait => word.try_lock().ok_or(FaultInError::WouldWait)?,
            Patience::Interruptible => word.lock(),
        };
        let from = lock.state();
        let content = match (from, read) {
            (State::Resident, _) => {
                drop(lock);
                word.touch_resident();
                return Ok(self.resident_page());
            }
            (State::Poisoned, _) => return Err(FaultInError::Poisoned(self.cause_of(page))),
            (State::Source, Some(read)) => read,
            (State::Source | State::Stored | State::Zero, _) => self.produce(page, from, &mut buffer),
        };
        let content = match content {
            Ok(content) => content,
            Err(error) => return Err(FaultInError::Poisoned(self.lose(page, &lock, error))),
        };
        let (bytes, _) = buffer.parts();
        if self.is_anonymous() {
            if content == Content::Zeros {
                bytes.fill(0);
            }
            reserved.keep();
            lock.keep();
            let object = Arc::clone(self);
            return Ok(Held::Bytes(Arriving { object, index, from, bytes: buffer, mapped: false }));
        }
        match self.memory.write(page, content, bytes) {
            Ok(()) => {}
            Err(WriteError::NoMemory) => return Err(FaultInError::NoMemory),
            Err(WriteError::Failed(errno)) => {
                let error = MemoryError::Write { frame: page.start, errno };
                return Err(FaultInError::Poisoned(self.lose(page, &lock, error)));
            }
        }
        self.became_resident(page, from, &lock);
        reserved.keep();
        Ok(Held::Cached)
    }

    /// Whether a page in this state may need I/O.
    fn may_wait(&self, state: State) -> bool {
        state == State::Source && self.source.as_ref().is_some_and(|source| source.may_wait())
    }

    /// The content of a page that is not resident. The page is locked, but for [`State::Source`].
    pub(super) fn produce(
        &self,
        page: PfnRange,
        from: State,
        buffer: &mut Buffer,
    ) -> Result<Content, MemoryError> {
        let (bytes, scratch) = buffer.parts();
        match from {
            State::Stored => self.store.get(page.start, bytes, scratch),
            State::Source => {
                let source = self.source.as_ref().expect("without a source no page is in that state");
                source.read(page.start, bytes)
            }
            State::Zero if mutation::active(Mutation::DiscardKeepsBytes) => match &self.source {
                Some(source) => source.read(page.start, bytes),
                None => Ok(Content::Zeros),
            },
            State::Zero | State::Resident | State::Poisoned => Ok(Content::Zeros),
        }
    }

    fn became_resident(&self, page: PfnRange, from: State, lock: &PageLock<'_>) {
        let counter = match from {
            State::Stored => {
                // The store's copy is old from the guest's first write on.
                self.store.remove(page.start, page.len()).expect("the page lies in the store");
                &self.counters.from_store
            }
            State::Source => &self.counters.from_source,
            State::Zero | State::Resident | State::Poisoned => &self.counters.from_zero,
        };
        counter.fetch_add(page.len(), Relaxed);
        lock.set(State::Resident);
    }

    /// The page's content is gone for good. It is locked and not resident, or just freed.
    pub(super) fn lose(&self, page: PfnRange, lock: &PageLock<'_>, error: MemoryError) -> PageError {
        let cause = Arc::new(error);
        self.lost
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(page.start.as_u64(), Arc::clone(&cause));
        self.counters.poisoned.fetch_add(1, Relaxed);
        lock.set(State::Poisoned);
        PageError(cause)
    }

    fn cause_of(&self, page: PfnRange) -> PageError {
        let cause = self.poison_cause(page.start);
        PageError(cause.unwrap_or_else(|| Arc::new(MemoryError::Lost { frame: page.start })))
    }
}

fn failed(cause: MemoryError) -> FaultInError<PageError> {
    FaultInError::Failed(PageError(Arc::new(cause)))
}
