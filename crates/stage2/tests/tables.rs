//! The tables against a model, and under several threads.
#![cfg(not(shuttle))]
// UNSAFETY: tables that were unlinked are freed, when nobody can use them any more.
#![expect(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use afterimage_mmu::{Access, Age, CachedMmio, Found, Gfn, GfnRange, Mapped, PageSize, Pfn};
use afterimage_stage2::{
    Change, Entry, Ept, Execute, Format, HeapMemory, Leaf, MapError, MemoryType, Npt, Removed, Split, Step,
    Sv39x4, Sv48x4, TableCache, Tables, Translation, Vmsa, Writable,
};
use proptest::prelude::*;

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

/// What the tables should hold: leaves by first frame, and where tables for 4 KiB pages are.
#[derive(Default)]
struct Model {
    leaves: BTreeMap<u64, Leaf>,
    small: BTreeSet<u64>,
}

#[derive(Debug, PartialEq)]
enum Did {
    Mapped(Mapped),
    Conflict,
}

impl Model {
    fn find(&self, gfn: u64) -> Option<(u64, Leaf)> {
        let (start, leaf) = self.leaves.range(..=gfn).next_back()?;
        (gfn < start + leaf.size.frames()).then_some((*start, *leaf))
    }

    fn map(&mut self, gfn: u64, wanted: Leaf, breaks: bool) -> Did {
        let frames = wanted.size.frames();
        if let Some((start, found)) = self.find(gfn) {
            if found.pfn_of(Gfn::new(gfn)) != wanted.pfn_of(Gfn::new(gfn)) {
                return Did::Conflict;
            }
            let writable = found.writable.max(wanted.writable);
            if writable == found.writable && found.accessed {
                return Did::Mapped(Mapped::Spurious);
            }
            let gains = writable.is_allowed() != found.writable.is_allowed()
                || !writable.is_allowed() && writable != found.writable;
            let (start, found) = match found.size > wanted.size && gains {
                true if breaks => return Did::Mapped(Mapped::LargerLeaf),
                true => {
                    self.split(gfn);
                    self.find(gfn).expect("it was split")
                }
                false => (start, found),
            };
            self.leaves.insert(start, Leaf { writable, accessed: true, ..found });
            return Did::Mapped(Mapped::Fixed);
        }
        let block = gfn & !511;
        let is_small = wanted.size == PageSize::Size4K || self.small.contains(&block);
        if is_small {
            self.small.insert(block);
            self.leaves
                .insert(gfn, leaf(wanted.pfn_of(Gfn::new(gfn)).as_u64(), PageSize::Size4K, wanted.writable));
        } else {
            self.leaves.insert(gfn & !(frames - 1), wanted);
        }
        Did::Mapped(Mapped::Fixed)
    }

    fn split(&mut self, gfn: u64) -> bool {
        let Some((start, large)) = self.find(gfn).filter(|(_, leaf)| leaf.size > PageSize::Size4K) else {
            return false;
        };
        for part in 0..large.size.frames() {
            let pfn = Pfn::new(large.pfn.as_u64() + part);
            self.leaves.insert(start + part, Leaf { pfn, size: PageSize::Size4K, ..large });
        }
        self.small.insert(start & !511)
    }

    /// One leaf in the place of 512, if they are all there and say the same but for their marks.
    fn collapse(&mut self, gfn: u64) -> bool {
        let start = gfn & !511;
        let Some(first) = self.leaves.get(&start).copied().filter(|leaf| leaf.size == PageSize::Size4K)
        else {
            return false;
        };
        let block: Vec<_> = self.leaves.range(start..start + 512).map(|(at, leaf)| (*at, *leaf)).collect();
        let says = |writable: Writable| (writable.is_allowed(), writable.min(Writable::Protected));
        let fits = |(at, leaf): &(u64, Leaf)| {
            leaf.pfn.as_u64() == first.pfn.as_u64() + (at - start)
                && says(leaf.writable) == says(first.writable)
        };
        if block.len() != 512 || !block.iter().all(fits) {
            return false;
        }
        self.leaves.retain(|at, _| !(start..start + 512).contains(at));
        let large = Leaf {
            size: PageSize::Size2M,
            writable: block.iter().map(|(_, leaf)| leaf.writable).max().expect("there are 512"),
            accessed: block.iter().any(|(_, leaf)| leaf.accessed),
            ..first
        };
        self.leaves.insert(start, large);
        self.small.remove(&start)
    }

    /// The table for single frames goes; how many frames it mapped.
    fn unlink(&mut self, gfn: u64) -> Option<u64> {
        let start = gfn & !511;
        if !self.small.remove(&start) {
            return None;
        }
        let before = self.leaves.len();
        self.leaves.retain(|at, _| !(start..start + 512).contains(at));
        Some((before - self.leaves.len()) as u64)
    }

    fn touched(&self, range: GfnRange) -> Vec<u64> {
        self.leaves
            .iter()
            .filter(|(start, leaf)| gfns(**start, **start + leaf.size.frames()).overlaps(range))
            .map(|(start, _)| *start)
            .collect()
    }
}

#[derive(Clone, Debug)]
enum Op {
    Map {
        gfn: u64,
        size: PageSize,
        writable: Writable,
        other: bool,
    },
    Zap {
        start: u64,
        len: u64,
    },
    Protect {
        start: u64,
        len: u64,
    },
    Age {
        start: u64,
        len: u64,
    },
    Access {
        gfn: u64,
        write: bool,
    },
    Split {
        gfn: u64,
    },
    Collapse {
        gfn: u64,
    },
    Unlink {
        gfn: u64,
    },
    /// Maps every frame of a block that is not mapped.
    Fill {
        gfn: u64,
        writable: Writable,
    },
}

/// Frames around the ends of tables: the first of all, a boundary between two tables of level 2, the last of 39 bits.
fn frames() -> impl Strategy<Value = u64> {
    let near = prop_oneof![0..8_u64, 508..516_u64, 1020..1032_u64];
    let base = prop_oneof![Just(0_u64), Just((1 << 18) - 512), Just((1 << 22) - 2048)];
    (base, near).prop_map(|(base, near)| base + near)
}

fn ops() -> impl Strategy<Value = Op> {
    let size = prop_oneof![3 => Just(PageSize::Size4K), 1 => Just(PageSize::Size2M)];
    let writable = prop_oneof![
        Just(Writable::Never),
        Just(Writable::Protected),
        Just(Writable::Clean),
        Just(Writable::Dirty)
    ];
    let fill = prop_oneof![Just(Writable::Clean), Just(Writable::Dirty)];
    let len = prop_oneof![1..4_u64, Just(512), Just(1 << 19)];
    prop_oneof![
        6 => (frames(), size, writable, prop::bool::weighted(0.1))
            .prop_map(|(gfn, size, writable, other)| Op::Map { gfn, size, writable, other }),
        2 => (frames(), len.clone()).prop_map(|(start, len)| Op::Zap { start, len }),
        1 => (frames(), len.clone()).prop_map(|(start, len)| Op::Protect { start, len }),
        1 => (frames(), len).prop_map(|(start, len)| Op::Age { start, len }),
        4 => (frames(), any::<bool>()).prop_map(|(gfn, write)| Op::Access { gfn, write }),
        2 => frames().prop_map(|gfn| Op::Split { gfn }),
        2 => frames().prop_map(|gfn| Op::Collapse { gfn }),
        1 => frames().prop_map(|gfn| Op::Unlink { gfn }),
        1 => (frames(), fill).prop_map(|(gfn, writable)| Op::Fill { gfn, writable }),
    ]
}

fn visible<F: Format>(leaf: Leaf) -> Leaf {
    let writable =
        if leaf.writable == Writable::Clean && !F::HAS_DIRTY { Writable::Dirty } else { leaf.writable };
    Leaf { writable, ..leaf }
}

/// Frees a table that was unlinked, while nobody else is here.
fn free<F: Format>(tables: &Tables<F, HeapMemory>, table: Option<Pfn>) {
    let table = table.expect("nothing is in the way of one thread alone");
    // SAFETY: (1) it was unlinked just now; (2) nothing but this thread translates by the tables; (3) it holds nothing of
    // theirs.
    unsafe { tables.free(table) };
}

fn check_against_model<F: Format>(ops: &[Op]) {
    let (tables, memory) = tables::<F>();
    let mut cache = TableCache::default();
    let mut model = Model::default();
    for op in ops {
        match *op {
            Op::Map { gfn, size, writable, other } => {
                let block = gfn & !(size.frames() - 1);
                let pfn = block + (1 << 23) + if other { 1 << 20 } else { 0 };
                let wanted = visible::<F>(leaf(pfn, size, writable));
                assert!(tables.top_up(&mut cache));
                let did = match tables.map(Gfn::new(gfn), wanted, &mut cache) {
                    Ok(mapped) => Did::Mapped(mapped),
                    Err(MapError::Conflict { .. }) => Did::Conflict,
                    Err(other) => panic!("{other}"),
                };
                assert_eq!(did, model.map(gfn, wanted, F::BREAK_BEFORE_MAKE), "{op:?}");
            }
            Op::Zap { start, len } => {
                let range = gfns(start, start + len);
                let gone: u64 = model
                    .touched(range)
                    .into_iter()
                    .filter_map(|start| model.leaves.remove(&start))
                    .map(|leaf| leaf.size.frames())
                    .sum();
                assert_eq!(tables.zap(range), gone);
            }
            Op::Protect { start, len } => {
                let range = gfns(start, start + len);
                let mut protected = 0;
                for start in model.touched(range) {
                    let leaf = model.leaves.get_mut(&start).expect("it was found");
                    protected += if leaf.writable.is_allowed() { leaf.size.frames() } else { 0 };
                    leaf.writable = leaf.writable.min(Writable::Protected);
                }
                assert_eq!(tables.write_protect(range, Writable::Protected), protected);
            }
            Op::Age { start, len } => {
                let range = gfns(start, start + len);
                let mut young = false;
                for start in model.touched(range) {
                    let leaf = model.leaves.get_mut(&start).expect("it was found");
                    young |= core::mem::replace(&mut leaf.accessed, false);
                }
                assert_eq!(tables.age(range, Age::Test), young);
                assert_eq!(tables.age(range, Age::Clear), young);
                assert!(!tables.age(range, Age::Test));
            }
            Op::Split { gfn } => {
                assert!(tables.top_up(&mut cache));
                let mut flushed = None;
                let split = tables.split(Gfn::new(gfn), &mut cache, |gfns| flushed = Some(gfns));
                let did = model.split(gfn);
                assert_eq!(split, Ok(if did { Split::Done(PageSize::Size4K) } else { Split::NotLarge }));
                let block = Gfn::new(gfn).block(PageSize::Size2M);
                assert_eq!(flushed, (did && F::BREAK_BEFORE_MAKE).then_some(block));
            }
            Op::Collapse { gfn } => {
                let removed = tables.collapse(Gfn::new(gfn), PageSize::Size2M, |_| ());
                assert_eq!(removed.is_some(), model.collapse(gfn), "{op:?}");
                if let Some(Removed { table, frames, gfns }) = removed {
                    assert_eq!((frames, gfns), (0, Gfn::new(gfn).block(PageSize::Size2M)));
                    free(&tables, table);
                }
            }
            Op::Unlink { gfn } => {
                let removed = tables.unlink(Gfn::new(gfn), PageSize::Size4K.level());
                assert_eq!(removed.map(|removed| removed.frames), model.unlink(gfn), "{op:?}");
                if let Some(removed) = removed {
                    free(&tables, removed.table);
                }
            }
            Op::Fill { gfn, writable } => {
                for gfn in gfn & !511..(gfn & !511) + 512 {
                    let wanted = visible::<F>(leaf(gfn + (1 << 23), PageSize::Size4K, writable));
                    if model.find(gfn).is_none() {
                        assert!(tables.top_up(&mut cache));
                        assert_eq!(tables.map(Gfn::new(gfn), wanted, &mut cache), Ok(Mapped::Fixed));
                        assert_eq!(model.map(gfn, wanted, false), Did::Mapped(Mapped::Fixed));
                    }
                }
            }
            Op::Access { gfn, write } => {
                let access = if write { Access::WRITE } else { Access::READ };
                let expected = match model.find(gfn) {
                    None => Translation::Fault(Found::Absent),
                    Some((_, leaf)) if F::HIDES_UNUSED && !leaf.accessed => Translation::Fault(Found::Absent),
                    Some((_, leaf)) if write && !leaf.writable.is_allowed() => {
                        Translation::Fault(Found::Present)
                    }
                    Some((start, leaf)) => {
                        let writable = if write { Writable::Dirty } else { leaf.writable };
                        model.leaves.insert(start, Leaf { writable, accessed: true, ..leaf });
                        Translation::Frame(leaf.pfn_of(Gfn::new(gfn)))
                    }
                };
                assert_eq!(tables.translate(Gfn::new(gfn), access), expected);
            }
        }
    }
    let mut seen = BTreeMap::new();
    let mut at = Gfn::new(0);
    for step in tables.leaves(tables.reach()) {
        let done = match step {
            Step::Leaf(entry) => {
                seen.insert(entry.gfns().start.as_u64(), entry.leaf().expect("nobody else is here"));
                entry.gfns()
            }
            Step::Gap(gap) => gap,
        };
        assert_eq!(done.start, at, "every frame is looked at once");
        at = done.end;
    }
    assert_eq!(at, tables.reach().end);
    assert_eq!(seen, model.leaves);
    for (start, leaf) in &model.leaves {
        let walked = tables.walk(Gfn::new(*start));
        assert_eq!((walked.entry, walked.level), (Entry::Leaf(*leaf), leaf.size.level()));
    }
    drop((tables, cache));
    assert_eq!(memory.pages(), 0, "every table was freed");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_tables_do_what_the_model_does(ops in prop::collection::vec(ops(), 1..60)) {
        check_against_model::<Ept<4, 0>>(&ops);
        check_against_model::<Ept<4, 1>>(&ops);
        check_against_model::<Ept<5, 3>>(&ops);
        check_against_model::<Npt<4>>(&ops);
        check_against_model::<Vmsa<34>>(&ops);
        check_against_model::<Vmsa<40>>(&ops);
        check_against_model::<Sv39x4>(&ops);
        check_against_model::<Sv48x4>(&ops);
    }
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
