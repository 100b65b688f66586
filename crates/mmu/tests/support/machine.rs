//! A whole machine: tables, pages, memslots, and guests that access memory through a TLB.

use core::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;

use afterimage_mmu::{
    Access, Barrier, Blocking, Coverage, Emulate, Fault, FaultError, FaultOutcome, Found, Gfn, GfnRange,
    GuestMmu, Invalidation, Memslot, Pfn, Policy, Precheck, Requests, RetryPoint, SequenceScope, SlotId,
    SpaceId, Vcpu, WitnessKind, YieldPolicy, Zap,
};

use super::frames::{Frames, Stamp};
use super::hooks::Point;
use super::table::{Entry, FlatTable};

/// Frames in the table of a [`Machine`], and host pages behind them.
pub(crate) const FRAMES: u64 = 1024;

/// The secondary MMU and its primary.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) mmu: Arc<GuestMmu<FlatTable>>,
    pub(crate) frames: Arc<Frames>,
}

pub(crate) type Failure = FaultError<&'static str, &'static str>;

impl Machine {
    /// A machine without memslots.
    pub(crate) fn bare(policy: Policy) -> Self {
        let mmu = Arc::new(GuestMmu::new(FlatTable::new(FRAMES), policy));
        Self { mmu, frames: Frames::new(FRAMES) }
    }

    /// A machine with one slot: guest frames 0..64 on host pages 0..64. How pages come back is recorded.
    pub(crate) fn new(policy: Policy) -> Self {
        let machine = Self::bare(policy);
        let slot = machine.slot(0, 0, 64, 0);
        machine.mmu.create_slot(slot).expect("the first slot is in nobody's way");
        let mmu = Arc::downgrade(&machine.mmu);
        machine.frames.record(move || mmu.upgrade().is_some_and(|mmu| mmu.is_witnessed()));
        machine
    }

    /// A slot description: guest frames from `base` on host pages from `page`.
    pub(crate) fn slot(&self, id: u16, base: u64, frames: u64, page: u64) -> Memslot {
        Memslot::new(SlotId(id), Gfn::new(base), frames, Frames::hva(page))
    }

    /// A guest with one vCPU.
    pub(crate) fn guest(&self) -> Guest<'_> {
        Guest { vcpu: self.mmu.vcpu(), machine: self, tlb: HashMap::new(), space: SpaceId(0) }
    }

    /// Starts an invalidation of host pages `start..end`.
    pub(crate) fn invalidate(&self, start: u64, end: u64) -> Invalidation<'_, FlatTable> {
        self.mmu.invalidate(Frames::hvas(start, end), Zap::Unmap, Blocking::Allowed)
    }

    /// Throws host pages `start..end` away, as the protocol wants it.
    pub(crate) fn discard(&self, start: u64, end: u64) {
        let invalidation = self.invalidate(start, end);
        (start..end).for_each(|page| self.frames.discard(page));
        drop(invalidation);
    }

    /// What the table holds for a frame of space 0.
    pub(crate) fn entry(&self, gfn: u64) -> Entry {
        self.mmu.secondary().entry(SpaceId(0), Gfn::new(gfn))
    }

    /// Another handle on the same machine, for another thread or an action.
    pub(crate) fn share(&self) -> Self {
        Self { mmu: Arc::clone(&self.mmu), frames: Arc::clone(&self.frames) }
    }

    /// No fault holds a page.
    #[track_caller]
    pub(crate) fn assert_balanced(&self) {
        assert_eq!(self.frames.references_held(), 0, "page references are held after all faults are over");
    }
}

thread_local! {
    static WITNESS: Cell<WitnessKind> = const { Cell::new(WitnessKind::Lock) };
}

/// Runs a scenario on machines whose faults hold `witness` when they install.
pub(crate) fn with_witness(witness: WitnessKind, scenario: fn()) {
    WITNESS.set(witness);
    scenario();
}

/// A policy with everything on, and no yields.
pub(crate) fn both() -> Policy {
    Policy {
        precheck: Precheck::all(),
        yielding: YieldPolicy::Never,
        scope: SequenceScope::Global,
        coverage: Coverage::Hull,
        turns: None,
        witness: WITNESS.get(),
        barrier: Barrier::Symmetric,
    }
}

/// The policy before the change: nothing is checked without the lock.
pub(crate) fn unchecked() -> Policy {
    Policy { precheck: Precheck::empty(), ..both() }
}

/// What an access came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touched {
    /// The page was there and says this.
    Page(Stamp),
    /// A device, or read-only memory.
    Emulated(Emulate),
}

/// One vCPU, with a TLB that forgets only when it is told to.
#[derive(Debug)]
pub(crate) struct Guest<'m> {
    pub(crate) vcpu: Vcpu<'m, FlatTable>,
    machine: &'m Machine,
    tlb: HashMap<(SpaceId, Gfn), (Pfn, bool)>,
    pub(crate) space: SpaceId,
}

impl Guest<'_> {
    /// One fault, served once.
    pub(crate) fn fault(&mut self, gfn: u64, access: Access) -> Result<FaultOutcome, Failure> {
        self.serve(&Fault { space: self.space, ..Fault::new(Gfn::new(gfn), access) })
    }

    /// One fault, served once.
    pub(crate) fn serve(&mut self, fault: &Fault) -> Result<FaultOutcome, Failure> {
        self.vcpu.handle_fault(&*self.machine.frames, fault)
    }

    /// Where a read fault of `gfn` is told to retry.
    #[track_caller]
    pub(crate) fn retry_point(&mut self, gfn: u64) -> RetryPoint {
        match self.fault(gfn, Access::READ) {
            Ok(FaultOutcome::Retry(retry)) => {
                assert!(retry.range.contains(Gfn::new(gfn)), "it retries for another frame");
                retry.point
            }
            other => panic!("gfn {gfn:#x} was to be retried: {other:?}"),
        }
    }

    /// Reads `gfn`, which shows host page `page`, or will when it is served.
    ///
    /// Panics if it reads a frame that was freed, another page, or one that was thrown away before the access began.
    #[track_caller]
    pub(crate) fn read(&mut self, gfn: u64, page: u64) -> Stamp {
        let oldest = self.machine.frames.generation(page);
        let touched = self.touch(gfn, Access::READ).expect("a guest reads what it may read");
        let Touched::Page(stamp) = touched else { panic!("gfn {gfn:#x} is memory: {touched:?}") };
        assert_eq!(stamp.page, page, "gfn {gfn:#x} shows another page");
        assert!(stamp.generation >= oldest, "gfn {gfn:#x} shows {stamp:?}, thrown away before {oldest}");
        stamp
    }

    /// Reads frames that show the host pages of the same numbers.
    pub(crate) fn read_all(&mut self, gfns: core::ops::Range<u64>) {
        for gfn in gfns {
            self.read(gfn, gfn);
        }
    }

    /// Touches `gfn` as guest code does: through the TLB, in guest mode, faulting as often as it takes.
    pub(crate) fn touch(&mut self, gfn: u64, access: Access) -> Result<Touched, Failure> {
        let key = (self.space, Gfn::new(gfn));
        loop {
            let found = match self.translate(key, access) {
                Ok(touched) => return Ok(touched),
                Err(found) => found,
            };
            let fault = Fault { space: self.space, found, ..Fault::new(key.1, access) };
            match self.serve(&fault)? {
                FaultOutcome::Emulate(why) => return Ok(Touched::Emulated(why)),
                FaultOutcome::Retry(retry) if retry.point == RetryPoint::SlotChanging => {
                    std::thread::yield_now()
                }
                FaultOutcome::Retry(retry) => self.machine.mmu.wait(retry.range),
                _ => {}
            }
        }
    }

    /// One try in guest mode.
    fn translate(&mut self, key: (SpaceId, Gfn), access: Access) -> Result<Touched, Found> {
        self.enter();
        let result = self.through_tlb(key, access);
        let requests = self.vcpu.leave_guest();
        self.obey(requests);
        result
    }

    /// Enters guest mode; requests are served before.
    pub(crate) fn enter(&mut self) {
        while let Err(requests) = self.vcpu.enter_guest() {
            self.obey(requests);
        }
    }

    pub(crate) fn obey(&mut self, requests: Requests) {
        if requests.contains(Requests::FLUSH_TLB) {
            let flush = self.vcpu.take_flush();
            self.tlb.retain(|(_, gfn), _| !flush.translations.contains(*gfn));
        }
    }

    /// In guest mode.
    pub(crate) fn through_tlb(&mut self, key: (SpaceId, Gfn), access: Access) -> Result<Touched, Found> {
        let table = self.machine.mmu.secondary();
        let write = access.contains(Access::WRITE);
        let usable = |(_, writable): &(Pfn, bool)| !write || *writable;
        let (pfn, _) = match self.tlb.get(&key).copied().filter(usable) {
            Some(cached) => cached,
            None => match table.walk(key.0, key.1) {
                Entry::Leaf { pfn, writable } if !write || writable => {
                    self.tlb.insert(key, (pfn, writable));
                    (pfn, writable)
                }
                Entry::Leaf { .. } | Entry::Poison => return Err(Found::Present),
                Entry::Mmio { .. } => return Err(Found::Reserved),
                Entry::Absent => return Err(Found::Absent),
            },
        };
        table.hooks.at(Point::InGuest);
        let stamp = self.machine.frames.read(pfn);
        Ok(Touched::Page(stamp.unwrap_or_else(|| panic!("{:?} was read after it was freed", key.1))))
    }

    /// Whether the TLB holds a translation of a frame of space 0.
    pub(crate) fn caches(&self, gfn: u64) -> bool {
        self.tlb.contains_key(&(SpaceId(0), Gfn::new(gfn)))
    }

    /// What to wait for to touch `gfn` again.
    pub(crate) fn frame(gfn: u64) -> GfnRange {
        GfnRange::frame(Gfn::new(gfn))
    }
}
