//! A leaf that a walk came by, and what can be done with it.
//!
//! Each change is one exchange. The first try is with the word that the walk has seen, so that an entry that nobody else changes is
//! read and decoded once. What others, hardware too, made of it since then is found by that exchange, which fails.

use core::fmt;
use core::marker::PhantomData;

use afterimage_mmu::{Age, GfnRange, Level};

use crate::format::{Entry, Format, Leaf, Writable};
use crate::mutation::{self, Mutation};
use crate::sync::{AtomicU64, Ordering};

/// What became of a change of a leaf.
#[must_use = "an entry that changes is to be looked at again"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It took place; what the leaf said before, with every mark that was set by then.
    Did(Leaf),
    /// It is a leaf no more.
    Gone,
    /// Its owner is in mid-change, or it was split: look again, from the root ([`Leaves::look_again`](super::Leaves::look_again)).
    LookAgain,
}

/// An entry that held a leaf, or was frozen, when the walk came by.
pub struct LeafEntry<'t, F: Format> {
    entry: &'t AtomicU64,
    level: Level,
    gfns: GfnRange,
    /// The word that the walk saw.
    raw: u64,
    /// What it says; `None`: frozen.
    leaf: Option<Leaf>,
    format: PhantomData<F>,
}

impl<F: Format> fmt::Debug for LeafEntry<'_, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeafEntry").field("gfns", &self.gfns).field("leaf", &self.leaf).finish()
    }
}

impl<'t, F: Format> LeafEntry<'t, F> {
    /// The entry of `gfns` in a table of `level`, in which the word `raw` was seen; `None` if that is no leaf, and not frozen.
    #[inline]
    pub(super) fn seen(entry: &'t AtomicU64, level: Level, gfns: GfnRange, raw: u64) -> Option<Self> {
        let leaf = match F::decode(raw, level) {
            Entry::Leaf(leaf) => Some(leaf),
            Entry::Frozen if !mutation::active(Mutation::ZapSkipsFrozen) => None,
            _ => return None,
        };
        Some(Self { entry, level, gfns, raw, leaf, format: PhantomData })
    }

    /// The frames that it maps.
    #[inline]
    pub fn gfns(&self) -> GfnRange {
        self.gfns
    }

    /// What it said when the walk came by; `None` if it was frozen.
    #[inline]
    pub fn leaf(&self) -> Option<Leaf> {
        self.leaf
    }

    /// Takes the leaf away. The caller flushes.
    #[inline]
    pub fn take_away(&self) -> Change {
        self.change(|_| None)
    }

    /// Leaves at most `left` of the permission to write, which allows none. The caller flushes, if it was allowed.
    #[inline]
    pub fn write_protect(&self, left: Writable) -> Change {
        debug_assert!(!left.is_allowed());
        self.change(|leaf| Some(Leaf { writable: leaf.writable.min(left), ..leaf }))
    }

    /// Takes the mark of a past write away. Only where the format has one ([`Format::HAS_DIRTY`]). The caller flushes, or a write
    /// through what a CPU has cached sets no mark.
    #[inline]
    pub fn clean(&self) -> Change {
        debug_assert!(F::HAS_DIRTY);
        self.change(|leaf| Some(Leaf { writable: leaf.writable.min(Writable::Clean), ..leaf }))
    }

    /// Whether it was used since its mark was taken away; `Age::Clear` takes it away, if nobody changes the entry at
    /// this moment (which somebody who uses it does).
    #[inline]
    pub fn age(&self, age: Age) -> bool {
        let Some(leaf) = self.leaf else { return false };
        if leaf.accessed
            && age == Age::Clear
            && let Ok(old) = F::encode_leaf(Leaf { accessed: false, ..leaf })
        {
            let _ = self.entry.compare_exchange(self.raw, old, Ordering::Relaxed, Ordering::Relaxed);
        }
        leaf.accessed
    }

    /// Replaces the leaf by what `next` makes of it (`None`: nothing), however often hardware marks it meanwhile.
    #[inline]
    fn change(&self, next: impl Fn(Leaf) -> Option<Leaf>) -> Change {
        let Some(leaf) = self.leaf else { return Change::LookAgain };
        match exchange::<F>(self.entry, self.raw, leaf, &next) {
            Ok(()) => Change::Did(leaf),
            Err(now) => change_again::<F>(self.entry, self.level, now, next),
        }
    }
}

/// Writes what `next` makes of `leaf` over `raw`, which says it; `Err`: the word is another by now.
#[inline]
fn exchange<F: Format>(
    entry: &AtomicU64,
    raw: u64,
    leaf: Leaf,
    next: &impl Fn(Leaf) -> Option<Leaf>,
) -> Result<(), u64> {
    let new = match next(leaf) {
        Some(new) if new == leaf => return Ok(()),
        Some(new) => F::encode_leaf(new).expect("a decoded leaf can be encoded with fewer permissions"),
        None => F::ABSENT,
    };
    if mutation::active(Mutation::ChangeBlindly) {
        entry.store(new, Ordering::Release);
        return Ok(());
    }
    let seen = mutation::unless(Mutation::TakeWithoutAcquire, Ordering::Acquire);
    let changed = if seen == Ordering::Acquire { Ordering::AcqRel } else { Ordering::Release };
    entry.compare_exchange(raw, new, changed, seen).map(drop)
}

/// Goes on with a word that somebody else wrote.
#[cold]
fn change_again<F: Format>(
    entry: &AtomicU64,
    level: Level,
    mut raw: u64,
    next: impl Fn(Leaf) -> Option<Leaf>,
) -> Change {
    loop {
        let leaf = match F::decode(raw, level) {
            Entry::Leaf(leaf) => leaf,
            Entry::Table(_) if mutation::active(Mutation::ZapMissesSplit) => return Change::Gone,
            Entry::Frozen | Entry::Table(_) => return Change::LookAgain,
            _ => return Change::Gone,
        };
        match exchange::<F>(entry, raw, leaf, &next) {
            Ok(()) => return Change::Did(leaf),
            Err(now) => raw = now,
        }
    }
}
