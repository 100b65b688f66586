//! The guest's side of a discard, as a balloon driver would do it.
//!
//! ```text
//! quiet ── every `discard_every` accesses: range, then number, into the mailbox ──► open
//! open  ── the host has stored the number as acknowledged: expect zeros ──────────► quiet
//! ```
//!
//! While a request is open, pages of its block are only read, and must show their old first word or zero. Once one
//! has shown zero it must stay zero: the expected entry becomes zero then, so that the old word coming back, an
//! afterimage, is wrong too. From the acknowledgement on all words of all pages of the block must be zero.

use iced_x86::code_asm::{CodeLabel, cl, edx, qword_ptr, r12, r14, r15, rax, rcx, rdx, rsi};

use super::{Emitted, Emitter, at, block};
use crate::layout::Mailbox;
use core::mem::offset_of;

impl Emitter {
    /// Emits the part of the loop that keeps the mailbox; falls through to `pick` when there is nothing to do.
    pub(super) fn discard(&mut self) -> Emitted {
        let (mut open, mut acknowledged) = (self.a.create_label(), self.a.create_label());
        let a = &mut self.a;
        a.mov(rsi, block!(mailbox))?;
        a.mov(rax, at(rsi, offset_of!(Mailbox, requested)))?;
        a.cmp(rax, at(rsi, offset_of!(Mailbox, acknowledged)))?;
        a.jne(open)?;
        a.cmp(block!(discard_pending), 0)?;
        a.jne(acknowledged)?;
        // Starting from 0 (never) it wraps, and does not come back in 2^64 accesses.
        a.dec(block!(discard_countdown))?;
        a.jne(self.pick)?;
        self.publish()?;
        self.a.set_label(&mut acknowledged)?;
        self.expect_zeros()?;
        self.a.set_label(&mut open)?;
        self.touch_open()
    }

    /// Chooses one of the vCPU's whole blocks and asks for its discard. RSI: the mailbox.
    ///
    /// Three times in four it is the block of the last access, read through once: what a guest gives back, it has just
    /// used. Otherwise, and where that block is another vCPU's or not whole, any block, resident or not.
    fn publish(&mut self) -> Emitted {
        let (mut any, mut ask) = (self.a.create_label(), self.a.create_label());
        let a = &mut self.a;
        a.mov(rax, block!(discard_every))?;
        a.mov(block!(discard_countdown), rax)?;
        a.mov(rax, at(rsi, offset_of!(Mailbox, requested)))?;
        a.test(rax, 3)?;
        a.je(any)?;
        a.mov(rax, r12)?;
        a.mov(rcx, block!(block_shift))?;
        a.shr(rax, cl)?;
        a.xor(edx, edx)?;
        a.div(block!(vcpus))?;
        a.cmp(rdx, block!(owner))?;
        a.jne(any)?;
        a.cmp(rax, block!(own_blocks))?;
        a.jae(any)?;
        self.read_block()?;
        self.a.jmp(ask)?;

        self.a.set_label(&mut any)?;
        self.random_below(block!(own_blocks))?;
        let a = &mut self.a;
        a.imul_2(rax, block!(vcpus))?;
        a.add(rax, block!(owner))?;
        a.mov(rcx, block!(block_shift))?;
        a.shl(rax, cl)?;

        a.set_label(&mut ask)?;
        a.mov(block!(discard_start), rax)?;
        a.mov(at(rsi, offset_of!(Mailbox, start)), rax)?;
        a.mov(rax, block!(block_pages))?;
        a.mov(at(rsi, offset_of!(Mailbox, pages)), rax)?;
        a.mov(block!(discard_pending), 1)?;
        // TSO: whoever sees the number sees the range.
        a.inc(at(rsi, offset_of!(Mailbox, requested)))?;
        a.inc(block!(progress.discards))?;
        a.jmp(self.next)
    }

    /// Reads a word of every page in R12's block. RAX: the block's first frame. Keeps RSI.
    fn read_block(&mut self) -> Emitted {
        let mut page = self.a.create_label();
        let a = &mut self.a;
        a.mov(rcx, block!(block_pages))?;
        a.mov(rax, rcx)?;
        a.neg(rax)?;
        a.and(rax, r12)?;
        a.mov(r12, rax)?;
        a.set_label(&mut page)?;
        a.mov(rdx, r12)?;
        a.shl(rdx, 12)?;
        a.mov(rdx, qword_ptr(rdx + r15))?;
        a.inc(r12)?;
        a.dec(rcx)?;
        a.jne(page)?;
        a.dec(r12)
    }

    /// After the acknowledgement: every page of the block is expected to be zero.
    fn expect_zeros(&mut self) -> Emitted {
        let mut entry = self.a.create_label();
        let a = &mut self.a;
        a.mov(rax, block!(discard_start))?;
        a.shl(rax, 4)?;
        a.add(rax, r14)?;
        a.mov(rcx, block!(block_pages))?;
        a.set_label(&mut entry)?;
        a.mov(qword_ptr(rax), 0)?;
        a.mov(qword_ptr(rax + 8), 0)?;
        a.add(rax, 16)?;
        a.dec(rcx)?;
        a.jne(entry)?;
        a.mov(block!(discard_pending), 0)?;
        a.jmp(self.next)
    }

    /// While a request is open a share of the accesses goes into its block on purpose.
    fn touch_open(&mut self) -> Emitted {
        let mut touch = self.a.create_label();
        let pick: CodeLabel = self.pick;
        self.with_share(block!(discard_share), touch)?;
        self.a.jmp(pick)?;
        self.a.set_label(&mut touch)?;
        self.random_below(block!(block_pages))?;
        self.a.add(rax, block!(discard_start))?;
        self.a.mov(r12, rax)?;
        self.locate()?;
        self.a.jmp(self.discarding)
    }
}
