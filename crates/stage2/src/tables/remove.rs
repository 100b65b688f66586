//! Taking tables away, from the lowest level up: each with the leaves in it, and without tables below.
//!
//! A table is frozen as a whole while it is still linked. Then it is unlinked, and nobody has installed anything in it that
//! is lost without a trace. If a table turns up below (an install has linked one meanwhile), the entries are given back
//! as absent, and the one below has to go first.
//!
//! Where faults go on meanwhile, a large leaf may be installed where the table was. If the format demands
//! [break-before-make](crate::Format::BREAK_BEFORE_MAKE), CPUs are made to forget the table's leaves before the entry is given up.
//!
//! Source: Linux `handle_removed_pt`, `tdp_mmu_zap_root`.

use afterimage_mmu::{Gfn, GfnRange, Level, Pfn};

use super::freeze::{Undo, publish};
use super::reach::Place;
use super::{NO_ROOT, Tables, entry_block};
use crate::format::{Entry, Format};
use crate::memory::TableMemory;
use crate::mutation::{self, Mutation};
use crate::sync::Ordering;

/// What a removal did. The caller flushes, if it took leaves, and always before a table is freed.
#[must_use = "the table must be freed, and CPUs made to forget its leaves"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removed {
    /// What the table translated.
    pub gfns: GfnRange,
    /// Frames of 4 KiB that its leaves mapped, and that nothing maps now.
    pub frames: u64,
    /// The table, if it was unlinked; `None`: a table below is in the way.
    pub table: Option<Pfn>,
}

/// What a look for a table found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// One that translates these frames.
    Table(GfnRange),
    /// None in these frames; there may be one behind them.
    Gap(GfnRange),
    /// None.
    End,
}

/// Entries that are looked at in one go: those of a table, which is a step that is short.
const LOOKS: usize = 512;

impl<F: Format, M: TableMemory> Tables<F, M> {
    /// The first table of `level` (no root) that lies within `gfns` as a whole, as far as some 512 looks go.
    pub(crate) fn next_table(&self, gfns: GfnRange, level: Level) -> Next {
        let gfns = gfns.intersection(self.reach());
        let mut at = gfns.start;
        for _ in 0..LOOKS {
            let Some((place, below)) = self.link_above(at, level).filter(|_| at < gfns.end) else {
                return Next::End;
            };
            let block = entry_block(at, place.level);
            if below.is_some() && gfns.covers(block) {
                return Next::Table(block);
            }
            at = block.end;
        }
        Next::Gap(GfnRange::new(gfns.start, at.min(gfns.end)))
    }

    /// Unlinks the table of `level` around `gfn` with every leaf in it, unless tables lie below it. `None`: there is no such
    /// table. The table's memory stays as it is until [`free`](Self::free).
    ///
    /// Source: Linux `handle_removed_pt`.
    ///
    /// `flush` as for [`split`](Self::split); it has nothing to do where nobody installs anything before the caller flushes.
    pub fn unlink(&self, gfn: Gfn, level: Level, flush: impl FnOnce(GfnRange)) -> Option<Removed> {
        let (place, below) = self.link_above(gfn, level)?;
        let table = below?;
        let child = place.child?;
        let mut frames = 0;
        let frozen = child.freeze(|_, said| match said {
            Entry::Leaf(leaf) => {
                frames += leaf.size.frames();
                true
            }
            Entry::Absent | Entry::Mmio(_) => true,
            Entry::Frozen | Entry::Table(_) | Entry::Foreign => false,
        });
        let gfns = entry_block(gfn, place.level);
        let nothing = |_| F::ABSENT;
        let breaks = F::BREAK_BEFORE_MAKE && !mutation::active(Mutation::UnlinkWithoutBreak);
        if let Err(stopped) = frozen {
            let undo = Undo::new(|| child.thaw(stopped.at, nothing));
            if breaks && frames > 0 {
                flush(gfns);
            }
            undo.forget();
            child.thaw(stopped.at, nothing);
            return Some(Removed { gfns, frames, table: None });
        }
        if mutation::active(Mutation::RemovedTableThaws) {
            child.thaw(child.entries().len(), nothing);
        }
        let next = if breaks { F::FROZEN } else { F::ABSENT };
        // Release: who installs in a table that is linked here later has seen what was done before this one went.
        let unlinked = place.entry.compare_exchange(place.raw, next, Ordering::Release, Ordering::Relaxed);
        if unlinked.is_ok() {
            self.end_era();
        }
        match unlinked {
            Ok(_) if breaks => {
                let undo = Undo::new(|| {
                    child.thaw(child.entries().len(), nothing);
                    publish(place.entry, place.raw);
                });
                flush(gfns);
                undo.forget();
                publish(place.entry, F::ABSENT);
            }
            Ok(_) => {}
            Err(_) => child.thaw(child.entries().len(), nothing),
        }
        Some(Removed { gfns, frames, table: unlinked.is_ok().then_some(table) })
    }

    /// Takes the root away from tables that no CPU uses any more, and that are of no more use; `None`: a table is linked below
    /// it (who had found the root before can still install). The root stays frozen.
    pub(crate) fn take_root(&mut self) -> Option<Pfn> {
        let root = self.root_table();
        let frozen = root.freeze(|_, said| matches!(said, Entry::Absent | Entry::Mmio(_) | Entry::Leaf(_)));
        if let Err(stopped) = frozen {
            root.thaw(stopped.at, |_| F::ABSENT);
            return None;
        }
        Some(Pfn::new(core::mem::replace(self.root.get_mut(), NO_ROOT)))
    }

    /// The entry that links, or would link, the table of `level` around `gfn`, or the one above at which the walk ends; and
    /// that table.
    pub(super) fn link_above(&self, gfn: Gfn, level: Level) -> Option<(Place<'_, F, M>, Option<Pfn>)> {
        if level >= F::ROOT_LEVEL || !self.reach().contains(gfn) {
            return None;
        }
        let mut table = self.root_table();
        loop {
            let place = table.look(gfn);
            match (place.child, place.said()) {
                (Some(child), _) if child.level() > level => table = child,
                (Some(_), Entry::Table(frame)) => return Some((place, Some(frame))),
                _ => return Some((place, None)),
            }
        }
    }
}
