//! The leaves of a range, one by one, and what can be done with each: take it away, write-protect it, age it.
//!
//! A walk over a range looks at every entry once, in order, and follows links as it meets them. It holds no position
//! that a change can spoil: between two steps it may be dropped and begun again at the frame behind the last step.
//! What is installed behind it while it runs it does not see; the invalidation protocol keeps that away.
//!
//! Source: Linux `tdp_iter`, `tdp_mmu_zap_leafs`, `kvm_tdp_mmu_age_gfn_range`.

mod entry;

use core::{fmt, slice};

use afterimage_mmu::{Age, Gfn, GfnRange};

use crate::format::{Format, Leaf, Writable};
use crate::memory::TableMemory;
use crate::mutation::{self, Mutation};
use crate::sync::{AtomicU64, Ordering};
use crate::tables::{TableRef, Tables, entry_block};

pub use entry::{Change, LeafEntry};

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
    /// The table that the walk is in, and its entries from `at` on, as far as the range goes. None are left: down from the root.
    table: TableRef<'t, F, M>,
    left: slice::Iter<'t, AtomicU64>,
}

impl<F: Format, M: TableMemory> fmt::Debug for Leaves<'_, F, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaves").field("at", &self.at).field("end", &self.range.end).finish_non_exhaustive()
    }
}

impl<F: Format, M: TableMemory> Tables<F, M> {
    /// Walks over the leaves of `gfns`, those that overlap its ends too; what the tables do not reach is left out.
    pub fn leaves(&self, gfns: GfnRange) -> Leaves<'_, F, M> {
        let part = gfns.intersection(self.reach());
        Leaves { tables: self, range: part, at: part.start, table: self.root_table(), left: [].iter() }
    }

    /// Takes every leaf of `gfns` away, large ones as a whole; how many frames of 4 KiB they mapped. The caller flushes. Waits
    /// where an entry is frozen.
    ///
    /// Source: Linux `tdp_mmu_zap_leafs`.
    pub fn zap(&self, gfns: GfnRange) -> u64 {
        let mut zapped = 0;
        self.change_each(gfns, |entry| entry.take_away(), |leaf| zapped += leaf.size.frames());
        zapped
    }

    /// Leaves no leaf of `gfns` writable: each becomes `left` at most, which allows no writing. How many frames of 4 KiB were
    /// writable. The caller flushes. Waits where an entry is frozen.
    ///
    /// Source: Linux `wrprot_gfn_range`.
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
    /// Needs no lock and no flush: an access through a stale TLB entry is missed, and only that. `Age::Test` stops at the first.
    ///
    /// Source: Linux `kvm_tdp_mmu_age_gfn_range`, `kvm_tdp_mmu_test_age_gfn`.
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

impl<'t, F: Format, M: TableMemory> Leaves<'t, F, M> {
    /// Goes back to `gfns`, the frames of the last step, and down from the root again: the entry was frozen, or became a table.
    pub fn look_again(&mut self, gfns: GfnRange) {
        self.at = self.range.intersection(gfns).start;
        self.left = [].iter();
    }

    /// The entry that the walk has come to, and what its word is; `None` at the end of the table.
    #[inline]
    fn look(&self) -> Option<(&'t AtomicU64, u64)> {
        let entry = self.left.as_slice().first()?;
        Some((entry, entry.load(mutation::unless(Mutation::WalkRelaxed, Ordering::Acquire))))
    }

    /// The leaf that the walk has come to, if it has: then it goes on behind it.
    #[inline]
    fn leaf(&mut self) -> Option<LeafEntry<'t, F>> {
        let (entry, raw) = self.look()?;
        let gfns = entry_block(self.at, self.table.level());
        let leaf = LeafEntry::seen(entry, self.table.level(), gfns, raw)?;
        self.pass(gfns);
        Some(leaf)
    }

    /// Goes on behind the entry of `gfns`.
    #[inline]
    fn pass(&mut self, gfns: GfnRange) {
        self.at = gfns.end;
        self.left.next();
    }

    /// Goes on behind all that say nothing. It has come to the first frame of an entry.
    fn pass_absent(&mut self) {
        let left = self.left.as_slice();
        let absent = left.iter().take_while(|entry| entry.load(Ordering::Acquire) == F::ABSENT).count();
        self.at = self.at + absent as u64 * self.table.level().frames();
        self.left = left[absent..].iter();
    }

    fn enter(&mut self, table: TableRef<'t, F, M>) {
        self.table = table;
        self.left = table.entries_of(GfnRange::new(self.at, self.range.end)).iter();
    }

    /// Goes down to where an entry is no link; what is passed on the way that says nothing, up to the end of a table.
    fn gap(&mut self) -> Option<GfnRange> {
        let mut gap: Option<GfnRange> = None;
        while self.at < self.range.end {
            let Some((entry, raw)) = self.look() else {
                if gap.is_some() {
                    break;
                }
                self.enter(self.tables.root_table());
                continue;
            };
            if let Some(child) = self.table.child(raw) {
                self.enter(child);
                continue;
            }
            let here = entry_block(self.at, self.table.level());
            if LeafEntry::<F>::seen(entry, self.table.level(), here, raw).is_some() {
                break;
            }
            let start = gap.map_or(self.at, |gap| gap.start);
            self.pass(here);
            self.pass_absent();
            gap = Some(GfnRange::new(start, self.at.min(self.range.end)));
        }
        gap
    }
}

impl<'t, F: Format, M: TableMemory> Iterator for Leaves<'t, F, M> {
    type Item = Step<'t, F>;

    #[inline(always)]
    fn next(&mut self) -> Option<Step<'t, F>> {
        loop {
            if let Some(leaf) = self.leaf() {
                return Some(Step::Leaf(leaf));
            }
            if let Some(gap) = self.gap() {
                return Some(Step::Gap(gap));
            }
            if self.at >= self.range.end {
                return None;
            }
        }
    }
}
