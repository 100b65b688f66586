//! A zap of 1 GiB in 4 KiB pages, flush included, against `munmap` of as much; and what faults beside a running
//! zap wait.

// UNSAFETY: a mapping is made and taken away.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use afterimage_mmu::{Access, Blocking, Fault, FaultOutcome, Gfn, Platform, SlotId, SpaceId, Zap};
use rustix::mm::{MapFlags, ProtFlags};

use crate::compare::{Measured, compare, median, per};
use crate::machine::{AllResident, FRAME_BYTES, FRAMES, Machine, OneVcpu, WITNESSES, hvas, machine};

/// 1 GiB.
const ZAPPED: u64 = 1 << 18;

pub(crate) fn fill<P: Platform>(mmu: &Machine<P>, frames: u64) {
    let mut vcpu = mmu.vcpu();
    (0..frames).map(Gfn::new).for_each(|gfn| touch(&mut vcpu, gfn));
}

/// Faults until the frame is mapped.
fn touch<P: Platform>(vcpu: &mut OneVcpu<'_, P>, gfn: Gfn) {
    let fault = Fault::new(gfn, Access::WRITE);
    loop {
        match vcpu.handle_fault(&AllResident, &fault) {
            Ok(FaultOutcome::Retry(_)) => {}
            Ok(_) => return,
            Err(error) => panic!("every frame is resident: {error}"),
        }
    }
}

/// What the process's own mapping costs: 1 GiB of anonymous memory, populated.
#[expect(unsafe_code)]
fn munmap() -> f64 {
    let bytes = (ZAPPED * FRAME_BYTES) as usize;
    let flags = MapFlags::PRIVATE | MapFlags::POPULATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let start = unsafe {
        rustix::mm::mmap_anonymous(core::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags)
    };
    let start = start.expect("1 GiB of memory");
    let started = Instant::now();
    // SAFETY: the mapping from above, whole, which nobody uses.
    unsafe { rustix::mm::munmap(start, bytes) }.expect("the mapping from above");
    per(started.elapsed(), ZAPPED)
}

pub(crate) fn compare_all() {
    let mut measured: Vec<Measured<'_>> = vec![("munmap", Box::new(munmap))];
    let (_, witness, barrier) = WITNESSES[2];
    let mmu: Machine = machine(witness, barrier);
    measured.push((
        "ours: invalidate, leaves",
        Box::new(move || {
            fill(&mmu, ZAPPED);
            let started = Instant::now();
            let invalidation = mmu.invalidate(hvas(0, ZAPPED), Zap::Unmap, Blocking::Allowed);
            let elapsed = started.elapsed();
            drop(invalidation);
            per(elapsed, ZAPPED)
        }),
    ));
    measured.push((
        "ours: slot deleted, tables freed",
        Box::new(move || {
            let mmu: Machine = machine(witness, barrier);
            fill(&mmu, ZAPPED);
            let started = Instant::now();
            mmu.delete_slot(SpaceId(0), SlotId(0)).expect("it is there");
            per(started.elapsed(), ZAPPED)
        }),
    ));
    compare("zap of 1 GiB in 4 KiB pages", "a page", 5, measured);
}

/// Latencies of faults of another vCPU, far from the range, that begin while `zapped` is zapped, or nothing: p99 in ns.
fn p99_beside(mmu: &Machine, zapped: Option<&Machine>) -> f64 {
    let (running, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let faults = scope.spawn(|| {
            let (mut vcpu, mut latencies) = (mmu.vcpu(), Vec::with_capacity(1 << 20));
            let first = FRAMES / 2;
            while !stop.load(Ordering::Relaxed) {
                for gfn in (first..first + 4096).map(Gfn::new) {
                    let counts = running.load(Ordering::Relaxed);
                    let started = Instant::now();
                    touch(&mut vcpu, gfn);
                    // Those too that wait until the zap is over.
                    if counts {
                        latencies.push(started.elapsed().as_nanos() as f64);
                    }
                }
                drop(mmu.invalidate(hvas(first, 4096), Zap::Unmap, Blocking::Allowed));
            }
            latencies
        });
        for _ in 0..20 {
            if let Some(zapped) = zapped {
                fill(zapped, ZAPPED);
            }
            running.store(true, Ordering::Relaxed);
            let started = Instant::now();
            if let Some(zapped) = zapped {
                drop(zapped.invalidate(hvas(0, ZAPPED), Zap::Unmap, Blocking::Allowed));
            } else {
                while started.elapsed().as_micros() < 2_000 {
                    core::hint::spin_loop();
                }
            }
            running.store(false, Ordering::Relaxed);
        }
        stop.store(true, Ordering::Relaxed);
        let mut latencies = faults.join().expect("faults do not panic");
        latencies.sort_by(f64::total_cmp);
        assert!(!latencies.is_empty(), "no fault began during a zap");
        latencies[latencies.len() * 99 / 100]
    })
}

pub(crate) fn faults_beside() {
    println!(
        "\np99 of a fault elsewhere: without a zap; while 1 GiB of another machine is zapped, which makes the CPU's \
         other half and the memory as busy; while 1 GiB of its own is"
    );
    for (name, witness, barrier) in WITNESSES {
        let [mmu, other]: [Machine; 2] = [(); 2].map(|()| machine(witness, barrier));
        let mut rounds = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..5 {
            for (round, zapped) in rounds.iter_mut().zip([None, Some(&other), Some(&mmu)]) {
                round.push(p99_beside(&mmu, zapped));
            }
        }
        let [without, other, own] = rounds.each_mut().map(|rounds| median(rounds));
        println!(
            "  {name:<34} {without:>6.0} ns; another's {other:>6.0} ns, {:>5.2} x; its own {own:>6.0} ns, {:>5.2} x",
            other / without,
            own / without
        );
    }
}
