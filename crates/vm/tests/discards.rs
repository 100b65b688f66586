//! The discard handshake: what the guest must see before, while and after.

mod plain;

use core::sync::atomic::Ordering::Relaxed;

use afterimage_mmu::{Gfn, GfnRange};
use afterimage_vm::{Discards, Guest, GuestKind, GuestSpec, WORD_OFFSETS, Workload, WrongKind};
use plain::{Plain, kinds, spec, start, until};

fn discarding(kind: GuestKind, vcpus: usize, every: u64) -> (Plain, Guest) {
    let plain = Plain::new(1 << 20);
    let spec = GuestSpec {
        vcpus,
        discards: Discards { every, share: 0.25 },
        workload: Workload::Stamp { locality: None },
        cross_every: 7,
        tag_check: true,
        ..spec(kind, &plain)
    };
    let guest = start(spec, &plain);
    (plain, guest)
}

fn request(guest: &Guest, vcpu: usize) -> GfnRange {
    let mut range = None;
    until("a request comes", || {
        range = guest.discard_request(vcpu);
        range.is_some()
    });
    range.expect("just seen")
}

/// Waits until each vCPU has made so many more accesses.
fn go_on(guest: &Guest, accesses: u64) {
    let before: Vec<u64> = (0..guest.vcpus()).map(|vcpu| guest.vcpu_counters(vcpu).accesses).collect();
    until("the guest goes on", || {
        (0..guest.vcpus()).all(|vcpu| guest.vcpu_counters(vcpu).accesses > before[vcpu] + accesses)
    });
}

#[test]
fn discards_that_are_carried_out_are_right() {
    for kind in kinds() {
        let (plain, guest) = discarding(kind, 2, 500);
        let mut done = [0; 2];
        until("discards of both", || {
            for (vcpu, done) in done.iter_mut().enumerate() {
                if let Some(range) = guest.discard_request(vcpu) {
                    assert_eq!((range.len(), range.start.as_u64() / 32 % 2), (32, vcpu as u64));
                    plain.drop_pages(range);
                    guest.acknowledge_discard(vcpu);
                    *done += 1;
                }
            }
            done.iter().all(|&done| done > 100)
        });
        let report = guest.stop().expect("an orderly stop");
        assert_eq!(report.counters().wrong, 0, "{kind}: {report:#?}");
        assert!(report.counters().discards >= 200);
    }
}

#[test]
fn an_open_request_stays_and_its_pages_are_only_read() {
    for kind in kinds() {
        let (plain, guest) = discarding(kind, 1, 500);
        let range = request(&guest, 0);
        go_on(&guest, 2000);
        let words = |gfn| WORD_OFFSETS.map(|offset| plain.word(Gfn::new(gfn), offset).load(Relaxed));
        let frames = || range.start.as_u64()..range.end.as_u64();
        let before: Vec<_> = frames().map(words).collect();
        go_on(&guest, 20_000);
        assert_eq!(guest.discard_request(0), Some(range));
        assert_eq!(frames().map(words).collect::<Vec<_>>(), before);
        // Half of the pages gone: old or zero, both are right.
        plain.drop_pages(GfnRange::from_len(range.start, 16).expect("a range"));
        go_on(&guest, 20_000);
        assert_eq!(guest.counters().wrong, 0);
        assert_eq!(guest.discard_request(1), None, "there is no vCPU 1");
        guest.stop().expect("an orderly stop");
    }
}

#[test]
fn an_acknowledgement_without_zeros_is_found() {
    for kind in kinds() {
        let (_plain, guest) = discarding(kind, 1, 500);
        let range = request(&guest, 0);
        guest.acknowledge_discard(0);
        until("it is found", || guest.counters().wrong > 0);
        let page = guest.wrong_pages()[0];
        println!("{kind}: {page}");
        assert_eq!((page.kind, page.expected), (WrongKind::First, 0));
        assert!(range.contains(page.gfn) && page.found != 0);
        guest.stop().expect("an orderly stop");
    }
}

#[test]
fn one_page_forgotten_by_a_discard_is_found() {
    for kind in kinds() {
        let (plain, guest) = discarding(kind, 1, 500);
        let range = request(&guest, 0);
        let forgotten = Gfn::new(range.start.as_u64() + 13);
        plain.drop_pages(GfnRange::new(range.start, forgotten));
        plain.drop_pages(GfnRange::new(forgotten + 1, range.end));
        guest.acknowledge_discard(0);
        until("it is found", || guest.counters().wrong > 0);
        assert_eq!(guest.wrong_pages()[0].gfn, forgotten);
        guest.stop().expect("an orderly stop");
    }
}

#[test]
fn a_page_that_comes_back_after_zeros_is_found() {
    for kind in kinds() {
        let (plain, guest) = discarding(kind, 1, 500);
        let range = request(&guest, 0);
        go_on(&guest, 100);
        let old = plain.word(range.start, 0).load(Relaxed);
        plain.drop_pages(range);
        go_on(&guest, 20_000);
        assert_eq!(guest.counters().wrong, 0);
        plain.word(range.start, 0).store(old, Relaxed);
        until("it is found", || guest.counters().wrong > 0);
        let page = guest.wrong_pages()[0];
        assert_eq!((page.kind, page.gfn, page.found), (WrongKind::Discarding, range.start, old));
        guest.stop().expect("an orderly stop");
    }
}

#[test]
fn rubbish_under_a_discard_is_found() {
    for kind in kinds() {
        let (plain, guest) = discarding(kind, 2, 500);
        let range = request(&guest, 1);
        go_on(&guest, 100);
        plain.word(range.start, 0).store(0x1234_5678, Relaxed);
        // vCPU 1 may look for the tag first, as vCPU 0 does.
        let has = |vcpu, kind| guest.wrong_pages().iter().any(|page| page.vcpu == vcpu && page.kind == kind);
        until("each finds it in its way", || has(0, WrongKind::Tag) && has(1, WrongKind::Discarding));
        let pages = guest.wrong_pages();
        assert!(pages.iter().all(|page| page.gfn == range.start && page.found == 0x1234_5678), "{pages:#?}");
        guest.stop().expect("an orderly stop");
    }
}
