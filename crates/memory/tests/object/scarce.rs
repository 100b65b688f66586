//! When there is no memory, or no huge page.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use afterimage_mmu::{FaultError, PageSize};
use afterimage_uffd::{Backing, HugePages, ServeOptions};

use crate::support::{BACKINGS, Setup, Stamps, skip, stamp};

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

/// More pages than there are huge pages, and a budget that allows them all: room is made by eviction.
#[test]
fn memory_larger_than_the_pool_of_huge_pages_works() {
    const FRAMES: u64 = 512;
    let free = HugePages::of(PageSize::Size2M).map_or(0, |pool| pool.available());
    if !(2..=256).contains(&free) {
        return skip("a small pool", format!("{free} huge pages are free, 2 to 256 would do"));
    }
    let pages = free + 4;
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
