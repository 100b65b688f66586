//! The tables under schedules that shuttle makes up: `RUSTFLAGS="--cfg shuttle" cargo test -p afterimage-stage2 --test shuttle`.
//!
//! Two or three threads change the same frames. Priorities change at points chosen at random over the whole run (PCT), so
//! that one thread's few steps come in the middle of another's many.
#![cfg(shuttle)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use afterimage_mmu::{Access, Gfn, GfnRange, Mapped, PageSize, Pfn};
use afterimage_stage2::{
    Entry, Execute, Format, HeapMemory, Leaf, MemoryType, Npt, Split, TableCache, Tables, Translation, Vmsa,
    Writable,
};
use shuttle::thread;

const SCHEDULES: usize = 1000;
/// How often a schedule changes whom it prefers.
const CHANGES: usize = 3;

const BLOCK: u64 = 512;
const GFN: Gfn = Gfn::new(BLOCK + 5);
const LARGE: Leaf = Leaf {
    pfn: Pfn::new(BLOCK),
    size: PageSize::Size2M,
    writable: Writable::Clean,
    execute: Execute::Always,
    memory: MemoryType::WriteBack,
    accessed: true,
};

fn page(gfn: u64) -> Leaf {
    Leaf { pfn: Pfn::new(gfn), size: PageSize::Size4K, ..LARGE }
}

type Shared<F> = Arc<Tables<F, HeapMemory>>;

fn tables<F: Format>() -> (Shared<F>, TableCache<HeapMemory>) {
    let tables = Tables::new(HeapMemory::default()).expect("the heap has room");
    let mut cache = TableCache::default();
    assert!(tables.top_up(&mut cache));
    (Arc::new(tables), cache)
}

fn large<F: Format>() -> (Shared<F>, TableCache<HeapMemory>) {
    let (tables, mut cache) = tables::<F>();
    assert_eq!(tables.map(GFN, LARGE, &mut cache), Ok(Mapped::Fixed));
    assert!(tables.top_up(&mut cache));
    (tables, cache)
}

fn leaf<F: Format>(tables: &Tables<F, HeapMemory>) -> Option<Leaf> {
    match tables.walk(GFN).entry {
        Entry::Leaf(leaf) => Some(leaf),
        Entry::Absent => None,
        other => panic!("{other:?} is nobody's last word"),
    }
}

/// A write that went through is known of, whatever the collapse made of the table meanwhile.
fn collapse_and_write() {
    let (tables, mut cache) = large::<Npt<4>>();
    assert_eq!(tables.split(GFN, &mut cache, |_| ()), Ok(Split::Done(PageSize::Size4K)));
    let writer = {
        let tables = Arc::clone(&tables);
        thread::spawn(move || tables.translate(GFN, Access::WRITE))
    };
    let collapsed = tables.collapse(GFN, PageSize::Size2M, Execute::Always, |_| ());
    let written = writer.join().expect("it does not panic");
    let leaf = leaf(&tables).expect("it was never taken away");
    assert_eq!(collapsed.is_some(), leaf.size == PageSize::Size2M);
    match written {
        Translation::Frame(pfn) => {
            assert_eq!((pfn, leaf.writable), (leaf.pfn_of(GFN), Writable::Dirty));
        }
        Translation::Fault(_) => assert_eq!(leaf.writable, Writable::Clean, "nobody else writes"),
    }
}

/// What was installed in a table is there, or was taken away with the table.
fn unlink_and_map() {
    let (tables, mut cache) = tables::<Npt<4>>();
    assert_eq!(tables.map(Gfn::new(BLOCK), page(BLOCK), &mut cache), Ok(Mapped::Fixed));
    assert!(tables.top_up(&mut cache));
    let mapper = {
        let tables = Arc::clone(&tables);
        thread::spawn(move || tables.map(GFN, page(BLOCK + 5), &mut cache))
    };
    let removed = tables.unlink(GFN, PageSize::Size4K.level(), |_| ()).expect("there is a table");
    let mapped = mapper.join().expect("it does not panic").expect("nothing is in the way");
    let there = u64::from(leaf(&tables).is_some()) + u64::from(leaf_at_start(&tables));
    let installed = 1 + u64::from(mapped == Mapped::Fixed);
    assert_eq!(removed.frames + there, installed, "{removed:?}, {mapped:?}");
}

fn leaf_at_start(tables: &Tables<Npt<4>, HeapMemory>) -> bool {
    matches!(tables.walk(Gfn::new(BLOCK)).entry, Entry::Leaf(_))
}

/// A large page takes a table's place only when CPUs were made to forget what was in it.
fn unlink_and_map_large() {
    let (tables, mut cache) = tables::<Vmsa<40>>();
    assert_eq!(tables.map(Gfn::new(BLOCK), page(BLOCK), &mut cache), Ok(Mapped::Fixed));
    assert!(tables.top_up(&mut cache));
    let flushed = Arc::new(AtomicBool::new(false));
    let mapper = {
        let (tables, flushed) = (Arc::clone(&tables), Arc::clone(&flushed));
        thread::spawn(move || {
            for _ in 0..4 {
                let _ = tables.map(GFN, LARGE, &mut cache).expect("nothing is in the way");
                if matches!(tables.walk(GFN).entry, Entry::Leaf(leaf) if leaf.size == PageSize::Size2M) {
                    assert!(flushed.load(Ordering::Relaxed), "two sizes at one address");
                }
            }
        })
    };
    let removed = tables.unlink(GFN, PageSize::Size4K.level(), |_| {
        thread::yield_now();
        flushed.store(true, Ordering::Relaxed);
    });
    mapper.join().expect("it does not panic");
    assert!(removed.is_some_and(|removed| removed.table.is_some()));
}

/// A zap takes the frame away, from the whole or from its part, while it is split and written.
fn zap_split_and_write<F: Format>() {
    let (tables, mut cache) = large::<F>();
    let splitter = {
        let tables = Arc::clone(&tables);
        // A flush takes its time.
        thread::spawn(move || tables.split(GFN, &mut cache, |_| thread::yield_now()))
    };
    let writer = {
        let tables = Arc::clone(&tables);
        thread::spawn(move || tables.translate(GFN, Access::WRITE))
    };
    let zapped = tables.zap(GfnRange::frame(GFN));
    let split = splitter.join().expect("it does not panic").expect("a table is at hand");
    let _ = writer.join().expect("it does not panic");
    assert_eq!(leaf(&tables), None);
    assert_eq!(zapped, if matches!(split, Split::Done(_)) { 1 } else { BLOCK }, "{split:?}");
}

/// Of two who split and one who collapses each does all or nothing, and the frame stays where it is.
fn split_twice_and_collapse<F: Format>() {
    let (tables, cache) = large::<F>();
    let mut caches = vec![cache, TableCache::default()];
    assert!(tables.top_up(&mut caches[1]));
    let splitters: Vec<_> = caches
        .into_iter()
        .map(|mut cache| {
            let tables = Arc::clone(&tables);
            thread::spawn(move || tables.split(GFN, &mut cache, |_| ()))
        })
        .collect();
    // Dead tables stay with the test: nobody says when they can be freed.
    let collapsed = tables.collapse(GFN, PageSize::Size2M, Execute::Always, |_| ());
    let done = splitters
        .into_iter()
        .map(|splitter| splitter.join().expect("it does not panic").expect("a table is at hand"))
        .filter(|split| matches!(split, Split::Done(_)))
        .count();
    let leaf = leaf(&tables).expect("it was never taken away");
    assert_eq!(leaf.pfn_of(GFN), Pfn::new(BLOCK + 5));
    assert_eq!(leaf.size == PageSize::Size2M, done == usize::from(collapsed.is_some()));
}

#[test]
fn a_collapse_loses_no_write() {
    check(collapse_and_write);
}

#[test]
fn a_removal_loses_no_install() {
    check(unlink_and_map);
}

#[test]
fn a_removal_breaks_first() {
    check(unlink_and_map_large);
}

#[test]
fn a_zap_follows_a_split() {
    check(zap_split_and_write::<Npt<4>>);
    check(zap_split_and_write::<Vmsa<40>>);
}

#[test]
fn a_split_is_all_or_nothing() {
    check(split_twice_and_collapse::<Npt<4>>);
    check(split_twice_and_collapse::<Vmsa<40>>);
}

/// A mutation is switched on for the whole process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn check(model: fn()) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    shuttle::check_pct(model, SCHEDULES, CHANGES);
}

#[cfg(feature = "mutations")]
mod broken {
    use super::*;
    use afterimage_stage2::mutation::{self, Mutation};
    use shuttle::scheduler::PctScheduler;
    use shuttle::{Config, FailurePersistence, Runner};
    use std::panic::{catch_unwind, set_hook, take_hook};

    #[track_caller]
    fn fails_without(rule: Mutation, model: fn()) {
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let hook = take_hook();
        set_hook(Box::new(|_| ()));
        mutation::set(Some(rule));
        // That there is one is what is wanted, not the schedule.
        let mut config = Config::new();
        config.failure_persistence = FailurePersistence::None;
        // The first that fails is the last.
        let scheduler = PctScheduler::new(CHANGES, 20 * SCHEDULES);
        let result = catch_unwind(|| Runner::new(scheduler, config).run(model));
        mutation::set(None);
        set_hook(hook);
        assert!(result.is_err(), "no schedule noticed that {rule:?} was on");
    }

    #[test]
    fn a_collapse_freezes_first() {
        fails_without(Mutation::CollapseWithoutFreezing, collapse_and_write);
    }

    #[test]
    fn a_removed_table_stays_frozen() {
        fails_without(Mutation::RemovedTableThaws, unlink_and_map);
    }

    #[test]
    fn a_removal_breaks_first() {
        fails_without(Mutation::UnlinkWithoutBreak, unlink_and_map_large);
    }

    #[test]
    fn a_split_is_followed() {
        fails_without(Mutation::ZapMissesSplit, zap_split_and_write::<Npt<4>>);
        fails_without(Mutation::ZapSkipsFrozen, zap_split_and_write::<Vmsa<40>>);
    }
}
