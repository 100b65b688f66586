//! Memory whose mapping is taken away without pause, but not its content: nothing is wrong.

mod plain;

use afterimage_mmu::{Gfn, GfnRange};
use afterimage_vm::{Guest, GuestSpec, Workload};
use plain::{Plain, finish, kinds, pattern, spec, until};

#[test]
fn a_guest_outlives_a_storm_of_invalidations() {
    for kind in kinds() {
        for workload in [Workload::STAMP, Workload::Scan, Workload::HOT] {
            let plain = Plain::shared(8 << 20);
            plain.fill(7);
            let spec =
                GuestSpec { vcpus: 2, workload, cross_every: 20, tag_check: true, ..spec(kind, &plain) };
            let guest = Guest::start(spec, |gfn| pattern(7, gfn)).expect("a guest");
            let (windows, mut invalidations) = (guest.windows(), 0_u64);
            until("faults meet invalidations", || {
                // Steps of a prime number of frames go everywhere.
                let start = Gfn::new(invalidations * 67 % (plain.frames() - 64));
                let range = GfnRange::from_len(start, 64).expect("a range");
                let window = windows.open(range);
                plain.drop_pages(range);
                window.end();
                invalidations += 1;
                let all_run = (0..2).all(|vcpu| guest.vcpu_counters(vcpu).accesses > 2000);
                all_run && invalidations > 2000 && guest.latency().inside.count() > 20
            });
            let report = guest.stop().expect("an orderly stop");
            assert_eq!(
                (report.counters().wrong, report.failure()),
                (0, None),
                "{kind} {workload}: {report:#?}"
            );
        }
    }
}

#[test]
fn memory_of_many_gib_works() {
    for kind in kinds() {
        // Only what is touched takes memory.
        let plain = Plain::new(6 << 30);
        let spec = GuestSpec {
            vcpus: 2,
            workload: Workload::Stamp { locality: None },
            cross_every: 5,
            tag_check: true,
            max_accesses: Some(2000),
            ..spec(kind, &plain)
        };
        let report = finish(Guest::start(spec, |_| [0; 3]).expect("a guest"));
        assert_eq!((report.counters().accesses, report.counters().wrong), (4000, 0), "{report:#?}");
    }
}
