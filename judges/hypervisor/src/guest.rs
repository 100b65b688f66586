//! The guest: a few instructions that touch memory and halt, and page tables that map everything where it is.
//!
//! | guest frame | what |
//! |---|---|
//! | 1 | code |
//! | 2, 3, 4 | page tables: 1 TiB in pages of 1 GiB |
//! | 8 … | for each CPU: stack, then what its program remembers |

// UNSAFETY: the program is bytes between labels.
#![expect(unsafe_code)]

use core::arch::global_asm;

use afterimage_mmu::{FRAME_BYTES, Gfn, Gpa};

/// PG, WP, NE, PE.
pub(crate) const CR0: u64 = 0x8001_0021;
/// PAE; VMXE too where a guest must have it.
pub(crate) const CR4: u64 = 0x20;
/// The guest's page tables.
pub(crate) const TABLES: Gpa = Gpa::new(2 * FRAME_BYTES);
/// The guest's code.
pub(crate) const CODE: Gfn = Gfn::new(1);
/// Frames that the guest needs for itself.
pub(crate) const SYSTEM_FRAMES: u64 = 64;
/// Those among them that the first CPU's guest needs for one access.
pub(crate) const FIRST_CPU: core::ops::RangeInclusive<u64> = 1..=8;
const REMEMBERED: u64 = 8;
const FRAMES_OF_A_CPU: u64 = 5;

/// Pages that the program of [`Program::Check`] can tell apart: what it remembers is a word for each.
pub(crate) const MAX_PAGES: u64 = (FRAMES_OF_A_CPU - 1) * FRAME_BYTES / 8;

/// Where the stack of a CPU's guest begins, and what it remembers.
pub(crate) fn memory_of(cpu: usize) -> (Gpa, Gpa) {
    let first = REMEMBERED + FRAMES_OF_A_CPU * cpu as u64;
    (Gpa::new((first + 1) * FRAME_BYTES), Gpa::new((first + 1) * FRAME_BYTES))
}

/// What the guest does before it halts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// Loads the word at `rdi` to `rax`.
    Read,
    /// Stores `rsi` at `rdi`.
    Write,
    /// Calls `rdi`.
    Fetch,
    /// Checks pages at random. See the code below.
    Check,
}

impl Program {
    /// Where it begins.
    pub(crate) fn start(self) -> u64 {
        let label = match self {
            Self::Read => &raw const guest_read,
            Self::Write => &raw const guest_write,
            Self::Fetch => &raw const guest_fetch,
            Self::Check => &raw const guest_check,
        };
        let offset = label.addr() - (&raw const guest_start).addr();
        CODE.gpa().as_u64() + offset as u64
    }
}

/// Where in a page of the checking program the code is that it calls.
pub(crate) const CODE_OFFSET: u64 = 0x800;
/// Where in a page the words are that CPUs count in: one for each.
pub(crate) const COUNT_OFFSET: u64 = 64;

/// The content of the guest's own frames.
pub(crate) fn frame(gfn: Gfn) -> [u64; 512] {
    let mut words = [0; 512];
    const TABLE: u64 = 0x27;
    const PAGE: u64 = 0xe3;
    match gfn.as_u64() {
        1 => {
            let start = &raw const guest_start;
            let bytes = (&raw const guest_end).addr() - start.addr();
            assert!(bytes <= FRAME_BYTES as usize);
            // SAFETY: the bytes lie between two labels of one section; the target has room for them.
            unsafe { start.copy_to_nonoverlapping(words.as_mut_ptr().cast::<u8>(), bytes) };
        }
        // 1 TiB is two entries of the root.
        2 => {
            words[0] = (3 * FRAME_BYTES) | TABLE;
            words[1] = (4 * FRAME_BYTES) | TABLE;
        }
        number @ (3 | 4) => {
            for (gib, word) in words.iter_mut().enumerate() {
                *word = ((number - 3) << 9 | gib as u64) << 30 | PAGE;
            }
        }
        _ => {}
    }
    words
}

unsafe extern "C" {
    static guest_start: u8;
    static guest_read: u8;
    static guest_write: u8;
    static guest_fetch: u8;
    static guest_check: u8;
    static guest_end: u8;
}

// `guest_check`: rdi pages, rsi what it remembers, r8 random, r9 mask of page numbers, r10 turns so far, r11 offset of its
// count in a page, r12 what a page's first word is, exclusive or its number. It never ends by itself. What is wrong makes
// it halt, with rbx the page and eax 1, the first word is wrong; 2, its count is not what it left there; 3, the code is
// not this page's.
global_asm!(
    r#"
.section .rodata.guest, "a"
.balign 16
.globl guest_start, guest_read, guest_write, guest_fetch, guest_check, guest_end
guest_start:
guest_read:
    mov rax, [rdi]
    hlt
guest_write:
    mov [rdi], rsi
    hlt
guest_fetch:
    call rdi
    hlt
guest_check:
    mov rax, r8
    shl rax, 13
    xor r8, rax
    mov rax, r8
    shr rax, 7
    xor r8, rax
    mov rax, r8
    shl rax, 17
    xor r8, rax
    mov rbx, r8
    shr rbx, 20
    and rbx, r9
    mov rcx, rbx
    shl rcx, 12
    add rcx, rdi
    mov rdx, rbx
    xor rdx, r12
    mov rax, [rcx]
    cmp rax, rdx
    jne 91f
    mov rdx, [rcx + r11]
    cmp rdx, [rsi + rbx * 8]
    jne 92f
    test r8d, 3
    jnz 2f
    inc rdx
    mov [rcx + r11], rdx
    mov [rsi + rbx * 8], rdx
2:  test r8d, 0xf0
    jnz 3f
    lea rax, [rcx + {code}]
    call rax
    cmp eax, ebx
    jne 93f
3:  inc r10
    jmp guest_check
91: mov rdx, rax
    mov eax, 1
    hlt
92: mov eax, 2
    hlt
93: mov rdx, rax
    mov eax, 3
    hlt
guest_end:
"#,
    code = const CODE_OFFSET,
);
