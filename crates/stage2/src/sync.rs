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

pub(crate) use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// One turn of waiting for a frozen entry, whose owner holds no lock that the waiter could hold.
pub(crate) fn spin() {
    core::hint::spin_loop();
}
