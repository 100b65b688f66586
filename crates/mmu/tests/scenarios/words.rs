//! The bare words and the lock around them, for those who build their own notifier.

use std::panic::catch_unwind;

use afterimage_mmu::{Coverage, Gfn, GfnRange, InvalidationError, MmuLock, SequenceScope, Stale};

use crate::support::platform::Threads;

fn gfns(start: u64, end: u64) -> GfnRange {
    GfnRange::new(Gfn::new(start), Gfn::new(end))
}

pub(crate) fn what_is_not_paired_is_told() {
    let lock = MmuLock::<Threads>::new();
    let mut guard = lock.write();
    assert_eq!(guard.add_range(gfns(0, 1)), Err(InvalidationError::AddWithoutBegin(gfns(0, 1))));
    assert_eq!(guard.end(), Err(InvalidationError::EndWithoutBegin));
    assert_eq!(lock.invalidations().in_progress(), 0);
    guard.begin();
    assert_eq!(guard.add_range(gfns(5, 5)), Err(InvalidationError::EmptyRange(gfns(5, 5))));
    assert_eq!(guard.end(), Err(InvalidationError::EndWithoutRange));
    assert_eq!(lock.invalidations().in_progress(), 0, "the end took place");
    guard.begin();
    assert_eq!(guard.add_range(gfns(0, 1)), Ok(()));
    assert_eq!(guard.end(), Ok(()));
    let told = InvalidationError::AddWithoutBegin(gfns(1, 3)).to_string();
    assert_eq!(told, "the range [0x1, 0x3) was added while no invalidation is active: call begin first");
}

pub(crate) fn a_verdict_knows_range_and_sequence() {
    let lock = MmuLock::<Threads>::new();
    let words = lock.invalidations();
    let before = words.snapshot();
    {
        let mut guard = lock.write();
        guard.begin();
        guard.add_range(gfns(4, 8)).expect("it has begun");
    }
    for (range, doomed) in [(gfns(3, 4), false), (gfns(4, 5), true), (gfns(7, 9), true), (gfns(8, 9), false)]
    {
        let witness = lock.read();
        let expected = doomed.then_some(Stale::Covered);
        assert_eq!(words.hint(before, range), expected, "{range}");
        assert_eq!(words.verify(&witness, before, range).err(), expected, "{range}");
        assert_eq!(words.covers(range), doomed, "{range}");
    }
    lock.write().end().expect("it has begun and has a range");
    let witness = lock.read();
    assert_eq!(words.hint(before, gfns(40, 41)), Some(Stale::SequenceMoved));
    assert_eq!(words.verify(&witness, before, gfns(40, 41)).err(), Some(Stale::SequenceMoved));
    let since = words.snapshot();
    assert_eq!(words.verify(&witness, since, gfns(4, 8)).expect("it is over").range(), gfns(4, 8));
}

/// Frames in a region.
const REGION: u64 = 512;

fn invalidate_once(lock: &MmuLock<Threads>, range: GfnRange) {
    let mut guard = lock.write();
    guard.begin();
    guard.add_range(range).expect("it has begun");
    drop(guard);
    lock.write().end_of(range).expect("it has begun and has a range");
}

pub(crate) fn an_end_counts_in_the_regions_it_touched() {
    let lock = MmuLock::<Threads>::with(SequenceScope::Region, Coverage::Hull);
    let words = lock.invalidations();
    let here = gfns(3 * REGION + 7, 3 * REGION + 8);
    let block = gfns(3 * REGION, 4 * REGION);
    let across = gfns(4 * REGION - 1, 4 * REGION + 1);
    // An invalidated range, and which of the three it fails.
    for (range, moved) in [
        (gfns(3 * REGION, 3 * REGION + 1), [true, true, true]),
        (gfns(0, 3 * REGION), [false, false, true]),
        (gfns(0, 3 * REGION + 1), [true, true, true]),
        (gfns(4 * REGION, 5 * REGION), [false, false, true]),
        (gfns(100 * REGION, 101 * REGION), [false, false, true]),
        (gfns(0, 1 << 40), [true, true, true]),
    ] {
        let since = [here, block, across].map(|frames| words.snapshot_of(frames));
        invalidate_once(&lock, range);
        let witness = lock.read();
        for ((frames, since), moved) in [here, block, across].into_iter().zip(since).zip(moved) {
            let expected = moved.then_some(Stale::SequenceMoved);
            assert_eq!(words.hint(since, frames), expected, "{range} ended, {frames}");
            assert_eq!(words.verify(&witness, since, frames).err(), expected, "{range} ended, {frames}");
        }
    }
    // An end that does not say where counts everywhere; a snapshot of other frames counts nowhere.
    let since = words.snapshot_of(here);
    let mut guard = lock.write();
    guard.begin();
    guard.add_range(gfns(0, 1)).expect("it has begun");
    guard.end().expect("it has begun and has a range");
    drop(guard);
    let witness = lock.read();
    assert_eq!(words.verify(&witness, since, here).err(), Some(Stale::SequenceMoved));
    // Nothing is refused for a range of nothing, not even at the very bottom.
    assert_eq!(words.hint(words.snapshot_of(gfns(0, 0)), gfns(0, 0)), None);
    let foreign = words.snapshot_of(gfns(0, 1));
    assert_eq!(words.verify(&witness, foreign, here).err(), Some(Stale::SequenceMoved));
}

pub(crate) fn a_witness_of_another_machine_is_refused() {
    let (here, there) = (MmuLock::<Threads>::new(), MmuLock::<Threads>::new());
    let since = here.invalidations().snapshot();
    let foreign = || drop(here.invalidations().verify(&there.read(), since, gfns(0, 1)));
    assert!(catch_unwind(foreign).is_err(), "it keeps nothing still here");
}

pub(crate) fn a_lock_given_up_before_the_range_refuses_everything() {
    let lock = MmuLock::<Threads>::new();
    let since = lock.invalidations().snapshot();
    lock.write().begin();
    let refused = || lock.invalidations().verify(&lock.read(), since, gfns(0, 1)).is_err();
    if cfg!(debug_assertions) {
        catch_unwind(core::panic::AssertUnwindSafe(refused)).expect_err("a debug build says so");
    } else {
        assert!(refused());
    }
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
    catch_unwind(core::panic::AssertUnwindSafe(bump)).expect_err("it panicked");
    assert!(lock.try_read().is_none(), "the guard holds the lock");
    drop(writer);
    // Given up twice, the turn would have passed a writer that never comes.
    drop(lock.try_write().expect("nobody is in"));
    drop(lock.read());
}
