//! The memory of a virtual machine in a VMM: restored page by page, evicted, discarded, and read for a checkpoint.
//!
//! `cargo run --release -p afterimage-memory --example vmm`. The guest is this thread here, which reads and writes the memory
//! by its address; a VMM gives that address to KVM.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use afterimage_memory::{FileSource, MemoryObject, ObjectOptions, ObjectPage};
use afterimage_mmu::{
    FRAME_BYTES, Gfn, GuestMmu, Memslot, Notifier, PageSize, Pfn, PfnRange, Policy, SlotId,
};
use afterimage_uffd::{Backing, Features, Mapping, OpenOptions, ServeOptions, UffdMmu, Workers};

/// A guest's memory, and who serves its faults.
struct GuestMemory {
    object: Arc<MemoryObject>,
    mapping: Arc<Mapping>,
    workers: Workers,
}

impl GuestMemory {
    /// `bytes` bytes from the file at `path`: each page is read when it is touched first, and a quarter may be resident.
    fn restore(path: &Path, bytes: u64) -> Result<Self, Box<dyn Error>> {
        // The pages, and where they come from.
        let object = MemoryObject::shared(ObjectOptions {
            source: Some(Arc::new(FileSource::open(path, bytes, PageSize::Size4K)?)),
            resident_bytes: Some(bytes / 4),
            stored_bytes: Some(bytes / 2),
            ..ObjectOptions::new(bytes)
        })?;

        // Where the guest finds them: `userspace_addr` of KVM's memory region is `mapping.as_ptr()`.
        let file = object.file().expect("shared memory has a file");
        let mapping = Arc::new(Mapping::shared(file, 0, bytes, PageSize::Size4K)?);
        let base = mapping.range().start;

        // Faults on it, and the engine that decides whether a page that was found may still be installed.
        let needed = Features::PAGEFAULT_FLAG_WP
            | Features::POISON
            | Features::MINOR_SHMEM
            | Features::WP_HUGETLBFS_SHMEM;
        let uffds = vec![OpenOptions::new().require(needed).open()?];
        let tables = UffdMmu::<ObjectPage>::new(Arc::clone(&mapping), Backing::Shared, uffds, 1)?;
        let mmu = Arc::new(GuestMmu::new(tables, Policy::default()));
        mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(0), bytes / FRAME_BYTES, base))?;

        // From here on the object tells the engine what it takes away, and workers serve the faults.
        object.attach(base, Arc::clone(&mmu) as Arc<dyn Notifier>);
        let view = Arc::new(object.view(base));
        let workers = Workers::start(&mmu, &view, ServeOptions::default(), |lost| {
            eprintln!("frame {} is poisoned: {}", lost.gfn, lost.error);
        })?;
        // Only now may anybody touch the memory, KVM included.
        Ok(Self { object, mapping, workers })
    }

    /// The guest has ended: nobody touches the memory any more.
    fn end(self) -> Result<(), Box<dyn Error>> {
        self.workers.stop()?;
        self.object.detach(self.mapping.range().start);
        Ok(())
    }
}

const FRAMES: u64 = 1024;

/// What a frame holds in the snapshot.
fn first_word(frame: u64) -> u64 {
    0x5eed_0000 + frame
}

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::temp_dir().join(format!("afterimage-example-{}", std::process::id()));
    let snapshot: Vec<u8> =
        (0..FRAMES).flat_map(|frame| first_word(frame).to_le_bytes().repeat(512)).collect();
    std::fs::write(&path, &snapshot)?;
    let shown = GuestMemory::restore(&path, FRAMES * FRAME_BYTES).and_then(show);
    std::fs::remove_file(&path)?;
    shown
}

fn show(memory: GuestMemory) -> Result<(), Box<dyn Error>> {
    let GuestMemory { object, mapping, .. } = &memory;
    let word = |frame: u64| mapping.word(frame * FRAME_BYTES).expect("it lies in the memory");
    let frames = |start, end| PfnRange::new(Pfn::new(start), Pfn::new(end));

    // The guest.
    assert_eq!(word(7).load(Relaxed), first_word(7));
    word(7).store(42, Relaxed);
    for frame in 100..400 {
        assert_eq!(word(frame).load(Relaxed), first_word(frame));
    }

    // The host, from any thread, while the guest runs.
    object.evict(frames(0, 64))?; // comes back as it was
    object.discard(frames(8, 16))?; // comes back as zeros
    let mut saved = 0;
    object.protect(frames(0, FRAMES), |_frame, bytes| saved += u64::from(bytes.is_some()))?; // as it is at one moment
    while object.is_over_budget() {
        object.reclaim()?; // what the guest has not used for a while
    }

    // The guest again.
    assert_eq!((word(7).load(Relaxed), word(8).load(Relaxed)), (42, 0));
    let stats = object.stats();
    println!(
        "{} frames from the file, {} from the store; {} of {FRAMES} frames resident, {saved} in the checkpoint",
        stats.from_source,
        stats.from_store,
        stats.resident_bytes / FRAME_BYTES,
    );
    memory.end()
}
