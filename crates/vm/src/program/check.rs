//! What a page must hold, and the next stamp.
//!
//! | page | rule | written? |
//! |---|---|---|
//! | own | first word, and fold of middle and last, equal the expected entry | mostly |
//! | own, discard open | first word equals the expected one or 0; 0 is adopted | no |
//! | anybody's | first word is 0 or carries the frame number in its low half (only with tags) | no |
//!
//! A wrong page is counted and written down once: the program adopts what it found and goes on.

use iced_x86::code_asm::{
    esi, qword_ptr, r8, r9, r9d, r10, r11, r12, r12d, rax, rbp, rbx, rcx, rdi, rdx, rsi,
};

use super::{Emitted, Emitter, at, block};
use crate::layout::{
    Expected, FOLD_FACTOR, LAST_MASK, LAST_WORD, MIDDLE_MASK, MIDDLE_WORD, RECORDS, Record, RecordKind,
    VcpuBlock,
};
use core::mem::offset_of;

const EXPECTED_REST: usize = offset_of!(Expected, rest);

impl Emitter {
    /// Emits the exact check (falls in from `own`), the write, the check of a page under discard, and `record`.
    pub(super) fn check(&mut self) -> Emitted {
        self.check_exact()?;
        self.write_stamp()?;
        self.finish_access()?;
        self.check_discarding()?;
        self.record()
    }

    fn check_exact(&mut self) -> Emitted {
        let [mut wrong, mut adopt, mut judged] = core::array::from_fn(|_| self.a.create_label());
        let record = self.record;
        let a = &mut self.a;
        a.call(self.timed_load)?;
        a.mov(r10, at(rbx, MIDDLE_WORD))?;
        a.mov(r11, at(rbx, LAST_WORD))?;
        self.fold()?;
        let a = &mut self.a;
        a.mov(rcx, qword_ptr(rbp))?;
        a.cmp(r9, rcx)?;
        a.jne(wrong)?;
        a.mov(rcx, at(rbp, EXPECTED_REST))?;
        a.cmp(rdx, rcx)?;
        a.je(judged)?;
        a.mov(r8, rdx)?;
        a.mov(esi, RecordKind::Rest as i32)?;
        a.jmp(adopt)?;
        a.set_label(&mut wrong)?;
        a.mov(r8, r9)?;
        a.mov(esi, RecordKind::First as i32)?;
        a.set_label(&mut adopt)?;
        a.mov(at(rbp, EXPECTED_REST), rdx)?;
        a.call(record)?;
        a.mov(qword_ptr(rbp), r9)?;
        a.set_label(&mut judged)
    }

    /// The fold of R10 and R11 into RDX. Uses RAX.
    fn fold(&mut self) -> Emitted {
        self.a.mov(rax, FOLD_FACTOR)?;
        self.a.mov(rdx, r11)?;
        self.a.imul_2(rdx, rax)?;
        self.a.add(rdx, r10)
    }

    /// Writes the next stamp to an own page: the frame below, a version that never comes back above.
    fn write_stamp(&mut self) -> Emitted {
        let mut write = self.a.create_label();
        let done = self.done;
        self.with_share(block!(write_share), write)?;
        let a = &mut self.a;
        a.jmp(done)?;
        a.set_label(&mut write)?;
        a.mov(r9, block!(version))?;
        a.inc(block!(version))?;
        a.shl(r9, 32)?;
        a.or(r9, r12)?;
        a.call(self.timed_store)?;
        a.mov(r10, MIDDLE_MASK)?;
        a.xor(r10, r9)?;
        a.mov(at(rbx, MIDDLE_WORD), r10)?;
        a.mov(r11, LAST_MASK)?;
        a.xor(r11, r9)?;
        a.mov(at(rbx, LAST_WORD), r11)?;
        self.fold()?;
        self.a.mov(qword_ptr(rbp), r9)?;
        self.a.mov(at(rbp, EXPECTED_REST), rdx)?;
        self.a.inc(block!(progress.writes))
    }

    fn finish_access(&mut self) -> Emitted {
        let (mut done, next) = (self.done, self.next);
        self.a.set_label(&mut done)?;
        self.a.inc(block!(progress.accesses))?;
        self.a.jmp(next)
    }

    /// A page of the vCPU's own open discard request (R12, RBX, RBP).
    fn check_discarding(&mut self) -> Emitted {
        let (mut discarding, done) = (self.discarding, self.done);
        let mut zero = self.a.create_label();
        let a = &mut self.a;
        a.set_label(&mut discarding)?;
        a.call(self.timed_load)?;
        a.test(r9, r9)?;
        a.je(zero)?;
        a.mov(rcx, qword_ptr(rbp))?;
        a.cmp(r9, rcx)?;
        a.je(done)?;
        a.mov(esi, RecordKind::Discarding as i32)?;
        self.record_first_only()?;
        let a = &mut self.a;
        a.jmp(done)?;
        a.set_label(&mut zero)?;
        a.mov(qword_ptr(rbp), 0)?;
        a.mov(at(rbp, EXPECTED_REST), 0)?;
        a.jmp(done)
    }

    /// A page of any vCPU (R12, RBX).
    pub(super) fn check_tag(&mut self) -> Emitted {
        let done = self.done;
        let a = &mut self.a;
        a.call(self.timed_load)?;
        a.inc(block!(progress.cross))?;
        a.cmp(block!(tag_check), 0)?;
        a.je(done)?;
        a.test(r9, r9)?;
        a.je(done)?;
        a.cmp(r9d, r12d)?;
        a.je(done)?;
        a.mov(rcx, r12)?;
        a.mov(esi, RecordKind::Tag as i32)?;
        self.record_first_only()?;
        self.a.jmp(done)
    }

    /// Calls `record` for an access that read the first word only. ESI: the kind, RCX: expected, R9: found.
    pub(super) fn record_first_only(&mut self) -> Emitted {
        self.a.mov(r8, r9)?;
        self.a.xor(r10, r10)?;
        self.a.xor(r11, r11)?;
        self.a.call(self.record)
    }

    /// Function: counts a wrong page and writes it down if there is room. ESI: the kind, RCX: expected, R8: found,
    /// R9 to R11: the words. Changes RAX, RDX, RSI.
    pub(super) fn record(&mut self) -> Emitted {
        let mut record = self.record;
        let mut full = self.a.create_label();
        let a = &mut self.a;
        a.set_label(&mut record)?;
        a.mov(rax, block!(progress.wrong))?;
        a.cmp(rax, RECORDS as i32)?;
        a.jae(full)?;
        a.imul_3(rax, rax, size_of::<Record>() as i32)?;
        a.lea(rax, qword_ptr(rdi + rax + offset_of!(VcpuBlock, records) as i32))?;
        a.mov(at(rax, offset_of!(Record, kind)), rsi)?;
        a.mov(at(rax, offset_of!(Record, gfn)), r12)?;
        a.mov(at(rax, offset_of!(Record, expected)), rcx)?;
        a.mov(at(rax, offset_of!(Record, found)), r8)?;
        a.mov(at(rax, offset_of!(Record, first)), r9)?;
        a.mov(at(rax, offset_of!(Record, middle)), r10)?;
        a.mov(at(rax, offset_of!(Record, last)), r11)?;
        a.mov(rsi, rax)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.mov(at(rsi, offset_of!(Record, tsc)), rax)?;
        a.set_label(&mut full)?;
        // TSO: whoever sees the count sees the record.
        a.inc(block!(progress.wrong))?;
        a.ret()
    }
}
