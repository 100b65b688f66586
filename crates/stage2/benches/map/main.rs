//! What an install costs: ours, which any number of threads may do at once, beside other crates' mappers, which have
//! one writer, or a mutex. The same format (NPT, which is x86's), the same heap, 4 KiB pages over 4 GiB, tables
//! allocated as they are needed. Ours bare, as theirs are, and with all that a fault does around an install.

mod peers;
mod whole;

use std::hint::black_box;

use std::time::{Duration, Instant};

use afterimage_mmu::{Barrier, Gfn, Mapped, PageSize, Pfn};
use afterimage_stage2::{
    Execute, HeapMemory, Leaf, MapError, MemoryType, Npt4, TableCache, Tables, Writable,
};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};

use peers::{LockedX86, Multiarch, X86};
use whole::{Locked, Whole};

const FRAMES: u64 = 1 << 20;

#[derive(Clone, Copy)]
enum Order {
    Sequential,
    Random,
}

impl Order {
    /// The frame that is mapped in turn `turn`: each once.
    #[inline]
    fn frame(self, turn: u64) -> u64 {
        match self {
            Self::Sequential => turn,
            // An odd factor permutes the numbers below a power of two.
            Self::Random => turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) & (FRAMES - 1),
        }
    }
}

/// The time of `map` for each frame, each to the frame behind it.
#[inline]
fn timed(order: Order, mut map: impl FnMut(u64, u64)) -> Duration {
    let started = Instant::now();
    for turn in 0..FRAMES {
        let frame = order.frame(turn);
        map(frame, frame + 1);
    }
    started.elapsed()
}

/// The same by two threads, each with a half of the frames and a `map` of its own.
fn timed_by_two<M: FnMut(u64, u64)>(order: Order, mapper: impl Fn() -> M + Sync) -> Duration {
    let start = std::sync::Barrier::new(2);
    let run = |half: u64| {
        let mut map = mapper();
        start.wait();
        let started = Instant::now();
        for turn in half * FRAMES / 2..(half + 1) * FRAMES / 2 {
            let frame = order.frame(turn);
            map(frame, frame + 1);
        }
        (started, Instant::now())
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| run(1));
        let (started, ended) = run(0);
        let (other_started, other_ended) = other.join().expect("it maps without a panic");
        ended.max(other_ended) - started.min(other_started)
    })
}

/// One vCPU's way to map.
fn ours(tables: &Tables<Npt4, HeapMemory>) -> impl FnMut(u64, u64) {
    let mut cache = TableCache::default();
    move |gfn, pfn| {
        let gfn = black_box(Gfn::new(gfn));
        until_fixed(|| {
            assert!(tables.top_up(&mut cache));
            tables.map(gfn, leaf(pfn), &mut cache)
        });
    }
}

/// Two threads that link the same table race for it, and the one that lost faults again.
#[inline]
fn until_fixed(mut install: impl FnMut() -> Result<Mapped, MapError>) {
    loop {
        match install() {
            Ok(Mapped::Fixed) => return,
            Ok(Mapped::LostRace) => {}
            other => panic!("each page is mapped once: {other:?}"),
        }
    }
}

/// A page that may be written, and was.
#[inline]
fn leaf(pfn: u64) -> Leaf {
    Leaf {
        pfn: Pfn::new(pfn),
        size: PageSize::Size4K,
        writable: Writable::Dirty,
        execute: Execute::Always,
        memory: MemoryType::WriteBack,
        accessed: true,
    }
}

fn tables() -> Tables<Npt4, HeapMemory> {
    Tables::new(HeapMemory::default()).expect("the heap has room")
}

fn bench(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, run: impl Fn() -> Duration) {
    group.bench_function(name, |b| b.iter_custom(|iterations| (0..iterations).map(|_| run()).sum()));
}

fn map(c: &mut Criterion) {
    for (name, order) in [("map, sequential", Order::Sequential), ("map, random", Order::Random)] {
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Elements(FRAMES)).sample_size(10);
        bench(&mut group, "x86_64, one writer", || {
            let mut theirs = X86::new();
            timed(order, |gfn, pfn| theirs.map(gfn, pfn))
        });
        bench(&mut group, "page_table_multiarch, one writer", || {
            let mut theirs = Multiarch::new();
            timed(order, |gfn, pfn| theirs.map(gfn, pfn))
        });
        bench(&mut group, "x86_64, mutex", || {
            let theirs = LockedX86::new();
            timed(order, |gfn, pfn| theirs.map(gfn, pfn))
        });
        bench(&mut group, "ours, bare", || timed(order, ours(&tables())));
        bench(&mut group, "ours, intent, heavy barrier", || {
            timed(order, Whole::new(Barrier::Heavy).mapper())
        });
        bench(&mut group, "ours, intent, fences", || timed(order, Whole::new(Barrier::Symmetric).mapper()));
        bench(&mut group, "ours, lock", || timed(order, Locked::new().mapper()));
        bench(&mut group, "x86_64, mutex, two threads", || {
            let theirs = LockedX86::new();
            timed_by_two(order, || |gfn, pfn| theirs.map(gfn, pfn))
        });
        bench(&mut group, "ours, bare, two threads", || {
            let tables = tables();
            timed_by_two(order, || ours(&tables))
        });
        bench(&mut group, "ours, intent, heavy barrier, two threads", || {
            let whole = Whole::new(Barrier::Heavy);
            timed_by_two(order, || whole.mapper())
        });
        bench(&mut group, "ours, lock, two threads", || {
            let locked = Locked::new();
            timed_by_two(order, || locked.mapper())
        });
        group.finish();
    }
}

criterion_group!(benches, map);
criterion_main!(benches);
