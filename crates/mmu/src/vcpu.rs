//! Who raises faults and runs guest code: the owner of one set of a vCPU's words.

use alloc::sync::Arc;
use core::cell::Cell;
use core::fmt;

use crate::addr::{Gfn, Hva, HvaRange};
use crate::block::Block;
use crate::dirty_ring::DirtyRing;
use crate::fault::Path;
use crate::flush::Flush;
use crate::guest_mmu::{GuestMmu, WitnessKind};
use crate::host::{Fault, PrimaryMmu, SecondaryMmu};
use crate::intent::{Intent, Walker};
use crate::mutation::{self, Mutation};
use crate::outcome::{FaultOutcome, FaultResult, Retry, RetryPoint};
use crate::platform::Platform as _;
use crate::slots::SpaceId;
use crate::turns::{Retries, Stage, Turns};
use crate::vcpu_words::{Requests, VcpuShared};

/// One who raises faults: a vCPU, or a thread that serves the faults of several. One fault at a time.
pub struct Vcpu<'m, S: SecondaryMmu> {
    mmu: &'m GuestMmu<S>,
    shared: Arc<VcpuShared>,
    cache: S::Cache,
    near: usize,
    ring: Option<Arc<DirtyRing>>,
    retries: Retries,
    /// Whether it ever enters the guest.
    enters: Cell<bool>,
    /// Of its turn.
    stage: Cell<Stage>,
}

impl<S: SecondaryMmu> fmt::Debug for Vcpu<'_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu").field("id", &self.shared.id).finish_non_exhaustive()
    }
}

impl<S: SecondaryMmu> GuestMmu<S> {
    /// A new vCPU. Its number is the lowest that is free. It is to load a root before it enters the guest
    /// ([`RELOAD_ROOTS`](Requests::RELOAD_ROOTS)): one that was read before may be freed, since only a vCPU that exists is waited for.
    pub fn vcpu(&self) -> Vcpu<'_, S> {
        let shared = self.vcpus.register();
        if !mutation::active(Mutation::NewVcpuKeepsRoot) {
            shared.owe(Requests::RELOAD_ROOTS);
        }
        Vcpu {
            mmu: self,
            shared,
            cache: S::Cache::default(),
            near: 0,
            ring: None,
            retries: Retries::default(),
            enters: Cell::new(false),
            stage: Cell::new(Stage::None),
        }
    }
}

impl<S: SecondaryMmu> Drop for Vcpu<'_, S> {
    fn drop(&mut self) {
        self.shared.leave_guest::<S::Platform>();
        self.end_turn();
        if let Some(ring) = &self.ring {
            ring.abandon();
        }
        let mut retired = self.mmu.retired.write();
        self.mmu.vcpus.unregister(&self.shared);
        self.shared.counters.add_to(&mut retired);
    }
}

impl<'m, S: SecondaryMmu> Vcpu<'m, S> {
    /// The virtual machine it belongs to.
    pub fn mmu(&self) -> &'m GuestMmu<S> {
        self.mmu
    }

    /// Its number, as [`SecondaryMmu::kick`] gets it.
    pub fn id(&self) -> usize {
        self.shared.id
    }

    /// The first guest frame, in any address space, that is backed at `hva`; `None` where no memslot is.
    pub fn gfn_at(&mut self, hva: Hva) -> Option<(SpaceId, Gfn)> {
        let section = self.mmu.enter(&self.shared.section);
        let byte = HvaRange::from_len(hva, 1)?;
        section.slots().touching(byte).map(|(slot, gfns)| (slot.space, gfns.start)).min()
    }

    /// Announces that `block` is about to be installed, where an install is not made by
    /// [`handle_fault`](Self::handle_fault): the witness to verify with. Only under a policy of
    /// [`WitnessKind::Intent`] do invalidations wait for it.
    ///
    /// # Panics
    /// If the policy says `mmu_lock`.
    #[inline]
    pub fn announce(&mut self, block: Block) -> Intent<'_, S::Platform> {
        assert_eq!(self.mmu.policy.witness, WitnessKind::Intent, "invalidations would not wait for it");
        self.mmu.announce(&self.shared, block)
    }

    /// The right to walk tables without a lock.
    pub fn walker(&mut self) -> Walker<'_, S::Platform> {
        self.mmu.walker(&self.shared)
    }

    /// Has the frames that this vCPU writes logged in a ring of `entries` entries, and no more in the slots' bitmaps.
    ///
    /// A ring that it had before gets nothing more.
    pub fn log_in_ring(&mut self, entries: usize) -> Arc<DirtyRing> {
        let ring = Arc::new(DirtyRing::new(entries));
        self.mmu.rings.write().push(Arc::clone(&ring));
        if let Some(old) = self.ring.replace(Arc::clone(&ring)) {
            old.abandon();
        }
        ring
    }

    /// Enters guest mode. `Err`: requests wait and must be served first; the vCPU is outside.
    pub fn enter_guest(&self) -> Result<(), Requests> {
        self.enters.set(true);
        if let Stage::Tried(..) = self.stage.get()
            && !mutation::active(Mutation::TriedClaimStays)
        {
            self.end_turn();
        }
        self.shared.enter_guest::<S::Platform>()
    }

    /// Whether someone wants this vCPU to leave the guest: for vCPUs in software, which nothing interrupts.
    pub fn is_kicked(&self) -> bool {
        self.shared.is_kicked()
    }

    /// Leaves guest mode and hands out what was requested meanwhile.
    pub fn leave_guest(&self) -> Requests {
        self.shared.leave_guest::<S::Platform>();
        match self.stage.get() {
            Stage::Claimed(space, gfn) => self.stage.set(Stage::Tried(space, gfn)),
            Stage::Served(until_ns) if until_ns == 0 || S::Platform::now_ns() >= until_ns => self.end_turn(),
            Stage::None | Stage::Tried(..) | Stage::Served(_) => {}
        }
        self.shared.take_requests()
    }

    /// What is to be forgotten for a [`FLUSH_TLB`](Requests::FLUSH_TLB) that was handed out, by who need not forget
    /// everything; before the guest is entered again.
    pub fn take_flush(&self) -> Flush {
        self.shared.take_flush()
    }

    /// Serves one fault, once. [`FaultOutcome`] and [`FaultError`](crate::FaultError) say what each outcome asks of the caller;
    /// whatever it is, nothing is held any more: no page, no lock.
    ///
    /// Source: Linux `kvm_tdp_page_fault`.
    pub fn handle_fault<M>(&mut self, primary: &M, fault: &Fault) -> FaultResult<S, M>
    where
        M: PrimaryMmu<Page = S::Page>,
    {
        let section = self.mmu.enter(&self.shared.section);
        let turns = self.mmu.policy.turns;
        if let Stage::Claimed(space, gfn) | Stage::Tried(space, gfn) = self.stage.get()
            && (space, gfn) != (fault.space, fault.gfn)
        {
            self.end_turn();
        }
        let is_starved = turns.is_some_and(|turns| self.retries.of(fault.space, fault.gfn) >= turns.after);
        let ring = self.ring.as_deref();
        let path = Path { mmu: self.mmu, shared: &self.shared, fault, ring, is_starved };
        let result = path.walk(primary, section.slots(), &mut self.near, &mut self.cache);
        drop(section);
        self.shared.counters.count(&result);
        if let Some(turns) = turns {
            self.count_retries(turns, fault, &result);
        }
        result
    }

    /// Lets invalidations go on that wait for this vCPU's turn to be over.
    fn end_turn(&self) {
        self.stage.set(Stage::None);
        self.shared.claim.give_back::<S::Platform>();
    }

    /// For a turn: how often this frame was held back, and whether its claim has done its service.
    fn count_retries<E>(&mut self, turns: Turns, fault: &Fault, result: &Result<FaultOutcome, E>) {
        use RetryPoint::{AfterFaultIn, BeforeFaultIn, LostRace, UnderLock};
        match result {
            Ok(FaultOutcome::Retry(Retry { point: BeforeFaultIn | AfterFaultIn | UnderLock, range })) => {
                if let Stage::Served(_) = self.stage.get() {
                    // It is to wait: nobody is to wait for it meanwhile.
                    self.end_turn();
                }
                if self.retries.retried(fault.space, fault.gfn, S::Platform::now_ns()) >= turns.after {
                    self.shared.claim.claim(Block::around(*range));
                    self.stage.set(Stage::Claimed(fault.space, fault.gfn));
                }
            }
            // Nobody holds it back: it comes again at once.
            Ok(FaultOutcome::Retry(Retry { point: LostRace, .. })) => {}
            _ => {
                let Some(since_ns) = self.retries.done(fault.space, fault.gfn) else { return };
                if self.enters.get() && self.shared.claim.claimed().is_some() {
                    let now_ns = S::Platform::now_ns();
                    let slice_ns = now_ns.saturating_sub(since_ns).min(turns.at_most_ns);
                    self.stage.set(Stage::Served(if slice_ns == 0 { 0 } else { now_ns + slice_ns }));
                } else {
                    self.end_turn();
                }
            }
        }
    }
}
