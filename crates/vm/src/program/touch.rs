//! The program of a touching guest: the same frames over and over, and nothing else.
//!
//! ```text
//! entry ─► next ─┬─ stop flag, access limit ──────────────────────────────► exit stub
//!                ├─ a sweep was asked for: load from each of its frames, then say so
//!                ├─ at the end of a round that needs a release: wait for it, back to next
//!                ├─ timed load or store of the walk's next frame, check of the tag
//!                └─► next
//! ```
//!
//! Registers as in the other program, without the expected table.

use iced_x86::code_asm::{CodeAssembler, esi, qword_ptr, r9, r9d, r12, r12d, r15, rax, rbx, rcx, rdx, rsi};
use iced_x86::{BlockEncoderOptions, IcedError};

use super::{Emitted, Emitter, Program, block};
use crate::layout::RecordKind;

impl Program {
    /// Assembles the program of a touching guest, for KVM.
    pub(crate) fn assemble_touch() -> Result<Self, IcedError> {
        let mut e = Emitter::new(CodeAssembler::new(64)?);
        let mut exit = e.a.create_label();
        e.entry()?;
        e.main_loop(exit)?;
        e.sweep()?;
        e.step()?;
        e.access()?;
        e.record()?;
        e.a.set_label(&mut exit)?;
        e.leave_kvm(exit)?;
        let assembled = e.a.assemble_options(0, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        let exit = assembled.label_ip(&exit)? as usize;
        Ok(Self { code: assembled.inner.code_buffer, exit })
    }
}

impl Emitter {
    /// Loads once from each frame of the sweep that was asked for, if one was. RCX: the frame, R12 too.
    fn sweep(&mut self) -> Emitted {
        let [mut each, mut done, mut none] = core::array::from_fn(|_| self.a.create_label());
        let a = &mut self.a;
        a.mov(rdx, block!(touch.sweep_asked))?;
        a.cmp(rdx, block!(touch.sweep_done))?;
        a.je(none)?;
        // TSO: whoever sees the number sees the frames.
        a.mov(r12, block!(touch.sweep_first))?;
        a.set_label(&mut each)?;
        a.cmp(r12, block!(touch.sweep_end))?;
        a.jae(done)?;
        a.mov(rcx, r12)?;
        a.shl(rcx, 12)?;
        a.mov(rcx, qword_ptr(rcx + r15))?;
        a.add(r12, block!(touch.sweep_stride))?;
        a.jmp(each)?;
        a.set_label(&mut done)?;
        a.mov(block!(touch.sweep_done), rdx)?;
        a.set_label(&mut none)
    }

    /// One access: waits for its round's release, touches, checks, counts.
    fn step(&mut self) -> Emitted {
        let [mut released, mut in_turn, mut there, mut store, mut wrong, mut done] =
            core::array::from_fn(|_| self.a.create_label());
        let (next, timed_load, timed_store) = (self.next, self.timed_load, self.timed_store);
        let a = &mut self.a;
        a.mov(rax, block!(touch.rounds))?;
        a.cmp(rax, block!(touch.released))?;
        a.jb(released)?;
        a.pause()?;
        a.jmp(next)?;
        a.set_label(&mut released)?;
        a.cmp(block!(touch.random), 0)?;
        a.je(in_turn)?;
        self.random_below(block!(touch.count))?;
        let a = &mut self.a;
        a.mov(r12, rax)?;
        a.jmp(there)?;
        a.set_label(&mut in_turn)?;
        a.mov(r12, block!(touch.index))?;
        a.set_label(&mut there)?;
        a.imul_2(r12, block!(touch.stride))?;
        a.add(r12, block!(touch.first))?;
        a.mov(rbx, r12)?;
        a.shl(rbx, 12)?;
        a.add(rbx, r15)?;
        a.cmp(block!(touch.writes), 0)?;
        a.jne(store)?;
        a.call(timed_load)?;
        a.test(r9, r9)?;
        a.je(done)?;
        a.cmp(r9d, r12d)?;
        a.jne(wrong)?;
        a.set_label(&mut done)?;
        self.advance()?;
        let a = &mut self.a;
        a.jmp(next)?;
        a.set_label(&mut store)?;
        // The tag: the frame below, something above, so that frame 0's is not 0.
        a.mov(r9, TAG)?;
        a.or(r9, r12)?;
        a.and(r9, block!(touch.mask))?;
        a.call(timed_store)?;
        a.inc(block!(progress.writes))?;
        a.jmp(done)?;
        a.set_label(&mut wrong)?;
        a.mov(rcx, r12)?;
        a.mov(esi, RecordKind::Tag as i32)?;
        self.record_first_only()?;
        self.a.jmp(done)
    }

    /// To the next frame of the walk; behind the last the round is over.
    fn advance(&mut self) -> Emitted {
        let mut same_round = self.a.create_label();
        let a = &mut self.a;
        a.inc(block!(progress.accesses))?;
        a.mov(rsi, block!(touch.index))?;
        a.inc(rsi)?;
        a.cmp(rsi, block!(touch.count))?;
        a.jb(same_round)?;
        a.xor(esi, esi)?;
        a.inc(block!(touch.rounds))?;
        a.set_label(&mut same_round)?;
        a.mov(block!(touch.index), rsi)
    }
}

/// What a frame's first word holds besides the frame's number.
pub(crate) const TAG: u64 = 1 << 63;
