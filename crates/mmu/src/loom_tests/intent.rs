//! Announce, verify, install and clear against begin, drain, zap and end: no schedule leaves a stale entry, and none sleeps
//! for ever. Fences are symmetric: loom has no barrier that one thread executes for another.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use loom::thread;

use super::{RACE, STUCK, fails_without, holds};
use crate::addr::{Gfn, GfnRange};
use crate::block::Block;
use crate::intent::{Barrier, Intent, Walker};
use crate::invalidation::{Begun, SequenceScope};
use crate::mmu_lock::{MmuLock, Witness as _};
use crate::mutation::Mutation;
use crate::platform::Platform;
use crate::platform::model::{Loom, LoomSpin};
use crate::ranges::Coverage;
use crate::vcpu_words::{VcpuShared, VcpuWords};

const FRAME: GfnRange = GfnRange::frame(Gfn::new(4));
/// The huge page around it.
const BLOCK: GfnRange = GfnRange::new(Gfn::new(4), Gfn::new(6));
/// Beyond the region: an invalidation of it is a wide one.
const SPANNING: GfnRange = GfnRange::new(Gfn::new(4), Gfn::new(8));
/// In the same region.
const NEIGHBOUR: GfnRange = GfnRange::frame(Gfn::new(5));
/// In another region.
const ELSEWHERE: GfnRange = GfnRange::frame(Gfn::new(6));

/// Frames that are taken away one by one and shown as one block, and who shows them.
struct Frames<P: Platform> {
    lock: MmuLock<P>,
    words: VcpuWords<P>,
    page: AtomicU64,
    entry: AtomicU64,
}

impl<P: Platform> Frames<P> {
    fn new(scope: SequenceScope) -> Arc<Self> {
        Self::with(scope, Coverage::Hull)
    }

    fn with(scope: SequenceScope, coverage: Coverage) -> Arc<Self> {
        Arc::new(Self {
            lock: MmuLock::with(scope, coverage),
            words: VcpuWords::new(Barrier::Symmetric),
            page: AtomicU64::new(1),
            entry: AtomicU64::new(0),
        })
    }

    /// A fault of `block`, as the path has it. The page is looked up and installed without any ordering of its own.
    fn fault(&self, vcpu: &VcpuShared, frames: GfnRange) {
        let block = Block::around(frames);
        let invalidations = self.lock.invalidations();
        let since = invalidations.snapshot(block);
        let page = self.page.load(Ordering::Relaxed);
        let intent = Intent::<P>::announce(vcpu.intents.of(block), invalidations, block);
        if intent.verify(since).is_ok() {
            self.entry.store(page, Ordering::Relaxed);
        }
        drop(intent);
    }

    fn begin(&self, range: GfnRange) -> Begun {
        let begun = self.lock.write().begin(core::iter::once(range)).expect("it has frames");
        self.words.drain(range, |block| block.overlaps(range));
        begun
    }

    /// An invalidation of the frame that replaces the page.
    fn replace(&self, page: u64) {
        self.replace_within(FRAME, page);
    }

    /// The same, of more frames at once.
    fn replace_within(&self, range: GfnRange, page: u64) {
        let begun = self.begin(range);
        self.entry.store(0, Ordering::Relaxed);
        // The old page is freed here. Nothing may show it, or anything else, until the end.
        self.page.store(page, Ordering::Relaxed);
        assert_eq!(self.entry.load(Ordering::Relaxed), 0, "stale: installed inside");
        let mut guard = self.lock.write();
        assert_eq!(self.entry.load(Ordering::Relaxed), 0, "stale: installed inside");
        guard.end(begun);
    }

    /// An invalidation of other frames.
    fn take_away(&self, range: GfnRange) {
        let begun = self.begin(range);
        self.lock.write().end(begun);
    }

    fn assert_not_stale(&self) {
        let (entry, page) = (self.entry.load(Ordering::Relaxed), self.page.load(Ordering::Relaxed));
        assert!(entry == 0 || entry == page, "stale: entry {entry} while the page is {page}");
    }
}

fn one_fault(scope: SequenceScope, range: GfnRange, act: impl FnOnce(&Frames<Loom>)) {
    one_fault_with(&Frames::new(scope), range, act);
}

fn one_fault_with(block: &Arc<Frames<Loom>>, range: GfnRange, act: impl FnOnce(&Frames<Loom>)) {
    let vcpu = block.words.register();
    let other = Arc::clone(block);
    let faulting = thread::spawn(move || other.fault(&vcpu, range));
    act(block);
    faulting.join().expect("the fault does not panic");
    block.assert_not_stale();
}

fn a_fault_against_an_invalidation() {
    one_fault(SequenceScope::Global, FRAME, |block| block.replace(2));
}

fn a_fault_against_an_invalidation_of_its_region() {
    one_fault(SequenceScope::Region, FRAME, |block| block.replace(2));
}

/// One frame of the block is taken away: the announcement is of all.
fn a_huge_fault_against_an_invalidation() {
    one_fault(SequenceScope::Global, BLOCK, |block| block.replace(2));
}

fn a_fault_against_two_changes_in_turn() {
    one_fault(SequenceScope::Global, FRAME, |block| {
        block.replace(2);
        block.replace(3);
    });
}

/// The same of a block that no one region holds.
fn a_fault_across_regions_against_an_invalidation() {
    one_fault(SequenceScope::Region, SPANNING, |block| block.replace(2));
}

/// The one that covers the frame is over, and another is active that has changed the bounds.
fn a_fault_against_two_ranges_in_turn() {
    one_fault(SequenceScope::Region, FRAME, |block| {
        block.replace(2);
        block.take_away(NEIGHBOUR);
    });
}

fn a_fault_against_a_wide_invalidation() {
    one_fault(SequenceScope::Region, FRAME, |block| block.replace_within(SPANNING, 2));
}

/// They change two words of which the fault takes the sum.
fn a_fault_against_a_wide_and_a_narrow_one_in_turn() {
    one_fault(SequenceScope::Region, FRAME, |block| {
        block.replace_within(SPANNING, 2);
        block.take_away(NEIGHBOUR);
    });
}

fn a_fault_against_a_narrow_and_a_wide_one_in_turn() {
    one_fault(SequenceScope::Region, FRAME, |block| {
        block.replace(2);
        block.take_away(SPANNING);
    });
}

/// The same vCPU faults again: its second announcement is not taken for its first.
fn two_faults_against_an_invalidation() {
    // Nobody parks: the fence that parking takes would stand for the ordering of the second announcement.
    let block = Frames::<LoomSpin>::new(SequenceScope::Global);
    let vcpu = block.words.register();
    let other = Arc::clone(&block);
    let faulting = thread::spawn(move || {
        other.fault(&vcpu, FRAME);
        other.fault(&vcpu, FRAME);
    });
    block.replace(2);
    faulting.join().expect("the fault does not panic");
    block.assert_not_stale();
}

fn two_vcpus_against_an_invalidation() {
    let block = Frames::<Loom>::new(SequenceScope::Global);
    let vcpus = [(); 2].map(|()| {
        let (vcpu, other) = (block.words.register(), Arc::clone(&block));
        thread::spawn(move || other.fault(&vcpu, FRAME))
    });
    block.replace(2);
    for vcpu in vcpus {
        vcpu.join().expect("the fault does not panic");
    }
    block.assert_not_stale();
}

/// Its range in an entry, alone.
fn a_fault_against_an_exact_range() {
    one_fault_with(&Frames::with(SequenceScope::Region, Coverage::Exact), FRAME, |block| block.replace(2));
}

/// The entry of the one that is over is used by the next, of another frame.
fn a_fault_against_a_reused_entry() {
    one_fault_with(&Frames::with(SequenceScope::Region, Coverage::Exact), FRAME, |block| {
        block.replace(2);
        block.take_away(NEIGHBOUR);
    });
}

/// Two invalidators at once, one of them of the frame.
fn a_fault_against_two_invalidators() {
    two_invalidators(Coverage::Hull, ELSEWHERE);
}

/// Both in one region.
fn a_fault_against_two_invalidators_of_its_region() {
    two_invalidators(Coverage::Hull, NEIGHBOUR);
}

/// One of them a wide one.
fn a_fault_against_a_wide_and_a_narrow_one_at_once() {
    two_invalidators(Coverage::Hull, SPANNING);
}

/// And only one entry: whoever comes second is known to the hull alone.
fn a_fault_against_two_invalidators_and_one_entry() {
    two_invalidators(Coverage::Exact, NEIGHBOUR);
}

fn two_invalidators(coverage: Coverage, other_range: GfnRange) {
    let block = Frames::<Loom>::with(SequenceScope::Region, coverage);
    let vcpu = block.words.register();
    let (other, neighbour) = (Arc::clone(&block), Arc::clone(&block));
    let faulting = thread::spawn(move || other.fault(&vcpu, FRAME));
    let elsewhere = thread::spawn(move || neighbour.take_away(other_range));
    block.replace(2);
    faulting.join().expect("the fault does not panic");
    elsewhere.join().expect("the invalidation does not panic");
    block.assert_not_stale();
    assert_eq!(block.lock.invalidations().in_progress(), 0);
}

/// Two tables, of which one is linked, and freed when it no longer is.
struct Links<P: Platform> {
    words: VcpuWords<P>,
    linked: AtomicUsize,
    tables: [UnsafeCell<()>; 2],
}

impl<P: Platform> Links<P> {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            words: VcpuWords::new(Barrier::Symmetric),
            linked: AtomicUsize::new(0),
            tables: [UnsafeCell::new(()), UnsafeCell::new(())],
        })
    }

    fn walk(&self, walker: &mut Walker<'_, P>) {
        let section = walker.walk();
        self.tables[self.linked.load(Ordering::Acquire)].with(|_| ());
        drop(section);
    }

    fn unlink_and_free(&self) {
        self.linked.store(1, Ordering::Release);
        self.words.quiesce();
        self.tables[0].with_mut(|_| ());
    }
}

fn walks_against_a_free<P: Platform>(walks: usize) {
    let links = Links::<P>::new();
    let (vcpu, other) = (links.words.register(), Arc::clone(&links));
    let walking = thread::spawn(move || {
        let machine = MmuLock::<Loom>::new().invalidations().machine();
        let mut walker = Walker::new(vcpu.intents.of_walks(), machine);
        for _ in 0..walks {
            other.walk(&mut walker);
        }
    });
    links.unlink_and_free();
    walking.join().expect("the walk does not panic");
}

fn a_walk_against_a_free() {
    walks_against_a_free::<Loom>(1);
}

fn two_walks_against_a_free() {
    // As for two faults in turn.
    walks_against_a_free::<LoomSpin>(2);
}

/// Aging has no vCPU: visitors' words are looked at, too.
fn a_visit_against_a_free() {
    let links = Links::<Loom>::new();
    let other = Arc::clone(&links);
    let walking = thread::spawn(move || {
        let machine = MmuLock::<Loom>::new().invalidations().machine();
        let visit = other.words.visit().expect("nobody else visits");
        other.walk(&mut Walker::new(visit.word(), machine));
    });
    links.unlink_and_free();
    walking.join().expect("the walk does not panic");
}

#[test]
fn loom_no_stale_entry_survives_without_the_lock() {
    holds("intent, invalidation", 5, a_fault_against_an_invalidation);
    holds("intent, invalidation", 4, a_fault_against_an_invalidation_of_its_region);
    holds("intent of a block, invalidation of a part", 4, a_huge_fault_against_an_invalidation);
    holds("intent, two invalidations in turn", 3, a_fault_against_two_changes_in_turn);
    holds("intent, two ranges in turn", 3, a_fault_against_two_ranges_in_turn);
    holds("two intents in turn, invalidation", 3, two_faults_against_an_invalidation);
    holds("two vCPUs, invalidation", 2, two_vcpus_against_an_invalidation);
    holds("intent across regions, invalidation", 4, a_fault_across_regions_against_an_invalidation);
    holds("intent, two invalidators", 2, a_fault_against_two_invalidators);
    holds("intent, two invalidators of its region", 2, a_fault_against_two_invalidators_of_its_region);
}

#[test]
fn loom_no_stale_entry_survives_wide_invalidations() {
    holds("intent, wide invalidation", 4, a_fault_against_a_wide_invalidation);
    holds("intent, wide, then narrow", 3, a_fault_against_a_wide_and_a_narrow_one_in_turn);
    holds("intent, narrow, then wide", 3, a_fault_against_a_narrow_and_a_wide_one_in_turn);
    holds("intent, wide and narrow at once", 2, a_fault_against_a_wide_and_a_narrow_one_at_once);
}

#[test]
fn loom_each_rule_of_a_wide_invalidation_is_needed() {
    for rule in [
        Mutation::WideUnread,
        Mutation::LastRegionForgotten,
        Mutation::BeginWithoutDrain,
        Mutation::EndKeepsSequence,
    ] {
        fails_without(rule, &["stale: "], 3, a_fault_against_a_wide_invalidation);
    }
    for rule in [Mutation::VerifyRelaxed, Mutation::VerifyLooksOnce, Mutation::BeginRelaxed] {
        fails_without(rule, &["stale: "], 3, a_fault_against_a_wide_and_a_narrow_one_in_turn);
    }
}

#[test]
fn loom_no_stale_entry_survives_with_exact_ranges() {
    holds("intent, exact range", 4, a_fault_against_an_exact_range);
    holds("intent, two exact ranges in turn", 3, a_fault_against_a_reused_entry);
    holds("intent, two invalidators, one entry", 2, a_fault_against_two_invalidators_and_one_entry);
}

#[test]
fn loom_each_rule_of_an_exact_range_is_needed() {
    for rule in [Mutation::EndRangesFirst, Mutation::EndKeepsSequence, Mutation::BeginWithoutDrain] {
        fails_without(rule, &["stale: "], 3, a_fault_against_an_exact_range);
    }
    for rule in [Mutation::VerifyRelaxed, Mutation::VerifyLooksOnce] {
        fails_without(rule, &["stale: "], 3, a_fault_against_a_reused_entry);
    }
    fails_without(Mutation::BeginRelaxed, &["stale: "], 3, a_fault_against_a_reused_entry);
}

#[test]
fn loom_a_table_is_freed_when_nobody_walks() {
    holds("walk, free", 5, a_walk_against_a_free);
    holds("two walks in turn, free", 5, two_walks_against_a_free);
    holds("visit, free", 5, a_visit_against_a_free);
}

#[test]
fn loom_each_rule_of_an_intent_is_needed() {
    for rule in [
        Mutation::AnnounceWithoutFence,
        Mutation::DrainWithoutFence,
        Mutation::BeginWithoutDrain,
        Mutation::ClearRelaxed,
        Mutation::VerifyAlwaysFresh,
        Mutation::VerifyIgnoresSequence,
        Mutation::VerifyIgnoresRange,
        Mutation::EndKeepsSequence,
        Mutation::BumpRelaxed,
    ] {
        fails_without(rule, &["stale: "], 3, a_fault_against_an_invalidation);
    }
    fails_without(Mutation::EndCountFirst, &["stale: "], 3, a_fault_against_an_invalidation);
    let region = a_fault_against_an_invalidation_of_its_region;
    fails_without(Mutation::DrainForgetsLastRegion, &["stale: "], 3, region);
    let across = a_fault_across_regions_against_an_invalidation;
    fails_without(Mutation::DrainForgetsSpanning, &["stale: "], 3, across);
    fails_without(Mutation::AnnounceRelaxed, &["stale: "], 4, two_faults_against_an_invalidation);
    for rule in [Mutation::VerifyRelaxed, Mutation::VerifyLooksOnce] {
        fails_without(rule, &["stale: "], 3, a_fault_against_two_ranges_in_turn);
    }
    fails_without(Mutation::BeginRelaxed, &["stale: "], 3, a_fault_against_two_ranges_in_turn);
    fails_without(Mutation::ClearWithoutFence, STUCK, 3, a_fault_against_an_invalidation);
}

#[test]
fn loom_each_rule_of_a_walk_is_needed() {
    fails_without(Mutation::FreeWithoutQuiescence, RACE, 3, a_walk_against_a_free);
    fails_without(Mutation::AnnounceWithoutFence, RACE, 3, a_walk_against_a_free);
    fails_without(Mutation::ClearRelaxed, RACE, 3, a_walk_against_a_free);
    fails_without(Mutation::AnnounceRelaxed, RACE, 4, two_walks_against_a_free);
}
