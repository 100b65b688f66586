//! When no page can go: the store is full, or an eviction fails.

use afterimage_memory::{Kind, MemoryError};

use crate::support::{BACKINGS, Machine, Setup, Stamps, stamp};
use crate::tampered::seal;

const PAGES: u64 = 64;
const BUDGET: u64 = 8;
const BATCH: u64 = 4;
/// Room in two of the store's four shards.
const ROOM: u64 = 2 * 4096;

fn machine(backing: afterimage_uffd::Backing) -> Option<Machine> {
    let source = Stamps::new(PAGES);
    let setup = Setup::new("a full store", backing, PAGES).source(&source);
    Setup { budget: Some(BUDGET), batch: BATCH, stored: Some(ROOM), ..setup }.start()
}

#[test]
fn a_guest_goes_on_with_a_full_store_and_loses_nothing() {
    for backing in BACKINGS {
        let Some(machine) = machine(backing) else { return };
        for page in 0..PAGES {
            assert_eq!(machine.read(page), stamp(page));
            machine.write(page, page);
        }
        for page in 0..PAGES {
            assert_eq!(machine.read(page), page);
        }
        let stats = machine.stats();
        assert!(stats.of(Kind::Evict).frames > 0, "some went: {stats:?}");
        assert!(stats.store_refusals > 0 && stats.beyond_budget > 0, "the others stayed: {stats:?}");
        assert!(stats.peak_bytes > (BUDGET + BATCH) * 4096, "{stats:?}");
        let stored = machine.object.store_stats();
        assert!(stored.payload_bytes <= ROOM && stored.frames() + stats.resident_bytes / 4096 >= PAGES);
        assert_eq!(stats.poisoned, 0);
        machine.stop_clean();
    }
}

#[test]
fn a_full_store_disturbs_no_guest_and_takes_pages_again_when_some_have_left() {
    for backing in BACKINGS {
        let Some(machine) = machine(backing) else { return };
        for page in 0..PAGES {
            machine.write(page, page);
        }
        machine.wait_resident(PAGES - 1);
        let error = machine.object.evict(machine.all()).expect_err("there is no room for all");
        assert!(matches!(error, MemoryError::StoreFull { bytes: ROOM, .. }), "{error}");
        let before = machine.stats();
        for _ in 0..3 {
            assert!(matches!(machine.object.evict(machine.all()), Err(MemoryError::StoreFull { .. })));
            assert!(matches!(machine.object.reclaim(), Err(MemoryError::StoreFull { .. })));
        }
        let after = machine.stats();
        assert_eq!(after.of(Kind::Evict).count, before.of(Kind::Evict).count, "none was begun in vain");
        machine.discard(machine.all());
        machine.write(5, 50);
        machine.wait_resident(5);
        assert_eq!(machine.evict(machine.pages(5, 6)), 1);
        assert_eq!((machine.read(5), machine.read(6)), (50, 0));
        machine.stop_clean();
    }
}

/// Memory that somebody has sealed cannot be freed page by page. (A memory file's pages can.)
#[test]
fn a_guest_goes_on_where_no_page_can_go() {
    let source = Stamps::new(PAGES);
    let setup = Setup::new("sealed memory", afterimage_uffd::Backing::Anonymous, PAGES).source(&source);
    let Some(machine) = (Setup { budget: Some(BUDGET), batch: BATCH, ..setup }).start() else { return };
    if !seal(&machine, 0, PAGES) {
        return;
    }
    for _ in 0..2 {
        for page in 0..PAGES {
            assert_eq!(machine.read(page), stamp(page));
        }
    }
    machine.wait_resident(PAGES - 1);
    let refused = machine.object.reclaim().expect_err("sealed pages stay");
    assert!(refused.to_string().contains("MADV_DONTNEED"), "{refused}");
    let stats = machine.stats();
    assert_eq!((stats.of(Kind::Evict).frames, stats.poisoned), (0, 0), "{stats:?}");
    assert_eq!(stats.resident_bytes, PAGES * 4096);
    assert!(stats.beyond_budget > 0, "{stats:?}");
    assert_eq!(machine.store_frames(), 0, "what stays is stored nowhere else");
    machine.stop_clean();
}

/// One page that cannot go is no reason to keep the others.
#[test]
fn a_page_that_cannot_go_is_passed_by() {
    let source = Stamps::new(PAGES);
    let setup = Setup::new("a sealed page", afterimage_uffd::Backing::Anonymous, PAGES).source(&source);
    let Some(machine) = (Setup { budget: Some(BUDGET), batch: BATCH, ..setup }).start() else { return };
    if !seal(&machine, 3, 1) {
        return;
    }
    for _ in 0..3 {
        for page in 0..PAGES {
            assert_eq!(machine.read(page), stamp(page));
        }
    }
    machine.wait_resident(PAGES - 1);
    let stats = machine.stats();
    assert_eq!((stats.beyond_budget, stats.poisoned), (0, 0), "{stats:?}");
    assert!(stats.peak_bytes <= (BUDGET + BATCH) * 4096, "{stats:?}");
    machine.stop_clean();
}
