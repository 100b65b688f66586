//! Read sections against an updater: what is freed is used by nobody.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::{RACE, STUCK, fails_without, holds};
use crate::intent::Barrier;
use crate::mutation::Mutation;
use crate::platform::model::Loom;
use crate::readers::{ReaderWord, wait_for_readers};

/// Two versions of something, and which of them is published.
struct Versions {
    published: AtomicUsize,
    versions: [UnsafeCell<()>; 2],
    words: [ReaderWord; 2],
}

impl Versions {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            published: AtomicUsize::new(0),
            versions: [UnsafeCell::new(()), UnsafeCell::new(())],
            words: [(); 2].map(|()| ReaderWord::new(Barrier::Symmetric)),
        })
    }

    fn look(&self, word: usize, section: u32) {
        self.words[word].enter(section);
        self.versions[self.published.load(Ordering::Acquire)].with(|_| ());
        self.words[word].leave::<Loom>();
    }

    /// Publishes the other version, and frees the first.
    fn update(&self) {
        self.published.store(1, Ordering::Release);
        wait_for_readers::<Loom>(&self.words, Barrier::Symmetric);
        self.versions[0].with_mut(|_| ());
    }
}

fn a_reader_against_an_updater() {
    let versions = Versions::new();
    let other = Arc::clone(&versions);
    let reader = thread::spawn(move || other.look(0, 1));
    versions.update();
    reader.join().expect("the reader does not panic");
}

fn a_reader_twice_against_an_updater() {
    let versions = Versions::new();
    let other = Arc::clone(&versions);
    let reader = thread::spawn(move || {
        other.look(0, 1);
        other.look(0, 2);
    });
    versions.update();
    reader.join().expect("the reader does not panic");
}

fn two_readers_against_an_updater() {
    let versions = Versions::new();
    let readers = [0, 1].map(|word| {
        let other = Arc::clone(&versions);
        thread::spawn(move || other.look(word, 1))
    });
    versions.update();
    for reader in readers {
        reader.join().expect("the reader does not panic");
    }
}

#[test]
fn loom_what_is_freed_is_used_by_nobody() {
    holds("one section, updater", 5, a_reader_against_an_updater);
    holds("two readers, updater", 4, two_readers_against_an_updater);
}

/// The updater finds the second section where the first was: the first one's reads come before all the same.
#[test]
fn loom_a_section_that_was_entered_again_is_over() {
    holds("two sections in turn, updater", 6, a_reader_twice_against_an_updater);
}

#[test]
fn loom_each_rule_of_a_section_is_needed() {
    fails_without(Mutation::ReaderWithoutFence, RACE, 3, a_reader_against_an_updater);
    fails_without(Mutation::SwapWithoutReaders, RACE, 3, a_reader_against_an_updater);
    fails_without(Mutation::SectionWithoutWake, STUCK, 3, a_reader_against_an_updater);
    fails_without(Mutation::SectionLeaveRelaxed, RACE, 3, a_reader_against_an_updater);
    fails_without(Mutation::SectionEnterRelaxed, RACE, 4, a_reader_twice_against_an_updater);
}
