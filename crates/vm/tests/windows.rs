//! Accesses are filed by the invalidation windows that cover them.

mod plain;

use std::time::Duration;

use afterimage_mmu::{Gfn, GfnRange};
use afterimage_vm::{GuestHandle, GuestSpec, Workload};
use plain::{Plain, kinds, spec, start, until};

fn frames(start: u64, end: u64) -> GfnRange {
    GfnRange::new(Gfn::new(start), Gfn::new(end))
}

/// Samples inside and outside while the guest makes some more accesses.
fn filed(guest: &GuestHandle) -> (u64, u64) {
    // What was under way when the window changed is over after a few accesses.
    let settled = guest.counters().accesses + 100;
    until("the guest goes on", || guest.counters().accesses > settled);
    let before = guest.latency();
    until("the guest goes on", || guest.counters().accesses > settled + 50_000);
    let since = guest.latency().since(&before);
    (since.inside.count(), since.outside.count())
}

#[test]
fn a_window_takes_the_accesses_that_it_covers() {
    for kind in kinds() {
        let plain = Plain::new(1 << 20);
        let guest =
            start(GuestSpec { workload: Workload::Stamp { locality: None }, ..spec(kind, &plain) }, &plain);
        let windows = guest.windows();
        assert_eq!(filed(&guest).0, 0);
        let everything = windows.open(frames(0, 256));
        assert_eq!(filed(&guest).1, 0);
        // All slots open, one half covered, some of it twice.
        let half: Vec<_> = (0..7).map(|at| windows.open(frames(16 * at, 16 * at + 32))).collect();
        everything.end();
        let (inside, outside) = filed(&guest);
        assert!(inside > 2 * outside / 3 && outside > 2 * inside / 3, "{inside} inside, {outside} outside");
        assert!(half.iter().all(|window| window.is_published()));
        let last = windows.open(frames(0, 0));
        assert!(last.is_published() && !windows.open(frames(0, 256)).is_published(), "there are eight slots");
        drop(half);
        assert_eq!(filed(&guest).0, 0, "an empty window covers nothing");
        drop(last);
        assert_eq!(filed(&guest).0, 0);
        guest.stop().expect("an orderly stop");
    }
}

#[test]
fn a_window_elsewhere_leaves_the_accesses_outside() {
    for kind in kinds() {
        let plain = Plain::new(1 << 20);
        let spec = GuestSpec {
            workload: Workload::Stamp { locality: None },
            max_accesses: Some(200_000),
            ..spec(kind, &plain)
        };
        let guest = start(spec, &plain);
        let mut opened = 0_u64;
        while !guest.has_ended() {
            guest.windows().open(frames(1000, 2000)).end();
            opened += 1;
        }
        let report = plain::finish(guest);
        assert_eq!(report.latency().inside.count(), 0, "after {opened} windows");
    }
}

#[test]
fn an_access_is_inside_a_window_that_comes_and_goes_meanwhile() {
    for kind in kinds() {
        let plain = Plain::new(1 << 20);
        let guest =
            start(GuestSpec { workload: Workload::Stamp { locality: None }, ..spec(kind, &plain) }, &plain);
        let before = guest.latency().inside.count();
        until("some access overlaps a short window", || {
            guest.windows().open(frames(0, 256)).end();
            guest.latency().inside.count() > before + 10
        });
        let latency = guest.stop().expect("an orderly stop").latency();
        assert!(latency.all().max() >= latency.outside.max() && latency.all().p50() > Duration::ZERO);
    }
}
