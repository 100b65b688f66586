//! The machine's CPUs: descriptor tables, the local APIC, and work for those beside the first.
//!
//! Interrupts arrive in one place only: between the end of a stay in the guest and the next one, for a moment
//! ([`take_interrupts`]). Their handler, and those of exceptions, run on stacks of their own, since ordinary code keeps
//! data below its stack pointer.

// UNSAFETY: descriptor tables, registers of the local APIC, and the start of other CPUs.
#![expect(unsafe_code)]

use alloc::boxed::Box;
use core::arch::{asm, global_asm};
use core::mem::size_of_val;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use x86_64::instructions::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::instructions::tables::{lidt, load_tss};
use x86_64::structures::DescriptorTablePointer;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable, SegmentSelector};
use x86_64::structures::idt::{Entry, HandlerFunc};
use x86_64::structures::tss::TaskStateSegment;
use x86_64::{PrivilegeLevel, VirtAddr};

use crate::boot::{OTHERS_START, others_end, others_start};
use crate::console::{end, say};

const APIC: usize = 0xfee0_0000;
const APIC_ID: usize = 0x20;
const APIC_EOI: usize = 0xb0;
const APIC_SPURIOUS: usize = 0xf0;
const APIC_COMMAND: usize = 0x300;
const APIC_TARGET: usize = 0x310;
/// The vector that makes a CPU leave its guest.
const KICK: u8 = 0x40;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;

/// Descriptor tables of one CPU, for good.
#[derive(Debug)]
pub(crate) struct Descriptors {
    /// Where the GDT lies.
    pub(crate) gdt: u64,
    /// Where the IDT lies.
    pub(crate) idt: u64,
    /// The task register's segment, and its selector.
    pub(crate) tss: u64,
    pub(crate) tss_selector: SegmentSelector,
}

fn apic_read(register: usize) -> u32 {
    // SAFETY: the local APIC lies there on every machine that runs this, and is mapped.
    unsafe { core::ptr::with_exposed_provenance::<u32>(APIC + register).read_volatile() }
}

fn apic_write(register: usize, value: u32) {
    // SAFETY: as above; only registers that are named here are written.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(APIC + register).write_volatile(value) }
}

/// The number of this CPU: the first is 0.
pub(crate) fn this() -> usize {
    (apic_read(APIC_ID) >> 24) as usize
}

/// Makes another CPU leave its guest.
pub(crate) fn kick(cpu: usize) {
    command(cpu, u32::from(KICK) | 0x4000);
}

fn command(cpu: usize, command: u32) {
    apic_write(APIC_TARGET, (cpu as u32) << 24);
    apic_write(APIC_COMMAND, command);
    while apic_read(APIC_COMMAND) & 0x1000 != 0 {
        core::hint::spin_loop();
    }
}

/// Ticks since the machine was started.
pub(crate) fn clock() -> u64 {
    // SAFETY: every CPU that has virtualisation has this instruction.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Passes that many ticks.
pub(crate) fn wait(ticks: u64) {
    let until = clock() + ticks;
    while clock() < until {}
}

/// Says that the interrupt which ended a stay in the guest was taken.
pub(crate) fn acknowledge() {
    apic_write(APIC_EOI, 0);
}

/// Lets interrupts that wait arrive.
pub(crate) fn take_interrupts() {
    // SAFETY: the handler of the one vector that arrives here changes nothing but the APIC.
    unsafe { asm!("sti", "nop", "cli", options(nomem)) }
}

/// Gives this CPU its descriptor tables and turns its APIC on.
pub(crate) fn set_up() -> Descriptors {
    const STACK: usize = 16 << 10;
    let stack = Box::leak(Box::new([0_u128; STACK / 16]));
    let stack_end = stack.as_ptr_range().end.expose_provenance() as u64;
    let mut tss = TaskStateSegment::new();
    tss.interrupt_stack_table[0] = VirtAddr::new(stack_end);
    let tss: &'static TaskStateSegment = Box::leak(Box::new(tss));
    let mut gdt = GlobalDescriptorTable::<8>::empty();
    let code = gdt.append(Descriptor::kernel_code_segment());
    let data = gdt.append(Descriptor::kernel_data_segment());
    let tss_selector = gdt.append(Descriptor::tss_segment(tss));
    let gdt: &'static GlobalDescriptorTable<8> = Box::leak(Box::new(gdt));
    gdt.load();
    let idt: &'static mut [Entry<HandlerFunc>; 256] =
        Box::leak(Box::new([const { Entry::<HandlerFunc>::missing() }; 256]));
    // SAFETY: (1) the selectors are those of the table that was just loaded; (2) the handlers are written for their
    // vectors, on a stack that nothing else uses; (3) all of it is leaked.
    unsafe {
        CS::set_reg(code);
        for set in [SS::set_reg, DS::set_reg, ES::set_reg] {
            set(data);
        }
        load_tss(tss_selector);
        let stubs = (&raw const exception_stubs).expose_provenance() as u64;
        for (vector, entry) in idt.iter_mut().enumerate() {
            let handler = match vector {
                0..32 => stubs + 16 * vector as u64,
                _ => (&raw const interrupt_stub).expose_provenance() as u64,
            };
            entry.set_handler_addr(VirtAddr::new(handler)).set_stack_index(0);
        }
        let limit = (size_of_val(idt) - 1) as u16;
        lidt(&DescriptorTablePointer { limit, base: VirtAddr::from_ptr(idt) });
    }
    apic_write(APIC_SPURIOUS, 0x1ff);
    Descriptors {
        gdt: (&raw const *gdt).expose_provenance() as u64,
        idt: (&raw const *idt).expose_provenance() as u64,
        tss: (&raw const *tss).expose_provenance() as u64,
        tss_selector: SegmentSelector::new(tss_selector.index(), PrivilegeLevel::Ring0),
    }
}

type Job<'a> = &'a (dyn Fn(&Descriptors) + Sync);

static JOB: AtomicPtr<Job<'static>> = AtomicPtr::new(core::ptr::null_mut());
static ROUND: AtomicU32 = AtomicU32::new(0);
static READY: AtomicUsize = AtomicUsize::new(0);
static OTHERS: AtomicUsize = AtomicUsize::new(0);

/// Starts the CPUs beside the first, until `count` run.
pub(crate) fn start_others(count: usize) {
    let (from, to) = (&raw const others_start, &raw const others_end);
    let bytes = to.addr() - from.addr();
    let trampoline = core::ptr::with_exposed_provenance_mut::<u8>(OTHERS_START as usize);
    // SAFETY: (1) the bytes lie between two labels; (2) nobody uses the memory at the target.
    unsafe { trampoline.copy_from_nonoverlapping(from, bytes) };
    OTHERS.store(count - 1, Ordering::Relaxed);
    for cpu in 1..count {
        command(cpu, INIT);
        pause(100_000);
        command(cpu, STARTUP | (OTHERS_START >> 12) as u32);
        while READY.load(Ordering::Acquire) < cpu {
            core::hint::spin_loop();
        }
    }
}

fn pause(turns: u32) {
    for _ in 0..turns {
        core::hint::spin_loop();
    }
}

/// CPUs beside the first.
pub(crate) fn others() -> usize {
    OTHERS.load(Ordering::Relaxed)
}

/// What the CPUs beside the first do: they wait for work.
pub(crate) fn wait_for_work(descriptors: &Descriptors) -> ! {
    let mut seen = 0;
    READY.fetch_add(1, Ordering::AcqRel);
    loop {
        while ROUND.load(Ordering::Acquire) == seen {
            core::hint::spin_loop();
        }
        seen += 1;
        // SAFETY: `with_others` published a job that lives until every CPU is ready again.
        let job = unsafe { *JOB.load(Ordering::Acquire) };
        job(descriptors);
        READY.fetch_add(1, Ordering::AcqRel);
    }
}

/// Runs `job` on every CPU beside this one, the first, and `mine` here; returns when all are done.
pub(crate) fn with_others(job: Job<'_>, mine: impl FnOnce()) {
    READY.store(0, Ordering::Release);
    let mut job = job;
    JOB.store((&raw mut job).cast(), Ordering::Release);
    ROUND.fetch_add(1, Ordering::AcqRel);
    mine();
    while READY.load(Ordering::Acquire) < others() {
        core::hint::spin_loop();
    }
}

extern "C" fn exception(vector: u64, error: u64, rip: u64) -> ! {
    let cr2 = x86_64::registers::control::Cr2::read_raw();
    say!("judge: FAILED: exception {vector}, error {error:#x}, at {rip:#x}, cr2 {cr2:#x}, cpu {}", this());
    end();
}

global_asm!(
    r#"
.section .text
.balign 16
.globl exception_stubs, interrupt_stub
exception_stubs:
.set vector, 0
.rept 32
    .balign 16
    .if vector != 8 && vector != 10 && vector != 11 && vector != 12 && vector != 13 && vector != 14 && vector != 17 && vector != 21
    push 0
    .endif
    .byte 0x6a, vector
    jmp exception_entry
    .set vector, vector + 1
.endr
exception_entry:
    pop rdi
    pop rsi
    mov rdx, [rsp]
    and rsp, -16
    call {exception}
    ud2
.balign 16
interrupt_stub:
    push rax
    mov eax, {eoi}
    mov dword ptr [rax], 0
    pop rax
    iretq
"#,
    exception = sym exception,
    eoi = const APIC + APIC_EOI,
);

unsafe extern "C" {
    static exception_stubs: u8;
    static interrupt_stub: u8;
}
