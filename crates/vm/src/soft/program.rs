//! The guest's program for a software vCPU: what `crate::program` assembles for the others, in Rust.
//!
//! It works on the same structures in system memory, with the same rules; the tables that explain them are there
//! (`pick.rs`, `check.rs`, `discard.rs`). Every load and store of managed memory goes through the vCPU.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use afterimage_mmu::{Gfn, PrimaryMmu};
use afterimage_stage2::Host;

use super::cpu::Cpu;
use super::tables::TablePool;
use super::timing::Timing;
use super::walk::Hardware;
use super::{Pause, PhysicalMemory};
use crate::guest::State;
use crate::layout::{
    Ended, FIRST_WORD, LAST_MASK, LAST_WORD, MIDDLE_MASK, MIDDLE_WORD, Mailbox, RECORDS, RecordKind,
    VcpuBlock, WorkloadNumber, fold,
};
use crate::report::VcpuEnd;
use crate::system::SystemMemory;
use crate::tsc;

/// One vCPU's program.
pub(super) struct Program<'m, F: Hardware, H: Host<Memory = TablePool>, M, R> {
    cpu: Cpu<'m, F, H, M, R>,
    system: &'m SystemMemory,
    pause: &'m Pause,
    block: &'m VcpuBlock,
    mailbox: &'m Mailbox,
    index: usize,
    /// State of the random generator (xorshift64*, Vigna 2016).
    rng: u64,
    at: u64,
}

/// What comes next.
enum Next {
    /// A page of its own, by its number among them.
    Own(u64),
    /// A page of its own open discard request.
    Discarding(u64),
    /// A page of any vCPU.
    Anybodys(u64),
    /// Nothing: the mailbox took this turn.
    Nothing,
}

fn get(field: &AtomicU64) -> u64 {
    field.load(Relaxed)
}

/// Fields are written by one thread.
fn add(field: &AtomicU64, more: u64) {
    field.store(field.load(Relaxed).wrapping_add(more), Relaxed);
}

impl<'m, F, H, M, R> Program<'m, F, H, M, R>
where
    F: Hardware,
    H: Host<Memory = TablePool>,
    M: PrimaryMmu<Page = H::Page>,
    R: PhysicalMemory,
{
    pub(super) fn new(cpu: Cpu<'m, F, H, M, R>, state: &'m State, index: usize) -> Self {
        let system: &SystemMemory = &state.system;
        let block = system.block(index);
        block.started.store(tsc::now(), Relaxed);
        Self {
            cpu,
            system,
            pause: &state.pause,
            block,
            mailbox: system.mailbox(index),
            index,
            rng: get(&block.rng),
            at: 0,
        }
    }

    /// Runs until something ends it.
    pub(super) fn run(mut self) -> Result<Ended, VcpuEnd> {
        let (block, limit) = (self.block, get(&self.block.limit));
        let ended = loop {
            if block.stop.flag.load(Relaxed) != 0 {
                break Ok(Ended::Stopped);
            }
            if get(&block.progress.accesses) >= limit {
                break Ok(Ended::Limit);
            }
            if self.pause.is_wanted() {
                self.cpu.leave();
                self.pause.park();
                self.cpu.enter();
            }
            if let Err(end) = self.turn() {
                break Err(end);
            }
        };
        self.cpu.leave();
        ended
    }

    fn turn(&mut self) -> Result<(), VcpuEnd> {
        match self.next()? {
            Next::Nothing => return Ok(()),
            Next::Own(number) => {
                let gfn = self.own(number);
                let block_pages = get(&self.block.block_pages);
                let start = get(&self.block.discard_start);
                if get(&self.block.discard_pending) != 0 && gfn.wrapping_sub(start) < block_pages {
                    self.check_discarding(gfn)?;
                } else {
                    self.check_exact(gfn)?;
                }
            }
            Next::Discarding(gfn) => self.check_discarding(gfn)?,
            Next::Anybodys(gfn) => self.check_tag(gfn)?,
        }
        add(&self.block.progress.accesses, 1);
        Ok(())
    }

    fn next(&mut self) -> Result<Next, VcpuEnd> {
        let (block, mailbox) = (self.block, self.mailbox);
        if get(&mailbox.requested) != mailbox.acknowledged.load(Acquire) {
            if self.with_share(&block.discard_share) {
                return Ok(Next::Discarding(
                    self.random_below(get(&block.block_pages)) + get(&block.discard_start),
                ));
            }
        } else if get(&block.discard_pending) != 0 {
            self.expect_zeros();
            return Ok(Next::Nothing);
        } else {
            // Starting from 0 (never) it wraps, and does not come back in 2^64 accesses.
            add(&block.discard_countdown, u64::MAX);
            if get(&block.discard_countdown) == 0 {
                self.ask_for_discard()?;
                return Ok(Next::Nothing);
            }
        }
        Ok(self.pick())
    }

    /// See `discard.rs` of the assembled program.
    fn ask_for_discard(&mut self) -> Result<(), VcpuEnd> {
        let (block, mailbox) = (self.block, self.mailbox);
        block.discard_countdown.store(get(&block.discard_every), Relaxed);
        let (shift, pages, vcpus) = (get(&block.block_shift), get(&block.block_pages), get(&block.vcpus));
        let here = self.at >> shift;
        let is_own = here % vcpus == get(&block.owner) && here / vcpus < get(&block.own_blocks);
        let start = if !get(&mailbox.requested).is_multiple_of(4) && is_own {
            let start = self.at & !(pages - 1);
            for gfn in start..start + pages {
                self.at = gfn;
                self.cpu.load(Gfn::new(gfn), FIRST_WORD)?;
                self.note_misled();
            }
            start
        } else {
            (self.random_below(get(&block.own_blocks)) * vcpus + get(&block.owner)) << shift
        };
        block.discard_start.store(start, Relaxed);
        mailbox.start.store(start, Relaxed);
        mailbox.pages.store(pages, Relaxed);
        block.discard_pending.store(1, Relaxed);
        // Release: whoever sees the number sees the range.
        mailbox.requested.store(get(&mailbox.requested) + 1, Release);
        add(&block.progress.discards, 1);
        Ok(())
    }

    fn expect_zeros(&mut self) {
        let start = get(&self.block.discard_start);
        for page in start..start + get(&self.block.block_pages) {
            let expected = self.system.expected(page);
            expected.first.store(0, Relaxed);
            expected.rest.store(0, Relaxed);
        }
        self.block.discard_pending.store(0, Relaxed);
    }

    /// See `pick.rs` of the assembled program.
    fn pick(&mut self) -> Next {
        let block = self.block;
        add(&block.cross_countdown, u64::MAX);
        if get(&block.cross_countdown) == 0 {
            block.cross_countdown.store(get(&block.cross_every), Relaxed);
            return Next::Anybodys(self.anybodys());
        }
        let workload = get(&block.workload);
        Next::Own(if workload == WorkloadNumber::Scan as u64 {
            let mut next = get(&block.scan_next);
            if next >= get(&block.own_pages) {
                block.write_share.store(get(&block.later_write_share), Relaxed);
                next = 0;
            }
            block.scan_next.store(next + 1, Relaxed);
            next
        } else if workload == WorkloadNumber::Hot as u64 {
            let among = if self.with_share(&block.hot_share) { &block.hot_pages } else { &block.own_pages };
            self.random_below(get(among))
        } else {
            if get(&block.window_left) == 0 {
                if !self.with_share(&block.window_share) {
                    return Next::Own(self.random_below(get(&block.own_pages)));
                }
                let base = self.random_below(get(&block.window_bases));
                block.window_base.store(base, Relaxed);
                block.window_left.store(get(&block.window_stay), Relaxed);
            }
            add(&block.window_left, u64::MAX);
            self.random_below(get(&block.window_pages)) + get(&block.window_base)
        })
    }

    /// A page of some vCPU: of its open discard request if it has one, else anywhere in memory.
    fn anybodys(&mut self) -> u64 {
        let vcpu = self.random_below(get(&self.block.vcpus));
        let mailbox = self.system.mailbox(vcpu as usize);
        if mailbox.requested.load(Acquire) == get(&mailbox.acknowledged) {
            return self.random_below(get(&self.block.pages));
        }
        self.random_below(get(&self.block.block_pages)) + get(&mailbox.start)
    }

    /// The frame of a page by its number among the vCPU's own.
    fn own(&self, number: u64) -> u64 {
        let shift = get(&self.block.block_shift);
        let inside = number & (get(&self.block.block_pages) - 1);
        ((number >> shift) * get(&self.block.vcpus) + get(&self.block.owner)) << shift | inside
    }

    fn check_exact(&mut self, gfn: u64) -> Result<(), VcpuEnd> {
        let expected = self.system.expected(gfn);
        let first = self.timed_load(gfn)?;
        let middle = self.cpu.load(Gfn::new(gfn), MIDDLE_WORD)?;
        let last = self.cpu.load(Gfn::new(gfn), LAST_WORD)?;
        self.note_misled();
        let (rest, words) = (fold(middle, last), [first, middle, last]);
        if first != get(&expected.first) {
            self.record(RecordKind::First, gfn, get(&expected.first), first, words);
        } else if rest != get(&expected.rest) {
            self.record(RecordKind::Rest, gfn, get(&expected.rest), rest, words);
        }
        // A wrong page is written down once.
        expected.first.store(first, Relaxed);
        expected.rest.store(rest, Relaxed);
        if self.with_share(&self.block.write_share) { self.write_stamp(gfn) } else { Ok(()) }
    }

    /// Writes the next stamp to an own page: the frame below, a version that never comes back above.
    fn write_stamp(&mut self, gfn: u64) -> Result<(), VcpuEnd> {
        let stamp = get(&self.block.version) << 32 | gfn;
        add(&self.block.version, 1);
        let timing = self.timing(gfn);
        self.cpu.store(Gfn::new(gfn), FIRST_WORD, stamp)?;
        timing.file(self.system, self.index);
        // From here on, whatever becomes of the rest.
        self.pause.note_written(gfn);
        let (middle, last) = (stamp ^ MIDDLE_MASK, stamp ^ LAST_MASK);
        self.cpu.store(Gfn::new(gfn), MIDDLE_WORD, middle)?;
        self.cpu.store(Gfn::new(gfn), LAST_WORD, last)?;
        self.note_misled();
        let expected = self.system.expected(gfn);
        expected.first.store(stamp, Relaxed);
        expected.rest.store(fold(middle, last), Relaxed);
        add(&self.block.progress.writes, 1);
        Ok(())
    }

    /// A page of the vCPU's own open discard request: its old first word, or zero from some moment on.
    fn check_discarding(&mut self, gfn: u64) -> Result<(), VcpuEnd> {
        let expected = self.system.expected(gfn);
        let first = self.timed_load(gfn)?;
        self.note_misled();
        if first == 0 {
            expected.first.store(0, Relaxed);
            expected.rest.store(0, Relaxed);
        } else if first != get(&expected.first) {
            self.record(RecordKind::Discarding, gfn, get(&expected.first), first, [first, 0, 0]);
        }
        Ok(())
    }

    /// A page of any vCPU: zero, or with its own number.
    fn check_tag(&mut self, gfn: u64) -> Result<(), VcpuEnd> {
        let first = self.timed_load(gfn)?;
        self.note_misled();
        add(&self.block.progress.cross, 1);
        if get(&self.block.tag_check) != 0 && first != 0 && first as u32 != gfn as u32 {
            self.record(RecordKind::Tag, gfn, gfn, first, [first, 0, 0]);
        }
        Ok(())
    }

    fn timed_load(&mut self, gfn: u64) -> Result<u64, VcpuEnd> {
        let timing = self.timing(gfn);
        let word = self.cpu.load_or_fetch(Gfn::new(gfn), FIRST_WORD)?;
        timing.file(self.system, self.index);
        Ok(word)
    }

    fn timing(&mut self, gfn: u64) -> Timing {
        self.at = gfn;
        self.block.progress.at.store(gfn, Relaxed);
        Timing::start(self.system, gfn)
    }

    /// Writes down where the vCPU's caches have led it, if they have led it astray.
    #[inline]
    fn note_misled(&mut self) {
        if let Some(misled) = self.cpu.take_misled() {
            self.record(misled.kind, misled.gfn.as_u64(), misled.expected, misled.found, [0; 3]);
        }
    }

    /// Counts a wrong page, and writes it down if there is room.
    #[cold]
    fn record(&mut self, kind: RecordKind, gfn: u64, expected: u64, found: u64, words: [u64; 3]) {
        let wrong = &self.block.progress.wrong;
        let count = get(wrong);
        if count < RECORDS as u64 {
            let record = &self.block.records[count as usize];
            record.kind.store(kind as u64, Relaxed);
            record.gfn.store(gfn, Relaxed);
            record.expected.store(expected, Relaxed);
            record.found.store(found, Relaxed);
            record.first.store(words[0], Relaxed);
            record.middle.store(words[1], Relaxed);
            record.last.store(words[2], Relaxed);
            record.tsc.store(tsc::now(), Relaxed);
        }
        // Release: whoever sees the count sees the record.
        wrong.store(count + 1, Release);
    }

    /// The next 32 random bits.
    fn random(&mut self) -> u64 {
        self.rng ^= self.rng >> 12;
        self.rng ^= self.rng << 25;
        self.rng ^= self.rng >> 27;
        self.rng.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    /// A random number below `bound`, which is at most 2^32.
    fn random_below(&mut self, bound: u64) -> u64 {
        (self.random() * bound) >> 32
    }

    /// True with the probability `share / 2^32`.
    fn with_share(&mut self, share: &AtomicU64) -> bool {
        self.random() < get(share)
    }
}
