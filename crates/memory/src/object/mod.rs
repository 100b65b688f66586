//! Memory objects: the pages of a virtual machine's memory, and where each one's bytes are.
//!
//! # Roles
//!
//! A [`MemoryObject`] owns the pages. A [`MemoryView`] is the object as one mapping shows it, and the
//! [`PrimaryMmu`](afterimage_mmu::PrimaryMmu) that the fault path of the secondary MMU over that mapping asks for pages
//! (`fault_in.rs`). Pages leave by [`MemoryObject::evict`], [`MemoryObject::discard`] and, by themselves, when the budget
//! is used up (`moves.rs`, `reclaim.rs`). The states and moves are in `pages.rs`.
//!
//! # Locks, in the order in which they may be taken
//!
//! 1. the claim that keeps discards and checkpoints apart (`apart.rs`);
//! 2. the clock hand's lock, for who makes room;
//! 3. an invalidation of every secondary MMU that maps the object (a count, and `mmu_lock` for its start and end);
//! 4. page locks, in ascending order;
//! 5. the fault's witness, `mmu_lock` for read or its intent, by a fault that holds its one page;
//! 6. the store's.
//!
//! Nobody waits for a page lock with `mmu_lock` held, and nobody waits for a device with either. In a memory file a
//! fault holds nothing when it goes on to install: what keeps the page in place until then is the engine's check against
//! invalidations. So a page changes only inside an invalidation **and** locked: the lock keeps two changes apart, the
//! invalidation keeps the change and the guest apart.
//!
//! # Budget
//!
//! Every page that becomes resident is counted before it exists. A fault that finds the budget and one batch used up makes
//! room itself, before it locks its page.

mod apart;
mod backing;
mod buffer;
mod fault_in;
mod moves;
mod pages;
mod pool;
mod populate;
mod reclaim;
mod stats;

use core::fmt;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use afterimage_mmu::{
    Age, Blocking, FRAME_BYTES, Hva, HvaRange, Notifier, PageSize, Pfn, PfnRange, Young, Zap,
    mutation::{self, Mutation},
};
use afterimage_uffd::Mapping;
use rustix::fd::BorrowedFd;

use self::apart::Apart;
use self::backing::Memory;
pub use self::fault_in::{MemoryView, ObjectPage, PageError};
pub use self::moves::Moved;
use self::pages::PageWord;
pub use self::pages::State;
pub use self::pool::FramePool;
use self::stats::Counters;
pub use self::stats::{Kind, KindStats, ObjectStats};
use crate::error::MemoryError;
use crate::source::Source;
use crate::store::{Store, StoreStats};

/// How a memory object is set up.
#[derive(Clone, Debug)]
pub struct ObjectOptions {
    /// Bytes of memory, a multiple of the page size.
    pub bytes: u64,
    /// The size of its pages: 4 KiB or 2 MiB.
    pub page_size: PageSize,
    /// Where pages come from at first; without a source they are zeros.
    pub source: Option<Arc<dyn Source>>,
    /// The most bytes that are to be resident. `None`: all of it may be.
    pub resident_bytes: Option<u64>,
    /// The most bytes of memory that evicted pages are to take, compressed. `None`: what they need, which is at most somewhat more
    /// than `bytes`. Where it is used up, evictions fail and pages stay resident, beyond `resident_bytes` if need be.
    pub stored_bytes: Option<u64>,
    /// Pages that one eviction takes at most, and by which the budget can be exceeded for a moment.
    pub batch_pages: u64,
}

impl ObjectOptions {
    /// Memory of 4 KiB pages without source or budget.
    pub fn new(bytes: u64) -> Self {
        Self {
            bytes,
            page_size: PageSize::Size4K,
            source: None,
            resident_bytes: None,
            stored_bytes: None,
            batch_pages: 64,
        }
    }
}

/// One who wants to know when pages are taken away, such as a guest that measures its latency.
pub trait InvalidationObserver: Send + Sync {
    /// An invalidation of `frames` is about to begin. What is returned comes back in `ended`.
    fn beginning(&self, kind: Kind, frames: PfnRange) -> usize;
    /// It has ended.
    fn ended(&self, token: usize);
}

/// The memory of a virtual machine.
pub struct MemoryObject {
    memory: Memory,
    page_size: PageSize,
    pages: Box<[PageWord]>,
    source: Option<Arc<dyn Source>>,
    store: Store,
    attachments: Mutex<Arc<[Attachment]>>,
    observer: OnceLock<Arc<dyn InvalidationObserver>>,
    /// Why each poisoned page is.
    lost: Mutex<HashMap<u64, Arc<MemoryError>>>,
    apart: Apart,
    budget: reclaim::Budget,
    resident: AtomicU64,
    peak: AtomicU64,
    counters: Counters,
}

/// A secondary MMU, and where it maps the object.
#[derive(Clone)]
struct Attachment {
    base: Hva,
    notifier: Arc<dyn Notifier>,
}

impl fmt::Debug for MemoryObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryObject")
            .field("memory", &self.memory)
            .field("page_size", &self.page_size)
            .field("pages", &self.pages.len())
            .finish_non_exhaustive()
    }
}

impl MemoryObject {
    /// Memory in a file (memfd; hugetlb for 2 MiB pages), which any number of mappings can show.
    ///
    /// # Errors
    /// Sizes that do not fit each other, or the system's refusal to give memory.
    pub fn shared(options: ObjectOptions) -> Result<Arc<Self>, MemoryError> {
        options.check()?;
        let memory = Memory::file(options.bytes, options.page_size)?;
        Self::new(memory, options)
    }

    /// Memory that `mapping`, of private anonymous pages, is by itself. It has that one mapping only.
    ///
    /// Here a page without a translation is gone. So evict the pages of a memslot *before* it is deleted or moved: those
    /// that were resident then are poisoned, and read neither as zeros nor as what they were.
    ///
    /// # Errors
    /// As for [`shared`](Self::shared), if the mapping has another size, or if there is no `/proc`.
    pub fn anonymous(mapping: &Arc<Mapping>, options: ObjectOptions) -> Result<Arc<Self>, MemoryError> {
        options.check()?;
        if mapping.len() != options.bytes || mapping.page_size() != options.page_size {
            return Err(MemoryError::WrongMapping {
                mapping_bytes: mapping.len(),
                mapping_page: mapping.page_size().bytes(),
                bytes: options.bytes,
                page: options.page_size.bytes(),
            });
        }
        Self::new(Memory::mapping(mapping)?, options)
    }

    /// Memory in frames of a pool, for secondary MMUs whose tables are walked by software. A page has a frame only while it
    /// is resident. The pool has as many as the budget and one batch take (all pages, where `stored_bytes` may keep them from
    /// going), and `spare_pages` pages more: to [migrate](Self::migrate) to, and so that a freed frame is not given away
    /// again at once.
    ///
    /// # Errors
    /// As for [`shared`](Self::shared), or if these are more pages than a pool can have (2³² − 1).
    pub fn pooled(options: ObjectOptions, spare_pages: u64) -> Result<Arc<Self>, MemoryError> {
        options.check()?;
        let page = options.page_size.bytes();
        let budget = options.resident_bytes.unwrap_or(options.bytes) / page;
        let pages = options.bytes / page;
        let resident = if options.stored_bytes.is_some() { pages } else { budget };
        let places = resident
            .checked_add(options.batch_pages)
            .and_then(|places| places.checked_add(spare_pages))
            .filter(|places| *places <= u64::from(u32::MAX))
            .ok_or_else(|| options.bad_budget())?;
        let pool = FramePool::new(pages, places, options.page_size)?;
        Self::new(Memory::Frames(Arc::new(pool)), options)
    }

    fn new(memory: Memory, options: ObjectOptions) -> Result<Arc<Self>, MemoryError> {
        let count = options.bytes / options.page_size.bytes();
        let first = if options.source.is_some() { State::Source } else { State::Zero };
        Ok(Arc::new(Self {
            memory,
            page_size: options.page_size,
            pages: (0..count).map(|_| PageWord::new(first)).collect(),
            store: Store::with_limit(options.bytes / FRAME_BYTES, options.stored_bytes.unwrap_or(u64::MAX))?,
            attachments: Mutex::new(Arc::new([])),
            observer: OnceLock::new(),
            lost: Mutex::new(HashMap::new()),
            apart: Apart::default(),
            budget: reclaim::Budget::new(&options),
            source: options.source,
            resident: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            counters: Counters::new(),
        }))
    }

    /// The memory file, to map; `None` for other memory.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.memory.as_file()
    }

    /// The frames that resident pages lie in, of [pooled](Self::pooled) memory.
    pub fn pool(&self) -> Option<&Arc<FramePool>> {
        match &self.memory {
            Memory::Frames(pool) => Some(pool),
            Memory::File(_) | Memory::HugeFile { .. } | Memory::Mapping { .. } => None,
        }
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        self.pages.len() as u64 * self.page_size.bytes()
    }

    /// The size of its pages.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// All frames.
    pub fn frames(&self) -> PfnRange {
        PfnRange::new(Pfn::new(0), Pfn::new(self.bytes() / FRAME_BYTES))
    }

    /// Tells the object of a mapping of all of it at `base`, and of the secondary MMU over that mapping. When it returns,
    /// nothing changes without the notifier being told. Until then the mapping must not be touched.
    ///
    /// Waits for the invalidations that are under way; not to be called from inside one.
    pub fn attach(&self, base: Hva, notifier: Arc<dyn Notifier>) {
        self.change_attachments(|known| {
            known.iter().cloned().chain([Attachment { base, notifier }]).collect()
        });
    }

    /// Forgets the secondary MMU over the mapping at `base`. When it returns, its notifier is used no more.
    ///
    /// Waits like [`attach`](Self::attach).
    pub fn detach(&self, base: Hva) {
        self.change_attachments(|known| known.iter().filter(|known| known.base != base).cloned().collect());
    }

    /// Forgets every secondary MMU: their virtual machines are gone. Waits like [`attach`](Self::attach).
    pub fn detach_all(&self) {
        self.change_attachments(|_| Arc::new([]));
    }

    fn change_attachments(&self, change: impl FnOnce(&[Attachment]) -> Arc<[Attachment]>) {
        let mut attachments = self.attachments();
        let next = change(&attachments);
        let mut old = core::mem::replace(&mut *attachments, next);
        drop(attachments);
        // An invalidation keeps the list that it began with: a page could change under a mapping that it does not know.
        while Arc::get_mut(&mut old).is_none() {
            rustix::thread::sched_yield();
        }
    }

    fn attachments(&self) -> MutexGuard<'_, Arc<[Attachment]>> {
        self.attachments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The object as a mapping of all of it at `base` shows it.
    pub fn view(self: &Arc<Self>, base: Hva) -> MemoryView {
        MemoryView::new(Arc::clone(self), base)
    }

    /// Tells `observer` of every invalidation from now on. Only the first call counts.
    pub fn observe(&self, observer: Arc<dyn InvalidationObserver>) {
        // A second observer is ignored, as documented.
        let _ = self.observer.set(observer);
    }

    /// Looks at the marks of past accesses of `frames` in every secondary MMU, or takes them away.
    ///
    /// [`Young::Yes`] if one of them has seen an access; else [`Young::Unknown`] if one cannot tell.
    pub fn age(&self, frames: PfnRange, age: Age) -> Young {
        let attachments = Arc::clone(&self.attachments());
        attachments.iter().fold(Young::No, |young, known| {
            match (young, known.notifier.age(known.hvas(frames), age)) {
                (Young::Yes, _) | (_, Young::Yes) => Young::Yes,
                (Young::Unknown, _) | (_, Young::Unknown) => Young::Unknown,
                (Young::No, Young::No) => Young::No,
            }
        })
    }

    /// Marks the resident pages of `frames` as used: for a secondary MMU that gives up its own marks of it, while the pages stay.
    ///
    /// # Panics
    /// If `frames` is empty, or not of the object.
    pub fn note_used(&self, frames: PfnRange) {
        let last = self.index(Pfn::new(frames.end.as_u64() - 1));
        for page in &self.pages[self.index(frames.start)..=last] {
            page.touch_resident();
        }
    }

    /// What was counted so far.
    pub fn stats(&self) -> ObjectStats {
        let page = self.page_size.bytes();
        ObjectStats {
            resident_bytes: self.resident.load(Ordering::Relaxed) * page,
            peak_bytes: self.peak.load(Ordering::Relaxed) * page,
            ..self.counters.get()
        }
    }

    /// What the store holds.
    pub fn store_stats(&self) -> StoreStats {
        self.store.stats()
    }

    /// Bytes of bookkeeping that every page costs at rest: its word, the store's index, and its place in a pool.
    pub fn bookkeeping_bytes(&self) -> u64 {
        let places = self.pool().map_or(0, |pool| pool.bookkeeping_bytes());
        size_of_val(&*self.pages) as u64 + self.store_stats().index_bytes + places
    }

    /// Why the page with this frame was poisoned, if it was.
    pub fn poison_cause(&self, frame: Pfn) -> Option<Arc<MemoryError>> {
        let page = self.page_of(frame).start.as_u64();
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).get(&page).cloned()
    }

    /// Where the bytes of the page with this frame are; `None` behind the end.
    pub fn state(&self, frame: Pfn) -> Option<State> {
        self.pages.get(self.index(frame)).map(PageWord::peek)
    }

    /// Damages what the store holds of `frame`, for tests of what happens then. `false` if it holds nothing.
    #[doc(hidden)]
    pub fn corrupt_stored(&self, frame: Pfn) -> bool {
        self.store.corrupt(frame, 0)
    }

    fn is_anonymous(&self) -> bool {
        matches!(self.memory, Memory::Mapping { .. })
    }

    fn index(&self, frame: Pfn) -> usize {
        (frame.as_u64() / self.page_size.frames()) as usize
    }

    /// The frames of the page that `frame` lies in.
    fn page_of(&self, frame: Pfn) -> PfnRange {
        self.page_at(self.index(frame))
    }

    fn page_at(&self, index: usize) -> PfnRange {
        let frames = self.page_size.frames();
        let start = Pfn::new(index as u64 * frames);
        PfnRange::new(start, start + frames)
    }

    /// The pages of `frames`, which must be whole ones.
    fn pages_of(&self, frames: PfnRange) -> Result<core::ops::Range<usize>, MemoryError> {
        let size = self.page_size.frames();
        let (start, end) = (frames.start.as_u64(), frames.end.as_u64());
        if start > end
            || end > self.frames().end.as_u64()
            || !start.is_multiple_of(size)
            || !end.is_multiple_of(size)
        {
            return Err(MemoryError::BadRange { frames, all: self.frames(), page: self.page_size.frames() });
        }
        Ok((start / size) as usize..(end / size) as usize)
    }

    /// Runs `change` inside an invalidation of `frames` in every secondary MMU.
    fn invalidating(&self, kind: Kind, frames: PfnRange, zap: Zap, change: &mut dyn FnMut()) {
        let broken = match kind {
            Kind::Evict => mutation::active(Mutation::EvictWithoutInvalidation),
            Kind::Discard => mutation::active(Mutation::DiscardWithoutInvalidation),
            Kind::Protect | Kind::Migrate => false,
        };
        let attachments = Arc::clone(&self.attachments());
        let token = self.observer.get().map(|observer| observer.beginning(kind, frames));
        let started = Instant::now();
        nest(if broken { &[] } else { &attachments }, frames, zap, change);
        self.counters.took(kind, started.elapsed());
        if let (Some(observer), Some(token)) = (self.observer.get(), token) {
            observer.ended(token);
        }
    }
}

impl Attachment {
    fn hvas(&self, frames: PfnRange) -> HvaRange {
        HvaRange::new(
            self.base + frames.start.as_u64() * FRAME_BYTES,
            self.base + frames.end.as_u64() * FRAME_BYTES,
        )
    }
}

/// One invalidation inside the other, so that each is active while `change` runs.
fn nest(attachments: &[Attachment], frames: PfnRange, zap: Zap, change: &mut dyn FnMut()) {
    match attachments.split_first() {
        None => change(),
        Some((first, rest)) => {
            let hvas = first.hvas(frames);
            first
                .notifier
                .invalidating(hvas, zap, Blocking::Allowed, &mut || nest(rest, frames, zap, change));
        }
    }
}

impl ObjectOptions {
    fn check(&self) -> Result<(), MemoryError> {
        let page = self.page_size.bytes();
        let fits = |bytes: u64| bytes > 0 && bytes.is_multiple_of(page);
        if !fits(self.bytes) || !self.resident_bytes.is_none_or(fits) {
            let bytes = if fits(self.bytes) { self.resident_bytes.unwrap_or(0) } else { self.bytes };
            return Err(MemoryError::Unaligned { bytes, page });
        }
        // Before anything is allocated for them.
        Store::check(self.bytes / FRAME_BYTES)?;
        if let Some(source) = &self.source
            && source.len_bytes() != self.bytes
        {
            return Err(MemoryError::SourceLength { source_bytes: source.len_bytes(), bytes: self.bytes });
        }
        if self.batch_pages == 0 || self.resident_bytes.is_some_and(|budget| budget > self.bytes) {
            return Err(self.bad_budget());
        }
        Ok(())
    }

    fn bad_budget(&self) -> MemoryError {
        MemoryError::BadBudget {
            budget: self.resident_bytes.unwrap_or(self.bytes),
            bytes: self.bytes,
            batch_pages: self.batch_pages,
        }
    }
}
