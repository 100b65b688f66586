//! A hypervisor on a bare machine that judges what `afterimage-stage2` writes: real walkers walk it.
//!
//! It boots from the BIOS, on QEMU and on Bochs, finds out whether the CPU has SVM (NPT) or VMX (EPT), and runs what
//! its command line asks for. The last line that it prints begins with `judge: passed` or `judge: FAILED`.
#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod console;
mod cpus;
mod guest;
mod matrix;
mod ram;
mod runtime;
mod svm;
mod vmx;
mod walker;

use afterimage_stage2::{ACCESSED_DIRTY, Ept, MODE_BASED_EXECUTE, Npt4};

use crate::console::{command_line, end, say};
use crate::cpus::Descriptors;
use crate::svm::Svm;
use crate::vmx::Vmx;
use crate::walker::{Dialect, Walker};

/// Every CPU comes here, with interrupts off; the first is 0.
extern "C" fn start(cpu: u32) -> ! {
    if cpu > 0 {
        cpus::set_up();
        cpus::wait_for_work();
    }
    ram::set_up();
    let descriptors = cpus::set_up();
    match vendor() {
        Some(Vendor::Amd) => {
            let plain = Dialect { accessed_dirty: true, mode_based_execute: false };
            let mut walker = Svm::new(&descriptors);
            matrix::run::<Npt4, _>(&mut walker, plain);
        }
        Some(Vendor::Intel) => intel(&descriptors),
        None => say!("judge: FAILED: this CPU has neither SVM nor VMX"),
    }
    say!("judge: passed");
    end()
}

fn intel(descriptors: &Descriptors) {
    let mut walker = Vmx::new(descriptors);
    let mut dialect = |accessed_dirty, mode_based_execute| {
        let dialect = Dialect { accessed_dirty, mode_based_execute };
        if !walker.speaks(dialect) {
            say!("  SKIP {dialect:?}: this CPU does not have it");
            return;
        }
        match (accessed_dirty, mode_based_execute) {
            (false, false) => matrix::run::<Ept<4, 0>, _>(&mut walker, dialect),
            (true, false) => matrix::run::<Ept<4, ACCESSED_DIRTY>, _>(&mut walker, dialect),
            (false, true) => matrix::run::<Ept<4, MODE_BASED_EXECUTE>, _>(&mut walker, dialect),
            (true, true) => matrix::run::<Ept<4, { ACCESSED_DIRTY | MODE_BASED_EXECUTE }>, _>(&mut walker, dialect),
        };
    };
    dialect(true, false);
    dialect(false, false);
    dialect(true, true);
    dialect(false, true);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vendor {
    Amd,
    Intel,
}

fn vendor() -> Option<Vendor> {
    let cpuid = core::arch::x86_64::__cpuid;
    if cpuid(1).ecx & 1 << 5 != 0 {
        return Some(Vendor::Intel);
    }
    (cpuid(0x8000_0001).ecx & 1 << 2 != 0).then_some(Vendor::Amd)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    say!("judge: FAILED: {info}");
    end()
}
