//! A memory object, the machines that map it, and threads as their guests.

mod gate;

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use afterimage_memory::{
    Content, MemoryError, MemoryObject, MemoryView, ObjectOptions, ObjectPage, ObjectStats, PageError,
    Source, State,
};
use afterimage_mmu::{
    FRAME_BYTES, Fault, FaultInError, Gfn, GuestMmu, Memslot, Notifier, PageSize, Patience, Pfn, PfnRange,
    Policy, PrimaryMmu, RetryPoint, SlotId, Snapshot,
};
use afterimage_testing::skip;
use afterimage_uffd::{
    Backing, FaultReport, Features, Mapping, OpenOptions, Populate, ServeOptions, UffdError, UffdMmu, Workers,
};

pub(crate) use gate::Gate;

/// How long to wait for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// How long to watch what must not happen. A test that is right passes however long this is.
pub(crate) const WATCH: Duration = Duration::from_millis(30);

pub(crate) const BACKINGS: [Backing; 2] = [Backing::Shared, Backing::Anonymous];

/// What the source has in the first word of a frame; all other words are 0.
pub(crate) fn stamp(frame: u64) -> u64 {
    0x5eed_0000_0000_0000 | frame
}

/// Stamped frames, of which some cannot be read, and where a reader can be stopped.
#[derive(Debug)]
pub(crate) struct Stamps {
    frames: u64,
    pub(crate) gate: Gate,
    pub(crate) broken: Mutex<HashSet<u64>>,
    pub(crate) reads: AtomicU64,
}

impl Stamps {
    pub(crate) fn new(frames: u64) -> Arc<Self> {
        Arc::new(Self {
            frames,
            gate: Gate::default(),
            broken: Mutex::new(HashSet::new()),
            reads: AtomicU64::new(0),
        })
    }
}

impl Source for Stamps {
    fn len_bytes(&self) -> u64 {
        self.frames * FRAME_BYTES
    }

    fn read(&self, frame: Pfn, out: &mut [u8]) -> Result<Content, MemoryError> {
        self.reads.fetch_add(1, Relaxed);
        self.gate.pass(frame.as_u64());
        if self.broken.lock().expect("broken frames").contains(&frame.as_u64()) {
            return Err(MemoryError::SourceRead {
                frame,
                offset: frame.as_u64() * FRAME_BYTES,
                path: PathBuf::from("snapshot.mem"),
                error: io::Error::other("the disk is on fire"),
            });
        }
        out.fill(0);
        for (index, bytes) in (frame.as_u64()..).zip(out.chunks_mut(FRAME_BYTES as usize)) {
            bytes[..8].copy_from_slice(&stamp(index).to_ne_bytes());
        }
        Ok(Content::Bytes)
    }
}

/// The object's view, where a fault can be stopped after it was given its page, and memory can be short.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) view: MemoryView,
    pub(crate) gate: Gate,
    /// Times that there is to be no memory.
    pub(crate) shortages: AtomicU32,
}

impl PrimaryMmu for Watched {
    type Page = ObjectPage;
    type Error = PageError;

    fn fault_in(
        &self,
        slot: &Memslot,
        fault: &Fault,
        since: &Snapshot,
        patience: Patience,
    ) -> Result<ObjectPage, FaultInError<PageError>> {
        if self.shortages.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
            return Err(FaultInError::NoMemory);
        }
        let page = self.view.fault_in(slot, fault, since, patience);
        if page.is_ok() {
            self.gate.pass(fault.gfn.as_u64());
        }
        page
    }
}

/// What a test wants.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) test: &'static str,
    pub(crate) backing: Backing,
    pub(crate) page_size: PageSize,
    pub(crate) pages: u64,
    pub(crate) source: Option<Arc<dyn Source>>,
    /// In pages.
    pub(crate) budget: Option<u64>,
    /// In bytes.
    pub(crate) stored: Option<u64>,
    pub(crate) batch: u64,
    pub(crate) uffds: usize,
    pub(crate) workers: usize,
    pub(crate) idle: ServeOptions,
    pub(crate) policy: Policy,
}

impl Setup {
    pub(crate) fn new(test: &'static str, backing: Backing, pages: u64) -> Self {
        Self {
            test,
            backing,
            page_size: PageSize::Size4K,
            pages,
            source: None,
            budget: None,
            stored: None,
            batch: 8,
            uffds: 1,
            workers: 1,
            idle: ServeOptions::default(),
            policy: Policy::default(),
        }
    }

    pub(crate) fn source(self, source: &Arc<Stamps>) -> Self {
        Self { source: Some(Arc::clone(source) as _), ..self }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.pages * self.page_size.bytes()
    }

    fn options(&self) -> ObjectOptions {
        ObjectOptions {
            bytes: self.bytes(),
            page_size: self.page_size,
            source: self.source.clone(),
            resident_bytes: self.budget.map(|pages| pages * self.page_size.bytes()),
            stored_bytes: self.stored,
            batch_pages: self.batch,
        }
    }

    /// `None`, after saying so, where the host cannot.
    pub(crate) fn start(self) -> Option<Machine> {
        if self.backing == Backing::Shared {
            let object = MemoryObject::shared(self.options()).expect("an object");
            return self.join(&object);
        }
        let mapping = Mapping::anonymous(self.bytes(), self.page_size);
        let mapping = Arc::new(mapping.inspect_err(|error| skip(self.test, error)).ok()?);
        let object = MemoryObject::anonymous(&mapping, self.options()).expect("an object");
        self.machine(object, mapping)
    }

    /// One more machine over a shared object.
    pub(crate) fn join(self, object: &Arc<MemoryObject>) -> Option<Machine> {
        let file = object.file().expect("shared memory has a file");
        let mapping = Mapping::shared_unreserved(file, 0, self.bytes(), self.page_size).expect("a mapping");
        self.machine(Arc::clone(object), Arc::new(mapping))
    }

    fn machine(self, object: Arc<MemoryObject>, mapping: Arc<Mapping>) -> Option<Machine> {
        let mut features = Features::PAGEFAULT_FLAG_WP | Features::POISON;
        if self.backing == Backing::Shared {
            features |= Features::WP_HUGETLBFS_SHMEM | Features::MINOR_SHMEM | Features::MINOR_HUGETLBFS;
        }
        let mut uffds = Vec::new();
        for _ in 0..self.uffds {
            let uffd = OpenOptions::new().require(features).open();
            uffds.push(uffd.inspect_err(|error| skip(self.test, error)).ok()?);
        }
        let tables =
            UffdMmu::new(Arc::clone(&mapping), self.backing, uffds, self.workers).expect("a secondary MMU");
        let mmu = Arc::new(GuestMmu::new(tables, self.policy));
        let base = mapping.range().start;
        let machine = Machine {
            workers: None,
            view: Arc::new(Watched {
                view: object.view(base),
                gate: Gate::default(),
                shortages: AtomicU32::new(0),
            }),
            reports: Arc::default(),
            object,
            mmu,
            mapping,
        };
        machine.create_slot();
        machine.object.attach(base, Arc::clone(&machine.mmu) as Arc<dyn Notifier>);
        let reports = Arc::clone(&machine.reports);
        let report = move |report| reports.lock().expect("reports").push(report);
        let workers = Workers::start(&machine.mmu, &machine.view, self.idle, report).expect("workers");
        Some(Machine { workers: Some(workers), ..machine })
    }
}

type Reports = Mutex<Vec<FaultReport<PageError>>>;

/// A machine without CPUs: any thread is its guest.
#[derive(Debug)]
pub(crate) struct Machine {
    workers: Option<Workers>,
    pub(crate) object: Arc<MemoryObject>,
    pub(crate) mmu: Arc<GuestMmu<UffdMmu<ObjectPage>>>,
    pub(crate) view: Arc<Watched>,
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) reports: Arc<Reports>,
}

impl Machine {
    pub(crate) fn create_slot(&self) {
        let frames = self.object.bytes() / FRAME_BYTES;
        let slot = Memslot::new(SlotId(0), Gfn::new(0), frames, self.mapping.range().start);
        self.mmu.create_slot(slot).expect("a slot");
    }

    pub(crate) fn delete_slot(&self) {
        self.mmu.delete_slot(afterimage_mmu::SpaceId(0), SlotId(0)).expect("the slot");
    }

    /// The frames of pages `start..end`.
    pub(crate) fn pages(&self, start: u64, end: u64) -> PfnRange {
        let frames = self.object.page_size().frames();
        PfnRange::new(Pfn::new(start * frames), Pfn::new(end * frames))
    }

    pub(crate) fn all(&self) -> PfnRange {
        self.object.frames()
    }

    fn offset(&self, page: u64) -> u64 {
        page * self.object.page_size().bytes()
    }

    pub(crate) fn state(&self, page: u64) -> State {
        self.object.state(self.pages(page, page + 1).start).expect("the page exists")
    }

    /// Reads the first word of a page, in another thread.
    pub(crate) fn reading(&self, page: u64) -> Touch<u64> {
        let offset = self.offset(page);
        Touch::spawn(&self.mapping, move |mapping| mapping.word(offset).expect("inside").load(Relaxed))
    }

    pub(crate) fn writing(&self, page: u64, word: u64) -> Touch<()> {
        let offset = self.offset(page);
        Touch::spawn(&self.mapping, move |mapping| mapping.word(offset).expect("inside").store(word, Relaxed))
    }

    /// Touches a page from inside the kernel, where poison is an error and no SIGBUS.
    pub(crate) fn probing(&self, page: u64) -> Touch<Result<(), UffdError>> {
        let range = self.mapping.pages(page, 1).expect("inside");
        Touch::spawn(&self.mapping, move |mapping| mapping.populate(range, Populate::Read))
    }

    /// The first word of a page, as a guest reads it. Fails, and does not die, if the page is poisoned.
    #[track_caller]
    pub(crate) fn read(&self, page: u64) -> u64 {
        self.probing(page).finish().expect("the page can be read");
        self.reading(page).finish()
    }

    #[track_caller]
    pub(crate) fn write(&self, page: u64, word: u64) {
        self.writing(page, word).finish();
    }

    #[track_caller]
    pub(crate) fn assert_poisoned(&self, page: u64) {
        let error = self.probing(page).finish().expect_err("the page is poisoned");
        assert!(error.to_string().contains("MADV_POPULATE_READ"), "{error}");
    }

    pub(crate) fn evict(&self, frames: PfnRange) -> u64 {
        self.object.evict(frames).expect("evict").frames
    }

    pub(crate) fn discard(&self, frames: PfnRange) -> u64 {
        self.object.discard(frames).expect("discard").frames
    }

    /// Waits until a page that was touched counts as resident: in anonymous memory, a moment after it can be used.
    #[track_caller]
    pub(crate) fn wait_resident(&self, page: u64) {
        wait_until("the page becomes resident", || self.state(page) == State::Resident);
    }

    /// Waits until so many faults were taken, and no more: one that woke its guest is counted a moment after.
    #[track_caller]
    pub(crate) fn wait_taken(&self, faults: u64) {
        wait_until("every fault is counted", || self.mmu.fault_stats().taken >= faults);
        assert_eq!(self.mmu.fault_stats().taken, faults);
    }

    /// Frames in the store.
    pub(crate) fn store_frames(&self) -> u64 {
        self.object.store_stats().frames()
    }

    pub(crate) fn stats(&self) -> ObjectStats {
        self.object.stats()
    }

    pub(crate) fn retries(&self, point: RetryPoint) -> u64 {
        self.mmu.fault_stats().retries_at(point)
    }

    /// Ends the workers. The guests have ended.
    pub(crate) fn stop(mut self) -> Vec<FaultReport<PageError>> {
        self.workers.take().expect("it runs").stop().expect("workers");
        self.object.detach(self.mapping.range().start);
        std::mem::take(&mut self.reports.lock().expect("reports"))
    }

    /// Ends a machine one of whose workers has ended before; of what.
    #[track_caller]
    pub(crate) fn stop_failed(mut self) -> UffdError {
        self.workers.take().expect("it runs").stop().expect_err("a worker has ended")
    }

    /// Ends a machine where nothing was to go wrong.
    #[track_caller]
    pub(crate) fn stop_clean(self) {
        let reports = self.stop();
        assert!(reports.is_empty(), "{reports:?}");
    }
}

/// A thread that touches memory, and what came of it.
#[derive(Debug)]
pub(crate) struct Touch<T>(Receiver<T>);

impl<T: Send + 'static> Touch<T> {
    pub(crate) fn spawn(mapping: &Arc<Mapping>, act: impl FnOnce(&Mapping) -> T + Send + 'static) -> Self {
        let (sender, receiver) = channel();
        let mapping = Arc::clone(mapping);
        thread::spawn(move || {
            let came_of_it = act(&mapping);
            // What the test waits for is over with its memory: huge pages must not outlast the claim to them.
            drop(mapping);
            // Nobody listens if the test has failed.
            let _ = sender.send(came_of_it);
        });
        Self(receiver)
    }

    /// What came of it, once it has.
    #[track_caller]
    pub(crate) fn finish(self) -> T {
        self.0.recv_timeout(PATIENCE).expect("the thread should have gone on")
    }

    /// Watches for a while that it stands still.
    #[track_caller]
    pub(crate) fn assert_stands_still(&self) {
        assert!(!self.has_come_through(WATCH), "it should have waited");
    }

    /// Whether it has come through within `time`. What it brought is gone then.
    pub(crate) fn has_come_through(&self, time: Duration) -> bool {
        !matches!(self.0.recv_timeout(time), Err(RecvTimeoutError::Timeout))
    }
}

/// Waits until `done`.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < PATIENCE, "{what}");
        thread::yield_now();
    }
}

/// Small random numbers, the same in every run (xorshift64*).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}
