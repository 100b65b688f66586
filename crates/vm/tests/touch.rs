//! A touching guest touches what it was told to, when it was told to, and KVM's counters say so.

mod plain;

use core::sync::atomic::Ordering::Relaxed;

use afterimage_mmu::{Gfn, GfnRange};
use afterimage_testing::skip;
use afterimage_vm::{Pace, TouchAccess, TouchGuest, TouchOrder, VmError, Walk, WrongKind, probe};
use plain::{Plain, until};

const FRAMES: u64 = 1024;

/// Memory that holds the tags, or nothing where there is no KVM.
fn memory(test: &str) -> Option<Plain> {
    if probe().usable().is_none() {
        skip(test, "no usable /dev/kvm");
        return None;
    }
    let memory = Plain::shared((FRAMES * 4096) as usize);
    for gfn in (0..FRAMES).map(Gfn::new) {
        memory.word(gfn, 0).store(TouchGuest::tag(gfn), Relaxed);
    }
    Some(memory)
}

fn all() -> GfnRange {
    GfnRange::from_len(Gfn::new(0), FRAMES).expect("in range")
}

#[test]
fn each_round_faults_on_what_was_taken_away() {
    let Some(memory) = memory("each_round_faults_on_what_was_taken_away") else { return };
    // KVM without hardware tables maps neighbours along, at most 8.
    let walk = Walk::over(all(), 8, Pace::OnRelease);
    assert_eq!(walk.count, FRAMES / 8);
    let guest = TouchGuest::start(memory.memory(), &[walk]).expect("a guest");
    assert!(guest.is_waiting(0), "not even the first round begins by itself");
    for round in 1..=3 {
        memory.drop_pages(all());
        let before = guest.counters_of_kvm().read().expect("they are readable");
        guest.release(0);
        until("a round", || guest.rounds(0) == round);
        assert!(guest.is_waiting(0));
        let grown = guest.counters_of_kvm().read().expect("as before").since(&before);
        let taken = grown.get("pf_taken").expect("this kernel counts faults");
        assert!(taken >= walk.count, "{taken} faults in a round of {}: {grown:?}", walk.count);
        assert_eq!(guest.counters().accesses, round * walk.count);
    }
    let report = guest.stop().expect("it sees the stop flag");
    assert_eq!((report.counters().wrong, report.latency().all().count()), (0, 3 * walk.count));
    assert_eq!(report.latency().slowest(5).all().count(), 5);
}

#[test]
fn a_sweep_leaves_nothing_to_fault_on() {
    let Some(memory) = memory("a_sweep_leaves_nothing_to_fault_on") else { return };
    let guest =
        TouchGuest::start(memory.memory(), &[Walk::over(all(), 1, Pace::OnRelease)]).expect("a guest");
    guest.sweep(0, all(), 1);
    until("a sweep", || guest.has_swept(0));
    let before = guest.counters_of_kvm().read().expect("they are readable");
    guest.release(0);
    until("a round", || guest.rounds(0) == 1);
    let grown = guest.counters_of_kvm().read().expect("as before").since(&before);
    let taken = grown.get("pf_taken").expect("this kernel counts faults");
    // None, where nobody else takes pages away meanwhile.
    assert!(taken < FRAMES / 16, "{taken} faults on memory that was mapped: {grown:?}");
    assert_eq!(guest.stop().expect("it sees the stop flag").counters().accesses, FRAMES);
}

#[test]
fn another_frames_tag_is_a_wrong_page() {
    let Some(memory) = memory("another_frames_tag_is_a_wrong_page") else { return };
    memory.word(Gfn::new(7), 0).store(TouchGuest::tag(Gfn::new(8)), Relaxed);
    memory.word(Gfn::new(9), 0).store(0, Relaxed);
    let guest =
        TouchGuest::start(memory.memory(), &[Walk::over(all(), 1, Pace::OnRelease)]).expect("a guest");
    guest.release(0);
    until("a round", || guest.rounds(0) == 1);
    let report = guest.stop().expect("it sees the stop flag");
    let wrong: Vec<_> = report.wrong_pages().map(|page| (page.gfn, page.kind)).collect();
    assert_eq!(wrong, [(Gfn::new(7), WrongKind::Tag)], "zeros are what a page that was given up reads as");
}

#[test]
fn what_a_vcpu_writes_is_the_tag() {
    let Some(memory) = memory("what_a_vcpu_writes_is_the_tag") else { return };
    memory.word(Gfn::new(5), 0).store(77, Relaxed);
    let walk = Walk { access: TouchAccess::Write, ..Walk::over(all(), 5, Pace::OnRelease) };
    let guest = TouchGuest::start(memory.memory(), &[walk]).expect("a guest");
    guest.release(0);
    until("a round", || guest.rounds(0) == 1);
    let counters = guest.stop().expect("it sees the stop flag").counters();
    assert_eq!((counters.writes, counters.wrong), (walk.count, 0));
    assert_eq!(memory.word(Gfn::new(5), 0).load(Relaxed), TouchGuest::tag(Gfn::new(5)));
}

#[test]
fn by_chance_most_frames_are_touched_in_two_rounds() {
    let Some(memory) = memory("by_chance_most_frames_are_touched_in_two_rounds") else { return };
    let walk = Walk {
        order: TouchOrder::Random,
        access: TouchAccess::Clear,
        ..Walk::over(all(), 1, Pace::OnRelease)
    };
    let guest = TouchGuest::start(memory.memory(), &[walk]).expect("a guest");
    for round in 1..=2 {
        guest.release(0);
        until("a round", || guest.rounds(0) == round);
    }
    assert_eq!(guest.vcpu_latency(0).all().count(), 2 * FRAMES);
    assert_eq!(guest.stop().expect("it sees the stop flag").counters().wrong, 0);
    let cleared = (0..FRAMES).filter(|&gfn| memory.word(Gfn::new(gfn), 0).load(Relaxed) == 0).count() as u64;
    // 1 - e^-2 of them, if chance is fair.
    assert!((FRAMES * 3 / 4..FRAMES).contains(&cleared), "{cleared}");
}

#[test]
fn a_walk_out_of_the_memory_is_refused() {
    let Some(memory) = memory("a_walk_out_of_the_memory_is_refused") else { return };
    let walk = Walk { count: FRAMES + 1, ..Walk::over(all(), 1, Pace::Endless) };
    assert!(matches!(TouchGuest::start(memory.memory(), &[walk]), Err(VmError::Spec { .. })));
    let none = Walk { count: 0, ..walk };
    assert!(matches!(TouchGuest::start(memory.memory(), &[none]), Err(VmError::Spec { .. })));
}
