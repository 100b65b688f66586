//! The table that a vCPU's last install went to, for the next: most go to the same one.
//!
//! # Why that table is still there
//!
//! Tables have an era: a number that no tables had before, and a new one each time that a table is taken out of them, or that
//! their root is replaced. A vCPU reads the era, walks, and remembers both the era and the table at the end. The next time it
//! announces its intent (or takes `mmu_lock`), and only then reads the era again:
//!
//! * the same: nothing was taken out since before the walk, so that the table is linked as it was then; or it is taken out just
//!   now, and whoever frees it waits for this announcement, which came before the new era was seen
//!   ([How long a table lives](super)). It is as if the vCPU had walked a moment ago;
//! * another: it walks.
//!
//! A new era is written behind the exchange that takes the table out, with Release, and read with Acquire: a walk that begins
//! in it does not find the table.
//!
//! Like a CPU's paging-structure cache, but asked for whether it is right instead of flushed. Linux has no counterpart.

use core::sync::atomic::AtomicU64 as Number;

use afterimage_mmu::{Gfn, Level};

use super::Tables;
use crate::format::Format;
use crate::memory::{ENTRIES, LastTable, TableCache, TableMemory};
use crate::mutation::{self, Mutation};
use crate::sync::{AtomicU64, Ordering};

/// An era that no tables have had.
pub(super) fn new_era() -> u64 {
    // No part of any protocol but for being different each time.
    static NEXT: Number = Number::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Says which frames the table of `level` around `gfn` translates, and its level, in one word.
#[inline]
fn place(gfn: Gfn, level: Level) -> u64 {
    let frames = level.frames() * ENTRIES as u64;
    gfn.as_u64() & !(frames - 1) | u64::from(level.number())
}

impl<F: Format, M: TableMemory> Tables<F, M> {
    #[inline]
    pub(super) fn era(&self) -> u64 {
        self.era.load(mutation::unless(Mutation::EraRelaxed, Ordering::Acquire))
    }

    /// A table was taken out.
    pub(super) fn end_era(&self) {
        if !mutation::active(Mutation::EraStays) {
            self.era.store(new_era(), mutation::unless(Mutation::EraRelaxed, Ordering::Release));
        }
    }

    /// The entry of `gfn` at `level`, if the last install went to its table.
    #[inline]
    pub(super) fn near_entry(&self, gfn: Gfn, level: Level, cache: &TableCache<M>) -> Option<&AtomicU64> {
        let LastTable { at, era, table } = cache.last;
        let is_near = at == place(gfn, level) && era == self.era();
        is_near.then(|| self.known(table, level).entry(gfn))
    }

    /// The entry of `gfn` at `target`, if every table above it is linked. Remembers the last of them.
    pub(super) fn linked_entry(
        &self,
        gfn: Gfn,
        target: Level,
        cache: &mut TableCache<M>,
    ) -> Option<&AtomicU64> {
        if !self.reach().contains(gfn) {
            return None;
        }
        let (era, mut table) = (self.era(), self.root_table());
        while table.level() > target {
            let raw = table.entry(gfn).load(mutation::unless(Mutation::WalkRelaxed, Ordering::Acquire));
            let (frame, child) = (F::child(raw, table.level())?, table.child(raw)?);
            if child.level() == target {
                cache.last = LastTable { at: place(gfn, target), era, table: frame };
            }
            table = child;
        }
        (table.level() == target).then(|| table.entry(gfn))
    }
}
