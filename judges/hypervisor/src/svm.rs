//! AMD's virtualisation: guests on NPT. AMD64 APM volume 2, chapter 15 and appendix B.

// UNSAFETY: registers of the CPU, and the control block that it reads and writes.
#![expect(unsafe_code)]

use alloc::boxed::Box;
use core::arch::global_asm;

use afterimage_mmu::{Access, FRAME_BYTES, Found, Gpa, Pfn};
use x86_64::registers::model_specific::Msr;

use crate::cpus::{self, Descriptors};
use crate::guest;
use crate::walker::{Exit, Marks, NestedFault, Other, Registers, Walker};

const EFER: u32 = 0xc000_0080;
const EFER_SVME: u64 = 1 << 12;
const EFER_LONG: u64 = 1 << 8 | 1 << 10 | 1 << 11;
const HSAVE_PA: u32 = 0xc001_0117;

// Offsets in the control block, in bytes.
const INTERCEPT_EXCEPTIONS: usize = 0x08;
const INTERCEPT_1: usize = 0x0c;
const INTERCEPT_2: usize = 0x10;
const ASID: usize = 0x58;
const TLB_CONTROL: usize = 0x5c;
const INTERRUPT_CONTROL: usize = 0x60;
const EXIT_CODE: usize = 0x70;
const EXIT_INFO_1: usize = 0x78;
const EXIT_INFO_2: usize = 0x80;
const NESTED_CONTROL: usize = 0x90;
const NESTED_ROOT: usize = 0xb0;
const SEGMENTS: usize = 0x400;
const SAVED_EFER: usize = 0x4d0;
const SAVED_CR4: usize = 0x548;
const SAVED_CR3: usize = 0x550;
const SAVED_CR0: usize = 0x558;
const SAVED_RFLAGS: usize = 0x570;
const SAVED_RIP: usize = 0x578;
const SAVED_RSP: usize = 0x5d8;
const SAVED_RAX: usize = 0x5f8;

const EXIT_INTERRUPT: u64 = 0x60;
const EXIT_HALT: u64 = 0x78;
const EXIT_NESTED_FAULT: u64 = 0x400;
const FLUSH_ASID: u32 = 3;

#[derive(Debug)]
#[repr(C, align(4096))]
struct Page([u64; 512]);

/// One CPU's SVM.
#[derive(Debug)]
pub(crate) struct Svm {
    control: Box<Page>,
    _host: Box<Page>,
}

impl Svm {
    fn write(&mut self, offset: usize, value: u64) {
        self.control.0[offset / 8] = value;
    }

    /// 32 bits of a word.
    fn write_half(&mut self, offset: usize, value: u32) {
        let shift = offset % 8 * 8;
        let word = &mut self.control.0[offset / 8];
        *word = *word & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }

    fn read(&self, offset: usize) -> u64 {
        self.control.0[offset / 8]
    }

    fn segment(&mut self, index: usize, selector: u16, attributes: u16) {
        let offset = SEGMENTS + 16 * index;
        self.write(offset, u64::from(selector) | u64::from(attributes) << 16 | 0xffff_ffff << 32);
    }
}

impl Walker for Svm {
    fn new(_cpu: &Descriptors) -> Self {
        let host = Box::new(Page([0; 512]));
        // SAFETY: the CPU has SVM (`main` looked); the page for its state is its own, as long as guests run.
        unsafe {
            let efer = Msr::new(EFER).read();
            Msr::new(EFER).write(efer | EFER_SVME);
            Msr::new(HSAVE_PA).write((&raw const *host).expose_provenance() as u64);
        }
        let mut svm = Self { control: Box::new(Page([0; 512])), _host: host };
        svm.write_half(INTERCEPT_EXCEPTIONS, u32::MAX);
        // Interrupts, NMI, INIT; HLT; shutdown. VMRUN, which must be, and VMMCALL.
        svm.write_half(INTERCEPT_1, 1 | 1 << 1 | 1 << 3 | 1 << 24 | 1 << 31);
        svm.write_half(INTERCEPT_2, 0b11);
        svm.write_half(ASID, 1);
        // The guest's interrupt flag is not ours.
        svm.write(INTERRUPT_CONTROL, 1 << 24);
        // ES, CS, SS, DS: data writable and accessed; code for 64 bits.
        for (index, (selector, attributes)) in
            [(16, 0xc93), (8, 0xa9b), (16, 0xc93), (16, 0xc93)].into_iter().enumerate()
        {
            svm.segment(index, selector, attributes);
        }
        svm.write(SAVED_EFER, EFER_SVME | EFER_LONG);
        svm.write(SAVED_CR4, guest::CR4);
        svm.write(SAVED_CR3, guest::TABLES.as_u64());
        svm.write(SAVED_CR0, guest::CR0);
        svm.write(SAVED_RFLAGS, 2);
        svm
    }

    fn load(&mut self, root: Pfn, _marks: Marks) {
        self.write(NESTED_CONTROL, 1);
        self.write(NESTED_ROOT, root.as_u64() * FRAME_BYTES);
        self.forget();
    }

    fn enter(&mut self, registers: &mut Registers) -> Exit {
        self.write(SAVED_RAX, registers.rax);
        self.write(SAVED_RIP, registers.rip);
        self.write(SAVED_RSP, registers.rsp);
        let control = (&raw mut *self.control).expose_provenance() as u64;
        // SAFETY: (1) the control block describes a guest whose memory the tables hold apart from ours; (2) the code
        // below keeps every register that belongs to its caller.
        unsafe { svm_enter(control, registers) };
        registers.rax = self.read(SAVED_RAX);
        registers.rip = self.read(SAVED_RIP);
        registers.rsp = self.read(SAVED_RSP);
        self.write_half(TLB_CONTROL, 0);
        match self.read(EXIT_CODE) {
            EXIT_HALT => Exit::Halt,
            EXIT_INTERRUPT => {
                cpus::take_interrupts();
                Exit::Kicked
            }
            EXIT_NESTED_FAULT => {
                let code = self.read(EXIT_INFO_1);
                let access = [(1 << 1, Access::WRITE), (1 << 4, Access::EXEC)];
                let found = match (code & 1 << 3 != 0, code & 1 != 0) {
                    (true, _) => Found::Reserved,
                    (false, true) => Found::Present,
                    (false, false) => Found::Absent,
                };
                Exit::Fault(NestedFault {
                    gpa: Gpa::new(self.read(EXIT_INFO_2)),
                    access: access
                        .into_iter()
                        .filter(|(bit, _)| code & bit != 0)
                        .fold(Access::empty(), |all, (_, one)| all | one)
                        .union(if code & (1 << 1 | 1 << 4) == 0 { Access::READ } else { Access::empty() }),
                    found,
                })
            }
            reason => Exit::Other(Other {
                reason,
                detail: self.read(EXIT_INFO_1),
                gpa: self.read(EXIT_INFO_2),
                rip: registers.rip,
            }),
        }
    }

    fn forget(&mut self) {
        self.write_half(TLB_CONTROL, FLUSH_ASID);
    }
}

unsafe extern "C" {
    fn svm_enter(control: u64, registers: *mut Registers);
}

// Interrupts reach the guest's CPU while the guest runs, and not while the global flag is clear.
global_asm!(
    r#"
.section .text
.globl svm_enter
svm_enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rsi
    mov rax, rdi
    mov rbx, [rsi + 8]
    mov rcx, [rsi + 16]
    mov rdx, [rsi + 24]
    mov rdi, [rsi + 40]
    mov rbp, [rsi + 48]
    mov r8, [rsi + 56]
    mov r9, [rsi + 64]
    mov r10, [rsi + 72]
    mov r11, [rsi + 80]
    mov r12, [rsi + 88]
    mov r13, [rsi + 96]
    mov r14, [rsi + 104]
    mov r15, [rsi + 112]
    mov rsi, [rsi + 32]
    clgi
    sti
    vmrun rax
    cli
    stgi
    xchg rsi, [rsp]
    mov [rsi + 8], rbx
    mov [rsi + 16], rcx
    mov [rsi + 24], rdx
    mov [rsi + 40], rdi
    mov [rsi + 48], rbp
    mov [rsi + 56], r8
    mov [rsi + 64], r9
    mov [rsi + 72], r10
    mov [rsi + 80], r11
    mov [rsi + 88], r12
    mov [rsi + 96], r13
    mov [rsi + 104], r14
    mov [rsi + 112], r15
    pop rax
    mov [rsi + 32], rax
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
"#
);
