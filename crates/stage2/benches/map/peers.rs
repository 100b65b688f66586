//! The mappers of other crates, in the format they share with NPT, their tables from the same heap as ours.

// UNSAFETY: the other crates' mappers ask for promises: that their tables are reachable, and that nothing else uses them.
#![expect(unsafe_code)]

use std::hint::black_box;
use std::sync::Mutex;
use std::sync::OnceLock;

use afterimage_mmu::Pfn;
use afterimage_stage2::{HeapMemory, TableMemory};
use memory_addr::{PhysAddr as TheirPhysAddr, VirtAddr as TheirVirtAddr};
use page_table_multiarch::x86_64::X64PageTable;
use page_table_multiarch::{MappingFlags, PageSize, PagingHandler};
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{
    FrameAllocator, MappedPageTable, Mapper as _, Page, PageTable, PageTableFlags, PhysFrame, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

/// Table pages for the `x86_64` crate: from the heap, freed when the mapper is gone.
struct Frames {
    memory: HeapMemory,
    taken: Vec<Pfn>,
}

// SAFETY: each frame is new and belongs to the caller.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let table = self.memory.allocate(1)?;
        self.taken.push(table);
        Some(PhysFrame::containing_address(PhysAddr::new(table.as_u64() << 12)))
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        for table in &self.taken {
            // SAFETY: it was allocated as one page; the mapper is dropped before this, as the field before it.
            unsafe { self.memory.free(*table, 1) };
        }
    }
}

struct Identity(HeapMemory);

// SAFETY: only frames of this memory are linked, and these are where it says.
unsafe impl PageTableFrameMapping for Identity {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        let entries = self.0.entries(Pfn::new(frame.start_address().as_u64() >> 12));
        entries.cast_mut().cast()
    }
}

/// The `x86_64` crate's mapper: one writer.
pub(crate) struct X86 {
    mapper: MappedPageTable<'static, Identity>,
    frames: Frames,
}

impl X86 {
    pub(crate) fn new() -> Self {
        let memory = HeapMemory::default();
        let mut frames = Frames { memory: memory.clone(), taken: Vec::with_capacity(4096) };
        let root = frames.allocate_frame().expect("the heap has room");
        let mapping = Identity(memory);
        // SAFETY: the page is new, zero and the mapper's alone until it is freed with the others.
        let root = unsafe { &mut *mapping.frame_to_pointer(root) };
        // SAFETY: the root is empty, and the mapping is right for all that will be linked.
        let mapper = unsafe { MappedPageTable::new(root, mapping) };
        Self { mapper, frames }
    }

    #[inline]
    pub(crate) fn map(&mut self, gfn: u64, pfn: u64) {
        let flags = PageTableFlags::PRESENT
            | PageTableFlags::WRITABLE
            | PageTableFlags::USER_ACCESSIBLE
            | PageTableFlags::ACCESSED
            | PageTableFlags::DIRTY;
        let parents = flags - PageTableFlags::DIRTY;
        let page = Page::<Size4KiB>::containing_address(black_box(VirtAddr::new(gfn << 12)));
        let frame = PhysFrame::containing_address(PhysAddr::new(pfn << 12));
        // SAFETY: nothing translates by these tables.
        let mapped =
            unsafe { self.mapper.map_to_with_table_flags(page, frame, flags, parents, &mut self.frames) };
        mapped.expect("each page is mapped once").ignore();
    }
}

/// The same behind a mutex: any number of writers, one at a time.
pub(crate) struct LockedX86(Mutex<X86>);

impl LockedX86 {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(X86::new()))
    }

    #[inline]
    pub(crate) fn map(&self, gfn: u64, pfn: u64) {
        self.0.lock().expect("no thread panics while it maps").map(gfn, pfn);
    }
}

/// Table pages for `page_table_multiarch`, whose seam has no state.
struct Heap;

impl Heap {
    fn memory() -> &'static HeapMemory {
        static MEMORY: OnceLock<HeapMemory> = OnceLock::new();
        MEMORY.get_or_init(HeapMemory::default)
    }
}

fn frame_of(address: TheirPhysAddr) -> Pfn {
    Pfn::new(address.as_usize() as u64 >> 12)
}

impl PagingHandler for Heap {
    fn alloc_frames(count: usize, _align: usize) -> Option<TheirPhysAddr> {
        let table = Self::memory().allocate(count)?;
        Some(TheirPhysAddr::from((table.as_u64() << 12) as usize))
    }

    fn dealloc_frames(address: TheirPhysAddr, count: usize) {
        // SAFETY: the mapper frees what it allocated, once, when it goes.
        unsafe { Self::memory().free(frame_of(address), count) };
    }

    fn phys_to_virt(address: TheirPhysAddr) -> TheirVirtAddr {
        TheirVirtAddr::from(Self::memory().entries(frame_of(address)).expose_provenance())
    }
}

/// The mapper of `page_table_multiarch`: one writer.
pub(crate) struct Multiarch(X64PageTable<Heap>);

impl Multiarch {
    pub(crate) fn new() -> Self {
        Self(X64PageTable::try_new().expect("the heap has room"))
    }

    #[inline]
    pub(crate) fn map(&mut self, gfn: u64, pfn: u64) {
        let flags = MappingFlags::READ | MappingFlags::WRITE | MappingFlags::EXECUTE | MappingFlags::USER;
        let page = black_box(TheirVirtAddr::from((gfn << 12) as usize));
        let frame = TheirPhysAddr::from((pfn << 12) as usize);
        let mapped = self.0.cursor().map(page, frame, PageSize::Size4K, flags);
        mapped.expect("each page is mapped once");
    }
}
