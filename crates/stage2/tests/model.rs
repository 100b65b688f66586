//! The tables against a model that is a map from guest frames to pages, by random operations of one thread.
#![cfg(not(shuttle))]
// UNSAFETY: tables that were unlinked are freed, when nobody can use them any more.
#![expect(unsafe_code)]

mod pages;

use afterimage_mmu::{Access, Age, Gfn, GfnRange, PageSize, Pfn};
use afterimage_stage2::{
    Ept, Execute, Format, HeapMemory, Leaf, LeafEntry, MapError, MemoryType, Npt, Refused, Removed, Split,
    Step, Sv39x4, Sv48x4, TableCache, Tables, Vmsa, Writable,
};
use pages::{Did, Pages, Traits};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Op {
    Map { gfn: u64, leaf: Leaf },
    Zap { start: u64, len: u64 },
    Protect { start: u64, len: u64, left: Writable },
    Clean { start: u64, len: u64 },
    Age { start: u64, len: u64 },
    Access { gfn: u64, access: Access },
    FastFault { gfn: u64, write: bool },
    CacheMmio { gfn: u64, generation: u64 },
    Split { gfn: u64 },
    Collapse { gfn: u64, most: Execute },
    Unlink { gfn: u64 },
    Fill { gfn: u64, writable: Writable, execute: Execute },
}

/// Frames around the ends of tables: the first of all, a boundary between two tables of level 2, the last of 34 bits.
fn frames() -> impl Strategy<Value = u64> {
    let near = prop_oneof![0..8_u64, 508..516_u64, 1020..1032_u64];
    let base = prop_oneof![Just(0_u64), Just((1 << 18) - 512), Just((1 << 22) - 2048)];
    (base, near).prop_map(|(base, near)| base + near)
}

fn any_of<T: Clone + core::fmt::Debug + 'static>(values: &'static [T]) -> impl Strategy<Value = T> {
    prop::sample::select(values)
}

const WRITABLE: [Writable; 5] =
    [Writable::Never, Writable::HostOnly, Writable::Protected, Writable::Clean, Writable::Dirty];
const EXECUTE: [Execute; 4] = [Execute::Never, Execute::Supervisor, Execute::User, Execute::Always];
const ALL_OR_NOTHING: [Execute; 2] = [Execute::Never, Execute::Always];

/// A leaf for the frames around `gfn`; seldom another than the one that is to be there.
fn leaves(gfn: u64) -> impl Strategy<Value = Leaf> {
    let size = prop_oneof![3 => Just(PageSize::Size4K), 1 => Just(PageSize::Size2M)];
    let execute = prop_oneof![1 => any_of(&EXECUTE), 3 => Just(Execute::Always)];
    let memory = prop_oneof![
        12 => Just(MemoryType::WriteBack),
        1 => Just(MemoryType::Uncached),
        1 => Just(MemoryType::Device),
    ];
    let is_other = prop::bool::weighted(0.1);
    (size, any_of(&WRITABLE), execute, memory, any::<bool>(), is_other).prop_map(
        move |(size, writable, execute, memory, accessed, is_other)| {
            let first = (gfn & !(size.frames() - 1)) + (1 << 23) + if is_other { 1 << 20 } else { 0 };
            Leaf { pfn: Pfn::new(first), size, writable, execute, memory, accessed }
        },
    )
}

fn ops() -> impl Strategy<Value = Op> {
    let len = prop_oneof![1..4_u64, Just(512), Just(1 << 19)];
    let left = any_of(&[Writable::Never, Writable::HostOnly, Writable::Protected]);
    let access = any_of(&[Access::READ, Access::WRITE, Access::EXEC]);
    let fill = (any_of(&[Writable::Protected, Writable::Clean, Writable::Dirty]), any_of(&ALL_OR_NOTHING));
    prop_oneof![
        6 => frames().prop_flat_map(|gfn| leaves(gfn).prop_map(move |leaf| Op::Map { gfn, leaf })),
        2 => (frames(), len.clone()).prop_map(|(start, len)| Op::Zap { start, len }),
        1 => (frames(), len.clone(), left).prop_map(|(start, len, left)| Op::Protect { start, len, left }),
        1 => (frames(), len.clone()).prop_map(|(start, len)| Op::Clean { start, len }),
        1 => (frames(), len).prop_map(|(start, len)| Op::Age { start, len }),
        4 => (frames(), access).prop_map(|(gfn, access)| Op::Access { gfn, access }),
        2 => (frames(), any::<bool>()).prop_map(|(gfn, write)| Op::FastFault { gfn, write }),
        2 => (frames(), 0..3_u64).prop_map(|(gfn, generation)| Op::CacheMmio { gfn, generation }),
        2 => frames().prop_map(|gfn| Op::Split { gfn }),
        2 => (frames(), any_of(&ALL_OR_NOTHING)).prop_map(|(gfn, most)| Op::Collapse { gfn, most }),
        1 => frames().prop_map(|gfn| Op::Unlink { gfn }),
        1 => (frames(), fill).prop_map(|(gfn, (writable, execute))| Op::Fill { gfn, writable, execute }),
    ]
}

/// The tables and the model of them.
struct Both<F: Format> {
    tables: Tables<F, HeapMemory>,
    cache: TableCache<HeapMemory>,
    model: Pages,
}

impl<F: Format> Both<F> {
    fn new(memory: &HeapMemory) -> Self {
        let tables = Tables::new(memory.clone()).expect("the heap has room");
        Self { tables, cache: TableCache::default(), model: Pages::new(Traits::of::<F>()) }
    }

    fn map(&mut self, gfn: u64, leaf: Leaf) {
        // What the format cannot say is for other tests.
        let leaf = match F::encode_leaf(leaf) {
            Err(Refused::SplitExecute(_)) => Leaf { execute: Execute::Always, ..leaf },
            _ => leaf,
        };
        assert!(self.tables.top_up(&mut self.cache));
        let did = match self.tables.map(Gfn::new(gfn), leaf, &mut self.cache) {
            Ok(mapped) => Did::Mapped(mapped),
            Err(MapError::Conflict { .. }) => Did::Conflict,
            Err(other) => panic!("{other}"),
        };
        assert_eq!(did, self.model.map(gfn, leaf));
    }

    fn run(&mut self, op: &Op) {
        let Self { tables, cache, model } = self;
        let range = |start: u64, len: u64| GfnRange::new(Gfn::new(start), Gfn::new(start + len));
        match *op {
            Op::Map { gfn, leaf } => self.map(gfn, leaf),
            Op::Zap { start, len } => assert_eq!(tables.zap(range(start, len)), model.zap(range(start, len))),
            Op::Protect { start, len, left } => {
                let (host, ours) = (left >= Writable::HostOnly, left >= Writable::Protected);
                let protected = model.protect(range(start, len), host, ours).len() as u64;
                assert_eq!(tables.write_protect(range(start, len), left), protected);
            }
            Op::Clean { start, len } => self.clean(range(start, len)),
            Op::Age { start, len } => {
                for age in [Age::Test, Age::Clear, Age::Test] {
                    assert_eq!(tables.age(range(start, len), age), model.age(range(start, len), age));
                }
            }
            Op::Access { gfn, access } => {
                assert_eq!(tables.translate(Gfn::new(gfn), access), model.access(gfn, access));
            }
            Op::FastFault { gfn, write } => {
                let upgraded = tables.upgrade_present(Gfn::new(gfn), |leaf| fixed(leaf, write));
                assert_eq!(upgraded, model.upgrade(gfn, write));
            }
            Op::CacheMmio { gfn, generation } => {
                assert!(tables.top_up(cache));
                let cached = tables.cache_mmio(Gfn::new(gfn), generation, cache);
                assert_eq!(cached, Ok(model.cache_mmio(gfn, generation)));
            }
            Op::Split { gfn } => self.split(gfn),
            Op::Collapse { gfn, most } => {
                let removed = tables.collapse(Gfn::new(gfn), PageSize::Size2M, most, |_| ());
                assert_eq!(removed.is_some(), model.collapse(gfn, most == Execute::Always));
                if let Some(Removed { table, frames, gfns }) = removed {
                    assert_eq!((frames, gfns), (0, Gfn::new(gfn).block(PageSize::Size2M)));
                    free(tables, table);
                }
            }
            Op::Unlink { gfn } => {
                let removed = tables.unlink(Gfn::new(gfn), PageSize::Size4K.level(), |_| ());
                assert_eq!(removed.map(|removed| removed.frames), model.unlink(gfn));
                if let Some(removed) = removed {
                    free(tables, removed.table);
                }
            }
            Op::Fill { gfn, writable, execute } => {
                for gfn in gfn & !511..(gfn & !511) + 512 {
                    let (pfn, size) = (Pfn::new(gfn + (1 << 23)), PageSize::Size4K);
                    let memory = MemoryType::WriteBack;
                    self.map(gfn, Leaf { pfn, size, writable, execute, memory, accessed: true });
                }
            }
        }
    }

    fn clean(&mut self, range: GfnRange) {
        if !F::HAS_DIRTY {
            return;
        }
        let dirty =
            |entry: &LeafEntry<'_, F>| entry.leaf().is_some_and(|leaf| leaf.writable == Writable::Dirty);
        let mut cleaned = vec![];
        for step in self.tables.leaves(range) {
            let Step::Leaf(entry) = step else { continue };
            if dirty(&entry) {
                cleaned.extend(entry.gfns().start.as_u64()..entry.gfns().end.as_u64());
            }
            let _ = entry.clean();
        }
        assert_eq!(cleaned, self.model.clean(range));
    }

    fn split(&mut self, gfn: u64) {
        assert!(self.tables.top_up(&mut self.cache));
        let mut flushed = None;
        let split = self.tables.split(Gfn::new(gfn), &mut self.cache, |gfns| flushed = Some(gfns));
        let did = self.model.split(gfn);
        assert_eq!(split, Ok(if did { Split::Done(PageSize::Size4K) } else { Split::NotLarge }));
        let block = Gfn::new(gfn).block(PageSize::Size2M);
        assert_eq!(flushed, (did && F::BREAK_BEFORE_MAKE).then_some(block));
    }
}

/// What a fast page fault makes of a leaf; `None` where it cannot help.
fn fixed(leaf: Leaf, write: bool) -> Option<Leaf> {
    let writable = match leaf.writable {
        now if !write => now,
        Writable::Protected | Writable::Clean | Writable::Dirty => Writable::Dirty,
        Writable::Never | Writable::HostOnly => return None,
    };
    Some(Leaf { writable, accessed: true, ..leaf })
}

/// Frees a table that was unlinked, while nobody else is here.
fn free<F: Format>(tables: &Tables<F, HeapMemory>, table: Option<Pfn>) {
    let table = table.expect("nothing is in the way of one thread alone");
    // SAFETY: (1) it was unlinked just now; (2) nothing but this thread translates by the tables; (3) it holds nothing of
    // theirs.
    unsafe { tables.free(table, 1) };
}

fn check_against_model<F: Format>(ops: &[Op]) {
    let memory = HeapMemory::default();
    let mut both = Both::<F>::new(&memory);
    for op in ops {
        both.run(op);
    }
    both.model.compare(&both.tables);
    drop(both);
    assert_eq!(memory.pages(), 0, "every table was freed");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_tables_do_what_the_model_does(ops in prop::collection::vec(ops(), 1..60)) {
        check_against_model::<Ept<4, 0>>(&ops);
        check_against_model::<Ept<4, 1>>(&ops);
        check_against_model::<Ept<4, 2>>(&ops);
        check_against_model::<Ept<5, 3>>(&ops);
        check_against_model::<Npt<4>>(&ops);
        check_against_model::<Npt<5>>(&ops);
        check_against_model::<Vmsa<34>>(&ops);
        check_against_model::<Vmsa<40>>(&ops);
        check_against_model::<Vmsa<48>>(&ops);
        check_against_model::<Sv39x4>(&ops);
        check_against_model::<Sv48x4>(&ops);
    }
}

/// A collapse of frames that were fetched from one by one allows at most what it is told to.
#[test]
fn a_collapse_allows_no_more_than_it_may() {
    let fill = Op::Fill { gfn: 512, writable: Writable::Dirty, execute: Execute::Always };
    let collapse = Op::Collapse { gfn: 512, most: Execute::Never };
    let fetch = Op::Access { gfn: 600, access: Access::EXEC };
    check_against_model::<Npt<4>>(&[fill.clone(), collapse.clone(), fetch.clone()]);
    check_against_model::<Vmsa<40>>(&[fill, collapse, fetch]);
}
