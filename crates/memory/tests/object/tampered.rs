//! Memory that somebody else in the process has locked or sealed.

#![expect(unsafe_code, reason = "memory is locked and sealed by address")]

use core::ffi::c_void;
use std::io;

use afterimage_memory::State;
use afterimage_mmu::HvaRange;
use afterimage_testing::skip;
use afterimage_uffd::Backing;
use rustix::mm::{MlockFlags, MprotectFlags};

use crate::support::{BACKINGS, Machine, Setup, Stamps, stamp};

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
