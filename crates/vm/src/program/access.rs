//! A timed access and the histogram it is filed in.
//!
//! Each first load of a page is timed, and so is each first store: a write that the host holds up (write protection,
//! dirty logging, copy on write) would otherwise not be seen.
//!
//! Inside or outside an invalidation: before the access the program loads how many windows of each slot have
//! ended, after it how many have begun. Where the two are equal, no window of that slot was open at any moment of
//! the access. Where they differ, the windows in between are those that were, and their bounds are looked up.
//! Loads are in order on x86, and the `lfence` behind the load keeps the second look from being taken early.

use iced_x86::code_asm::{
    AsmRegisterXmm, CodeLabel, byte_ptr, ecx, edx, qword_ptr, r8, r9, r10, r11, r12, rax, rbx, rcx, rdx, rsi,
    rsp, xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmmword_ptr,
};

use super::{Emitted, Emitter, at, block};
use crate::layout::{
    BUCKETS, Bounds, Histogram, LAST_WORD, MIDDLE_WORD, SUB_BUCKET_BITS, WINDOW_RING, WINDOW_SLOTS,
    WindowTable,
};
use core::mem::offset_of;

const ENDS: [AsmRegisterXmm; WINDOW_SLOTS / 2] = [xmm0, xmm1, xmm2, xmm3];
const BEGINS: usize = offset_of!(WindowTable, begins);
const SLOT_SHIFT: u32 = (WINDOW_RING * size_of::<Bounds>()).trailing_zeros();
const BOUNDS_SHIFT: u32 = size_of::<Bounds>().trailing_zeros();
const _: () = assert!(WINDOW_RING.is_power_of_two() && size_of::<Bounds>().is_power_of_two());
const _: () = assert!(offset_of!(Histogram, counts) == 0 && BUCKETS == 976);

impl Emitter {
    /// Emits `timed_load` and `timed_store`. Both keep R9 (the word) and change RAX, RCX, RDX, RSI, R8, R10, R11.
    pub(super) fn access(&mut self) -> Emitted {
        let mut file = self.a.create_label();
        let mut timed_load = self.timed_load;
        self.a.set_label(&mut timed_load)?;
        self.before()?;
        self.a.mov(r9, qword_ptr(rbx))?;
        // Their cache misses overlap with the first word's; a page that is not there ignores them.
        self.a.prefetcht0(byte_ptr(rbx + MIDDLE_WORD as i32))?;
        self.a.prefetcht0(byte_ptr(rbx + LAST_WORD as i32))?;
        self.a.lfence()?;
        self.a.jmp(file)?;

        let mut timed_store = self.timed_store;
        self.a.set_label(&mut timed_store)?;
        self.before()?;
        // A store that faults is seen without a fence: what follows is executed again after it.
        self.a.mov(qword_ptr(rbx), r9)?;
        self.a.set_label(&mut file)?;
        self.file()
    }

    /// Says where the program is; the `ends` counters into XMM0 to XMM3, the time into R8.
    fn before(&mut self) -> Emitted {
        let a = &mut self.a;
        a.mov(block!(progress.at), r12)?;
        a.mov(rsi, block!(windows))?;
        for (index, register) in ENDS.into_iter().enumerate() {
            a.movdqa(register, xmmword_ptr(rsi + (offset_of!(WindowTable, ends) + 16 * index) as i32))?;
        }
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.mov(r8, rax)
    }

    /// Makes of the time in RAX the one since R8; none, where the two are of CPUs that are out of step. Changes RCX.
    fn since(&mut self) -> Emitted {
        self.a.mov(ecx, 0)?;
        self.a.sub(rax, r8)?;
        self.a.cmovb(rax, rcx)
    }

    /// Files the time since R8 and returns. RSI: the window table.
    fn file(&mut self) -> Emitted {
        let (mut bucket, mut overlapped) = (self.a.create_label(), self.a.create_label());
        let a = &mut self.a;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        self.since()?;
        let a = &mut self.a;
        a.movdqa(xmm4, xmmword_ptr(rsi + BEGINS as i32))?;
        a.pcmpeqd(xmm4, ENDS[0])?;
        for (index, register) in ENDS.into_iter().enumerate().skip(1) {
            a.movdqa(xmm5, xmmword_ptr(rsi + (BEGINS + 16 * index) as i32))?;
            a.pcmpeqd(xmm5, register)?;
            a.pand(xmm4, xmm5)?;
        }
        a.pmovmskb(ecx, xmm4)?;
        a.mov(r8, block!(outside))?;
        a.cmp(ecx, 0xffff)?;
        a.jne(overlapped)?;
        a.set_label(&mut bucket)?;
        self.count()?;
        self.a.set_label(&mut overlapped)?;
        self.look_up(bucket)
    }

    /// Counts the cycles in RAX in the histogram at R8, and returns.
    fn count(&mut self) -> Emitted {
        let (mut no_max, mut small) = (self.a.create_label(), self.a.create_label());
        let a = &mut self.a;
        a.cmp(rax, at(r8, offset_of!(Histogram, max)))?;
        a.jbe(no_max)?;
        a.mov(at(r8, offset_of!(Histogram, max)), rax)?;
        a.set_label(&mut no_max)?;
        a.cmp(rax, 1 << SUB_BUCKET_BITS)?;
        a.jb(small)?;
        // With e = log2: the bucket is (e - 4) * 16 + (value >> (e - 4)).
        a.bsr(rcx, rax)?;
        a.sub(ecx, SUB_BUCKET_BITS as i32)?;
        a.shr(rax, iced_x86::code_asm::cl)?;
        a.shl(ecx, SUB_BUCKET_BITS as i32)?;
        a.add(rax, rcx)?;
        a.set_label(&mut small)?;
        a.inc(qword_ptr(r8 + rax * 8))?;
        a.ret()
    }

    /// Some window overlapped the access in time: R8 becomes the histogram inside if one of them covers the frame
    /// in R12. Of a slot's windows only the last [`WINDOW_RING`] are known; older ones count as not covering.
    fn look_up(&mut self, bucket: CodeLabel) -> Emitted {
        let [mut slot, mut next_slot, mut window, mut next_window, mut recent, mut inside] =
            core::array::from_fn(|_| self.a.create_label());
        let a = &mut self.a;
        a.sub(rsp, 64)?;
        for (index, register) in ENDS.into_iter().enumerate() {
            a.movdqu(xmmword_ptr(rsp + 16 * index as i32), register)?;
        }
        a.xor(ecx, ecx)?;
        a.set_label(&mut slot)?;
        a.mov(r10, qword_ptr(rsp + rcx * 8))?;
        a.mov(r11, qword_ptr(rsi + rcx * 8 + BEGINS as i32))?;
        a.mov(rdx, r11)?;
        a.sub(rdx, r10)?;
        a.je(next_slot)?;
        a.cmp(rdx, WINDOW_RING as i32)?;
        a.jbe(recent)?;
        a.lea(r10, qword_ptr(r11 - WINDOW_RING as i32))?;
        a.set_label(&mut recent)?;
        a.mov(r8, rcx)?;
        a.shl(r8, SLOT_SHIFT)?;
        a.add(r8, rsi)?;
        a.set_label(&mut window)?;
        a.inc(r10)?;
        a.mov(edx, iced_x86::code_asm::r10d)?;
        a.and(edx, WINDOW_RING as i32 - 1)?;
        a.shl(edx, BOUNDS_SHIFT)?;
        let bounds = offset_of!(WindowTable, bounds);
        a.cmp(r12, qword_ptr(r8 + rdx + (bounds + offset_of!(Bounds, start)) as i32))?;
        a.jb(next_window)?;
        a.cmp(r12, qword_ptr(r8 + rdx + (bounds + offset_of!(Bounds, end)) as i32))?;
        a.jb(inside)?;
        a.set_label(&mut next_window)?;
        a.cmp(r10, r11)?;
        a.jne(window)?;
        a.set_label(&mut next_slot)?;
        a.inc(ecx)?;
        a.cmp(ecx, WINDOW_SLOTS as i32)?;
        a.jne(slot)?;
        a.mov(r8, block!(outside))?;
        a.add(rsp, 64)?;
        a.jmp(bucket)?;
        a.set_label(&mut inside)?;
        a.mov(r8, block!(inside))?;
        a.add(rsp, 64)?;
        a.jmp(bucket)
    }
}

#[cfg(test)]
// UNSAFETY: calls what it assembles.
#[expect(unsafe_code)]
mod tests {
    use iced_x86::IcedError;
    use iced_x86::code_asm::{CodeAssembler, rdi};

    use super::*;
    use crate::program::Program;
    use crate::thread::Code;

    /// A function of the time now and the time then.
    fn since() -> Result<Program, IcedError> {
        let mut e = Emitter::new(CodeAssembler::new(64)?);
        e.a.mov(rax, rdi)?;
        e.a.mov(r8, rsi)?;
        e.since()?;
        e.a.ret()?;
        Ok(Program { code: e.a.assemble(0)?, exit: 0 })
    }

    #[test]
    fn no_time_runs_backwards() {
        let code = Code::map(&since().expect("instructions")).expect("memory");
        // SAFETY: (1) the mapping begins with a function of this type; (2) it stays until the end of the test.
        let since: extern "sysv64" fn(u64, u64) -> u64 = unsafe { core::mem::transmute(code.entry()) };
        for (now, then, time) in [(7, 5, 2), (5, 5, 0), (5, 7, 0), (0, u64::MAX, 0), (u64::MAX, 0, u64::MAX)]
        {
            assert_eq!(since(now, then), time, "{then} to {now}");
        }
    }
}
