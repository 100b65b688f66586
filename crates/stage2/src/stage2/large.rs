//! Splitting large pages, ahead of time or for a fault, and recovering them.
//!
//! All of it holds `mmu_lock` for write; what is about more than one page gives way between two. A split takes tables from a cache that is topped up
//! while the lock is given up, or before it is taken: nothing allocates under it. A recovery asks the host how large a page really is, which nobody can
//! change while the lock is held and no invalidation of the block is active. What it recovers is executable only where a fault would map it so.
//!
//! Source: Linux `kvm_tdp_mmu_try_split_huge_pages`, `kvm_tdp_mmu_recover_huge_pages`.

use afterimage_mmu::{Flush, Gfn, GfnRange, Level, Memslot, PageSize, Turn, ZapWalk, Zapped};

use super::{Host, Stage2};
use crate::format::{Entry, Format};
use crate::leaves::Step;
use crate::memory::TableCache;
use crate::mutation::Mutation;
use crate::tables::{MapError, Next, Split};

/// Why a splitting walk stopped.
enum Stop {
    Done,
    GiveWay,
    NoTable,
}

impl<F: Format, H: Host> Stage2<F, H> {
    /// `false`: there is no memory for a table.
    pub(super) fn split_each(&self, slot: &Memslot, gfns: GfnRange, walk: &mut ZapWalk<'_, Self>) -> bool {
        let mut cache = TableCache::default();
        let mut left = gfns;
        loop {
            match self.split_some(slot, &mut left, &mut cache, walk) {
                Stop::Done => return true,
                Stop::GiveWay => walk.give_way(),
                Stop::NoTable => {
                    let mut has_memory = false;
                    walk.give_way_for(|| {
                        has_memory =
                            self.spaces.first().is_some_and(|tables| tables.top_up_whole(&mut cache));
                    });
                    if !has_memory {
                        return false;
                    }
                }
            }
        }
    }

    fn split_some(
        &self,
        slot: &Memslot,
        left: &mut GfnRange,
        cache: &mut TableCache<H::Memory>,
        walk: &mut ZapWalk<'_, Self>,
    ) -> Stop {
        let (walking, mut steps) = walk.parts();
        let Some(tables) = self.tables(slot.space, walking) else { return Stop::Done };
        let mut leaves = tables.leaves(*left);
        while let Some(step) = leaves.next() {
            let done = match step {
                Step::Leaf(entry) if entry.gfns().len() > 1 => {
                    if cache.is_empty() {
                        return Stop::NoTable;
                    }
                    let split =
                        tables.split(entry.gfns().start, cache, |gfns| steps.flush_now(Flush::of(gfns)));
                    if let Ok(Split::Done(_) | Split::LostRace) = split {
                        // Once more over the parts, which may be large, too.
                        leaves.look_again(entry.gfns());
                        let none = GfnRange::new(left.start, left.start);
                        match steps.step(none, Zapped::Nothing) {
                            Turn::GoOn => continue,
                            Turn::GiveWay => return Stop::GiveWay,
                        }
                    }
                    entry.gfns()
                }
                Step::Leaf(entry) => entry.gfns(),
                Step::Gap(gap) => gap,
            };
            left.start = done.end;
            if steps.step(done, Zapped::Nothing) == Turn::GiveWay {
                return Stop::GiveWay;
            }
        }
        Stop::Done
    }

    /// Splits what maps `gfn` until it is mapped singly, for a fault.
    pub(super) fn split_down_to(
        &self,
        slot: &Memslot,
        gfn: Gfn,
        cache: &mut TableCache<H::Memory>,
        walk: &mut ZapWalk<'_, Self>,
    ) -> Result<(), MapError> {
        let (walking, mut steps) = walk.parts();
        if let Some(tables) = self.tables(slot.space, walking) {
            // Once for each size that there is.
            while let Split::Done(_) = tables.split(gfn, cache, |gfns| steps.flush_now(Flush::of(gfns)))? {}
        }
        Ok(())
    }

    pub(super) fn collapse_each(&self, slot: &Memslot, gfns: GfnRange, walk: &mut ZapWalk<'_, Self>) {
        for size in [PageSize::Size2M, PageSize::Size1G] {
            let mut left = gfns;
            while self.collapse_some(slot, &mut left, size, walk) == Turn::GiveWay {
                walk.give_way();
            }
        }
    }

    fn collapse_some(
        &self,
        slot: &Memslot,
        left: &mut GfnRange,
        size: PageSize,
        walk: &mut ZapWalk<'_, Self>,
    ) -> Turn {
        let (walking, mut steps) = walk.parts();
        let Some(tables) = self.tables(slot.space, walking) else { return Turn::GoOn };
        let Some(below) = Level::new(size.level().number() - 1) else { return Turn::GoOn };
        let most = self.most_executable(Mutation::RecoveredExecutable);
        while steps.room() > 0 {
            let (gfns, is_table) = match tables.next_table(*left, below) {
                Next::Table(gfns) => (gfns, true),
                Next::Gap(gap) => (gap, false),
                Next::End => break,
            };
            left.start = gfns.end;
            // Covered first of all: the host is not asked about what it is changing.
            if is_table
                && !steps.is_covered(gfns)
                && let Entry::Leaf(leaf) = tables.walk(gfns.start).entry
                && self.may_recover(slot, gfns.start, size, self.host.block(leaf.pfn))
                && let Some(removed) =
                    tables.collapse(gfns.start, size, most, |gfns| steps.flush_now(Flush::with_tables(gfns)))
                && let Some(table) = removed.table
            {
                self.retire(&mut steps, table, Flush::with_tables(gfns));
            }
            if steps.step(gfns, Zapped::Nothing) == Turn::GiveWay {
                return Turn::GiveWay;
            }
        }
        Turn::GoOn
    }
}
