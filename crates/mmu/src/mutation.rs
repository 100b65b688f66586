//! Deliberate breaks: each removes one safety rule, so that a test can show that it would be noticed.
//!
//! Without the feature `mutations` the question "is it on?" is the constant `false` and leaves no code behind.

use crate::sync::Ordering;

/// One safety rule that can be switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[non_exhaustive]
pub enum Mutation {
    /// `verify` finds every snapshot fresh.
    VerifyAlwaysFresh = 1,
    /// `verify` looks at the active range but not at the sequence.
    VerifyIgnoresSequence,
    /// `verify` looks at the sequence but not at the active range.
    VerifyIgnoresRange,
    /// `end` drops the count before it bumps the sequence.
    EndCountFirst,
    /// `end` gives up its exact ranges before it bumps the sequence.
    EndRangesFirst,
    /// `end` leaves the sequence as it is.
    EndKeepsSequence,
    /// An invalidation leaves out the last region that it touches.
    LastRegionForgotten,
    /// A fault does not look at the word that wide invalidations change.
    WideUnread,
    /// A zap leaves out the last frame of the range.
    ZapForgetsLastFrame,
    /// A zap gives the lock up without flushing first (rule F2).
    YieldWithoutFlush,
    /// `begin` returns without flushing (rule F1).
    BeginWithoutFlush,
    /// The page reference is leaked when the check after fault-in fires (version 2 of the change).
    LeakPageAfterFaultIn,
    /// The pre-check looks only at faults without a memslot (version 4 of the change).
    InvertedSlotTest,
    /// The page is released after the lock is given up.
    ReleaseAfterUnlock,
    /// A memslot update does not wait for active invalidations that do not know the slots to come.
    SwapWithoutDrain,
    /// An invalidation does not look at the memslots to come.
    ComingSlotsMissed,
    /// Memslots go while invalidations use them.
    SlotsFreedUnderEvents,
    /// A memslot update does not wait for readers.
    SwapWithoutReaders,
    /// A waiter parks without marking the word.
    WaitWithoutMark,
    /// A vCPU enters the guest without the full fence.
    EnterWithoutFence,
    /// A request is made without the full fence before the mode is read.
    RequestWithoutFence,
    /// A flush does not wait until a kicked vCPU has left the guest.
    KickWithoutAck,
    /// A lock's reader does not wait for the writer's phase to end.
    ReaderIgnoresWriter,
    /// A lock's writer does not wait for the readers before it.
    WriterIgnoresReaders,
    /// A leaving lock holder does not wake who parked.
    UnlockWithoutWake,
    /// A fault that began before the machine was released installs after it.
    InstallAfterRelease,
    /// The sequence is sampled after the page was looked up.
    SnapshotAfterFaultIn,
    /// Only the first of several slots over one host range is zapped.
    FirstSlotOnly,
    /// An invalidation that may not block yields all the same.
    NonBlockableYields,
    /// A slot is deleted or moved without an invalid phase.
    UpdateWithoutInvalidPhase,
    /// A memslot update keeps the generation.
    GenerationStays,
    /// An end does not wake who waits for it.
    EndWithoutWake,
    /// A vCPU leaves the guest without waking who waits for that.
    LeaveWithoutWake,
    /// An event ends without waking the updater who waits for that.
    EventWithoutWake,
    /// The sequence is bumped with a relaxed store.
    BumpRelaxed,
    /// The lock is given up with relaxed accesses.
    UnlockRelaxed,
    /// The guest is entered with a relaxed store.
    GuestEnterRelaxed,
    /// The guest is left with a relaxed exchange.
    GuestLeaveRelaxed,
    /// A vCPU announces its intent without the barrier before it verifies.
    AnnounceWithoutFence,
    /// An intent is announced with a relaxed store.
    AnnounceRelaxed,
    /// An intent is cleared with a relaxed store.
    ClearRelaxed,
    /// An intent is cleared without the barrier before the look for who waits.
    ClearWithoutFence,
    /// An invalidation looks at the announcements without the barrier before.
    DrainWithoutFence,
    /// An invalidation does not wait for the announcements of its range.
    BeginWithoutDrain,
    /// It does not look at announcements in the last region that it touches.
    DrainForgetsLastRegion,
    /// It does not look at announcements of blocks that span regions.
    DrainForgetsSpanning,
    /// `verify` does not look at the sequence again when it has read the ranges.
    VerifyLooksOnce,
    /// `verify` reads count and ranges with relaxed loads.
    VerifyRelaxed,
    /// `begin` writes ranges and count with relaxed stores.
    BeginRelaxed,
    /// An invalidation lets nobody go first, however often they were retried.
    NoTurns,
    /// A vCPU keeps its claim when another has installed what it waited for.
    TriedClaimStays,
    /// A claim is given back, and who waits for it is not woken.
    GiveBackWithoutWake,
    /// A claim is given back without the barrier before the look for who waits.
    GiveBackWithoutFence,
    /// Frames whose writes are noticed by marks are protected for the log without a look at the marks.
    TrackingForgetsMarks,
    /// A walk that ends in a panic takes what it owes the vCPUs with it: a flush, a reload.
    PanicForgetsDebt,
    /// A table is freed without waiting for those who walk.
    FreeWithoutQuiescence,
    /// Roots are replaced, and no vCPU is asked to reload.
    ReloadLeftOut,
    /// A new vCPU enters the guest with the root that was read before it was made.
    NewVcpuKeepsRoot,
    /// vCPUs are asked to reload before the roots are replaced.
    ReloadBeforeSwap,
    /// A flush leaves out the last frame of its range.
    FlushForgetsLastFrame,
    /// The flush before a table is freed leaves pointers to it cached.
    FlushKeepsTables,
    /// A flush is requested before it is said of what.
    FlushWidenedLate,
    /// It is said of what with a relaxed exchange.
    FlushWidenedRelaxed,
    /// A round of the dirty log protects frames before it takes their bits.
    ProtectBeforeTake,
    /// A reset of the dirty rings does not have the next write to a frame noticed.
    RingResetUnprotected,
    /// A fault sets the bit of the dirty log before it makes the entry writable.
    MarkBeforeInstall,
    /// The fast path makes an entry writable and says nothing to the dirty log.
    FastFaultUnlogged,
    /// The fast path does not ask whether the frame is private or shared.
    FastFaultIgnoresPrivacy,
    /// A zap gives the lock up without logging the written frames that it has come by.
    WrittenForgotten,
    /// The primary MMU discards pages without an invalidation.
    DiscardWithoutInvalidation,
    /// The primary MMU evicts pages without an invalidation.
    EvictWithoutInvalidation,
    /// What was discarded comes back as it was, not as zeros.
    DiscardKeepsBytes,
    /// A page that the store has refused is freed.
    FreeUnstored,
}

#[cfg(feature = "mutations")]
static ACTIVE: core::sync::atomic::AtomicU32 = core::sync::atomic::AtomicU32::new(0);

/// The ordering that a rule asks for; relaxed where the rule is switched off.
#[inline]
pub(crate) fn unless(mutation: Mutation, ordering: Ordering) -> Ordering {
    if active(mutation) { Ordering::Relaxed } else { ordering }
}

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
