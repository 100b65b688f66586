//! The tables under several threads, and what they say of what cannot be done.
#![cfg(not(shuttle))]

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use afterimage_mmu::{Access, CachedMmio, Found, Gfn, GfnRange, Mapped, PageSize, Pfn};
use afterimage_stage2::{
    Change, Entry, Ept, Execute, Format, HeapMemory, Leaf, MapError, MemoryType, Npt, Step, Sv39x4, Sv48x4,
    TableCache, Tables, Translation, Vmsa, Writable,
};

fn leaf(pfn: u64, size: PageSize, writable: Writable) -> Leaf {
    Leaf {
        pfn: Pfn::new(pfn),
        size,
        writable,
        execute: Execute::Always,
        memory: MemoryType::WriteBack,
        accessed: true,
    }
}

fn page(pfn: u64) -> Leaf {
    leaf(pfn, PageSize::Size4K, Writable::Dirty)
}

fn tables<F: Format>() -> (Tables<F, HeapMemory>, HeapMemory) {
    let memory = HeapMemory::default();
    (Tables::new(memory.clone()).expect("the heap has room"), memory)
}

fn gfns(start: u64, end: u64) -> GfnRange {
    GfnRange::new(Gfn::new(start), Gfn::new(end))
}

#[test]
fn errors_say_what_is_in_the_way() {
    let (tables, _) = tables::<Sv39x4>();
    let mut cache = TableCache::default();
    let out = Gfn::new(1 << 29);
    assert_eq!(tables.map(out, page(1), &mut cache), Err(MapError::OutOfReach { gfn: out, bits: 41 }));
    let gfn = Gfn::new(7);
    assert!(matches!(tables.map(gfn, page(1), &mut cache), Err(MapError::NoTable(_))));
    assert!(tables.top_up(&mut cache));
    assert_eq!(tables.map(gfn, page(1), &mut cache), Ok(Mapped::Fixed));
    let refused = tables.map(gfn, page(1 << 44), &mut cache);
    assert!(matches!(refused, Err(MapError::Refused(_))), "{refused:?}");
    // The mapping that is there stays.
    assert!(matches!(tables.map(gfn, page(2), &mut cache), Err(MapError::Conflict { .. })));
    assert_eq!(tables.translate(gfn, Access::READ), Translation::Frame(Pfn::new(1)));
}

#[test]
fn a_huge_page_of_1g_is_one_entry() {
    let (tables, memory) = tables::<Npt<4>>();
    let mut cache = TableCache::default();
    assert!(tables.top_up(&mut cache));
    let huge = leaf(3 << 18, PageSize::Size1G, Writable::Dirty);
    assert_eq!(tables.map(Gfn::new((1 << 18) + 5), huge, &mut cache), Ok(Mapped::Fixed));
    assert_eq!(tables.walk(Gfn::new((2 << 18) - 1)).entry, Entry::Leaf(huge));
    let last = Gfn::new((2 << 18) - 1);
    assert_eq!(tables.translate(last, Access::READ), Translation::Frame(Pfn::new((4 << 18) - 1)));
    drop(cache);
    assert_eq!(memory.pages(), 2, "the root and one table");
    assert_eq!(tables.zap(gfns((2 << 18) - 1, 3 << 18)), 1 << 18, "a leaf goes as a whole");
}

#[test]
fn mmio_entries_come_and_go_by_generation() {
    let (tables, _) = tables::<Ept<4, 1>>();
    let mut cache = TableCache::default();
    let gfn = Gfn::new(0xfee00);
    assert_eq!(tables.cached_mmio(gfn), CachedMmio::Gone);
    assert!(tables.top_up(&mut cache));
    assert_eq!(tables.cache_mmio(gfn, 3, &mut cache), Ok(Some(Mapped::Fixed)));
    assert_eq!(tables.cache_mmio(gfn, 3, &mut cache), Ok(Some(Mapped::Spurious)));
    assert_eq!(tables.cache_mmio(gfn, 4, &mut cache), Ok(Some(Mapped::Fixed)));
    assert_eq!(tables.cached_mmio(gfn), CachedMmio::Generation(4));
    assert_eq!(tables.translate(gfn, Access::READ), Translation::Fault(Found::Reserved));
    assert_eq!(tables.zap(tables.reach()), 0, "it maps nothing");
    assert_eq!(tables.map(gfn, page(9), &mut cache), Ok(Mapped::Fixed), "a slot was created there");
    assert_eq!(tables.cache_mmio(gfn, 5, &mut cache), Ok(Some(Mapped::LostRace)));
    assert_eq!(tables.cached_mmio(gfn), CachedMmio::Gone);
}

/// Installs `order` with as many retries as it takes; how many installs were this thread's.
fn install<F: Format>(tables: &Tables<F, HeapMemory>, order: impl Iterator<Item = u64>) -> u64 {
    let mut cache = TableCache::default();
    let mut fixed = 0;
    for gfn in order {
        loop {
            assert!(tables.top_up(&mut cache));
            match tables.map(Gfn::new(gfn), page(gfn + 1), &mut cache).expect("both map the same") {
                Mapped::Fixed => fixed += 1,
                Mapped::Spurious => {}
                Mapped::LostRace | Mapped::LargerLeaf => continue,
            }
            break;
        }
    }
    fixed
}

fn two_threads<F: Format>(
    first: impl Iterator<Item = u64> + Send,
    second: impl Iterator<Item = u64> + Send,
    distinct: u64,
) {
    let (tables, memory) = tables::<F>();
    let start = Barrier::new(2);
    let fixed = std::thread::scope(|scope| {
        let one = scope.spawn(|| {
            start.wait();
            install(&tables, first)
        });
        start.wait();
        install(&tables, second) + one.join().expect("the thread installs without a panic")
    });
    assert_eq!(fixed, distinct, "each frame is installed once");
    for gfn in 0..distinct {
        assert_eq!(tables.translate(Gfn::new(gfn), Access::WRITE), Translation::Frame(Pfn::new(gfn + 1)));
    }
    let below_root = |level: u32| {
        if level < u32::from(F::ROOT_LEVEL.number()) { distinct.div_ceil(512_u64.pow(level)) } else { 0 }
    };
    let needed = F::ROOT_PAGES as u64 + (1..5).map(below_root).sum::<u64>();
    assert_eq!(memory.pages() as u64, needed, "the losers' tables are gone");
}

const FRAMES: u64 = 1 << 14;

#[test]
fn two_threads_install_side_by_side() {
    two_threads::<Npt<4>>(0..FRAMES / 2, FRAMES / 2..FRAMES, FRAMES);
    two_threads::<Vmsa<40>>((0..FRAMES).step_by(2), (1..FRAMES).step_by(2), FRAMES);
    two_threads::<Sv39x4>((0..FRAMES).step_by(2), (1..FRAMES).step_by(2), FRAMES);
}

#[test]
fn two_threads_install_the_same_frames() {
    two_threads::<Ept<4, 1>>(0..FRAMES, 0..FRAMES, FRAMES);
    two_threads::<Sv48x4>(0..FRAMES, (0..FRAMES).rev(), FRAMES);
    two_threads::<Npt<5>>((0..FRAMES).map(|gfn| gfn * 513 % FRAMES), 0..FRAMES, FRAMES);
}

/// A write that went through marks the page dirty before the zap, and then the zap knows; or it comes after, and faults.
#[test]
fn no_zap_loses_a_dirty_mark() {
    const ROUNDS: u64 = 20_000;
    let (tables, _) = tables::<Npt<4>>();
    let gfn = Gfn::new(5);
    let written: Vec<_> = (0..=ROUNDS).map(|_| AtomicBool::new(false)).collect();
    let over = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    let zapped = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                if let Translation::Frame(pfn) = tables.translate(gfn, Access::WRITE) {
                    written[pfn.as_u64() as usize].store(true, Ordering::Relaxed);
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let mut cache = TableCache::default();
        let mut zapped = vec![];
        for round in 1..=ROUNDS {
            assert!(tables.top_up(&mut cache));
            let clean = leaf(round, PageSize::Size4K, Writable::Clean);
            assert_eq!(tables.map(gfn, clean, &mut cache), Ok(Mapped::Fixed));
            let before = writes.load(Ordering::Relaxed);
            // On a busy machine the writer may not run at all for a while: do not wait long for it.
            for _ in 0..round % 64 {
                if writes.load(Ordering::Relaxed) != before {
                    break;
                }
                std::hint::spin_loop();
            }
            let Some(Step::Leaf(entry)) = tables.leaves(GfnRange::frame(gfn)).next() else {
                panic!("it was mapped")
            };
            let Change::Did(leaf) = entry.take_away() else { panic!("nobody else zaps") };
            zapped.push(leaf);
        }
        over.store(true, Ordering::Relaxed);
        zapped
    });
    for last in zapped {
        let was_written = written[last.pfn.as_u64() as usize].load(Ordering::Relaxed);
        assert!(!was_written || last.writable == Writable::Dirty, "{last:?} was written");
    }
}

/// There are pages for one way down. Who has split, and finds it collapsed again, needs another: that is a race that was lost.
#[test]
fn a_way_down_that_was_cut_off_is_a_lost_race() {
    let (tables, _) = tables::<Sv39x4>();
    let mut cache = TableCache::default();
    assert!(tables.top_up(&mut cache));
    let huge = Leaf { execute: Execute::Never, ..leaf(3 << 18, PageSize::Size1G, Writable::Dirty) };
    let gfn = Gfn::new(5);
    assert_eq!(tables.map(gfn, huge, &mut cache), Ok(Mapped::Fixed));
    let wanted = page((3 << 18) + 5);
    let none = tables.map(gfn, wanted, &mut TableCache::default());
    assert!(matches!(none, Err(MapError::NoTable(_))), "nothing was topped up: {none:?}");
    for region in (1..).take(cache.len() - 1) {
        let elsewhere = leaf(region << 18, PageSize::Size2M, Writable::Dirty);
        assert_eq!(tables.map(Gfn::new(region << 18), elsewhere, &mut cache), Ok(Mapped::Fixed));
    }
    assert_eq!(cache.len(), 1);
    assert_eq!(tables.map(gfn, wanted, &mut cache), Ok(Mapped::LostRace));
    assert!(tables.top_up(&mut cache));
    assert_eq!(tables.map(gfn, wanted, &mut cache), Ok(Mapped::Fixed));
    assert_eq!(tables.translate(gfn, Access::EXEC), Translation::Frame(Pfn::new((3 << 18) + 5)));
}
