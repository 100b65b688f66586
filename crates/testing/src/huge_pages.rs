//! The system's pool of 2 MiB pages, which tests of several crates, processes and users share.
//!
//! A test claims the pages that it needs before it counts on them, and keeps the claim until nothing of it uses them
//! any more. Claims exclude each other, whatever thread, process or user makes them: the next one waits. What makes
//! them wait is `flock` on the pool's own directory in sysfs. Every user can open it, nobody has to create it, and it
//! is the same one whatever the temporary directory is. The kernel takes the lock from a test that dies; the pool that
//! such a test has raised stays raised.
//!
//! # What a claim is not
//!
//! It keeps out who asks for one, and nobody else. A virtual machine, or an `afterimage run` by hand, takes pages when it
//! likes, of those that were counted too; only what a mapping has reserved is safe from it. Then the test fails, and
//! rightly says that there were too few. `flock DIRECTORY COMMAND` makes a command wait for its turn like a test.
//!
//! # When pages are free again
//!
//! At once: the last `munmap` or `close` frees them before it returns, and a process has given back all of its own by
//! the time that `wait` tells of its end. So a test's memory goes first, with what its threads still hold of it, and
//! its claim last.
//!
//! # Order
//!
//! A test that must also be the only one of its binary is that first, and claims second. One claim to a thread: the
//! second would wait for the first for ever, and panics instead.

use core::cell::Cell;
use core::marker::PhantomData;
use std::io;

use rustix::fd::OwnedFd;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::retry_on_intr;

use crate::skip;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// 2 MiB pages that no other test takes, until this is dropped. Drop it after all that uses them.
#[derive(Debug)]
pub struct HugePages {
    // Dropped in this order.
    _raised: Option<Raised>,
    _turn: Turn,
}

impl HugePages {
    /// Waits for all other claims to end, and sees to it that `pages` are free then: as root it raises the pool, and
    /// lowers it again at the end. If they are not free, says that `test` is skipped.
    ///
    /// # Panics
    ///
    /// If the thread has a claim already; if `AFTERIMAGE_NO_SKIP` is set, instead of skipping.
    #[track_caller]
    pub fn claim(test: &str, pages: u64) -> Option<Self> {
        let turn = Turn::wait()
            .inspect_err(|error| skip(test, format!("no pool of 2 MiB pages can be locked: {error}")))
            .ok()?;
        let mut raised = None;
        let lacking = pages.saturating_sub(free());
        if lacking > 0 {
            let more = Raised::by(lacking)
                .inspect_err(|error| skip(test, format!("{lacking} more huge pages are needed: {error}")));
            raised = Some(more.ok()?);
        }
        if free() < pages {
            skip(test, format!("{pages} huge pages are needed, and {} are free", free()));
            return None;
        }
        Some(Self { _raised: raised, _turn: turn })
    }

    /// Pages that a mapping can have now: at least those that were claimed, unless somebody without a claim took some.
    #[must_use]
    pub fn free(&self) -> u64 {
        free()
    }
}

/// The lock. Released when dropped, which must happen in the thread that waited for it.
#[derive(Debug)]
struct Turn {
    pool: OwnedFd,
    _of_this_thread: PhantomData<*const ()>,
}

thread_local! {
    static HAS_TURN: Cell<bool> = const { Cell::new(false) };
}

impl Turn {
    #[track_caller]
    fn wait() -> io::Result<Self> {
        assert!(
            !HAS_TURN.get(),
            "this thread has huge pages already: let it claim all that it needs at once"
        );
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let pool = rustix::fs::open(POOL, flags, Mode::empty())?;
        retry_on_intr(|| flock(&pool, FlockOperation::LockExclusive))?;
        HAS_TURN.set(true);
        Ok(Self { pool, _of_this_thread: PhantomData })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // To close it is not enough: a child that another thread has just forked holds it too, until it executes.
        let _ = flock(&self.pool, FlockOperation::Unlock);
        HAS_TURN.set(false);
    }
}

/// A pool with more pages than before. When dropped it has its old size, unless somebody else has changed it.
#[derive(Debug)]
struct Raised {
    from: u64,
    to: u64,
}

impl Raised {
    /// Asks for so many pages more. There may be fewer, where memory is in pieces.
    fn by(pages: u64) -> io::Result<Self> {
        let from = size();
        resize(from + pages)?;
        Ok(Self { from, to: size() })
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        if size() == self.to {
            // A page that somebody uses stays until it is given back.
            let _ = resize(self.from);
        }
    }
}

fn count(name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("{POOL}/{name}"));
    text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Pages that are neither used nor reserved.
fn free() -> u64 {
    count("free_hugepages").saturating_sub(count("resv_hugepages"))
}

/// Pages that the pool is to have: those beyond go when they are given back, and cannot be asked for.
fn size() -> u64 {
    count("nr_hugepages").saturating_sub(count("surplus_hugepages"))
}

fn resize(pages: u64) -> io::Result<()> {
    std::fs::write(format!("{POOL}/nr_hugepages"), pages.to_string())
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
    use std::panic::catch_unwind;
    use std::thread;

    use super::*;

    /// Whether somebody has the pool.
    fn is_taken() -> bool {
        let pool = rustix::fs::open(POOL, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).expect("the pool");
        flock(&pool, FlockOperation::NonBlockingLockExclusive) == Err(rustix::io::Errno::WOULDBLOCK)
    }

    /// The pool, for tests that change its size, which only root can.
    fn turn_of_root(test: &str) -> Option<Turn> {
        if !rustix::process::geteuid().is_root() {
            skip(test, "only root can change the pool");
            return None;
        }
        Turn::wait().inspect_err(|error| skip(test, error)).ok()
    }

    #[test]
    fn claims_exclude_each_other() {
        let test = "claims_exclude_each_other";
        let claimed = AtomicBool::new(false);
        let claim_and_look = || {
            for _ in 0..8 {
                let Some(claim) = HugePages::claim(test, 0) else { return };
                assert!(is_taken());
                assert!(!claimed.swap(true, Relaxed), "two claims at once");
                thread::yield_now();
                claimed.store(false, Relaxed);
                drop(claim);
            }
        };
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(claim_and_look);
            }
        });
    }

    #[test]
    fn a_second_claim_of_a_thread_panics_instead_of_waiting_for_the_first() {
        let test = "a_second_claim_of_a_thread_panics_instead_of_waiting_for_the_first";
        let Some(first) = HugePages::claim(test, 0) else { return };
        assert!(catch_unwind(|| HugePages::claim(test, 0)).is_err());
        assert!(is_taken(), "the first is still there");
        drop(first);
        assert!(HugePages::claim(test, 0).is_some(), "one after the other is right");
    }

    #[test]
    fn a_raised_pool_is_lowered_again() {
        let Some(_turn) = turn_of_root("a_raised_pool_is_lowered_again") else { return };
        let before = size();
        let raised = Raised::by(2).expect("root may");
        assert_eq!((raised.from, raised.to), (before, size()));
        assert!(raised.to <= before + 2);
        drop(raised);
        assert_eq!(size(), before);
    }

    #[test]
    fn a_pool_that_somebody_else_has_changed_is_left_alone() {
        let Some(_turn) = turn_of_root("a_pool_that_somebody_else_has_changed_is_left_alone") else { return };
        let before = size();
        let raised = Raised::by(2).expect("root may");
        resize(before + 1).expect("root may");
        let changed = size() != raised.to;
        drop(raised);
        let after = size();
        resize(before).expect("root may");
        assert!(!changed || after == before + 1, "{before} pages, then {after}");
    }

    /// Root's claims and those of others exclude each other, and only root's raise the pool.
    #[test]
    fn an_ordinary_user_claims_what_is_there() {
        let test = "an_ordinary_user_claims_what_is_there";
        let Some(turn) = turn_of_root(test) else { return };
        drop(turn);
        let by_nobody = thread::spawn(move || {
            // The raw system call: the other threads stay who they are.
            rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(65534)).expect("root may");
            let claim = HugePages::claim(test, 0).expect("anybody may");
            assert!(is_taken());
            assert_eq!(Raised::by(1).expect_err("only root may").kind(), io::ErrorKind::PermissionDenied);
            drop(claim);
        });
        by_nobody.join().expect("the claim of an ordinary user");
    }
}
