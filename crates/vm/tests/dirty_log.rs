//! The dirty log of a KVM guest has the pages that it wrote.

mod plain;

use std::collections::BTreeSet;

use afterimage_mmu::Gfn;
use afterimage_vm::{DirtyLog, Guest, GuestKind, GuestSpec, VmError, Workload};
use core::sync::atomic::Ordering::Relaxed;
use plain::{Plain, finish, kinds, pattern, spec, start, until};

/// The frames that have a stamp instead of the pattern.
fn stamped(plain: &Plain) -> BTreeSet<u64> {
    let word = |gfn| plain.word(Gfn::new(gfn), 0).load(Relaxed);
    (0..plain.frames()).filter(|&gfn| word(gfn) != pattern(7, Gfn::new(gfn))[0]).collect()
}

fn log(guest: &Guest) -> BTreeSet<u64> {
    guest.dirty_frames().expect("the log").iter().map(Gfn::as_u64).collect()
}

#[test]
fn the_dirty_log_equals_the_stamps() {
    if !kinds().contains(&GuestKind::Kvm) {
        return;
    }
    let plain = Plain::new(4 << 20);
    // So few accesses that many pages are not touched. All of them write: KVM may log a page that was only read, since
    // it maps that writable as well.
    let spec = GuestSpec {
        vcpus: 2,
        write_share: 1.0,
        workload: Workload::Stamp { locality: None },
        dirty_log: DirtyLog::On,
        max_accesses: Some(300),
        ..spec(GuestKind::Kvm, &plain)
    };
    let guest = start(spec, &plain);
    assert!(guest.wait_ended(plain::PATIENCE));
    let dirty = guest.dirty_frames().expect("the log");
    let frames: BTreeSet<u64> = dirty.iter().map(Gfn::as_u64).collect();
    assert_eq!(frames, stamped(&plain));
    assert!((100..600).contains(&frames.len()) && dirty.len() == frames.len() as u64 && !dirty.is_empty());
    for gfn in (0..plain.frames()).chain([1 << 40]) {
        assert_eq!(dirty.contains(Gfn::new(gfn)), frames.contains(&gfn));
    }
    assert!(guest.dirty_frames().expect("the log").is_empty(), "reading clears it");
    assert_eq!(finish(guest).counters().wrong, 0);
}

#[test]
fn the_dirty_log_of_a_running_guest_fills_again() {
    if !kinds().contains(&GuestKind::Kvm) {
        return;
    }
    let plain = Plain::new(4 << 20);
    // It touches the first 64 of its pages only.
    let workload = Workload::Hot { one_in: 16, share: 1.0 };
    let guest = start(GuestSpec { workload, ..spec(GuestKind::Kvm, &plain) }, &plain);
    until("all hot pages are written", || stamped(&plain).len() == 64);
    guest.start_dirty_log().expect("dirty logging");
    for _ in 0..3 {
        let mut frames = BTreeSet::new();
        until("all hot pages are written again", || {
            frames.extend(log(&guest));
            frames.len() >= 64
        });
        assert_eq!(frames, (0..64).collect());
    }
    guest.stop_dirty_log().expect("no more logging");
    assert_eq!(guest.stop().expect("an orderly stop").counters().wrong, 0);
}

#[test]
fn a_thread_guest_has_no_dirty_log() {
    let plain = Plain::new(1 << 20);
    let thread = spec(GuestKind::Thread, &plain);
    let guest = start(thread, &plain);
    assert!(matches!(guest.start_dirty_log(), Err(VmError::NeedsKvm { .. })));
    assert!(matches!(guest.dirty_frames(), Err(VmError::NeedsKvm { .. })));
    guest.stop().expect("an orderly stop");
    let logged = Guest::start(GuestSpec { dirty_log: DirtyLog::On, ..thread }, |_| [0; 3]);
    assert!(matches!(logged, Err(VmError::NeedsKvm { .. })));
}
