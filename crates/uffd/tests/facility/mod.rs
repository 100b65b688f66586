//! What the tests need of the machine, and threads that touch guest memory.
//!
//! A test that lacks something skips. Waiting is bounded by [`PATIENCE`], so that a thread that nobody wakes is a
//! failure and not a hang.

#![expect(dead_code, reason = "each test binary uses a part of this")]

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use afterimage_mmu::{Hva, PageSize};
use afterimage_testing::{HugePages, skip};
use afterimage_uffd::{
    Access, Event, EventBuffer, FaultKind, Features, Mapping, OpenOptions, Resolved, Tid, Uffd, memfd,
};

/// How long to wait for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A userfaultfd with these features.
pub(crate) fn uffd(test: &str, features: Features) -> Option<Uffd> {
    OpenOptions::new().require(features).open().inspect_err(|error| skip(test, error)).ok()
}

/// The kinds of memory that a guest can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Anonymous,
    Memfd,
    HugeAnonymous,
    HugeMemfd,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Anonymous, Self::Memfd, Self::HugeAnonymous, Self::HugeMemfd];
    pub(crate) const SMALL: [Self; 2] = [Self::Anonymous, Self::Memfd];
    pub(crate) const SHARED: [Self; 2] = [Self::Memfd, Self::HugeMemfd];

    pub(crate) fn page(self) -> PageSize {
        match self {
            Self::Anonymous | Self::Memfd => PageSize::Size4K,
            Self::HugeAnonymous | Self::HugeMemfd => PageSize::Size2M,
        }
    }

    /// Absent memory of this kind; skips where there are no huge pages to be had. Those are claimed: a test has one such
    /// memory at a time.
    pub(crate) fn map(self, name: &str, pages: u64) -> Option<Memory> {
        let test = format!("{name} ({self:?})");
        let claim = match self.page() {
            PageSize::Size2M => Some(HugePages::claim(&test, pages)?),
            _ => None,
        };
        let bytes = pages * self.page().bytes();
        let mapping = match self {
            Self::Anonymous | Self::HugeAnonymous => Mapping::anonymous(bytes, self.page()),
            Self::Memfd | Self::HugeMemfd => {
                memfd(name, bytes, self.page()).and_then(|file| Mapping::shared(&file, 0, bytes, self.page()))
            }
        };
        let mapping = mapping.map(Arc::new).inspect_err(|error| skip(&test, error)).ok()?;
        Some(Memory { mapping, claim })
    }
}

/// A mapping, and the claim to its huge pages.
#[derive(Debug)]
pub(crate) struct Memory {
    // Dropped in this order.
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) claim: Option<HugePages>,
}

impl Deref for Memory {
    type Target = Arc<Mapping>;

    fn deref(&self) -> &Arc<Mapping> {
        &self.mapping
    }
}

/// A page's worth of words, all `word`.
pub(crate) fn filled(page: PageSize, word: u64) -> Vec<u8> {
    word.to_ne_bytes().repeat(page.bytes() as usize / 8)
}

/// A thread that touches memory, and what came of it.
#[derive(Debug)]
pub(crate) struct Touch(Receiver<u64>);

impl Touch {
    /// Reads the word at `offset` in another thread.
    pub(crate) fn read(mapping: &Arc<Mapping>, offset: u64) -> Self {
        Self::spawn(mapping, move |mapping| mapping.word(offset).expect("inside").load(Relaxed))
    }

    /// Writes the word at `offset` in another thread, and returns `word`.
    pub(crate) fn write(mapping: &Arc<Mapping>, offset: u64, word: u64) -> Self {
        Self::spawn(mapping, move |mapping| {
            mapping.word(offset).expect("inside").store(word, Relaxed);
            word
        })
    }

    /// Runs `act` in another thread.
    pub(crate) fn spawn(mapping: &Arc<Mapping>, act: impl FnOnce(&Mapping) -> u64 + Send + 'static) -> Self {
        let (sender, receiver) = channel();
        let mapping = Arc::clone(mapping);
        thread::spawn(move || {
            let word = act(&mapping);
            drop(mapping);
            // Nobody listens if the test has failed.
            let _ = sender.send(word);
        });
        Self(receiver)
    }

    /// What it read, once it has.
    #[track_caller]
    pub(crate) fn finish(self) -> u64 {
        self.0.recv_timeout(PATIENCE).expect("the thread should have been woken")
    }

    /// Whether it is still at it.
    pub(crate) fn sleeps(&self) -> bool {
        self.0.try_recv().is_err()
    }
}

/// A page fault as the tests look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) address: Hva,
    pub(crate) access: Access,
    pub(crate) kind: FaultKind,
    pub(crate) thread: Option<Tid>,
}

/// Waits for one event.
#[track_caller]
pub(crate) fn next_event(uffd: &Uffd) -> Event {
    let mut buffer = EventBuffer::with_capacity(1);
    loop {
        assert!(uffd.wait_readable(Some(PATIENCE)).expect("poll"), "an event should have come");
        if let Some(event) = uffd.read_events(&mut buffer).expect("read").next() {
            return event;
        }
    }
}

/// Waits for one event, which must be a page fault.
#[track_caller]
pub(crate) fn next_fault(uffd: &Uffd) -> Fault {
    match next_event(uffd) {
        Event::PageFault { address, access, kind, thread } => Fault { address, access, kind, thread },
        other => panic!("a page fault should have come, and not {other:?}"),
    }
}

/// Repeats `act` until it is no longer held up by an event that was just read.
#[track_caller]
pub(crate) fn settled(mut act: impl FnMut() -> Resolved) -> Resolved {
    let start = std::time::Instant::now();
    loop {
        match act() {
            Resolved::Changing => assert!(start.elapsed() < PATIENCE, "still changing"),
            resolved => return resolved,
        }
        thread::yield_now();
    }
}
