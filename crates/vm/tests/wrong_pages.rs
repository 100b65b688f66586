//! What a host can do wrong to a page is found, and told with frame, expected and found.

mod plain;

use core::sync::atomic::Ordering::Relaxed;

use afterimage_mmu::{Gfn, GfnRange};
use afterimage_vm::{GuestKind, GuestSpec, WORD_OFFSETS, Workload, WrongKind, WrongPage};
use plain::{Plain, kinds, pattern, spec, start, until};

const VICTIM: Gfn = Gfn::new(77);
const MIDDLE: usize = WORD_OFFSETS[1];
const LAST: usize = WORD_OFFSETS[2];

/// Runs a guest that has written no page yet but looks at all, lets `break_it` loose on its memory, and returns what the
/// guest finds: one thing only.
fn found(kind: GuestKind, write_share: f64, break_it: impl Fn(&Plain)) -> WrongPage {
    let pages = all_found(kind, write_share, break_it);
    assert_eq!(pages.len(), 1, "{kind}: {pages:#?}");
    pages[0]
}

fn all_found(kind: GuestKind, write_share: f64, break_it: impl Fn(&Plain)) -> Vec<WrongPage> {
    let plain = Plain::new(1 << 20);
    let spec = GuestSpec { vcpus: 2, write_share, tag_check: true, ..spec(kind, &plain) };
    let guest = start(GuestSpec { workload: Workload::Stamp { locality: None }, ..spec }, &plain);
    let all_beyond = |accesses| (0..2).all(|vcpu| guest.vcpu_counters(vcpu).accesses > accesses);
    until("every page was looked at, very likely", || all_beyond(20 * plain.frames()));
    assert_eq!(guest.counters().wrong, 0);
    let most_accesses = || (0..2).map(|vcpu| guest.vcpu_counters(vcpu).accesses).max().expect("two vCPUs");
    // A guest that is just about to write the page writes over the break: then there is another.
    for _ in 0..20 {
        break_it(&plain);
        let accesses = most_accesses();
        let looked_past = || write_share > 0.0 && all_beyond(accesses + 20 * plain.frames());
        until("the break is found", || guest.counters().wrong > 0 || looked_past());
        if guest.counters().wrong > 0 {
            break;
        }
    }
    // The guest goes on with what it found, and finds nothing else.
    let accesses = most_accesses();
    until("some more is looked at", || all_beyond(accesses + 20 * plain.frames()));
    let report = guest.stop().expect("an orderly stop");
    let pages: Vec<WrongPage> = report.wrong_pages().copied().collect();
    assert_eq!(pages.len() as u64, report.counters().wrong);
    println!("{kind}: {}", pages[0]);
    pages
}

#[test]
fn a_foreign_word_is_found() {
    for kind in kinds() {
        let page = found(kind, 0.0, |plain| plain.word(VICTIM, 0).store(0xdead_0000_0042, Relaxed));
        assert_eq!((page.gfn, page.kind), (VICTIM, WrongKind::First));
        assert_eq!((page.expected, page.found), (pattern(7, VICTIM)[0], 0xdead_0000_0042));
        assert_eq!(page.words[1..], pattern(7, VICTIM)[1..]);
        assert_eq!(page.vcpu, 0, "frame 77 lies in block 2 of 32 frames");
    }
}

#[test]
fn a_torn_page_is_found() {
    for kind in kinds() {
        for offset in [MIDDLE, LAST] {
            let page = found(kind, 0.0, |plain| {
                plain.word(VICTIM, offset).fetch_xor(1 << 40, Relaxed);
            });
            assert_eq!((page.gfn, page.kind), (VICTIM, WrongKind::Torn));
            assert_eq!(page.words[0], pattern(7, VICTIM)[0]);
            assert_ne!(page.words[1..], pattern(7, VICTIM)[1..]);
        }
    }
}

#[test]
fn a_page_lost_without_a_request_is_found() {
    for kind in kinds() {
        let page = found(kind, 1.0, |plain| plain.drop_pages(GfnRange::frame(VICTIM)));
        assert_eq!(page.gfn, VICTIM);
        if page.words == [0; 3] {
            assert_eq!((page.kind, page.found), (WrongKind::First, 0));
            assert_eq!(page.expected & 0xffff_ffff, VICTIM.as_u64(), "the last stamp");
            assert_eq!(page.diagnosis(), "its content has been lost");
        } else {
            // It went between two words that the guest read or wrote.
            assert!(page.words.contains(&0), "{page}");
        }
    }
}

#[test]
fn a_page_mapped_at_the_wrong_frame_is_found() {
    for kind in kinds() {
        let pages = all_found(kind, 0.0, |plain| {
            for offset in WORD_OFFSETS {
                let other = plain.word(Gfn::new(78), offset).load(Relaxed);
                plain.word(VICTIM, offset).store(other, Relaxed);
            }
        });
        // The words are written one by one: the guest may find it torn as well.
        assert!(pages.iter().all(|page| page.gfn == VICTIM), "{pages:#?}");
        let page = pages.iter().find(|page| page.kind == WrongKind::First).expect("a wrong first word");
        assert_eq!(page.found & 0xffff_ffff, 78);
        assert_eq!(page.diagnosis(), "not from this frame, as far as can be told");
    }
}

#[test]
fn any_vcpu_sees_a_foreign_tag() {
    for kind in kinds() {
        let plain = Plain::new(1 << 20);
        // vCPU 0 looks at pages of both, vCPU 1 at none: both look by tag only.
        let spec = GuestSpec { vcpus: 2, cross_every: 1, tag_check: true, ..spec(kind, &plain) };
        let guest = start(spec, &plain);
        until("both run", || (0..2).all(|vcpu| guest.vcpu_counters(vcpu).accesses > 1000));
        assert_eq!(guest.counters().wrong, 0);
        plain.word(VICTIM, 0).store(9 << 32 | 78, Relaxed);
        until("both find it", || (0..2).all(|vcpu| guest.vcpu_counters(vcpu).wrong > 0));
        let pages = guest.wrong_pages();
        assert!(pages.iter().all(|page| page.kind == WrongKind::Tag && page.gfn == VICTIM), "{pages:#?}");
        assert_eq!((pages[0].expected, pages[0].found), (VICTIM.as_u64(), 9 << 32 | 78));
        guest.stop().expect("an orderly stop");
    }
}

#[test]
fn more_wrong_pages_than_records_are_counted() {
    for kind in kinds() {
        let plain = Plain::new(1 << 20);
        plain.fill(7);
        let spec =
            GuestSpec { workload: Workload::Scan, max_accesses: Some(plain.frames()), ..spec(kind, &plain) };
        let guest = afterimage_vm::Guest::start(spec, |_| [1; 3]).expect("a guest");
        let report = plain::finish(guest);
        assert_eq!(report.counters().wrong, plain.frames());
        let frames: Vec<u64> = report.wrong_pages().map(|page| page.gfn.as_u64()).collect();
        assert_eq!(frames, (0..16).collect::<Vec<_>>());
    }
}
