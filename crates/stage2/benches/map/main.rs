//! What an install costs, as ratios taken in one run: ours, which any number of threads may do at once, beside other
//! crates' mappers, which have one writer, or a mutex. The same format (NPT, which is x86's), the same memory, 4 KiB pages
//! over 4 GiB, tables linked as they are needed. Ours bare, as theirs are, and with all that a fault does around an
//! install. `cargo bench -p afterimage-stage2 --bench map`, or with `sequential`, `random`, `unmap` or `instructions` behind it.

#[path = "../compare/mod.rs"]
mod compare;
mod instructions;
mod peers;
mod pool;
mod whole;

use std::ops::Range;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use afterimage_mmu::{Barrier, Gfn, GfnRange, Mapped, PageSize, Pfn};
use afterimage_stage2::{Execute, Leaf, MapError, MemoryType, Npt4, TableCache, Tables, Writable};

use compare::{Measured, compare, per};
use peers::{LockedX86, Multiarch, X86};
use pool::Pool;
use whole::{Locked, Whole};

const ROUNDS: usize = 15;
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

/// One who maps frame by frame.
trait Map {
    /// Maps `gfn`, which is not mapped, to `pfn`.
    fn map(&mut self, gfn: u64, pfn: u64);
}

/// The time to map the frames of some turns, each to the frame behind it.
fn timed(order: Order, turns: Range<u64>, map: &mut impl Map) -> (Instant, Instant) {
    let started = Instant::now();
    for turn in turns {
        let frame = order.frame(turn);
        map.map(frame, frame + 1);
    }
    (started, Instant::now())
}

fn by_one(order: Order, map: &mut impl Map) -> Duration {
    let (started, ended) = timed(order, 0..FRAMES, map);
    ended - started
}

/// The same by two threads, each with a half of the frames and a mapper of its own.
fn by_two<M: Map>(order: Order, mapper: impl Fn() -> M + Sync) -> Duration {
    let start = std::sync::Barrier::new(2);
    let run = |half: u64| {
        let mut map = mapper();
        start.wait();
        timed(order, half * FRAMES / 2..(half + 1) * FRAMES / 2, &mut map)
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| run(1));
        let (started, ended) = run(0);
        let (other_started, other_ended) = other.join().expect("it maps without a panic");
        ended.max(other_ended) - started.min(other_started)
    })
}

/// Our tables, with nothing around them.
struct Ours<'t> {
    tables: &'t Tables<Npt4, Pool>,
    cache: TableCache<Pool>,
}

impl<'t> Ours<'t> {
    fn new(tables: &'t Tables<Npt4, Pool>) -> Self {
        Self { tables, cache: TableCache::default() }
    }
}

impl Install for Ours<'_> {
    #[inline]
    fn install(&mut self, gfn: Gfn, pfn: Pfn) -> Result<Mapped, MapError> {
        assert!(self.tables.top_up(&mut self.cache));
        self.tables.map(gfn, leaf(pfn), &mut self.cache)
    }
}

/// One try to map a frame with our tables.
trait Install {
    fn install(&mut self, gfn: Gfn, pfn: Pfn) -> Result<Mapped, MapError>;
}

impl<I: Install> Map for I {
    #[inline(never)]
    fn map(&mut self, gfn: u64, pfn: u64) {
        match self.install(Gfn::new(gfn), Pfn::new(pfn)) {
            Ok(Mapped::Fixed) => {}
            // Two threads that link the same table race for it, and the one that lost faults again.
            Ok(Mapped::LostRace) => self.map(gfn, pfn),
            other => panic!("each page is mapped once: {other:?}"),
        }
    }
}

/// A page that may be written, and was.
#[inline]
fn leaf(pfn: Pfn) -> Leaf {
    Leaf {
        pfn,
        size: PageSize::Size4K,
        writable: Writable::Dirty,
        execute: Execute::Always,
        memory: MemoryType::WriteBack,
        accessed: true,
    }
}

fn tables() -> Tables<Npt4, Pool> {
    Tables::new(Pool::new()).expect("the pool was just made")
}

fn measured<'a>(name: &'a str, round: impl Fn() -> Duration + 'a) -> Measured<'a> {
    (name, Box::new(move || per(round(), FRAMES)))
}

fn all(title: &str, order: Order) {
    let whole = |barrier| by_one(order, &mut Whole::new(barrier).mapper());
    let one = vec![
        measured("x86_64, one writer", || by_one(order, &mut X86::new())),
        measured("page_table_multiarch, one writer", || by_one(order, &mut Multiarch::new())),
        measured("x86_64, mutex", || by_one(order, &mut LockedX86::new().mapper())),
        measured("ours, bare", || by_one(order, &mut Ours::new(&tables()))),
        measured("ours, intent, heavy barrier", || whole(Barrier::Heavy)),
        measured("ours, intent, fences", || whole(Barrier::Symmetric)),
        measured("ours, lock", || by_one(order, &mut Locked::new().mapper())),
    ];
    compare(&format!("{title}, one thread"), "an install", ROUNDS, one);
    let two = vec![
        measured("ours, intent, heavy barrier, one thread", || whole(Barrier::Heavy)),
        measured("x86_64, one writer, one thread", || by_one(order, &mut X86::new())),
        measured("ours, intent, heavy barrier", || {
            let whole = Whole::new(Barrier::Heavy);
            by_two(order, || whole.mapper())
        }),
        // What two threads can do on this machine that have nothing in common.
        measured("x86_64, tables of each thread's own", || {
            let memory = Pool::new();
            by_two(order, || X86::with(memory.clone()))
        }),
        measured("x86_64, mutex", || {
            let theirs = LockedX86::new();
            by_two(order, || theirs.mapper())
        }),
        measured("ours, bare", || {
            let tables = tables();
            by_two(order, || Ours::new(&tables))
        }),
        measured("ours, lock", || {
            let locked = Locked::new();
            by_two(order, || locked.mapper())
        }),
    ];
    compare(&format!("{title}, two threads"), "an install", ROUNDS, two);
}

/// 1 GiB.
const UNMAPPED: u64 = 1 << 18;

/// The time to take away what was mapped before the clock runs.
fn unmapped<M: Map>(mut tables: M, unmap: impl FnOnce(&mut M)) -> f64 {
    let _ = timed(Order::Sequential, 0..UNMAPPED, &mut tables);
    let started = Instant::now();
    unmap(&mut tables);
    per(started.elapsed(), UNMAPPED)
}

fn unmap() {
    let measured: Vec<Measured<'_>> = vec![
        ("x86_64, one writer", Box::new(|| unmapped(X86::new(), |theirs| theirs.unmap(UNMAPPED)))),
        (
            "page_table_multiarch, one writer",
            Box::new(|| unmapped(Multiarch::new(), |theirs| theirs.unmap(UNMAPPED))),
        ),
        (
            "ours, bare",
            Box::new(|| {
                let tables = tables();
                unmapped(Ours::new(&tables), |ours| {
                    assert_eq!(ours.tables.zap(GfnRange::new(Gfn::new(0), Gfn::new(UNMAPPED))), UNMAPPED);
                })
            }),
        ),
    ];
    compare("1 GiB taken away, no flush", "a page", ROUNDS, measured);
}

fn main() -> ExitCode {
    if let Some(ended) = instructions::child() {
        return ended;
    }
    compare::run(&[
        ("instructions", instructions::count_all),
        ("sequential", || all("4 GiB in sequence", Order::Sequential)),
        ("random", || all("4 GiB in random order", Order::Random)),
        ("unmap", unmap),
    ]);
    ExitCode::SUCCESS
}
