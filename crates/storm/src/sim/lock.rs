//! `mmu_lock` in virtual time: phase-fair, as the engine's own.
//!
//! A reader that arrives while a writer is in or waits is let in when that writer leaves, with all that came by then; the
//! next writer waits for those.

use std::collections::VecDeque;

/// What a change of the lock lets in.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Admitted {
    /// Readers, each with the time since when it waited.
    pub(super) readers: Vec<(usize, u64)>,
    /// A writer, likewise.
    pub(super) writer: Option<(usize, u64)>,
}

#[derive(Debug, Default)]
pub(super) struct Lock {
    readers: usize,
    writer: Option<usize>,
    waiting_readers: Vec<(usize, u64)>,
    waiting_writers: VecDeque<(usize, u64)>,
}

impl Lock {
    /// Whether the reader is in at once.
    pub(super) fn read(&mut self, who: usize, now: u64) -> bool {
        let free = self.writer.is_none() && self.waiting_writers.is_empty();
        if free {
            self.readers += 1;
        } else {
            self.waiting_readers.push((who, now));
        }
        free
    }

    pub(super) fn unlock_read(&mut self) -> Admitted {
        self.readers -= 1;
        self.admit(Vec::new())
    }

    /// Whether the writer is in at once.
    pub(super) fn write(&mut self, who: usize, now: u64) -> bool {
        let free = self.writer.is_none() && self.readers == 0 && self.waiting_writers.is_empty();
        if free {
            self.writer = Some(who);
        } else {
            self.waiting_writers.push_back((who, now));
        }
        free
    }

    pub(super) fn unlock_write(&mut self) -> Admitted {
        self.writer = None;
        let readers = core::mem::take(&mut self.waiting_readers);
        self.readers += readers.len();
        self.admit(readers)
    }

    fn admit(&mut self, readers: Vec<(usize, u64)>) -> Admitted {
        let mut writer = None;
        if self.readers == 0 && self.writer.is_none() {
            writer = self.waiting_writers.pop_front();
            self.writer = writer.map(|(who, _)| who);
        }
        Admitted { readers, writer }
    }

    /// The writer that holds it.
    pub(super) fn writer(&self) -> Option<usize> {
        self.writer
    }

    /// Whether somebody waits for the writer that holds it.
    pub(super) fn is_contended(&self) -> bool {
        !self.waiting_readers.is_empty() || !self.waiting_writers.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_alternate() {
        let mut lock = Lock::default();
        assert!(lock.read(1, 0));
        assert!(!lock.write(2, 1), "a reader is in");
        assert!(!lock.read(3, 2), "a writer waits");
        assert_eq!(lock.unlock_read(), Admitted { readers: vec![], writer: Some((2, 1)) });
        assert!(lock.is_contended() && lock.writer() == Some(2));
        assert!(!lock.write(4, 3));
        // The readers that waited, before the next writer.
        assert_eq!(lock.unlock_write(), Admitted { readers: vec![(3, 2)], writer: None });
        assert!(!lock.read(5, 4));
        assert_eq!(lock.unlock_read(), Admitted { readers: vec![], writer: Some((4, 3)) });
        assert_eq!(lock.unlock_write(), Admitted { readers: vec![(5, 4)], writer: None });
        assert_eq!(lock.unlock_read(), Admitted::default());
        assert!(lock.write(6, 5));
    }
}
