//! The guest program, assembled at start from this one place.
//!
//! One program serves all workloads and both kinds of guest. It takes one argument, the address of its
//! [`VcpuBlock`] in RDI, and reaches everything else through pointers in the block. On a KVM vCPU it ends with
//! `out`, on a host thread with `ret`: that *exit stub* is the only difference between the two.
//!
//! ```text
//! entry ─► next ─┬─ stop flag, access limit ─────────────────────────► exit stub
//!                ├─ discard: open? acknowledged? time for a new one?      (discard.rs)
//!                ├─ pick a page: stamp, scan, hot, or somebody else's      (pick.rs)
//!                ├─ timed load, check, timed store of the next stamp        (check.rs, access.rs)
//!                └─► next
//! ```
//!
//! Registers, the whole program through:
//!
//! | register | holds |
//! |---|---|
//! | `rdi` | the vCPU block; never changed, the signal handlers rely on it |
//! | `r15` | base of managed memory |
//! | `r14` | base of the expected table |
//! | `r13` | state of the random generator (xorshift64*, Vigna 2016) |
//! | `r12` | the frame being accessed; reported when the vCPU dies or hangs there |
//! | `rbx` | address of that page |
//! | `rbp` | address of its entry in the expected table |
//! | `xmm0`–`xmm3` | the windows' `ends` counters before the access |
//! | others | scratch |
//!
//! Only baseline instructions are used (SSE2, no privileged ones): they run natively at CPL 3 on every kind of KVM.

mod access;
mod check;
mod discard;
mod pick;
pub(crate) mod touch;

use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::{
    AsmMemoryOperand, AsmRegister64, CodeAssembler, CodeLabel, IcedError, al, byte_ptr, dword_ptr, dx, eax,
    edx, qword_ptr, r12, r13, r14, r15, rax, rbp, rbx, rdi, rdx, rsp,
};

use crate::layout::{Ended, VcpuBlock};

/// The port that a KVM guest writes to when it ends.
pub(crate) const EXIT_PORT: u16 = 0xaf;

/// Where a program runs, which decides how it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    Kvm,
    Thread,
}

/// The assembled program. It is position independent; its entry is at offset 0.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) code: Vec<u8>,
    /// Offset of the exit stub, which needs nothing but RDI.
    pub(crate) exit: usize,
}

/// The operand for a field of the vCPU block.
macro_rules! block {
    ($($field:tt)+) => {
        $crate::program::at(::iced_x86::code_asm::rdi, ::core::mem::offset_of!($crate::layout::VcpuBlock, $($field)+))
    };
}
use block;

/// The 64-bit operand at `base + offset`.
fn at(base: AsmRegister64, offset: usize) -> AsmMemoryOperand {
    qword_ptr(base + i32::try_from(offset).expect("a structure is smaller than 2 GiB"))
}

/// An assembler and the labels that more than one file jumps to.
struct Emitter {
    a: CodeAssembler,
    /// Top of the main loop.
    next: CodeLabel,
    /// Choice of the next access.
    pick: CodeLabel,
    /// RAX holds a page number among the vCPU's own: go there.
    own: CodeLabel,
    /// R12 holds a page of the vCPU's own open discard request: look at it.
    discarding: CodeLabel,
    /// A page of any vCPU: read and check the tag.
    cross: CodeLabel,
    /// End of an access.
    done: CodeLabel,
    /// Function: load and time the first word of the page at RBX into R9.
    timed_load: CodeLabel,
    /// Function: store R9 as the first word of the page at RBX, and time it.
    timed_store: CodeLabel,
    /// Function: write down a wrong page.
    record: CodeLabel,
}

type Emitted = Result<(), IcedError>;

impl Program {
    /// Assembles the program for `host`.
    pub(crate) fn assemble(host: Host) -> Result<Self, IcedError> {
        let mut e = Emitter::new(CodeAssembler::new(64)?);
        let mut exit = e.a.create_label();
        e.entry()?;
        e.main_loop(exit)?;
        e.discard()?;
        e.pick()?;
        e.check()?;
        e.access()?;
        e.a.set_label(&mut exit)?;
        match host {
            Host::Kvm => e.leave_kvm(exit)?,
            Host::Thread => e.leave_thread()?,
        }
        let assembled = e.a.assemble_options(0, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        let exit = assembled.label_ip(&exit)? as usize;
        Ok(Self { code: assembled.inner.code_buffer, exit })
    }
}

const SAVED: [AsmRegister64; 6] = [rbx, rbp, r12, r13, r14, r15];

impl Emitter {
    fn new(mut a: CodeAssembler) -> Self {
        Self {
            next: a.create_label(),
            pick: a.create_label(),
            own: a.create_label(),
            discarding: a.create_label(),
            cross: a.create_label(),
            done: a.create_label(),
            timed_load: a.create_label(),
            timed_store: a.create_label(),
            record: a.create_label(),
            a,
        }
    }

    /// Saves what the System V ABI asks a function to keep, and loads the fixed registers.
    fn entry(&mut self) -> Emitted {
        let a = &mut self.a;
        for register in SAVED {
            a.push(register)?;
        }
        a.mov(block!(saved_stack), rsp)?;
        a.mov(r15, block!(memory))?;
        a.mov(r14, block!(expected))?;
        a.mov(r13, block!(rng))?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.mov(block!(started), rax)
    }

    fn main_loop(&mut self, exit: CodeLabel) -> Emitted {
        let [mut next, mut unstopped, mut go_on] = [self.next, self.a.create_label(), self.a.create_label()];
        let a = &mut self.a;
        a.set_label(&mut next)?;
        a.cmp(dword_ptr(rdi + core::mem::offset_of!(VcpuBlock, stop.flag) as i32), 0)?;
        a.je(unstopped)?;
        a.mov(block!(progress.ended), Ended::Stopped as i32)?;
        a.jmp(exit)?;
        a.set_label(&mut unstopped)?;
        a.mov(rax, block!(progress.accesses))?;
        a.cmp(rax, block!(limit))?;
        a.jb(go_on)?;
        a.mov(block!(progress.ended), Ended::Limit as i32)?;
        a.jmp(exit)?;
        a.set_label(&mut go_on)
    }

    /// The exit stub on KVM. The loop behind `out` is never reached: the host does not enter again.
    fn leave_kvm(&mut self, exit: CodeLabel) -> Emitted {
        self.a.mov(eax, i32::from(EXIT_PORT))?;
        self.a.mov(edx, i32::from(EXIT_PORT))?;
        self.a.out(dx, al)?;
        self.a.jmp(exit)
    }

    /// The exit stub of a thread: back to the caller from wherever the stack pointer is.
    fn leave_thread(&mut self) -> Emitted {
        self.a.mov(rsp, block!(saved_stack))?;
        for register in SAVED.into_iter().rev() {
            self.a.pop(register)?;
        }
        self.a.ret()
    }

    /// The next 32 random bits into RAX (zero extended). Uses RCX.
    fn random(&mut self) -> Emitted {
        let a = &mut self.a;
        for (shift, left) in [(12, false), (25, true), (27, false)] {
            a.mov(rax, r13)?;
            if left {
                a.shl(rax, shift)?;
            } else {
                a.shr(rax, shift)?;
            }
            a.xor(r13, rax)?;
        }
        a.mov(rax, 0x2545_f491_4f6c_dd1d_u64)?;
        a.imul_2(rax, r13)?;
        a.shr(rax, 32)
    }

    /// A random number below the one in `bound` (at most 2^32) into RAX.
    fn random_below(&mut self, bound: AsmMemoryOperand) -> Emitted {
        self.random()?;
        self.a.imul_2(rax, bound)?;
        self.a.shr(rax, 32)
    }

    /// Goes to `target` with the probability `share / 2^32`.
    fn with_share(&mut self, share: AsmMemoryOperand, target: CodeLabel) -> Emitted {
        self.random()?;
        self.a.cmp(rax, share)?;
        self.a.jb(target)
    }

    /// Turns the frame in R12 into the page's address (RBX) and its expected entry (RBP).
    fn locate(&mut self) -> Emitted {
        let a = &mut self.a;
        a.mov(rbx, r12)?;
        a.shl(rbx, 12)?;
        a.add(rbx, r15)?;
        a.mov(rbp, r12)?;
        a.shl(rbp, 4)?;
        a.add(rbp, r14)?;
        a.prefetcht0(byte_ptr(rbp))
    }
}

const _: () = assert!(size_of::<crate::layout::Expected>() == 16, "locate() shifts by 4");
