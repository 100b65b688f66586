//! The first CPU during a storm: whoever owns the pages, and takes them away.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use afterimage_mmu::{Age, Blocking, FRAME_BYTES, Hva, HvaRange, Pfn, SpaceId, Zap};
use afterimage_stage2::Format;

use super::frames::{TAG, move_page, poison_is_gone};
use super::{A_WHILE, MANAGED, MANAGED_HVA, Mmu, Primary, SYSTEM_HVA, stale};
use crate::boot::MAX_CPUS;
use crate::cpus;
use crate::guest::{self, COUNT_OFFSET};
use crate::ram;

fn hvas(base: Hva, start: u64, count: u64) -> HvaRange {
    HvaRange::new(base + start * FRAME_BYTES, base + (start + count) * FRAME_BYTES)
}

/// Numbers that look random.
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 16
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// The first CPU: whoever owns the pages.
pub(super) struct Owner<'m, F: Format> {
    pub(super) mmu: &'m Mmu<F>,
    pub(super) primary: &'m Primary,
    /// Blocks that are nobody's, the oldest first.
    pub(super) spare: VecDeque<Pfn>,
    pub(super) block: u64,
    pub(super) blocks: u64,
    pub(super) random: Random,
    /// How often guests were entered.
    pub(super) entries: &'m AtomicU64,
}

impl<F: Format> Owner<'_, F> {
    /// Event `number` of `all`.
    pub(super) fn event(&mut self, number: u64, all: u64) {
        let started = cpus::clock();
        let first = self.random.below(self.blocks);
        let count = 1 + self.random.below((self.blocks - first).min(4));
        match self.random.below(64) {
            // It leaves much to map anew: of large blocks, once is enough.
            _ if self.block > 1 && number == all * 3 / 4 => self.log_dirty(),
            0 if self.block == 1 => self.log_dirty(),
            1..8 => self.take_the_guests_own(),
            8..24 => self.protect(first),
            24..32 => {
                let range = hvas(MANAGED_HVA, first * self.block, count * self.block);
                let _young = self.mmu.age(range, Age::Clear);
            }
            32..48 => self.migrate(first, count),
            _ => self.migrate(first, 1),
        }
        let took = cpus::clock() - started;
        self.let_guests_run(A_WHILE + 2 * took);
    }

    /// Until a guest has been entered since, and a while longer; but not for ever, since nothing may have made it leave.
    fn let_guests_run(&mut self, limit: u64) {
        let (entries, until) = (self.entries.load(Ordering::Acquire), cpus::clock() + limit);
        while self.entries.load(Ordering::Acquire) == entries && cpus::clock() < until {}
        self.pause(limit);
    }

    fn pause(&mut self, limit: u64) {
        cpus::wait(self.random.below(limit + 1));
    }

    fn migrate(&mut self, first: u64, count: u64) {
        let pages = hvas(MANAGED_HVA, first * self.block, count * self.block);
        let invalidation = self.mmu.invalidate(pages, Zap::Unmap, Blocking::Allowed);
        for number in first..first + count {
            let to = self.spare.pop_front().expect("there are more blocks than an event moves");
            let from = self.primary.frame(number * self.block);
            for index in 0..self.block {
                move_page(from + index, to + index);
                self.primary.frames[(number * self.block + index) as usize]
                    .store((to + index).as_u64(), Ordering::Release);
            }
            self.spare.push_back(from);
        }
        drop(invalidation);
    }

    /// While the invalidation lasts, the pages stay as they are.
    fn protect(&mut self, number: u64) {
        let start = number * self.block;
        let pages = hvas(MANAGED_HVA, start, self.block);
        let invalidation = self.mmu.invalidate(pages, Zap::WriteProtect, Blocking::Allowed);
        let counts = |page| {
            let words = ram::words(self.primary.frame(page));
            let first = COUNT_OFFSET as usize / 8;
            core::array::from_fn::<u64, MAX_CPUS, _>(|cpu| words[first + cpu].load(Ordering::Relaxed))
        };
        let before = (start..start + self.block).map(counts).collect::<Vec<_>>();
        self.let_guests_count();
        let after = (start..start + self.block).map(counts).collect::<Vec<_>>();
        if before != after {
            stale(format_args!("a page of block {number} was written while it was protected"));
        }
        drop(invalidation);
    }

    /// Until the guests have counted some times (a guest whose turn it is to write to the protected page waits), or a while.
    fn let_guests_count(&self) {
        if self.block > 1 {
            return cpus::wait(4 * A_WHILE);
        }
        let counted = || -> u64 {
            let pages = (0..self.blocks).map(|page| ram::words(self.primary.frame(page)));
            let first = COUNT_OFFSET as usize / 8;
            pages
                .flat_map(|words| &words[first..first + MAX_CPUS])
                .map(|word| word.load(Ordering::Relaxed))
                .sum()
        };
        let (enough, until) = (counted() + 32, cpus::clock() + 20 * A_WHILE);
        while counted() < enough && cpus::clock() < until {}
    }

    /// Code, page tables, stacks: the pages stay what they are, but every translation of some goes.
    fn take_the_guests_own(&mut self) {
        let first = self.random.below(guest::SYSTEM_FRAMES);
        let count = 1 + self.random.below(guest::SYSTEM_FRAMES - first);
        drop(self.mmu.invalidate(hvas(SYSTEM_HVA, first, count), Zap::Unmap, Blocking::Allowed));
    }

    /// Large pages are split while it is on; afterwards they come back, and the tables below them are freed.
    fn log_dirty(&mut self) {
        let (space, slot) = (SpaceId(0), MANAGED);
        self.mmu.set_dirty_logging(space, slot, true).expect("the slot is there");
        self.mmu.split_large_pages(space, slot).expect("the slot is there");
        self.pause(A_WHILE);
        self.mmu.set_dirty_logging(space, slot, false).expect("the slot is there");
        self.pause(A_WHILE);
        self.mmu.recover_large_pages(space, slot).expect("the slot is there");
    }

    /// When all guests are done, every count is what the guest remembers.
    pub(super) fn audit(&self) {
        for cpu in 1..=cpus::others() {
            // A guest that was stopped between its two stores had counted in the page, and not yet in its memory.
            let mut stopped_between = false;
            for page in 0..self.blocks * self.block {
                let words = ram::words(self.primary.frame(page));
                let (_, memory) = guest::memory_of(cpu);
                let own = ram::words(ram::guest_frame(memory.gfn() + page / 512));
                let counted = words[COUNT_OFFSET as usize / 8 + cpu].load(Ordering::Relaxed);
                let remembered = own[page as usize % 512].load(Ordering::Relaxed);
                let is_one_ahead = counted == remembered + 1;
                if words[0].load(Ordering::Relaxed) != TAG ^ page
                    || counted != remembered && (!is_one_ahead || stopped_between)
                {
                    stale(format_args!("page {page} counts {counted} of CPU {cpu}, which made {remembered}"));
                }
                stopped_between |= is_one_ahead;
            }
        }
        for start in &self.spare {
            for index in 0..self.block {
                if let Some(word) = poison_is_gone(*start + index) {
                    stale(format_args!("word {word} of a frame was written while it was nobody's"));
                }
            }
        }
    }
}
