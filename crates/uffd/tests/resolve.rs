//! Every way to resolve a fault, on every kind of memory, against the kernel.

#![expect(unsafe_code, reason = "MOVE gives its source away")]

mod facility;

use std::num::NonZeroU64;
use std::sync::atomic::Ordering::Relaxed;

use afterimage_mmu::{Hva, HvaRange};
use afterimage_uffd::{
    Access, FaultKind, Features, Gone, Moved, Operation, Populate, Protection, RegisterModes, Resolved,
    SourceHoles, Stop, UffdError, Wake,
};
use facility::{Kind, Touch, filled, next_fault, uffd};
use rustix::io::Errno;

const WRITABLE: Protection = Protection::Writable;
const PROTECTED: Protection = Protection::WriteProtected;

#[test]
fn copy_answers_a_missing_page() {
    for kind in Kind::ALL {
        let Some(uffd) = uffd("copy", Features::EXACT_ADDRESS | Features::THREAD_ID) else { return };
        let Some(mapping) = kind.map("copy", 2) else { continue };
        mapping.register(&uffd, RegisterModes::MISSING).expect("register");
        let page = mapping.pages(1, 1).expect("two pages");
        let offset = kind.page().bytes() + 24;
        let touch = Touch::read(&mapping, offset);
        let fault = next_fault(&uffd);
        assert_eq!(fault.address, mapping.range().start + offset, "{kind:?}");
        assert_eq!((fault.access, fault.kind), (Access::Read, FaultKind::Missing), "{kind:?}");
        let thread = fault.thread.expect("THREAD_ID is on").as_u32();
        assert!(std::path::Path::new(&format!("/proc/self/task/{thread}")).exists(), "{kind:?}: {thread}");
        let source = filled(kind.page(), 0x5eed);
        assert_eq!(
            uffd.copy(page.start, &source, WRITABLE, Wake::Now).expect("copy"),
            Resolved::Done,
            "{kind:?}"
        );
        assert_eq!(touch.finish(), 0x5eed, "{kind:?}");
    }
}

#[test]
fn zero_answers_a_missing_page_of_4_kib() {
    for kind in Kind::SMALL {
        let Some(uffd) = uffd("zero", Features::empty()) else { return };
        let Some(mapping) = kind.map("zero", 4) else { continue };
        mapping.register(&uffd, RegisterModes::MISSING).expect("register");
        let touch = Touch::write(&mapping, 0, 9);
        assert_eq!(next_fault(&uffd).access, Access::Write);
        assert_eq!(uffd.zero(mapping.range(), Wake::Now).expect("zero"), Resolved::Done);
        assert_eq!(touch.finish(), 9);
        assert_eq!(mapping.word(3 * 4096).expect("inside").load(Relaxed), 0);
    }
}

#[test]
fn hugetlb_has_no_zero_page_and_the_error_says_so() {
    let Some(uffd) = uffd("zero", Features::empty()) else { return };
    let Some(mapping) = Kind::HugeAnonymous.map("zero", 1) else { return };
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    let error = uffd.zero(mapping.range(), Wake::Now).expect_err("hugetlb");
    assert!(error.to_string().contains("hugetlb memory has no zero page"), "{error}");
}

#[test]
fn continue_answers_a_minor_fault_and_keeps_the_data() {
    for kind in Kind::SHARED {
        let Some(uffd) = uffd("continue", Features::MINOR_SHMEM | Features::MINOR_HUGETLBFS) else { return };
        let Some(mapping) = kind.map("continue", 2) else { continue };
        let second = kind.page().bytes();
        mapping.word(second).expect("inside").store(77, Relaxed);
        mapping.register(&uffd, RegisterModes::MISSING | RegisterModes::MINOR).expect("register");
        let page = mapping.pages(1, 1).expect("two pages");
        mapping.zap(page).expect("zap");

        let touch = Touch::read(&mapping, second);
        assert_eq!(next_fault(&uffd).kind, FaultKind::Minor, "{kind:?}");
        assert_eq!(
            uffd.continue_minor(page, WRITABLE, Wake::Now).expect("continue"),
            Resolved::Done,
            "{kind:?}"
        );
        assert_eq!(touch.finish(), 77, "{kind:?}");

        assert_eq!(
            uffd.continue_minor(page, WRITABLE, Wake::Now).expect("again"),
            Resolved::Present,
            "{kind:?}"
        );
        let never = mapping.pages(0, 1).expect("two pages");
        let gone = uffd.continue_minor(never, WRITABLE, Wake::Now).expect("no page in the cache");
        assert_eq!(gone, Resolved::Gone(Gone::CachePage), "{kind:?}");
        let touch = Touch::read(&mapping, 0);
        assert_eq!(next_fault(&uffd).kind, FaultKind::Missing, "{kind:?}");
        let source = filled(kind.page(), 78);
        assert_eq!(
            uffd.copy(never.start, &source, WRITABLE, Wake::Now).expect("copy"),
            Resolved::Done,
            "{kind:?}"
        );
        assert_eq!(touch.finish(), 78, "{kind:?}");
    }
}

#[test]
fn a_protected_page_faults_on_the_write_alone() {
    for kind in Kind::ALL {
        let Some(uffd) = uffd("protect", Features::WP_HUGETLBFS_SHMEM) else { return };
        let Some(mapping) = kind.map("protect", 1) else { continue };
        mapping.word(0).expect("inside").store(1, Relaxed);
        mapping.register(&uffd, RegisterModes::WP).expect("register");
        assert_eq!(uffd.write_protect(mapping.range()).expect("protect"), Resolved::Done, "{kind:?}");
        assert_eq!(mapping.word(0).expect("inside").load(Relaxed), 1, "{kind:?}: reads go through");
        let touch = Touch::write(&mapping, 0, 2);
        let fault = next_fault(&uffd);
        assert_eq!((fault.access, fault.kind), (Access::Write, FaultKind::WriteProtect), "{kind:?}");
        assert!(touch.sleeps(), "{kind:?}");
        let lifted = uffd.write_unprotect(mapping.range(), Wake::Later).expect("unprotect");
        assert_eq!(lifted, Resolved::Done, "{kind:?}");
        uffd.wake(mapping.range()).expect("wake");
        assert_eq!(touch.finish(), 2, "{kind:?}");
    }
}

#[test]
fn pages_can_be_installed_protected() {
    for kind in Kind::ALL {
        let Some(uffd) = uffd("install protected", Features::WP_HUGETLBFS_SHMEM) else { return };
        let Some(mapping) = kind.map("install protected", 1) else { continue };
        mapping.register(&uffd, RegisterModes::MISSING | RegisterModes::WP).expect("register");
        let source = filled(kind.page(), 5);
        let start = mapping.range().start;
        assert_eq!(
            uffd.copy(start, &source, PROTECTED, Wake::Now).expect("copy"),
            Resolved::Done,
            "{kind:?}"
        );
        let touch = Touch::write(&mapping, 8, 6);
        assert_eq!(next_fault(&uffd).kind, FaultKind::WriteProtect, "{kind:?}");
        let _ = uffd.write_unprotect(mapping.range(), Wake::Now).expect("unprotect");
        assert_eq!(touch.finish(), 6, "{kind:?}");
    }
    for kind in Kind::SHARED {
        let features = Features::WP_HUGETLBFS_SHMEM | Features::MINOR_SHMEM | Features::MINOR_HUGETLBFS;
        let Some(uffd) = uffd("continue protected", features) else { return };
        let Some(mapping) = kind.map("continue protected", 1) else { continue };
        mapping.word(0).expect("inside").store(1, Relaxed);
        mapping.register(&uffd, RegisterModes::all()).expect("register all three modes");
        mapping.zap(mapping.range()).expect("zap");
        let done = uffd.continue_minor(mapping.range(), PROTECTED, Wake::Now).expect("continue");
        assert_eq!(done, Resolved::Done, "{kind:?}");
        let touch = Touch::write(&mapping, 0, 6);
        assert_eq!(next_fault(&uffd).kind, FaultKind::WriteProtect, "{kind:?}");
        let _ = uffd.write_unprotect(mapping.range(), Wake::Now).expect("unprotect");
        assert_eq!(touch.finish(), 6, "{kind:?}");
    }
}

#[test]
fn move_takes_pages_from_elsewhere() {
    let Some(uffd) = uffd("move", Features::MOVE) else { return };
    let Some(mapping) = Kind::Anonymous.map("move", 4) else { return };
    let Some(source) = Kind::Anonymous.map("move", 4) else { return };
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    for page in [0, 1, 3] {
        source.word(page * 4096).expect("inside").store(100 + page, Relaxed);
    }
    let touch = Touch::read(&mapping, 0);
    next_fault(&uffd);
    let from = source.range().start;
    let two = mapping.pages(0, 2).expect("four pages");
    // SAFETY: the source is guest memory.
    let moved = unsafe { uffd.move_pages(two, from, SourceHoles::Refuse, Wake::Now) }.expect("move");
    assert_eq!(moved, Moved::Outcome(Resolved::Done));
    assert_eq!(touch.finish(), 100);
    assert_eq!(source.word(0).expect("inside").load(Relaxed), 0, "the source has lost its page");

    let rest = mapping.pages(2, 2).expect("four pages");
    let hole = from + 2 * 4096;
    // SAFETY: the source is guest memory.
    let moved = unsafe { uffd.move_pages(rest, hole, SourceHoles::Refuse, Wake::Now) }.expect("move");
    assert_eq!(moved, Moved::Outcome(Resolved::Gone(Gone::Range)));
    // SAFETY: the source is guest memory.
    let moved = unsafe { uffd.move_pages(rest, hole, SourceHoles::Allow, Wake::Now) }.expect("move");
    assert_eq!(moved, Moved::Outcome(Resolved::Done));
    assert_eq!(mapping.word(3 * 4096).expect("inside").load(Relaxed), 103);

    source.word(0).expect("inside").store(1, Relaxed);
    let first = mapping.pages(0, 1).expect("four pages");
    // SAFETY: the source is guest memory.
    let moved = unsafe { uffd.move_pages(first, from, SourceHoles::Refuse, Wake::Now) }.expect("move");
    assert_eq!(moved, Moved::Outcome(Resolved::Present));
}

#[test]
fn a_poisoned_page_cannot_be_touched() {
    for kind in Kind::ALL {
        let Some(uffd) = uffd("poison", Features::POISON) else { return };
        let Some(mapping) = kind.map("poison", 2) else { continue };
        mapping.register(&uffd, RegisterModes::MISSING).expect("register");
        let page = mapping.pages(1, 1).expect("two pages");
        assert_eq!(uffd.poison(page, Wake::Now).expect("poison"), Resolved::Done, "{kind:?}");
        let error = mapping.populate(page, Populate::Read).expect_err("poisoned");
        assert!(matches!(error, UffdError::Advise { errno: Errno::HWPOISON, .. }), "{kind:?}: {error}");
        assert_eq!(uffd.poison(page, Wake::Now).expect("again"), Resolved::Present, "{kind:?}");
        let source = filled(kind.page(), u64::from_ne_bytes([1; 8]));
        let copied = uffd.copy(page.start, &source, WRITABLE, Wake::Now).expect("copy");
        assert_eq!(copied, Resolved::Done, "{kind:?}: a COPY heals, since the page is still absent");
        let offset = page.start - mapping.range().start;
        assert_eq!(
            mapping.word(offset).expect("inside").load(Relaxed),
            u64::from_ne_bytes([1; 8]),
            "{kind:?}"
        );
    }
}

#[test]
fn a_range_stops_at_the_page_that_is_there() {
    for kind in Kind::ALL {
        let Some(uffd) = uffd("partial", Features::empty()) else { return };
        let Some(mapping) = kind.map("partial", 4) else { continue };
        mapping.register(&uffd, RegisterModes::MISSING).expect("register");
        let (page, start) = (kind.page(), mapping.range().start);
        let third = mapping.pages(2, 1).expect("four pages");
        let _ = uffd.copy(third.start, &filled(page, 3), WRITABLE, Wake::Now).expect("copy");

        let source = [10, 11, 12, 13].map(|word| filled(page, word)).concat();
        let bytes = NonZeroU64::new(2 * page.bytes()).expect("not zero");
        let first = uffd.copy(start, &source, WRITABLE, Wake::Now).expect("copy");
        assert_eq!(first, Resolved::Partial { bytes }, "{kind:?}");
        let again =
            uffd.copy(third.start, &source[..2 * page.bytes() as usize], WRITABLE, Wake::Now).expect("copy");
        assert_eq!(again, Resolved::Present, "{kind:?}");

        let progress = uffd.copy_all(start, &source, page, WRITABLE, Wake::Now);
        assert!(progress.is_complete(), "{kind:?}: {progress:?}");
        assert_eq!((progress.installed, progress.present), (page.bytes(), 3 * page.bytes()), "{kind:?}");
        let words =
            [0, 1, 2, 3].map(|index| mapping.word(index * page.bytes()).expect("inside").load(Relaxed));
        assert_eq!(
            words,
            [10, 11, 3, 13],
            "{kind:?}: each source page is at its place, what was there is kept"
        );
    }
}

#[test]
fn whole_ranges_of_the_other_kinds() {
    let Some(uffd) = uffd("whole ranges", Features::POISON | Features::MINOR_SHMEM) else { return };
    let Some(mapping) = Kind::Memfd.map("whole ranges", 4) else { return };
    let page = mapping.page_size();
    mapping.register(&uffd, RegisterModes::MISSING | RegisterModes::MINOR).expect("register");
    let _ = uffd.zero(mapping.pages(1, 1).expect("inside"), Wake::Now).expect("zero");
    let zeroed = uffd.zero_all(mapping.pages(0, 3).expect("inside"), page, Wake::Now);
    assert_eq!((zeroed.installed, zeroed.present), (2 * 4096, 4096), "{zeroed:?}");
    mapping.zap(mapping.pages(0, 2).expect("inside")).expect("zap");
    let continued = uffd.continue_all(mapping.range(), page, WRITABLE, Wake::Later);
    assert_eq!((continued.installed, continued.present), (2 * 4096, 4096), "{continued:?}");
    assert!(matches!(continued.stop, Stop::Gone(Gone::CachePage)), "{continued:?}");
    assert_eq!(continued.rest, mapping.pages(3, 1).expect("inside"));
    let poisoned = uffd.poison_all(mapping.range(), page, Wake::Now);
    assert_eq!((poisoned.installed, poisoned.present), (4096, 3 * 4096), "{poisoned:?}");
}

#[test]
fn a_source_that_cannot_be_read_is_an_error_after_what_could() {
    let Some(uffd) = uffd("bad source", Features::empty()) else { return };
    let Some(mapping) = Kind::Anonymous.map("bad source", 3) else { return };
    let Some(source) = Kind::Anonymous.map("bad source", 3) else { return };
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    // SAFETY: the last page is given up and not used again, except by the kernel, which checks.
    unsafe {
        rustix::mm::mprotect(source.as_ptr().add(8192).cast(), 4096, rustix::mm::MprotectFlags::empty())
    }
    .expect("mprotect");
    // SAFETY: the kernel checks each access to the source.
    let progress = unsafe {
        uffd.copy_all_from_raw(mapping.range(), source.as_ptr(), mapping.page_size(), WRITABLE, Wake::Now)
    };
    assert_eq!((progress.installed, progress.rest), (8192, mapping.pages(2, 1).expect("inside")));
    let Stop::Failed(UffdError::Refused { operation: Operation::Copy, errno: Errno::FAULT, .. }) =
        progress.stop
    else {
        panic!("{progress:?}");
    };
}

#[test]
fn what_is_not_registered_is_gone() {
    let Some(uffd) = uffd("gone", Features::empty()) else { return };
    let Some(mapping) = Kind::Anonymous.map("gone", 2) else { return };
    let range = mapping.range();
    let gone = Resolved::Gone(Gone::Range);
    assert_eq!(uffd.zero(range, Wake::Now).expect("never registered"), gone);
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    assert_eq!(uffd.write_protect(range).expect("not registered for WP"), gone);
    let longer = HvaRange::new(range.start, range.end + (1 << 30));
    let outcome = uffd.zero(longer, Wake::Now).expect("longer than the mapping");
    assert_eq!(outcome, gone, "a fill must lie in one mapping");
    uffd.unregister(range).expect("unregister");
    assert_eq!(uffd.copy(range.start, &[1; 4096], WRITABLE, Wake::Now).expect("unregistered"), gone);
}

#[test]
fn the_kernel_does_not_check_whose_registration_it_fills() {
    let Some(owner) = uffd("whose", Features::empty()) else { return };
    let Some(other) = uffd("whose", Features::empty()) else { return };
    let Some(mapping) = Kind::Anonymous.map("whose", 1) else { return };
    mapping.register(&owner, RegisterModes::MISSING).expect("register");
    let touch = Touch::read(&mapping, 0);
    next_fault(&owner);
    assert_eq!(other.zero(mapping.range(), Wake::Now).expect("zero"), Resolved::Done);
    assert!(touch.sleeps(), "the other's wake does not reach the owner's waiters");
    assert_eq!(owner.zero(mapping.range(), Wake::Now).expect("zero"), Resolved::Present);
    assert_eq!(touch.finish(), 0);
}

#[test]
fn misuse_is_an_error_with_its_range() {
    let Some(uffd) = uffd("misuse", Features::empty()) else { return };
    let Some(mapping) = Kind::Anonymous.map("misuse", 1) else { return };
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    let start = mapping.range().start;
    let error = uffd.copy(start, &[0; 100], WRITABLE, Wake::Now).expect_err("100 bytes");
    assert!(error.to_string().contains("multiples of the page size"), "{error}");
    assert!(uffd.copy(start, &[], WRITABLE, Wake::Now).is_err(), "nothing");
    assert!(uffd.wake(HvaRange::new(start, start)).is_err(), "an empty range would wake nobody, and says so");
    assert!(uffd.copy(Hva::new(u64::MAX - 4095), &[0; 8192], WRITABLE, Wake::Now).is_err(), "past the end");
}
