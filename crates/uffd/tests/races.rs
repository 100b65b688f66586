//! The interleavings that userfaultfd handlers have got wrong, each held still and looked at.
//!
//! What stands still is a thread that waits in the kernel for its event to be read or for its page; that it waits
//! there is observed, not assumed after a pause.

#![expect(unsafe_code, reason = "MOVE gives its source away")]

mod facility;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use afterimage_testing::skip;
use afterimage_uffd::{
    Event, EventBuffer, Features, Mapping, Moved, Protection, RegisterModes, Resolved, SourceHoles, Stop,
    Uffd, Wake,
};
use facility::{Kind, PATIENCE, Touch, filled, next_event, next_fault, settled, uffd};

const WRITABLE: Protection = Protection::Writable;

/// A thread that zaps a page, and stands in the kernel until the REMOVE event is read.
fn zap_and_stop(uffd: &Uffd, mapping: &Arc<Mapping>, page: u64) -> Touch {
    let zap = Touch::spawn(mapping, move |mapping| {
        mapping.zap(mapping.pages(page, 1).expect("inside")).expect("zap");
        0
    });
    // The kernel marks the descriptor as changing before it queues the event.
    assert!(uffd.wait_readable(Some(PATIENCE)).expect("poll"), "REMOVE should be queued");
    zap
}

#[test]
fn while_a_remove_is_unread_everything_answers_changing() {
    let features =
        Features::EVENT_REMOVE | Features::MINOR_SHMEM | Features::WP_HUGETLBFS_SHMEM | Features::POISON;
    for kind in Kind::SHARED {
        let Some(uffd) = uffd("unread remove", features) else { return };
        let Some(mapping) = kind.map("unread remove", 4) else { continue };
        mapping.register(&uffd, RegisterModes::all()).expect("register");
        let zap = zap_and_stop(&uffd, &mapping, 0);

        let elsewhere = mapping.pages(2, 1).expect("inside");
        let source = filled(kind.page(), 4);
        for _ in 0..100 {
            let outcomes = [
                uffd.copy(elsewhere.start, &source, WRITABLE, Wake::Now),
                uffd.continue_minor(elsewhere, WRITABLE, Wake::Now),
                uffd.poison(elsewhere, Wake::Now),
                uffd.zero(elsewhere, Wake::Now),
                uffd.write_protect(elsewhere),
                uffd.write_unprotect(elsewhere, Wake::Now),
            ];
            for outcome in outcomes {
                assert_eq!(outcome.expect("an outcome"), Resolved::Changing, "{kind:?}");
            }
        }
        let progress = uffd.copy_all(elsewhere.start, &source, kind.page(), WRITABLE, Wake::Now);
        assert!(matches!(progress.stop, Stop::Changing), "{kind:?}: {progress:?}");
        assert_eq!((progress.installed, progress.rest), (0, elsewhere), "{kind:?}");
        assert!(zap.sleeps(), "{kind:?}");

        let event = next_event(&uffd);
        assert!(matches!(event, Event::Remove(r) if r == mapping.pages(0, 1).expect("inside")), "{event:?}");
        let outcome = settled(|| uffd.copy(elsewhere.start, &source, WRITABLE, Wake::Now).expect("copy"));
        assert_eq!(outcome, Resolved::Done, "{kind:?}");
        zap.finish();
    }
}

#[test]
fn while_a_remove_is_unread_a_move_answers_changing() {
    let Some(uffd) = uffd("unread remove, move", Features::EVENT_REMOVE | Features::MOVE) else { return };
    let Some(mapping) = Kind::Anonymous.map("unread remove, move", 2) else { return };
    let Some(source) = Kind::Anonymous.map("unread remove, move", 1) else { return };
    source.word(0).expect("inside").store(3, Relaxed);
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    let zap = zap_and_stop(&uffd, &mapping, 0);
    let page = mapping.pages(1, 1).expect("inside");
    let act = || {
        // SAFETY: the source is guest memory.
        match unsafe { uffd.move_pages(page, source.range().start, SourceHoles::Refuse, Wake::Now) }
            .expect("move")
        {
            Moved::Outcome(resolved) => resolved,
            Moved::SourceShared => panic!("the page is ours alone"),
        }
    };
    assert_eq!(act(), Resolved::Changing);
    next_event(&uffd);
    assert_eq!(settled(act), Resolved::Done);
    zap.finish();
}

#[test]
fn a_fault_is_read_ahead_of_an_older_remove() {
    let Some(uffd) = uffd("order", Features::EVENT_REMOVE) else { return };
    let Some(mapping) = Kind::Anonymous.map("order", 4) else { return };
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    let zap = zap_and_stop(&uffd, &mapping, 0);
    let (sender, receiver) = std::sync::mpsc::channel();
    let touch = Touch::spawn(&mapping, move |mapping| {
        sender.send(rustix::thread::gettid().as_raw_nonzero()).expect("the test listens");
        mapping.word(2 * 4096).expect("inside").load(Relaxed)
    });
    // Poll cannot tell the fault from the REMOVE; where its thread sleeps can.
    if !sleeps_in_userfaultfd(receiver.recv_timeout(PATIENCE).expect("the thread")) {
        return skip("order", "/proc does not show where a thread sleeps");
    }
    let mut buffer = EventBuffer::with_capacity(8);
    let batch: Vec<_> = uffd.read_events(&mut buffer).expect("read").collect();
    assert_eq!(batch.len(), 2, "{batch:?}");
    assert!(matches!(batch[0], Event::PageFault { .. }), "{batch:?}");
    assert!(matches!(batch[1], Event::Remove(_)), "{batch:?}");
    let page = mapping.pages(2, 1).expect("inside");
    assert_eq!(settled(|| uffd.zero(page, Wake::Now).expect("zero")), Resolved::Done);
    assert_eq!(touch.finish(), 0);
    zap.finish();
}

/// Waits until `thread` sleeps in a page fault that a userfaultfd is to resolve; false if that cannot be seen.
fn sleeps_in_userfaultfd(thread: impl std::fmt::Display) -> bool {
    let start = std::time::Instant::now();
    while start.elapsed() < PATIENCE {
        let place = std::fs::read_to_string(format!("/proc/self/task/{thread}/wchan"));
        if place.is_ok_and(|place| place == "handle_userfault") {
            return true;
        }
        std::thread::yield_now();
    }
    false
}

#[test]
fn a_page_that_is_there_wakes_whoever_waits_for_it() {
    for kind in Kind::ALL {
        let Some(uffd) = uffd("present wakes", Features::empty()) else { return };
        let Some(mapping) = kind.map("present wakes", 2) else { continue };
        mapping.register(&uffd, RegisterModes::MISSING).expect("register");
        let (page, start) = (kind.page(), mapping.range().start);
        let touch = Touch::read(&mapping, 0);
        next_fault(&uffd);
        let source = filled(page, 21);
        // Somebody else installs the page and does not wake: a batch that is not finished yet.
        assert_eq!(
            uffd.copy(start, &source, WRITABLE, Wake::Later).expect("copy"),
            Resolved::Done,
            "{kind:?}"
        );
        let later = uffd.copy(start, &source, WRITABLE, Wake::Later).expect("copy");
        assert_eq!(later, Resolved::Present, "{kind:?}");
        assert!(touch.sleeps(), "{kind:?}: nobody has woken it");
        let now = uffd.copy(start, &source, WRITABLE, Wake::Now).expect("copy");
        assert_eq!(now, Resolved::Present, "{kind:?}");
        assert_eq!(touch.finish(), 21, "{kind:?}");
    }
}

#[test]
fn a_page_that_is_there_wakes_the_whole_range() {
    let Some(uffd) = uffd("present wakes all", Features::empty()) else { return };
    let Some(mapping) = Kind::Anonymous.map("present wakes all", 2) else { return };
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    let _ = uffd.zero(mapping.pages(0, 1).expect("inside"), Wake::Now).expect("zero");
    let touch = Touch::read(&mapping, 4096);
    let first = next_fault(&uffd);
    assert_eq!(uffd.zero(mapping.range(), Wake::Now).expect("zero"), Resolved::Present);
    assert_eq!(next_fault(&uffd), first, "woken to no avail, it faults again");
    assert_eq!(uffd.zero(mapping.pages(1, 1).expect("inside"), Wake::Now).expect("zero"), Resolved::Done);
    assert_eq!(touch.finish(), 0);
}

#[test]
fn filling_a_range_wakes_those_whose_page_was_there() {
    let Some(uffd) = uffd("fill wakes", Features::empty()) else { return };
    let Some(mapping) = Kind::Anonymous.map("fill wakes", 3) else { return };
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    let touches = [0, 1, 2].map(|page| Touch::read(&mapping, page * 4096));
    for _ in 0..3 {
        next_fault(&uffd);
    }
    let middle = mapping.pages(1, 1).expect("inside");
    assert_eq!(uffd.zero(middle, Wake::Later).expect("zero"), Resolved::Done);
    let progress = uffd.zero_all(mapping.range(), mapping.page_size(), Wake::Now);
    assert_eq!((progress.installed, progress.present), (8192, 4096), "{progress:?}");
    for touch in touches {
        assert_eq!(touch.finish(), 0);
    }
}

#[test]
fn a_batch_is_woken_at_once() {
    let Some(uffd) = uffd("batch", Features::empty()) else { return };
    let Some(mapping) = Kind::Anonymous.map("batch", 8) else { return };
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    let touches: Vec<_> = (0..8).map(|page| Touch::read(&mapping, page * 4096)).collect();
    let mut buffer = EventBuffer::with_capacity(3);
    let mut faults = 0;
    while faults < 8 {
        assert!(uffd.wait_readable(Some(PATIENCE)).expect("poll"));
        let batch = uffd.read_events(&mut buffer).expect("read");
        assert!(batch.len() <= 3, "a batch is no longer than its buffer");
        faults += batch.count();
    }
    assert_eq!(uffd.zero(mapping.range(), Wake::Later).expect("zero"), Resolved::Done);
    assert!(touches.iter().all(Touch::sleeps));
    uffd.wake(mapping.range()).expect("wake");
    for touch in touches {
        assert_eq!(touch.finish(), 0);
    }
}
