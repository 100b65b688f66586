//! Which page comes next.
//!
//! Pages are owned by blocks: block `b` belongs to vCPU `b % vcpus`. A workload chooses a number among the vCPU's
//! own pages; `own` turns it into a frame. Now and then the next access goes to a page of any vCPU instead.

use iced_x86::code_asm::{cl, r12, rax, rcx, rdx, rsi};

use super::{Emitted, Emitter, at, block};
use crate::layout::{Mailbox, WorkloadNumber};
use core::mem::offset_of;

impl Emitter {
    /// Emits the choice. Ends at the checks with R12, RBX and RBP set.
    pub(super) fn pick(&mut self) -> Emitted {
        let (mut pick, cross) = (self.pick, self.cross);
        let (mut scan, mut hot) = (self.a.create_label(), self.a.create_label());
        let a = &mut self.a;
        a.set_label(&mut pick)?;
        a.dec(block!(cross_countdown))?;
        a.je(cross)?;
        a.mov(rax, block!(workload))?;
        a.cmp(rax, WorkloadNumber::Scan as i32)?;
        a.je(scan)?;
        a.cmp(rax, WorkloadNumber::Hot as i32)?;
        a.je(hot)?;
        self.pick_stamp()?;
        self.a.set_label(&mut scan)?;
        self.pick_scan()?;
        self.a.set_label(&mut hot)?;
        self.pick_hot()?;
        self.cross()?;
        self.own()
    }

    /// Anywhere among the own pages, or for a while in a window of them.
    fn pick_stamp(&mut self) -> Emitted {
        let (mut opened, mut in_window) = (self.a.create_label(), self.a.create_label());
        self.a.cmp(block!(window_left), 0)?;
        self.a.jne(in_window)?;
        self.with_share(block!(window_share), opened)?;
        self.random_below(block!(own_pages))?;
        self.a.jmp(self.own)?;
        self.a.set_label(&mut opened)?;
        self.random_below(block!(window_bases))?;
        self.a.mov(block!(window_base), rax)?;
        self.a.mov(rax, block!(window_stay))?;
        self.a.mov(block!(window_left), rax)?;
        self.a.set_label(&mut in_window)?;
        self.a.dec(block!(window_left))?;
        self.random_below(block!(window_pages))?;
        self.a.add(rax, block!(window_base))?;
        self.a.jmp(self.own)
    }

    /// One after the other; from the second round on with writes.
    fn pick_scan(&mut self) -> Emitted {
        let mut same_round = self.a.create_label();
        let own = self.own;
        let a = &mut self.a;
        a.mov(rax, block!(scan_next))?;
        a.cmp(rax, block!(own_pages))?;
        a.jb(same_round)?;
        a.mov(rcx, block!(later_write_share))?;
        a.mov(block!(write_share), rcx)?;
        a.xor(rax, rax)?;
        a.set_label(&mut same_round)?;
        a.mov(rcx, rax)?;
        a.inc(rcx)?;
        a.mov(block!(scan_next), rcx)?;
        a.jmp(own)
    }

    /// Mostly among the first few own pages, else anywhere.
    fn pick_hot(&mut self) -> Emitted {
        let mut hot = self.a.create_label();
        self.with_share(block!(hot_share), hot)?;
        self.random_below(block!(own_pages))?;
        self.a.jmp(self.own)?;
        self.a.set_label(&mut hot)?;
        self.random_below(block!(hot_pages))?;
        self.a.jmp(self.own)
    }

    /// A page of some vCPU: of its open discard request if it has one, else anywhere in memory.
    ///
    /// The mailbox may change between the loads; the result is a page of the memory all the same, since all
    /// requests have one size.
    fn cross(&mut self) -> Emitted {
        let (mut cross, mut anywhere, mut go) = (self.cross, self.a.create_label(), self.a.create_label());
        self.a.set_label(&mut cross)?;
        self.a.mov(rax, block!(cross_every))?;
        self.a.mov(block!(cross_countdown), rax)?;
        self.random_below(block!(vcpus))?;
        let a = &mut self.a;
        a.imul_3(rsi, rax, size_of::<Mailbox>() as i32)?;
        a.add(rsi, block!(mailboxes))?;
        a.mov(rax, at(rsi, offset_of!(Mailbox, requested)))?;
        a.cmp(rax, at(rsi, offset_of!(Mailbox, acknowledged)))?;
        a.je(anywhere)?;
        self.random_below(block!(block_pages))?;
        self.a.add(rax, at(rsi, offset_of!(Mailbox, start)))?;
        self.a.jmp(go)?;
        self.a.set_label(&mut anywhere)?;
        self.random_below(block!(pages))?;
        self.a.set_label(&mut go)?;
        self.a.mov(r12, rax)?;
        self.locate()?;
        self.check_tag()
    }

    /// From the number among the own pages in RAX to the frame; falls through to the exact check, unless the page
    /// lies in the vCPU's open discard request.
    fn own(&mut self) -> Emitted {
        let mut own = self.own;
        let mut exact = self.a.create_label();
        let discarding = self.discarding;
        let a = &mut self.a;
        a.set_label(&mut own)?;
        a.mov(rcx, block!(block_pages))?;
        a.dec(rcx)?;
        a.mov(rdx, rax)?;
        a.and(rdx, rcx)?;
        a.mov(rcx, block!(block_shift))?;
        a.shr(rax, cl)?;
        a.imul_2(rax, block!(vcpus))?;
        a.add(rax, block!(owner))?;
        a.shl(rax, cl)?;
        a.or(rax, rdx)?;
        a.mov(r12, rax)?;
        self.locate()?;
        let a = &mut self.a;
        a.cmp(block!(discard_pending), 0)?;
        a.je(exact)?;
        a.mov(rax, r12)?;
        a.sub(rax, block!(discard_start))?;
        a.cmp(rax, block!(block_pages))?;
        a.jb(discarding)?;
        a.set_label(&mut exact)
    }
}
