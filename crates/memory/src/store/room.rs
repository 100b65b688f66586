//! How much memory a store's entries may take, and take.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The account of one store, exact: a class takes from it before it grows, and gives to it when it has shrunk.
///
/// What else it knows are hints: whether another try is worth while after the store was full.
#[derive(Debug)]
pub(super) struct Room {
    limit: u64,
    used: AtomicU64,
    /// How often pages have left the store.
    departures: AtomicU64,
    /// One more than `departures` was when a page was last refused.
    refused: AtomicU64,
}

impl Room {
    /// Room for `limit` bytes.
    pub(super) fn new(limit: u64) -> Self {
        Self { limit, used: AtomicU64::new(0), departures: AtomicU64::new(0), refused: AtomicU64::new(0) }
    }

    /// The most bytes that may be taken.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Takes `bytes`, and says whether there was room for them.
    pub(super) fn take(&self, bytes: u64) -> bool {
        let more = |used: u64| used.checked_add(bytes).filter(|used| *used <= self.limit);
        bytes == 0 || self.used.fetch_update(Relaxed, Relaxed, more).is_ok()
    }

    /// Gives `bytes` back.
    pub(super) fn give(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Relaxed);
    }

    /// Pages have left the store.
    pub(super) fn departed(&self) {
        // Without a limit nobody asks, and the line stays everybody's.
        if self.limit != u64::MAX {
            self.departures.fetch_add(1, Relaxed);
        }
    }

    /// How often pages have left.
    pub(super) fn departures(&self) -> u64 {
        self.departures.load(Relaxed)
    }

    /// A page was refused, which was tried when pages had left so often.
    pub(super) fn refuse(&self, departures: u64) {
        self.refused.store(departures + 1, Relaxed);
    }

    /// Whether a page was refused, and none has left since.
    pub(super) fn is_full(&self) -> bool {
        self.refused.load(Relaxed) == self.departures() + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_taken_than_there_is() {
        let room = Room::new(100);
        assert!(room.take(60) && room.take(40) && room.take(0));
        assert!(!room.take(1) && !room.take(u64::MAX));
        room.give(10);
        assert!(room.take(10) && !room.take(1));
    }

    #[test]
    fn it_is_full_from_a_refusal_until_a_page_leaves() {
        let room = Room::new(0);
        assert!(!room.is_full());
        let before = room.departures();
        room.refuse(before);
        assert!(room.is_full());
        room.departed();
        assert!(!room.is_full());
        // One that left while the other was being refused.
        let before = room.departures();
        room.departed();
        room.refuse(before);
        assert!(!room.is_full());
    }
}
