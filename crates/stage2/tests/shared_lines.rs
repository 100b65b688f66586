//! On its way a fault that announces an intent stores to nothing that vCPUs share, but for the entry that it installs: the
//! virtual machine's own struct lies in memory that nobody may write meanwhile. (Its words of invalidations are on the heap.)

// UNSAFETY: the machine is built in a mapping of its own, whose protection changes.
#![expect(unsafe_code)]
#![cfg(target_os = "linux")]

use std::convert::Infallible;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::ptr::NonNull;

use afterimage_mmu::{
    Access, Barrier, Fault, FaultInError, FaultOutcome, Gfn, GuestMmu, Hva, Memslot, PageRef, PageSize,
    PageUse, Patience, Pfn, Policy, PrimaryMmu, SlotId, Snapshot, WitnessKind,
};
use afterimage_stage2::{HeapMemory, Host, Npt4, Stage2};
use afterimage_uffd::Linux;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};

/// Of one table of the last level.
const FRAMES: u64 = 512;

struct Page(Pfn);

impl PageRef for Page {
    fn pfn(&self) -> Pfn {
        self.0
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn release(self, _used: PageUse) {}
}

struct OnLinux;

impl Host for OnLinux {
    type Memory = HeapMemory;
    type Platform = Linux;
    type Page = Page;
}

struct AllResident;

impl PrimaryMmu for AllResident {
    type Page = Page;
    type Error = Infallible;

    fn fault_in(
        &self,
        _slot: &Memslot,
        fault: &Fault,
        _since: &Snapshot,
        _patience: Patience,
    ) -> Result<Page, FaultInError<Infallible>> {
        Ok(Page(Pfn::new(fault.gfn.as_u64() + 1)))
    }
}

type Machine = GuestMmu<Stage2<Npt4, OnLinux>>;

/// A machine on pages of its own.
struct OnPages(NonNull<Machine>);

impl OnPages {
    const BYTES: usize = size_of::<Machine>().next_multiple_of(4096);

    fn new(machine: Machine) -> Self {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe {
            rustix::mm::mmap_anonymous(core::ptr::null_mut(), Self::BYTES, protection, MapFlags::PRIVATE)
        };
        let start = NonNull::new(start.expect("a few pages").cast()).expect("not null");
        // SAFETY: (1) the mapping is large enough, and aligned to pages, which is more than the type asks for; (2) nobody
        // else uses it.
        unsafe { start.write(machine) };
        Self(start)
    }

    fn get(&self) -> &Machine {
        // SAFETY: (1) written above; (2) dropped with `self`.
        unsafe { self.0.as_ref() }
    }

    fn protect(&self, protection: MprotectFlags) {
        // SAFETY: the mapping from above. Who writes to it while it may only be read is stopped by the kernel.
        unsafe { rustix::mm::mprotect(self.0.as_ptr().cast(), Self::BYTES, protection) }.expect("mprotect");
    }
}

impl Drop for OnPages {
    fn drop(&mut self) {
        // SAFETY: (1) written once, and nobody borrows it any more; (2) the mapping is not used again.
        unsafe {
            self.0.drop_in_place();
            rustix::mm::munmap(self.0.as_ptr().cast(), Self::BYTES).expect("the mapping");
        }
    }
}

/// Faults on every frame of a table, all but the first while the machine's own memory may only be read.
fn fault_on_read_only(witness: WitnessKind, barrier: Barrier) {
    let stage2 = Stage2::new(OnLinux, HeapMemory::default(), 1, PageSize::Size4K).expect("the heap has room");
    let policy = Policy { witness, barrier, ..Policy::default() };
    let machine = OnPages::new(GuestMmu::new(stage2, policy));
    let mmu = machine.get();
    mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(0), FRAMES, Hva::new(0))).expect("the first slot");
    let mut vcpu = mmu.vcpu();
    let mut fault = |gfn| {
        let outcome = vcpu.handle_fault(&AllResident, &Fault::new(Gfn::new(gfn), Access::WRITE));
        assert!(matches!(outcome, Ok(FaultOutcome::Fixed)), "{outcome:?}");
    };
    // The tables on the way are linked, and the cache is full again behind the second.
    fault(0);
    fault(1);
    machine.protect(MprotectFlags::READ);
    (2..FRAMES).for_each(fault);
    machine.protect(MprotectFlags::READ | MprotectFlags::WRITE);
    drop(vcpu);
}

#[test]
fn a_fault_with_an_intent_stores_to_no_shared_line() {
    for barrier in [Barrier::Symmetric, Barrier::Heavy] {
        fault_on_read_only(WitnessKind::Intent, barrier);
    }
}

const CHILD: &str = "AFTERIMAGE_LOCK_ON_READ_ONLY";

/// The control: taking `mmu_lock` is such a store.
#[test]
fn a_fault_with_the_lock_does() {
    if std::env::var_os(CHILD).is_some() {
        return fault_on_read_only(WitnessKind::Lock, Barrier::Symmetric);
    }
    let status = Command::new(std::env::current_exe().expect("this test runs from a file"))
        .args(["--exact", "a_fault_with_the_lock_does"])
        .env(CHILD, "1")
        .status()
        .expect("this test can start itself");
    assert_eq!(status.signal(), Some(rustix::process::Signal::SEGV.as_raw()), "{status}");
}
