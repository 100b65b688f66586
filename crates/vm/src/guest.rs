//! A guest: starts vCPUs on the managed memory, watches them, stops them.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use afterimage_mmu::{FRAME_SHIFT, Gfn, GfnRange, PageSize, PrimaryMmu};
use afterimage_stage2::Host;

use crate::dirty::DirtyFrames;
use crate::error::VmError;
use crate::kvm::KvmVm;
use crate::latency::Latency;
use crate::report::{Counters, GuestReport, VcpuEnd, VcpuFailure, VcpuReport, WrongPage};
use crate::signals;
use crate::soft::{Hardware, Pause, PhysicalMemory, SoftMachine, TablePool};
use crate::spec::{GuestKind, GuestMemory, GuestSpec};
use crate::start::{self, Started};
use crate::system::SystemMemory;
use crate::windows::Windows;

/// How long [`Guest::stop`] waits for vCPUs to see the stop flag before it kicks them.
pub const STOP_GRACE: Duration = Duration::from_secs(5);
/// How long it then waits for those that it kicked.
pub const KICK_GRACE: Duration = Duration::from_secs(3);
const KICK_EVERY: Duration = Duration::from_millis(10);

/// A running guest. Dropping it stops it like [`Guest::stop`], but nobody hears how that went.
///
/// All that can be done with a guest besides stopping it is in [`GuestHandle`].
#[derive(Debug)]
pub struct Guest {
    handle: GuestHandle,
    threads: Vec<JoinHandle<()>>,
}

/// Access to a guest from any thread, for as long as one likes.
#[derive(Clone, Debug)]
pub struct GuestHandle {
    pub(crate) state: Arc<State>,
}

/// What the vCPU threads and the handles share.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) kind: GuestKind,
    pub(crate) system: Arc<SystemMemory>,
    pub(crate) memory: GuestMemory,
    pub(crate) windows: Windows,
    pub(crate) kvm: Option<KvmVm>,
    /// Of software guests.
    pub(crate) pause: Pause,
    pub(crate) khz: u64,
    pub(crate) started: Instant,
    /// By vCPU: how often its thread came back from the guest.
    pub(crate) exits: Vec<AtomicU64>,
    ends: Mutex<Vec<Option<VcpuEnd>>>,
    ended: Condvar,
}

impl State {
    pub(crate) fn new(spec: &GuestSpec, system: Arc<SystemMemory>, kvm: Option<KvmVm>, khz: u64) -> Self {
        let vcpus = system.plan.vcpus;
        Self {
            windows: Windows::new(Arc::clone(&system)),
            kind: spec.kind,
            system,
            memory: spec.memory,
            kvm,
            pause: Pause::new(if spec.kind == GuestKind::Soft { spec.memory.frames() } else { 0 }),
            khz,
            started: Instant::now(),
            exits: (0..vcpus).map(|_| AtomicU64::new(0)).collect(),
            ends: Mutex::new(vec![None; vcpus]),
            ended: Condvar::new(),
        }
    }

    /// That of a guest of 4 KiB pages on KVM.
    pub(crate) fn of_kvm(system: Arc<SystemMemory>, memory: GuestMemory, vm: KvmVm, khz: u64) -> Self {
        Self::new(&GuestSpec::new(GuestKind::Kvm, memory, PageSize::Size4K), system, Some(vm), khz)
    }

    fn ends(&self) -> MutexGuard<'_, Vec<Option<VcpuEnd>>> {
        // A vCPU thread that panicked while it held the lock left nothing half done.
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by a vCPU's thread as its last deed.
    pub(crate) fn end(&self, vcpu: usize, end: VcpuEnd) {
        self.ends()[vcpu] = Some(end);
        self.ended.notify_all();
    }

    /// Waits until all vCPUs have ended, at most until `deadline`; true if they have.
    fn wait_ended(&self, deadline: Instant) -> bool {
        let mut ends = self.ends();
        while ends.iter().any(Option::is_none) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            (ends, _) = self.ended.wait_timeout(ends, left).unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    pub(crate) fn running(&self) -> Vec<usize> {
        self.ends().iter().enumerate().filter(|(_, end)| end.is_none()).map(|(vcpu, _)| vcpu).collect()
    }
}

impl Guest {
    /// Starts a guest.
    ///
    /// `initial` tells for every frame of the managed memory (0 is its first) the 64-bit words that it holds at the
    /// byte offsets [`WORD_OFFSETS`](crate::WORD_OFFSETS); it is called once a frame before anything runs. A page of
    /// zeros is `[0; 3]`.
    ///
    /// # Errors
    ///
    /// [`VmError::Spec`] if the specification cannot be run, [`VmError::NoKvm`] without `/dev/kvm`, others if the
    /// system refuses something. Nothing runs then.
    pub fn start(spec: GuestSpec, initial: impl FnMut(Gfn) -> [u64; 3]) -> Result<Self, VmError> {
        start::start(spec, initial).and_then(Self::of)
    }

    /// Starts a guest of kind [`GuestKind::Soft`] on `machine`. Its memory is [in frames](GuestMemory::in_frames), and its
    /// frames are those of memslot 0.
    ///
    /// # Errors
    ///
    /// [`VmError::Spec`] if the specification cannot be run; others if the system refuses something. Nothing runs then.
    pub fn start_soft<F, H, M, R>(
        spec: GuestSpec,
        machine: SoftMachine<F, H, M, R>,
        initial: impl FnMut(Gfn) -> [u64; 3],
    ) -> Result<Self, VmError>
    where
        F: Hardware,
        H: Host<Memory = TablePool> + 'static,
        M: PrimaryMmu<Page = H::Page> + Send + Sync + 'static,
        R: PhysicalMemory,
    {
        start::start_soft(spec, Arc::new(machine), initial).and_then(Self::of)
    }

    /// The guest that was started. Where a thread is missing, this stops the others.
    pub(crate) fn of((state, threads, started): Started) -> Result<Self, VmError> {
        let guest = Self { handle: GuestHandle { state }, threads };
        started.map(|()| guest)
    }

    /// A handle that can be kept and sent elsewhere.
    pub fn handle(&self) -> GuestHandle {
        self.handle.clone()
    }

    /// Stops the guest and reports. Returns within [`STOP_GRACE`] + [`KICK_GRACE`] in any case.
    ///
    /// A vCPU that waits for a page which nobody provides is kicked out of that access; the report then has
    /// [`VcpuEnd::Kicked`] with the frame.
    ///
    /// # Errors
    ///
    /// [`VmError::DidNotStop`] if not even that worked.
    pub fn stop(self) -> Result<GuestReport, VmError> {
        self.stop_within(STOP_GRACE)
    }

    /// Like [`Guest::stop`], with another time until vCPUs are kicked.
    ///
    /// # Errors
    ///
    /// As [`Guest::stop`].
    pub fn stop_within(mut self, grace: Duration) -> Result<GuestReport, VmError> {
        self.end_all(grace)?;
        Ok(self.handle.report())
    }

    fn end_all(&mut self, grace: Duration) -> Result<(), VmError> {
        let state = &self.handle.state;
        for vcpu in 0..self.threads.len() {
            state.system.block(vcpu).stop.flag.store(1, SeqCst);
        }
        if !state.wait_ended(Instant::now() + grace) {
            let deadline = Instant::now() + KICK_GRACE;
            loop {
                let running = state.running();
                for &vcpu in &running {
                    state.system.block(vcpu).stop.kick.store(1, SeqCst);
                    // A software vCPU looks for itself.
                    if state.kind != GuestKind::Soft {
                        signals::kick(&self.threads[vcpu]);
                    }
                }
                if state.wait_ended(Instant::now() + KICK_EVERY) {
                    break;
                }
                if Instant::now() >= deadline {
                    self.threads.clear();
                    return Err(VmError::DidNotStop { vcpus: running });
                }
            }
        }
        for thread in self.threads.drain(..) {
            // It has reported its end, so this does not wait; a panic is part of that report.
            let _ = thread.join();
        }
        Ok(())
    }
}

impl core::ops::Deref for Guest {
    type Target = GuestHandle;

    fn deref(&self) -> &GuestHandle {
        &self.handle
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            let _ = self.end_all(STOP_GRACE);
        }
    }
}

impl GuestHandle {
    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> usize {
        self.state.system.plan.vcpus
    }

    /// All vCPUs' counters together, now.
    pub fn counters(&self) -> Counters {
        (0..self.vcpus()).map(|vcpu| self.vcpu_counters(vcpu)).sum()
    }

    /// One vCPU's counters, now. Panics if there is no such vCPU.
    pub fn vcpu_counters(&self, vcpu: usize) -> Counters {
        Counters::of(self.state.system.block(vcpu))
    }

    /// The frame that `vcpu` is accessing, or has accessed last. Panics if there is no such vCPU.
    pub fn current_gfn(&self, vcpu: usize) -> Gfn {
        Gfn::new(self.state.system.block(vcpu).progress.at.load(Relaxed))
    }

    /// The wrong pages that were written down so far, at most 16 of each vCPU.
    pub fn wrong_pages(&self) -> Vec<WrongPage> {
        let read = |vcpu| WrongPage::read_all(vcpu, self.state.system.block(vcpu), self.state.khz);
        (0..self.vcpus()).flat_map(read).collect()
    }

    /// All vCPUs' latencies so far. For those of an interval take two and [`Latency::since`].
    pub fn latency(&self) -> Latency {
        self.latency_of(0..self.vcpus())
    }

    fn latency_of(&self, vcpus: core::ops::Range<usize>) -> Latency {
        let mut latency = Latency::new(self.state.khz);
        for vcpu in vcpus {
            latency.outside.add_live(self.state.system.histogram(vcpu, false));
            latency.inside.add_live(self.state.system.histogram(vcpu, true));
        }
        latency
    }

    /// What the guest has done so far: also where it [did not stop](VmError::DidNotStop).
    pub fn report(&self) -> GuestReport {
        let state = &self.state;
        let elapsed = state.started.elapsed();
        let vcpu = |(vcpu, end): (usize, &Option<VcpuEnd>)| {
            let block = state.system.block(vcpu);
            VcpuReport {
                counters: Counters::of(block),
                end: end.clone().unwrap_or(VcpuEnd::Running { gfn: self.current_gfn(vcpu) }),
                exits: state.exits[vcpu].load(Relaxed),
                wrong_pages: WrongPage::read_all(vcpu, block, state.khz),
                latency: self.latency_of(vcpu..vcpu + 1),
            }
        };
        let vcpus = state.ends().iter().enumerate().map(vcpu).collect();
        GuestReport { vcpus, elapsed }
    }

    /// Where invalidation windows are published.
    pub fn windows(&self) -> Windows {
        self.state.windows.clone()
    }

    /// The range that `vcpu` asks to have discarded, until it is acknowledged. `None`: no open request, or no such
    /// vCPU. Until then the guest reads the range, and expects its old content or zeros.
    pub fn discard_request(&self, vcpu: usize) -> Option<GfnRange> {
        if vcpu >= self.vcpus() {
            return None;
        }
        let mailbox = self.state.system.mailbox(vcpu);
        // Acquire: the guest writes the range before the number.
        if mailbox.requested.load(Acquire) == mailbox.acknowledged.load(Relaxed) {
            return None;
        }
        GfnRange::from_len(Gfn::new(mailbox.start.load(Relaxed)), mailbox.pages.load(Relaxed))
    }

    /// Tells `vcpu` that its open request has been fulfilled: from now on it expects zeros there. Does nothing
    /// without an open request. One thread at a time for each vCPU, the one that carried the request out.
    pub fn acknowledge_discard(&self, vcpu: usize) {
        if self.discard_request(vcpu).is_some() {
            let mailbox = self.state.system.mailbox(vcpu);
            // Release: the guest that sees the number sees what the discard did.
            mailbox.acknowledged.store(mailbox.requested.load(Relaxed), Release);
        }
    }

    /// A vCPU that ended before its time, if there is one.
    pub fn failure(&self) -> Option<VcpuFailure> {
        let ends = self.state.ends();
        let mut failures = ends.iter().enumerate().filter_map(|(vcpu, end)| Some((vcpu, end.as_ref()?)));
        failures.find(|(_, end)| !end.is_orderly()).map(|(vcpu, end)| VcpuFailure { vcpu, end: end.clone() })
    }

    /// How `vcpu` has ended, if it has. Panics if there is no such vCPU.
    pub fn end_of(&self, vcpu: usize) -> Option<VcpuEnd> {
        self.state.ends()[vcpu].clone()
    }

    /// Whether no vCPU runs any more.
    pub fn has_ended(&self) -> bool {
        self.state.running().is_empty()
    }

    /// Waits until no vCPU runs any more, at most for `timeout`; true if so. For guests with a limit of accesses.
    pub fn wait_ended(&self, timeout: Duration) -> bool {
        self.state.wait_ended(Instant::now() + timeout)
    }

    /// Starts logging which frames of the managed memory are written. The next write to each frame costs a fault.
    ///
    /// KVM waits here for every vCPU that is inside a page fault: one that waits for userfaultfd has to be served by
    /// another thread, or this never returns.
    ///
    /// # Errors
    ///
    /// [`VmError::NeedsKvm`] for a guest without KVM; [`VmError::Kvm`].
    pub fn start_dirty_log(&self) -> Result<(), VmError> {
        self.kvm("log dirty pages")?.start_dirty_log()
    }

    /// Stops logging; what has not been read is lost. Waits like [`GuestHandle::start_dirty_log`].
    ///
    /// # Errors
    ///
    /// As [`GuestHandle::start_dirty_log`].
    pub fn stop_dirty_log(&self) -> Result<(), VmError> {
        self.kvm("log dirty pages")?.stop_dirty_log()
    }

    /// The frames written since the last call, or since logging started. Clears the log.
    ///
    /// None is missing; but KVM also logs frames that were only read, where it has mapped them writable for that.
    ///
    /// # Errors
    ///
    /// As [`GuestHandle::start_dirty_log`].
    pub fn dirty_frames(&self) -> Result<DirtyFrames, VmError> {
        self.kvm("log dirty pages")?.dirty_frames()
    }

    fn kvm(&self, what: &'static str) -> Result<&KvmVm, VmError> {
        self.state.kvm.as_ref().ok_or(VmError::NeedsKvm { what })
    }
}

/// The frame that holds the managed memory's byte at `offset`.
pub(crate) fn frame_at(offset: u64) -> Gfn {
    Gfn::new(offset >> FRAME_SHIFT)
}
