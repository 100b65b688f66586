//! From the BIOS to Rust: the boot sector, and the way of every CPU from real mode to 64 bits.
//!
//! ```text
//! 0x7c00    boot sector; the stack grows down from here until Rust runs
//! 0x8000    where the other CPUs begin, in real mode (a copy of `others_start`)
//! 0x10000   command line, one sector, then the program as it lies on the disk
//! 1 MiB     the program
//! ```
//!
//! Memory is mapped where it is, up to 4 GiB, by pages of 1 GiB.

// UNSAFETY: the first instructions of a machine cannot be written in Rust.
#![expect(unsafe_code)]

use core::arch::global_asm;

/// Where the command line lies: one sector, ended by a zero.
pub(crate) const COMMAND_LINE: u64 = 0x1_0000;
/// Where the other CPUs begin.
pub(crate) const OTHERS_START: u64 = 0x8000;
/// CPUs there are stacks for.
pub(crate) const MAX_CPUS: usize = 8;
const STACK_BYTES: usize = 64 << 10;

global_asm!(
    r#"
.section .boot, "awx"
.code16
.globl boot
boot:
    cli
    cld
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    sti
    mov cx, offset boot_chunks
2:  push cx
    mov ah, 0x42
    mov si, offset packet
    int 0x13
    pop cx
    jc boot_failed
    add word ptr [packet + 6], 0x800
    add dword ptr [packet + 8], 64
    loop 2b
    cli
    mov al, 0xff           # no interrupts from the BIOS's devices
    out 0x21, al
    out 0xa1, al
    in al, 0x92
    or al, 2
    and al, 0xfe
    out 0x92, al
    lgdt [boot_gdt_pointer]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0xea
    .word boot32, 8
boot_failed:
    mov al, '!'
    out 0xe9, al
    hlt
    jmp boot_failed

.code32
boot32:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esi, 0x10200
    mov edi, 0x100000
    mov ecx, offset program_words
    rep movsd
    mov edi, offset bss_start
    mov ecx, offset bss_end
    sub ecx, edi
    xor eax, eax
    rep stosb
    mov edi, offset tables_top
    mov dword ptr [edi], offset tables_gibs + 3
    mov edi, offset tables_highest
    mov dword ptr [edi], offset tables_top + 3
    mov edi, offset tables_gibs
    mov dword ptr [edi], 0x00000083
    mov dword ptr [edi + 8], 0x40000083
    mov dword ptr [edi + 16], 0x80000083
    mov dword ptr [edi + 24], 0xc0000083
    jmp start32

.balign 8
packet:
    .byte 16, 0
    .word 64, 0, 0x1000
    .quad 1
boot_gdt:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff
boot_gdt_pointer:
    .word 31
    .long boot_gdt
    .org 510
    .word 0xaa55

.section .start, "ax"
.code16
.globl others_start, others_end
others_start:
    cli
    xor ax, ax
    mov ds, ax
    lgdt [boot_gdt_pointer]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long start32
    .word 8
others_end:

.code32
start32:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    cpuid
    mov esi, offset tables_top
    mov edi, 0x620         # PAE, OSFXSR, OSXMMEXCPT
    cmp eax, 7
    jb 2f
    mov eax, 7
    xor ecx, ecx
    cpuid
    bt ecx, 16             # five levels, if there are: so will be the nested tables
    jnc 2f
    mov esi, offset tables_highest
    or edi, 0x1000         # LA57
2:  mov cr3, esi
    mov eax, cr4
    or eax, edi
    mov cr4, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x900          # LME, NXE
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffff3    # no CD, NW, EM, TS
    or eax, 0x80010022     # PG, WP, NE, MP
    mov cr0, eax
    .byte 0xea
    .long start64
    .word 24

.code64
start64:
    mov eax, 1
    lock xadd dword ptr [cpus_started], eax
    mov edi, eax
    inc eax
    imul rax, rax, {stack}
    lea rsp, [stacks + rax]
    xor ebp, ebp
    call {start}
    ud2

.section .bss.boot, "aw", @nobits
.balign 4096
tables_highest: .skip 4096
tables_top: .skip 4096
tables_gibs: .skip 4096
stacks: .skip {stack} * {cpus}
cpus_started: .skip 4
"#,
    stack = const STACK_BYTES,
    cpus = const MAX_CPUS,
    start = sym crate::start,
);

unsafe extern "C" {
    /// First and last byte of what the other CPUs begin with.
    pub(crate) static others_start: u8;
    pub(crate) static others_end: u8;
}
