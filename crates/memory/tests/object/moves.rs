//! Where pages come from, how they go, and how they come back.

use std::io::{Seek as _, SeekFrom, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use afterimage_memory::{FileSource, Kind, MemoryError, State};
use afterimage_mmu::{Age, Blocking, FRAME_BYTES, HvaRange, PageSize, Pfn, PfnRange, Zap};
use afterimage_testing::HugePages;
use afterimage_uffd::Backing;

use crate::support::{BACKINGS, Setup, Stamps, Touch, stamp};

#[test]
fn pages_come_from_the_source() {
    for backing in BACKINGS {
        let source = Stamps::new(16);
        let Some(machine) = Setup::new("source", backing, 16).source(&source).start() else { return };
        for page in [3, 0, 15, 3] {
            assert_eq!(machine.read(page), stamp(page), "{backing:?}");
            machine.wait_resident(page);
        }
        assert_eq!(source.reads.load(Relaxed), 3, "{backing:?}: read once each");
        assert_eq!(machine.stats().from_source, 3);
        assert_eq!((machine.state(3), machine.state(4)), (State::Resident, State::Source));
        machine.stop_clean();
    }
}

#[test]
fn pages_come_from_a_file_and_its_holes_are_zeros() {
    for backing in BACKINGS {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(4 * FRAME_BYTES).expect("4 pages");
        file.seek(SeekFrom::Start(2 * FRAME_BYTES)).expect("seek");
        file.write_all(&77_u64.to_ne_bytes().repeat(512)).expect("a page");
        let source = FileSource::open(file.path(), 4 * FRAME_BYTES, PageSize::Size4K).expect("a source");
        let setup = Setup { source: Some(Arc::new(source)), ..Setup::new("file", backing, 4) };
        let Some(machine) = setup.start() else { return };
        assert_eq!([1, 2, 3].map(|page| machine.read(page)), [0, 77, 0], "{backing:?}");
        machine.stop_clean();
    }
}

#[test]
fn what_is_evicted_comes_back_as_it_was() {
    for backing in BACKINGS {
        let source = Stamps::new(200);
        let Some(machine) = Setup::new("evict", backing, 200).source(&source).start() else { return };
        for page in 0..150 {
            assert_eq!(machine.read(page), stamp(page));
        }
        machine.write(7, 1007);
        machine.write(149, 1149);
        assert_eq!(machine.evict(machine.all()), 150, "{backing:?}");
        assert_eq!((machine.state(7), machine.state(150)), (State::Stored, State::Source));
        assert_eq!(machine.stats().resident_bytes, 0);
        assert_eq!(machine.evict(machine.all()), 0, "nothing is left to take");
        assert_eq!([7, 149, 8, 150].map(|page| machine.read(page)), [1007, 1149, stamp(8), stamp(150)]);
        machine.wait_resident(8);
        assert_eq!(machine.store_frames(), 147, "what came back is no longer stored");
        machine.stop_clean();
    }
}

#[test]
fn what_is_discarded_comes_back_as_zeros() {
    for backing in BACKINGS {
        let source = Stamps::new(8);
        let Some(machine) = Setup::new("discard", backing, 8).source(&source).start() else { return };
        // Resident and read, resident and written, stored, untouched.
        machine.read(0);
        machine.write(1, 1001);
        machine.read(2);
        machine.evict(machine.pages(2, 3));
        assert_eq!(machine.discard(machine.pages(0, 4)), 4, "{backing:?}");
        assert_eq!([0, 1, 2, 3, 4].map(|page| machine.read(page)), [0, 0, 0, 0, stamp(4)], "{backing:?}");
        assert_eq!(machine.store_frames(), 0);
        // And from there on like any page.
        machine.write(2, 2002);
        machine.evict(machine.all());
        assert_eq!([2, 3].map(|page| machine.read(page)), [2002, 0]);
        assert_eq!(machine.discard(machine.pages(5, 6)), 1);
        assert_eq!(machine.discard(machine.pages(5, 6)), 0, "it was zeros already");
        machine.stop_clean();
    }
}

#[test]
fn ranges_must_be_whole_pages_of_the_object() {
    let Some(machine) = Setup::new("ranges", Backing::Shared, 4).start() else { return };
    let beyond = PfnRange::new(Pfn::new(3), Pfn::new(5));
    for error in [
        machine.object.evict(beyond).expect_err("beyond"),
        machine.object.discard(beyond).expect_err("beyond"),
        machine.object.protect(beyond, |_, _| ()).expect_err("beyond"),
    ] {
        assert!(matches!(error, MemoryError::BadRange { .. }), "{error}");
    }
    machine.stop_clean();
}

#[test]
fn huge_pages_move_as_a_whole() {
    const FRAMES: u64 = 512;
    let Some(_pages) = HugePages::claim("huge pages", 4) else { return };
    for backing in BACKINGS {
        let source = Stamps::new(4 * FRAMES);
        let setup =
            Setup { page_size: PageSize::Size2M, ..Setup::new("huge pages", backing, 4).source(&source) };
        let Some(machine) = setup.start() else { return };
        assert_eq!([0, 1].map(|page| machine.read(page)), [stamp(0), stamp(FRAMES)], "{backing:?}");
        machine.write(1, 1001);
        assert_eq!(machine.evict(machine.all()), 2 * FRAMES, "{backing:?}");
        assert_eq!([0, 1].map(|page| machine.read(page)), [stamp(0), 1001], "{backing:?}");
        let mut seen = 0;
        machine
            .object
            .protect(machine.pages(0, 2), |_, bytes| seen += bytes.expect("bytes").len() as u64)
            .expect("a checkpoint");
        assert_eq!(seen, 2 * FRAMES * FRAME_BYTES);
        machine.write(0, 1000);
        assert_eq!(machine.discard(machine.pages(1, 3)), 2 * FRAMES);
        assert_eq!([0, 1, 2].map(|page| machine.read(page)), [1000, 0, 0], "{backing:?}");
        machine.stop_clean();
    }
}

/// A page is mapped as a whole, so an invalidation of a part of it takes all of it.
#[test]
fn a_part_of_a_huge_page_takes_the_page_with_it() {
    const FRAMES: u64 = 512;
    let Some(_pages) = HugePages::claim("a part of a huge page", 3) else { return };
    let setup = Setup { page_size: PageSize::Size2M, ..Setup::new("a part", Backing::Shared, 3) };
    let Some(machine) = setup.start() else { return };
    let part = PfnRange::new(Pfn::new(FRAMES + 3), Pfn::new(2 * FRAMES + 5));
    let start = machine.mapping.range().start;
    let hvas =
        HvaRange::new(start + part.start.as_u64() * FRAME_BYTES, start + part.end.as_u64() * FRAME_BYTES);
    let invalidate = |zap| drop(machine.mmu.invalidate(hvas, zap, Blocking::Allowed));
    let mut faults = 0;
    for page in 0..3 {
        machine.write(page, 100 + page);
        faults += 1;
    }
    machine.wait_taken(faults);
    for round in 1..4 {
        match round {
            1 => _ = machine.object.age(part, Age::Clear),
            2 => invalidate(Zap::Unmap),
            _ => invalidate(Zap::WriteProtect),
        }
        for page in 0..3 {
            machine.write(page, 100 * round + page);
        }
        faults += 2;
        machine.wait_taken(faults);
    }
    assert_eq!([0, 1, 2].map(|page| machine.read(page)), [300, 301, 302]);
    machine.stop_clean();
}

#[test]
fn populated_pages_are_there_before_they_are_touched() {
    for backing in BACKINGS {
        let source = Stamps::new(32);
        let setup = Setup { budget: Some(20), ..Setup::new("populate", backing, 32).source(&source) };
        let Some(machine) = setup.start() else { return };
        machine.discard(machine.pages(4, 5));
        let mut vcpu = machine.mmu.vcpu();
        let moved = machine.view.view.populate(&mut vcpu, machine.pages(2, 10)).expect("populate");
        assert_eq!(moved.frames, 8, "{backing:?}");
        drop(vcpu);
        let before = machine.mmu.fault_stats().taken;
        assert_eq!([2, 4, 9].map(|page| machine.read(page)), [stamp(2), 0, stamp(9)], "{backing:?}");
        assert_eq!(machine.mmu.fault_stats().taken, before, "{backing:?}: nobody faulted");

        let mut vcpu = machine.mmu.vcpu();
        let all = machine.view.view.populate(&mut vcpu, machine.all()).expect("populate");
        assert_eq!(all.frames, 12, "{backing:?}: as far as the budget goes");
        assert_eq!(machine.stats().direct_reclaims, 0, "{backing:?}: nobody had to go");
        assert_eq!(machine.read(9), stamp(9));
        drop(vcpu);
        machine.stop_clean();
    }
}

/// The guest takes the last places while a page that nobody waits for is being read.
#[test]
fn a_page_that_is_populated_takes_nobodys_place() {
    const BUDGET: u64 = 4;
    for backing in BACKINGS {
        let source = Stamps::new(32);
        let setup = Setup::new("populate late", backing, 32).source(&source);
        let Some(machine) = (Setup { budget: Some(BUDGET), batch: 1, ..setup }).start() else { return };
        source.gate.close_for(0);
        let populated = std::thread::scope(|scope| {
            let populating = scope.spawn(|| {
                let mut vcpu = machine.mmu.vcpu();
                machine.view.view.populate(&mut vcpu, machine.pages(0, 1)).expect("populate")
            });
            source.gate.wait_for_someone();
            for page in 1..=BUDGET + 1 {
                assert_eq!(machine.read(page), stamp(page));
            }
            source.gate.open();
            populating.join().expect("it does not panic")
        });
        assert_eq!(populated.frames, 0, "{backing:?}");
        let stats = machine.stats();
        assert_eq!((stats.direct_reclaims, stats.of(Kind::Evict).frames), (0, 0), "{backing:?}: {stats:?}");
        machine.stop_clean();
    }
}

#[test]
fn a_checkpoint_shows_one_moment_while_writers_run() {
    const WRITERS: u64 = 3;
    for backing in BACKINGS {
        let setup = Setup { workers: 2, ..Setup::new("checkpoint", backing, 2 * WRITERS) };
        let Some(machine) = setup.start() else { return };
        let stop = Arc::new(AtomicBool::new(false));
        // Each writer counts in two pages: first in the one, then in the other.
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let stop = Arc::clone(&stop);
                Touch::spawn(&machine.mapping, move |mapping| {
                    let at = |page| mapping.word(page * FRAME_BYTES).expect("inside");
                    let mut count = 0_u64;
                    while !stop.load(Relaxed) {
                        count += 1;
                        at(writer).store(count, Relaxed);
                        at(2 * WRITERS - 1 - writer).store(count, Relaxed);
                    }
                    count
                })
            })
            .collect();
        let mut last = vec![0; 2 * WRITERS as usize];
        for round in 0..200 {
            let mut words = Vec::new();
            let moved = machine.object.protect(machine.all(), |_, bytes| {
                let word =
                    bytes.map_or(0, |bytes| u64::from_ne_bytes(bytes[..8].try_into().expect("8 bytes")));
                words.push(word);
            });
            assert_eq!(moved.expect("a checkpoint").frames, 2 * WRITERS);
            for writer in 0..WRITERS as usize {
                let (first, second) = (words[writer], words[2 * WRITERS as usize - 1 - writer]);
                assert!(
                    first == second || first == second + 1,
                    "{backing:?}, round {round}: {first} and {second} were never there together"
                );
                assert!(first >= last[writer], "{backing:?}: time went back");
            }
            last = words;
            if round % 10 == 0 {
                machine.evict(machine.all());
            }
        }
        stop.store(true, Relaxed);
        let counts: Vec<_> = writers.into_iter().map(Touch::finish).collect();
        for (writer, count) in (0..).zip(counts) {
            assert_eq!(machine.read(writer), count, "{backing:?}: no write is lost");
        }
        assert_eq!(machine.stats().of(Kind::Protect).count, 200);
        machine.stop_clean();
    }
}

#[test]
fn a_checkpoint_reads_pages_that_are_not_resident() {
    for backing in BACKINGS {
        let source = Stamps::new(4);
        let Some(machine) = Setup::new("cold checkpoint", backing, 4).source(&source).start() else { return };
        machine.write(1, 1001);
        machine.evict(machine.all());
        machine.discard(machine.pages(2, 3));
        let mut words = Vec::new();
        machine
            .object
            .protect(machine.all(), |_, bytes| {
                words.push(bytes.map(|bytes| u64::from_ne_bytes(bytes[..8].try_into().expect("8 bytes"))));
            })
            .expect("a checkpoint");
        assert_eq!(words, [Some(stamp(0)), Some(1001), None, Some(stamp(3))], "{backing:?}");
        assert_eq!(machine.stats().resident_bytes, 0, "{backing:?}: it brings nothing back");
        machine.stop_clean();
    }
}

#[test]
fn a_discard_waits_for_the_checkpoint_of_its_pages() {
    for backing in BACKINGS {
        let source = Stamps::new(4);
        let Some(machine) = Setup::new("discard", backing, 4).source(&source).start() else { return };
        machine.read(3);
        let mut discard = None;
        let mut words = Vec::new();
        machine
            .object
            .protect(machine.pages(1, 4), |_, bytes| {
                discard.get_or_insert_with(|| {
                    let (object, frames) = (Arc::clone(&machine.object), machine.pages(3, 4));
                    let discard = thread::spawn(move || object.discard(frames).expect("discard").frames);
                    let touch = Touch::spawn(&machine.mapping, move |_| discard.join().expect("discard"));
                    touch.assert_stands_still();
                    // Of other pages, they do not wait.
                    machine.discard(machine.pages(0, 1));
                    touch
                });
                words.push(bytes.map(|bytes| u64::from_ne_bytes(bytes[..8].try_into().expect("8 bytes"))));
            })
            .expect("a checkpoint");
        assert_eq!(words, [1, 2, 3].map(|page| Some(stamp(page))), "{backing:?}");
        assert_eq!(discard.expect("it was begun").finish(), 1);
        assert_eq!([0, 3].map(|page| machine.read(page)), [0, 0], "{backing:?}");
        machine.stop_clean();
    }
}

#[test]
fn bookkeeping_is_at_most_16_bytes_a_page() {
    let pages = 1 << 16;
    let Some(machine) = Setup::new("bookkeeping", Backing::Shared, pages).start() else { return };
    let bytes = machine.object.bookkeeping_bytes();
    assert!(bytes <= 16 * pages, "{} bytes a page", bytes as f64 / pages as f64);
    assert!(bytes >= 8 * pages, "a word and an index entry for each page");
    machine.stop_clean();
}
