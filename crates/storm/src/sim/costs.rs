//! What things cost on this machine: the simulation's only constants, each measured on real threads before it runs.
//!
//! A doomed fault is measured with an invalidation held open, once for each place where it can be found doomed; what lies
//! between two of those places costs the difference. What an entry costs to zap is the time of a storm's uncontended
//! invalidations; what it costs to hand the lock to a fault and to take it back is that of the same invalidation contended
//! by one vCPU, without what is known of it already. Wherever it can be, CPU time is taken, so that a busy machine does not
//! count; two threads are needed at a time, and not more.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use std::thread;

use afterimage_mmu::{
    Access, Blocking, FRAME_BYTES, Fault, Gfn, GfnRange, GuestMmu, Memslot, PageSize, Platform, RawMmuLock,
    SlotId, Zap,
};
use afterimage_stage2::{HeapMemory, Stage2};
use serde::Serialize;

use crate::cell::{Load, Measured};
use crate::guest::{Guest, Shared, StormHost, StormMmu};
use crate::platform::{Threads, cpu_ns};
use crate::policy::{AfterRetry, Policies, Precheck, Scenario, Yielding};
use crate::ram::{BASE, Ram};
use crate::scenario::Touch;
use crate::start::spawn;
use crate::storm::{Storm, StormError};

/// How long each storm blows that something is measured on.
const BLOWS: Duration = Duration::from_millis(100);
/// Turns of a loop that is timed.
const TURNS: u64 = 20_000;
/// Flushes that are timed.
const FLUSHES: u64 = 201;
/// Memory of the contended invalidation.
const CONTENDED: u64 = 16 << 20;

/// Nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Costs {
    /// An access that meets a translation.
    pub touch: f64,
    /// From one fault to the next by a vCPU whose every access faults, without the fault.
    pub between_faults: f64,
    /// Out of the guest, to the first check, and back.
    pub to_hint: f64,
    /// To look the page up.
    pub fault_in: f64,
    /// To take the lock, verify, and give it up.
    pub locked: f64,
    /// To install, after that.
    pub install: f64,
    /// To zap an entry.
    pub zap_entry: f64,
    /// To pass an entry where nothing is mapped.
    pub pass_entry: f64,
    /// An invalidation of one page that is not mapped, from begin to end.
    pub single: f64,
    /// To look at a page's content meanwhile, and to move it.
    pub compare: f64,
    /// To ask one vCPU for a flush.
    pub request: f64,
    /// To have those out that are in the guest.
    pub kick: f64,
    /// A lock from one thread to another.
    pub handover: f64,
    /// What each further thread adds to that, that takes it at the same moment.
    pub crowd: f64,
    /// To wake a thread that has parked.
    pub wake: f64,
}

/// CPU time of a turn: others on the same CPU do not count.
fn ns_each(turns: u64, mut turn: impl FnMut(u64)) -> f64 {
    let started = cpu_ns();
    for number in 0..turns {
        turn(number);
    }
    (cpu_ns() - started) as f64 / turns as f64
}

/// The median of five.
fn steady(mut measure: impl FnMut() -> f64) -> f64 {
    let mut times = [(); 5].map(|()| measure());
    times.sort_by(f64::total_cmp);
    times[2]
}

fn with_machine<R>(
    policies: Policies,
    frames: u64,
    run: impl for<'r> FnOnce(&'r Ram, &StormMmu<'r>) -> Result<R, StormError>,
) -> Result<R, StormError> {
    let (ram, _) = Ram::new(frames, 0).ok_or(StormError::NoMemory)?;
    let tables = Stage2::new(StormHost::new(), HeapMemory::default(), 1, PageSize::Size4K);
    let mmu: StormMmu<'_> = GuestMmu::new(tables.ok_or(StormError::NoMemory)?, policies.engine());
    mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(0), frames, BASE))
        .expect("the slot is the first, not empty, and far from the end of all addresses");
    run(&ram, &mmu)
}

/// One turn of a fault that is found doomed where `precheck` looks, or under the lock.
fn doomed(precheck: Precheck) -> Result<f64, StormError> {
    with_machine(Policies { precheck, ..Policies::LINUX }, 8, |ram, mmu| {
        let mut vcpu = mmu.vcpu();
        let _open = mmu.invalidate(Ram::hvas(0, 8), Zap::Unmap, Blocking::Allowed);
        Ok(steady(|| {
            ns_each(TURNS, |turn| {
                let _ = vcpu.enter_guest();
                let _ = vcpu.leave_guest();
                let _ = vcpu.handle_fault(&ram, &Fault::new(Gfn::new(turn % 8), Access::WRITE));
            })
        }))
    })
}

/// A begin that flushes, with `idle` vCPUs outside, and one more inside if `busy`.
fn flush(idle: usize, busy: bool) -> Result<f64, StormError> {
    with_machine(Policies::LINUX, 8, |ram, mmu| {
        let _outside: Vec<_> = (0..idle).map(|_| mmu.vcpu()).collect();
        let mut vcpu = mmu.vcpu();
        let over = AtomicBool::new(!busy);
        let stays = AtomicU64::new(0);
        thread::scope(|scope| {
            spawn(scope, || {
                let inside = mmu.vcpu();
                while !over.load(Ordering::Relaxed) {
                    if inside.enter_guest().is_ok() {
                        stays.fetch_add(1, Ordering::Relaxed);
                        while !inside.is_kicked() && !over.load(Ordering::Relaxed) {
                            core::hint::spin_loop();
                        }
                        let _ = inside.leave_guest();
                    }
                }
            })?;
            let mut times: Vec<u64> = (0..FLUSHES)
                .map(|flushes| {
                    let _ = vcpu.handle_fault(&ram, &Fault::new(Gfn::new(1), Access::WRITE));
                    // The other one is in the guest again: each flush ends one stay.
                    while busy && stays.load(Ordering::Relaxed) <= flushes {
                        thread::yield_now();
                    }
                    let started = Threads::now_ns();
                    let open = mmu.invalidate(Ram::hvas(1, 1), Zap::Unmap, Blocking::Allowed);
                    let time = Threads::now_ns() - started;
                    drop(open);
                    time
                })
                .collect();
            times.sort_unstable();
            // The better ones: in the others the vCPU had no CPU to leave the guest on.
            let time = times[times.len() / 4] as f64;
            over.store(true, Ordering::Relaxed);
            Ok(time)
        })
    })
}

/// What a second thread adds to taking the lock and giving it up.
fn crowd() -> Result<f64, StormError> {
    let lock = RawMmuLock::<Threads>::new();
    let take = |_| {
        lock.read();
        lock.unlock_read();
    };
    let alone = steady(|| ns_each(TURNS, take));
    let over = AtomicBool::new(false);
    let together = thread::scope(|scope| {
        spawn(scope, || {
            while !over.load(Ordering::Relaxed) {
                ns_each(64, take);
            }
        })?;
        let together = steady(|| ns_each(TURNS, take));
        over.store(true, Ordering::Relaxed);
        Ok(together)
    })?;
    Ok((together - alone).max(0.0))
}

/// From the end of an invalidation to the return of who was parked until then.
fn wake() -> Result<f64, StormError> {
    with_machine(Policies::OURS, 8, |_, mmu| {
        let (ended, over) = (AtomicU64::new(0), AtomicBool::new(false));
        let (waits, woken) = (AtomicU64::new(0), AtomicU64::new(0));
        let frame = GfnRange::frame(Gfn::new(1));
        thread::scope(|scope| {
            spawn(scope, || {
                while !over.load(Ordering::Relaxed) {
                    if mmu.invalidations().covers(frame) {
                        waits.fetch_add(1, Ordering::Relaxed);
                        mmu.wait(frame);
                        woken.store(Threads::now_ns(), Ordering::Release);
                    }
                }
            })?;
            let time = steady(|| {
                let before = woken.load(Ordering::Acquire);
                let before_waits = waits.load(Ordering::Relaxed);
                let open = mmu.invalidate(Ram::hvas(1, 1), Zap::Unmap, Blocking::Allowed);
                while waits.load(Ordering::Relaxed) == before_waits {
                    thread::yield_now();
                }
                // It parks now, and is long asleep then.
                thread::sleep(Duration::from_millis(1));
                ended.store(Threads::now_ns(), Ordering::Relaxed);
                drop(open);
                while woken.load(Ordering::Acquire) == before {
                    thread::yield_now();
                }
                woken.load(Ordering::Relaxed).saturating_sub(ended.load(Ordering::Relaxed)) as f64
            });
            over.store(true, Ordering::Relaxed);
            Ok(time)
        })
    })
}

fn blow(scenario: Scenario, load: Load, policies: Policies, memory: u64) -> Result<Measured, StormError> {
    let (vcpus, threads, seed, duration) = (1, 1, 1, BLOWS);
    let storm = Storm { scenario, load, policies, vcpus, threads, memory, seed, duration };
    Ok(storm.blow(&AtomicBool::new(false))?.measured)
}

impl Costs {
    /// Measures all of them; takes about two seconds.
    ///
    /// # Errors
    /// A storm cannot blow here.
    pub fn calibrate() -> Result<Self, StormError> {
        let linux = Policies::LINUX;
        let median =
            |measured: &Measured| measured.invalidation_ns.as_ref().map_or(0.0, |times| times.median as f64);
        let frames = |memory: u64| (memory / FRAME_BYTES) as f64;
        let wide = Scenario::A.default_memory();
        let quiet = blow(Scenario::E, Load::Quiet, linux, 64 << 20)?;
        let cycle = access(Touch::Fresh(GfnRange::new(Gfn::new(0), Gfn::new(8))))?;
        let served = quiet.latency_ns.outside.as_ref().map_or(0.0, |latency| latency.p50 as f64);
        let to_hint = doomed(Precheck::Before)?;
        let to_after = doomed(Precheck::After)?.max(to_hint);
        let to_locked = doomed(Precheck::Off)?.max(to_after);
        let single = median(&blow(Scenario::E, Load::Uncontended, linux, 64 << 20)?);
        let merged = median(&blow(Scenario::C, Load::Uncontended, linux, 64 << 20)?);
        let cpu = |measured: &Measured| measured.invalidation_cpu_ns.map_or(0.0, |ns| ns as f64);
        let zap_entry = cpu(&blow(Scenario::A, Load::Uncontended, linux, wide)?) / frames(wide);
        let pass_entry =
            median(&blow(Scenario::EInside, Load::Uncontended, linux, 64 << 20)?) / frames(64 << 20);
        let begin = flush(0, false)?;
        let request = (flush(64, false)? - begin).max(0.0) / 64.0;
        let kick = (flush(0, true)? - begin - request).max(0.0);
        let locked = to_locked - to_after;

        // Contended by one vCPU that looks nowhere: all that a yield costs.
        let off = Policies { precheck: Precheck::Off, yielding: Yielding::Contention, ..linux };
        let contended = blow(Scenario::A, Load::Storm, off, CONTENDED)?;
        let a_yield = match contended.yields_per_invalidation {
            Some(yields) if yields >= 1.0 => (cpu(&contended) - zap_entry * frames(CONTENDED)) / yields,
            _ => 0.0,
        };
        // The requests of its flush, over to the fault, its turn with the lock, and back.
        let handover = ((a_yield - 2.0 * request - locked) / 2.0).max(0.0);
        Ok(Self {
            touch: access(Touch::Any(GfnRange::new(Gfn::new(0), Gfn::new(3))))?,
            between_faults: (cycle - served).max(1.0),
            to_hint,
            fault_in: to_after - to_hint,
            locked,
            install: (served - to_locked).max(0.0),
            zap_entry,
            pass_entry,
            single,
            compare: (merged - single).max(0.0),
            request,
            kick,
            handover,
            crowd: crowd()?,
            wake: wake()?,
        })
    }

    /// Each cost by name.
    pub fn named(&self) -> [(&'static str, f64); 15] {
        [
            ("access", self.touch),
            ("between two faults", self.between_faults),
            ("fault: to the first check and back", self.to_hint),
            ("fault: look the page up", self.fault_in),
            ("fault: lock, verify, unlock", self.locked),
            ("fault: install", self.install),
            ("zap an entry", self.zap_entry),
            ("pass an empty entry", self.pass_entry),
            ("invalidate one page", self.single),
            ("compare and move a page", self.compare),
            ("flush: ask one vCPU", self.request),
            ("flush: kick and wait", self.kick),
            ("lock to another thread", self.handover),
            ("lock: each further thread", self.crowd),
            ("wake a parked thread", self.wake),
        ]
    }
}

/// An access in a guest that nobody disturbs: one that meets a translation, or one that faults.
fn access(touch: Touch) -> Result<f64, StormError> {
    with_machine(Policies::LINUX, 8, |ram, mmu| {
        let shared = Shared {
            mmu,
            ram,
            windows: &[],
            after_retry: AfterRetry::Refault,
            started_ns: Threads::now_ns(),
        };
        let [over, abandoned] = [const { AtomicBool::new(false) }; 2];
        thread::scope(|scope| {
            let guest = spawn(scope, || Guest::new(&shared, 0, touch, 1).run(&over, &abandoned))?;
            thread::sleep(BLOWS / 4);
            over.store(true, Ordering::Relaxed);
            let seen = guest.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok(seen.cpu_ns as f64 / seen.accesses.max(1) as f64)
        })
    })
}
