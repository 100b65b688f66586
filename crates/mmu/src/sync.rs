//! The one place that knows which atomics, fences and cells the crate runs on.
//!
//! Everything else names them through this module, so that under `--cfg loom` the whole engine runs on loom's, but
//! what is no part of a protocol (the numbers of machines, an intent's generation, which mutation is on).
//!
//! # Orderings
//!
//! What each ordering is for, and what it pairs with. "Lock" is `mmu_lock`.
//!
//! | word | access | ordering | pairs with, and what that gives |
//! |---|---|---|---|
//! | lock `rin` | reader arrives, add | Acquire | the writer's Release when it leaves: its changes are seen |
//! | lock `rout` | reader leaves, add | Release | the next writer's Acquire: it sees what readers installed |
//! | lock `wout` | writer passes the turn on, compare-exchange | Release | the next writer's Acquire |
//! | invalidations' words | raise, under lock | Release | `verify`'s Acquire without the lock: who reads the new count, with an announcement, finds the range; by hints whenever it gets there |
//! | invalidations' words | drop and bump, under lock | Release | `snapshot`'s Acquire: who sees the new number sees the new pages |
//! | `start`, `end` | under lock | Release | `verify`'s Acquire: who reads bounds that were changed by a later begin reads the sequence that the earlier end bumped |
//! | exact ranges, `untracked` | under lock | Release | `verify`'s Acquire: as for the bounds; an end empties them behind the bump |
//! | intent word | announce: store + light barrier | Release | begin's words + heavy barrier: the vCPU sees the range, or the invalidation sees the announcement. Release: who waits for the announcement before this one may find this one instead |
//! | intent word | clear: store | Release | the drain's Acquire: the zap finds what was installed |
//! | visitor `taken` | taken: compare-exchange; given back: store | Acquire; Release | each other: a visitor goes on with the generations of the one before |
//! | claim word | claim: store | Relaxed | nothing: no safety rests on it |
//! | claim word | give back, take away: compare-exchange | Release | the look of who waits, Acquire |
//! | active events | start: compare-exchange | Acquire | the updater's turn (AcqRel): who joins the other count knows what was announced or published |
//! | active events | end, sub | Release | the updater's turn and looks (Acquire): what events did with the old slots came before they are freed |
//! | `coming` | announce / read | Release / Acquire | contents of the slot set |
//! | `released` | set / read | Release / Acquire | what came before the release |
//! | dirty bitmap | set, or | Release | the collector's AcqRel when it takes the bit: it sees the exchange that made the entry writable |
//! | dirty ring, `state` | push, collect: store | Release | the Acquire of who collects, and who resets: what the entry says |
//! | dirty ring, `pushed`, `reset`, `abandoned` | store | Release | Acquire loads: the vCPU finds reset entries empty; what was pushed before is found |
//! | intent `waiters` | mark + heavy barrier; clear + light barrier, look | Relaxed | each other: the waiter sees the word cleared, or the vCPU sees the mark and wakes |
//! | claim `waiters` | mark + `fence(SeqCst)`; give back + `fence(SeqCst)`, look | Relaxed | each other: the invalidation sees the claim given back, or the vCPU sees the mark and wakes |
//! | hint | all loads | Relaxed | nothing: a hint gives no right, only a reason to retry |
//! | `ended` | waiter marks; `end` bumps | AcqRel | each other: one of the two sees the other (no lost wake-up) |
//! | section's word | an intent word: announced, cleared | | the updater's pointer swap + heavy barrier: the fault sees the new slots, or the updater sees the section; installs of a section that is over happened before |
//! | slots pointer | publish / read | Release / Acquire | contents of the slot set |
//! | flush words | widen: compare-exchange | Release | the vCPU's Acquire when it takes them: what it walks after it has forgotten is as the zap left it |
//! | vCPU `mode` | in guest: store + `fence(SeqCst)` | Release | requester's `requests` + `fence(SeqCst)`: the vCPU sees the request, or the requester sees it in the guest and kicks. Release: as for the intent word |
//! | vCPU `mode` | leave: swap | Release | the requester's Acquire: the vCPU's last guest access came before |
//! | counters | all | Relaxed | nothing: they are statistics |

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, compiler_fence, fence};
/// Loom has no barrier that one thread executes for another: a full fence on both sides stands for it.
#[cfg(loom)]
pub(crate) use loom::sync::atomic::fence as compiler_fence;
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};

/// The 32-bit word that a thread can park on: [`core::sync::atomic::AtomicU32`] outside loom.
#[cfg(not(loom))]
pub type ParkWord = core::sync::atomic::AtomicU32;
/// The 32-bit word that a thread can park on: loom's, under `--cfg loom`.
#[cfg(loom)]
pub type ParkWord = loom::sync::atomic::AtomicU32;

/// Data behind a lock of the engine's own kind; loom's, under loom. For what is changed rarely.
#[cfg(not(loom))]
pub(crate) struct Shared<P: crate::Platform, T>(lock_api::RwLock<crate::RawMmuLock<P>, T>);

#[cfg(not(loom))]
impl<P: crate::Platform, T> Shared<P, T> {
    pub(crate) fn new(value: T) -> Self {
        Self(lock_api::RwLock::new(value))
    }

    pub(crate) fn read(&self) -> impl core::ops::Deref<Target = T> + '_ {
        self.0.read()
    }

    pub(crate) fn write(&self) -> impl core::ops::DerefMut<Target = T> + '_ {
        self.0.write()
    }
}

/// Data behind a lock of the engine's own kind; loom's, under loom. For what is changed rarely.
#[cfg(loom)]
pub(crate) struct Shared<P: crate::Platform, T>(loom::sync::RwLock<T>, core::marker::PhantomData<fn() -> P>);

#[cfg(loom)]
impl<P: crate::Platform, T> Shared<P, T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::sync::RwLock::new(value), core::marker::PhantomData)
    }

    pub(crate) fn read(&self) -> impl core::ops::Deref<Target = T> + '_ {
        self.0.read().expect("no loom thread panics while it holds this lock")
    }

    pub(crate) fn write(&self) -> impl core::ops::DerefMut<Target = T> + '_ {
        self.0.write().expect("no loom thread panics while it holds this lock")
    }
}

/// Keeps a value on cache lines of its own: 128 bytes, since x86 fetches lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct CachePadded<T>(pub(crate) T);

impl<T> core::ops::Deref for CachePadded<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}
