//! Invalidations against faults, each interleaving held still at a gate.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use afterimage_memory::State;
use afterimage_mmu::{
    Barrier, Blocking, Coverage, Policy, Precheck, RetryPoint, SequenceScope, WitnessKind, YieldPolicy, Zap,
};
use afterimage_uffd::Backing;

use crate::support::{BACKINGS, Machine, Setup, Stamps, Touch, stamp, wait_until};

/// Both ways to find a fault doomed, by the hint and by the check that counts, with each witness of that check.
const POLICIES: [(Policy, RetryPoint); 4] = [
    (policy(Precheck::all(), WitnessKind::Lock), RetryPoint::AfterFaultIn),
    (policy(Precheck::empty(), WitnessKind::Lock), RetryPoint::UnderLock),
    (policy(Precheck::all(), WitnessKind::Intent), RetryPoint::AfterFaultIn),
    (policy(Precheck::empty(), WitnessKind::Intent), RetryPoint::UnderLock),
];

const fn policy(precheck: Precheck, witness: WitnessKind) -> Policy {
    Policy {
        precheck,
        witness,
        // The other barrier has its turn in the tests of whole runs.
        barrier: Barrier::Heavy,
        yielding: YieldPolicy::OnContention,
        scope: SequenceScope::Global,
        coverage: Coverage::Hull,
        turns: None,
    }
}

#[track_caller]
fn assert_one_retry(machine: &Machine, point: RetryPoint) {
    for other in RetryPoint::ALL {
        assert_eq!(machine.retries(other), u64::from(other == point), "retries at {other:?}");
    }
}

#[test]
fn a_discard_while_the_source_is_read_ends_and_wins() {
    for (backing, (policy, point)) in BACKINGS.into_iter().flat_map(|b| POLICIES.map(|p| (b, p))) {
        let source = Stamps::new(4);
        let setup = Setup { policy, ..Setup::new("discard, reading", backing, 4).source(&source) };
        let Some(machine) = setup.start() else { return };
        source.gate.close_for(2);
        let touch = machine.reading(2);
        source.gate.wait_for_someone();
        // It need not wait for the device.
        assert_eq!(machine.discard(machine.pages(0, 4)), 4, "{backing:?}");
        source.gate.open();
        assert_eq!(touch.finish(), 0, "{backing:?}: an afterimage");
        assert_one_retry(&machine, point);
        assert_eq!(machine.read(2), 0);
        machine.stop_clean();
    }
}

#[test]
fn an_eviction_while_the_source_is_read_ends_and_the_page_is_right() {
    for (backing, (policy, point)) in BACKINGS.into_iter().flat_map(|b| POLICIES.map(|p| (b, p))) {
        let source = Stamps::new(4);
        let setup = Setup { policy, ..Setup::new("evict, reading", backing, 4).source(&source) };
        let Some(machine) = setup.start() else { return };
        machine.read(1);
        source.gate.close_for(2);
        let touch = machine.reading(2);
        source.gate.wait_for_someone();
        assert_eq!(machine.evict(machine.pages(0, 4)), 1, "{backing:?}");
        source.gate.open();
        assert_eq!(touch.finish(), stamp(2), "{backing:?}");
        assert_one_retry(&machine, point);
        machine.stop_clean();
    }
}

#[test]
fn a_page_that_is_evicted_between_look_up_and_install_is_looked_up_again() {
    for (policy, point) in POLICIES {
        let source = Stamps::new(4);
        let setup = Setup::new("evict, looked up", Backing::Shared, 4).source(&source);
        let Some(machine) = (Setup { policy, ..setup }).start() else { return };
        machine.view.gate.close_for(2);
        let touch = machine.reading(2);
        machine.view.gate.wait_for_someone();
        assert_eq!(machine.state(2), State::Resident);
        assert_eq!(machine.evict(machine.pages(2, 3)), 1);
        machine.view.gate.open();
        assert_eq!(touch.finish(), stamp(2));
        assert_one_retry(&machine, point);
        assert_eq!((machine.stats().from_source, machine.stats().from_store), (1, 1));
        machine.stop_clean();
    }
}

#[test]
fn a_page_that_is_discarded_between_look_up_and_install_is_zeros() {
    for (policy, point) in POLICIES {
        let source = Stamps::new(4);
        let setup = Setup::new("discard, looked up", Backing::Shared, 4).source(&source);
        let Some(machine) = (Setup { policy, ..setup }).start() else { return };
        machine.view.gate.close_for(2);
        let touch = machine.reading(2);
        machine.view.gate.wait_for_someone();
        assert_eq!(machine.discard(machine.pages(2, 3)), 1);
        machine.view.gate.open();
        assert_eq!(touch.finish(), 0);
        assert_one_retry(&machine, point);
        machine.stop_clean();
    }
}

/// In anonymous memory a page on its way to its mapping stays locked; who invalidates it waits for the engine to notice.
#[test]
fn an_anonymous_page_on_its_way_is_taken_back_by_a_discard() {
    let source = Stamps::new(4);
    let Some(machine) = Setup::new("anonymous, on its way", Backing::Anonymous, 4).source(&source).start()
    else {
        return;
    };
    machine.view.gate.close_for(2);
    let touch = machine.reading(2);
    machine.view.gate.wait_for_someone();
    let (object, frames) = (Arc::clone(&machine.object), machine.pages(2, 3));
    let discard = thread::spawn(move || object.discard(frames).expect("discard").frames);
    wait_until("the discard begins", || machine.mmu.invalidations().in_progress() == 1);
    machine.view.gate.open();
    assert_eq!(discard.join().expect("discard"), 1);
    assert_eq!(touch.finish(), 0);
    machine.wait_resident(2);
    assert_eq!(machine.retries(RetryPoint::AfterFaultIn), 1);
    assert_eq!(machine.stats().resident_bytes, 4096, "the place that the first try took was given back");
    machine.stop_clean();
}

/// Two workers bring one anonymous page: the second must not wait for the source with `mmu_lock` held, nor the first.
#[test]
fn a_slow_source_holds_up_no_invalidation() {
    let source = Stamps::new(8);
    let setup =
        Setup { workers: 2, uffds: 1, ..Setup::new("slow source", Backing::Anonymous, 8).source(&source) };
    let Some(machine) = setup.start() else { return };
    source.gate.close_for(1);
    let slow = machine.reading(1);
    source.gate.wait_for_someone();
    // The gate lets the second reader of the page through: it brings the page while the first still reads.
    let second = machine.reading(1);
    assert_eq!(second.finish(), stamp(1));
    assert_eq!(slow.finish(), stamp(1), "one install wakes all");
    assert_eq!(machine.evict(machine.all()), 1);
    assert_eq!(machine.discard(machine.all()), 8);
    source.gate.open();
    assert_eq!(machine.read(1), 0);
    machine.wait_resident(1);
    wait_until("the first fault retries", || machine.retries(RetryPoint::AfterFaultIn) == 1);
    // It reserves a page for its next try before it finds that there is one.
    wait_until("the first fault ends", || machine.stats().resident_bytes == 4096);
    machine.stop_clean();
}

#[test]
fn a_write_that_waits_for_a_checkpoint_finds_its_page_evicted_afterwards() {
    for backing in BACKINGS {
        let Some(machine) = Setup::new("write, evicted", backing, 4).start() else { return };
        machine.write(1, 1);
        let mut write = None;
        machine
            .object
            .protect(machine.all(), |page, bytes| {
                if page.as_u64() == 0 {
                    write = Some(machine.writing(1, 2));
                    wait_until("the writer waits", || machine.retries(RetryPoint::BeforeFaultIn) > 0);
                    // Inside another invalidation; the writer waits for both.
                    machine.evict(machine.all());
                    assert_eq!(machine.state(1), State::Stored, "{backing:?}");
                } else if page.as_u64() == 1 {
                    assert_eq!(
                        bytes.expect("bytes")[0],
                        1,
                        "{backing:?}: as it was when the checkpoint began"
                    );
                }
            })
            .expect("a checkpoint");
        write.expect("it was begun").finish();
        assert_eq!(machine.read(1), 2, "{backing:?}: the write went through in the end");
        machine.stop_clean();
    }
}

/// No fault waits for a timer here: each is parked on an invalidation, and only its end can wake it.
#[test]
fn every_end_wakes_who_waits_for_it() {
    const PAGES: u64 = 16;
    for (uffds, workers) in [(1, 1), (2, 3)] {
        let source = Stamps::new(PAGES);
        let setup = Setup { uffds, workers, ..Setup::new("wake", Backing::Shared, PAGES).source(&source) };
        let Some(machine) = setup.start() else { return };
        let stop = Arc::new(AtomicBool::new(false));
        let touched = Arc::new([const { AtomicU64::new(0) }; 2]);
        let guests: Vec<_> = (0..touched.len())
            .map(|guest| {
                let (stop, touched) = (Arc::clone(&stop), Arc::clone(&touched));
                Touch::spawn(&machine.mapping, move |mapping| {
                    while !stop.load(Relaxed) {
                        let page = touched[guest].fetch_add(1, Relaxed) * (guest as u64 + 3) % PAGES;
                        assert_eq!(mapping.word(page * 4096).expect("inside").load(Relaxed), stamp(page));
                    }
                })
            })
            .collect();
        // An invalidation that changes nothing: short, and all over the place.
        let all = machine.mapping.range();
        for _ in 0..5_000 {
            drop(machine.mmu.invalidate(all, Zap::Unmap, Blocking::Allowed));
        }
        // Some that last until a fault waits for them, and its worker most likely sleeps.
        for _ in 0..100 {
            let progress = touched.each_ref().map(|count| count.load(Relaxed));
            wait_until("every guest goes on", || {
                touched.iter().zip(progress).all(|(now, before)| now.load(Relaxed) > before + 1)
            });
            let before = machine.mmu.fault_stats().retried();
            let invalidation = machine.mmu.invalidate(all, Zap::Unmap, Blocking::Allowed);
            wait_until("a fault waits", || machine.mmu.fault_stats().retried() > before);
            for _ in 0..50 {
                thread::yield_now();
            }
            drop(invalidation);
        }
        stop.store(true, Relaxed);
        guests.into_iter().for_each(Touch::finish);
        let timed = machine.retries(RetryPoint::LostRace) + machine.retries(RetryPoint::SlotChanging);
        assert_eq!(timed, 0, "a fault waited for a timer");
        machine.stop_clean();
    }
}
