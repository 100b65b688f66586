//! A guest, its memory, and what serves its faults, put together.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use afterimage_memory::{
    Content, FileSource, InvalidationObserver, Kind, MemoryObject, MemoryView, ObjectOptions, ObjectPage,
    PageError, Pattern, PatternSource, Source,
};
use afterimage_mmu::{
    FRAME_BYTES, Gfn, GfnRange, GuestMmu, Memslot, Notifier, PageSize, Pfn, PfnRange, SlotId,
};
use afterimage_uffd::{Backing, FaultReport, Features, Mapping, OpenOptions, UffdMmu, Workers};
use afterimage_vm::{Discards, Guest, GuestMemory, GuestSpec, WORD_OFFSETS, Window, Windows};
use anyhow::{Context, Result};

use super::options::RunPlan;

/// Accesses of a vCPU between two of its discard requests, by the time that an access takes: huge pages are slow to
/// come.
fn discard_every(page_size: PageSize) -> u64 {
    match page_size {
        PageSize::Size4K => 3072,
        PageSize::Size2M | PageSize::Size1G => 128,
    }
}
/// Accesses of a vCPU between two reads of a page of any vCPU.
const CROSS_EVERY: u64 = 64;

/// The secondary MMU of a run.
pub(crate) type RunMmu = GuestMmu<UffdMmu<ObjectPage>>;

/// All parts of a run. Taken apart by `stop`, in order.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) object: Arc<MemoryObject>,
    pub(crate) mmu: Arc<RunMmu>,
    pub(crate) guest: Guest,
    pub(crate) workers: Workers,
    pub(crate) poisoned: Arc<Mutex<Vec<FaultReport<PageError>>>>,
}

impl Machine {
    /// Sets everything up and starts workers and guest.
    pub(crate) fn start(plan: &mut RunPlan) -> Result<Self> {
        let pattern = Pattern::new(plan.seed);
        let frames = plan.memory / FRAME_BYTES;
        let file = plan.source.take().map(Arc::new);
        let source: Arc<dyn Source> = match &file {
            Some(file) => Arc::clone(file) as _,
            None => Arc::new(PatternSource::new(pattern, GfnRange::new(Gfn::new(0), Gfn::new(frames)))),
        };
        let options = ObjectOptions {
            bytes: plan.memory,
            page_size: plan.page_size,
            source: Some(source),
            resident_bytes: Some(plan.resident),
            batch_pages: plan.batch_pages,
        };
        let (object, mapping) = memory(plan, options)?;
        let base = mapping.range().start;

        let mut uffds = Vec::with_capacity(plan.uffds);
        for _ in 0..plan.uffds {
            uffds.push(open_options(plan).open().context("guest memory cannot be served")?);
        }
        let tables = UffdMmu::new(Arc::clone(&mapping), plan.backing, uffds, plan.workers)?;
        let mmu = Arc::new(GuestMmu::new(tables, plan.policy));
        mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(0), frames, base))?;
        object.attach(base, Arc::clone(&mmu) as Arc<dyn Notifier>);

        let poisoned = Arc::new(Mutex::new(Vec::new()));
        let report = {
            let poisoned = Arc::clone(&poisoned);
            move |failed| poisoned.lock().unwrap_or_else(PoisonError::into_inner).push(failed)
        };
        let view: Arc<MemoryView> = Arc::new(object.view(base));
        let workers = Workers::start(&mmu, &view, plan.serve, report)?;

        let memory = guest_memory(&mapping);
        let mut spec = GuestSpec::new(plan.guest, memory, plan.page_size);
        spec.vcpus = plan.vcpus;
        spec.workload = plan.workload;
        spec.seed = plan.seed;
        spec.cross_every = CROSS_EVERY;
        spec.tag_check = file.is_none();
        if plan.invalidate.contains(&Kind::Discard) {
            spec.discards = Discards { every: discard_every(plan.page_size), share: 0.25 };
        }
        let guest = match &file {
            None => Guest::start(spec, |gfn| WORD_OFFSETS.map(|offset| pattern.word(gfn, offset / 8)))?,
            Some(file) => {
                let words = FileWords::of(file, frames)?;
                Guest::start(spec, |gfn| words.at(gfn))?
            }
        };
        object.observe(Arc::new(PublishWindows { windows: guest.windows(), open: Mutex::new(Vec::new()) }));
        Ok(Self { object, mmu, guest, workers, poisoned })
    }
}

fn open_options(plan: &RunPlan) -> OpenOptions {
    let shared = plan.backing == Backing::Shared;
    let huge = plan.page_size != PageSize::Size4K;
    let mut needed = Features::PAGEFAULT_FLAG_WP | Features::POISON;
    needed.set(Features::MISSING_HUGETLBFS, huge);
    needed.set(Features::MINOR_HUGETLBFS, huge && shared);
    needed.set(Features::MISSING_SHMEM | Features::MINOR_SHMEM, !huge && shared);
    needed.set(Features::WP_HUGETLBFS_SHMEM, huge || shared);
    OpenOptions::new().origin(plan.origin).require(needed)
}

/// The memory and the guest's mapping of it.
fn memory(plan: &RunPlan, options: ObjectOptions) -> Result<(Arc<MemoryObject>, Arc<Mapping>)> {
    match plan.backing {
        Backing::Anonymous => {
            let mapping = Arc::new(Mapping::anonymous(plan.memory, plan.page_size)?);
            Ok((MemoryObject::anonymous(&mapping, options)?, mapping))
        }
        Backing::Shared => {
            let object = MemoryObject::shared(options)?;
            let file = object.file().expect("shared memory has a file");
            let mapping = Arc::new(Mapping::shared_unreserved(file, 0, plan.memory, plan.page_size)?);
            Ok((object, mapping))
        }
    }
}

// UNSAFETY: hands the mapping to the guest, which the type system cannot follow.
#[expect(unsafe_code)]
fn guest_memory(mapping: &Arc<Mapping>) -> GuestMemory {
    let host = NonNull::new(mapping.as_ptr()).expect("a mapping is not at address 0");
    // SAFETY: (1) the mapping is that long; (2) it lives as long as the guest: the secondary MMU, which is
    // dropped after the guest, holds it; (3) it is only accessed as guest memory.
    unsafe { GuestMemory::from_raw(host, mapping.len() as usize) }
}

/// The words of a memory file that the guest checks. Read before the guest runs, past the engine.
struct FileWords(Vec<[u64; 3]>);

impl FileWords {
    fn of(file: &FileSource, frames: u64) -> Result<Self> {
        let mut page = vec![0; FRAME_BYTES as usize];
        let mut words = Vec::with_capacity(frames as usize);
        for frame in 0..frames {
            words.push(match file.read(Pfn::new(frame), &mut page)? {
                Content::Zeros => [0; 3],
                Content::Bytes => WORD_OFFSETS.map(|offset| {
                    let bytes = page[offset..offset + 8].try_into().expect("eight bytes");
                    u64::from_le_bytes(bytes)
                }),
            });
        }
        Ok(Self(words))
    }

    fn at(&self, gfn: Gfn) -> [u64; 3] {
        self.0[gfn.as_u64() as usize]
    }
}

/// Tells the guest which of its memory is being invalidated, so that it can tell its latencies apart.
#[derive(Debug)]
struct PublishWindows {
    windows: Windows,
    open: Mutex<Vec<Option<Window>>>,
}

impl InvalidationObserver for PublishWindows {
    fn beginning(&self, _kind: Kind, frames: PfnRange) -> usize {
        // The memory's frames are the guest's.
        let gfns = GfnRange::new(Gfn::new(frames.start.as_u64()), Gfn::new(frames.end.as_u64()));
        let window = Some(self.windows.open(gfns));
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        match open.iter().position(Option::is_none) {
            Some(free) => {
                open[free] = window;
                free
            }
            None => {
                open.push(window);
                open.len() - 1
            }
        }
    }

    fn ended(&self, token: usize) {
        drop(self.open.lock().unwrap_or_else(PoisonError::into_inner)[token].take());
    }
}
