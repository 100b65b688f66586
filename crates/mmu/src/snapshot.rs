//! The fault's side of the invalidation words: what they said before its page was looked up, and whether they still do.
//!
//! Why a verdict holds is told in the module `invalidation`.

use core::fmt;
use core::marker::PhantomData;

use crate::addr::GfnRange;
use crate::block::Block;
use crate::intent::Walking;
use crate::invalidation::{Invalidations, MachineId, active, ended, said};
use crate::mutation::{self, Mutation};
use crate::sync::{AtomicU64, Ordering};

/// Changes what was said into what will not be said again.
const NEVER: u64 = 1 << (u64::BITS - 1);

/// The invalidations of some frames as they were before their pages were looked up.
///
/// Whoever resolves a page asks for one, so that it cannot be taken too late; and a verdict can be about no other frames.
#[must_use = "a snapshot that nothing is verified against protects nothing"]
#[derive(Clone, Copy)]
pub struct Snapshot<'m> {
    of: &'m Invalidations,
    block: Block,
    /// Where something is said about the block.
    words: [&'m AtomicU64; 2],
    /// What was said; changed by [`NEVER`], if any were active: then it is not to be found again.
    said: u64,
}

impl fmt::Debug for Snapshot<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot").field("block", &self.block).field("sequence", &self.sequence()).finish()
    }
}

/// Why a fault must be retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stale {
    /// An invalidation whose frames, or the hull of all (by [`Coverage`](crate::Coverage)), cover them is active (or seems to be, for a hint).
    Covered,
    /// An invalidation that the machine's [`SequenceScope`](crate::SequenceScope) counts has ended since.
    SequenceMoved,
}

impl<'m> Snapshot<'m> {
    #[inline]
    pub(crate) fn take(of: &'m Invalidations, block: Block) -> Self {
        let words = of.words_for(block);
        // Acquire: who sees the new number sees what the primary MMU did before that end.
        let said = said(words, Ordering::Acquire);
        Self { of, block, words, said: if active(said) == 0 { said } else { never_again(said) } }
    }

    /// The frames that it is of.
    #[inline]
    pub fn block(self) -> Block {
        self.block
    }

    /// The words that it is of.
    #[inline]
    pub fn invalidations(self) -> &'m Invalidations {
        self.of
    }

    /// The lock-free check: whether the fault looks doomed. `None` promises nothing.
    // Always: it is shorter than a call that keeps what the caller has in registers.
    #[inline(always)]
    pub fn hint(self) -> Option<Stale> {
        let now = said(self.words, Ordering::Relaxed);
        if now == self.said {
            None
        } else {
            look(self.of, self.block, self.said, now, Ordering::Relaxed).err()
        }
    }

    /// The check that counts, for who has a witness: [`Witness::verify`](crate::Witness::verify).
    #[inline]
    pub(crate) fn verify<'w>(self) -> Result<Fresh<'w>, Stale> {
        let fresh = Fresh { block: self.block, machine: self.of.machine(), witness: PhantomData };
        // Acquire: see the module `invalidation`.
        let ordering = mutation::unless(Mutation::VerifyRelaxed, Ordering::Acquire);
        let now = said(self.words, ordering);
        if now == self.said || mutation::active(Mutation::VerifyAlwaysFresh) {
            return Ok(fresh);
        }
        look(self.of, self.block, self.said, now, ordering).map(|()| fresh)
    }

    /// Whether an invalidation that counts has ended since.
    pub(crate) fn has_moved(self) -> bool {
        ended(said(self.words, Ordering::Acquire)) != self.sequence()
    }

    /// The sequence of that time, of both words together.
    pub(crate) fn sequence(self) -> u64 {
        ended(if active(self.said) == 0 { self.said } else { self.said ^ NEVER })
    }
}

/// Apart, and a word only: a snapshot of frames where nothing is active stays in registers.
#[cold]
#[inline(never)]
fn never_again(said: u64) -> u64 {
    said ^ NEVER
}

/// A closer look, since `now` is said and something else `before`: few faults are under way while an invalidation of their region
/// is. Takes a snapshot apart, so that one stays in registers where nobody looks closer.
#[cold]
fn look(of: &Invalidations, block: Block, before: u64, now: u64, ordering: Ordering) -> Result<(), Stale> {
    let since = Snapshot { of, block, words: of.words_for(block), said: before };
    let is_active = active(now) != 0 && !mutation::active(Mutation::VerifyIgnoresRange);
    if is_active && of.overlap(block, ordering) {
        return Err(Stale::Covered);
    }
    // Again, behind the ranges: they may be those of a later invalidation.
    let now = match mutation::active(Mutation::VerifyLooksOnce) {
        true => now,
        false => said(since.words, Ordering::Relaxed),
    };
    if ended(now) != since.sequence() && !mutation::active(Mutation::VerifyIgnoresSequence) {
        return Err(Stale::SequenceMoved);
    }
    Ok(())
}

/// The right to install translations for a block of frames, as long as the witness `'w` lives.
///
/// Only [`Witness::verify`](crate::Witness::verify) makes one.
#[must_use = "verified for nothing: install, or do not verify"]
#[derive(Debug)]
pub struct Fresh<'w> {
    block: Block,
    machine: MachineId,
    witness: PhantomData<&'w ()>,
}

impl<'w> Fresh<'w> {
    /// The right to follow links between tables, as long as the witness lives.
    #[inline]
    pub fn walking(&self) -> Walking<'w> {
        Walking::new(self.machine)
    }

    /// The frames that may be installed.
    #[inline]
    pub fn range(&self) -> GfnRange {
        self.block.range()
    }
}
