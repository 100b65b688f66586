//! Memory that somebody else has locked, sealed, unmapped, mapped over, cut off or made read-only.

#![expect(
    unsafe_code,
    reason = "memory is locked, sealed, unmapped and mapped over by address, and a descriptor by number"
)]

use core::ffi::c_void;
use std::io;
use std::os::fd::AsRawFd as _;

use afterimage_memory::{MemoryError, State};
use afterimage_mmu::{Age, HvaRange, PageSize, RetryPoint};
use afterimage_testing::{HugePages, skip};
use afterimage_uffd::Backing;
use rustix::fs::{Mode, OFlags};
use rustix::mm::{MlockFlags, MprotectFlags};

use crate::support::{BACKINGS, Machine, Setup, Stamps, stamp, wait_until};

fn at(range: HvaRange) -> *mut c_void {
    core::ptr::with_exposed_provenance_mut(range.start.as_u64() as usize)
}

/// Locks pages as they come.
fn lock(machine: &Machine, page: u64, count: u64) {
    let range = machine.mapping.pages(page, count).expect("inside");
    // SAFETY: the range lies in a mapping, and locking changes no contents.
    unsafe { rustix::mm::mlock_with(at(range), range.len() as usize, MlockFlags::ONFAULT) }
        .expect("some KiB");
}

/// Seals pages, of which private ones can be neither written nor dropped from then on. `false`, after saying so, where the kernel cannot.
pub(crate) fn seal(machine: &Machine, page: u64, count: u64) -> bool {
    let range = machine.mapping.pages(page, count).expect("inside");
    let bytes = range.len() as usize;
    // SAFETY: the range lies in a mapping, which the test does not write from now on.
    unsafe { rustix::mm::mprotect(at(range), bytes, MprotectFlags::READ) }.expect("it can be read-only");
    // SAFETY: the same; that the mapping stays to the end of the process harms nobody.
    if unsafe { libc::syscall(libc::SYS_mseal, at(range), bytes, 0) } == 0 {
        return true;
    }
    skip("sealed memory", io::Error::last_os_error());
    false
}

/// Unmaps a page.
fn unmap(machine: &Machine, page: u64) {
    let range = machine.mapping.pages(page, 1).expect("inside");
    // SAFETY: the page belongs to a mapping that is not touched there from now on.
    unsafe { rustix::mm::munmap(at(range), range.len() as usize) }.expect("it can be unmapped");
}

/// Maps memory that cannot be touched over a part of a machine's.
pub(crate) fn map_over(range: HvaRange, flags: i32) {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let protection =
        if flags & libc::MAP_HUGETLB == 0 { libc::PROT_NONE } else { libc::PROT_READ | libc::PROT_WRITE };
    // SAFETY: the range belongs to a mapping whose users touch it by calls that may fail, or not any more.
    let over = unsafe { libc::mmap(at(range), range.len() as usize, protection, flags, -1, 0) };
    assert_eq!(over, at(range), "{}", std::io::Error::last_os_error());
}

#[test]
fn locked_pages_go_and_come_back() {
    for backing in BACKINGS {
        let source = Stamps::new(8);
        let Some(machine) = Setup::new("locked", backing, 8).source(&source).start() else { return };
        lock(&machine, 3, 1);
        for page in 0..8 {
            machine.write(page, 100 + page);
            machine.wait_resident(page);
        }
        assert_eq!(machine.evict(machine.all()), 8, "{backing:?}");
        for page in 0..8 {
            assert_eq!(machine.read(page), 100 + page, "{backing:?}");
            machine.wait_resident(page);
        }
        assert_eq!(machine.discard(machine.pages(2, 5)), 3, "{backing:?}");
        assert_eq!([1, 3, 5].map(|page| machine.read(page)), [101, 0, 105], "{backing:?}");
        machine.stop_clean();
    }
}

/// The kernel drops a range piece by piece, and stops at the first one that it must not drop.
#[test]
fn a_page_that_cannot_go_takes_no_other_one_with_it() {
    let source = Stamps::new(8);
    let setup = Setup::new("sealed", Backing::Anonymous, 8).source(&source);
    let Some(machine) = setup.start() else { return };
    for page in 0..8 {
        machine.read(page);
        machine.wait_resident(page);
    }
    if !seal(&machine, 3, 1) {
        return;
    }
    let refused = machine.object.evict(machine.all()).expect_err("one page stays");
    assert!(refused.to_string().contains("MADV_DONTNEED"), "{refused}");
    for page in 0..8 {
        let expected = if page == 3 { State::Resident } else { State::Stored };
        assert_eq!(machine.state(page), expected, "page {page}");
    }
    assert_eq!((machine.store_frames(), machine.stats().resident_bytes), (7, 4096));
    for page in 0..8 {
        assert_eq!(machine.read(page), stamp(page));
    }
    machine.stop_clean();
}

/// What can be done to all pages of a machine of 8, one of which is not its own any more.
const VERBS: [fn(&Machine); 3] = [
    |machine| _ = machine.object.evict(machine.all()),
    // One that cannot be read ends it.
    |machine| _ = machine.object.protect(machine.all(), |_, _| ()),
    |machine| _ = machine.object.age(machine.all(), Age::Clear),
];

#[track_caller]
fn assert_others_stay(tamper: fn(&Machine)) {
    for (backing, verb) in BACKINGS.into_iter().flat_map(|backing| VERBS.map(|verb| (backing, verb))) {
        let Some(machine) = Setup::new("tampered", backing, 8).start() else { return };
        for page in 0..8 {
            machine.write(page, 100 + page);
            machine.wait_resident(page);
        }
        machine.evict(machine.pages(6, 8));
        tamper(&machine);
        verb(&machine);
        for page in [0, 2, 4, 7] {
            assert_eq!(machine.read(page), 100 + page, "{backing:?}");
        }
        machine.evict(machine.all());
        machine.write(4, 1);
        assert_eq!(machine.discard(machine.all()), 8, "{backing:?}");
        assert_eq!([0, 4, 7].map(|page| machine.read(page)), [0, 0, 0], "{backing:?}");
        machine.stop_clean();
    }
}

#[test]
fn the_rest_of_memory_of_which_a_page_was_mapped_over_goes_and_comes_back() {
    assert_others_stay(|machine| map_over(machine.mapping.pages(3, 1).expect("inside"), 0));
}

#[test]
fn the_rest_of_memory_of_which_a_page_was_unmapped_goes_and_comes_back() {
    assert_others_stay(|machine| unmap(machine, 3));
}

#[test]
fn a_checkpoint_protects_what_lies_behind_a_page_that_was_mapped_over() {
    for backing in BACKINGS {
        let source = Stamps::new(8);
        let Some(machine) = Setup::new("checkpoint", backing, 8).source(&source).start() else { return };
        for page in 0..8 {
            machine.read(page);
            machine.wait_resident(page);
        }
        map_over(machine.mapping.pages(3, 1).expect("inside"), 0);
        let mut write = None;
        let mut shown = None;
        machine
            .object
            .protect(machine.all(), |page, bytes| {
                if page.as_u64() == 0 {
                    write = Some(machine.writing(5, 5));
                    wait_until("the writer waits", || machine.retries(RetryPoint::BeforeFaultIn) > 0);
                } else if page.as_u64() == 5 {
                    shown = bytes.map(|bytes| u64::from_ne_bytes(bytes[..8].try_into().expect("8 bytes")));
                }
            })
            .expect("a checkpoint");
        assert_eq!(shown, Some(stamp(5)), "{backing:?}: as it was when the checkpoint began");
        write.expect("it was begun").finish();
        assert_eq!(machine.read(5), 5, "{backing:?}");
        machine.stop_clean();
    }
}

#[test]
fn who_waits_for_a_page_that_is_cut_off_its_file_is_woken() {
    let Some(_pool) = HugePages::claim("cut off", 2) else { return };
    for page_size in [PageSize::Size4K, PageSize::Size2M] {
        let setup = Setup { page_size, ..Setup::new("cut off", Backing::Shared, 2) };
        let Some(machine) = setup.start() else { return };
        machine.view.gate.close_for(page_size.frames());
        let touch = machine.probing(1);
        machine.view.gate.wait_for_someone();
        let file = machine.object.file().expect("a file");
        rustix::fs::ftruncate(file, page_size.bytes()).expect("it can be shorter");
        machine.view.gate.open();
        let nothing = touch.finish().expect_err("the file ends before it");
        assert!(nothing.to_string().contains("MADV_POPULATE_READ"), "{page_size:?}: {nothing}");
        machine.write(0, 1000);
        assert_eq!(machine.read(0), 1000, "{page_size:?}");
        assert_eq!(machine.stop().len(), 1, "{page_size:?}");
    }
}

/// Why it was lost says no stored bytes; those that there are go with the discard.
#[test]
fn a_stored_page_that_could_not_be_written_leaves_the_store_when_it_is_discarded() {
    let Some(machine) = Setup::new("read-only file", Backing::Shared, 2).start() else { return };
    machine.write(1, 1001);
    machine.evict(machine.all());
    let file = machine.object.file().expect("a file");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let read_only =
        rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).expect("the same file");
    // SAFETY: the number stays an open descriptor of the same file.
    assert!(unsafe { libc::dup2(read_only.as_raw_fd(), file.as_raw_fd()) } >= 0);
    machine.assert_poisoned(1);
    let cause = machine.object.poison_cause(machine.pages(1, 2).start).expect("a cause");
    assert!(matches!(*cause, MemoryError::Write { .. }), "{cause}");
    assert_eq!(machine.store_frames(), 1);
    assert_eq!(machine.discard(machine.pages(1, 2)), 1);
    assert_eq!(machine.store_frames(), 0);
    assert_eq!(machine.stop().len(), 1);
}
