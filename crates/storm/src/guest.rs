//! A vCPU of a storm: touches memory through the tables and a TLB, faults, retries, and answers flush requests.
//!
//! ```text
//! enter ── requests? ──► flush the TLB, again
//!   │
//!   ├─ touch until kicked, or until an access faults ── leave ── handle the fault ─┐
//!   │      ▲                                                                       │
//!   └──────┴──────────── the same access again, however the fault ended ◄──────────┘
//! ```
//!
//! A fault lasts from the access that met no translation to the same access done, with all its retries, as a guest sees
//! it. Every access looks whether the frame that it reached is its page's.

use core::sync::atomic::{AtomicBool, Ordering};

use afterimage_mmu::{
    Access, Fault, FaultOutcome, Gfn, GfnRange, GuestMmu, Pfn, Platform, Requests, Retry, RetryPoint,
    SpaceId, Vcpu,
};
use afterimage_stage2::{HeapMemory, Host, Npt4, Stage2, Tables, Translation};

use crate::platform::{Threads, cpu_ns, start_of_slice};
use crate::policy::AfterRetry;
use crate::ram::{Ram, StampedPage};
use crate::recording::{Event, Recording, What};
use crate::scenario::Touch;
use crate::windows::{Since, Windows};

/// Accesses in one stay in the guest, at most; the TLB is empty at its start.
pub(crate) const BATCH: u32 = 1024;
/// Entries of the TLB.
const TLB: usize = 256;
/// One fault in so many has its CPU time taken; the reading costs as much as a fault.
const SAMPLED: u64 = 128;
/// Threads that may invalidate.
pub(crate) const MAX_THREADS: usize = 8;

/// What the tables of a storm stand on.
#[derive(Debug)]
pub(crate) struct StormHost<'r>(core::marker::PhantomData<&'r Ram>);

impl StormHost<'_> {
    pub(crate) fn new() -> Self {
        Self(core::marker::PhantomData)
    }
}

impl<'r> Host for StormHost<'r> {
    type Memory = HeapMemory;
    type Platform = Threads;
    type Page = StampedPage<'r>;
}

/// The tables of a storm. The format makes no difference to it.
pub(crate) type StormTables<'r> = Stage2<Npt4, StormHost<'r>>;
pub(crate) type StormMmu<'r> = GuestMmu<StormTables<'r>>;

/// Numbers from a seed (xorshift64*).
#[derive(Clone, Debug)]
pub(crate) struct Choices(u64);

impl Choices {
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        Self((seed ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1)
    }

    #[inline]
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((u128::from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)) * u128::from(bound)) >> 64) as u64
    }
}

/// What all threads of a storm share.
pub(crate) struct Shared<'m, 'r> {
    pub(crate) mmu: &'m StormMmu<'r>,
    pub(crate) ram: &'r Ram,
    pub(crate) windows: &'m [Windows],
    pub(crate) after_retry: AfterRetry,
    pub(crate) started_ns: u64,
}

impl<'m, 'r> Shared<'m, 'r> {
    /// Has one page mapped, after as many retries as it takes: beside an invalidation, or another vCPU that adds a table.
    pub(crate) fn map(&self, vcpu: &mut Vcpu<'m, StormTables<'r>>, gfn: Gfn) -> Result<(), String> {
        loop {
            match vcpu.handle_fault(&self.ram, &Fault::new(gfn, Access::WRITE)) {
                Ok(FaultOutcome::Fixed | FaultOutcome::FixedFast | FaultOutcome::Spurious) => return Ok(()),
                Ok(FaultOutcome::Retry(retry)) => self.mmu.wait(retry.range),
                Ok(outcome @ (FaultOutcome::Emulate(_) | FaultOutcome::WriteProtected)) => {
                    return Err(unexpected(gfn, outcome));
                }
                Err(error) => return Err(error.to_string()),
            }
        }
    }
}

/// How a fault on ordinary memory cannot end.
fn unexpected(gfn: Gfn, outcome: FaultOutcome) -> String {
    format!("guest frame {gfn} is ordinary memory, and its fault ended as {outcome:?}")
}

/// What one vCPU found.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) accesses: u64,
    pub(crate) faults: u64,
    /// Those that were cut off.
    pub(crate) unfinished: u64,
    pub(crate) wrong: u64,
    pub(crate) retries: [u64; RetryPoint::COUNT],
    pub(crate) most_retries: u64,
    pub(crate) most_ends: u64,
    pub(crate) doomed_cpu_ns: u64,
    /// CPU time of all that it did.
    pub(crate) cpu_ns: u64,
    pub(crate) failure: Option<String>,
    pub(crate) recording: Recording,
}

/// An access that has faulted and is not done.
#[derive(Clone, Copy, Debug)]
struct Pending {
    gfn: Gfn,
    started_ns: u64,
    since: [Since; MAX_THREADS],
    /// Whether an invalidation of its frame had begun when it missed.
    is_covered: bool,
    /// When it was first told to retry.
    held_since: [Since; MAX_THREADS],
    retries: u64,
}

pub(crate) struct Guest<'m, 'r> {
    shared: &'m Shared<'m, 'r>,
    number: usize,
    vcpu: Vcpu<'m, StormTables<'r>>,
    tlb: Box<[Option<(Gfn, Pfn)>; TLB]>,
    touch: Touch,
    at: u64,
    choices: Choices,
    pending: Option<Pending>,
    sample_ns: u64,
    seen: Seen,
}

impl<'m, 'r> Guest<'m, 'r> {
    pub(crate) fn new(shared: &'m Shared<'m, 'r>, number: usize, touch: Touch, seed: u64) -> Self {
        Self {
            shared,
            number,
            vcpu: shared.mmu.vcpu(),
            tlb: Box::new([None; TLB]),
            touch,
            at: 0,
            choices: Choices::new(seed, number as u64 + 1),
            pending: None,
            sample_ns: (0..64).map(|_| cpu_ns()).map(|before| cpu_ns() - before).min().unwrap_or(0),
            seen: Seen::default(),
        }
    }

    /// Has all that it touches mapped, before the storm, where nobody takes it away: then it never faults.
    pub(crate) fn map_all(&mut self) {
        let (Touch::Any(gfns) | Touch::Fresh(gfns)) = self.touch;
        for gfn in gfns.start.as_u64()..gfns.end.as_u64() {
            if let Err(failure) = self.shared.map(&mut self.vcpu, Gfn::new(gfn)) {
                self.seen.failure = Some(failure);
                return;
            }
        }
    }

    /// Runs until the storm is over and nothing is pending, or something fails, or `abandoned`: then what is pending is
    /// cut off, and counts with what it has come to.
    pub(crate) fn run(mut self, over: &AtomicBool, abandoned: &AtomicBool) -> Seen {
        start_of_slice();
        let before = cpu_ns();
        while (self.pending.is_some() || !over.load(Ordering::Relaxed))
            && !abandoned.load(Ordering::Relaxed)
            && self.seen.failure.is_none()
        {
            if let Err(requests) = self.vcpu.enter_guest() {
                self.serve(requests);
                continue;
            }
            // A guest switches between its processes now and then, and forgets what its TLB held.
            self.tlb.fill(None);
            let faulted = self.touch(over);
            let requests = self.vcpu.leave_guest();
            self.serve(requests);
            if let Some(gfn) = faulted {
                self.fault(gfn);
            }
        }
        self.seen.cpu_ns = cpu_ns() - before;
        if let Some(pending) = self.pending.take() {
            self.seen.unfinished += 1;
            self.ended(pending);
        }
        self.seen
    }

    fn serve(&mut self, requests: Requests) {
        if requests.contains(Requests::FLUSH_TLB) {
            self.tlb.fill(None);
        }
    }

    /// In the guest: accesses, until one faults. None begins any more once the storm is over.
    fn touch(&mut self, over: &AtomicBool) -> Option<Gfn> {
        for _ in 0..BATCH {
            if self.vcpu.is_kicked() {
                return None;
            }
            let gfn = match &self.pending {
                Some(pending) => pending.gfn,
                None if over.load(Ordering::Relaxed) => return None,
                None => self.next(),
            };
            if !self.access(gfn) {
                if self.pending.is_none() {
                    let since = self.since();
                    let is_covered = self.meets(&since, gfn) && self.is_covered(gfn);
                    self.pending = Some(Pending {
                        gfn,
                        started_ns: Threads::now_ns(),
                        since,
                        is_covered,
                        held_since: since,
                        retries: 0,
                    });
                }
                return Some(gfn);
            }
            self.seen.accesses += 1;
            if let Some(pending) = self.pending.take() {
                self.ended(pending);
            }
            if let Touch::Fresh(_) = self.touch {
                // Its own frames, whose pages stay where they are: nobody else has the translation to forget.
                self.tlb[tlb_index(gfn)] = None;
                self.in_tables(|tables| tables.zap(GfnRange::frame(gfn)));
            }
        }
        None
    }

    /// What each thread has taken away by now.
    fn since(&self) -> [Since; MAX_THREADS] {
        core::array::from_fn(|thread| {
            self.shared.windows.get(thread).map_or(Since::default(), Windows::since)
        })
    }

    /// Whether somebody has been about to take `gfn` away at any moment since.
    fn meets(&self, since: &[Since; MAX_THREADS], gfn: Gfn) -> bool {
        self.shared.windows.iter().zip(since).any(|(windows, since)| windows.met(*since, gfn).inside)
    }

    /// Whether the engine holds faults on `gfn` back, of which it may know a hull only.
    fn is_covered(&self, gfn: Gfn) -> bool {
        self.shared.mmu.invalidations().covers(GfnRange::frame(gfn))
    }

    #[inline]
    fn next(&mut self) -> Gfn {
        match self.touch {
            Touch::Any(gfns) => gfns.start + self.choices.below(gfns.len()),
            Touch::Fresh(gfns) => {
                self.at = (self.at + 1) % gfns.len();
                gfns.start + self.at
            }
        }
    }

    /// One access: through the TLB, or the tables. Whether there is a translation.
    #[inline]
    fn access(&mut self, gfn: Gfn) -> bool {
        let pfn = match self.tlb[tlb_index(gfn)] {
            Some((cached, pfn)) if cached == gfn => pfn,
            _ => match self.in_tables(|tables| tables.translate(gfn, Access::WRITE)) {
                Translation::Frame(pfn) => {
                    self.tlb[tlb_index(gfn)] = Some((gfn, pfn));
                    pfn
                }
                Translation::Fault(_) => return false,
            },
        };
        if !self.shared.ram.holds(pfn, gfn) {
            self.seen.wrong += 1;
        }
        true
    }

    /// Looks at the tables as a vCPU may.
    #[inline]
    fn in_tables<R>(&mut self, look: impl FnOnce(&Tables<Npt4, HeapMemory>) -> R) -> R {
        let mut walker = self.vcpu.walker();
        let section = walker.walk();
        let tables = self.shared.mmu.secondary().tables(SpaceId(0), section.walking());
        look(tables.expect("there is one address space"))
    }

    /// Outside: one turn of the fault path.
    fn fault(&mut self, gfn: Gfn) {
        let sampled = self.choices.below(SAMPLED) == 0;
        let before = if sampled { cpu_ns() } else { 0 };
        let outcome = self.vcpu.handle_fault(&self.shared.ram, &Fault::new(gfn, Access::WRITE));
        match outcome {
            Ok(FaultOutcome::Fixed | FaultOutcome::FixedFast | FaultOutcome::Spurious) => {}
            Ok(FaultOutcome::Retry(Retry { point, range })) => {
                if sampled {
                    let spent = (cpu_ns() - before).saturating_sub(self.sample_ns);
                    self.seen.doomed_cpu_ns += spent * SAMPLED;
                }
                self.seen.retries[point as usize] += 1;
                let now = self.since();
                if let Some(pending) = &mut self.pending {
                    if pending.retries == 0 {
                        pending.held_since = now;
                    }
                    pending.retries += 1;
                }
                if self.shared.after_retry == AfterRetry::Park {
                    self.shared.mmu.wait(range);
                }
            }
            Ok(outcome @ (FaultOutcome::Emulate(_) | FaultOutcome::WriteProtected)) => {
                self.seen.failure = Some(unexpected(gfn, outcome));
                self.pending = None;
            }
            Err(error) => {
                self.seen.failure = Some(error.to_string());
                self.pending = None;
            }
        }
    }

    /// The access that had faulted is done, or is given up.
    fn ended(&mut self, pending: Pending) {
        let Pending { gfn, started_ns, since, is_covered, held_since, retries } = pending;
        let now = Threads::now_ns();
        // An invalidation may wait for the starved before it begins: until then it is in nobody's way.
        let inside = self.meets(&since, gfn) && (retries > 0 || is_covered || self.is_covered(gfn));
        let ends = match retries {
            0 => 0,
            _ => {
                self.shared.windows.iter().zip(held_since).map(|(all, since)| all.met(since, gfn).ends).sum()
            }
        };
        let seen = &mut self.seen;
        seen.faults += 1;
        seen.most_retries = seen.most_retries.max(retries);
        seen.most_ends = seen.most_ends.max(ends);
        let histogram = if inside { &mut seen.recording.inside } else { &mut seen.recording.outside };
        Recording::sample(histogram, now - started_ns);
        let from = self.shared.started_ns;
        let event = || Event {
            thread: self.number,
            what: What::Fault { retries, inside },
            gfn: gfn.as_u64(),
            frames: 1,
            start_ns: started_ns.saturating_sub(from),
            end_ns: now.saturating_sub(from),
        };
        if retries > 0 { seen.recording.keep_rare(event) } else { seen.recording.keep(event) }
    }
}

#[inline]
fn tlb_index(gfn: Gfn) -> usize {
    gfn.as_u64() as usize % TLB
}

#[cfg(test)]
mod tests {
    use std::thread;

    use afterimage_mmu::{Blocking, Memslot, PageSize, SlotId, Zap};

    use super::*;
    use crate::policy::Policies;
    use crate::ram::BASE;

    const FRAMES: u64 = 4;
    const ALL: Touch = Touch::Any(GfnRange::new(Gfn::new(0), Gfn::new(FRAMES)));

    fn machine<'r>() -> StormMmu<'r> {
        let tables = Stage2::new(StormHost::new(), HeapMemory::default(), 1, PageSize::Size4K).unwrap();
        let mmu = GuestMmu::new(tables, Policies::LINUX.engine());
        mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(0), FRAMES, BASE)).unwrap();
        mmu
    }

    fn shared<'m, 'r>(mmu: &'m StormMmu<'r>, ram: &'r Ram, windows: &'m [Windows]) -> Shared<'m, 'r> {
        Shared { mmu, ram, windows, after_retry: AfterRetry::Refault, started_ns: 0 }
    }

    #[test]
    fn a_vcpu_that_is_not_to_fault_is_mapped_whatever_goes_on_meanwhile() {
        let (ram, _) = Ram::new(FRAMES, 0).unwrap();
        let mmu = machine();
        let shared = shared(&mmu, &ram, &[]);
        let mut guest = Guest::new(&shared, 0, ALL, 1);
        let open = mmu.invalidate(Ram::hvas(0, FRAMES), Zap::Unmap, Blocking::Allowed);
        thread::scope(|scope| {
            let mapping = scope.spawn(|| guest.map_all());
            while mmu.fault_stats().retried() == 0 && !mapping.is_finished() {
                thread::yield_now();
            }
            drop(open);
            mapping.join().unwrap();
        });
        assert_eq!(guest.seen.failure, None);
        for gfn in 0..FRAMES {
            assert!(guest.access(Gfn::new(gfn)), "guest frame {gfn} is not mapped");
        }
    }

    /// Else a storm that had to be cut off looks like one without its longest fault.
    #[test]
    fn a_fault_that_is_cut_off_counts_with_what_it_has_come_to() {
        let (ram, _) = Ram::new(FRAMES, 0).unwrap();
        let mmu = machine();
        let windows = [Windows::new(GfnRange::new(Gfn::new(0), Gfn::new(FRAMES)))];
        let shared = shared(&mmu, &ram, &windows);
        let [over, abandoned] = [const { AtomicBool::new(false) }; 2];
        windows[0].open(GfnRange::new(Gfn::new(0), Gfn::new(FRAMES)));
        let open = mmu.invalidate(Ram::hvas(0, FRAMES), Zap::Unmap, Blocking::Allowed);
        let seen = thread::scope(|scope| {
            let guest = scope.spawn(|| Guest::new(&shared, 0, ALL, 1).run(&over, &abandoned));
            while mmu.fault_stats().retried() < 2 && !guest.is_finished() {
                thread::yield_now();
            }
            over.store(true, Ordering::Relaxed);
            abandoned.store(true, Ordering::Relaxed);
            guest.join().unwrap()
        });
        drop(open);
        assert_eq!((seen.faults, seen.unfinished, seen.accesses), (1, 1, 0));
        assert!(seen.most_retries >= 2, "{seen:?}");
        assert_eq!((seen.recording.inside.len(), seen.recording.outside.len()), (1, 0));
    }

    #[test]
    fn a_fault_is_inside_what_has_begun() {
        let (ram, _) = Ram::new(FRAMES, 0).unwrap();
        let mmu = machine();
        let windows = [Windows::new(GfnRange::new(Gfn::new(0), Gfn::new(FRAMES)))];
        let shared = shared(&mmu, &ram, &windows);
        let mut guest = Guest::new(&shared, 0, ALL, 1);
        // Accesses to one frame, until one faults.
        let touch = |guest: &mut Guest<'_, '_>, gfn| {
            guest.touch = Touch::Any(GfnRange::frame(gfn));
            while let Err(requests) = guest.vcpu.enter_guest() {
                guest.serve(requests);
            }
            let faulted = guest.touch(&AtomicBool::new(false));
            let requests = guest.vcpu.leave_guest();
            guest.serve(requests);
            faulted
        };
        let serve = |guest: &mut Guest<'_, '_>, gfn| {
            guest.fault(gfn);
            assert_eq!(touch(guest, gfn), None);
            let Recording { inside, outside, .. } = &guest.seen.recording;
            (inside.len(), outside.len())
        };
        let begin = || mmu.invalidate(Ram::hvas(0, FRAMES), Zap::Unmap, Blocking::Allowed);
        let [one, other] = [0, 1].map(Gfn::new);
        // Who is about to take it away waits for its turn.
        windows[0].open(GfnRange::new(Gfn::new(0), Gfn::new(FRAMES)));
        assert_eq!(touch(&mut guest, one), Some(one));
        assert_eq!(serve(&mut guest, one), (0, 1));
        // It has begun.
        let open = begin();
        assert_eq!(touch(&mut guest, other), Some(other));
        drop(open);
        assert_eq!(serve(&mut guest, other), (1, 1));
    }
}
