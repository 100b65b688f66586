//! Deliberate breaks: each removes one rule of the tables, so that a test can show that it would be noticed.
//!
//! Without the feature `mutations` the question "is it on?" is the constant `false` and leaves no code behind. The rules of
//! the protocol above the tables are switched off in `afterimage_mmu::mutation`.

use crate::sync::Ordering;

/// One rule that can be switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[non_exhaustive]
pub enum Mutation {
    /// A removed table's entries are given back before it is unlinked: an install finds room in a dead table.
    RemovedTableThaws = 1,
    /// A removed table is freed at once (rule F3).
    FreeAtOnce,
    /// Tables keep their era when a table is taken out of them.
    EraStays,
    /// The era is written and read with relaxed accesses.
    EraRelaxed,
    /// What is below a root that was replaced is freed before vCPUs have reloaded.
    FreeBeforeReload,
    /// A large leaf is split in one exchange where the architecture demands break-before-make.
    SplitWithoutBreak,
    /// A table is collapsed while installs and changes go on in it.
    CollapseWithoutFreezing,
    /// A collapse forgets that a part was written.
    CollapseLosesDirty,
    /// A split forgets that the large page was written.
    SplitLosesDirty,
    /// What is frozen stays so when a flush ends in a panic.
    PanicStaysFrozen,
    /// An install takes a frozen entry for an absent one.
    FrozenOverwritten,
    /// A zap passes a frozen entry by.
    ZapSkipsFrozen,
    /// A zap that finds a leaf split since it looked takes its parts for gone.
    ZapMissesSplit,
    /// A leaf is changed by a store: what the walk saw is taken for what was there.
    ChangeBlindly,
    /// A leaf becomes a leaf of another frame without a zap in between.
    ConflictOverwritten,
    /// A large leaf is installed though only the faulting frame was verified.
    LargeBeyondVerdict,
    /// Private and shared frames are mapped by one large leaf.
    MixedLarge,
    /// A logged slot's frames are mapped by large leaves.
    LoggedLarge,
    /// A large page that is recovered may be fetched from, where none may.
    RecoveredExecutable,
    /// A table goes, and its entry is free, before CPUs were made to forget it, where the architecture demands
    /// break-before-make.
    UnlinkWithoutBreak,
    /// A fault maps a large page that may be fetched from, where none may.
    LargeExecutable,
    /// A block whose writes are logged is taken away to be mapped by a large page.
    RecoverLogged,
    /// A write protection is not flushed.
    ProtectWithoutFlush,
    /// A zapped leaf's dirty mark does not reach the log.
    ZapLosesDirty,
    /// A walk reads entries with relaxed loads.
    WalkRelaxed,
    /// Tables are linked, and leaves installed, without a release.
    InstallWithoutRelease,
    /// A leaf is taken away or protected without an acquire.
    TakeWithoutAcquire,
    /// A leaf is marked with a relaxed exchange.
    MarkRelaxed,
    /// Entries are frozen with relaxed accesses.
    FreezeRelaxed,
    /// Frozen entries are given back with relaxed stores.
    ThawRelaxed,
    /// A table takes the place of a leaf, or a leaf of a table, with a relaxed exchange.
    ReplaceRelaxed,
    /// What was broken first is made again with a relaxed store.
    PublishRelaxed,
}

/// The ordering that a rule asks for; where the rule is switched off, without what it is about.
#[inline]
pub(crate) fn unless(mutation: Mutation, ordering: Ordering) -> Ordering {
    match (active(mutation), mutation) {
        (false, _) => ordering,
        (true, Mutation::InstallWithoutRelease) => Ordering::Acquire,
        (true, _) => Ordering::Relaxed,
    }
}

#[cfg(feature = "mutations")]
static ACTIVE: core::sync::atomic::AtomicU32 = core::sync::atomic::AtomicU32::new(0);

/// Switches one rule off for the whole process, or all rules on again with `None`.
#[cfg(feature = "mutations")]
pub fn set(mutation: Option<Mutation>) {
    ACTIVE.store(mutation.map_or(0, |m| m as u32), core::sync::atomic::Ordering::SeqCst);
}

/// Whether this rule is switched off.
#[cfg(feature = "mutations")]
#[inline]
pub fn active(mutation: Mutation) -> bool {
    ACTIVE.load(core::sync::atomic::Ordering::Relaxed) == mutation as u32
}

/// Whether this rule is switched off: never, without the feature `mutations`.
#[cfg(not(feature = "mutations"))]
#[inline(always)]
pub const fn active(_mutation: Mutation) -> bool {
    false
}
