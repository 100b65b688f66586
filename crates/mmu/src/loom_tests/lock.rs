//! `mmu_lock`: a writer is alone, nobody sleeps for ever, and what was done inside is seen.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use super::{RACE, STUCK, fails_without, holds};
use crate::lock::RawMmuLock;
use crate::mutation::Mutation;
use crate::platform::model::Loom;

/// A cell that loom watches, behind the lock.
struct Guarded {
    lock: RawMmuLock<Loom>,
    cell: UnsafeCell<()>,
}

impl Guarded {
    fn new() -> Arc<Self> {
        Arc::new(Self { lock: RawMmuLock::new(), cell: UnsafeCell::new(()) })
    }

    fn read(&self) {
        self.lock.read();
        self.cell.with(|_| ());
        self.lock.unlock_read();
    }

    fn try_read(&self) {
        if self.lock.try_read() {
            self.cell.with(|_| ());
            self.lock.unlock_read();
        }
    }

    fn write(&self) {
        self.lock.write();
        self.cell.with_mut(|_| ());
        self.lock.unlock_write();
    }

    fn try_write(&self) {
        if self.lock.try_write() {
            self.cell.with_mut(|_| ());
            self.lock.unlock_write();
        }
    }

    /// Gives way between two halves of the work, as a zap does.
    fn write_in_halves(&self) {
        self.lock.write();
        self.cell.with_mut(|_| ());
        if self.lock.is_contended_by_writer() {
            self.lock.unlock_write();
            self.lock.write();
        }
        self.cell.with_mut(|_| ());
        self.lock.unlock_write();
    }
}

/// Runs the first on the model's own thread, the others on one each.
fn together(mine: fn(&Guarded), others: &[fn(&Guarded)]) {
    let guarded = Guarded::new();
    let spawn = |work: &fn(&Guarded)| {
        let (guarded, work) = (Arc::clone(&guarded), *work);
        thread::spawn(move || work(&guarded))
    };
    let threads: alloc::vec::Vec<_> = others.iter().map(spawn).collect();
    mine(&guarded);
    for thread in threads {
        thread.join().expect("nothing panics with the lock held");
    }
    assert!(!guarded.lock.is_locked_now());
}

fn one_each() {
    together(Guarded::write, &[Guarded::read]);
}

fn two_writers() {
    together(Guarded::write, &[Guarded::write]);
}

fn two_readers_and_a_writer() {
    together(Guarded::read, &[Guarded::read, Guarded::write]);
}

fn two_writers_and_a_reader() {
    together(Guarded::write, &[Guarded::write, Guarded::read]);
}

fn a_reader_twice_and_a_writer_twice() {
    let twice = |guarded: &Guarded| {
        guarded.write();
        guarded.write();
    };
    let reads = |guarded: &Guarded| {
        guarded.read();
        guarded.read();
    };
    together(twice, &[reads]);
}

fn who_only_tries() {
    together(Guarded::try_write, &[Guarded::write, Guarded::try_read]);
}

fn trying_against_a_reader() {
    together(Guarded::try_write, &[Guarded::read, Guarded::write]);
}

fn a_writer_that_gives_way() {
    together(Guarded::write_in_halves, &[Guarded::read, Guarded::write]);
}

#[test]
fn loom_a_writer_is_alone() {
    holds("one reader, one writer", 4, one_each);
    holds("two writers", 4, two_writers);
    holds("two readers, one writer", 3, two_readers_and_a_writer);
    holds("two writers, one reader", 3, two_writers_and_a_reader);
}

#[test]
fn loom_phases_follow_each_other() {
    holds("reader twice, writer twice", 4, a_reader_twice_and_a_writer_twice);
    holds("writer that gives way, reader, writer", 2, a_writer_that_gives_way);
}

#[test]
fn loom_trying_disturbs_nobody() {
    holds("try_write, try_read, write", 3, who_only_tries);
    holds("try_write, read, write", 3, trying_against_a_reader);
}

#[test]
fn loom_each_rule_of_the_lock_is_needed() {
    fails_without(Mutation::ReaderIgnoresWriter, RACE, 3, one_each);
    fails_without(Mutation::WriterIgnoresReaders, RACE, 3, one_each);
    fails_without(Mutation::UnlockWithoutWake, STUCK, 3, one_each);
    fails_without(Mutation::UnlockWithoutWake, STUCK, 3, two_writers);
    fails_without(Mutation::UnlockRelaxed, RACE, 3, one_each);
    fails_without(Mutation::UnlockRelaxed, RACE, 3, two_writers);
}
