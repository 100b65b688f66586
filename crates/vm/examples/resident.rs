//! How many checked accesses a second each kind of guest makes on memory that is all there.
//!
//! `cargo run --release -p afterimage-vm --example resident [MiB]`

#![expect(unsafe_code)]
// UNSAFETY: maps memory for the guest.

use core::ptr::NonNull;
use std::time::Duration;

use afterimage_mmu::PageSize;
use afterimage_vm::{Guest, GuestKind, GuestMemory, GuestSpec, Workload, probe};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mib: usize = std::env::args().nth(1).map_or(Ok(256), |mib| mib.parse())?;
    println!("{:#?}", probe());
    let bytes = mib << 20;
    // SAFETY: a new mapping.
    let base = unsafe {
        mmap_anonymous(
            core::ptr::null_mut(),
            bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::POPULATE,
        )
    }?;
    let host = NonNull::new(base.cast()).ok_or("mmap returned null")?;
    // SAFETY: unmapped below, after all guests have stopped.
    let memory = unsafe { GuestMemory::from_raw(host, bytes) };
    for kind in [GuestKind::Kvm, GuestKind::Thread] {
        for vcpus in [1, 2] {
            for workload in
                [Workload::STAMP, Workload::Stamp { locality: None }, Workload::Scan, Workload::HOT]
            {
                // SAFETY: no guest runs.
                unsafe { base.cast::<u8>().write_bytes(0, bytes) };
                let spec = GuestSpec { vcpus, workload, ..GuestSpec::new(kind, memory, PageSize::Size4K) };
                let guest = Guest::start(spec, |_| [0; 3])?;
                // Past the first touches.
                while guest.counters().accesses < 4 * memory.frames() {
                    std::thread::sleep(Duration::from_millis(10));
                }
                let (before, latency) = (guest.counters(), guest.latency());
                let clock = std::time::Instant::now();
                std::thread::sleep(Duration::from_secs(2));
                let (after, seconds) = (guest.counters(), clock.elapsed().as_secs_f64());
                let latency = guest.latency().since(&latency).outside;
                let report = guest.stop()?;
                println!(
                    "{kind:6} {vcpus} {workload:5} {:6.2} M accesses/s, wrong {}, p50 {:?} p99 {:?} p99.9 {:?} max {:?}, {} exits",
                    (after.accesses - before.accesses) as f64 / seconds / 1e6,
                    report.counters().wrong,
                    latency.p50(),
                    latency.p99(),
                    latency.p999(),
                    latency.max(),
                    report.vcpus.iter().map(|vcpu| vcpu.exits).sum::<u64>(),
                );
            }
        }
    }
    // SAFETY: mapped above, no guest runs.
    unsafe { munmap(base, bytes) }?;
    Ok(())
}
