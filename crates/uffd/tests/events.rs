//! The events other than page faults, each caused and read.
//!
//! Forks are in a test binary of their own: a fork takes part in whatever the other threads are doing to memory.

#![expect(unsafe_code, reason = "mappings are moved behind their owner's back")]

mod facility;

use std::sync::{Mutex, MutexGuard};

use afterimage_mmu::{Hva, HvaRange};
use afterimage_uffd::{Event, Features, RegisterModes, Resolved, Uffd, Wake};
use facility::{Kind, Memory, Touch, next_event, next_fault, settled, uffd};
use rustix::mm::{MapFlags, MremapFlags, ProtFlags};

/// One test at a time: addresses that one has unmapped must not come back registered by another.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn registered(kind: Kind, test: &str, features: Features) -> Option<(Uffd, Memory)> {
    let uffd = uffd(test, features)?;
    let mapping = kind.map(test, 4)?;
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    Some((uffd, mapping))
}

#[test]
fn zapping_is_announced() {
    let _alone = alone();
    for kind in Kind::ALL {
        let Some((uffd, mapping)) = registered(kind, "REMOVE", Features::EVENT_REMOVE) else { continue };
        let zap = Touch::spawn(&mapping, |mapping| {
            mapping.zap(mapping.pages(1, 2).expect("inside")).expect("zap");
            0
        });
        let event = next_event(&uffd);
        assert!(
            matches!(event, Event::Remove(r) if r == mapping.pages(1, 2).expect("inside")),
            "{kind:?}: {event:?}"
        );
        zap.finish();
    }
}

#[test]
fn freeing_a_files_pages_through_a_mapping_is_announced() {
    let _alone = alone();
    for kind in Kind::SHARED {
        let Some((uffd, mapping)) = registered(kind, "REMOVE by file", Features::EVENT_REMOVE) else {
            continue;
        };
        let remove = Touch::spawn(&mapping, |mapping| {
            mapping.remove(mapping.pages(3, 1).expect("inside")).expect("remove");
            0
        });
        let event = next_event(&uffd);
        assert!(
            matches!(event, Event::Remove(r) if r == mapping.pages(3, 1).expect("inside")),
            "{kind:?}: {event:?}"
        );
        remove.finish();
    }
}

#[test]
fn unmapping_is_announced() {
    let _alone = alone();
    for kind in Kind::ALL {
        let Some((uffd, memory)) = registered(kind, "UNMAP", Features::EVENT_UNMAP) else { continue };
        let Memory { mapping, claim: _claim } = memory;
        let range = mapping.range();
        // The last owner unmaps, and waits until that is read.
        let owner = std::thread::spawn(move || drop(mapping));
        let event = next_event(&uffd);
        assert!(matches!(event, Event::Unmap(r) if r == range), "{kind:?}: {event:?}");
        owner.join().expect("unmap");
        let gone = settled(|| {
            uffd.copy(range.start, &vec![0; range.len() as usize / 4], PROTECTION, Wake::Now).expect("copy")
        });
        assert_eq!(gone, Resolved::Gone(afterimage_uffd::Gone::Range), "{kind:?}");
    }
}

const PROTECTION: afterimage_uffd::Protection = afterimage_uffd::Protection::Writable;

#[test]
fn mapping_over_is_announced_as_unmapping() {
    let _alone = alone();
    let Some((uffd, mapping)) = registered(Kind::Anonymous, "UNMAP", Features::EVENT_UNMAP) else { return };
    let over = Touch::spawn(&mapping, |mapping| {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        // SAFETY: the pages belong to a mapping that nothing refers to; it will unmap what is put there.
        unsafe { rustix::mm::mmap_anonymous(mapping.as_ptr().cast(), 8192, ProtFlags::READ, flags) }
            .expect("mmap");
        0
    });
    let event = next_event(&uffd);
    assert!(matches!(event, Event::Unmap(r) if r == mapping.pages(0, 2).expect("inside")), "{event:?}");
    over.finish();
    // What is left of the registration is unmapped with the mapping: let nobody wait for it.
    drop(uffd);
}

#[test]
fn moving_is_announced_and_the_registration_moves_along() {
    let _alone = alone();
    let Some(uffd) = uffd("REMAP", Features::EVENT_REMAP) else { return };
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping, which the thread below moves and nobody else refers to.
    let old = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), 8192, access, MapFlags::PRIVATE) };
    let start = Hva::new(old.expect("mmap").expose_provenance() as u64);
    // SAFETY: as above.
    unsafe { uffd.register(HvaRange::new(start, start + 8192), RegisterModes::MISSING) }.expect("register");
    let mover = std::thread::spawn(move || {
        let old = std::ptr::with_exposed_provenance_mut(start.as_u64() as usize);
        // SAFETY: as above; growing forces no place, so the kernel may move it or not.
        let target = unsafe {
            let target =
                rustix::mm::mmap_anonymous(std::ptr::null_mut(), 8192, ProtFlags::empty(), MapFlags::PRIVATE)
                    .expect("mmap");
            rustix::mm::mremap_fixed(old, 8192, 8192, MremapFlags::MAYMOVE, target).expect("mremap")
        };
        target.expose_provenance() as u64
    });
    let event = next_event(&uffd);
    let Event::Remap { from, to, len } = event else { panic!("{event:?}") };
    assert_eq!((from, len), (start, 8192));
    assert_eq!(to.as_u64(), mover.join().expect("mremap"));

    let reader = std::thread::spawn(move || {
        let word: *const u64 = std::ptr::with_exposed_provenance(to.as_u64() as usize);
        // SAFETY: the moved mapping is readable and aligned.
        unsafe { word.read_volatile() }
    });
    assert_eq!(next_fault(&uffd).address, to);
    let page = HvaRange::new(to, to + 4096);
    assert_eq!(settled(|| uffd.zero(page, Wake::Now).expect("zero")), Resolved::Done);
    assert_eq!(reader.join().expect("read"), 0);
    drop(uffd);
    // SAFETY: nobody refers to it any more.
    unsafe { rustix::mm::munmap(std::ptr::with_exposed_provenance_mut(to.as_u64() as usize), 8192) }
        .expect("munmap");
}
