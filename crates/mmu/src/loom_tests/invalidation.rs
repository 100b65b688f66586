//! Sequence, count and hull against an install: no schedule leaves a stale entry.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use super::{fails_without, holds};
use crate::addr::{Gfn, GfnRange};
use crate::block::Block;
use crate::invalidation::SequenceScope;
use crate::mmu_lock::{MmuLock, Witness as _};
use crate::mutation::Mutation;
use crate::platform::model::Loom;
use crate::ranges::Coverage;

const FRAME: GfnRange = GfnRange::frame(Gfn::new(4));
/// In another region, with a word of its own.
const NEIGHBOUR: GfnRange = GfnRange::frame(Gfn::new(6));

/// One frame: which page is behind it, and which page the table shows (0: none).
struct Frame {
    lock: MmuLock<Loom>,
    page: AtomicU64,
    entry: AtomicU64,
}

impl Frame {
    fn new() -> Arc<Self> {
        Self::with_scope(SequenceScope::Global)
    }

    fn with_scope(scope: SequenceScope) -> Arc<Self> {
        Arc::new(Self {
            lock: MmuLock::with(scope, Coverage::Hull),
            page: AtomicU64::new(1),
            entry: AtomicU64::new(0),
        })
    }

    /// A fault, as the path has it. The page is looked up without any ordering of its own.
    fn fault(&self) {
        let words = self.lock.invalidations();
        let since = words.snapshot(Block::around(FRAME));
        if since.hint().is_some() {
            return;
        }
        let page = self.page.load(Ordering::Relaxed);
        let witness = self.lock.read();
        if let Ok(fresh) = witness.verify(since) {
            assert_eq!(fresh.range(), FRAME);
            self.entry.store(page, Ordering::Relaxed);
        }
        drop(witness);
    }

    /// An invalidation that replaces the page.
    fn replace(&self, page: u64) {
        let mut guard = self.lock.write();
        let begun = guard.begin(core::iter::once(FRAME)).expect("it has a frame");
        self.entry.store(0, Ordering::Relaxed);
        drop(guard);
        // The old page is freed here. Nothing may show it, or anything else, until the end.
        self.page.store(page, Ordering::Relaxed);
        assert_eq!(self.entry.load(Ordering::Relaxed), 0, "stale: installed inside");
        let mut guard = self.lock.write();
        assert_eq!(self.entry.load(Ordering::Relaxed), 0, "stale: installed inside");
        guard.end(begun);
    }

    /// An invalidation of another frame.
    fn elsewhere(&self) {
        let begun = self.lock.write().begin(core::iter::once(NEIGHBOUR)).expect("it has a frame");
        self.lock.write().end(begun);
    }

    fn assert_not_stale(&self) {
        let (entry, page) = (self.entry.load(Ordering::Relaxed), self.page.load(Ordering::Relaxed));
        assert!(entry == 0 || entry == page, "stale: entry {entry} while the page is {page}");
    }
}

fn a_fault_against_an_invalidation() {
    one_against_one(&Frame::new());
}

fn a_fault_against_an_invalidation_of_its_region() {
    one_against_one(&Frame::with_scope(SequenceScope::Region));
}

fn one_against_one(frame: &Arc<Frame>) {
    let other = Arc::clone(frame);
    let vcpu = thread::spawn(move || other.fault());
    frame.replace(2);
    vcpu.join().expect("the fault does not panic");
    frame.assert_not_stale();
}

fn two_faults_against_an_invalidation() {
    let frame = Frame::new();
    let other = Arc::clone(&frame);
    let vcpu = thread::spawn(move || {
        other.fault();
        other.fault();
    });
    frame.replace(2);
    vcpu.join().expect("the fault does not panic");
    frame.assert_not_stale();
}

/// The invalidation of another frame overlaps: the hull grows, and outlives either.
fn a_fault_against_two_invalidations() {
    one_against_two(&Frame::new());
}

fn a_fault_against_two_invalidations_of_two_regions() {
    one_against_two(&Frame::with_scope(SequenceScope::Region));
}

fn one_against_two(frame: &Arc<Frame>) {
    let (other, neighbour) = (Arc::clone(frame), Arc::clone(frame));
    let vcpu = thread::spawn(move || other.fault());
    let elsewhere = thread::spawn(move || neighbour.elsewhere());
    frame.replace(2);
    vcpu.join().expect("the fault does not panic");
    elsewhere.join().expect("the invalidation does not panic");
    frame.assert_not_stale();
    assert_eq!(frame.lock.invalidations().in_progress(), 0);
}

/// Two changes of the page, one after the other; one fault may see either.
fn a_fault_against_two_changes_in_turn() {
    let frame = Frame::new();
    let other = Arc::clone(&frame);
    let vcpu = thread::spawn(move || other.fault());
    frame.replace(2);
    frame.replace(3);
    vcpu.join().expect("the fault does not panic");
    frame.assert_not_stale();
}

/// Who sees "over" without the lock and samples the sequence next samples the new number.
fn over_means_bumped() {
    let frame = Frame::new();
    let begun = frame.lock.write().begin(core::iter::once(FRAME)).expect("it has a frame");
    let other = Arc::clone(&frame);
    let waiter = thread::spawn(move || {
        let words = other.lock.invalidations();
        if !words.covers(FRAME) {
            assert_ne!(words.snapshot(Block::around(FRAME)).sequence(), 0, "over, and not bumped");
        }
    });
    frame.lock.write().end(begun);
    waiter.join().expect("the waiter does not panic");
}

#[test]
fn loom_no_stale_entry_survives() {
    holds("fault, invalidation", 5, a_fault_against_an_invalidation);
    holds("fault twice, invalidation", 3, two_faults_against_an_invalidation);
    holds("fault, two invalidations in turn", 3, a_fault_against_two_changes_in_turn);
    holds("fault, two invalidations at once", 2, a_fault_against_two_invalidations);
}

#[test]
fn loom_no_stale_entry_survives_with_a_sequence_by_region() {
    holds("fault, invalidation", 5, a_fault_against_an_invalidation_of_its_region);
    holds("fault, two invalidations at once", 2, a_fault_against_two_invalidations_of_two_regions);
}

#[test]
fn loom_each_rule_of_a_sequence_by_region_is_needed() {
    for rule in [Mutation::LastRegionForgotten, Mutation::EndKeepsSequence, Mutation::BumpRelaxed] {
        fails_without(rule, &["stale: "], 3, a_fault_against_an_invalidation_of_its_region);
    }
}

#[test]
fn loom_over_means_bumped() {
    holds("end, covers then snapshot", 5, over_means_bumped);
    fails_without(Mutation::EndCountFirst, &["over, and not bumped"], 3, over_means_bumped);
}

#[test]
fn loom_each_rule_of_a_verdict_is_needed() {
    for rule in [
        Mutation::VerifyAlwaysFresh,
        Mutation::VerifyIgnoresSequence,
        Mutation::VerifyIgnoresRange,
        Mutation::EndKeepsSequence,
        Mutation::BumpRelaxed,
    ] {
        fails_without(rule, &["stale: "], 3, a_fault_against_an_invalidation);
    }
}
