//! The words of a memory object's pages: one for each page, with its state and its lock.
//!
//! | bits | meaning |
//! |---|---|
//! | 0..=2 | [`State`] |
//! | 3 | locked |
//! | 4 | someone sleeps until it is unlocked |
//! | 5 | referenced: the guest faulted on it since the clock hand last came by |
//!
//! The state changes only with the page locked. Locks are taken in ascending order, and by whoever fills a page, who
//! never waits for a second one. Nobody waits for a device with a page locked: a source is read before, and what was
//! read counts only if the page is still in [`State::Source`] then. No page ever comes back to that state.
//!
//! ```text
//! Source ──fault──► Resident ──evict──► Stored ──fault──► Resident
//!    │                 │  ▲                │
//!    └──discard──► Zero ◄─┼────discard─────┘       Zero ──fault──► Resident (zeros)
//!                         │
//! Source, Stored, Resident ──content lost──► Poisoned ──discard──► Zero
//! ```

use core::sync::atomic::{AtomicU32, Ordering};

use afterimage_mmu::Platform;
use afterimage_uffd::Linux;

/// Where a page's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// In the source, not yet touched.
    Source = 0,
    /// In memory, mapped or not.
    Resident = 1,
    /// In the store: the host took it, and it comes back as it was.
    Stored = 2,
    /// Nowhere: it is zeros. The guest gave it up, or it never had other bytes.
    Zero = 3,
    /// Lost.
    Poisoned = 4,
}

const STATE: u32 = 7;
const LOCKED: u32 = 8;
const WAITED: u32 = 16;
const REFERENCED: u32 = 32;

impl State {
    fn of(word: u32) -> Self {
        match word & STATE {
            0 => Self::Source,
            1 => Self::Resident,
            2 => Self::Stored,
            3 => Self::Zero,
            _ => Self::Poisoned,
        }
    }
}

/// What the clock hand does with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clock {
    /// Nothing: there is nothing to take, or someone is at it.
    Skip,
    /// The guest came back for it: it loses its mark, and stays for a round.
    Spare,
    /// Nobody came back: it goes.
    Take,
}

#[derive(Debug)]
pub(crate) struct PageWord(AtomicU32);

impl PageWord {
    pub(crate) fn new(state: State) -> Self {
        Self(AtomicU32::new(state as u32))
    }

    /// The state as it was a moment ago.
    #[inline]
    pub(crate) fn peek(&self) -> State {
        State::of(self.0.load(Ordering::Acquire))
    }

    /// Whether the page is resident or could become so before it can be locked. `false` is certain.
    #[inline]
    pub(crate) fn may_be_resident(&self) -> bool {
        let word = self.0.load(Ordering::Acquire);
        word & LOCKED != 0 || State::of(word) == State::Resident
    }

    /// If the page is resident and nobody is changing it: marks it referenced. `false` otherwise.
    #[inline]
    pub(crate) fn touch_resident(&self) -> bool {
        let word = self.0.load(Ordering::Acquire);
        if word & (STATE | LOCKED) != State::Resident as u32 {
            return false;
        }
        if word & REFERENCED == 0 {
            self.0.fetch_or(REFERENCED, Ordering::Relaxed);
        }
        true
    }

    /// What the clock hand does with the page.
    pub(crate) fn clock(&self) -> Clock {
        let word = self.0.load(Ordering::Relaxed);
        if word & (STATE | LOCKED) != State::Resident as u32 {
            Clock::Skip
        } else if word & REFERENCED == 0 {
            Clock::Take
        } else {
            Clock::Spare
        }
    }

    /// The clock hand has passed: takes the page's mark away.
    pub(crate) fn unmark(&self) {
        self.0.fetch_and(!REFERENCED, Ordering::Relaxed);
    }

    /// Locks the page if nobody has it.
    pub(crate) fn try_lock(&self) -> Option<PageLock<'_>> {
        let word = self.0.load(Ordering::Relaxed);
        let free = word & LOCKED == 0
            && self.0.compare_exchange(word, word | LOCKED, Ordering::Acquire, Ordering::Relaxed).is_ok();
        free.then(|| PageLock { word: self })
    }

    /// Locks the page.
    pub(crate) fn lock(&self) -> PageLock<'_> {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            if word & LOCKED == 0 {
                match self.0.compare_exchange_weak(word, word | LOCKED, Ordering::Acquire, Ordering::Relaxed)
                {
                    Ok(_) => return PageLock { word: self },
                    Err(now) => word = now,
                }
                continue;
            }
            let marked = word | WAITED;
            match self.0.compare_exchange_weak(word, marked, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => {
                    Linux::wait(&self.0, marked);
                    word = self.0.load(Ordering::Relaxed);
                }
                Err(now) => word = now,
            }
        }
    }

    /// The lock that was [kept](PageLock::keep), to whoever kept it.
    pub(crate) fn kept(&self) -> PageLock<'_> {
        debug_assert!(self.0.load(Ordering::Relaxed) & LOCKED != 0, "the page was kept locked");
        PageLock { word: self }
    }
}

/// A locked page.
#[derive(Debug)]
pub(crate) struct PageLock<'p> {
    word: &'p PageWord,
}

impl PageLock<'_> {
    /// Leaves the page locked; [`PageWord::kept`] gives the lock back.
    pub(crate) fn keep(self) {
        core::mem::forget(self);
    }

    pub(crate) fn state(&self) -> State {
        State::of(self.word.0.load(Ordering::Relaxed))
    }

    pub(crate) fn is_referenced(&self) -> bool {
        self.word.0.load(Ordering::Relaxed) & REFERENCED != 0
    }

    /// Moves the page to `state`; a page that becomes resident counts as referenced.
    pub(crate) fn set(&self, state: State) {
        let referenced = if state == State::Resident { REFERENCED } else { 0 };
        // Others may mark the word as waited for at the same time, but change nothing else of a locked page than
        // the referenced bit, which this sets anyway.
        let mut word = self.word.0.load(Ordering::Relaxed);
        loop {
            let next = word & !(STATE | REFERENCED) | state as u32 | referenced;
            match self.word.0.compare_exchange_weak(word, next, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => word = now,
            }
        }
    }
}

impl Drop for PageLock<'_> {
    fn drop(&mut self) {
        let before = self.word.0.fetch_and(!(LOCKED | WAITED), Ordering::Release);
        if before & WAITED != 0 {
            Linux::wake_all(&self.word.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_lock_excludes_and_wakes() {
        let word = PageWord::new(State::Zero);
        let inside = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        let lock = word.lock();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        lock.set(State::Stored);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(word.peek(), State::Stored);
        let lock = word.lock();
        assert!(word.try_lock().is_none());
        drop(lock);
        assert!(word.try_lock().is_some());
    }

    #[test]
    fn a_kept_lock_excludes_until_it_is_given_back() {
        let word = PageWord::new(State::Source);
        word.lock().keep();
        assert!(word.try_lock().is_none());
        assert!(word.may_be_resident());
        word.kept().set(State::Resident);
        assert_eq!(word.try_lock().map(|lock| lock.state()), Some(State::Resident));
    }

    #[test]
    fn the_clock_takes_what_nobody_came_back_for() {
        let word = PageWord::new(State::Zero);
        assert_eq!(word.clock(), Clock::Skip);
        word.lock().set(State::Resident);
        assert_eq!(word.clock(), Clock::Spare);
        word.unmark();
        assert_eq!(word.clock(), Clock::Take);
        assert!(word.touch_resident());
        assert_eq!(word.clock(), Clock::Spare);
        let _lock = word.lock();
        assert_eq!(word.clock(), Clock::Skip);
        assert!(!word.touch_resident());
    }
}
