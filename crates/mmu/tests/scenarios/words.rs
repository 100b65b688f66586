//! The bare words and the lock around them, for those who build their own notifier.

use std::panic::{AssertUnwindSafe, catch_unwind};

use afterimage_mmu::{
    Begun, Block, Coverage, Gfn, GfnRange, InvalidationError, MmuLock, MmuWriteGuard, SequenceScope, Stale,
    Witness as _,
};

use crate::support::platform::Threads;

fn gfns(start: u64, end: u64) -> GfnRange {
    GfnRange::new(Gfn::new(start), Gfn::new(end))
}

fn block(start: u64, end: u64) -> Block {
    Block::around(gfns(start, end))
}

fn begin(lock: &MmuLock<Threads>, range: GfnRange) -> Begun {
    lock.write().begin(core::iter::once(range)).expect("it has frames")
}

pub(crate) fn what_would_hold_nothing_back_does_not_begin() {
    let lock = MmuLock::<Threads>::new();
    let mut guard = lock.write();
    let nothing = [gfns(5, 5), gfns(0, 0)];
    assert_eq!(guard.begin(nothing.into_iter()).err(), Some(InvalidationError::NoFrames));
    assert_eq!(lock.invalidations().in_progress(), 0);
    let begun = guard.begin([gfns(5, 5), gfns(0, 1)].into_iter()).expect("it has a frame");
    assert_eq!(lock.invalidations().in_progress(), 1);
    guard.end(begun);
    assert_eq!(lock.invalidations().in_progress(), 0);
    let told = InvalidationError::NoFrames.to_string();
    assert_eq!(told, "an invalidation of no frames was begun: it would hold no fault back");
}

pub(crate) fn more_than_can_be_counted_do_not_begin() {
    let lock = MmuLock::<Threads>::with(SequenceScope::Region, Coverage::Exact);
    let mut guard = lock.write();
    let begin = |guard: &mut MmuWriteGuard<'_, Threads>| guard.begin(core::iter::once(gfns(0, 1)));
    let mut begun: Vec<_> =
        (0..i16::MAX).map(|_| begin(&mut guard).expect("there are less than 32767")).collect();
    assert_eq!(begin(&mut guard).err(), Some(InvalidationError::TooMany));
    let since = lock.invalidations().snapshot(block(0, 1));
    assert_eq!(since.hint(), Some(Stale::Covered));
    guard.end(begun.pop().expect("there are many"));
    begun.push(begin(&mut guard).expect("one has ended"));
    begun.into_iter().for_each(|begun| guard.end(begun));
    drop(guard);
    let words = lock.invalidations();
    assert_eq!(words.in_progress(), 0);
    assert_eq!(since.hint(), Some(Stale::SequenceMoved));
    assert!(lock.read().verify(words.snapshot(block(0, 1))).is_ok());
}

pub(crate) fn a_verdict_knows_range_and_sequence() {
    let lock = MmuLock::<Threads>::new();
    let words = lock.invalidations();
    let cases = [
        (gfns(3, 4), false),
        (gfns(4, 5), true),
        (gfns(7, 9), true),
        (gfns(8, 9), false),
        (gfns(4, 8), true),
    ];
    let before = cases.map(|(frames, _)| words.snapshot(Block::around(frames)));
    let begun = begin(&lock, gfns(4, 8));
    for ((frames, doomed), before) in cases.into_iter().zip(before) {
        let witness = lock.read();
        for since in [before, words.snapshot(Block::around(frames))] {
            let expected = doomed.then_some(Stale::Covered);
            assert_eq!(since.hint(), expected, "{frames}");
            assert_eq!(witness.verify(since).err(), expected, "{frames}");
        }
        assert_eq!(words.covers(frames), doomed, "{frames}");
    }
    lock.write().end(begun);
    let witness = lock.read();
    for before in before {
        assert_eq!(before.hint(), Some(Stale::SequenceMoved));
        assert_eq!(witness.verify(before).err(), Some(Stale::SequenceMoved));
    }
    let since = words.snapshot(block(4, 8));
    assert_eq!(witness.verify(since).expect("it is over").range(), gfns(4, 8));
}

/// Frames in a region.
const REGION: u64 = 512;
/// Frames in a wide region.
const WIDE: u64 = 32 * REGION;

pub(crate) fn an_invalidation_counts_in_the_regions_it_touches() {
    let lock = MmuLock::<Threads>::with(SequenceScope::Region, Coverage::Hull);
    let words = lock.invalidations();
    let here = gfns(3 * REGION + 7, 3 * REGION + 8);
    let whole = gfns(3 * REGION, 4 * REGION);
    let across = gfns(4 * REGION - 1, 4 * REGION + 1);
    // An invalidated range, and which of the three it fails.
    for (range, moved) in [
        (gfns(3 * REGION, 3 * REGION + 1), [true, true, true]),
        (gfns(0, 3 * REGION), [false, false, true]),
        (gfns(0, 3 * REGION + 1), [true, true, true]),
        (gfns(4 * REGION, 5 * REGION), [false, false, true]),
        (gfns(100 * REGION, 101 * REGION), [false, false, true]),
        // Wide ones count in wide regions.
        (gfns(0, 64 * REGION), [true, true, true]),
        (gfns(REGION, 66 * REGION), [true, true, true]),
        (gfns(WIDE, 4 * WIDE), [false, false, true]),
        (gfns(2 * WIDE - 1, 64 * WIDE), [false, false, true]),
        (gfns(WIDE, 64 * WIDE + 1), [true, true, true]),
        (gfns(0, 1 << 40), [true, true, true]),
    ] {
        let since = [here, whole, across].map(|frames| words.snapshot(Block::around(frames)));
        let begun = begin(&lock, range);
        lock.write().end(begun);
        let witness = lock.read();
        for (since, moved) in since.into_iter().zip(moved) {
            let expected = moved.then_some(Stale::SequenceMoved);
            assert_eq!(since.hint(), expected, "{range} ended, {}", since.block());
            assert_eq!(witness.verify(since).err(), expected, "{range} ended, {}", since.block());
        }
    }
    // Nothing is refused for a range of nothing, not even at the very bottom.
    assert_eq!(words.snapshot(block(0, 0)).hint(), None);
}

/// Between two ranges that are far apart nobody is held back, even by the hull: their regions are quiet.
pub(crate) fn a_hull_holds_back_only_where_something_is_active() {
    let lock = MmuLock::<Threads>::with(SequenceScope::Region, Coverage::Hull);
    let words = lock.invalidations();
    let (low, high) = (begin(&lock, gfns(0, 1)), begin(&lock, gfns(9 * REGION, 9 * REGION + 1)));
    for (frames, expected) in [
        (gfns(5 * REGION, 5 * REGION + 1), None),
        (gfns(5 * REGION - 1, 5 * REGION + 1), Some(Stale::Covered)),
        (gfns(1, 2), Some(Stale::Covered)),
        (gfns(9 * REGION, 9 * REGION + 1), Some(Stale::Covered)),
    ] {
        let since = words.snapshot(Block::around(frames));
        assert_eq!(since.hint(), expected, "{frames}");
        assert_eq!(lock.read().verify(since).err(), expected, "{frames}");
        assert_eq!(words.covers(frames), expected.is_some(), "{frames}");
    }
    lock.write().end(low);
    lock.write().end(high);
}

pub(crate) fn what_belongs_to_another_machine_is_refused() {
    let (here, there) = (MmuLock::<Threads>::new(), MmuLock::<Threads>::new());
    let since = here.invalidations().snapshot(block(0, 1));
    let foreign = || drop(there.read().verify(since));
    assert!(catch_unwind(foreign).is_err(), "it keeps nothing still here");
    let begun = begin(&here, gfns(0, 1));
    let foreign = AssertUnwindSafe(|| there.write().end(begun));
    assert!(catch_unwind(foreign).is_err(), "it never began there");
}

pub(crate) fn guards_give_the_lock_up_on_every_way_out() {
    let lock = MmuLock::<Threads>::new();
    {
        let (first, second) = (lock.read(), lock.read());
        assert!(lock.try_write().is_none());
        assert!(!first.is_contended());
        drop(second);
        assert!(lock.try_write().is_none());
    }
    let mut writer = lock.try_write().expect("nobody is in");
    assert!(lock.try_read().is_none() && lock.try_write().is_none());
    assert!(!writer.is_contended());
    writer.bump_with(|| drop(lock.read()));
    writer.bump();
    assert!(lock.try_read().is_none(), "it is held again");
    drop(writer);
    let mut reader = lock.try_read().expect("nobody is in");
    reader.bump();
    assert!(lock.try_write().is_none());
    drop(reader);
    assert!(!lock.is_locked());
}

pub(crate) fn a_panic_while_the_lock_is_given_up_does_not_unlock_it_twice() {
    let lock = MmuLock::<Threads>::new();
    let mut writer = lock.write();
    let bump = || writer.bump_with(|| panic!("deliberately, without the lock"));
    catch_unwind(AssertUnwindSafe(bump)).expect_err("it panicked");
    assert!(lock.try_read().is_none(), "the guard holds the lock");
    drop(writer);
    // Given up twice, the turn would have passed a writer that never comes.
    drop(lock.try_write().expect("nobody is in"));
    drop(lock.read());
}
