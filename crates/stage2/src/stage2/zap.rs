//! What a zap leaves: leaf by leaf, or table by table.
//!
//! | asked | 4 KiB leaf | large leaf |
//! |---|---|---|
//! | unmap | absent | absent, as a whole |
//! | write-protect, by the primary MMU | `Never`: the next write asks it again | absent: its next frame asks |
//! | track, for the dirty log | `Protected`: the next write is recorded, and needs nobody | the same, and is split then |
//!
//! An invalidation takes leaves only; tables stay, for the next fault. Where a slot goes, the tables that are within it go,
//! from the lowest level up, so that each step is short: KVM's order for a whole root, too. Each is handed to the engine,
//! which frees it after a flush, when nobody walks any more who could have found it.
//!
//! Source: Linux `tdp_mmu_zap_leafs`, `tdp_mmu_zap_root`, `wrprot_gfn_range`.

use afterimage_mmu::{
    Flush, GfnRange, Level, Memslot, Pfn, Retired, RetiredTable, SlotLog, SpaceId, Steps, Turn, Walking, Zap,
    ZapWalk, Zapped,
};

use super::{Host, Stage2};
use crate::format::{Format, Writable};
use crate::leaves::{Change, LeafEntry, Step};
use crate::memory::TableMemory;
use crate::mutation::{self, Mutation};
use crate::tables::{Next, Tables};

/// Whose leaves and tables are taken away.
pub(super) enum Of<'t, F: Format, M: TableMemory> {
    /// Those of an address space.
    Space(SpaceId),
    /// Those below a root that was replaced: no CPU uses them.
    Replaced(&'t Tables<F, M>),
}

impl<F: Format, M: TableMemory> Of<'_, F, M> {
    fn zapped(&self, frames: u64) -> Zapped {
        match self {
            Self::Space(_) => Zapped::Unflushed(frames),
            Self::Replaced(_) => Zapped::Unused(frames),
        }
    }
}

/// Whether somebody may install translations while tables go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Faults {
    /// All are refused, until the walk has flushed.
    Excluded,
    /// What goes is to be forgotten before anything takes its place, where the format demands it.
    GoOn,
}

impl<F: Format, H: Host> Stage2<F, H> {
    pub(super) fn zap_leaves(&self, slot: &Memslot, gfns: GfnRange, zap: Zap, walk: &mut ZapWalk<'_, Self>) {
        let of = Of::Space(slot.space);
        match zap {
            Zap::Unmap => self.each_leaf(&of, slot, gfns, walk, take_away),
            Zap::WriteProtect => self.each_leaf(&of, slot, gfns, walk, |entry, log| {
                if entry.gfns().len() > 1 {
                    return take_away(entry, log);
                }
                let before = entry.write_protect(Writable::Never);
                note_written(entry, before, log);
                unless_unwritable(before)
            }),
            // What is protected for the log is in it already.
            Zap::TrackDirty => self.each_leaf(&of, slot, gfns, walk, |entry, _| {
                unless_unwritable(entry.write_protect(Writable::Protected))
            }),
        }
    }

    /// Takes the marks of past writes; each is `written`. A large page has one mark for all its frames, so it is protected instead: the
    /// next write splits it, and from then on each frame has its own.
    pub(super) fn clean_leaves(
        &self,
        slot: &Memslot,
        gfns: GfnRange,
        walk: &mut ZapWalk<'_, Self>,
        written: &mut dyn FnMut(GfnRange),
    ) {
        self.each_leaf(&Of::Space(slot.space), slot, gfns, walk, |entry, _| {
            let is_large = entry.gfns().len() > 1;
            let before = if is_large { entry.write_protect(Writable::Protected) } else { entry.clean() };
            match before {
                Change::Did(leaf) if leaf.writable == Writable::Dirty => {
                    written(entry.gfns());
                    Change::Did(leaf)
                }
                // Nothing is cached that is not so.
                Change::Did(_) if !is_large => Change::Gone,
                other => unless_unwritable(other),
            }
        });
    }

    /// Changes leaf after leaf of frames of `slot`, and waits where one is frozen. What was done to CPUs' cached translations
    /// `change` says: nothing, if the leaf is [`Change::Gone`]; and to the slot's log, what the guest has written.
    pub(super) fn each_leaf(
        &self,
        of: &Of<'_, F, H::Memory>,
        slot: &Memslot,
        gfns: GfnRange,
        walk: &mut ZapWalk<'_, Self>,
        mut change: impl FnMut(&LeafEntry<'_, F>, &mut SlotLog<'_>) -> Change,
    ) {
        let mut left = gfns;
        while self.some_leaves(of, slot, &mut left, walk, &mut change) == Turn::GiveWay {
            walk.give_way();
        }
    }

    /// Until nothing is left, or the walk has to give way.
    fn some_leaves(
        &self,
        of: &Of<'_, F, H::Memory>,
        slot: &Memslot,
        left: &mut GfnRange,
        walk: &mut ZapWalk<'_, Self>,
        change: &mut impl FnMut(&LeafEntry<'_, F>, &mut SlotLog<'_>) -> Change,
    ) -> Turn {
        let (walking, mut steps) = walk.parts();
        let Some(tables) = self.tables_of(of, walking) else { return Turn::GoOn };
        let mut log = steps.log(slot);
        let mut leaves = tables.leaves(*left);
        while let Some(step) = leaves.next() {
            let (done, zapped) = match step {
                Step::Gap(gap) => (gap, Zapped::Nothing),
                Step::Leaf(entry) => match change(&entry, &mut log) {
                    Change::Did(_) => (entry.gfns(), of.zapped(entry.gfns().len())),
                    Change::Gone => (entry.gfns(), Zapped::Nothing),
                    Change::LookAgain => {
                        crate::sync::spin();
                        leaves.look_again(entry.gfns());
                        continue;
                    }
                },
            };
            left.start = done.end;
            if steps.step(done, zapped) == Turn::GiveWay && !left.is_empty() {
                return Turn::GiveWay;
            }
        }
        Turn::GoOn
    }

    /// Unlinks every table of a level below `top` within `gfns`. What an install links meanwhile stays, until the next time.
    pub(super) fn zap_tables(
        &self,
        of: &Of<'_, F, H::Memory>,
        gfns: GfnRange,
        top: Level,
        faults: Faults,
        walk: &mut ZapWalk<'_, Self>,
    ) {
        for level in (1..top.number()).filter_map(Level::new) {
            let mut left = gfns;
            while self.unlink_some(of, &mut left, level, faults, walk) == Turn::GiveWay {
                walk.give_way();
            }
        }
    }

    fn unlink_some(
        &self,
        of: &Of<'_, F, H::Memory>,
        left: &mut GfnRange,
        level: Level,
        faults: Faults,
        walk: &mut ZapWalk<'_, Self>,
    ) -> Turn {
        let (walking, mut steps) = walk.parts();
        let Some(tables) = self.tables_of(of, walking) else { return Turn::GoOn };
        while steps.room() > 0 {
            let gfns = match tables.next_table(*left, level) {
                Next::Table(gfns) => gfns,
                Next::Gap(gap) => {
                    left.start = gap.end;
                    if steps.step(gap, Zapped::Nothing) == Turn::GiveWay {
                        return Turn::GiveWay;
                    }
                    continue;
                }
                Next::End => break,
            };
            left.start = gfns.end;
            let flush = |gfns| match faults {
                Faults::GoOn => steps.flush_now(Flush::with_tables(gfns)),
                Faults::Excluded => {}
            };
            let Some(removed) = tables.unlink(gfns.start, level, flush) else { continue };
            if let Some(table) = removed.table {
                let cached = match of {
                    Of::Space(_) => Flush::with_tables(gfns),
                    Of::Replaced(_) => Flush::NOTHING,
                };
                self.retire(&mut steps, table, cached);
            }
            let zapped = if removed.frames > 0 { of.zapped(removed.frames) } else { Zapped::Nothing };
            if steps.step(gfns, zapped) == Turn::GiveWay {
                return Turn::GiveWay;
            }
        }
        Turn::GoOn
    }

    fn tables_of<'w>(
        &'w self,
        of: &Of<'w, F, H::Memory>,
        walking: Walking<'w>,
    ) -> Option<&'w Tables<F, H::Memory>> {
        match of {
            Of::Space(space) => self.tables(*space, walking),
            Of::Replaced(tables) => Some(tables),
        }
    }

    pub(super) fn retire(&self, steps: &mut Steps<'_, '_, Self>, table: Pfn, cached: Flush) {
        if mutation::active(Mutation::FreeAtOnce) {
            self.free_at_once(table);
            return;
        }
        steps.retire(RetiredTable { first: table, pages: 1 }, cached);
    }
}

/// Takes one leaf away, and notes whether it was written.
#[inline]
pub(super) fn take_away<F: Format>(entry: &LeafEntry<'_, F>, log: &mut SlotLog<'_>) -> Change {
    let before = entry.take_away();
    note_written(entry, before, log);
    before
}

#[inline]
fn note_written<F: Format>(entry: &LeafEntry<'_, F>, before: Change, log: &mut SlotLog<'_>) {
    if let Change::Did(leaf) = before
        && leaf.writable == Writable::Dirty
        && !mutation::active(Mutation::ZapLosesDirty)
    {
        log.written(entry.gfns());
    }
}

/// What could not be written before is as no CPU can write it: that was flushed under the lock.
#[inline]
fn unless_unwritable(before: Change) -> Change {
    match before {
        Change::Did(leaf)
            if !leaf.writable.is_allowed() || mutation::active(Mutation::ProtectWithoutFlush) =>
        {
            Change::Gone
        }
        other => other,
    }
}

// UNSAFETY: tables are freed that were unlinked, on the engine's word that nobody can reach them.
#[expect(unsafe_code)]
mod freeing {
    use super::{Format, Host, Pfn, Retired, Stage2};

    impl<F: Format, H: Host> Stage2<F, H> {
        pub(in crate::stage2) fn free_retired(&self, retired: &Retired<Self>) {
            // Every space has its tables in the same memory.
            let Some(tables) = self.spaces.first() else { return };
            for table in retired.tables() {
                // SAFETY: (1) only `retire` above, and `zap_replaced` for a root, and only of the walk of the engine that these
                // tables are attached to, fill a `Retired` of this type, with what `unlink`, `collapse` and `take_root` gave; the engine gives it back once; (2)
                // it has flushed, also CPUs' paging-structure caches, and (3) has waited for every `Walking` but
                // those of `mmu_lock`, which the unlinking thread held for write. Borrows of tables end with their `Walking`.
                unsafe { tables.free(table.first, table.pages) };
            }
        }

        /// What the mutation does; nothing but a test that looks for the freed table's words may run then.
        pub(in crate::stage2) fn free_at_once(&self, table: Pfn) {
            let Some(tables) = self.spaces.first() else { return };
            // SAFETY: none. The rule is switched off, for a test whose memory keeps freed tables mapped.
            unsafe { tables.free(table, 1) };
        }
    }
}
