//! Pages whose bytes cannot be had: poison, never zeros, and nobody else is touched.

use std::sync::atomic::Ordering::Relaxed;

use afterimage_memory::{MemoryError, State};
use afterimage_mmu::{FRAME_BYTES, FaultError, PageSize};
use afterimage_testing::HugePages;
use afterimage_uffd::{Backing, UffdError, punch_hole};

use crate::support::{BACKINGS, Machine, Setup, Stamps, stamp};

#[test]
fn a_page_that_the_source_cannot_read_is_poisoned() {
    for backing in BACKINGS {
        let source = Stamps::new(4);
        source.broken.lock().expect("broken").insert(2);
        let Some(machine) = Setup::new("I/O error", backing, 4).source(&source).start() else { return };
        machine.assert_poisoned(2);
        machine.assert_poisoned(2);
        assert_eq!(machine.state(2), State::Poisoned);
        assert_eq!(
            [1, 3].map(|page| machine.read(page)),
            [stamp(1), stamp(3)],
            "{backing:?}: others are untouched"
        );
        let cause = machine.object.poison_cause(machine.pages(2, 3).start).expect("a cause");
        assert!(matches!(*cause, MemoryError::SourceRead { .. }), "{cause}");
        assert!(machine.object.protect(machine.all(), |_, _| ()).is_err(), "no checkpoint without it");
        assert_eq!(machine.evict(machine.all()), 2);
        assert_eq!(machine.stats().poisoned, 1);

        assert_eq!(machine.discard(machine.pages(2, 3)), 1);
        assert_eq!(machine.read(2), 0, "{backing:?}: the guest gave it up, whatever it was");
        assert!(machine.object.poison_cause(machine.pages(2, 3).start).is_none());
        machine.write(2, 2002);
        machine.evict(machine.all());
        assert_eq!(machine.read(2), 2002);

        let reports = machine.stop();
        assert!(!reports.is_empty());
        for report in reports {
            let text = report.error.to_string();
            assert_eq!(report.gfn.as_u64(), 2);
            assert!(text.contains("guest frame 0x2") && text.contains("the disk is on fire"), "{text}");
        }
    }
}

#[test]
fn a_page_whose_stored_bytes_are_corrupt_is_poisoned() {
    for backing in BACKINGS {
        let source = Stamps::new(4);
        let Some(machine) = Setup::new("corrupt", backing, 4).source(&source).start() else { return };
        for page in 0..4 {
            machine.read(page);
        }
        machine.evict(machine.all());
        assert!(machine.object.corrupt_stored(machine.pages(1, 2).start));
        machine.assert_poisoned(1);
        assert_eq!([0, 2, 3].map(|page| machine.read(page)), [0, 2, 3].map(stamp), "{backing:?}");
        machine.discard(machine.pages(1, 2));
        assert_eq!(machine.read(1), 0);
        assert_eq!(machine.store_frames(), 0, "what was corrupt is gone");
        let reports = machine.stop();
        assert_eq!(reports.len(), 1, "{reports:?}");
        assert!(reports[0].error.to_string().contains("corrupt"), "{}", reports[0].error);
    }
}

/// Poison that was fetched before a discard must not come after it.
#[test]
fn poison_that_a_discard_overtakes_is_not_installed() {
    for backing in BACKINGS {
        let source = Stamps::new(4);
        source.broken.lock().expect("broken").insert(2);
        let Some(machine) = Setup::new("overtaken", backing, 4).source(&source).start() else { return };
        source.gate.close_for(2);
        let touch = machine.probing(2);
        source.gate.wait_for_someone();
        machine.discard(machine.pages(2, 3));
        source.gate.open();
        touch.finish().expect("zeros, and no poison");
        assert_eq!((machine.read(2), machine.stats().poisoned), (0, 0), "{backing:?}");
        machine.stop_clean();
    }
}

/// Someone has dropped a resident page of the mapping that is the memory: a deleted memslot, or the VMM by mistake.
fn lose(machine: &Machine, page: u64) {
    machine.mapping.zap(machine.mapping.pages(page, 1).expect("inside")).expect("zap");
}

/// Many times over: the poison must be there when the toucher is told, and not come again after the discard.
#[test]
fn an_anonymous_page_that_got_lost_is_poisoned_when_it_is_touched() {
    let source = Stamps::new(4);
    let Some(machine) = Setup::new("lost", Backing::Anonymous, 4).source(&source).start() else { return };
    for _ in 0..200 {
        machine.read(1);
        machine.wait_resident(1);
        lose(&machine, 1);
        machine.assert_poisoned(1);
        machine.discard(machine.pages(1, 2));
        assert_eq!(machine.read(1), 0);
    }
    let dropped = |error: &FaultError<_, _>| {
        matches!(error, FaultError::CannotMap { cause: UffdError::Dropped { .. }, .. })
    };
    assert!(machine.stop().iter().all(|report| dropped(&report.error)));
}

#[test]
fn a_shared_page_that_someone_punched_out_is_poisoned_and_no_zeros() {
    let source = Stamps::new(4);
    let Some(machine) = Setup::new("punched", Backing::Shared, 4).source(&source).start() else { return };
    for _ in 0..200 {
        machine.read(1);
        punch_hole(machine.object.file().expect("a file"), FRAME_BYTES, FRAME_BYTES).expect("a hole");
        machine.assert_poisoned(1);
        machine.discard(machine.pages(1, 2));
        assert_eq!(machine.read(1), 0);
    }
    assert!(machine.stop().iter().all(|report| matches!(report.error, FaultError::CannotMap { .. })));
}

/// Reading a hole gives zeros. Pages of zeros that are there are none.
#[test]
fn a_shared_page_that_someone_punched_out_is_stored_and_shown_as_no_zeros() {
    let Some(_pool) = HugePages::claim("punched, read", 4) else { return };
    for page_size in [PageSize::Size4K, PageSize::Size2M] {
        let setup = Setup { page_size, ..Setup::new("punched, read", Backing::Shared, 4) };
        let Some(machine) = setup.start() else { return };
        for page in 0..3 {
            assert_eq!(machine.read(page), 0);
        }
        machine.write(3, 1003);
        machine.object.protect(machine.all(), |_, _| ()).expect("every page is there");
        for page in [1, 3] {
            punch_hole(machine.object.file().expect("a file"), page * page_size.bytes(), page_size.bytes())
                .expect("a hole");
        }
        let mut shown = 0;
        let lost =
            machine.object.protect(machine.all(), |_, _| shown += 1).expect_err("no checkpoint without it");
        assert!(
            matches!(lost, MemoryError::Read { frame, .. } if frame == machine.pages(1, 2).start),
            "{lost}"
        );
        assert_eq!(shown, 1, "{page_size:?}");
        assert_eq!(machine.evict(machine.all()), 2 * page_size.frames(), "{page_size:?}");
        for page in [1, 3] {
            assert_eq!(machine.state(page), State::Poisoned, "{page_size:?}");
            machine.assert_poisoned(page);
        }
        assert_eq!([0, 2].map(|page| machine.read(page)), [0, 0], "{page_size:?}");
        assert_eq!(machine.stop().len(), 2, "{page_size:?}");
    }
}

/// A checkpoint protects also what is not mapped, and the kernel takes its marks for pages where poison is to go.
#[test]
fn a_page_that_was_protected_while_it_was_not_mapped_can_be_poisoned() {
    let source = Stamps::new(4);
    let setup = Setup::new("protected, lost", Backing::Shared, 4).source(&source);
    let Some(machine) = setup.start() else { return };
    machine.read(1);
    machine.read(2);
    machine.evict(machine.pages(2, 3));
    machine.object.protect(machine.all(), |_, _| ()).expect("a checkpoint");
    // One that was never touched, one that is resident, and one that is stored.
    source.broken.lock().expect("broken").insert(0);
    punch_hole(machine.object.file().expect("a file"), FRAME_BYTES, FRAME_BYTES).expect("a hole");
    assert!(machine.object.corrupt_stored(machine.pages(2, 3).start));
    for page in 0..3 {
        machine.assert_poisoned(page);
    }
    assert_eq!(machine.read(3), stamp(3));
    let lost: Vec<_> = machine.stop().iter().map(|report| report.gfn.as_u64()).collect();
    assert_eq!(lost, [0, 1, 2], "each is told once");
}

#[test]
fn a_page_that_was_protected_is_poisoned_when_the_address_space_is_gone() {
    for backing in BACKINGS {
        let Some(machine) = Setup::new("protected, released", backing, 2).start() else { return };
        machine.read(0);
        machine.wait_resident(0);
        machine.object.protect(machine.all(), |_, _| ()).expect("a checkpoint");
        machine.mmu.release();
        for page in 0..2 {
            machine.assert_poisoned(page);
        }
        let reports = machine.stop();
        assert_eq!(reports.len(), 2, "{backing:?}: each is told once");
        assert!(reports.iter().all(|report| matches!(report.error, FaultError::Released(_))), "{reports:?}");
    }
}

#[test]
fn a_huge_page_that_was_protected_while_it_was_not_mapped_can_be_poisoned() {
    const FRAMES: u64 = 512;
    let Some(_pool) = HugePages::claim("protected, lost", 2) else { return };
    let source = Stamps::new(2 * FRAMES);
    let setup = Setup::new("protected, lost", Backing::Shared, 2).source(&source);
    let Some(machine) = (Setup { page_size: PageSize::Size2M, ..setup }).start() else { return };
    machine.object.protect(machine.all(), |_, _| ()).expect("a checkpoint");
    source.broken.lock().expect("broken").insert(FRAMES);
    machine.assert_poisoned(1);
    assert_eq!(machine.read(0), stamp(0));
    assert_eq!(machine.stop().len(), 1);
}

/// The eviction reads the page. It must get an error, and not wait for a fault that waits for the eviction.
#[test]
fn an_anonymous_page_that_got_lost_is_poisoned_by_its_eviction() {
    let source = Stamps::new(4);
    let Some(machine) = Setup::new("lost, evicted", Backing::Anonymous, 4).source(&source).start() else {
        return;
    };
    for page in 0..4 {
        machine.read(page);
        machine.wait_resident(page);
    }
    lose(&machine, 1);
    assert_eq!(machine.evict(machine.all()), 3);
    assert_eq!(machine.state(1), State::Poisoned);
    assert_eq!(machine.stats().resident_bytes, 0, "its place is free again");
    machine.assert_poisoned(1);
    assert_eq!(machine.read(2), stamp(2));
    let cause = machine.object.poison_cause(machine.pages(1, 2).start).expect("a cause");
    assert!(matches!(*cause, MemoryError::Read { .. }), "{cause}");
    assert!(!machine.stop().is_empty());
}

#[test]
fn a_memslot_takes_anonymous_pages_with_it_but_not_evicted_ones() {
    let source = Stamps::new(4);
    let Some(machine) = Setup::new("slot", Backing::Anonymous, 4).source(&source).start() else { return };
    machine.write(0, 1000);
    machine.write(1, 1001);
    machine.wait_resident(1);
    machine.evict(machine.pages(0, 1));
    machine.delete_slot();
    machine.create_slot();
    assert_eq!(machine.read(0), 1000);
    machine.assert_poisoned(1);
    assert_eq!(machine.read(2), stamp(2));
    assert_eq!(machine.stop().len(), 1);
}

#[test]
fn a_shared_page_survives_its_memslot() {
    let source = Stamps::new(4);
    let Some(machine) = Setup::new("slot, shared", Backing::Shared, 4).source(&source).start() else {
        return;
    };
    machine.write(1, 1001);
    machine.delete_slot();
    let touch = machine.reading(1);
    touch.assert_stands_still();
    machine.create_slot();
    assert_eq!(touch.finish(), 1001);
    assert_eq!(source.reads.load(Relaxed), 1);
    machine.stop_clean();
}
