//! What the witness costs an invalidation: from the call to "begun", with nothing mapped in its range, while vCPUs install
//! elsewhere or do nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use afterimage_mmu::{Access, Blocking, Fault, Gfn, Zap};

use crate::compare::{Measured, compare, per};
use crate::machine::{AllResident, FRAMES, Machine, WITNESSES, hvas, machine};

const INVALIDATIONS: u64 = 500;
/// Frames that busy vCPUs install and lose again, far from the invalidations.
const BUSY_FROM: u64 = FRAMES / 2;
const BUSY_FRAMES: u64 = 4096;

/// Time from the calls to "begun", in ns each; every second one of its vCPUs' own ranges, so that they keep faulting.
fn begins(mmu: &Machine, frames: u64, busy: u64) -> f64 {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for vcpu in 0..busy {
            let (mmu, stop) = (&mmu, &stop);
            scope.spawn(move || {
                let mut owner = mmu.vcpu();
                let first = BUSY_FROM + vcpu * BUSY_FRAMES;
                while !stop.load(Ordering::Relaxed) {
                    for gfn in (first..first + BUSY_FRAMES).map(Gfn::new) {
                        let _ = owner.handle_fault(&AllResident, &Fault::new(gfn, Access::WRITE));
                    }
                    drop(mmu.invalidate(hvas(first, BUSY_FRAMES), Zap::Unmap, Blocking::Allowed));
                }
            });
        }
        let mut begun = Duration::ZERO;
        for _ in 0..INVALIDATIONS {
            let started = Instant::now();
            let invalidation = mmu.invalidate(hvas(0, frames), Zap::Unmap, Blocking::Allowed);
            begun += started.elapsed();
            drop(invalidation);
        }
        stop.store(true, Ordering::Relaxed);
        per(begun, INVALIDATIONS)
    })
}

pub(crate) fn compare_all() {
    for (frames, range) in [(1, "1 page"), (1 << 18, "1 GiB")] {
        for busy in 0..=2 {
            let measured: Vec<Measured<'_>> = WITNESSES
                .into_iter()
                .map(|(name, witness, barrier)| {
                    let mmu: Machine = machine(witness, barrier);
                    let round: Box<dyn FnMut() -> f64> = Box::new(move || begins(&mmu, frames, busy));
                    (name, round)
                })
                .collect();
            compare(&format!("begin of {range}, {busy} vCPUs busy elsewhere"), "a begin", 9, measured);
        }
    }
}
