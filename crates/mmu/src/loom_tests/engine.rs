//! The whole engine over a table of one entry: fault path, invalidation, memslot update, waiting, counts.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use super::{RACE, STUCK, fails_without, holds};
use crate::addr::{FRAME_BYTES, Gfn, GfnRange, Hva, HvaRange, Pfn};
use crate::guest_mmu::{GuestMmu, Policy, Precheck, WitnessKind, YieldPolicy};
use crate::host::{
    Access, Blocking, Fault, FaultInError, Mapped, PageRef, PageUse, Patience, PrimaryMmu, SecondaryMmu, Zap,
};
use crate::mutation::Mutation;
use crate::outcome::FaultOutcome;
use crate::platform::model::Loom;
use crate::slots::{Memslot, SlotId, SpaceId};
use crate::snapshot::{Fresh, Snapshot};
use crate::turns::Turns;
use crate::zap::{Walk, ZapWalk, Zapped};

const FRAME: Gfn = Gfn::new(4);

/// One entry: the page that it shows, or 0.
struct OneEntry(AtomicU64);

struct Page(u64);

impl PageRef for Page {
    fn pfn(&self) -> Pfn {
        Pfn::new(self.0)
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn release(self, _used: PageUse) {}
}

impl SecondaryMmu for OneEntry {
    type Platform = Loom;
    type Page = Page;
    type Cache = ();
    type Error = &'static str;

    fn map(
        &self,
        _: Fresh<'_>,
        _: &Memslot,
        _: &Fault,
        page: &Page,
        _: &mut (),
    ) -> Result<Mapped, &'static str> {
        self.0.store(page.0, Ordering::Relaxed);
        Ok(Mapped::Fixed)
    }

    fn poison(&self, _: Fresh<'_>, _: &Memslot, _: Gfn) -> Result<Mapped, &'static str> {
        Err("no page is ever lost here")
    }

    fn zap(&self, _: &Memslot, gfns: GfnRange, _: Zap, walk: &mut ZapWalk<'_, Self>) {
        let taken = self.0.swap(0, Ordering::Relaxed);
        let zapped = if taken == 0 { Zapped::Nothing } else { Zapped::Flushed(1) };
        let (Walk::GoOn | Walk::Restart) = walk.step(gfns, zapped);
    }
}

/// The page behind the frame.
struct OnePage(AtomicU64);

impl PrimaryMmu for OnePage {
    type Page = Page;
    type Error = &'static str;

    fn fault_in(
        &self,
        _: &Memslot,
        _: &Fault,
        _: &Snapshot,
        _: Patience,
    ) -> Result<Page, FaultInError<&'static str>> {
        Ok(Page(self.0.load(Ordering::Relaxed)))
    }
}

struct Machine {
    mmu: GuestMmu<OneEntry>,
    page: OnePage,
}

impl Machine {
    fn new(precheck: Precheck) -> Arc<Self> {
        Self::with(Policy { precheck, ..Policy::default() })
    }

    fn with_intents() -> Arc<Self> {
        Self::with(Policy { precheck: Precheck::empty(), witness: WitnessKind::Intent, ..Policy::default() })
    }

    fn with(policy: Policy) -> Arc<Self> {
        let policy = Policy { yielding: YieldPolicy::Never, ..policy };
        let mmu = GuestMmu::new(OneEntry(AtomicU64::new(0)), policy);
        let slot = Memslot::new(SlotId(0), FRAME, 1, Hva::new(FRAME_BYTES));
        mmu.create_slot(slot).expect("the first slot");
        Arc::new(Self { mmu, page: OnePage(AtomicU64::new(1)) })
    }

    fn fault(&self) -> bool {
        let outcome = self.mmu.vcpu().handle_fault(&self.page, &Fault::new(FRAME, Access::READ));
        matches!(outcome, Ok(FaultOutcome::Fixed))
    }

    fn replace(&self, page: u64) {
        let hvas = HvaRange::new(Hva::new(FRAME_BYTES), Hva::new(2 * FRAME_BYTES));
        let invalidation = self.mmu.invalidate(hvas, Zap::Unmap, Blocking::Allowed);
        self.page.0.store(page, Ordering::Relaxed);
        assert_eq!(self.entry(), 0, "stale: installed inside");
        drop(invalidation);
    }

    fn entry(&self) -> u64 {
        self.mmu.secondary().0.load(Ordering::Relaxed)
    }

    fn assert_not_stale(&self) {
        let (entry, page) = (self.entry(), self.page.0.load(Ordering::Relaxed));
        assert!(entry == 0 || entry == page, "stale: entry {entry} while the page is {page}");
    }
}

fn a_fault_against_an_invalidation() {
    a_fault_and_an_invalidation(Machine::new(Precheck::empty()));
}

fn an_intent_against_an_invalidation() {
    a_fault_and_an_invalidation(Machine::with_intents());
}

/// Turns are fairness: with them nothing hangs, and nothing is stale.
fn a_turn_against_invalidations() {
    let policy = Policy {
        precheck: Precheck::empty(),
        turns: Some(Turns { after: 0, at_most_ns: 0 }),
        ..Policy::default()
    };
    a_fault_and_an_invalidation(Machine::with(policy));
}

fn a_fault_and_an_invalidation(machine: Arc<Machine>) {
    let other = Arc::clone(&machine);
    let vcpu = thread::spawn(move || other.fault());
    machine.replace(2);
    vcpu.join().expect("the fault does not panic");
    machine.assert_not_stale();
}

/// The invalid phase: an install that comes late is zapped with the slot, and none comes later.
fn a_fault_against_a_deletion() {
    let machine = Machine::new(Precheck::empty());
    let other = Arc::clone(&machine);
    let vcpu = thread::spawn(move || other.fault());
    machine.mmu.delete_slot(SpaceId(0), SlotId(0)).expect("it exists");
    assert_eq!(machine.entry(), 0, "stale: installed after the zap");
    vcpu.join().expect("the fault does not panic");
    assert_eq!(machine.entry(), 0, "stale: installed after the deletion");
}

/// An invalidation holds on to the slots that it began with, and meets them again at its end.
fn an_invalidation_against_a_deletion() {
    let machine = Machine::new(Precheck::empty());
    assert!(machine.fault());
    let other = Arc::clone(&machine);
    let invalidator = thread::spawn(move || other.replace(2));
    machine.mmu.delete_slot(SpaceId(0), SlotId(0)).expect("it exists");
    assert_eq!(machine.entry(), 0, "stale: the slot is gone");
    invalidator.join().expect("the invalidation does not panic");
    assert_eq!(machine.mmu.invalidations().in_progress(), 0);
}

fn a_fault_against_a_release() {
    a_fault_and_a_release(Machine::new(Precheck::empty()));
}

fn an_intent_against_a_release() {
    a_fault_and_a_release(Machine::with_intents());
}

fn a_fault_and_a_release(machine: Arc<Machine>) {
    let other = Arc::clone(&machine);
    let vcpu = thread::spawn(move || other.fault());
    machine.mmu.release();
    vcpu.join().expect("the fault does not panic");
    assert_eq!(machine.entry(), 0, "stale: installed after the release");
}

/// The waiter sleeps, or sees that it is over; it does not sleep through the end.
fn a_waiter_against_an_end() {
    let machine = Machine::new(Precheck::empty());
    let hvas = HvaRange::new(Hva::new(FRAME_BYTES), Hva::new(2 * FRAME_BYTES));
    let invalidation = machine.mmu.invalidate(hvas, Zap::Unmap, Blocking::Allowed);
    let other = Arc::clone(&machine);
    let waiter = thread::spawn(move || {
        other.mmu.wait(GfnRange::frame(FRAME));
        assert!(!other.mmu.invalidations().covers(GfnRange::frame(FRAME)), "woken too early");
    });
    drop(invalidation);
    waiter.join().expect("the waiter does not panic");
}

fn two_waiters_against_an_end() {
    let machine = Machine::new(Precheck::empty());
    let hvas = HvaRange::new(Hva::new(FRAME_BYTES), Hva::new(2 * FRAME_BYTES));
    let invalidation = machine.mmu.invalidate(hvas, Zap::Unmap, Blocking::Allowed);
    let waiters = [(); 2].map(|()| {
        let other = Arc::clone(&machine);
        thread::spawn(move || other.mmu.wait(GfnRange::frame(FRAME)))
    });
    drop(invalidation);
    for waiter in waiters {
        waiter.join().expect("the waiter does not panic");
    }
}

/// A vCPU that goes away takes none of its counts with it, and leaves none of them twice.
fn counts_of_a_vcpu_that_goes() {
    let machine = Machine::new(Precheck::empty());
    let mut vcpu = machine.mmu.vcpu();
    let _ = vcpu.handle_fault(&machine.page, &Fault::new(FRAME, Access::READ));
    let other = Arc::clone(&machine);
    let looker = thread::spawn(move || other.mmu.fault_stats().taken);
    drop(vcpu);
    let seen = looker.join().expect("looking does not panic");
    assert_eq!(seen, 1, "the fault was there all the time");
}

#[test]
fn loom_no_stale_entry_survives_in_the_engine() {
    holds("handle_fault, invalidate", 4, a_fault_against_an_invalidation);
    holds("handle_fault, delete_slot", 4, a_fault_against_a_deletion);
    holds("handle_fault, release", 4, a_fault_against_a_release);
    holds("invalidate, delete_slot", 4, an_invalidation_against_a_deletion);
}

#[test]
fn loom_no_stale_entry_survives_in_the_engine_without_the_lock() {
    holds("handle_fault with an intent, invalidate", 3, an_intent_against_an_invalidation);
    holds("handle_fault with an intent, release", 3, an_intent_against_a_release);
}

#[test]
fn loom_nothing_rests_on_a_turn() {
    holds("handle_fault that claims a turn, invalidate", 3, a_turn_against_invalidations);
}

#[test]
fn loom_nobody_sleeps_through_an_end() {
    holds("wait, end", 4, a_waiter_against_an_end);
    holds("two waits, end", 3, two_waiters_against_an_end);
}

#[test]
fn loom_no_count_is_lost() {
    holds("vCPU goes, counts are looked at", 3, counts_of_a_vcpu_that_goes);
}

#[test]
fn loom_each_rule_of_the_engine_is_needed() {
    fails_without(Mutation::WaitWithoutMark, STUCK, 3, a_waiter_against_an_end);
    fails_without(Mutation::EndWithoutWake, STUCK, 3, a_waiter_against_an_end);
    fails_without(Mutation::VerifyAlwaysFresh, &["stale: "], 2, a_fault_against_an_invalidation);
    fails_without(Mutation::SnapshotAfterFaultIn, &["stale: "], 2, a_fault_against_an_invalidation);
    fails_without(Mutation::InstallAfterRelease, &["stale: "], 2, a_fault_against_a_release);
    fails_without(Mutation::BeginWithoutDrain, &["stale: "], 2, an_intent_against_an_invalidation);
    fails_without(Mutation::BeginWithoutDrain, &["stale: "], 2, an_intent_against_a_release);
    fails_without(Mutation::InstallAfterRelease, &["stale: "], 2, an_intent_against_a_release);
    fails_without(Mutation::SwapWithoutReaders, RACE, 3, a_fault_against_a_deletion);
    fails_without(Mutation::SlotsFreedUnderEvents, RACE, 3, an_invalidation_against_a_deletion);
    fails_without(Mutation::UpdateWithoutInvalidPhase, &["stale: "], 2, a_fault_against_a_deletion);
}
