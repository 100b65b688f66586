//! The dirty log over a table of one entry, which the fast path makes writable: no write is lost between two rounds.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use super::{NoPage, fails_without, holds};
use crate::addr::{FRAME_BYTES, Gfn, GfnRange, Hva};
use crate::guest_mmu::{GuestMmu, Policy, Precheck, YieldPolicy};
use crate::host::{
    Access, FastFault, Fault, FaultInError, Found, Mapped, Patience, PrimaryMmu, SecondaryMmu, Zap,
};
use crate::intent::Walker;
use crate::mutation::Mutation;
use crate::platform::model::Loom;
use crate::slots::{Memslot, SlotId, SpaceId};
use crate::snapshot::{Fresh, Snapshot};
use crate::zap::{Walk, ZapWalk, Zapped};

const FRAME: Gfn = Gfn::new(4);
const HOME: SpaceId = SpaceId(0);
const SLOT: SlotId = SlotId(0);
const PROTECTED: u64 = 0;
const WRITABLE: u64 = 1;

/// One entry: whether its page may be written. It is always there.
struct OneEntry(AtomicU64);

impl SecondaryMmu for OneEntry {
    type Platform = Loom;
    type Page = NoPage;
    type Cache = ();
    type Error = &'static str;

    fn fast_fault(&self, _: &Memslot, _: &Fault, _: &mut Walker<'_, Loom>) -> FastFault {
        match self.0.compare_exchange(PROTECTED, WRITABLE, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => FastFault::Fixed,
            Err(_) => FastFault::Spurious,
        }
    }

    fn map(
        &self,
        _: Fresh<'_>,
        _: &Memslot,
        _: &Fault,
        _: &NoPage,
        _: &mut (),
    ) -> Result<Mapped, &'static str> {
        Err("the fast path is enough")
    }

    fn poison(&self, _: Fresh<'_>, _: &Memslot, _: Gfn) -> Result<Mapped, &'static str> {
        Err("no page is ever lost here")
    }

    fn zap(&self, _: &Memslot, gfns: GfnRange, _: Zap, walk: &mut ZapWalk<'_, Self>) {
        // As tables do it: what is protected is left alone.
        let was = self.0.compare_exchange(WRITABLE, PROTECTED, Ordering::AcqRel, Ordering::Acquire);
        let zapped = if was.is_ok() { Zapped::Unflushed(1) } else { Zapped::Nothing };
        let (Walk::GoOn | Walk::Restart) = walk.step(gfns, zapped);
    }
}

struct Nobody;

impl PrimaryMmu for Nobody {
    type Page = NoPage;
    type Error = &'static str;

    fn fault_in(
        &self,
        _: &Memslot,
        _: &Fault,
        _: &Snapshot,
        _: Patience,
    ) -> Result<NoPage, FaultInError<&'static str>> {
        Err(FaultInError::Failed("the fast path is enough"))
    }
}

struct Machine {
    mmu: GuestMmu<OneEntry>,
    memory: AtomicU64,
}

impl Machine {
    fn logged() -> Arc<Self> {
        let policy =
            Policy { precheck: Precheck::empty(), yielding: YieldPolicy::Never, ..Policy::default() };
        let mmu = GuestMmu::new(OneEntry(AtomicU64::new(PROTECTED)), policy);
        mmu.create_slot(Memslot::new(SLOT, FRAME, 1, Hva::new(FRAME_BYTES))).expect("the first slot");
        mmu.set_dirty_logging(HOME, SLOT, true).expect("it exists");
        Arc::new(Self { mmu, memory: AtomicU64::new(0) })
    }

    /// A guest's stores of 1 to `last`.
    fn write(&self, last: u64) {
        let mut vcpu = self.mmu.vcpu();
        for value in 1..=last {
            loop {
                if vcpu.enter_guest().is_err() {
                    continue;
                }
                let is_allowed = self.mmu.secondary().0.load(Ordering::Acquire) == WRITABLE;
                if is_allowed {
                    self.memory.store(value, Ordering::Relaxed);
                }
                let _ = vcpu.leave_guest();
                if is_allowed {
                    break;
                }
                let fault = Fault { found: Found::Present, ..Fault::new(FRAME, Access::WRITE) };
                vcpu.handle_fault(&Nobody, &fault).map(drop).expect("the fast path is enough");
            }
        }
    }

    /// Copies the memory if it was written since the last round.
    fn round(&self, copy: &mut u64) {
        let log = self.mmu.take_dirty_log(HOME, SLOT).expect("it is logged");
        if log[0] != 0 {
            *copy = self.memory.load(Ordering::Relaxed);
        }
    }
}

fn copied_while_written(writes: u64) {
    let machine = Machine::logged();
    let other = Arc::clone(&machine);
    let guest = thread::spawn(move || other.write(writes));
    let mut copy = 0;
    machine.round(&mut copy);
    guest.join().expect("the guest does not panic");
    machine.round(&mut copy);
    assert_eq!(copy, machine.memory.load(Ordering::Relaxed), "lost: a write is in no round");
}

fn a_write_against_a_round() {
    copied_while_written(1);
}

fn two_writes_against_a_round() {
    copied_while_written(2);
}

const LOST: &[&str] = &["lost: a write is in no round"];

#[test]
fn loom_no_write_is_in_no_round() {
    holds("write, round", 3, a_write_against_a_round);
    holds("write twice, round", 2, two_writes_against_a_round);
}

#[test]
fn loom_an_entry_is_writable_before_it_is_logged() {
    fails_without(Mutation::MarkBeforeInstall, LOST, 2, a_write_against_a_round);
}

#[test]
fn loom_a_round_takes_bits_before_it_protects() {
    fails_without(Mutation::ProtectBeforeTake, LOST, 2, two_writes_against_a_round);
}
