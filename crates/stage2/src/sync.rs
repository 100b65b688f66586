//! The atomics that the crate runs on, named in one place.
//!
//! # Orderings
//!
//! | word | access | ordering | pairs with, and what that gives | shown by |
//! |---|---|---|---|---|
//! | entry | walk | Acquire | links and installs | `WalkRelaxed` |
//! | entry | link a table, install a leaf, allow more | AcqRel | Release: who follows a link sees the table zeroed, who reads a leaf sees the page filled. Acquire: (1) | `InstallWithoutRelease` |
//! | entry | take a leaf away, protect it | AcqRel, Acquire on failure | Acquire: the page's owner comes after every change of the entry before it. Release: (1) | `TakeWithoutAcquire` |
//! | entry | mark a leaf | Acquire | an install of the same or of another page meanwhile | `MarkRelaxed` |
//! | entry | age a leaf | Relaxed | nothing: the marks are advice | |
//! | entry | freeze, and look what to freeze | Acquire | installs, for who finds what the frozen words become | `FreezeRelaxed` |
//! | entry | give back what was frozen | Release | a walk's Acquire: a plain store hides the install before it | `ThawRelaxed` |
//! | entry | table for leaf, leaf for table | Release | a walk's Acquire: who follows the link finds the parts, who reads the leaf the pages | `ReplaceRelaxed` |
//! | entry | make again what was broken | Release | the same | `PublishRelaxed` |
//! | entry | unlink a table | Relaxed | nothing: who frees the table waits for the walkers | |
//! | era | end, behind the exchange that takes a table out | Release | a walk's Acquire: who walks in the new era does not find the table | `EraRelaxed` |
//! | root | replace | AcqRel | a walk's Acquire: who finds the new root sees it zeroed | |
//! | counts of tables | all | Relaxed | nothing: they are a limit and a statistic | |
//! | blocks that were fetched from | all | Relaxed | nothing: what they say is looked up in the tables | |
//!
//! (1) A round of the dirty log takes a bit and then protects; a fault makes writable and then sets the bit. Whoever undoes the
//! other's exchange comes after it, with its bit, too. loom does not reorder exchanges, and so cannot show what happens without.
//!
//! An exchange keeps what was released before it (release sequences), so that one that adds nothing may be weaker than those around it.
//!
//! Under `--cfg loom_tables` entries are loom's, and `tests/loom` takes every schedule of a few operations. Under `--cfg shuttle` a
//! thread may lose its turn before every access of an entry, and every schedule is shuttle's.

#[cfg(not(any(shuttle, loom_tables)))]
pub(crate) use core::sync::atomic::AtomicU64;
/// A word that is no entry.
pub(crate) use core::sync::atomic::AtomicU64 as Word;
#[cfg(not(loom_tables))]
pub(crate) use core::sync::atomic::AtomicUsize;
pub(crate) use core::sync::atomic::Ordering;
#[cfg(loom_tables)]
pub use loom::sync::atomic::AtomicU64;
#[cfg(shuttle)]
pub use scheduled::AtomicU64;

/// One turn of waiting for a frozen entry, whose owner holds no lock that the waiter could hold.
#[cfg(not(any(shuttle, loom_tables)))]
pub(crate) fn spin() {
    core::hint::spin_loop();
}

/// One turn of waiting for a frozen entry, whose owner holds no lock that the waiter could hold.
#[cfg(loom_tables)]
pub(crate) fn spin() {
    loom::thread::yield_now();
}

/// One turn of waiting for a frozen entry, whose owner holds no lock that the waiter could hold.
#[cfg(shuttle)]
pub(crate) fn spin() {
    shuttle::thread::yield_now();
}

#[cfg(shuttle)]
mod scheduled {
    use core::sync::atomic::{self, Ordering};

    /// The atomic itself, in memory that tables lie in, with a point before each access where another thread may get its turn.
    /// One thread runs at a time, so the order of accesses is that of the schedule.
    #[derive(Debug)]
    #[repr(transparent)]
    pub struct AtomicU64(atomic::AtomicU64);

    fn point() {
        shuttle::sync::atomic::AtomicBool::new(false).load(Ordering::SeqCst);
    }

    impl AtomicU64 {
        /// See [`atomic::AtomicU64::new`].
        pub const fn new(value: u64) -> Self {
            Self(atomic::AtomicU64::new(value))
        }

        /// See [`atomic::AtomicU64::load`].
        pub fn load(&self, ordering: Ordering) -> u64 {
            point();
            self.0.load(ordering)
        }

        /// See [`atomic::AtomicU64::store`].
        pub fn store(&self, value: u64, ordering: Ordering) {
            point();
            self.0.store(value, ordering);
        }

        /// See [`atomic::AtomicU64::compare_exchange`].
        pub fn compare_exchange(
            &self,
            old: u64,
            new: u64,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u64, u64> {
            point();
            self.0.compare_exchange(old, new, success, failure)
        }
    }
}
