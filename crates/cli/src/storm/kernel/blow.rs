//! One run: a guest, threads that take its memory away, and one that looks after it all.
//!
//! ```text
//! this thread          vCPUs                            threads that invalidate
//!   start ───────────► wait, or touch what they can
//!   first sample ─────────────────────────────────────► [map all again, not counted] window, take, window's end; again
//!   renew: a vCPU at the end of its round has its own frames unmapped, and goes on
//!   time is up ───────────────────────────────────────► end
//!   wait until each access that was stuck is done
//!   last sample
//! ```
//!
//! Until the guest runs, an error says what cannot be had here, and there is no run. From then on there is one: whatever
//! goes wrong is a failure of it, beside what was counted by then.

use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use afterimage_mmu::{FRAME_BYTES, GfnRange};
use afterimage_storm::{Load, Measured, Scenario};
use afterimage_vm::{GuestHandle, Pace, TouchGuest};
use anyhow::{Context as _, Result, anyhow};
use hdrhistogram::Histogram;

use super::account::{Account, Sample};
use super::ksm::Merging;
use super::memory::{By, StormMemory};
use super::plan::{Plan, Take};
use super::tracefs::{Marker, Tracing};
use super::watched::{BEGIN, END, EVENTS, FAULT_IN, FLUSH, Tables, Watched};

/// How often rounds are looked after, where there are any.
const LOOK_EVERY: Duration = Duration::from_micros(100);
/// How often it is seen whether time is up, where nothing else is to do. Each look may take a CPU from a zap, which makes
/// it yield.
const WAIT_EVERY: Duration = Duration::from_millis(20);
/// How long an access may be stuck when nothing invalidates any more, and how long a sweep may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long guests touch before anything is counted.
const WARM_UP: Duration = Duration::from_millis(20);

/// One run to make.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KernelStorm {
    pub(crate) scenario: Scenario,
    pub(crate) load: Load,
    pub(crate) by: By,
    pub(crate) vcpus: usize,
    pub(crate) threads: usize,
    /// In bytes.
    pub(crate) memory: u64,
    pub(crate) seed: u64,
    pub(crate) duration: Duration,
}

/// What it came to.
#[derive(Debug)]
pub(crate) struct KernelRun {
    /// Where it went wrong, of what was counted by then.
    pub(crate) measured: Measured,
    pub(crate) failures: Vec<String>,
}

/// What a run came to of which every event was recorded.
#[derive(Debug)]
pub(crate) struct RecordedRun {
    pub(crate) run: KernelRun,
    /// What the trace tells, if it can be read.
    pub(crate) watched: Result<Watched>,
}

/// What is counted of a run while it blows.
struct Counted {
    /// Sum of what is counted, and since when it is.
    counting: Mutex<(Account, Option<Sample>)>,
    /// How long each invalidation took that a thread of ours made.
    times: Histogram<u64>,
    /// Invalidations that the kernel made by itself.
    merged: u64,
}

/// What a thread that invalidates works with.
struct Invalidator<'s> {
    guest: &'s TouchGuest,
    memory: &'s StormMemory,
    plan: &'s Plan,
    take: Take,
    by: By,
    marker: Option<Marker>,
    /// Sum of what is counted, and since when it is.
    counting: &'s Mutex<(Account, Option<Sample>)>,
    choices: Choices,
    /// How long each time took, in nanoseconds.
    times: Histogram<u64>,
    at: u64,
}

impl KernelStorm {
    /// What its guest's memory takes, that of its own frames included.
    pub(crate) fn bytes(&self) -> u64 {
        self.plan().frames * FRAME_BYTES
    }

    fn plan(&self) -> Plan {
        let Self { scenario, load, by, vcpus, threads, memory, .. } = *self;
        Plan::new(scenario, load, by, vcpus, threads, memory / FRAME_BYTES)
    }

    /// Lets it blow.
    ///
    /// # Errors
    ///
    /// Nothing ran: it says what cannot be had here, and how to get it.
    pub(crate) fn blow(&self, interrupted: &AtomicBool) -> Result<KernelRun> {
        self.blow_with(None, interrupted)
    }

    /// Lets it blow with every event recorded, and tells what the trace does. Times of such a run mean nothing.
    ///
    /// # Errors
    ///
    /// As those of [`KernelStorm::blow`].
    pub(crate) fn watch(&self, tables: Tables, interrupted: &AtomicBool) -> Result<RecordedRun> {
        let mut tracing = Tracing::new("storm", EVENTS)?;
        tracing.probe(FAULT_IN);
        tracing.probe(FLUSH);
        let run = self.blow_with(Some(&tracing), interrupted)?;
        let told = || {
            let (_, lost) = tracing.counts()?;
            Ok(Watched::new(&tracing.lines()?, tables, lost, tracing.missing()))
        };
        Ok(RecordedRun { run, watched: told() })
    }

    fn blow_with(&self, tracing: Option<&Tracing>, interrupted: &AtomicBool) -> Result<KernelRun> {
        let (plan, Self { load, by, .. }) = (self.plan(), *self);
        let memory = StormMemory::new(plan.frames, by)?;
        let merging = (by == By::Ksm && load != Load::Quiet).then(|| merge(&plan, &memory)).transpose()?;
        // Whoever leaves drops the guest before its memory: it is declared later.
        let guest = TouchGuest::start(memory.guest(), &plan.walks)?;
        // What is not to be had is known by now.
        let mut counted = Counted::new();
        let merges = merging.as_ref().map(|(_, merges)| merges);
        let blown = self.blow_over(&plan, &guest, &memory, tracing, merges, &mut counted, interrupted);
        let blown = blown.and(counted.close(&plan, &guest));
        drop(merging);
        Ok(counted.run(blown, guest))
    }

    /// Everything from the guest's first access to the last sample. The error is what went wrong.
    #[expect(clippy::too_many_arguments, reason = "all that a run stands on, once")]
    fn blow_over(
        &self,
        plan: &Plan,
        guest: &TouchGuest,
        memory: &StormMemory,
        tracing: Option<&Tracing>,
        merges: Option<&Tracing>,
        counted: &mut Counted,
        interrupted: &AtomicBool,
    ) -> Result<()> {
        self.warm_up(plan, guest, memory)?;
        let merges_before = merges.map(Tracing::counts).transpose()?;
        tracing.map(Tracing::on).transpose()?;
        let Counted { counting, times, merged } = counted;
        *lock(counting) = (Account::default(), Some(Sample::take(guest)?));
        let over = AtomicBool::new(false);
        let mut invalidators = Vec::new();
        for (thread, take) in plan.takes.iter().enumerate() {
            invalidators.push(Invalidator {
                guest,
                memory,
                plan,
                take: *take,
                by: self.by,
                marker: tracing.map(Tracing::marker).transpose()?,
                counting,
                choices: Choices::new(self.seed, thread),
                times: Histogram::new(3).expect("3 digits are in range"),
                at: 0,
            });
        }
        thread::scope(|scope| {
            let mut threads = Vec::new();
            let mut blown = Ok(());
            for mut invalidator in invalidators {
                let body = || {
                    let taken = invalidator.run(&over);
                    (invalidator.times, taken)
                };
                match thread::Builder::new().spawn_scoped(scope, body) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => blown = Err(error).context("no thread can be started: see ulimit -u"),
                }
            }
            if blown.is_ok() {
                blown = self.look_after(plan, guest, memory, counting, interrupted);
            }
            over.store(true, Relaxed);
            for thread in threads {
                let Ok((taken, ended)) = thread.join() else {
                    blown = blown.and(Err(anyhow!("a thread that invalidates panicked")));
                    continue;
                };
                *times += taken;
                blown = blown.and(ended);
            }
            blown
        })?;
        // What was stuck goes on now, and its wait counts.
        settle(plan, guest)?;
        tracing.map(Tracing::off).transpose()?;
        if let (Some(merges), Some((before, _))) = (merges, merges_before) {
            *merged = merges.counts()?.0 - before;
        }
        Ok(())
    }

    /// Until the vCPUs have touched what they touch, or are at it.
    fn warm_up(&self, plan: &Plan, guest: &TouchGuest, memory: &StormMemory) -> Result<()> {
        if self.load != Load::Uncontended {
            let since = Instant::now();
            // Nothing is counted yet.
            let counting = Mutex::default();
            while since.elapsed() < WARM_UP {
                renew(plan, guest, memory, &counting)?;
                thread::sleep(LOOK_EVERY);
            }
        }
        Ok(())
    }

    /// Until time is up, or somebody interrupts, or a vCPU is gone.
    fn look_after(
        &self,
        plan: &Plan,
        guest: &TouchGuest,
        memory: &StormMemory,
        counting: &Mutex<(Account, Option<Sample>)>,
        interrupted: &AtomicBool,
    ) -> Result<()> {
        let since = Instant::now();
        let renews =
            self.load != Load::Uncontended && plan.walks.iter().any(|walk| walk.pace == Pace::OnRelease);
        while since.elapsed() < self.duration && !interrupted.load(Relaxed) && !guest.has_ended() {
            if renews {
                renew(plan, guest, memory, counting)?;
            }
            let left = self.duration.saturating_sub(since.elapsed());
            thread::sleep(if renews { LOOK_EVERY } else { WAIT_EVERY }.min(left));
        }
        Ok(())
    }
}

impl Counted {
    fn new() -> Self {
        let times = Histogram::new(3).expect("3 digits are in range");
        Self { counting: Mutex::default(), times, merged: 0 }
    }

    /// Takes the last sample.
    fn close(&self, plan: &Plan, guest: &TouchGuest) -> Result<()> {
        let (account, since) = &mut *lock(&self.counting);
        if let Some(since) = since.take() {
            account.add(&plan.walks, &since, &Sample::take(guest)?);
        }
        Ok(())
    }

    /// What a run came to that ended like this. The guest's own counters are read however it did.
    fn run(self, blown: Result<()>, guest: TouchGuest) -> KernelRun {
        let failure = guest.failure().map(|failure| failure.to_string());
        let went_wrong =
            blown.err().map(|error| format!("{error:#}")).filter(|why| failure.as_ref() != Some(why));
        let handle = GuestHandle::clone(&guest);
        let stuck = guest.stop().err().map(|error| error.to_string());
        let (account, _) = self.counting.into_inner().unwrap_or_else(PoisonError::into_inner);
        let invalidations = self.times.len() + self.merged;
        KernelRun {
            measured: account.measured(invalidations, &self.times, handle.counters().wrong),
            failures: failure.into_iter().chain(went_wrong).chain(stuck).collect(),
        }
    }
}

/// Has the kernel merge what the first vCPU touches, and counts how often it does: only a trace tells.
fn merge(plan: &Plan, memory: &StormMemory) -> Result<(Merging, Tracing)> {
    let walk = &plan.walks[0];
    memory.merge(GfnRange::new(walk.first, walk.first + walk.count))?;
    let merges = Tracing::new("ksm", &["kvm:kvm_unmap_hva_range"])?;
    merges.on()?;
    Ok((Merging::start()?, merges))
}

fn lock(counting: &Mutex<(Account, Option<Sample>)>) -> MutexGuard<'_, (Account, Option<Sample>)> {
    counting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has each vCPU's own frames unmapped that is through with them, and lets it go on. That is no invalidation of the storm: its
/// flushes are left out where anything is counted, with those of invalidations that go on meanwhile.
fn renew(
    plan: &Plan,
    guest: &TouchGuest,
    memory: &StormMemory,
    counting: &Mutex<(Account, Option<Sample>)>,
) -> Result<()> {
    for (vcpu, walk) in plan.walks.iter().enumerate() {
        if walk.pace != Pace::OnRelease || !guest.is_waiting(vcpu) {
            continue;
        }
        let frames = GfnRange::new(walk.first, walk.first + walk.stride * walk.count);
        let (account, since) = &mut *lock(counting);
        match since {
            None => memory.discard(frames)?,
            Some(_) => {
                let before = guest.counters_of_kvm().read()?;
                memory.discard(frames)?;
                account.leave_out(&before, &guest.counters_of_kvm().read()?);
            }
        }
        guest.release(vcpu);
    }
    Ok(())
}

/// Until each vCPU that goes on by itself has done another access.
fn settle(plan: &Plan, guest: &TouchGuest) -> Result<()> {
    for (vcpu, walk) in plan.walks.iter().enumerate() {
        let before = guest.vcpu_counters(vcpu).accesses;
        if walk.pace == Pace::Endless {
            until("an access", guest, || guest.vcpu_counters(vcpu).accesses > before)?;
        }
    }
    Ok(())
}

fn until(what: &str, guest: &TouchGuest, done: impl Fn() -> bool) -> Result<()> {
    let since = Instant::now();
    while !done() {
        if let Some(failure) = guest.failure() {
            return Err(anyhow!("{failure}"));
        }
        if since.elapsed() > PATIENCE {
            return Err(anyhow!("{what} was not done after {} s", PATIENCE.as_secs()));
        }
        thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

impl Invalidator<'_> {
    /// Takes memory away until the storm is over, once at least.
    fn run(&mut self, over: &AtomicBool) -> Result<()> {
        let places = self.take.from.len() / self.take.frames;
        loop {
            let place = if self.take.random { self.choices.below(places) } else { self.at % places };
            // In turn: read-only in one round over all places, writable in the next.
            let writable = self.at / places % 2 == 1;
            self.at += 1;
            let start = self.take.from.start + place * self.take.frames;
            let gfns = GfnRange::new(start, start + self.take.frames);
            if self.take.populates {
                self.populate(gfns)?;
            }
            let window = self.guest.windows().open(gfns);
            self.mark(BEGIN);
            let since = Instant::now();
            match self.by {
                By::Madvise => self.memory.discard(gfns)?,
                By::Mprotect => self.memory.protect(gfns, writable)?,
                By::Ksm => unreachable!("the kernel's own thread merges"),
            }
            let elapsed = since.elapsed();
            self.mark(END);
            window.end();
            self.times += u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
            if over.load(Relaxed) {
                return Ok(());
            }
        }
    }

    fn mark(&self, text: &str) {
        if let Some(marker) = &self.marker {
            marker.mark(text);
        }
    }

    /// Has the last vCPU map all of `gfns`, as in a guest that uses its memory. Nothing is counted meanwhile.
    fn populate(&self, gfns: GfnRange) -> Result<()> {
        // What the last time has stuck belongs to it.
        settle(self.plan, self.guest)?;
        let mut counting = lock(self.counting);
        let (account, since) = &mut *counting;
        if let Some(since) = since.take() {
            account.add(&self.plan.walks, &since, &Sample::take(self.guest)?);
        }
        let vcpu = self.plan.walks.len() - 1;
        self.memory.populate(gfns)?;
        self.guest.sweep(vcpu, gfns, 1);
        until("a sweep", self.guest, || self.guest.has_swept(vcpu)).context("a vCPU maps its memory")?;
        *since = Some(Sample::take(self.guest)?);
        Ok(())
    }
}

/// Numbers from a seed, for a thread (xorshift64*).
#[derive(Debug)]
struct Choices(u64);

impl Choices {
    fn new(seed: u64, thread: usize) -> Self {
        Self((seed ^ (thread as u64 + 1) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((u128::from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)) * u128::from(bound)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use afterimage_mmu::Gfn;
    use afterimage_testing::skip;
    use afterimage_vm::{KvmProbe, TouchAccess, Walk, probe};

    use super::*;

    /// Its memory is read-only, and it writes.
    #[test]
    fn a_guest_that_dies_was_a_run_all_the_same() {
        if !matches!(probe(), KvmProbe::Usable(_)) {
            return skip("a_guest_that_dies_was_a_run_all_the_same", "no usable /dev/kvm");
        }
        let frames = GfnRange::new(Gfn::new(0), Gfn::new(8));
        let memory = StormMemory::new(frames.len(), By::Mprotect).expect("a few frames");
        memory.protect(frames, false).expect("they are ours");
        let walk = Walk { access: TouchAccess::Write, ..Walk::over(frames, 1, Pace::Endless) };
        let guest = TouchGuest::start(memory.guest(), &[walk]).expect("KVM can be used");
        let since = Instant::now();
        while !guest.has_ended() {
            assert!(since.elapsed() < PATIENCE, "it goes on");
            thread::sleep(LOOK_EVERY);
        }
        let mut counted = Counted::new();
        counted.times += 5_u64;
        let run = counted.run(Err(anyhow!("an access was not done")), guest);
        assert_eq!(run.measured.invalidations, 1, "what was counted by then is kept");
        let [dead, went_wrong] = &run.failures[..] else { panic!("two failures, not {:?}", run.failures) };
        assert!(dead.contains("vCPU 0") && went_wrong == "an access was not done", "{:?}", run.failures);
    }
}
