//! A guest that only touches: each vCPU walks over frames of its own choice, in turn, and times each access.
//!
//! Unlike a [`Guest`](crate::Guest) it says exactly which frame faults next, so that a storm of invalidations can be aimed
//! at it, beside it and around it. It runs on KVM alone, and reads the counters that KVM keeps of it.
//!
//! * Each frame's first word holds a tag that the caller writes before the start ([`TouchGuest::tag`]), or zero: any
//!   other word is a wrong page.
//! * A walk's end is a *round*. With [`Pace::OnRelease`] a vCPU waits there, touching no managed memory, until the host lets
//!   it go on: time to take the memory away, so that each access of the next round faults.
//! * A *sweep* maps frames in the guest, untimed, in between.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::Arc;

use afterimage_mmu::{Gfn, GfnRange};

use crate::error::VmError;
use crate::guest::{Guest, GuestHandle, State};
use crate::kvm::stats::KvmCounters;
use crate::kvm::{KvmVm, tables};
use crate::latency::Latency;
use crate::program::Program;
use crate::program::touch::TAG;
use crate::report::GuestReport;
use crate::signals;
use crate::spec::{DirtyLog, GuestMemory, MAX_MEMORY_BYTES, MAX_VCPUS};
use crate::start::{Vcpu, spawn};
use crate::system::{MANAGED_GPA, Plan, SYSTEM_GPA, SystemMemory};
use crate::tsc;

/// What a vCPU does to a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TouchAccess {
    /// It loads the first word and checks it.
    Read,
    /// It stores the tag there.
    Write,
    /// It stores zero there: all frames stay alike, for who merges those that are.
    Clear,
}

/// Which frame of a walk comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TouchOrder {
    /// The next one; behind the last the first.
    InTurn,
    /// Any. A round is as many accesses as the walk has frames.
    Random,
}

/// Whether a vCPU begins its next round by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pace {
    /// At once.
    Endless,
    /// Not even the first before [`TouchGuest::release`].
    OnRelease,
}

/// The frames that one vCPU touches: `count` of them from `first` on, `stride` frames apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Walk {
    /// The first frame; 0 is the first of managed memory.
    pub first: Gfn,
    /// Frames from one to the next.
    pub stride: u64,
    /// How many; at least one.
    pub count: u64,
    /// Which one comes next.
    pub order: TouchOrder,
    /// What happens to each.
    pub access: TouchAccess,
    /// Whether it begins again by itself.
    pub pace: Pace,
}

impl Walk {
    /// Reads frames of `range`, each `stride`-th from the first on, in turn.
    pub const fn over(range: GfnRange, stride: u64, pace: Pace) -> Self {
        let count = (range.end.as_u64() - range.start.as_u64()).div_ceil(stride);
        Self { first: range.start, stride, count, order: TouchOrder::InTurn, access: TouchAccess::Read, pace }
    }

    fn check(&self, frames: u64) -> Result<(), VmError> {
        let end = self.stride.checked_mul(self.count.saturating_sub(1));
        match end.and_then(|last| last.checked_add(self.first.as_u64())) {
            Some(last) if self.count > 0 && last < frames => Ok(()),
            _ => Err(VmError::spec(format!("{self:?} is no walk through {frames} frames"))),
        }
    }
}

/// A running touching guest. Dropping it stops it.
#[derive(Debug)]
pub struct TouchGuest {
    guest: Guest,
    counters: KvmCounters,
}

impl TouchGuest {
    /// The word that belongs at the start of the frame `gfn`.
    pub const fn tag(gfn: Gfn) -> u64 {
        TAG | gfn.as_u64()
    }

    /// Starts a guest on `memory` with one vCPU for each of `walks`.
    ///
    /// # Errors
    ///
    /// [`VmError::Spec`] if a walk leaves the memory, [`VmError::NoKvm`] without `/dev/kvm`, others if the system refuses
    /// something. Nothing runs then.
    pub fn start(memory: GuestMemory, walks: &[Walk]) -> Result<Self, VmError> {
        if !(1..=MAX_VCPUS).contains(&walks.len()) {
            return Err(VmError::spec(format!("a guest has 1 to {MAX_VCPUS} vCPUs, not {}", walks.len())));
        }
        let bytes = memory.bytes() as u64;
        if bytes == 0 || bytes > MAX_MEMORY_BYTES {
            return Err(VmError::spec(format!("a guest cannot have {bytes} bytes of memory")));
        }
        walks.iter().try_for_each(|walk| walk.check(memory.frames()))?;
        signals::install()?;
        let program =
            Program::assemble_touch().map_err(|error| VmError::Assemble { what: error.to_string() })?;
        let plan = Plan::new(walks.len(), 0, tables::pages(bytes), program.code.len());
        let system = Arc::new(SystemMemory::new(plan)?);
        for (vcpu, walk) in walks.iter().enumerate() {
            fill_block(&system, vcpu, walk);
        }
        system.write(system.plan.tables, &tables::build(bytes));
        system.write(system.plan.code, &program.code);
        let (vm, vcpus) = KvmVm::new(&system, memory, DirtyLog::Off)?;
        let counters = KvmCounters::open(&vm, &vcpus)?;
        let khz = vcpus[0].tsc_khz().unwrap_or_else(tsc::khz);
        let state = Arc::new(State::of_kvm(system, memory, vm, khz));
        let guest = Guest::of(spawn(state, vcpus.into_iter().map(Vcpu::Kvm)))?;
        Ok(Self { guest, counters })
    }

    /// What KVM counts of it.
    pub const fn counters_of_kvm(&self) -> &KvmCounters {
        &self.counters
    }

    /// One vCPU's latencies so far. Panics, as the methods below, if there is no such vCPU.
    pub fn vcpu_latency(&self, vcpu: usize) -> Latency {
        let mut latency = Latency::new(self.state.khz);
        latency.outside.add_live(self.state.system.histogram(vcpu, false));
        latency.inside.add_live(self.state.system.histogram(vcpu, true));
        latency
    }

    /// Rounds that `vcpu` has finished.
    pub fn rounds(&self, vcpu: usize) -> u64 {
        self.state.system.block(vcpu).touch.rounds.load(Acquire)
    }

    /// Whether `vcpu` waits for [`TouchGuest::release`].
    pub fn is_waiting(&self, vcpu: usize) -> bool {
        let touch = &self.state.system.block(vcpu).touch;
        touch.rounds.load(Acquire) >= touch.released.load(Relaxed)
    }

    /// Lets `vcpu` begin the round that it waits for; does nothing while it is in one. One thread at a time for each vCPU.
    pub fn release(&self, vcpu: usize) {
        let touch = &self.state.system.block(vcpu).touch;
        // Release: what was done to the memory before comes before the round.
        touch.released.store(touch.rounds.load(Acquire).saturating_add(1), Release);
    }

    /// Asks `vcpu` to load once from each `stride`-th frame of `range` before its next access, without timing it. One
    /// thread at a time for each vCPU, and not before the last sweep was done.
    pub fn sweep(&self, vcpu: usize, range: GfnRange, stride: u64) {
        let touch = &self.state.system.block(vcpu).touch;
        touch.sweep_first.store(range.start.as_u64(), Relaxed);
        touch.sweep_end.store(range.end.as_u64(), Relaxed);
        touch.sweep_stride.store(stride, Relaxed);
        // Release: the frames before the number.
        touch.sweep_asked.store(touch.sweep_asked.load(Relaxed) + 1, Release);
    }

    /// Whether `vcpu` has done the last sweep that it was asked for.
    pub fn has_swept(&self, vcpu: usize) -> bool {
        let touch = &self.state.system.block(vcpu).touch;
        touch.sweep_done.load(Acquire) == touch.sweep_asked.load(Relaxed)
    }

    /// Stops it and reports; see [`Guest::stop`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn stop(self) -> Result<GuestReport, VmError> {
        self.guest.stop()
    }
}

impl core::ops::Deref for TouchGuest {
    type Target = GuestHandle;

    fn deref(&self) -> &GuestHandle {
        &self.guest
    }
}

fn fill_block(system: &SystemMemory, vcpu: usize, walk: &Walk) {
    let (block, plan) = (system.block(vcpu), &system.plan);
    let at = |offset: usize| SYSTEM_GPA + offset as u64;
    block.memory.store(MANAGED_GPA, Relaxed);
    block.windows.store(at(plan.windows()), Relaxed);
    block.outside.store(at(plan.histogram(vcpu, false)), Relaxed);
    block.inside.store(at(plan.histogram(vcpu, true)), Relaxed);
    block.limit.store(u64::MAX, Relaxed);
    let touch = &block.touch;
    touch.first.store(walk.first.as_u64(), Relaxed);
    touch.stride.store(walk.stride, Relaxed);
    touch.count.store(walk.count, Relaxed);
    touch.random.store(u64::from(walk.order == TouchOrder::Random), Relaxed);
    touch.writes.store(u64::from(walk.access != TouchAccess::Read), Relaxed);
    touch.mask.store(if walk.access == TouchAccess::Clear { 0 } else { u64::MAX }, Relaxed);
    // Never 0: the generator would stay there.
    block.rng.store((vcpu as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, Relaxed);
    let released = match walk.pace {
        Pace::Endless => u64::MAX,
        Pace::OnRelease => 0,
    };
    touch.released.store(released, Relaxed);
}
