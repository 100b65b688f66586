//! Several machines over one object, several descriptors and workers, memslots that come and go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use afterimage_memory::Kind;
use afterimage_mmu::FRAME_BYTES;
use afterimage_uffd::{Backing, Mapping};

use crate::support::{BACKINGS, Random, Setup, Stamps, Touch, stamp, wait_until};

#[test]
fn two_machines_see_one_memory() {
    let source = Stamps::new(8);
    let setup = Setup::new("two machines", Backing::Shared, 8).source(&source);
    let Some(first) = setup.clone().start() else { return };
    let Some(second) = setup.join(&first.object) else { return };
    assert_eq!((first.read(1), second.read(1)), (stamp(1), stamp(1)));
    assert_eq!(source.reads.load(Relaxed), 1, "brought once");
    second.write(1, 1001);
    assert_eq!(first.read(1), 1001);
    first.evict(first.all());
    assert_eq!((second.read(1), first.read(1)), (1001, 1001));
    first.discard(first.all());
    assert_eq!((second.read(1), first.read(2)), (0, 0));

    // A checkpoint holds back the writers of both.
    let mut writes = Vec::new();
    first
        .object
        .protect(first.pages(1, 2), |_, _| {
            writes = vec![first.writing(1, 1), second.writing(1, 2)];
            writes.iter().for_each(Touch::assert_stands_still);
        })
        .expect("a checkpoint");
    writes.into_iter().for_each(Touch::finish);

    // One goes, the other stays.
    let object = Arc::clone(&first.object);
    second.stop_clean();
    first.write(3, 1003);
    object.evict(first.all()).expect("evict");
    assert_eq!(first.read(3), 1003);
    first.stop_clean();
}

/// A machine that joins during an invalidation is not told of it. It must not be let in before that has ended: what its
/// guests write would be lost between the eviction's copy and the moment when the page is freed.
#[test]
fn a_machine_joins_between_invalidations() {
    let setup = Setup::new("join", Backing::Shared, 4);
    let Some(first) = setup.clone().start() else { return };
    first.write(1, 1001);
    let mut joining = None;
    first
        .object
        .protect(first.all(), |_, _| {
            joining.get_or_insert_with(|| {
                let (setup, object) = (setup.clone(), Arc::clone(&first.object));
                let touch = Touch::spawn(&first.mapping, move |_| setup.join(&object));
                touch.assert_stands_still();
                touch
            });
        })
        .expect("a checkpoint");
    let Some(second) = joining.expect("it was begun").finish() else { return };
    assert_eq!(second.read(1), 1001);
    second.stop_clean();
    first.stop_clean();
}

fn hammer(mapping: &Arc<Mapping>, guest: u64, guests: u64, stop: &Arc<AtomicBool>) -> Touch<u64> {
    let stop = Arc::clone(stop);
    Touch::spawn(mapping, move |mapping| {
        let pages = mapping.len() / FRAME_BYTES;
        let mut random = Random::new(guest);
        let mut expected: Vec<_> = (0..pages).map(stamp).collect();
        let mut count = 0;
        loop {
            count += 1;
            let page = random.below(pages / guests) * guests + guest;
            let word = mapping.word(page * FRAME_BYTES).expect("inside");
            assert_eq!(word.load(Relaxed), expected[page as usize], "page {page}");
            if count % 2 == 0 {
                expected[page as usize] = count;
                word.store(count, Relaxed);
            }
            if stop.load(Relaxed) {
                return count;
            }
        }
    })
}

#[test]
fn any_number_of_workers_serves_any_number_of_descriptors() {
    const PAGES: u64 = 61;
    for backing in BACKINGS {
        for (uffds, workers) in [(1, 4), (4, 2), (3, 5), (61, 1)] {
            let source = Stamps::new(PAGES);
            let setup = Setup { uffds, workers, ..Setup::new("workers", backing, PAGES).source(&source) };
            let Some(machine) = setup.start() else { return };
            let stop = Arc::new(AtomicBool::new(false));
            let guests: Vec<_> = (0..3).map(|guest| hammer(&machine.mapping, guest, 3, &stop)).collect();
            let mut random = Random::new(9);
            while machine.stats().of(Kind::Evict).count < 300 {
                let start = random.below(PAGES);
                let end = (start + 1 + random.below(20)).min(PAGES);
                machine.evict(machine.pages(start, end));
                machine.object.protect(machine.pages(start, end), |_, _| ()).expect("a checkpoint");
            }
            stop.store(true, Relaxed);
            for guest in guests {
                assert!(guest.finish() > 0);
            }
            machine.stop_clean();
        }
    }
}

#[test]
fn a_memslot_comes_and_goes_under_load() {
    let source = Stamps::new(32);
    let setup = Setup { workers: 2, ..Setup::new("memslots", Backing::Shared, 32).source(&source) };
    let Some(machine) = setup.start() else { return };
    let stop = Arc::new(AtomicBool::new(false));
    let guests: Vec<_> = (0..2).map(|guest| hammer(&machine.mapping, guest, 2, &stop)).collect();
    let (object, evicting) = (Arc::clone(&machine.object), Arc::clone(&stop));
    let evictor = thread::spawn(move || {
        while !evicting.load(Relaxed) {
            object.evict(object.frames()).expect("evict");
            thread::yield_now();
        }
    });
    for _ in 0..100 {
        let faults = machine.mmu.fault_stats().taken;
        machine.delete_slot();
        machine.create_slot();
        wait_until("the guests go on", || machine.mmu.fault_stats().taken > faults);
    }
    stop.store(true, Relaxed);
    evictor.join().expect("the evictor");
    for guest in guests {
        assert!(guest.finish() > 0);
    }
    machine.stop_clean();
}
