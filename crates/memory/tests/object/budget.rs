//! The resident budget, and who goes when it is used up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use afterimage_mmu::FRAME_BYTES;
use afterimage_uffd::Backing;

use crate::support::{BACKINGS, Random, Setup, Stamps, Touch, stamp};

#[test]
fn the_budget_holds_whoever_faults() {
    const PAGES: u64 = 512;
    const BUDGET: u64 = 64;
    const BATCH: u64 = 16;
    for backing in BACKINGS {
        for reclaimer in [false, true] {
            let source = Stamps::new(PAGES);
            let setup = Setup {
                budget: Some(BUDGET),
                batch: BATCH,
                uffds: 2,
                workers: 3,
                ..Setup::new("budget", backing, PAGES).source(&source)
            };
            let Some(machine) = setup.start() else { return };
            let stop = Arc::new(AtomicBool::new(false));
            let object = Arc::clone(&machine.object);
            let stopped = Arc::clone(&stop);
            let ahead = thread::spawn(move || {
                while reclaimer && !stopped.load(Relaxed) {
                    if object.is_over_budget() {
                        object.reclaim().expect("reclaim");
                    }
                    thread::yield_now();
                }
            });
            // Each guest owns every fourth page.
            let guests: Vec<_> = (0..4)
                .map(|guest| {
                    Touch::spawn(&machine.mapping, move |mapping| {
                        let mut random = Random::new(guest);
                        let mut expected: Vec<_> = (0..PAGES).map(stamp).collect();
                        for count in 0..1_500 {
                            let page = random.below(PAGES / 4) * 4 + guest;
                            let word = mapping.word(page * FRAME_BYTES).expect("inside");
                            assert_eq!(word.load(Relaxed), expected[page as usize], "page {page}");
                            if count % 3 == 0 {
                                expected[page as usize] = count;
                                word.store(count, Relaxed);
                            }
                        }
                    })
                })
                .collect();
            guests.into_iter().for_each(Touch::finish);
            stop.store(true, Relaxed);
            ahead.join().expect("the reclaimer");
            let stats = machine.stats();
            assert!(stats.from_store > 0, "{backing:?}: pages came back");
            assert!(
                stats.peak_bytes <= (BUDGET + BATCH) * FRAME_BYTES,
                "{backing:?}: {} pages were resident",
                stats.peak_bytes / FRAME_BYTES
            );
            machine.evict(machine.all());
            assert_eq!(machine.stats().resident_bytes, 0, "{backing:?}: no place was lost");
            machine.stop_clean();
        }
    }
}

#[test]
fn memory_without_a_budget_is_never_over_it() {
    let Some(machine) = Setup::new("no budget", Backing::Shared, 16).start() else { return };
    for page in 0..16 {
        machine.write(page, page);
    }
    assert!(!machine.object.is_over_budget());
    machine.stop_clean();
}

/// Every other page is in use, all in the clock hand's window with pages that are not.
#[test]
fn pages_in_use_stay_and_the_others_go() {
    const PAGES: u64 = 256;
    const BUDGET: u64 = 32;
    let hot = [0, 2, 4, 6, 8, 10, 12, 14];
    let setup =
        Setup { budget: Some(BUDGET), batch: 8, ..Setup::new("second chance", Backing::Shared, PAGES) };
    let Some(machine) = setup.start() else { return };
    let touches = Touch::spawn(&machine.mapping, move |mapping| {
        for round in 0..20 {
            for cold in (0..PAGES).filter(|page| !hot.contains(page)) {
                mapping.word(cold * FRAME_BYTES).expect("inside").store(round, Relaxed);
                for page in hot {
                    mapping.word(page * FRAME_BYTES).expect("inside").fetch_add(1, Relaxed);
                }
            }
        }
    });
    touches.finish();
    let stats = machine.stats();
    let cold = (PAGES - hot.len() as u64) * 20;
    let back = stats.from_store + stats.from_zero;
    let hot_back = back - cold;
    // Cold pages are touched once a round, and never find themselves there. What is more are hot pages that had gone.
    assert!(hot_back <= cold / 50, "hot pages went {hot_back} times, cold ones {cold} times");
    assert_eq!(machine.read(0), cold);
    machine.stop_clean();
}

#[test]
fn a_page_that_comes_back_in_time_costs_no_copy() {
    let setup = Setup { budget: Some(8), batch: 4, ..Setup::new("no copy", Backing::Shared, 64) };
    let Some(machine) = setup.start() else { return };
    // Fills the budget and the batch. All are in use.
    for page in 0..12 {
        machine.write(page, page);
    }
    assert_eq!(machine.stats().direct_reclaims, 0);
    machine.wait_taken(12);
    assert_eq!(
        machine.object.reclaim().expect("reclaim").frames,
        4,
        "a round of sparing, then the first four"
    );
    let before = machine.stats();
    for page in 4..12 {
        assert_eq!(machine.read(page), page);
    }
    let after = machine.stats();
    // They had lost their translations.
    machine.wait_taken(12 + 8);
    assert_eq!((after.from_store, after.from_zero), (before.from_store, before.from_zero));
    machine.stop_clean();
}
