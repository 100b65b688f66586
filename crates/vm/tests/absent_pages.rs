//! Pages that nobody provides, and poisoned ones: the vCPU ends, says where, and nothing hangs.

mod absent;
mod plain;

use std::time::{Duration, Instant};

use absent::{Absent, UFFD_FEATURE_POISON, UFFD_FEATURE_SIGBUS};
use afterimage_mmu::Gfn;
use afterimage_vm::{GuestKind, VcpuEnd};
use plain::{PATIENCE, kinds, until};

#[test]
fn a_vcpu_that_waits_for_a_page_can_be_stopped() {
    for kind in kinds() {
        let Some(absent) = Absent::new(kind, 0) else { continue };
        absent.provide_zeros(0, 10);
        let guest = absent.scan(kind, 1);
        until("it comes to the missing page", || guest.counters().accesses == 10);
        until("it says where it is", || guest.current_gfn(0) == Gfn::new(10));
        assert_eq!(guest.failure(), None);
        let begin = Instant::now();
        let report = guest.stop_within(Duration::from_millis(20)).expect("an orderly stop");
        assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
        assert_eq!(report.vcpus[0].end, VcpuEnd::Kicked { gfn: Gfn::new(10) });
        assert_eq!((report.counters().accesses, report.counters().wrong), (10, 0));
        println!("{kind}: {}", report.failure().expect("a failure"));
    }
}

#[test]
fn only_the_vcpu_that_waits_is_kicked() {
    for kind in kinds() {
        let Some(absent) = Absent::new(kind, 0) else { continue };
        // All but frame 40, which belongs to vCPU 1.
        absent.provide_zeros(0, 40);
        absent.provide_zeros(41, 256);
        let guest = absent.scan(kind, 2);
        until("vCPU 1 comes to the missing page", || guest.vcpu_counters(1).accesses == 8);
        let before = guest.vcpu_counters(0).accesses;
        until("vCPU 0 goes on", || guest.vcpu_counters(0).accesses > before + 1000);
        // Long enough for vCPU 0 on any machine; vCPU 1 never comes.
        let report = guest.stop_within(Duration::from_secs(5)).expect("an orderly stop");
        assert_eq!(report.vcpus[0].end, VcpuEnd::Stopped);
        assert_eq!(report.vcpus[1].end, VcpuEnd::Kicked { gfn: Gfn::new(40) });
    }
}

#[test]
fn a_page_that_comes_late_is_no_error() {
    for kind in kinds() {
        let Some(absent) = Absent::new(kind, 0) else { continue };
        absent.provide_zeros(0, 10);
        let guest = absent.scan(kind, 1);
        until("it comes to the missing page", || guest.counters().accesses == 10);
        absent.provide_zeros(10, 256);
        until("it goes on", || guest.counters().accesses > 1000);
        let report = guest.stop().expect("an orderly stop");
        assert_eq!((report.failure(), report.counters().wrong), (None, 0));
        assert!(report.latency().all().max() > Duration::from_micros(1));
    }
}

#[test]
fn a_poisoned_page_ends_the_vcpu_that_touches_it() {
    for kind in kinds() {
        let Some(absent) = Absent::new(kind, UFFD_FEATURE_POISON) else { continue };
        absent.provide_zeros(0, 40);
        absent.poison(40);
        absent.provide_zeros(41, 256);
        let guest = absent.scan(kind, 2);
        until("vCPU 1 ends", || guest.failure().is_some());
        let failure = guest.failure().expect("just seen");
        println!("{kind}: {failure}");
        assert_eq!(failure.vcpu, 1);
        let gfn = Gfn::new(40);
        // A kernel without memory failure handling does not tell a thread why.
        let untold = kind == GuestKind::Thread && failure.end == VcpuEnd::Unresolved { gfn };
        assert!(untold || failure.end == VcpuEnd::Poisoned { gfn }, "{failure}");
        let before = guest.vcpu_counters(0).accesses;
        until("vCPU 0 goes on", || guest.vcpu_counters(0).accesses > before + 1000);
        let report = guest.stop().expect("an orderly stop");
        assert_eq!(report.vcpus[0].end, VcpuEnd::Stopped);
        assert_eq!((report.vcpus[1].counters.accesses, report.counters().wrong), (8, 0));
    }
}

#[test]
fn a_page_that_the_host_refuses_ends_the_vcpu() {
    for kind in kinds() {
        let Some(absent) = Absent::new(kind, UFFD_FEATURE_SIGBUS) else { continue };
        absent.provide_zeros(0, 10);
        let guest = absent.scan(kind, 1);
        assert!(guest.wait_ended(PATIENCE));
        let report = guest.stop().expect("an orderly stop");
        println!("{kind}: {}", report.failure().expect("a failure"));
        assert_eq!(report.vcpus[0].end, VcpuEnd::Unresolved { gfn: Gfn::new(10) });
    }
}
