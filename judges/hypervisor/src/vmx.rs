//! Intel's virtualisation: guests on EPT. SDM volume 3C, chapters 25 to 29, appendices A to C.

// UNSAFETY: registers of the CPU, and the control structure that it reads and writes.
#![expect(unsafe_code)]

use alloc::boxed::Box;
use core::arch::{asm, global_asm};

use afterimage_mmu::{Access, FRAME_BYTES, Found, Gpa, Pfn};
use x86_64::registers::control::{Cr0, Cr3, Cr4, Cr4Flags};
use x86_64::registers::model_specific::Msr;

use crate::cpus::{self, Descriptors};
use crate::guest;
use crate::walker::{Exit, Marks, NestedFault, Other, Registers, Walker};

const FEATURE_CONTROL: u32 = 0x3a;
const VMX_BASIC: u32 = 0x480;
const VMX_SECONDARY: u32 = 0x48b;
const EFER: u32 = 0xc000_0080;

// Fields of the control structure.
const VPID: u64 = 0x0000;
const GUEST_SELECTORS: u64 = 0x0800;
const HOST_SELECTORS: u64 = 0x0c00;
const EPT_POINTER: u64 = 0x201a;
const GUEST_PHYSICAL: u64 = 0x2400;
const LINK: u64 = 0x2800;
const GUEST_EFER: u64 = 0x2806;
const HOST_EFER: u64 = 0x2c02;
const PIN_CONTROLS: u64 = 0x4000;
const CONTROLS: u64 = 0x4002;
const EXCEPTIONS: u64 = 0x4004;
const EXIT_CONTROLS: u64 = 0x400c;
const ENTRY_CONTROLS: u64 = 0x4012;
const SECONDARY_CONTROLS: u64 = 0x401e;
const INSTRUCTION_ERROR: u64 = 0x4400;
const EXIT_REASON: u64 = 0x4402;
const EXIT_INTERRUPT: u64 = 0x4404;
const GUEST_LIMITS: u64 = 0x4800;
const GUEST_RIGHTS: u64 = 0x4814;
const EXIT_QUALIFICATION: u64 = 0x6400;
const GUEST_CR0: u64 = 0x6800;
const GUEST_CR3: u64 = 0x6802;
const GUEST_CR4: u64 = 0x6804;
const GUEST_RSP: u64 = 0x681c;
const GUEST_RIP: u64 = 0x681e;
const GUEST_RFLAGS: u64 = 0x6820;
const HOST_CR0: u64 = 0x6c00;
const HOST_CR3: u64 = 0x6c02;
const HOST_CR4: u64 = 0x6c04;
const HOST_TR_BASE: u64 = 0x6c0a;
const HOST_GDT: u64 = 0x6c0c;
const HOST_IDT: u64 = 0x6c0e;
const HOST_RIP: u64 = 0x6c16;

const SECONDARY_EPT: u64 = 1 << 1;
const SECONDARY_VPID: u64 = 1 << 5;

const REASON_EXCEPTION: u64 = 0;
const REASON_INTERRUPT: u64 = 1;
const REASON_HALT: u64 = 12;
const REASON_VIOLATION: u64 = 48;
const REASON_MISCONFIGURATION: u64 = 49;

#[derive(Debug)]
#[repr(C, align(4096))]
struct Page([u64; 512]);

/// One CPU's VMX.
#[derive(Debug)]
pub(crate) struct Vmx {
    _control: Box<Page>,
    launched: bool,
    forget: bool,
    pointer: u64,
}

fn msr(number: u32) -> u64 {
    // SAFETY: the registers that are read here exist where VMX does.
    unsafe { Msr::new(number).read() }
}

fn write(field: u64, value: u64) {
    let failed: u8;
    // SAFETY: a control structure of ours is current; what it says is checked by the CPU when the guest is entered.
    unsafe { asm!("vmwrite {}, {}", "setna {}", in(reg) field, in(reg) value, out(reg_byte) failed) }
    assert_eq!(failed, 0, "there is no field {field:#x}");
}

fn read(field: u64) -> u64 {
    let value: u64;
    let failed: u8;
    // SAFETY: a control structure of ours is current, and reading changes nothing.
    unsafe { asm!("vmread {}, {}", "setna {}", lateout(reg) value, in(reg) field, lateout(reg_byte) failed) }
    assert_eq!(failed, 0, "there is no field {field:#x}");
    value
}

/// `wanted`, and what this CPU asks for besides.
fn controls(capabilities: u32, wanted: u64) -> u64 {
    let allowed = msr(capabilities);
    let value = wanted | allowed & 0xffff_ffff;
    assert_eq!(value & !(allowed >> 32), 0, "controls {value:#x} are not allowed by {allowed:#x}");
    value
}

/// Turns VMX on, for good.
fn turn_on(revision: u64) {
    let page = Box::leak(Box::new(Page([0; 512])));
    page.0[0] = revision;
    let at = (&raw mut *page).expose_provenance() as u64;
    let failed: u8;
    // SAFETY: the CPU has VMX (`main` looked), and nobody has turned it on; the page is its own.
    unsafe {
        if msr(FEATURE_CONTROL) & 1 == 0 {
            Msr::new(FEATURE_CONTROL).write(0b101);
        }
        Cr4::update(|flags| flags.insert(Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS));
        asm!("vmxon [{}]", "setna {}", in(reg) &at, out(reg_byte) failed);
    }
    assert_eq!(failed, 0, "VMX cannot be turned on");
}

impl Walker for Vmx {
    fn new(cpu: &Descriptors) -> Self {
        let revision = msr(VMX_BASIC) & 0x7fff_ffff;
        let mut control = Box::new(Page([0; 512]));
        control.0[0] = revision;
        let control_at = (&raw mut *control).expose_provenance() as u64;
        if !Cr4::read().contains(Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS) {
            turn_on(revision);
        }
        let failed: u8;
        // SAFETY: VMX is on, and the page is this structure's own.
        unsafe {
            asm!("vmclear [{0}]", "vmptrld [{0}]", "setna {1}", in(reg) &control_at, out(reg_byte) failed)
        }
        assert_eq!(failed, 0, "the control structure cannot be loaded");
        let mut vmx = Self { _control: control, launched: false, forget: true, pointer: 0 };
        vmx.fill(cpu);
        vmx
    }

    fn load(&mut self, root: Pfn, marks: Marks) {
        const WRITE_BACK: u64 = 6;
        const FOUR_LEVELS: u64 = 3 << 3;
        let accessed_dirty = u64::from(marks == Marks::Set) << 6;
        self.pointer = (root.as_u64() * FRAME_BYTES) | accessed_dirty | FOUR_LEVELS | WRITE_BACK;
        write(EPT_POINTER, self.pointer);
        // Without a VPID every entry and exit forgets the translations, and a flush that is left out would not be seen.
        let tagged = msr(VMX_SECONDARY) >> 32 & SECONDARY_VPID;
        write(SECONDARY_CONTROLS, controls(VMX_SECONDARY, SECONDARY_EPT | tagged));
        if tagged != 0 {
            write(VPID, 1);
        }
        self.forget();
    }

    fn enter(&mut self, registers: &mut Registers) -> Exit {
        if core::mem::take(&mut self.forget) {
            let descriptor = [self.pointer, 0];
            // SAFETY: the descriptor names the tables in use; what was cached of them is forgotten.
            unsafe { asm!("invept {}, [{}]", in(reg) 1_u64, in(reg) &descriptor) }
        }
        write(GUEST_RIP, registers.rip);
        write(GUEST_RSP, registers.rsp);
        // SAFETY: (1) the control structure describes a guest whose memory the tables hold apart from ours; (2) the code
        // below keeps every register that belongs to its caller.
        let failed = unsafe { vmx_enter(registers, u64::from(self.launched)) };
        assert_eq!(failed, 0, "the guest cannot be entered: error {}", read(INSTRUCTION_ERROR));
        self.launched = true;
        registers.rip = read(GUEST_RIP);
        registers.rsp = read(GUEST_RSP);
        let gpa = read(GUEST_PHYSICAL);
        let detail = read(EXIT_QUALIFICATION);
        match read(EXIT_REASON) {
            REASON_HALT => Exit::Halt,
            REASON_INTERRUPT => {
                cpus::acknowledge();
                Exit::Kicked
            }
            REASON_VIOLATION => {
                let access = [(1, Access::READ), (2, Access::WRITE), (4, Access::EXEC)];
                Exit::Fault(NestedFault {
                    gpa: Gpa::new(gpa),
                    access: access
                        .into_iter()
                        .filter(|(bit, _)| detail & bit != 0)
                        .fold(Access::empty(), |all, (_, one)| all | one),
                    found: if detail & 0x78 != 0 { Found::Present } else { Found::Absent },
                })
            }
            REASON_MISCONFIGURATION => Exit::Fault(NestedFault {
                gpa: Gpa::new(gpa),
                access: Access::empty(),
                found: Found::Reserved,
            }),
            REASON_EXCEPTION => Exit::Other(Other {
                reason: 0,
                detail: read(EXIT_INTERRUPT),
                gpa: detail,
                rip: registers.rip,
            }),
            reason => Exit::Other(Other { reason, detail, gpa, rip: registers.rip }),
        }
    }

    fn forget(&mut self) {
        self.forget = true;
    }
}

impl Vmx {
    /// Everything that stays as it is.
    fn fill(&mut self, cpu: &Descriptors) {
        let exact = if msr(VMX_BASIC) & 1 << 55 != 0 { 0x48d } else { 0x481 };
        // Interrupts and NMI leave the guest; HLT does; there are more controls. Both sides have 64 bits and an EFER of
        // their own; the interrupt is acknowledged on the way out.
        write(PIN_CONTROLS, controls(exact, 1 | 1 << 3));
        write(CONTROLS, controls(exact + 1, 1 << 7 | 1 << 31));
        write(EXIT_CONTROLS, controls(exact + 2, 1 << 9 | 1 << 15 | 1 << 20 | 1 << 21));
        write(ENTRY_CONTROLS, controls(exact + 3, 1 << 9 | 1 << 15));
        write(EXCEPTIONS, 0xffff_ffff);
        write(LINK, u64::MAX);
        // ES, CS, SS, DS, FS, GS, LDTR, TR.
        let segments = [
            (16, 0xc093),
            (8, 0xa09b),
            (16, 0xc093),
            (16, 0xc093),
            (16, 0xc093),
            (16, 0xc093),
            (0, 0x1_0000),
            (24, 0x8b),
        ];
        for (index, (selector, rights)) in segments.into_iter().enumerate() {
            let field = 2 * index as u64;
            write(GUEST_SELECTORS + field, selector);
            write(GUEST_LIMITS + field, 0xffff_ffff);
            write(GUEST_RIGHTS + field, rights);
        }
        const TASK: u64 = 14;
        write(GUEST_LIMITS + TASK, 0x67);
        let efer = msr(EFER);
        write(GUEST_EFER, efer);
        write(GUEST_CR0, guest::CR0);
        write(GUEST_CR3, guest::TABLES.as_u64());
        write(GUEST_CR4, guest::CR4 | Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS.bits());
        write(GUEST_RFLAGS, 0x202);
        write(HOST_EFER, efer);
        write(HOST_CR0, Cr0::read_raw());
        write(HOST_CR3, Cr3::read_raw().0.start_address().as_u64());
        write(HOST_CR4, Cr4::read_raw());
        for (index, selector) in [16_u64, 8, 16, 16].into_iter().enumerate() {
            write(HOST_SELECTORS + 2 * index as u64, selector);
        }
        write(HOST_SELECTORS + 12, u64::from(cpu.tss_selector.0));
        write(HOST_TR_BASE, cpu.tss);
        write(HOST_GDT, cpu.gdt);
        write(HOST_IDT, cpu.idt);
        write(HOST_RIP, (&raw const vmx_exit).expose_provenance() as u64);
    }
}

unsafe extern "C" {
    fn vmx_enter(registers: *mut Registers, launched: u64) -> u64;
    static vmx_exit: u8;
}

// 0x6c14 is the host's stack pointer.
global_asm!(
    r#"
.section .text
.globl vmx_enter
vmx_enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rdi
    mov rax, 0x6c14
    vmwrite rax, rsp
    test rsi, rsi
    mov rax, [rdi]
    mov rbx, [rdi + 8]
    mov rcx, [rdi + 16]
    mov rdx, [rdi + 24]
    mov rsi, [rdi + 32]
    mov rbp, [rdi + 48]
    mov r8, [rdi + 56]
    mov r9, [rdi + 64]
    mov r10, [rdi + 72]
    mov r11, [rdi + 80]
    mov r12, [rdi + 88]
    mov r13, [rdi + 96]
    mov r14, [rdi + 104]
    mov r15, [rdi + 112]
    mov rdi, [rdi + 40]
    jnz 2f
    vmlaunch
    jmp 3f
2:  vmresume
3:  pop rdi
    mov eax, 1
    jmp 9f
.globl vmx_exit
vmx_exit:
    xchg rdi, [rsp]
    mov [rdi], rax
    mov [rdi + 8], rbx
    mov [rdi + 16], rcx
    mov [rdi + 24], rdx
    mov [rdi + 32], rsi
    mov [rdi + 48], rbp
    mov [rdi + 56], r8
    mov [rdi + 64], r9
    mov [rdi + 72], r10
    mov [rdi + 80], r11
    mov [rdi + 88], r12
    mov [rdi + 96], r13
    mov [rdi + 104], r14
    mov [rdi + 112], r15
    pop rax
    mov [rdi + 40], rax
    xor eax, eax
9:  pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
"#
);
