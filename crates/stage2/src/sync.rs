//! The atomics that the crate runs on, named in one place.
//!
//! # Orderings
//!
//! | word | access | ordering | pairs with, and what that gives |
//! |---|---|---|---|
//! | entry | link a table, install or change a leaf | AcqRel, Acquire on failure | a walk's Acquire: who follows a link sees the table zeroed, who reads a leaf sees the page filled |
//! | entry | take a leaf away | AcqRel | the page's owner comes after every change of the entry before it |
//! | entry | walk | Acquire | links and installs |
//! | counts of tables | all | Relaxed | nothing: they are a limit and a statistic |
//! | blocks that were fetched from | all | Relaxed | nothing: what they say is looked up in the tables |
//!
//! Under `--cfg shuttle` a thread may lose its turn before every access of an entry, and every schedule is shuttle's.

#[cfg(not(shuttle))]
pub(crate) use core::sync::atomic::AtomicU64;
/// A word that is no entry.
pub(crate) use core::sync::atomic::AtomicU64 as Word;
pub(crate) use core::sync::atomic::{AtomicUsize, Ordering};
#[cfg(shuttle)]
pub use scheduled::AtomicU64;

/// One turn of waiting for a frozen entry, whose owner holds no lock that the waiter could hold.
#[cfg(not(shuttle))]
pub(crate) fn spin() {
    core::hint::spin_loop();
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
