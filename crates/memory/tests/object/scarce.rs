//! When there is no memory, no huge page, or another page than before.

#![expect(unsafe_code, reason = "memory is registered by address")]

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use afterimage_memory::Kind;
use afterimage_mmu::{FRAME_BYTES, FaultError, Hva, HvaRange, PageSize};
use afterimage_testing::{HugePages, skip};
use afterimage_uffd::{Backing, Mapping, OpenOptions, RegisterModes, ServeOptions};

use crate::support::{BACKINGS, Setup, Stamps, stamp, wait_until};
use crate::tampered::map_over;

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

/// Somebody maps other memory over a page that a fault waits for, which the kernel tells nobody.
#[test]
fn who_waits_for_a_page_that_is_mapped_over_finds_what_is_there_now() {
    for backing in BACKINGS {
        let Some(machine) = Setup::new("a page mapped over", backing, 2).start() else { return };
        machine.view.gate.close_for(1);
        let touch = machine.probing(1);
        machine.view.gate.wait_for_someone();
        map_over(machine.mapping.pages(1, 1).expect("inside"), 0);
        machine.view.gate.open();
        let nothing = touch.finish().expect_err("what is there now may not be read");
        assert!(nothing.to_string().contains("MADV_POPULATE_READ"), "{backing:?}: {nothing}");
        let reports = machine.stop();
        assert_eq!(reports.len(), 1, "{backing:?}: {reports:?}");
        let gone = reports[0].error.to_string();
        assert!(gone.contains("no longer mapped or registered"), "{backing:?}: {gone}");
    }
}

/// The same with memory that another descriptor has, and whose pages are of another size.
#[test]
fn a_page_that_can_be_neither_mapped_nor_poisoned_ends_the_worker() {
    let Some(_pool) = HugePages::claim("a huge page mapped over small ones", 1) else { return };
    for backing in BACKINGS {
        let Some(machine) = Setup::new("a huge page mapped over", backing, 1024).start() else { return };
        let other = match OpenOptions::new().open() {
            Ok(other) => other,
            Err(error) => return skip("another userfaultfd", error),
        };
        let huge = PageSize::Size2M.bytes();
        let base = machine.mapping.range().start;
        let start = Hva::new(base.as_u64().next_multiple_of(huge));
        let page = (start.as_u64() - base.as_u64()) / FRAME_BYTES;
        machine.view.gate.close_for(page);
        let touch = machine.probing(page);
        machine.view.gate.wait_for_someone();
        let there = HvaRange::new(start, start + huge);
        map_over(there, libc::MAP_HUGETLB);
        // SAFETY: nobody touches it but by a call that may fail.
        unsafe { other.register(there, RegisterModes::MISSING) }.expect("it is new");
        machine.view.gate.open();
        wait_until("the fault fails", || machine.mmu.fault_stats().failed > 0);
        let refused = machine.stop_failed();
        assert!(refused.to_string().contains("UFFDIO_POISON"), "{backing:?}: {refused}");
        // Both descriptors are closed, or the touch would wait at the other one.
        drop(other);
        let _ = touch.finish();
    }
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
