//! What an install costs: ours, which any number of threads may do at once, beside the single-writer mapper of the
//! `x86_64` crate. The same format, the same memory, 4 KiB pages over 4 GiB, tables allocated as they are needed.

// UNSAFETY: the other crate's mapper asks for promises: that its tables are reachable, and that nothing else uses them.
#![expect(unsafe_code)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use afterimage_mmu::{Gfn, Mapped, PageSize, Pfn};
use afterimage_stage2::{
    Execute, HeapMemory, Leaf, MemoryType, Npt4, TableCache, TableMemory, Tables, Writable,
};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{
    FrameAllocator, MappedPageTable, Mapper, Page, PageTable, PageTableFlags, PhysFrame, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

const FRAMES: u64 = 1 << 20;

#[derive(Clone, Copy)]
enum Order {
    Sequential,
    Random,
}

impl Order {
    /// The frame that is mapped in turn `turn`: each once.
    fn frame(self, turn: u64) -> u64 {
        match self {
            Self::Sequential => turn,
            // An odd factor permutes the numbers below a power of two.
            Self::Random => turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 7 << 7 & (FRAMES - 1) | turn & 127,
        }
    }
}

fn ours(order: Order) -> Duration {
    let tables = Tables::<Npt4, _>::new(HeapMemory::default()).expect("the heap has room");
    let mut cache = TableCache::default();
    let started = Instant::now();
    for turn in 0..FRAMES {
        let frame = order.frame(turn);
        let leaf = Leaf {
            pfn: Pfn::new(frame + 1),
            size: PageSize::Size4K,
            writable: Writable::Dirty,
            execute: Execute::Always,
            memory: MemoryType::WriteBack,
            accessed: true,
        };
        assert!(tables.top_up(&mut cache));
        assert_eq!(tables.map(black_box(Gfn::new(frame)), leaf, &mut cache), Ok(Mapped::Fixed));
    }
    started.elapsed()
}

/// Table pages of the other mapper: from the same heap, freed when the mapper is gone.
struct Theirs {
    memory: HeapMemory,
    taken: Vec<Pfn>,
}

// SAFETY: each frame is new and belongs to the caller.
unsafe impl FrameAllocator<Size4KiB> for Theirs {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let table = self.memory.allocate(1)?;
        self.taken.push(table);
        Some(PhysFrame::containing_address(PhysAddr::new(table.as_u64() << 12)))
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

fn theirs(order: Order) -> Duration {
    let memory = HeapMemory::default();
    let mut frames = Theirs { memory: memory.clone(), taken: Vec::with_capacity(4096) };
    let root = frames.allocate_frame().expect("the heap has room");
    let mapping = Identity(memory.clone());
    // SAFETY: the page is new, zero and ours alone until it is freed below.
    let root = unsafe { &mut *mapping.frame_to_pointer(root) };
    // SAFETY: the root is empty, and the mapping is right for all that will be linked.
    let mut mapper = unsafe { MappedPageTable::new(root, mapping) };
    let flags = PageTableFlags::PRESENT
        | PageTableFlags::WRITABLE
        | PageTableFlags::USER_ACCESSIBLE
        | PageTableFlags::ACCESSED
        | PageTableFlags::DIRTY;
    let parents = flags - PageTableFlags::DIRTY;
    let started = Instant::now();
    for turn in 0..FRAMES {
        let frame = order.frame(turn);
        let page = Page::<Size4KiB>::containing_address(black_box(VirtAddr::new(frame << 12)));
        let to = PhysFrame::containing_address(PhysAddr::new((frame + 1) << 12));
        // SAFETY: nothing translates by these tables.
        let mapped = unsafe { mapper.map_to_with_table_flags(page, to, flags, parents, &mut frames) };
        mapped.expect("each page is mapped once").ignore();
    }
    let elapsed = started.elapsed();
    for table in frames.taken {
        // SAFETY: it was allocated as one page, and the mapper is not used again.
        unsafe { memory.free(table, 1) };
    }
    elapsed
}

fn bench(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, run: fn(Order) -> Duration, order: Order) {
    group.bench_function(name, |b| b.iter_custom(|iterations| (0..iterations).map(|_| run(order)).sum()));
}

fn map(c: &mut Criterion) {
    for (name, order) in [("map, sequential", Order::Sequential), ("map, random", Order::Random)] {
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Elements(FRAMES)).sample_size(10);
        bench(&mut group, "x86_64, one writer", theirs, order);
        bench(&mut group, "ours, any number", ours, order);
        group.finish();
    }
}

criterion_group!(benches, map);
criterion_main!(benches);
