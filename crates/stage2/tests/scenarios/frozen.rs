//! What others do while an entry is frozen. Only where break-before-make freezes one for long enough to look.

use std::panic::{AssertUnwindSafe, catch_unwind};

use afterimage_mmu::{Access, Gfn, GfnRange, Mapped, PageSize, Pfn};
use afterimage_stage2::{
    Change, Entry, Execute, Format, HeapMemory, Leaf, MapError, MemoryType, Split, Step, TableCache, Tables,
    Translation, Writable,
};

const LARGE: Leaf = Leaf {
    pfn: Pfn::new(0x200),
    size: PageSize::Size2M,
    writable: Writable::Dirty,
    execute: Execute::Always,
    memory: MemoryType::WriteBack,
    accessed: true,
};
const GFN: Gfn = Gfn::new(5);
/// In the next block.
const NEAR: Gfn = Gfn::new(0x205);

fn page(pfn: u64) -> Leaf {
    Leaf { pfn: Pfn::new(pfn), size: PageSize::Size4K, ..LARGE }
}

/// Tables with one large leaf, and room for what comes.
fn tables<F: Format>() -> (Tables<F, HeapMemory>, TableCache<HeapMemory>) {
    let tables = Tables::new(HeapMemory::default()).expect("the heap has room");
    let mut cache = TableCache::default();
    assert!(tables.top_up(&mut cache));
    assert_eq!(tables.map(GFN, LARGE, &mut cache), Ok(Mapped::Fixed));
    assert!(tables.top_up(&mut cache));
    (tables, cache)
}

/// An install backs off.
pub(crate) fn installs_back_off<F: Format>() {
    let (tables, mut cache) = tables::<F>();
    let mut others = TableCache::default();
    assert!(tables.top_up(&mut others));
    let split = tables.split(GFN, &mut cache, |gfns| {
        assert_eq!(gfns, GFN.block(PageSize::Size2M));
        assert_eq!(tables.walk(GFN).entry, Entry::Frozen);
        assert_eq!(tables.map(GFN, LARGE, &mut others), Ok(Mapped::LostRace));
        assert_eq!(tables.map(GFN, page(0x205), &mut others), Ok(Mapped::LostRace));
    });
    assert_eq!(split, Ok(Split::Done(PageSize::Size4K)));
    assert_eq!(tables.walk(GFN).entry, Entry::Leaf(page(0x205)));
}

/// A zap does not go by, and takes what is there when the entry is frozen no more.
pub(crate) fn zaps_wait<F: Format>() {
    let (tables, mut cache) = tables::<F>();
    let mut leaves = tables.leaves(GfnRange::frame(GFN));
    let mut met = None;
    let split = tables.split(GFN, &mut cache, |_| {
        let Some(Step::Leaf(entry)) = leaves.next() else { panic!("somebody has it in hand") };
        met = Some((entry.leaf(), entry.take_away()));
        leaves.look_again(entry.gfns());
    });
    assert_eq!((split, met), (Ok(Split::Done(PageSize::Size4K)), Some((None, Change::LookAgain))));
    let Some(Step::Leaf(entry)) = leaves.next() else { panic!("it is mapped") };
    assert_eq!(entry.take_away(), Change::Did(page(0x205)));
    assert!(leaves.next().is_none());
    assert_eq!(tables.walk(GFN).entry, Entry::Absent);
    assert_eq!(tables.walk(Gfn::new(6)).entry, Entry::Leaf(page(0x206)));
}

/// A zap that finds the leaf split since it looked goes down to its parts.
pub(crate) fn zaps_follow_splits<F: Format>() {
    let (tables, mut cache) = tables::<F>();
    let mut leaves = tables.leaves(GfnRange::frame(GFN));
    let Some(Step::Leaf(entry)) = leaves.next() else { panic!("it is mapped") };
    assert_eq!(tables.split(GFN, &mut cache, |_| ()), Ok(Split::Done(PageSize::Size4K)));
    assert_eq!(entry.take_away(), Change::LookAgain);
    leaves.look_again(entry.gfns());
    let Some(Step::Leaf(entry)) = leaves.next() else { panic!("it is mapped") };
    assert_eq!(entry.take_away(), Change::Did(page(0x205)));
    assert!(leaves.next().is_none());
}

/// A zap finds the marks that were set since it looked.
pub(crate) fn zaps_keep_late_marks<F: Format>() {
    let (tables, mut cache) = tables::<F>();
    let clean = Leaf { writable: Writable::Clean, accessed: false, ..page(0x400) };
    assert_eq!(tables.map(NEAR, clean, &mut cache), Ok(Mapped::Fixed));
    let Some(Step::Leaf(entry)) = tables.leaves(GfnRange::frame(NEAR)).next() else { panic!("it is mapped") };
    assert_eq!(tables.translate(NEAR, Access::WRITE), Translation::Frame(clean.pfn));
    assert_eq!(entry.take_away(), Change::Did(page(0x400)));
    assert_eq!(tables.walk(NEAR).entry, Entry::Absent);
}

/// A frame's translation changes only by way of nothing.
pub(crate) fn no_leaf_becomes_another<F: Format>() {
    let (tables, mut cache) = tables::<F>();
    let conflict = tables.map(GFN, Leaf { pfn: Pfn::new(0x400), ..LARGE }, &mut cache);
    assert!(matches!(conflict, Err(MapError::Conflict { .. })), "{conflict:?}");
    assert_eq!(tables.walk(GFN).entry, Entry::Leaf(LARGE));
}

/// A flush that panics between break and make: everything is as it was, and nobody waits for it to be.
pub(crate) fn a_panic_leaves_nothing_frozen<F: Format>() {
    let (tables, mut cache) = tables::<F>();
    let said = || (0..512).map(|gfn| tables.walk(Gfn::new(gfn)).entry).collect::<Vec<_>>();
    let panics = |what: &mut dyn FnMut()| {
        catch_unwind(AssertUnwindSafe(what)).expect_err("the flush panics");
    };
    let flush = |_: GfnRange| panic!("deliberately, in a flush");
    let (before, kept) = (said(), cache.len());
    panics(&mut || _ = tables.split(GFN, &mut cache, flush));
    assert_eq!((said(), cache.len()), (before, kept));
    assert_eq!(tables.split(GFN, &mut cache, |_| ()), Ok(Split::Done(PageSize::Size4K)));

    let before = said();
    panics(&mut || _ = tables.collapse(GFN, PageSize::Size2M, Execute::Always, flush));
    assert_eq!(said(), before);
    panics(&mut || _ = tables.unlink(GFN, PageSize::Size4K.level(), flush));
    assert_eq!(said(), [Entry::Absent; 512], "gone, and the table is still there");
    assert_eq!(tables.map(GFN, page(0x205), &mut cache), Ok(Mapped::Fixed));
    assert!(tables.unlink(GFN, PageSize::Size4K.level(), |_| ()).is_some_and(|gone| gone.table.is_some()));
}
