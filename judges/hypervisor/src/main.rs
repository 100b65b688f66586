//! A hypervisor on a bare machine that judges what `afterimage-stage2` writes: real walkers walk it.
//!
//! It boots from the BIOS, on QEMU and on Bochs, finds out whether the CPU has SVM (NPT) or VMX (EPT), and runs what
//! its command line asks for. The last line that it prints begins with `judge: passed`, `judge: FAILED` or
//! `judge: stale`.
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
mod storm;
mod svm;
mod vmx;
mod walker;

use afterimage_mmu::{PageSize, WitnessKind};
use afterimage_stage2::{ACCESSED_DIRTY, Ept, Format, Npt4, Npt5};
use x86_64::registers::control::{Cr4, Cr4Flags};

use crate::boot::MAX_CPUS;
use crate::console::{command_line, end, say};
use crate::cpus::Descriptors;
use crate::storm::Storm;
use crate::svm::Svm;
use crate::vmx::Vmx;
use crate::walker::{Marks, Walker};

/// What the command line asks for: `cpus=3 events=500 matrix storm break=begin-without-flush`.
#[derive(Debug)]
struct Asked {
    cpus: usize,
    events: u64,
    wrong: u64,
    matrix: bool,
    storm: bool,
}

impl Asked {
    fn read() -> Self {
        let mut asked = Self { cpus: 1, events: 0, wrong: 0, matrix: false, storm: false };
        for word in command_line() {
            let number = |text: &str| text.parse::<u32>().expect("a number");
            match word.split_once('=') {
                None if word == "matrix" => asked.matrix = true,
                None if word == "storm" => asked.storm = true,
                Some(("cpus", text)) => asked.cpus = (number(text) as usize).min(MAX_CPUS),
                Some(("events", text)) => asked.events = u64::from(number(text)),
                Some(("wrong-bit", text)) => asked.wrong |= 1 << number(text),
                Some(("break", rule)) => storm::break_rule(rule),
                _ => panic!("what does {word:?} ask for?"),
            }
        }
        asked
    }
}

/// Every CPU comes here, with interrupts off; the first is 0.
extern "C" fn start(cpu: u32) -> ! {
    if cpu > 0 {
        cpus::wait_for_work(&cpus::set_up());
    }
    ram::set_up();
    let descriptors = cpus::set_up();
    let asked = Asked::read();
    cpus::start_others(asked.cpus);
    match vendor() {
        Some(Vendor::Amd) if Cr4::read().contains(Cr4Flags::L5_PAGING) => {
            judge::<Npt5, Svm>(&asked, &descriptors, Marks::Set);
        }
        Some(Vendor::Amd) => judge::<Npt4, Svm>(&asked, &descriptors, Marks::Set),
        Some(Vendor::Intel) => {
            judge::<Ept<4, ACCESSED_DIRTY>, Vmx>(&asked, &descriptors, Marks::Set);
            judge::<Ept<4, 0>, Vmx>(&asked, &descriptors, Marks::Left);
        }
        None => panic!("this CPU has neither SVM nor VMX"),
    }
    say!("judge: passed");
    end()
}

fn judge<F: Format, W: Walker>(asked: &Asked, descriptors: &Descriptors, marks: Marks) {
    if asked.matrix {
        matrix::run::<F, W>(&mut W::new(descriptors), marks, asked.wrong);
    }
    if asked.storm {
        for (backing, witness) in [
            (PageSize::Size4K, WitnessKind::Lock),
            (PageSize::Size4K, WitnessKind::Intent),
            (PageSize::Size2M, WitnessKind::Intent),
        ] {
            storm::run::<F, W>(Storm { backing, witness, events: asked.events, marks });
        }
    }
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
