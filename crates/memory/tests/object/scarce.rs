//! When there is no memory, or no huge page.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use afterimage_memory::Kind;
use afterimage_mmu::{FaultError, Gfn, Memslot, PageSize, SlotId};
use afterimage_testing::HugePages;
use afterimage_uffd::{Backing, Mapping, ServeOptions};

use crate::support::{BACKINGS, Setup, Stamps, stamp, wait_until};

#[test]
fn a_fault_outlasts_a_shortage() {
    for backing in BACKINGS {
        let source = Stamps::new(4);
        let Some(machine) = Setup::new("shortage", backing, 4).source(&source).start() else { return };
        machine.view.shortages.store(3, Relaxed);
        assert_eq!(machine.reading(1).finish(), stamp(1));
        assert_eq!(machine.view.shortages.load(Relaxed), 0);
        machine.stop_clean();
    }
}

#[test]
fn a_fault_that_never_gets_memory_ends_in_poison() {
    for backing in BACKINGS {
        let source = Stamps::new(4);
        let idle = ServeOptions { scarcity: Duration::from_millis(20), ..ServeOptions::default() };
        let setup = Setup { idle, ..Setup::new("no memory", backing, 4).source(&source) };
        let Some(machine) = setup.start() else { return };
        machine.view.shortages.store(u32::MAX, Relaxed);
        machine.assert_poisoned(1);
        machine.view.shortages.store(0, Relaxed);
        assert_eq!(machine.read(2), stamp(2), "{backing:?}");
        // The page was poisoned, its bytes are not lost.
        machine.discard(machine.pages(1, 2));
        assert_eq!(machine.read(1), 0, "{backing:?}");
        let reports = machine.stop();
        assert_eq!(reports.len(), 1, "{reports:?}");
        assert!(matches!(reports[0].error, FaultError::NoMemory(gfn) if gfn.as_u64() == 1), "{reports:?}");
    }
}

/// A memslot over a part of a huge page: the kernel maps the page as a whole or not at all, and so it is with poison.
#[test]
fn a_page_that_can_be_neither_mapped_nor_poisoned_ends_the_worker() {
    let Some(_pool) = HugePages::claim("half a page", 2) else { return };
    let setup = Setup { page_size: PageSize::Size2M, ..Setup::new("half a page", Backing::Shared, 1) };
    let Some(machine) = setup.start() else { return };
    machine.delete_slot();
    let half = Memslot::new(SlotId(1), Gfn::new(0), 256, machine.mapping.range().start);
    machine.mmu.create_slot(half).expect("there is no other");
    let touch = machine.probing(0);
    wait_until("the fault fails", || machine.mmu.fault_stats().failed > 0);
    let refused = machine.stop_failed();
    assert!(refused.to_string().contains("UFFDIO_POISON"), "{refused}");
    // Its descriptor is closed.
    let _ = touch.finish();
}

/// What nobody waits for takes free pages only.
#[test]
fn populating_ends_with_the_pool_of_huge_pages() {
    const FREE: u64 = 8;
    let Some(pool) = HugePages::claim("populate a small pool", FREE) else { return };
    let _rest = all_but(&pool, FREE);
    let source = Stamps::new((FREE + 4) * 512);
    let setup = Setup {
        page_size: PageSize::Size2M,
        batch: 2,
        ..Setup::new("populate a small pool", Backing::Shared, FREE + 4).source(&source)
    };
    let Some(machine) = setup.start() else { return };
    let mut vcpu = machine.mmu.vcpu();
    let brought = machine.view.view.populate(&mut vcpu, machine.all()).expect("as far as it goes");
    drop(vcpu);
    assert_eq!(machine.stats().of(Kind::Evict).count, 0, "nothing went for it");
    assert!((1..=FREE).contains(&(brought.frames / 512)), "{brought:?}");
    for page in 0..FREE + 4 {
        assert_eq!(machine.read(page), stamp(page * 512));
    }
    machine.stop_clean();
}

/// A mapping that nobody touches has all free pages of the pool but `free`.
fn all_but(pool: &HugePages, free: u64) -> Option<Mapping> {
    let rest = pool.free().saturating_sub(free) * PageSize::Size2M.bytes();
    (rest > 0).then(|| Mapping::anonymous(rest, PageSize::Size2M).expect("free pages"))
}

/// More pages than there are huge pages, and a budget that allows them all: room is made by eviction.
#[test]
fn memory_larger_than_the_pool_of_huge_pages_works() {
    const FRAMES: u64 = 512;
    const FREE: u64 = 8;
    let Some(pool) = HugePages::claim("a small pool", FREE) else { return };
    let _rest = all_but(&pool, FREE);
    let pages = FREE + 4;
    let source = Stamps::new(pages * FRAMES);
    let setup = Setup {
        page_size: PageSize::Size2M,
        batch: 2,
        ..Setup::new("a small pool", Backing::Shared, pages).source(&source)
    };
    let Some(machine) = setup.start() else { return };
    for page in 0..pages {
        assert_eq!(machine.read(page), stamp(page * FRAMES));
        machine.write(page, page);
    }
    for page in 0..pages {
        assert_eq!(machine.read(page), page);
    }
    machine.stop_clean();
}
