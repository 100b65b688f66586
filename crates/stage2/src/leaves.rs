//! The leaves of a range, one by one, and what can be done with each: take it away, write-protect it, age it.
//!
//! A walk over a range looks at every entry once, in order, and follows links as it meets them. It holds no position
//! that a change can spoil: between two steps it may be dropped and begun again at the frame behind the last step.
//! What is installed behind it while it runs it does not see; the invalidation protocol keeps that away.
//!
//! Source: Linux `tdp_iter`, `tdp_mmu_zap_leafs`, `kvm_tdp_mmu_age_gfn_range`.

use core::fmt;
use core::marker::PhantomData;

use afterimage_mmu::{Age, Gfn, GfnRange, Level};

use crate::format::{Entry, Format, Leaf, Writable};
use crate::memory::TableMemory;
use crate::mutation::{self, Mutation};
use crate::sync::{AtomicU64, Ordering};
use crate::tables::{TableRef, Tables, entry_block};

/// One step of a walk over a range.
#[derive(Debug)]
pub enum Step<'t, F: Format> {
    /// A leaf that maps a frame of the range; a large one may begin before it and end after it.
    Leaf(LeafEntry<'t, F>),
    /// Frames that nothing maps, up to the end of a table or of a large entry.
    Gap(GfnRange),
}

/// A walk over the leaves of a range. See [`Tables::leaves`].
pub struct Leaves<'t, F: Format, M: TableMemory> {
    tables: &'t Tables<F, M>,
    range: GfnRange,
    at: Gfn,
    end: Gfn,
    /// The table that was left last, and the end of what it translates.
    inside: Option<(TableRef<'t, F, M>, Gfn)>,
}

impl<F: Format, M: TableMemory> fmt::Debug for Leaves<'_, F, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaves").field("at", &self.at).field("end", &self.end).finish_non_exhaustive()
    }
}

impl<F: Format, M: TableMemory> Tables<F, M> {
    /// Walks over the leaves of `gfns`, those that overlap its ends too.
    pub fn leaves(&self, gfns: GfnRange) -> Leaves<'_, F, M> {
        let part = gfns.intersection(self.reach());
        Leaves { tables: self, range: part, at: part.start, end: part.end, inside: None }
    }

    /// Takes every leaf of `gfns` away; how many frames they mapped. The caller flushes.
    pub fn zap(&self, gfns: GfnRange) -> u64 {
        let mut zapped = 0;
        self.change_each(gfns, |entry| entry.take_away(), |leaf| zapped += leaf.size.frames());
        zapped
    }

    /// Leaves no leaf of `gfns` writable: each becomes `left` at most. How many frames were writable. The caller flushes.
    pub fn write_protect(&self, gfns: GfnRange, left: Writable) -> u64 {
        let mut protected = 0;
        self.change_each(
            gfns,
            |entry| entry.write_protect(left),
            |leaf| protected += if leaf.writable.is_allowed() { leaf.size.frames() } else { 0 },
        );
        protected
    }

    /// Changes leaf after leaf, and waits where one is frozen; `did` is told what each said before.
    fn change_each(
        &self,
        gfns: GfnRange,
        change: impl Fn(&LeafEntry<'_, F>) -> Change,
        mut did: impl FnMut(Leaf),
    ) {
        let mut leaves = self.leaves(gfns);
        while let Some(step) = leaves.next() {
            let Step::Leaf(entry) = step else { continue };
            match change(&entry) {
                Change::Did(leaf) => did(leaf),
                Change::Gone => {}
                Change::LookAgain => {
                    crate::sync::spin();
                    leaves.look_again(entry.gfns());
                }
            }
        }
    }

    /// Whether any leaf of `gfns` was used since its mark was taken away; `Age::Clear` takes the marks away.
    ///
    /// Needs no lock and no flush: an access through a stale TLB entry is missed, and only that.
    pub fn age(&self, gfns: GfnRange, age: Age) -> bool {
        let mut young = false;
        for step in self.leaves(gfns) {
            if let Step::Leaf(leaf) = step {
                young |= leaf.age(age);
            }
            if young && age == Age::Test {
                break;
            }
        }
        young
    }
}

impl<F: Format, M: TableMemory> Leaves<'_, F, M> {
    /// Goes back to the frames of the last step, and down from the root again: the entry was frozen.
    pub fn look_again(&mut self, gfns: GfnRange) {
        self.at = self.range.intersection(gfns).start;
        self.inside = None;
    }
}

impl<'t, F: Format, M: TableMemory> Iterator for Leaves<'t, F, M> {
    type Item = Step<'t, F>;

    fn next(&mut self) -> Option<Step<'t, F>> {
        let mut gap: Option<GfnRange> = None;
        while self.at < self.end {
            let (table, table_end) = match self.inside {
                Some((table, end)) if self.at < end => (table, end),
                _ if gap.is_some() => break,
                _ => {
                    let root = self.tables.root_table();
                    (root, root.span(self.at).end)
                }
            };
            self.inside = Some((table, table_end));
            let place = table.look(self.at);
            let here = entry_block(self.at, table.level());
            if let Some(child) = place.child {
                self.inside = Some((child, here.end));
                continue;
            }
            match place.said() {
                Entry::Frozen if mutation::active(Mutation::ZapSkipsFrozen) => self.at = here.end,
                Entry::Leaf(_) | Entry::Frozen => {
                    if gap.is_some() {
                        break;
                    }
                    self.at = here.end;
                    return Some(Step::Leaf(LeafEntry {
                        entry: place.entry,
                        level: place.level,
                        gfns: here,
                        format: PhantomData,
                    }));
                }
                Entry::Absent | Entry::Mmio(_) | Entry::Foreign | Entry::Table(_) => {
                    let behind = table.first_said(here.end, table_end.min(self.end));
                    let skipped = GfnRange::new(self.at, behind.min(self.end));
                    gap = Some(gap.map_or(skipped, |gap| gap.hull(skipped)));
                    self.at = skipped.end;
                }
            }
        }
        gap.map(Step::Gap)
    }
}

/// What became of a change of a leaf.
#[must_use = "an entry that changes is to be looked at again"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It took place; what the leaf said before, with every mark that was set by then.
    Did(Leaf),
    /// It is a leaf no more.
    Gone,
    /// Its owner is in mid-change, or it was split: look again, from the root ([`Leaves::look_again`]).
    LookAgain,
}

/// An entry that held a leaf, or was frozen, when the walk came by.
pub struct LeafEntry<'t, F: Format> {
    entry: &'t AtomicU64,
    level: Level,
    gfns: GfnRange,
    format: PhantomData<F>,
}

impl<F: Format> fmt::Debug for LeafEntry<'_, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeafEntry").field("gfns", &self.gfns).field("leaf", &self.leaf()).finish()
    }
}

impl<F: Format> LeafEntry<'_, F> {
    /// The frames that it maps.
    pub fn gfns(&self) -> GfnRange {
        self.gfns
    }

    /// What it says now; `None` if it is no leaf.
    pub fn leaf(&self) -> Option<Leaf> {
        match F::decode(self.entry.load(Ordering::Acquire), self.level) {
            Entry::Leaf(leaf) => Some(leaf),
            _ => None,
        }
    }

    /// Takes the leaf away.
    pub fn take_away(&self) -> Change {
        self.change(|_| None)
    }

    /// Leaves at most `left` of the permission to write.
    pub fn write_protect(&self, left: Writable) -> Change {
        debug_assert!(!left.is_allowed());
        self.change(|leaf| Some(Leaf { writable: leaf.writable.min(left), ..leaf }))
    }

    /// Takes the mark of a past write away, where the format has one.
    pub fn clean(&self) -> Change {
        debug_assert!(F::HAS_DIRTY);
        self.change(|leaf| Some(Leaf { writable: leaf.writable.min(Writable::Clean), ..leaf }))
    }

    /// Whether it was used since its mark was taken away; `Age::Clear` takes it away, if nobody changes the entry at
    /// this moment (which somebody who uses it does).
    pub fn age(&self, age: Age) -> bool {
        let raw = self.entry.load(Ordering::Relaxed);
        let Entry::Leaf(leaf) = F::decode(raw, self.level) else { return false };
        if leaf.accessed
            && age == Age::Clear
            && let Ok(old) = F::encode_leaf(Leaf { accessed: false, ..leaf })
        {
            let _ = self.entry.compare_exchange(raw, old, Ordering::Relaxed, Ordering::Relaxed);
        }
        leaf.accessed
    }

    /// Replaces the leaf by what `next` makes of it (`None`: nothing), however often hardware marks it meanwhile.
    fn change(&self, next: impl Fn(Leaf) -> Option<Leaf>) -> Change {
        let seen = mutation::unless(Mutation::TakeWithoutAcquire, Ordering::Acquire);
        let changed = if seen == Ordering::Acquire { Ordering::AcqRel } else { Ordering::Release };
        let mut raw = self.entry.load(seen);
        loop {
            let leaf = match F::decode(raw, self.level) {
                Entry::Leaf(leaf) => leaf,
                Entry::Table(_) if mutation::active(Mutation::ZapMissesSplit) => return Change::Gone,
                Entry::Frozen | Entry::Table(_) => return Change::LookAgain,
                _ => return Change::Gone,
            };
            let new = match next(leaf) {
                Some(new) if new == leaf => return Change::Did(leaf),
                Some(new) => {
                    F::encode_leaf(new).expect("a decoded leaf can be encoded with fewer permissions")
                }
                None => F::ABSENT,
            };
            match self.entry.compare_exchange(raw, new, changed, seen) {
                Ok(_) => return Change::Did(leaf),
                Err(now) => raw = now,
            }
        }
    }
}
