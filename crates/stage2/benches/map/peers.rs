//! The mappers of other crates, in the format they share with NPT, their tables from the same memory as ours.

// UNSAFETY: the other crates' mappers ask for promises: that their tables are reachable, and that nothing else uses them.
#![expect(unsafe_code)]

use std::sync::Mutex;

use afterimage_mmu::Pfn;
use afterimage_stage2::TableMemory;
use memory_addr::{PhysAddr as TheirPhysAddr, VirtAddr as TheirVirtAddr};
use page_table_multiarch::x86_64::X64PageTable;
use page_table_multiarch::{MappingFlags, PageSize, PagingHandler};
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{
    FrameAllocator, MappedPageTable, Mapper as _, Page, PageTable, PageTableFlags, PhysFrame, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use crate::Map;
use crate::pool::Pool;

/// Table pages for the `x86_64` crate.
struct Frames(Pool);

// SAFETY: each frame is new and belongs to the caller.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    #[inline]
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let table = self.0.allocate(1)?;
        Some(PhysFrame::containing_address(PhysAddr::new(table.as_u64() << 12)))
    }
}

struct Identity(Pool);

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
        Self::with(Pool::new())
    }

    /// With tables from `memory`, which others may have tables in.
    pub(crate) fn with(memory: Pool) -> Self {
        let mut frames = Frames(memory.clone());
        let root = frames.allocate_frame().expect("it was just made");
        let mapping = Identity(memory);
        // SAFETY: the page is new, zero and the mapper's alone until it is freed with the others.
        let root = unsafe { &mut *mapping.frame_to_pointer(root) };
        // SAFETY: the root is empty, and the mapping is right for all that will be linked.
        let mapper = unsafe { MappedPageTable::new(root, mapping) };
        Self { mapper, frames }
    }
}

impl X86 {
    /// Unmaps the first `frames` frames, with a flush of none.
    pub(crate) fn unmap(&mut self, frames: u64) {
        for gfn in 0..frames {
            let page = Page::<Size4KiB>::containing_address(VirtAddr::new(gfn << 12));
            let (_, flush) = self.mapper.unmap(page).expect("all of them are mapped");
            flush.ignore();
        }
    }
}

impl Map for X86 {
    #[inline(never)]
    fn map(&mut self, gfn: u64, pfn: u64) {
        let flags = PageTableFlags::PRESENT
            | PageTableFlags::WRITABLE
            | PageTableFlags::USER_ACCESSIBLE
            | PageTableFlags::ACCESSED
            | PageTableFlags::DIRTY;
        let parents = flags - PageTableFlags::DIRTY;
        let page = Page::<Size4KiB>::containing_address(VirtAddr::new(gfn << 12));
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

    pub(crate) fn mapper(&self) -> impl Map {
        LockedMapper(&self.0)
    }
}

struct LockedMapper<'m>(&'m Mutex<X86>);

impl Map for LockedMapper<'_> {
    #[inline]
    fn map(&mut self, gfn: u64, pfn: u64) {
        self.0.lock().expect("no thread panics while it maps").map(gfn, pfn);
    }
}

/// Table pages for `page_table_multiarch`, whose seam has no state.
struct Seam;

impl PagingHandler for Seam {
    #[inline]
    fn alloc_frames(count: usize, _align: usize) -> Option<TheirPhysAddr> {
        let table = Pool::again().allocate(count)?;
        Some(TheirPhysAddr::from((table.as_u64() << 12) as usize))
    }

    fn dealloc_frames(_address: TheirPhysAddr, _count: usize) {}

    #[inline]
    fn phys_to_virt(address: TheirPhysAddr) -> TheirVirtAddr {
        TheirVirtAddr::from(Pool::at(Pfn::new(address.as_usize() as u64 >> 12)).expose_provenance())
    }
}

/// The mapper of `page_table_multiarch`: one writer.
pub(crate) struct Multiarch {
    table: X64PageTable<Seam>,
    _pool: Pool,
}

impl Multiarch {
    pub(crate) fn new() -> Self {
        let pool = Pool::new();
        Self { table: X64PageTable::try_new().expect("the pool was just made"), _pool: pool }
    }
}

impl Multiarch {
    /// Unmaps the first `frames` frames, with a flush of none.
    pub(crate) fn unmap(&mut self, frames: u64) {
        let mut cursor = self.table.cursor();
        for gfn in 0..frames {
            let page = TheirVirtAddr::from((gfn << 12) as usize);
            cursor.unmap(page).expect("all of them are mapped");
        }
        // It would flush now, by an instruction that only a kernel may execute.
        std::mem::forget(cursor);
    }
}

impl Map for Multiarch {
    #[inline(never)]
    fn map(&mut self, gfn: u64, pfn: u64) {
        let flags = MappingFlags::READ | MappingFlags::WRITE | MappingFlags::EXECUTE | MappingFlags::USER;
        let page = TheirVirtAddr::from((gfn << 12) as usize);
        let frame = TheirPhysAddr::from((pfn << 12) as usize);
        let mapped = self.table.cursor().map(page, frame, PageSize::Size4K, flags);
        mapped.expect("each page is mapped once");
    }
}
