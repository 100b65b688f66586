//! Every workload, on either host, finds nothing wrong in memory that nobody touches.

mod plain;

use afterimage_mmu::PageSize;
use afterimage_testing::HugePages;
use afterimage_vm::{Discards, GuestSpec, VcpuEnd, VmError, Workload};
use plain::{Plain, finish, kinds, spec, start};

const ACCESSES: u64 = 40_000;

#[test]
fn nothing_is_wrong_in_plain_memory() {
    for kind in kinds() {
        for vcpus in [1, 2, 3] {
            for workload in
                [Workload::STAMP, Workload::Stamp { locality: None }, Workload::Scan, Workload::HOT]
            {
                // Not a multiple of the ownership blocks: the tail has an owner too.
                let plain = Plain::new((4 << 20) + 5 * 4096);
                let spec = GuestSpec {
                    vcpus,
                    workload,
                    cross_every: 10,
                    tag_check: true,
                    max_accesses: Some(ACCESSES),
                    ..spec(kind, &plain)
                };
                let report = finish(start(spec, &plain));
                let counters = report.counters();
                let label = format!("{kind} {vcpus} {workload:?}: {report:#?}");
                assert_eq!(counters.accesses, ACCESSES * vcpus as u64, "{label}");
                assert_eq!(counters.wrong, 0, "{label}");
                assert!(counters.writes > ACCESSES / 2, "{label}");
                assert!(counters.cross >= ACCESSES * vcpus as u64 / 11, "{label}");
                assert_eq!(report.latency().all().count(), counters.accesses + counters.writes, "{label}");
                assert_eq!(report.latency().inside.count(), 0, "{label}");
                assert!(report.vcpus.iter().all(|vcpu| vcpu.end == VcpuEnd::Limit), "{label}");
            }
        }
    }
}

#[test]
fn a_scan_reads_all_own_pages_before_it_writes() {
    for kind in kinds() {
        let plain = Plain::new(1 << 20);
        let frames = plain.frames();
        let scan = GuestSpec { workload: Workload::Scan, write_share: 1.0, ..spec(kind, &plain) };
        let report = finish(start(GuestSpec { max_accesses: Some(frames), ..scan }, &plain));
        assert_eq!(report.counters().writes, 0);
        let report = finish(start(GuestSpec { max_accesses: Some(2 * frames), ..scan }, &plain));
        assert_eq!((report.counters().writes, report.counters().wrong), (frames, 0));
        // Every page has a stamp now, and each carries its frame.
        for gfn in (0..frames).map(afterimage_mmu::Gfn::new) {
            let word = plain.word(gfn, 0).load(core::sync::atomic::Ordering::Relaxed);
            assert_eq!(word & 0xffff_ffff, gfn.as_u64());
            assert_ne!(word, plain::pattern(7, gfn)[0]);
        }
    }
}

#[test]
fn a_guest_stops_when_it_is_told_to() {
    for kind in kinds() {
        let plain = Plain::new(4 << 20);
        let guest = start(GuestSpec { vcpus: 2, ..spec(kind, &plain) }, &plain);
        plain::until("both vCPUs run", || (0..2).all(|vcpu| guest.vcpu_counters(vcpu).accesses > 1000));
        assert!(!guest.has_ended());
        assert_eq!(guest.failure(), None);
        let report = guest.stop().expect("an orderly stop");
        assert!(
            report.vcpus.iter().all(|vcpu| vcpu.end == VcpuEnd::Stopped && vcpu.exits > 0),
            "{report:#?}"
        );
        assert_eq!(report.counters().wrong, 0);
        assert_eq!(report.failure(), None);
    }
}

#[test]
fn a_dropped_guest_stops() {
    for kind in kinds() {
        let plain = Plain::new(4 << 20);
        let handle = start(spec(kind, &plain), &plain).handle();
        assert!(handle.has_ended());
    }
}

#[test]
fn huge_pages_work() {
    let Some(_pages) = HugePages::claim("huge_pages_work", 4) else { return };
    for kind in kinds() {
        let plain = Plain::huge(8 << 20);
        let spec = GuestSpec {
            vcpus: 2,
            discards: Discards { every: 1000, share: 0.25 },
            ..GuestSpec::new(kind, plain.memory(), PageSize::Size2M)
        };
        assert_eq!(spec.block_frames, 512);
        let guest = start(spec, &plain);
        let mut done = [0; 2];
        plain::until("discards of both", || {
            for (vcpu, done) in done.iter_mut().enumerate() {
                if let Some(range) = guest.discard_request(vcpu) {
                    assert_eq!((range.len(), range.start.as_u64() % 512), (512, 0));
                    plain.drop_pages(range);
                    guest.acknowledge_discard(vcpu);
                    *done += 1;
                }
            }
            assert_eq!(guest.failure(), None);
            done.iter().all(|&done| done > 5)
        });
        let report = guest.stop().expect("an orderly stop");
        assert_eq!(report.counters().wrong, 0, "{report:#?}");
    }
}

#[test]
fn a_bad_specification_starts_nothing() {
    let plain = Plain::new(1 << 20);
    let good = spec(afterimage_vm::GuestKind::Thread, &plain);
    let bad = [
        GuestSpec { vcpus: 0, ..good },
        GuestSpec { vcpus: 9, ..good },
        GuestSpec { block_frames: 48, ..good },
        GuestSpec { write_share: 1.5, ..good },
        GuestSpec { write_share: f64::NAN, ..good },
        GuestSpec { page_size: PageSize::Size2M, ..good },
        GuestSpec { workload: Workload::Hot { one_in: 0, share: 0.5 }, ..good },
    ];
    for spec in bad {
        let error = afterimage_vm::Guest::start(spec, |_| [0; 3]).expect_err("a bad specification");
        assert!(matches!(error, VmError::Spec { .. }), "{error}");
    }
}
