//! Looks at the memslots against an updater: what is freed is used by nobody.

use alloc::vec::Vec;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::{RACE, STUCK, fails_without, holds};
use crate::intent::Barrier;
use crate::mutation::Mutation;
use crate::platform::Platform;
use crate::platform::model::{Loom, LoomSpin};
use crate::vcpu_words::{VcpuShared, VcpuWords};

/// Two versions of something, and which of them is published.
struct Versions<P: Platform> {
    published: AtomicUsize,
    versions: [UnsafeCell<()>; 2],
    words: VcpuWords<P>,
}

impl<P: Platform> Versions<P> {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            published: AtomicUsize::new(0),
            versions: [UnsafeCell::new(()), UnsafeCell::new(())],
            words: VcpuWords::new(Barrier::Symmetric),
        })
    }

    fn look(&self, vcpu: &VcpuShared) {
        vcpu.section.enter();
        self.versions[self.published.load(Ordering::Acquire)].with(|_| ());
        vcpu.section.clear::<P>();
    }

    /// Publishes the other version, and frees the first.
    fn update(&self) {
        self.published.store(1, Ordering::Release);
        self.words.wait_for_readers();
        self.versions[0].with_mut(|_| ());
    }
}

fn looks_against_an_update<P: Platform>(vcpus: usize, looks: usize) {
    let versions = Versions::<P>::new();
    let readers: Vec<_> = (0..vcpus)
        .map(|_| {
            let (vcpu, other) = (versions.words.register(), Arc::clone(&versions));
            thread::spawn(move || (0..looks).for_each(|_| other.look(&vcpu)))
        })
        .collect();
    versions.update();
    for reader in readers {
        reader.join().expect("the reader does not panic");
    }
}

fn a_reader_against_an_updater() {
    looks_against_an_update::<Loom>(1, 1);
}

fn two_readers_against_an_updater() {
    looks_against_an_update::<Loom>(2, 1);
}

/// Nobody parks: the fence that parking takes would stand for the ordering of the second look.
fn a_reader_twice_against_an_updater() {
    looks_against_an_update::<LoomSpin>(1, 2);
}

#[test]
fn loom_what_is_freed_is_used_by_nobody() {
    holds("one section, updater", 5, a_reader_against_an_updater);
    holds("two readers, updater", 3, two_readers_against_an_updater);
}

/// The updater finds the second section where the first was: the first one's reads come before all the same.
#[test]
fn loom_a_section_that_was_entered_again_is_over() {
    holds("two sections in turn, updater", 6, a_reader_twice_against_an_updater);
}

#[test]
fn loom_each_rule_of_a_section_is_needed() {
    fails_without(Mutation::AnnounceWithoutFence, RACE, 3, a_reader_against_an_updater);
    fails_without(Mutation::SwapWithoutReaders, RACE, 3, a_reader_against_an_updater);
    fails_without(Mutation::ClearWithoutFence, STUCK, 3, a_reader_against_an_updater);
    fails_without(Mutation::ClearRelaxed, RACE, 3, a_reader_against_an_updater);
    fails_without(Mutation::AnnounceRelaxed, RACE, 4, a_reader_twice_against_an_updater);
}
